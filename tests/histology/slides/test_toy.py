"""The toy drawings: reproducible, in the raw layout, and annotated with exactly the nuclei they show."""

import importlib

import numpy as np
import pytest

from guided_diffusion.cell_classes import read_classes
from guided_diffusion.histology.slides import annotations, aperio, toy
from guided_diffusion.histology.slides.annotations import TEST_SPLIT, TRAIN_SPLIT

make_toy_monuseg = importlib.import_module("scripts.make_toy_monuseg")


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def slides():
    return [toy.draw_slide([0, 0, k], 192, k) for k in range(8)]


def test_equal_seeds_draw_equal_bytes(tmp_path):
    for name in "ab":
        make_toy_monuseg.main([str(tmp_path / name), "--train", "2", "--test", "1", "--size", "96"])
    make_toy_monuseg.main([str(tmp_path / "c"), "--train", "2", "--test", "1", "--size", "96", "--seed", "1"])
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a)


def test_a_slide_does_not_depend_on_how_many_there_are(tmp_path):
    few = toy.write_toy_monuseg(tmp_path / "few", train=1, test=1, size=64)
    many = toy.write_toy_monuseg(tmp_path / "many", train=3, test=2, size=64)
    assert few[0].read_bytes() == many[0].read_bytes()
    assert few[1].read_bytes() == many[3].read_bytes()


def test_the_xml_rasterises_to_the_nuclei_drawn(slides, tmp_path):
    for slide in slides:
        (tmp_path / "a.xml").write_text(toy.aperio_xml(slide.outlines))
        inst_map = aperio.rasterise(aperio.read_polygons(tmp_path / "a.xml"), *slide.inst_map.shape)
        assert np.array_equal(inst_map, slide.inst_map)


def test_the_layout_is_the_published_one(tmp_path):
    written = toy.write_toy_monuseg(tmp_path, train=2, test=1, size=64)
    found = annotations.find_slides(tmp_path)
    assert [slide.image for slide in found] == written
    assert [slide.split for slide in found] == [TRAIN_SPLIT, TRAIN_SPLIT, TEST_SPLIT]
    assert {path.parent.name for path in written} == {"Tissue Images", "MoNuSegTestData"}
    image, inst_map = annotations.read_slide(found[0])
    assert image.shape == (64, 64, 3) and inst_map.max() >= 1


def test_classes_are_told_in_our_layout_and_differ_in_size_and_stain(tmp_path):
    make_toy_monuseg.main([str(tmp_path), "--train", "3", "--test", "1", "--size", "192", "--classes", "True"])
    found = annotations.find_slides(tmp_path)
    assert [slide.split for slide in found] == [TRAIN_SPLIT] * 3 + [TEST_SPLIT]
    assert {slide.mpp for slide in found} == {0.252} and read_classes(tmp_path) == toy.CLASSES
    for k, slide in enumerate(found[:3]):
        drawn = toy.draw_slide([0, 0, k], 192, k, apart=True)
        image, inst_map = annotations.read_slide(slide)
        assert np.array_equal(image, drawn.image) and np.array_equal(inst_map, drawn.inst_map)
        of_nucleus = annotations.read_classes_of(slide, inst_map, toy.CLASSES)
        assert of_nucleus == drawn.of_nucleus and set(of_nucleus.values()) == {1, 2, 3}
        inner = np.delete(np.arange(1, 1 + inst_map.max()), np.unique(edge_of(inst_map))[1:] - 1)  # whole ones
        of_class = {c: [inst_map == n for n in inner if of_nucleus[n] == c] for c in (1, 2, 3)}
        sizes, greys = zip(*[np.mean([(m.sum(), image[m].mean()) for m in of_class[c]], axis=0) for c in (1, 2, 3)])
        assert sizes[0] > 1.3 * sizes[1] > 1.3 * 1.3 * sizes[2] and greys[0] > greys[1] + 8 > greys[2] + 16
    with pytest.raises(ValueError, match="TCGA-TOY-.* is there and not one of these toy slides"):
        toy.write_toy_monuseg(tmp_path, train=3, test=1)


def edge_of(inst_map):
    return np.concatenate([[0], inst_map[0], inst_map[-1], inst_map[:, 0], inst_map[:, -1]])


def test_nuclei_have_the_sizes_of_40x(slides):
    areas = np.concatenate([np.bincount(slide.inst_map.ravel())[1:] for slide in slides])
    assert 150 < np.median(areas) < 450
    assert np.percentile(areas, 98) < np.pi * 13**2
    spans = [np.linalg.svd(o - o.mean(axis=0), compute_uv=False) for slide in slides for o in slide.outlines]
    elongation = np.array([long / short for long, short in spans])
    assert (elongation > 2).sum() >= 20 and (elongation < 1.3).sum() >= 20


def test_some_nuclei_touch_and_all_stay_visible(slides):
    touching = 0
    for slide in slides:
        m = slide.inst_map
        assert np.unique(m).tolist() == list(range(len(slide.outlines) + 1))
        for a, b in ((m[1:], m[:-1]), (m[:, 1:], m[:, :-1])):
            touching += bool(((a != b) & (a > 0) & (b > 0)).any())
    assert touching >= 8


def test_nuclei_are_darker_and_bluer_than_what_surrounds_them(slides):
    for slide in slides:
        image = slide.image.astype(float)
        nucleus, rest = image[slide.inst_map > 0].mean(axis=0), image[slide.inst_map == 0].mean(axis=0)
        assert nucleus.mean() < rest.mean() - 40
        assert nucleus[2] - nucleus[0] > rest[2] - rest[0]


def test_stains_differ_clearly(slides):
    means = np.array([slide.image[slide.inst_map == 0].mean(axis=0) for slide in slides])
    apart = np.linalg.norm(means[:, None] - means[None], axis=-1) + 1e3 * np.eye(len(means))
    assert apart.min() > 5 and np.median(apart[apart < 1e3]) > 40


@pytest.mark.parametrize(
    ("flags", "what"),
    [(["--train", "0"], "--train is 0"), (["--size", "10"], "--size is 10"), (["--seed", "-1"], "--seed is -1")],
)
def test_bad_flags_are_named_and_nothing_is_written(tmp_path, flags, what):
    with pytest.raises(ValueError, match=what):
        make_toy_monuseg.main([str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_slides_of_another_run_are_not_mixed_in(tmp_path):
    toy.write_toy_monuseg(tmp_path, train=2, test=0, size=64)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="TCGA-TOY-A001"):
        toy.write_toy_monuseg(tmp_path, train=1, test=0, size=64, seed=3)
    assert files_of(tmp_path) == before
