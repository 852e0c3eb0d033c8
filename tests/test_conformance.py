"""The core against the reference's own numbers."""

import json

import numpy as np
import pytest
import torch as th
from reference_numbers import CONFIGS, FOLDER, fill, inputs, seeded

from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.respace import space_timesteps
from guided_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


def largest_error(ours, reference) -> float:
    return float(np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max())


@pytest.fixture(scope="module")
def numbers():
    return np.load(FOLDER / "model.npz")


def build(config, **changes):
    return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **config, **changes})


@pytest.fixture(scope="module")
def case():
    """The configuration with the most numbers: its name, flags, filled model in eval mode, and inputs."""
    return filled_case("custom_mult")


def filled_case(name):
    config = CONFIGS[name]
    return name, config, fill(build(config)[0]).eval(), inputs(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_layout(name):
    """Names, shapes and their order, also of the parameters: optimiser files go by position."""
    expected = json.loads((FOLDER / "state_dict_layouts.json").read_text())[name]
    with th.device("meta"):
        model, _ = build(CONFIGS[name])
    assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == list(expected.items())
    assert [key for key, _ in model.named_parameters()] == list(expected)


@th.no_grad()
@pytest.mark.parametrize("name", ["custom_mult", "small64"])
def test_output(name, numbers):
    name, _, model, (x, y, t) = filled_case(name)
    assert largest_error(model(x, t, y=y), numbers[f"{name}/out"]) < 2e-4


def test_p_mean_variance(case, numbers):
    name, config, model, (x, y, t) = case
    _, diffusion = build(config)
    keys = [key for key in numbers if key.startswith(f"{name}/pmv_s")]
    assert keys
    for key in keys:
        s, quantity = key.split("/pmv_s")[1].split("_", 1)
        with th.no_grad():
            out = diffusion.p_mean_variance(model, x, t, clip_denoised=True, model_kwargs={"y": y, "s": float(s)})
        assert largest_error(out[quantity], numbers[key]) < 1e-3, key


def test_ddim(case, numbers):
    name, config, model, (x, y, _) = case
    _, diffusion = build(config, timestep_respacing="ddim10")
    noise = seeded(name + "/noise", x.shape)
    keys = [key for key in numbers if key.startswith(f"{name}/ddim10_s")]
    assert keys
    for key in keys:
        s = float(key.split("_s")[1])
        sample = diffusion.ddim_sample_loop(model, x.shape, noise=noise, model_kwargs={"y": y, "s": s})
        assert largest_error(sample, numbers[key]) < 2e-3, key


def test_training_losses(case, numbers):
    name, config, model, (x, y, t) = case
    noise = seeded(name + "/noise", x.shape)
    keys = [key for key in numbers if key.startswith(f"{name}/loss_kl")]
    assert keys
    for key in keys:
        kl, rescale, xstart, quantity = key.split("/loss_")[1].split("_")
        diffusion = create_gaussian_diffusion(
            learn_sigma=config["learn_sigma"],
            noise_schedule=config["noise_schedule"],
            use_kl=bool(int(kl[2:])),
            rescale_learned_sigmas=bool(int(rescale[2:])),
            predict_xstart=bool(int(xstart[2:])),
        )
        with th.no_grad():
            terms = diffusion.training_losses(model, x.clamp(-1, 1), t, model_kwargs={"y": y}, noise=noise)
        assert largest_error(terms[quantity], numbers[key]) < 1e-3, key


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [200, 1000])
def test_betas(numbers, name, steps):
    np.testing.assert_allclose(get_named_beta_schedule(name, steps), numbers[f"betas/{name}{steps}"], rtol=1e-12)


def test_respacing():
    for key, kept in json.loads((FOLDER / "respacing.json").read_text()).items():
        steps, counts = key.split("|")
        assert sorted(space_timesteps(int(steps), counts)) == kept, key
