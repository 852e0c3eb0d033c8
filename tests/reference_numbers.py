"""What the reference answers, and the weights and inputs it was asked with: both sides derive these from names and
shapes alone. fixtures/reference/README.md says what its files hold."""

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

FOLDER = Path(__file__).parent / "fixtures" / "reference"

# Flags over model_and_diffusion_defaults().
_BASE = dict(
    learn_sigma=True,
    noise_schedule="cosine",
    num_res_blocks=2,
    resblock_updown=True,
    use_fp16=False,
    use_scale_shift_norm=True,
    class_cond=False,
    no_instance=False,
    diffusion_steps=1000,
    num_classes=6,
)
CONFIGS: dict[str, dict[str, Any]] = {
    "readme128": dict(_BASE, image_size=128, attention_resolutions="32,16,8", num_channels=128, num_head_channels=32),
    "small64": dict(_BASE, image_size=64, attention_resolutions="16,8", num_channels=32, num_head_channels=32),
    "custom_mult": dict(
        _BASE,
        image_size=32,
        attention_resolutions="8",
        num_channels=32,
        num_head_channels=16,
        channel_mult="1,2,2",
        dropout=0.1,
    ),
}


def seeded(name: str, shape: tuple[int, ...], scale: float = 1.0) -> th.Tensor:
    """:return: an fp32 tensor of normal deviates, seeded by its name's CRC-32."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return th.from_numpy((rng.standard_normal(shape) * scale).astype(np.float32))


def fill(model: th.nn.Module) -> th.nn.Module:
    """Fill every entry of a state_dict: matrices by fan-in, norms' weights round 1, the rest small."""

    def values(key: str, shape: tuple[int, ...]) -> th.Tensor:
        if not key.endswith("weight"):
            return seeded(key, shape, 0.1)
        return (
            seeded(key, shape, 0.8 / np.sqrt(math.prod(shape[1:]))) if len(shape) > 1 else 1 + seeded(key, shape, 0.1)
        )

    model.load_state_dict({key: values(key, tuple(value.shape)) for key, value in model.state_dict().items()})
    return model


def inputs(name: str, n: int = 2) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Make a configuration's inputs.

    :return: x, [n x 3 x S x S]; y, [n x 6 x S x S], the upper half of the last one zero; t, [n] timesteps below 1000.
    """
    config = CONFIGS[name]
    size = config["image_size"]
    x = seeded(name + "/x", (n, 3, size, size))
    y = seeded(name + "/y", (n, config["num_classes"], size, size))
    y[-1, :, : size // 2] = 0
    t = np.random.RandomState(7).randint(0, 1000, (n,))
    return x, y, th.from_numpy(t).long()
