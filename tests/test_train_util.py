"""The training loop's own rules: options, averages, learning rate, drops."""

import itertools
from dataclasses import asdict

import pytest
import recipes
import torch as th
from conftest import TINY, write_images
from torch.utils.flop_counter import FlopCounterMode

import image_train
from guided_diffusion import checkpoint, logger
from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.data_stream import stream
from guided_diffusion.image_datasets import load_data, load_dataset
from guided_diffusion.script_util import (
    args_to_dict,
    condition_spec,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.train_options import TrainOptions
from guided_diffusion.train_util import TrainLoop


@pytest.fixture
def make_loop(data_dir, tmp_path):
    """Gives training loops that start from equal weights."""

    def make(data=None, resume_checkpoint="", flags=(), **options) -> TrainLoop:
        args = image_train.create_argparser().parse_args([*TINY, *flags])
        th.manual_seed(0)
        model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
        spec: ConditionSpec = condition_spec(vars(args))
        source = dict(data_dir=str(data_dir), dataset_mode="monuseg", image_size=16, batch_size=4, **asdict(spec))
        options = TrainOptions(batch_size=4, **options)
        data = data or load_data(**source)
        parts = dict(model=model, diffusion=diffusion, spec=spec, data=data, options=options)
        return TrainLoop(**parts, resume_checkpoint=resume_checkpoint)

    with logger.scoped_configure(str(tmp_path / "log"), ["log"]):
        yield make


def test_learning_rate_falls_to_zero(make_loop):
    loop = make_loop(lr=1e-3, lr_anneal_steps=4)
    rates = []
    for _ in range(4):
        loop.run_step(*next(loop.data))
        rates.append(loop.opt.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_dropped_conditions_are_the_null_condition(make_loop):
    """Training with every condition dropped is training on a zero condition."""

    def nulled(data):
        for batch, cond in data:
            cond = {name: th.zeros_like(value) if th.is_tensor(value) else value for name, value in cond.items()}
            yield batch, cond

    dropped = make_loop(drop_rate=1.0)
    plain = make_loop()
    plain.data = nulled(plain.data)
    full = make_loop()
    for loop in (dropped, plain, full):
        for _ in range(2):
            loop.run_step(*next(loop.data))
    pairs = list(zip(dropped.model.parameters(), plain.model.parameters(), full.model.parameters()))
    assert all(th.equal(a, b) for a, b, _ in pairs)
    assert any(not th.equal(a, c) for a, _, c in pairs)


def test_a_step_on_images_without_masks(data_dir, tmp_path, make_loop):
    """Their conditions by hand: -1 in the edge channel, and their colours, which dropped ones do not have."""
    spec = ConditionSpec(use_hv_map=True, use_col_map=True, num_classes=6, mark_unknown=True)
    folders = dict(data_dir=str(data_dir), unlabelled_dir=str(write_images(tmp_path / "other")))
    dataset = load_dataset(**folders, dataset_mode="monuseg", image_size=16, spec=spec, ids=False)
    made, by_hand = make_loop(drop_rate=0.3), make_loop()
    made.spec, any_dropped = spec, False
    for step in range(3):
        batch, cond = next(itertools.islice(stream(dataset, 4, unlabelled_share=0.5), step, None))
        y = th.zeros(4, 6, 16, 16)
        dropped = made._draw(batch.shape)[3]
        for k, index in enumerate(cond["index"].tolist()):
            known = index < 8 and not dropped[k]
            y[k, :2] = cond["label"][k] if known else 0
            y[k, 2:5] = 0 if dropped[k] else cond["col_map"][k] / 127.5 - 1
            y[k, 5] = cond["edge"][k] if known else -1
        assert (cond["index"] >= 8).sum() == 2
        any_dropped |= bool(dropped.any())
        made.run_step(batch, cond)
        by_hand.run_step(batch, {"y": y})
    assert any_dropped
    assert all(th.equal(a, b) for a, b in zip(made.model.parameters(), by_hand.model.parameters()))


V, X = "--predict_v True", "--predict_xstart True"
MIN_SNR = "--loss_weights min_snr --min_snr_gamma 3"


@pytest.mark.parametrize("words", ["", V, X, MIN_SNR, f"{V} {MIN_SNR}", f"{X} {MIN_SNR}", f"{V} --spade_channels 8"])
def test_a_step_is_what_its_flags_say(make_loop, words):
    """Its gradients by hand."""
    loop, by_hand = (make_loop(flags=f"{words} --learn_sigma False".split()) for _ in range(2))
    for model in (loop.model, by_hand.model):
        generator = th.Generator().manual_seed(1)
        for p in model.parameters():  # of which some begin with zeros
            p.data += 0.02 * th.randn(p.shape, generator=generator)
    batch, y = next(loop.data)[0], th.randn(4, 6, 16, 16, generator=generator)
    t, _, noise, _ = loop._draw(batch.shape)
    loop.forward_backward(batch, {"y": y})

    left = th.tensor(loop.diffusion.alphas_cumprod)[t]
    alpha, sigma = (part.sqrt().float().view(-1, 1, 1, 1) for part in (left, 1 - left))
    target = alpha * noise - sigma * batch if V in words else batch if X in words else noise
    snr = left / (1 - left)
    larger = snr + 1 if V in words else th.ones(4) if X in words else snr
    weights = snr.clamp(max=3) / larger if MIN_SNR in words else th.ones(4)
    out = by_hand.model(alpha * batch + sigma * noise, t, y=y)
    (weights * (out - target).square().mean((1, 2, 3))).mean().backward()
    for p, expected in zip(loop.model.parameters(), by_hand.model.parameters()):
        th.testing.assert_close(p.grad, expected.grad, rtol=1e-3, atol=1e-5)
    hidden = dict(loop.model.named_parameters())["output_blocks.0.0.in_norm.mlp_shared.0.weight"].shape[0]
    assert hidden == (8 if "spade" in words else 128)


def test_half_dropped_depends_on_seed_and_step_alone(make_loop):
    first, second, other = make_loop(seed=1), make_loop(seed=1), make_loop(seed=2)
    for loop, step in ((first, 3), (second, 3), (other, 3)):
        loop.step = step
    draws = [loop._draw(th.Size([6, 3, 4, 4])) for loop in (first, second, other)]
    assert all(th.equal(a, b) for a, b in zip(draws[0], draws[1]))
    assert not th.equal(draws[0][2], draws[2][2])
    second.step = 4
    assert not th.equal(second._draw(th.Size([6, 3, 4, 4]))[2], draws[0][2])


def test_a_step_that_is_skipped_moves_nothing(make_loop):
    loop = make_loop(lr=1e-2)
    loop.mp_trainer.use_fp16 = True
    loop.mp_trainer.lg_loss_scale = 128.5  # beyond fp32's range: every gradient is infinite
    before = [p.detach().clone() for p in loop.model.parameters()]
    loop.run_step(*next(loop.data))
    assert all(th.equal(a, b) for a, b in zip(before, loop.model.parameters()))
    assert all(th.equal(a, b) for a, b in zip(before, loop.averages[0].params))
    assert loop.mp_trainer.lg_loss_scale == 127.5 and loop.step == 1


def test_nothing_is_drawn_from_the_global_generator(make_loop):
    loop = make_loop(drop_rate=0.5)
    before = th.get_rng_state()
    for batch, cond in itertools.islice(loop.data, 2):
        loop.run_step(batch, cond)
    assert th.equal(before, th.get_rng_state())


def test_training_goes_on_alike_after_borrowing(make_loop):
    looked, plain = make_loop(lr=1e-2, ema_rate="0.5"), make_loop(lr=1e-2, ema_rate="0.5")
    for loop in (looked, plain):
        for _ in range(3):
            loop.run_step(*next(loop.data))
            if loop is looked:
                with loop.averages[0].swapped_in():
                    pass
    assert all(th.equal(a, b) for a, b in zip(looked.model.parameters(), plain.model.parameters()))
    assert all(th.equal(a, b) for a, b in zip(looked.averages[0].params, plain.averages[0].params))


def test_gradients_are_clipped(make_loop):
    plain, clipped, loose = make_loop(), make_loop(grad_clip=1e-3), make_loop(grad_clip=1e6)
    for loop in (plain, clipped, loose):
        loop.run_step(*next(loop.data))
    norm = plain.mp_trainer.grad_norm
    th.testing.assert_close(clipped.mp_trainer.grad_norm, norm)
    means = [[loop.opt.state[p]["exp_avg"] for p in loop.model.parameters()] for loop in (plain, clipped, loose)]
    for whole, less, same in zip(*means):
        th.testing.assert_close(less, whole * (1e-3 / norm), rtol=1e-3, atol=1e-12)
        assert th.equal(whole, same)


@pytest.mark.parametrize("count", [int, th.tensor])
def test_the_references_files_are_gone_on_from(make_loop, tmp_path, count):
    """No state file, and an optimiser that was not fused, of a torch that had fewer settings."""
    source = make_loop()
    plain = th.optim.AdamW(source.model.parameters(), lr=1e-2, weight_decay=0.1)
    generator = th.Generator().manual_seed(0)
    grads = [[th.randn(p.shape, generator=generator) for p in source.model.parameters()] for _ in range(4)]

    def take_step(optimizer, model, n):
        for p, grad in zip(model.parameters(), grads[n]):
            p.grad = grad.clone()
        optimizer.step()

    for n in range(3):
        take_step(plain, source.model, n)
    state = plain.state_dict()
    for own in state["state"].values():
        own["step"] = count(int(own["step"]))
    settings = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
    state["param_groups"] = [{key: group[key] for key in settings} for group in state["param_groups"]]
    weights = source.model.state_dict()
    for name, content in (
        ("opt000003.pt", state),
        ("model000003.pt", weights),
        ("ema_0.9999_000003.pt", {key: value + 1 for key, value in weights.items()}),
    ):
        checkpoint.save(content, str(tmp_path), name)

    loop = make_loop(resume_checkpoint=str(tmp_path / "model000003.pt"), lr=1e-3)
    assert (loop.step, loop.samples) == (3, 12)
    for p, theirs, average in zip(loop.model.parameters(), source.model.parameters(), loop.averages[0].params):
        assert th.equal(p, theirs) and th.equal(average, theirs + 1)
        for name in ("exp_avg", "exp_avg_sq"):
            assert th.equal(loop.opt.state[p][name], plain.state[theirs][name])
    (group,) = loop.opt.param_groups
    assert group["lr"] == 1e-3 and group["weight_decay"] == 0 and group["fused"]

    for own in plain.state.values():
        own["step"] = th.tensor(3.0)
    plain.param_groups[0].update(lr=1e-3, weight_decay=0.0)
    take_step(plain, source.model, 3)
    take_step(loop.opt, loop.model, 3)
    for p, theirs in zip(loop.model.parameters(), source.model.parameters()):
        th.testing.assert_close(p, theirs, rtol=1e-5, atol=1e-7)
    loop.run_step(*next(loop.data))
    assert loop.step == 4 and all(p.isfinite().all() for p in loop.model.parameters())


# ---- what a step costs ----

# Recipe of recipes.py -> floating-point operations of a step, forward and backward, an image.
WIDE, NARROW = 8_407_957_504, 3_459_186_688
FLOPS = dict.fromkeys(recipes.RECIPES, WIDE)
FLOPS |= dict.fromkeys(["x+spade32", "v+spade32", "v+spade32+min_snr", "few", "few+unlabelled"], NARROW)
FLOPS |= {"x+spade64": 5_108_776_960, **dict.fromkeys(["eps", "eps+min_snr"], 8_413_265_920)}  # these learn variances


@pytest.mark.parametrize("recipe", FLOPS)
def test_floating_point_operations_of_a_step(recipe):
    words = [*recipes.MODEL.split(), *recipes.RECIPES[recipe].flags.split()]
    args = image_train.create_argparser().parse_args(words)
    with th.device("meta"), FlopCounterMode(display=False) as counter:
        model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
        x, y, t = th.empty(1, 3, 32, 32), th.empty(1, 6, 32, 32), th.zeros(1, dtype=th.long)
        diffusion.training_losses(model, x, t, model_kwargs={"y": y}, noise=x)["loss"].sum().backward()
    assert counter.get_total_flops() == FLOPS[recipe]
