"""Outlines are valid polygons that hold exactly the pixels of their nuclei."""

import json

import numpy as np
import pytest
import shapely
from labelled_set import BOTH, draw_nuclei, labelled_set, write

from guided_diffusion.histology.formats.writers.qupath import QuPath, outlines
from guided_diffusion.image_files import read_image


def pixels_in(geometry: shapely.Geometry, shape: tuple[int, int]) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    return shapely.contains_xy(geometry, columns, rows)


@BOTH
def test_files(told, tmp_path):
    classes, examples = labelled_set(told)
    write(QuPath(classes), examples, tmp_path)
    names = {one.id: one.name for one in classes} or {1: "nucleus"}
    features = []
    for one in examples:
        folder, name = tmp_path / one.entry.split, one.entry.name
        assert np.array_equal(read_image(folder / f"{name}.png"), one.image)
        content = json.loads((folder / f"{name}.geojson").read_text())
        assert content["type"] == "FeatureCollection" and len(content["features"]) == len(one.of_nucleus)
        for feature, (nucleus, number) in zip(content["features"], one.of_nucleus.items()):
            properties = feature["properties"]
            assert (properties["objectType"], properties["name"]) == ("annotation", str(nucleus))
            assert properties["classification"]["name"] == names[number]
            assert len(properties["classification"]["color"]) == 3
            geometry = shapely.from_geojson(json.dumps(feature["geometry"]))
            assert np.array_equal(pixels_in(geometry, one.inst_map.shape), one.inst_map == nucleus)
        features += content["features"]
    assert len({feature["id"] for feature in features}) == len(features)


@pytest.mark.parametrize("seed", range(20))
def test_outlines_are_valid_and_exact(seed):
    """Of blobs, and of noise, whose nuclei touch themselves at corners and have holes in holes."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 3, (17, 23)) * (rng.random((17, 23)) < 0.8)
    for inst in (noise.astype(np.int32), draw_nuclei(seed, 40, 48), np.full((3, 4), 7, np.int32)):
        ids = np.unique(inst[inst > 0])
        found = list(outlines(inst))
        assert len(found) == len(ids)
        for nucleus, outline in zip(ids, found):
            polygons = outline["coordinates"] if outline["type"] == "MultiPolygon" else [outline["coordinates"]]
            rings = [ring for polygon in polygons for ring in polygon]
            assert all(len(ring) >= 5 and ring[0] == ring[-1] for ring in rings)
            geometry = shapely.from_geojson(json.dumps(outline))
            assert geometry.is_valid and geometry.area == (inst == nucleus).sum()
            assert np.array_equal(pixels_in(geometry, inst.shape), inst == nucleus)


def test_no_nucleus_no_outline():
    assert not list(outlines(np.zeros((4, 4), np.int32)))
