"""What a model in training is worth: its loss on held-out samples, and pictures. Knows models, data and samplers by
their interfaces; nothing of training."""

from pathlib import Path

import numpy as np
import torch as th
from PIL import Image
from torch.utils.data import default_collate

from . import dist_util, streams
from .conditioning import ConditionSpec, as_rgb, as_signed
from .gaussian_diffusion import GaussianDiffusion
from .image_datasets import NucleiDataset
from .meters import LossMeter
from .pictures import draw_grid
from .samplers import SampleNoise
from .sampling_plan import SamplingPlan, process_for, to_uint8
from .unet import UNetModel

MIN_LOSSES = 64  # a smaller data set is gone through several times, with other noise and timesteps
PREVIEW_SAMPLER, PREVIEW_STEPS = "dpmpp_2m_sde", 25


class Validation:
    """
    Measures and draws what a model makes of samples that it is not trained on; always on the same noise and timesteps.

    :param dataset: the samples; augmentation must be off.
    :param spec: the condition's layout.
    :param diffusion: the process.
    :param batch_size: samples a forward pass; a training sets it to those of its own, which are known to fit in memory.
    :param seed: of noise and timesteps.
    """

    def __init__(
        self, dataset: NucleiDataset, spec: ConditionSpec, diffusion: GaussianDiffusion, batch_size: int, seed: int = 0
    ) -> None:
        self.dataset = dataset
        self.spec = spec
        self.diffusion = diffusion
        self.batch_size = batch_size
        self.seed = seed
        self.total = len(dataset) * max(1, -(-MIN_LOSSES // len(dataset)))
        rng = streams.rng("validation timesteps", seed, self.total)
        # Stratified: one timestep out of each of as many equal spans, in random order.
        places = (rng.permutation(self.total) + rng.random(self.total)) / self.total
        self._timesteps = (places * diffusion.num_timesteps).astype(int)

    def _batch(self, numbers: list[int], device: th.device) -> tuple[th.Tensor, th.Tensor]:
        """Images and conditions of some samples, by their numbers modulo the data set's length."""
        images, cond = default_collate([self.dataset[0, k % len(self.dataset)] for k in numbers])
        tensors = {name: value.to(device) for name, value in cond.items() if th.is_tensor(value)}
        return as_signed(images.to(device)), self.spec.assemble(tensors)

    @th.no_grad()
    def losses(self, model: UNetModel) -> dict[str, float]:
        """
        Average the training loss over the data set, each rank its share. Collective.

        :return: "loss", and "loss_q0" to "loss_q3" by quarter of the timesteps; the same of "mse" and "vb"; infinite
            where a sample's is not finite. The same on every rank, and but for rounding for any number of ranks.
        """
        device = next(model.parameters()).device
        meter = LossMeter(self.diffusion.num_timesteps, device, strict=True)
        share = range(self.total)[dist_util.rank() :: dist_util.world_size()]
        for first in range(0, len(share), self.batch_size):
            numbers = list(share[first : first + self.batch_size])
            images, y = self._batch(numbers, device)
            t = th.from_numpy(self._timesteps[numbers]).to(device)
            noise = SampleNoise(self.seed, numbers, device)(images)
            meter.add(t, self.diffusion.training_losses(model, images, t, model_kwargs={"y": y}, noise=noise))
        return meter.read()

    def draw(self, model: UNetModel, path: Path, count: int) -> np.ndarray:
        """
        Sample the first samples' conditions and write the picture: condition | appearance | sample, a row each.

        :return: the picture, [H x W x 3] uint8.
        """
        steps = max(1, min(PREVIEW_STEPS, self.diffusion.num_timesteps // 2))
        process = process_for(PREVIEW_SAMPLER, self.diffusion, steps)
        numbers, rows = range(min(count, len(self.dataset))), []
        for part in (numbers[first : first + self.batch_size] for first in range(0, len(numbers), self.batch_size)):
            images, y = self._batch(list(part), next(model.parameters()).device)
            plan = SamplingPlan(PREVIEW_SAMPLER, process, seed=self.seed, channels=images.shape[1])
            with th.inference_mode():
                made = plan.sample(model, model.modulations(y), part)
            for cond, image, result in zip(self.spec.render(y), to_uint8(images), to_uint8(made)):
                rows.append([cond, as_rgb(image), as_rgb(result)])
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"{path.stem}: {PREVIEW_SAMPLER}, {steps} steps"
        draw_grid(rows, ["condition", "appearance", "sample"], title, path, self.spec.legend(), self.spec.mpp)
        return np.asarray(Image.open(path).convert("RGB"))
