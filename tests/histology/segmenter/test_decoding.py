"""Targets, instances and tiles of the segmenter, and the network behind them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch as th

from guided_diffusion.cell_classes import CellClass, named
from guided_diffusion.histology.evaluation.instance_metrics import matches, measure, overlap_table
from guided_diffusion.histology.features.lite0 import Lite0, load_weights, shipped_weights
from guided_diffusion.histology.segmenter import decoding
from guided_diffusion.histology.segmenter.decoding import Segmenter, hv_target, instances, load_segmenter, voted
from guided_diffusion.histology.segmenter.net import AdaptiveNorm, load_imagenet_weights, seeded_net
from guided_diffusion.histology.slides import annotations, toy
from guided_diffusion.magnification import REFERENCE_MPP

CPU = th.device("cpu")


def discs(*centres, radius=9, size=64):
    rows, columns = np.mgrid[:size, :size]
    inst_map = np.zeros((size, size), np.int32)
    for number, (row, column) in enumerate(centres, start=1):
        inst_map[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = number
    return inst_map


def brute_force_target(inst_map):
    target = np.zeros((*inst_map.shape, 2))
    for inst_id in set(np.unique(inst_map)) - {0}:
        pixels = np.argwhere(inst_map == inst_id)
        for axis in (0, 1):
            offset = pixels[:, 1 - axis] - pixels[:, 1 - axis].mean()
            for (row, column), value in zip(pixels, offset):
                reach = -offset.min() if value < 0 else offset.max()
                target[row, column, axis] = value / reach if reach else 0
    return target


@pytest.mark.parametrize("seed", range(5))
def test_target_agrees_with_a_loop_over_nuclei(seed):
    rng = np.random.default_rng(seed)
    inst_map = np.zeros((24, 20), np.int32)
    for inst_id in (900_000, 3, 17, 5):
        row, column, height, width = rng.integers(0, 14, 2).tolist() + rng.integers(1, 9, 2).tolist()
        inst_map[row : row + height, column : column + width] = inst_id
    assert np.allclose(hv_target(inst_map), brute_force_target(inst_map), atol=1e-6)


def test_target_runs_from_minus_one_to_one_with_x_first():
    inst_map = np.zeros((5, 9), np.int32)
    inst_map[1:4, 2:7] = 4
    target = hv_target(inst_map)
    assert np.allclose(target[2, :, 0], [0, 0, -1, -0.5, 0, 0.5, 1, 0, 0])
    assert np.allclose(target[:, 4, 1], [0, -1, 0, 1, 0])
    assert target.dtype == np.float32


@pytest.mark.parametrize("size", [(7, 5), (1, 1)])
def test_target_of_nothing_and_of_one_pixel_is_zero(size):
    inst_map = np.zeros(size, np.int32)
    assert not hv_target(inst_map).any()
    inst_map[0, 0] = 1
    assert not hv_target(inst_map).any()


def test_perfect_maps_give_touching_nuclei_back():
    inst_map = discs((14, 14), (14, 31), (40, 20), (50, 50))
    found = instances((inst_map > 0).astype(np.float32), hv_target(inst_map))
    figures = measure(inst_map, found)
    assert figures["found_nuclei"] == 4 and figures["f1@0.9"] == 1
    assert found.dtype == np.int32 and set(np.unique(found)) == set(range(5))


def test_perfect_maps_of_drawn_tissue_give_the_nuclei_back():
    slide = toy.draw_slide(seed=0)
    found = instances((slide.inst_map > 0).astype(np.float32), hv_target(slide.inst_map))
    assert measure(slide.inst_map, found)["f1@0.5"] > 0.95


def test_perfect_maps_of_a_real_slide_give_its_nuclei_back(monuseg):
    slide = next(s for s in annotations.find_slides(monuseg / "raw") if s.split == annotations.TEST_SPLIT)
    _, inst_map = annotations.read_slide(slide)
    found = instances((inst_map > 0).astype(np.float32), hv_target(inst_map))
    figures = measure(inst_map, found)
    assert figures["f1@0.9"] == 1 and figures["aji"] > 0.999


@pytest.mark.parametrize("mpp", [0.125, 0.25, 0.5])
@pytest.mark.parametrize(("smallest", "column"), [(50, 16), (20, 0)])
def test_what_is_too_small_for_a_nucleus_goes_by_the_magnification_and_the_border(mpp, smallest, column):
    least = math.ceil(smallest * (0.25 / mpp) ** 2)
    for size in (least - 1, least):
        rows, columns = np.divmod(np.arange(size), math.ceil(math.sqrt(size)))
        inst_map = np.zeros((64, 64), np.int32)
        inst_map[16 + rows, column + columns] = 1
        found = instances((inst_map > 0).astype(np.float32), hv_target(inst_map), mpp)
        assert np.array_equal(found, inst_map if size == least else np.zeros_like(inst_map))


def test_perfect_maps_of_small_patches_at_half_resolution_give_their_nuclei_back():
    whole = toy.draw_slide(seed=0).inst_map[::2, ::2]
    counts = np.zeros(3)
    for row in range(0, 128, 32):
        for column in range(0, 128, 32):
            inst_map = whole[row : row + 32, column : column + 32]
            table = overlap_table(inst_map, instances((inst_map > 0) * 1.0, hv_target(inst_map), mpp=0.5))
            counts += len(matches(table, 0.5)), len(table.truth_area), len(table.found_area)
    assert 2 * counts[0] / (counts[1] + counts[2]) > 0.93


@pytest.mark.filterwarnings("error")
def test_instances_are_whole_large_enough_and_without_holes():
    probability = np.zeros((40, 60), np.float32)
    probability[5:20, 5:20] = 1
    probability[11:14, 11:14] = 0  # a hole within
    probability[30:33, 30:34] = 1  # 12 px
    found = instances(probability, hv_target((probability > 0).astype(np.int32)))
    expected = np.zeros((40, 60))
    expected[5:20, 5:20] = 1
    assert np.array_equal(found, expected)


def test_a_hole_at_the_border_or_between_two_nuclei_stays():
    inst_map = np.ones((12, 18), np.int32)
    inst_map[:, 9:] = 2
    inst_map[4, 8:10] = 0
    inst_map[0, 2] = 0
    inst_map[7, 2] = 0
    cleaned = decoding._cleaned(inst_map, REFERENCE_MPP)
    assert cleaned[7, 2] == 1 and cleaned[0, 2] == 0 and not cleaned[4, 8:10].any()


def test_no_nuclei_give_an_empty_map():
    found = instances(np.zeros((20, 30), np.float32), np.zeros((20, 30, 2), np.float32))
    assert found.shape == (20, 30) and not found.any()


@pytest.mark.parametrize("length", [1, 15, 16, 500, 512, 513, 1000, 5000])
def test_tiles_cover_a_side(length):
    starts, size = decoding._tiles(length)
    assert size % 16 == 0 and size <= 512
    assert starts == [k * size for k in range(len(starts))]
    assert starts[-1] < length <= starts[-1] + size


@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (64, 64), (70, 20)])
def test_any_size_is_segmented(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    segmenter = Segmenter(seeded_net(), CPU)
    assert segmenter.segment(image).shape == shape
    probability, position, _ = segmenter.predict(image)
    assert probability.shape == shape and position.shape == (*shape, 2)
    assert probability.min() >= 0 and probability.max() <= 1


def test_tiles_see_what_the_whole_sees(monkeypatch):
    """Seams differ at most where a pixel's field of view, wider than the margin, is cut."""
    image = np.random.default_rng(1).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    net = seeded_net()
    load_imagenet_weights(net)
    whole = Segmenter(net, CPU).predict(image)
    monkeypatch.setattr(decoding, "_TILE", 64)
    tiled = Segmenter(net, CPU).predict(image)
    assert np.abs(whole[0] - tiled[0])[16:-16, 16:-16].max() < 0.02


def test_flips_make_the_answer_turn_with_the_image():
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    segmenter = Segmenter(seeded_net(), CPU, flips=True)
    probability, position, _ = segmenter.predict(image)
    mirrored, mirrored_position, _ = segmenter.predict(np.ascontiguousarray(image[:, ::-1]))
    assert np.allclose(mirrored[:, ::-1], probability, atol=1e-5)
    assert np.allclose(mirrored_position[:, ::-1] * (-1, 1), position, atol=1e-4)


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match="expected"):
        Segmenter(seeded_net(), CPU).segment(image)


def test_the_encoder_is_efficientnet_lite0():
    whole = Lite0().eval()
    load_weights(whole.children(), shipped_weights("the test"))
    net = seeded_net().eval()
    load_imagenet_weights(net)
    for module in net.modules():
        if isinstance(module, AdaptiveNorm):
            module.adapt = 0
    x = th.randn(1, 3, 64, 96, generator=th.Generator().manual_seed(0))
    with th.inference_mode():
        ours, expected = net.stem(x), whole.stem(x)
        for stage, other in zip(net.stages, whole.stages):
            ours, expected = stage(ours), other(expected)
        assert ours.shape == (1, 112, 4, 6) and th.allclose(ours, expected, atol=1e-4)
        assert net(x).shape == (1, 3, 64, 96)
    assert 1e6 < sum(p.numel() for p in net.parameters()) < 3e6


def test_the_norm_mixes_the_image_s_statistics_in():
    norm = AdaptiveNorm(2).eval()
    norm.running_mean, norm.running_var = th.tensor([1.0, -2.0]), th.tensor([4.0, 0.5])
    x = th.randn(3, 2, 5, 7, generator=th.Generator().manual_seed(0)) * 3 + 1
    for share, expected in (
        (0, th.nn.functional.batch_norm(x, norm.running_mean, norm.running_var)),
        (1, th.nn.functional.instance_norm(x)),
    ):
        norm.adapt = share
        assert th.allclose(norm(x), expected, atol=1e-5)
    assert th.equal(norm.running_mean, th.tensor([1.0, -2.0]))
    norm.train()
    plain = th.nn.BatchNorm2d(2)
    assert th.allclose(norm(x), plain(x))


def test_a_class_head_leaves_the_other_weights_and_maps_as_they_are(tmp_path):
    classes = named(["a", "b", "c"])
    plain, classed = seeded_net(seed=5), seeded_net(seed=5, classes=3)
    own, other = plain.state_dict(), classed.state_dict()
    assert other.keys() - own.keys() == {"class_head.weight", "class_head.bias"}
    assert all(th.equal(own[name], other[name]) for name in own)
    image = toy.draw_slide(0, 64).image[:32, :48]
    maps = [Segmenter(net, CPU, True, classes=known).predict(image) for net, known in ((plain, ()), (classed, classes))]
    assert all(np.array_equal(*pair) for pair in zip(maps[0][:2], maps[1][:2])) and maps[0].of_class.shape[2] == 0
    assert np.allclose(maps[1].of_class.sum(2), 1, atol=1e-5) and maps[1].of_class.shape == (32, 48, 3)

    th.save(decoding.as_content(classed, ["A"], classes=classes), tmp_path / "segmenter.pt")
    read = load_segmenter(tmp_path, CPU)
    assert read.classes == classes and th.equal(read.net.class_head.weight, classed.class_head.weight)
    read.check_classes([replace(one, colour=(0, 0, 0)) for one in classes], "DATA")
    with pytest.raises(
        ValueError, match=r"DATA has other classes of nuclei \(1 a, 2 c\) than the segmenter was trained"
    ):
        read.check_classes(named(["a", "c"]), "DATA")
    for broken in ([{"id": 1}], named(["a", "b"]), 3, [{"id": 1, "name": "a", "colour": [0, 0, 300]}]):
        rows = [vars(row) if isinstance(row, CellClass) else row for row in broken] if broken != 3 else 3
        th.save({**decoding.as_content(classed, []), "classes": rows}, tmp_path / "segmenter.pt")
        with pytest.raises(ValueError, match=r"segmenter\.pt"):
            load_segmenter(tmp_path, CPU)


def test_a_nucleus_is_of_the_class_that_most_of_its_pixels_have():
    inst_map = np.array([[1, 1, 1, 0], [2, 2, 0, 3]])
    of_class = np.eye(3)[np.array([[2, 0, 2, 0], [1, 0, 1, 2]])]
    classes = [CellClass(number, name, (0, 0, 0)) for number, name in ((2, "a"), (5, "b"), (9, "c"))]
    assert voted(inst_map, of_class, classes) == {
        1: 9,
        2: 2,
        3: 9,
    }  # the second's pixels are of two: the first of these
    assert voted(0 * inst_map, of_class, classes) == {}


def test_a_segmenter_is_read_back(tmp_path):
    net = seeded_net()
    th.save(decoding.as_content(net, ["B", "A"]), tmp_path / "segmenter.pt")
    for path in (tmp_path, tmp_path / "segmenter.pt"):
        read = load_segmenter(path, CPU)
        assert all(th.equal(a, b) for a, b in zip(read.net.state_dict().values(), net.state_dict().values()))
        assert read.slides == {"A", "B"} and not read.net.training


def test_what_a_segmenter_knows(tmp_path):
    th.save(decoding.as_content(seeded_net(), ["A", "B_01"], ["C"]), tmp_path / "segmenter.pt")
    read = load_segmenter(tmp_path, CPU)
    found = [read.knows(stem, "") for stem in ("A_000", "A", "B_01", "B_01_003", "B_02", "C_000")]
    assert found == [*["was trained on slide A"] * 2, *["was trained on slide B_01"] * 2, "", "was chosen by slide C"]
    assert read.knows("image_1", "A") == "was trained on slide A"


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    content = decoding.as_content(seeded_net(), ["A"], mpp=0.5)
    th.save(content, tmp_path / "segmenter.pt")
    assert load_segmenter(tmp_path, CPU).mpp == 0.5
    del content["held_slides"], content["mpp"]
    th.save(content, tmp_path / "segmenter.pt")
    read = load_segmenter(tmp_path, CPU)
    assert (read.held_slides, read.mpp) == (set(), 0.25)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"kind": "other", "net": {}}, "another kind"),
        ([1, 2], "another kind"),
        ({"kind": decoding.KIND}, "another layout"),
        ({"kind": decoding.KIND, "net": {"x": th.zeros(1)}, "slides": []}, "another layout"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content, what):
    th.save(content, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=what):
        load_segmenter(tmp_path / "m.pt", CPU)


def test_a_broken_checkpoint_is_refused(tmp_path):
    path = tmp_path / "m.pt"
    th.save(decoding.as_content(seeded_net(), []), path)
    whole = path.read_bytes()
    for data in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="broken"):
            load_segmenter(path, CPU)
    with pytest.raises(FileNotFoundError, match="train_segmenter"):
        load_segmenter(tmp_path / "none.pt", CPU)


def test_outlines_lie_on_the_nuclei():
    inst_map = np.zeros((8, 8), np.int32)
    inst_map[1:7, 1:4], inst_map[1:7, 4:7] = 1, 2
    drawn = decoding.outlined(np.zeros((8, 8, 3), np.uint8), inst_map, (9, 8, 7))
    outline = (drawn == (9, 8, 7)).all(axis=2)
    inner = np.zeros((8, 8), bool)
    inner[2:6, 2], inner[2:6, 5] = True, True
    assert np.array_equal(outline, (inst_map > 0) & ~inner)
