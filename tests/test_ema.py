"""Averages of weights: their formula, that they are lent and given back, and their state."""

import contextlib

import pytest
import torch as th
from torch import nn

from guided_diffusion.ema import Ema


@pytest.fixture
def model():
    th.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))


def move(model):
    with th.no_grad():
        for p in model.parameters():
            p += th.randn(p.shape)


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize("rate", [0.5, 0.999])
def test_it_warms_up(model, rate):
    ema, expected = Ema(model, rate), copies(model.parameters())
    for step in range(12):  # at 0.5 the warm-up is over after 8 steps
        move(model)
        ema.update(step)
        now = min(rate, (1 + step) / (10 + step))
        expected = [now * average + (1 - now) * p.detach() for average, p in zip(expected, model.parameters())]
    for ours, average in zip(ema.params, expected):
        th.testing.assert_close(ours, average)


def test_a_step_that_is_not_taken_moves_nothing(model):
    ema = Ema(model, 0.9)
    before = copies(ema.params)
    move(model)
    ema.update(3, th.tensor(False))
    assert all(th.equal(a, b) for a, b in zip(ema.params, before))
    ema.update(3, th.tensor(True))
    assert not any(th.equal(a, b) for a, b in zip(ema.params, before))


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_it_is_lent_to_the_model_and_the_weights_come_back(model, training, raises):
    model.train(training)
    ema = Ema(model, 0.5)
    move(model)
    own, averages = copies(model.parameters()), copies(ema.params)
    with contextlib.suppress(ZeroDivisionError), ema.swapped_in():
        assert not model.training and not model[1].training
        assert all(th.equal(p, average) for p, average in zip(model.parameters(), averages))
        if raises:
            raise ZeroDivisionError
    assert model.training is training and model[1].training is training
    assert all(th.equal(p, before) for p, before in zip(model.parameters(), own))
    assert all(th.equal(a, b) for a, b in zip(ema.params, averages))
    with th.no_grad():
        model[0].weight += 1  # nor do they share memory afterwards
    assert th.equal(ema.params[0], averages[0])


def test_its_state_has_the_models_names_in_order(model):
    ema, other = Ema(model, 0.5), Ema(model, 0.5)
    move(model)
    ema.update(0)
    assert list(ema.state_dict()) == list(model.state_dict())
    other.load_state_dict(dict(reversed(ema.state_dict().items())))
    assert all(th.equal(a, b) for a, b in zip(ema.params, other.params))
    assert not any(a is b for a, b in zip(ema.params, other.params))
