"""The picture: it is drawn for every kind of embedding, and its colours and strips are where they should be."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.histology.features.cluster_picture import ROWS, by_size, draw_clusters

LABELS = ["0"] * 6 + ["1"] * 10 + ["-1"] * 8


def draw(points, labels=LABELS, is_test=None):
    is_test = np.arange(len(labels)) % 4 == 3 if is_test is None else is_test

    def read(i):
        assert not is_test[i]
        return np.full((20, 20, 3), 10 * (i % 20), np.uint8)

    picture = Image.open(io.BytesIO(draw_clusters(points, labels, is_test, read, "title", 0)))
    return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("dimensions", [0, 1, 2, 3, 40])
def test_draws_any_number_of_dimensions(dimensions):
    pytest.importorskip("matplotlib")
    picture = draw(np.random.default_rng(0).normal(size=(len(LABELS), dimensions)))
    assert picture.shape[0] > 100 and picture.std() > 5
    assert np.array_equal(picture, draw(np.random.default_rng(0).normal(size=(len(LABELS), dimensions))))


def test_more_clusters_than_rows():
    pytest.importorskip("matplotlib")
    labels = [str(i // 2) for i in range(2 * ROWS + 8)]
    assert draw(np.zeros((len(labels), 0)), labels, np.zeros(len(labels), bool)).shape[0] > 60 * ROWS


def test_largest_first_and_noise_last():
    assert by_size(np.array(LABELS))[0] == ["1", "0", "-1"]


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw(np.zeros((len(LABELS), 0)))
