"""Held-out samples: that they stay out, what a model is worth on them, the pictures, and the best checkpoint."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch as th
from conftest import TINY, write_patches
from PIL import Image

import image_sample
import image_train
from guided_diffusion import checkpoint, dist_util
from guided_diffusion import validation as validation_module
from guided_diffusion.pictures import draw_grid
from guided_diffusion.script_util import (
    args_to_dict,
    condition_spec,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.validation import Validation

FEW_STEPS = ["--diffusion_steps", "20"]
TRAIN = "--batch_size 4 --log_interval 2 --val_interval 2 --save_interval 3 --max_steps 6 --ema_rate 0.5".split()


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    """A data set of three slides of four patches, so that one is held out; and a test slide."""
    folder = tmp_path_factory.mktemp("slides")
    write_patches(folder / "MoNuSegTrainingData", count=12)
    write_patches(folder / "MoNuSegTestData", count=4, first=100)
    return folder


def parse(data_dir, *flags):
    return image_train.create_argparser().parse_args(["--data_dir", str(data_dir), *TINY, *flags])


def parts(args):
    """What to train on and what is held out, as image_train.py loads them."""
    return image_train.load_parts(args, condition_spec(vars(args)))


def make(data_dir, *flags, batch_size=4, seed=0) -> Validation:
    args = parse(data_dir, *flags)
    _, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    return Validation(parts(args)[1], condition_spec(vars(args)), diffusion, batch_size, seed)


def make_model(data_dir, *flags, seed=0):
    """The tiny model with weights that do something."""
    args = parse(data_dir, *flags)
    model, _ = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    generator = th.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(0.05 * th.randn(p.shape, generator=generator))
    return model.eval()


# ---- losses ----


@pytest.mark.slow
def test_losses_do_not_depend_on_the_batch_size(slides):
    model = make_model(slides)
    one, three, eight = (make(slides, batch_size=size).losses(model) for size in (1, 3, 8))
    quarters = {f"{name}_q{i}" for name in ("loss", "mse", "vb") for i in range(4)}
    assert one.keys() == {"loss", "mse", "vb", *quarters}
    assert one == pytest.approx(three, rel=1e-6) and one == pytest.approx(eight, rel=1e-6)


@pytest.mark.slow
def test_losses_are_the_same_each_time_and_those_of_the_weights(slides):
    model, validation = make_model(slides), make(slides)
    th.manual_seed(1)
    state, numpy_state = th.get_rng_state(), np.random.get_state()[1].copy()
    first = validation.losses(model)
    assert th.equal(state, th.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()
    th.manual_seed(2)
    assert validation.losses(model) == first
    assert make(slides).losses(model) == first
    assert make(slides, seed=1).losses(model)["loss"] != first["loss"]
    assert validation.losses(make_model(slides, seed=1))["loss"] != pytest.approx(first["loss"], rel=1e-4)


def test_two_ranks_share_the_losses_out(slides, monkeypatch):
    """Each measures its own half, and together they have measured what one does."""
    model, validation = make_model(slides), make(slides)
    alone = validation.losses(model)["loss"]
    monkeypatch.setattr(dist_util, "world_size", lambda: 2)
    monkeypatch.setattr(dist_util, "all_gather", lambda value: [value])
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(dist_util, "rank", lambda rank=rank: rank)
        halves.append(validation.losses(model)["loss"])
    assert halves[0] != halves[1] and sum(halves) / 2 == pytest.approx(alone, rel=1e-6)


def test_timesteps_are_one_of_each_equal_span(slides):
    validation = make(slides)
    t = np.sort(validation._timesteps)
    assert len(t) == validation.total == 64
    spans = np.arange(65) * 1000 / 64
    assert (t >= np.floor(spans[:-1])).all() and (t < spans[1:]).all()
    assert np.bincount(4 * t // 1000).tolist() == [16] * 4
    assert (validation._timesteps == make(slides)._timesteps).all()
    assert (validation._timesteps != make(slides, seed=1)._timesteps).any()


class NotFinite(th.nn.Module):
    """A model whose answers to some timesteps are not finite."""

    def __init__(self, model, first, last):
        super().__init__()
        self.model, self.first, self.last = model, first, last

    def forward(self, x, t, **options):
        out = self.model(x, t, **options)
        out[(self.first <= t) & (t < self.last)] = th.nan
        return out


def test_what_is_not_finite_is_worse_than_any_loss(slides):
    model, validation = make_model(slides), make(slides)
    partly, all_of_it = (validation.losses(NotFinite(model, *span)) for span in ((250, 500), (0, 1000)))
    whole = validation.losses(model)
    infinite = {name for name, value in partly.items() if value == math.inf}
    assert infinite == {"loss", "loss_q1", "mse", "mse_q1", "vb", "vb_q1"}
    assert all(partly[name] == whole[name] for name in whole.keys() - infinite)
    assert whole.keys() == all_of_it.keys() and set(all_of_it.values()) == {math.inf}


# ---- pictures ----


@pytest.mark.parametrize("flags", [[], ["--in_channels", "1", "--num_classes", "4"]])
def test_the_picture_is_written_and_the_same_each_time(slides, tmp_path, flags):
    validation, model = make(slides, *FEW_STEPS, *flags), make_model(slides, *FEW_STEPS, *flags)
    state = th.get_rng_state()
    drawn = validation.draw(model, tmp_path / "previews" / "step000001.png", 2)
    assert th.equal(state, th.get_rng_state())
    assert drawn.dtype == np.uint8 and drawn.ndim == 3 and drawn.shape[2] == 3
    written = np.asarray(Image.open(tmp_path / "previews" / "step000001.png").convert("RGB"))
    assert (written == drawn).all()
    assert (validation.draw(model, tmp_path / "previews" / "step000001.png", 2) == drawn).all()
    other = validation.draw(make_model(slides, *FEW_STEPS, *flags, seed=1), tmp_path / "previews" / "step000001.png", 2)
    assert (other != drawn).any()


def test_no_more_samples_are_drawn_than_there_are(slides, tmp_path):
    validation, model = make(slides, *FEW_STEPS), make_model(slides, *FEW_STEPS)
    assert len(validation.dataset) == 4
    four, many, one = (validation.draw(model, tmp_path / "step.png", count) for count in (4, 99, 1))
    assert (four == many).all() and one.shape[0] < four.shape[0]


@pytest.mark.parametrize("steps", ["1", "2"])
def test_pictures_of_a_process_of_few_steps(slides, tmp_path, monkeypatch, steps):
    titles = []
    monkeypatch.setattr(validation_module, "draw_grid", lambda *args: titles.append(args[2]) or draw_grid(*args))
    flags = ["--diffusion_steps", steps]
    assert make(slides, *flags).draw(make_model(slides, *flags), tmp_path / "step.png", 1).any()
    assert titles == ["step: dpmpp_2m_sde, 1 steps"]


def test_no_pass_is_larger_than_the_batch(slides, tmp_path):
    """Neither of losses nor of pictures, which are the same whatever the batch."""
    model, sizes, pictures = make_model(slides, *FEW_STEPS), [], []
    model.register_forward_pre_hook(lambda model, args: sizes.append(len(args[0])))
    for batch_size in (4, 3):
        validation = make(slides, *FEW_STEPS, batch_size=batch_size)
        validation.losses(model)
        pictures.append(validation.draw(model, tmp_path / "step.png", 4).astype(int))
        assert max(sizes) == batch_size
        sizes.clear()
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_validation_takes_as_many_at_once_as_training(slides, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(Validation, "losses", lambda self, model: taken.append(self.batch_size) or {"loss": 1.0})
    run(
        tmp_path / "log",
        slides,
        "--microbatch",
        "2",
        "--preview_samples",
        "0",
        "--max_steps",
        "2",
        monkeypatch=monkeypatch,
    )
    assert taken == [2]


# ---- what is held out ----


def stems(dataset):
    return {item.stem for item in dataset.items}


def test_a_slide_is_in_one_part_only(slides):
    for seed in range(5):
        train, held_out = parts(parse(slides, "--seed", str(seed), "--augment", "True"))
        assert len(train) == 8 and len(held_out) == 4 and len(stems(train) | stems(held_out)) == 12
        assert not {item.slide for item in train.items} & {item.slide for item in held_out.items}
        assert train.augment and not held_out.augment


def test_val_split_chooses_the_other_slides_or_none(slides):
    train, test = parts(parse(slides, "--val_split", "test", "--augment", "True"))
    assert len(train) == 12 and {item.slide for item in test.items} == {"slide-25"} and not test.augment
    train, nothing = parts(parse(slides, "--val_split", "none"))
    assert len(train) == 12 and nothing is None


def test_no_training_slide_left(slides):
    with pytest.raises(ValueError, match="--val_share 0.99 leaves no training slide of 3"):
        parts(parse(slides, "--val_share", "0.99"))


def recorded(monkeypatch):
    """:return: a list that the paths of all batches of a run will be in."""
    seen = []

    def recording(*args, stream=image_train.stream, **options):
        for batch, cond in stream(*args, **options):
            seen.append(cond["path"])
            yield batch, cond

    monkeypatch.setattr(image_train, "stream", recording)
    return seen


def run(out, data_dir, *flags, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(out))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log,csv,tensorboard")
    image_train.main(["--data_dir", str(data_dir), *TINY, *FEW_STEPS, *TRAIN, *flags])
    return out


@pytest.fixture(scope="module")
def trained(slides, tmp_path_factory):
    """A run with validation: its folder, and the paths of its batches."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = recorded(monkeypatch)
        folder = tmp_path_factory.mktemp("run") / "log"
        flags = ["--lr", "3e-2", "--preview_samples", "1"]
        return run(folder, slides, *flags, monkeypatch=monkeypatch), seen


def rows(folder):
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


def test_no_held_out_sample_is_trained_on(slides, trained):
    batches = [Path(path).stem for paths in trained[1] for path in paths]
    assert len(batches) >= 24 and set(batches) == stems(parts(parse(slides))[0])


def test_the_best_is_kept_apart(trained):
    folder, _ = trained
    measured = {int(row["step"]): float(row["val_loss"]) for row in rows(folder) if row["val_loss"]}
    assert list(measured) == [2, 4, 6]
    step = min(measured, key=measured.get)
    names = {f"model{step:06d}.pt", f"ema_0.5_{step:06d}.pt", f"opt{step:06d}.pt", f"state{step:06d}.pt"}
    assert {path.name for path in (folder / "best").iterdir()} == {*names, "config.json", "card.md"}
    config = json.loads((folder / "best" / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text())
    card = (folder / "best" / "card.md").read_text()
    assert f"| {measured[step]:.4g}, at step {step} |" in card and "| 8 patches of 2 slides |" in card
    result = json.loads((folder / "result.json").read_text())
    assert result.pop("best") == {"step": step, "val_loss": pytest.approx(measured[step])}
    path = str(folder / "best" / f"ema_0.5_{step:06d}.pt")
    assert result == {"images": 8, "step": 6, "samples": 24, "checkpoint": path}


def test_the_loss_of_the_log_is_that_of_the_averaged_weights(slides, trained):
    folder, _ = trained
    best = json.loads((folder / "result.json").read_text())
    model = make_model(slides, *FEW_STEPS)
    checkpoint.load_weights(model, best["checkpoint"])
    assert make(slides, *FEW_STEPS).losses(model)["loss"] == pytest.approx(best["best"]["val_loss"], rel=1e-6)
    checkpoint.load_weights(model, str(folder / "best" / checkpoint.model_name(best["best"]["step"])))
    assert make(slides, *FEW_STEPS).losses(model)["loss"] != pytest.approx(best["best"]["val_loss"], rel=1e-6)


def test_previews_are_sampled_at_saves(trained):
    names = [f"step00000{step}{kind}.png" for step in (3, 6) for kind in ("", "_train")]
    assert sorted(path.name for path in (trained[0] / "previews").iterdir()) == sorted(names)


def test_rows_and_pictures_have_the_references_tags(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0] / "tb"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {"sample_val", "sample_train"}
    assert {"train_loss", "train_loss_q0", "train_param_norm", "train_lr", "val_loss", "val_mse"} <= set(
        tags["scalars"]
    )
    assert {row["mode"] for row in rows(trained[0])} == {"train", "val"}


def test_the_best_can_be_sampled_from_without_model_flags(slides, trained, tmp_path):
    path = json.loads((trained[0] / "result.json").read_text())["checkpoint"]
    data = f"--data_dir {slides} --num_workers 0 --batch_size 4 --num_samples 4 --timestep_respacing 2".split()
    image_sample.main([*data, "--model_path", path, "--results_path", str(tmp_path / "out")])
    assert len(list((tmp_path / "out" / "samples").glob("*.png"))) == 4


def test_validation_and_previews_change_nothing_of_the_weights(slides, trained, tmp_path, monkeypatch):
    """A run on the same slides that never looks at the held-out ones gives the same bits."""
    flags = ["--lr", "3e-2", "--preview_samples", "0", "--val_interval", "1000"]
    out = run(tmp_path / "log", slides, *flags, monkeypatch=monkeypatch)
    assert not (out / "previews").exists() and not (out / "best").exists()
    for name in ("model000006.pt", "ema_0.5_000006.pt"):
        one, two = (th.load(folder / name, weights_only=True) for folder in (out, trained[0]))
        assert all(th.equal(one[key], two[key]) for key in one), name


def test_without_validation_there_is_no_best_and_no_preview(slides, tmp_path, monkeypatch):
    out = run(tmp_path / "log", slides, "--val_split", "none", monkeypatch=monkeypatch)
    assert not any("val_loss" in row for row in rows(out))
    assert not (out / "best").exists() and not (out / "previews").exists()
    result = json.loads((out / "result.json").read_text())
    path = str(out / "ema_0.5_000006.pt")
    assert result == {"images": 12, "step": 6, "samples": 24, "checkpoint": path, "best": {}}


def test_two_slides_are_too_few(data_dir, tmp_path, monkeypatch, capsys):
    out = run(tmp_path / "log", data_dir, "--max_steps", "2", monkeypatch=monkeypatch)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("fewer than three slides: none is held out") == 1
    assert not (out / "best").exists() and not (out / "previews").exists() and (out / "model000002.pt").exists()
    assert json.loads((out / "result.json").read_text())["images"] == 8


def test_the_best_of_another_rate_is_not_what_to_sample_from(slides, trained, tmp_path, monkeypatch):
    shutil.copytree(trained[0], tmp_path / "log", symlinks=True)
    out = run(tmp_path / "log", slides, "--ema_rate", "0.9", "--max_steps", "7", monkeypatch=monkeypatch)
    assert json.loads((out / "result.json").read_text())["checkpoint"] == str(out / "ema_0.9_000007.pt")
    assert (out / "ema_0.9_000007.pt").exists()


def test_the_best_so_far_outlives_a_resumed_run(slides, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "log"))
    flags = ["--lr", "3e-2", "--preview_samples", "1"]
    run(tmp_path / "log", slides, *flags, "--max_steps", "3", monkeypatch=monkeypatch)
    run(tmp_path / "log", slides, *flags, monkeypatch=monkeypatch)
    one, two = (json.loads((folder / "result.json").read_text()) for folder in (trained[0], tmp_path / "log"))
    assert one["best"] == two["best"]
    names = [sorted(path.name for path in (folder / "best").iterdir()) for folder in (trained[0], tmp_path / "log")]
    assert names[0] == names[1]
