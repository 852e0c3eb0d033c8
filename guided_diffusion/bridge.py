"""
What knows both sides: the diffusion model as a backbone of histology's features, sdm:CHECKPOINT[@T].

Nothing of either side imports it; programs do, so that neither side knows the other.
"""

from pathlib import Path

import numpy as np
import torch as th

from . import checkpoint, trained_flags
from .conditioning import ConditionSpec
from .histology.features import backbones
from .histology.features.backbones import as_batch, hash_weights, resized
from .script_util import condition_spec, create_model_and_diffusion, model_and_diffusion_defaults

TIMESTEP = 100  # of 1000, where the name does not say
NOISE_SEED = 0
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, for a model of grey images


def load_backbone(name: str, device: th.device, dtype: th.dtype = th.float32) -> backbones.Backbone:
    """As backbones.load_backbone, which see, with sdm:CHECKPOINT[@T] beside the rest."""
    return backbones.load_backbone(name, device, dtype, {"sdm": load_sdm})


def load_sdm(name: str, device: th.device, dtype: th.dtype) -> "DiffusionBackbone":
    """
    Make a backbone of a checkpoint of image_train.py, by the config.json beside it.

    :param name: sdm:CHECKPOINT or sdm:CHECKPOINT@T.
    :raises FileNotFoundError, ValueError: where the checkpoint or its config.json is missing or unfit, or T out of
        range.
    """
    path, _, number = name.partition(":")[2].rpartition("@")
    if not path or not number.isdecimal():
        path, number = name.partition(":")[2], ""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--backbone {name}: {path} is not a file: give a checkpoint of image_train.py")
    config = trained_flags.load_config(path)
    if config is None:
        raise FileNotFoundError(f"--backbone {name}: there is no config.json beside {path}, which says how it was made")
    return DiffusionBackbone(name, path, config, int(number) if number else TIMESTEP, device, dtype)


class DiffusionBackbone:
    """
    A diffusion U-Net's encoder and middle block as a feature extractor (Baranchuk et al. 2022, "Label-efficient
    semantic segmentation with diffusion models").

    Images are brought to the model's image_size, scaled to [-1, 1] and noised to timestep t; the noise is one seeded
    field for all images, so that a vector depends on its image alone. The encoder never sees a condition; the middle
    block gets the null condition. The vector is the mean over space of each level's last feature map and of the
    middle's. Maps are those of the two deepest levels: strides 8 and 16 in the 128 px configuration.

    :param config: flag -> value, of the run that trained it.
    :param t: timestep, 0 to diffusion_steps - 1.
    """

    def __init__(
        self, name: str, path: str, config: dict, t: int, device: th.device, dtype: th.dtype = th.float32
    ) -> None:
        flags = {**ConditionSpec.flags(), **model_and_diffusion_defaults()}
        for field in trained_flags.MODEL_FIELDS:
            if field in config and type(config[field]) is not type(flags[field]):
                raise ValueError(f"config.json beside {path} has --{field} {config[field]!r}: restore it or remove it")
            flags[field] = config.get(field, flags[field])
        model, self.diffusion = create_model_and_diffusion(
            **{field: flags[field] for field in model_and_diffusion_defaults()}
        )
        if not 0 <= t < self.diffusion.num_timesteps:
            raise ValueError(f"--backbone {name}: give a timestep of 0 to {self.diffusion.num_timesteps - 1} after @")
        checkpoint.load_weights(model, path)
        self.name = name
        self.weight_hash = hash_weights(model.state_dict())
        self.device = device
        model.place(device)
        model.eval().requires_grad_(False).convert_to(dtype, weights=True)
        self.model = model
        self.grey = flags["in_channels"] == 1
        self.t = th.tensor([t], device=device)
        size = (1, flags["in_channels"], flags["image_size"], flags["image_size"])
        noise = np.random.default_rng(NOISE_SEED).standard_normal(size, np.float32)
        self.noise = th.from_numpy(noise).to(device)
        spec = condition_spec(flags)
        self.null = spec.null(th.empty(1, spec.channels, *size[2:], device=device, dtype=dtype))

    def embed(self, images: np.ndarray) -> np.ndarray:
        """See Backbone; D is the sum of the levels' widths and the last width once more."""
        levels, middle = self._encode(images)
        return th.cat([h.mean((2, 3)) for h in (*levels, middle)], dim=1).cpu().numpy()

    def maps(self, images: np.ndarray) -> list[th.Tensor]:
        """See Backbone."""
        levels, _ = self._encode(images)
        if len(levels) < 2:
            raise ValueError(f"--backbone {self.name} has one level only, so no two maps: choose another")
        return levels[-2:]

    def _encode(self, images: np.ndarray) -> tuple[list[th.Tensor], th.Tensor]:
        """The last feature map of each level, finest first, and that of the middle block; fp32."""
        x = resized(as_batch(images, self.device), self.noise.shape[-1]) / 127.5 - 1
        if self.grey:
            x = (x * th.tensor(LUMA, device=self.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
        times = self.t.expand(len(x))
        with th.inference_mode():
            x_t = self.diffusion.q_sample(x, times, self.noise.expand_as(x))
            emb = self.model.embed(self.diffusion.model_timesteps(times))
            h, skips = self.model.encode(x_t, emb)
            levels = {skip.shape[-1]: skip.float() for skip in skips}  # of each size the last
            middle = self.model.middle_block(h, emb, self.null).float()
        return list(levels.values()), middle
