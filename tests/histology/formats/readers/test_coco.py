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


@pytest.mark.parametrize("far", [1e9, -1e9, 10**400, float("nan"), float("inf"), 200])
@pytest.mark.parametrize("place", [0, 3])
def test_an_outline_that_no_image_has_room_for(far, place):
    """pycocotools would take gigabytes for it, or crash."""
    polygon = [1, 1, 5, 1, 5, 4, 1, 4]
    polygon[place] = far
    with pytest.raises(ValueError, match="longer than an image of 11 x 7 px has room for"):
        coco._drawn([polygon, [1, 1, 5, 1, 5, 4]], SHAPE, "a")


def test_many_outlines_are_no_longer_together():
    with pytest.raises(ValueError, match="has room for"):
        coco._drawn([[1, 1, 10, 1, 5, 4]] * 50, SHAPE, "a")


def test_an_outline_along_every_pixel_and_a_little_outside():
    pytest.importorskip("pycocotools")
    comb = [value for x in range(-1, SHAPE[1] + 1) for value in (x, -1 if x % 2 else 8, x + 1, -1 if x % 2 else 8)]
    assert coco._drawn([comb], SHAPE, "a").any()


def test_what_polygons_need_is_said(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("pycocotools"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install pycocotools"):
        coco._drawn([[1, 1, 5, 1, 5, 4]], SHAPE, "a")
