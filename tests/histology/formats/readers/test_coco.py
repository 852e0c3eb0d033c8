"""COCO's outlines: the pixels that pycocotools draws, by whichever of the three ways they are written."""

import builtins

import numpy as np
import pytest
from foreign_sets import encoded

from guided_diffusion.histology.formats.readers import coco

SHAPE = (7, 11)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("packed", [False, True])
def test_run_lengths_are_read_as_they_were_written(seed, packed):
    pytest.importorskip("pycocotools")
    rng = np.random.default_rng(seed)
    shape = SHAPE if seed else (300, 400)  # whose packed numbers take several characters, and are negative
    inside = rng.random(shape) < (0.5 if seed % 2 else 0.01)
    inside[0, 0] = seed % 3 == 0  # the first run, of background, may be 0
    inside[3, 3] = True
    assert np.array_equal(coco._drawn({"size": [*shape], "counts": encoded(inside, packed)}, shape, "a"), inside)


def test_polygons_cover_the_pixels_that_pycocotools_draws():
    mask = pytest.importorskip("pycocotools.mask")
    polygons = [[1, 1, 5, 1, 5, 4, 1, 4], [7.2, 2.5, 9.9, 2.5, 8.5, 6.1]]
    inside = coco._drawn(polygons, SHAPE, "a")
    assert np.array_equal(inside, mask.decode(mask.merge(mask.frPyObjects(polygons, *SHAPE))))
    assert inside[1:4, 1:5].all() and inside[4, 8] and not inside[:, 6].any()


def test_what_polygons_need_is_said(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("pycocotools"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install pycocotools"):
        coco._drawn([[1, 1, 5, 1, 5, 4]], SHAPE, "a")
