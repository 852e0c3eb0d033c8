"""Mixed precision: gradients against fp32, the loss scale's rises and falls, and which dtype a flag means where."""

import copy
import math
from pathlib import Path

import pytest
import torch as th
from torch import nn

from guided_diffusion import logger
from guided_diffusion.fp16_util import INITIAL_LOG_LOSS_SCALE, MixedPrecisionTrainer, cast_convolutions, compute_dtype
from guided_diffusion.nn import Conv1d, Conv2d, GroupNorm32


@pytest.fixture(autouse=True)
def log_file(tmp_path):
    """A logger of this test's own."""
    path = tmp_path / "log.txt"
    path.touch()
    with logger.scoped_configure(str(tmp_path), ["log"]):
        yield path


def make_params():
    """Parameters of every dimension; in two groups, as an optimiser may hold them."""
    g = th.Generator().manual_seed(0)
    return [nn.Parameter(th.randn(shape, generator=g)) for shape in [(), (3,), (2, 3), (2, 1, 3, 3)]]


def make_trainer(params, use_fp16=False, **options):
    return MixedPrecisionTrainer(model=nn.ParameterList(params), use_fp16=use_fp16, **options)


def make_sgd(params, **options):
    return th.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, **options)


def loss_of(params):
    return sum((p**2 / 2 + p).sum() for p in params)  # its gradient is p + 1


def poisoned_loss(params, which, value):
    return loss_of(params) + (params[which] * value).sum()


# ---- the trainer ----


@pytest.mark.parametrize("lg_loss_scale", [0.0, 12.0, INITIAL_LOG_LOSS_SCALE, 20.3])
def test_fp16_gradients_and_step_are_those_of_fp32(lg_loss_scale):
    params = make_params()
    before = [p.detach().clone() for p in params]
    trainer = make_trainer(params, True, initial_lg_loss_scale=lg_loss_scale)
    loss = loss_of(params)
    trainer.zero_grad()
    trainer.backward(loss)
    for p, b in zip(params, before):
        th.testing.assert_close(p.grad, (b + 1) * 2**lg_loss_scale)
    assert trainer.optimize(make_sgd(params))
    for p, b in zip(params, before):
        if lg_loss_scale == int(lg_loss_scale):  # a power of two: nothing is rounded
            assert th.equal(p.grad, b + 1)
        th.testing.assert_close(p.grad, b + 1)
        th.testing.assert_close(p.detach(), b - 0.1 * (b + 1))


def test_initial_scale_is_two_to_the_twenty():
    assert make_trainer(make_params(), True).lg_loss_scale == 20


def test_the_scale_saves_gradients_that_fp16_cannot_hold():
    """The gradient of the fp16 activation is 1e-8, below fp16's least number, 6e-8."""
    w = nn.Parameter(th.tensor([3.0]))

    def tiny_loss():
        return ((w.half() * 1).float() * 1e-8).sum()

    tiny_loss().backward()
    assert w.grad.item() == 0

    trainer = make_trainer([w], True)
    trainer.zero_grad()
    trainer.backward(tiny_loss())
    trainer.optimize(th.optim.SGD([w], lr=1.0))
    assert w.grad.item() == pytest.approx(1e-8, rel=1e-3)


def test_good_steps_raise_the_scale():
    params = make_params()
    trainer = make_trainer(params, True, fp16_scale_growth=0.25)
    sgd = make_sgd(params)
    for step in range(1, 6):
        trainer.zero_grad()
        trainer.backward(loss_of(params))
        trainer.optimize(sgd)
        assert trainer.lg_loss_scale == 20 + 0.25 * step


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_overflow_skips_the_step_and_halves_the_scale(which, value):
    """Whichever parameter has it, no parameter moves, nor does the optimiser's state."""
    params = make_params()
    before = [p.detach().clone() for p in params]
    trainer, sgd = make_trainer(params, True), make_sgd(params, momentum=0.9)
    trainer.backward(poisoned_loss(params, which, value))
    assert not trainer.optimize(sgd)
    assert trainer.lg_loss_scale == 19
    assert all(th.equal(p, b) for p, b in zip(params, before))
    assert not sgd.state

    # The next step, from fresh gradients, is a good one.
    trainer.zero_grad()
    trainer.backward(loss_of(params))
    assert trainer.optimize(sgd)
    assert trainer.lg_loss_scale == 19.001
    for p, b in zip(params, before):
        th.testing.assert_close(p.detach(), b - 0.1 * (b + 1))


def test_the_scale_falls_until_fp16_holds_the_gradients():
    w = nn.Parameter(th.tensor([3.0]))
    trainer, sgd = make_trainer([w], True), th.optim.SGD([w], lr=0.01)
    taken = []
    while not any(taken):
        trainer.zero_grad()
        trainer.backward((w.half() * 1).float().sum())
        taken.append(bool(trainer.optimize(sgd)))
    # fp16 ends at 65504, just below 2**16: the scales 2**20 ... 2**16 overflow.
    assert taken == [False] * 5 + [True]
    assert trainer.lg_loss_scale == 15.001
    assert w.item() == pytest.approx(2.99)


@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16])
def test_no_scale_in_other_dtypes(dtype):
    params = make_params()
    before = [p.detach().clone() for p in params]
    trainer = make_trainer(params, dtype == th.float16)
    trainer.backward(loss_of(params))
    assert all(th.equal(p.grad, b + 1) for p, b in zip(params, before))
    assert trainer.optimize(make_sgd(params))
    for p, b in zip(params, before):
        th.testing.assert_close(p.detach(), b - 0.1 * (b + 1))
    assert trainer.lg_loss_scale == 20


def test_backward_accumulates_and_zero_grad_drops():
    params = make_params()
    before = [p.detach().clone() for p in params]
    trainer = make_trainer(params, True)
    trainer.backward(loss_of(params) / 2)
    trainer.backward(loss_of(params) / 2)
    trainer.optimize(make_sgd(params))
    assert all(th.equal(p.grad, b + 1) for p, b in zip(params, before))
    trainer.zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("dtype", [th.float32, th.float16])
def test_parameters_without_gradient_are_left_alone(dtype):
    params = make_params()
    frozen = nn.Parameter(th.ones(2))
    trainer = make_trainer([frozen, *params], dtype == th.float16)
    trainer.backward(loss_of(params))
    assert trainer.optimize(make_sgd([frozen, *params]))
    assert frozen.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [th.float32, th.float16])
def test_the_norm_is_that_of_the_gradients(dtype):
    params = make_params()
    trainer = make_trainer(params, dtype == th.float16)
    norm = math.sqrt(sum((p.detach() + 1).pow(2).sum().item() for p in params))
    trainer.backward(loss_of(params))
    trainer.optimize(make_sgd(params))
    assert trainer.grad_norm.item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("dtype", [th.float32, th.float16])
def test_gradients_are_clipped_by_their_common_norm(dtype):
    params = make_params()
    before = [p.detach().clone() for p in params]
    norm = math.sqrt(sum((p + 1).pow(2).sum().item() for p in before))
    for clip in (norm / 4, norm * 4):
        with th.no_grad():
            th._foreach_copy_(params, before)
        trainer = make_trainer(params, dtype == th.float16, grad_clip=clip)
        trainer.backward(loss_of(params))
        trainer.optimize(make_sgd(params))
        trainer.zero_grad()
        for p, b in zip(params, before):
            th.testing.assert_close(p.detach(), b - 0.1 * (b + 1) * min(clip / norm, 1))


def test_the_scale_never_falls_below_one():
    params = make_params()
    trainer = make_trainer(params, True, initial_lg_loss_scale=1.5)
    for expected in (0.5, 0, 0):
        trainer.zero_grad()
        trainer.backward(poisoned_loss(params, 0, math.inf))
        trainer.optimize(make_sgd(params))
        assert trainer.lg_loss_scale == expected


@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16, th.float16])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_are_not_finite_are_skipped_and_counted(dtype, fused):
    params = make_params()
    adam = th.optim.AdamW(params, lr=0.1, fused=fused)
    trainer = make_trainer(params, dtype == th.float16)
    counts = []
    for value in (None, math.nan, math.inf, None, math.nan):
        before = [p.detach().clone() for p in params]
        trainer.zero_grad()
        trainer.backward(loss_of(params) if value is None else poisoned_loss(params, 1, value))
        assert bool(trainer.optimize(adam)) == (value is None)
        assert all(th.equal(p, b) == (value is not None) for p, b in zip(params, before))
        counts.append((trainer.skipped, trainer.skipped_in_a_row))
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    assert all(int(state["step"]) == 2 for state in adam.state.values())


def test_its_state_is_taken_up():
    params = make_params()
    trainer = make_trainer(params, True)
    trainer.backward(poisoned_loss(params, 0, math.nan))
    trainer.optimize(make_sgd(params))
    other = make_trainer(make_params(), True)
    other.load_state_dict(trainer.state_dict())
    assert (other.lg_loss_scale, other.skipped, other.skipped_in_a_row) == (19, 1, 1)
    assert other.state_dict() == trainer.state_dict()


# ---- the reference's files ----


class Mixed(nn.Module):
    """Vectors and other parameters in turns, as in a network."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 2)


def flat(tensors):
    """The reference's two master parameters in fp16: all vectors one after another, and all others in one row."""
    tensors = list(tensors)
    vectors, others = ([t.flatten() for t in tensors if (t.ndim <= 1) == small] for small in (True, False))
    return [th.cat(vectors), th.cat(others)[None]]


def adam_state(params, settings=("lr", "betas", "eps", "weight_decay", "amsgrad"), step=lambda n: th.tensor(float(n))):
    """The state_dict of an AdamW that has taken two steps on known gradients, as torch had it at the time."""
    params = [nn.Parameter(p.clone()) for p in params]
    adam = th.optim.AdamW(params, lr=1e-3, weight_decay=0.1)
    for scale in (1, 2):
        for p in params:
            p.grad = (scale * p.detach()).cos()
        adam.step()
    state = adam.state_dict()
    for entry in state["state"].values():
        entry["step"] = step(entry["step"])
    state["param_groups"] = [{name: group[name] for name in (*settings, "params")} for group in state["param_groups"]]
    return state


@pytest.mark.parametrize("use_fp16", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("step", [int, lambda n: th.tensor(float(n))])
def test_its_optimiser_files_load_of_fp32_and_of_fp16(use_fp16, fused, step):
    model = Mixed()
    expected = adam_state(model.parameters())["state"]
    files = (
        adam_state(model.parameters(), step=step),
        adam_state(flat(p.detach() for p in model.parameters()), step=step),
    )
    assert [len(file["state"]) for file in files] == [6, 2] and files[1]["state"][1]["exp_avg"].shape[0] == 1
    for file in files:
        trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16)
        adam = th.optim.AdamW(trainer.master_params, lr=0.5, fused=fused)
        trainer.load_optimizer_state(adam, file)
        for k, p in enumerate(model.parameters()):
            assert float(adam.state[p]["step"]) == 2
            for name in ("exp_avg", "exp_avg_sq"):
                assert th.equal(adam.state[p][name], expected[k][name]), (k, name)
        assert adam.param_groups[0]["lr"] == 0.5 and adam.param_groups[0]["weight_decay"] == 0.01
        trainer.backward(loss_of(trainer.master_params))
        assert trainer.optimize(adam)


@pytest.mark.parametrize("use_fp16", [False, True])
def test_our_optimiser_files_load_there(use_fp16):
    model = Mixed()
    trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16)
    adam = th.optim.AdamW(trainer.master_params, fused=True)
    trainer.load_optimizer_state(adam, adam_state(model.parameters()))
    state = trainer.optimizer_state(adam)
    # There the optimiser is of all parameters, or of the two flat ones, and is not fused.
    tensors = [p.detach() for p in model.parameters()]
    params = [nn.Parameter(t) for t in (flat(tensors) if use_fp16 else tensors)]
    theirs = th.optim.AdamW(params)
    theirs.load_state_dict(copy.deepcopy(state))  # which keeps the tensors themselves
    expected = adam_state(model.parameters())["state"]
    for name in ("exp_avg", "exp_avg_sq"):
        values = [expected[k][name] for k in range(len(tensors))]
        for p, value in zip(params, flat(values) if use_fp16 else values):
            assert th.equal(theirs.state[p][name], value) and theirs.state[p]["step"] == 2
    for p in params:
        p.grad = th.ones_like(p)
    theirs.step()
    # And what was written is taken up again.
    again = th.optim.AdamW(model.parameters(), fused=True)
    trainer.load_optimizer_state(again, state)
    for p in model.parameters():
        assert all(th.equal(again.state[p][name], adam.state[p][name]) for name in ("exp_avg", "exp_avg_sq", "step"))


def test_another_models_optimiser_files_are_refused():
    model, other = Mixed(), nn.Sequential(Mixed(), nn.Linear(2, 2))
    trainer = MixedPrecisionTrainer(model=model)
    files = [adam_state(other.parameters()), adam_state(flat(p.detach() for p in other.parameters()))]
    turned = adam_state(reversed(list(model.parameters())))
    for file in (*files, turned, {"state": {}, "param_groups": []}, {"a": th.zeros(1)}, {"state": {0: 1}}):
        with pytest.raises(ValueError, match="no optimiser state of this model"):
            trainer.load_optimizer_state(th.optim.AdamW(model.parameters()), file)


def test_master_params_and_state_dicts():
    model = Mixed()
    trainer = MixedPrecisionTrainer(model=model, use_fp16=True, fp16_scale_growth=0.5)
    doubled = trainer.master_params_to_state_dict([2 * p for p in trainer.master_params])
    assert list(doubled) == list(model.state_dict())
    assert all(th.equal(doubled[name], 2 * value) for name, value in model.state_dict().items())
    back = trainer.state_dict_to_master_params(dict(reversed(doubled.items())))
    assert all(th.equal(a, 2 * p) for a, p in zip(back, trainer.master_params, strict=True))


# ---- dtypes ----


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_compute_dtype_without_the_flag(device, log_file):
    assert compute_dtype(False, th.device(device)) == th.float32
    assert "WARNING" not in log_file.read_text()


def test_compute_dtype_on_a_gpu(log_file):
    assert compute_dtype(True, th.device("cuda", 0)) == th.float16
    assert "WARNING" not in log_file.read_text()


@pytest.mark.parametrize(("flags", "dtype"), [("fma avx512_bf16 avx2", th.bfloat16), ("fma avx2", th.float32)])
def test_fp16_on_a_cpu_is_what_it_is_fast_at_with_one_warning(log_file, monkeypatch, flags, dtype):
    monkeypatch.setattr(Path, "read_text", lambda path: f"flags\t\t: {flags}\n")
    assert compute_dtype(True, th.device("cpu")) == dtype
    assert compute_dtype(False, th.device("cpu")) == th.float32
    monkeypatch.undo()
    warnings = [line for line in log_file.read_text().splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert "--use_fp16" in warnings[0]
    assert "bfloat16" in warnings[0]


def test_bf16_where_it_is_imitated_is_slow_and_said_to_be(log_file, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: "flags\t\t: fma avx2\n")
    assert compute_dtype(False, th.device("cpu"), "bf16") == th.bfloat16
    monkeypatch.undo()
    assert "WARNING" in log_file.read_text() and "fp32 is faster" in log_file.read_text()


def test_cast_convolutions_casts_nothing_else():
    module = nn.Sequential(
        Conv2d(32, 32, 3), nn.Sequential(Conv1d(32, 32, 1), GroupNorm32(32, 32)), nn.Linear(4, 4), nn.Conv2d(3, 3, 1)
    )
    cast_convolutions(module, th.float16)
    dtypes = {name: p.dtype for name, p in module.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == th.float16} == {
        f"{layer}.{kind}" for layer in ("0", "1.0", "3") for kind in ("weight", "bias")
    }
    assert {dtypes[name] for name in ("1.1.weight", "1.1.bias", "2.weight", "2.bias")} == {th.float32}
