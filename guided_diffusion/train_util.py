"""The training loop. Knows models, diffusion, conditions and checkpoints by their interfaces, and no flag's name."""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blobfile as bf
import numpy as np
import torch as th
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from . import checkpoint, dist_util, logger
from .conditioning import ConditionSpec
from .ema import Ema
from .fp16_util import MixedPrecisionTrainer
from .gaussian_diffusion import GaussianDiffusion
from .meters import QUARTERS, LossMeter, StepClock
from .resample import ScheduleSampler, UniformSampler
from .saver import Saver
from .signals import StopRequest
from .train_options import TrainOptions
from .validation import Validation

MAX_SKIPPED = 50  # steps in a row that are not finite, after which training has failed
SKIPPED_UNSAVED = 5  # such steps in a row that are no chance any more: the checkpoints before are better than a new one
CHECK_INTERVAL = 10  # steps between two looks at it, each of which waits for the device
# What the progress bar shows of a row of the log, by the names it has room for.
SHOWN = {
    "loss": "loss",
    **{f"loss_q{i}": f"q{i}" for i in range(QUARTERS)},
    "grad_norm": "grad",
    "lr": "lr",
    "lg_loss_scale": "lg_scale",
    "samples": "seen",
    "images_per_s": "img/s",
    "data_wait": "wait",
    "peak_memory_mib": "MiB",
}


class TrainLoop:
    """
    Trains a model until the last step, writing checkpoints into the logger's folder. All ranks run it alike.

    :param model: the U-Net, on its device, with parameters in fp32.
    :param diffusion: the diffusion process.
    :param spec: the condition's layout.
    :param data: endless batches of this rank, which begin where the resumed run stopped.
    :param options: see train_options.TrainOptions.
    :param schedule_sampler: of timesteps; uniform if None.
    :param validation: measures the averaged weights and paints with them; the best ones are kept. None does neither.
    :param resume_checkpoint: a model's checkpoint to go on from, with all that lies beside it.
    :param init_checkpoint: a checkpoint whose weights to begin with, at step 0.
    :param config: what to write as config.json beside the best checkpoint.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        spec: ConditionSpec,
        data: Iterator[tuple[th.Tensor, dict]],
        options: TrainOptions,
        schedule_sampler: ScheduleSampler | None = None,
        validation: Validation | None = None,
        resume_checkpoint: str = "",
        init_checkpoint: str = "",
        config: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.diffusion = diffusion
        self.spec = spec
        self.data = data
        self.options = options
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion.num_timesteps)
        self.validation = validation
        self.config = config
        self.device = next(model.parameters()).device
        self.step = self.samples = 0
        self.saved_step = None
        self.best: dict[str, float] = {}  # step and val_loss of the best validation so far
        self.meter = LossMeter(diffusion.num_timesteps, self.device)
        self.last_loss = math.nan

        if resume_checkpoint or init_checkpoint:
            checkpoint.load_weights(model, resume_checkpoint or init_checkpoint)
        dist_util.sync_params(model.parameters())
        self.mp_trainer = MixedPrecisionTrainer(
            model=model,
            use_fp16=model.dtype == th.float16,
            fp16_scale_growth=options.fp16_scale_growth,
            grad_clip=options.grad_clip,
        )
        self.opt = AdamW(self.mp_trainer.master_params, lr=options.lr, weight_decay=options.weight_decay, fused=True)
        self.averages = [Ema(model, rate) for rate in options.ema_rates]
        if resume_checkpoint:
            self._resume(resume_checkpoint)

        self.ddp_model = model
        if dist_util.world_size() > 1:
            gpu = [self.device] if self.device.type == "cuda" else None
            self.ddp_model = DistributedDataParallel(model, device_ids=gpu, gradient_as_bucket_view=True)
        self.microbatch = options.microbatch_size or self._largest_microbatch()

    # ---- resuming ----

    def _resume(self, path: str) -> None:
        """Take up step, averages, optimiser and the rest of the state; they must lie beside the weights."""
        self.step = self.saved_step = checkpoint.parse_step(path)
        folder = bf.dirname(path) or "."
        for ema in self.averages:
            ema_path = bf.join(folder, checkpoint.ema_name(ema.rate, self.step))
            if not checkpoint.exists(ema_path):
                logger.warn(f"no {ema_path}: the average at rate {ema.rate} begins anew from the weights")
                continue
            state = checkpoint.load(ema_path)
            checkpoint.check_fit(self.model, state, ema_path)
            ema.load_state_dict(state)
        opt_path = bf.join(folder, checkpoint.opt_name(self.step))
        if checkpoint.exists(opt_path):
            try:
                self.mp_trainer.load_optimizer_state(self.opt, checkpoint.load(opt_path))
            except ValueError as error:
                raise ValueError(f"{opt_path}: {error}: remove it to begin one anew") from None
        else:
            logger.warn(f"no {opt_path}: the optimiser begins anew")
        self._resume_state(checkpoint.load_training_state(path))

    def _resume_state(self, state: dict[str, Any]) -> None:
        total = self.options.batch_size * dist_util.world_size()
        self.samples = state.get("samples", self.step * total)
        self.best = state.get("best", {})
        if not state:
            return
        if (state["batch_size"], state["world_size"]) != (self.options.batch_size, dist_util.world_size()):
            logger.log(
                f"going on with {dist_util.world_size()} x {self.options.batch_size} samples a step (ranks x batch), "
                f"before it were {state['world_size']} x {state['batch_size']}"
            )
        self.mp_trainer.load_state_dict(state["mp_trainer"])
        try:
            self.schedule_sampler.load_state_dict(state["schedule_sampler"])
        except ValueError as error:
            logger.warn(f"{error}: it begins anew")

    def training_state(self) -> dict[str, Any]:
        """
        :return: what a run needs to go on besides weights, averages and optimiser: "samples" seen by all ranks,
            "mp_trainer" and "schedule_sampler" (their state_dict), "best" (step and val_loss), and "batch_size" and
            "world_size", to tell when they change. Noise, drops and the place in the data follow from step and samples.
        """
        return dict(
            samples=self.samples,
            batch_size=self.options.batch_size,
            world_size=dist_util.world_size(),
            mp_trainer=self.mp_trainer.state_dict(),
            schedule_sampler=self.schedule_sampler.state_dict(),
            best=dict(self.best),
        )

    # ---- the loop ----

    def run_loop(self) -> None:
        """
        Train to the last step, or until SIGTERM or SIGUSR1; a checkpoint follows every save_interval steps and the end.

        :raises ValueError: where step after step is not finite.
        :raises OSError: where a checkpoint cannot be written.
        """
        folder = logger.get_dir()
        with (
            Saver(folder, self.options.kept_checkpoints) as self.saver,
            Saver(os.path.join(folder, "best"), 1, self.config) as self.best_saver,
            StopRequest() as stop,
        ):
            self._run_until(stop)
        dist_util.barrier()
        if dist_util.any_rank(bool(stop)):
            logger.log(f"stopped by {stop.name or 'a signal'} at step {self.step}, saved: the same command goes on")

    def _run_until(self, stop: StopRequest) -> None:
        last_step = self.options.last_step
        bar = dist_util.progress_bar(total=last_step, initial=self.step, desc="training", unit="step")
        self._clock = StepClock(self.samples)
        with bar:
            while last_step is None or self.step < last_step:
                with self._clock.waiting():
                    batch, cond = next(self.data)
                self.run_step(batch, cond)
                bar.update()
                if self.step % CHECK_INTERVAL == 0:
                    self._check()
                if self.step % self.options.log_interval == 0:
                    row = self._log()
                    shown = {short: f"{row[key]:.4g}" for key, short in SHOWN.items() if key in row}
                    bar.set_postfix(shown, refresh=False)
                if self.validation and self.step % self.options.val_interval == 0:
                    self._validate()
                due = self.step % self.options.save_interval == 0
                if due and self.mp_trainer.skipped_in_a_row < SKIPPED_UNSAVED:
                    self.save()
                if dist_util.any_rank(bool(stop)):
                    break
        if self.step % self.options.log_interval:
            self._log()  # what has come since the last interval
        if self.saved_step != self.step:
            self.save()

    def run_step(self, batch: th.Tensor, cond: dict) -> None:
        """
        Take one training step on this rank's batch.

        :param batch: an [N x C x H x W] tensor of images in [-1, 1].
        :param cond: their conditions' parts, see ConditionSpec.
        """
        self._anneal_lr()
        self.forward_backward(batch, cond)
        taken = self.mp_trainer.optimize(self.opt)
        for ema in self.averages:
            ema.update(self.step, taken)
        self.step += 1
        self.samples += len(batch) * dist_util.world_size()

    def forward_backward(self, batch: th.Tensor, cond: dict) -> None:
        """Compute the gradients of one batch, averaged over it and over all ranks."""
        self.mp_trainer.zero_grad()
        with self._seeded_dropout():
            self._forward_backward(batch, cond)

    @contextlib.contextmanager
    def _seeded_dropout(self) -> Iterator[None]:
        """Give dropout, which can only draw from the global generator, one that is a function of (seed, step, rank)."""
        if not any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in self.model.modules()):
            yield
            return
        entropy = [self.options.seed, self.step, dist_util.rank()]
        with th.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            th.manual_seed(int(np.random.default_rng(entropy).integers(2**63)))
            yield

    def _forward_backward(self, batch: th.Tensor, cond: dict) -> None:
        draws = self._draw(batch.shape)
        n = len(batch)
        for start in range(0, n, self.microbatch):
            part = slice(start, start + self.microbatch)
            t, weights, noise, dropped = (draw[part] for draw in draws)
            compute_losses = functools.partial(
                self.diffusion.training_losses,
                self.ddp_model,
                self._moved(batch[part]),
                t,
                model_kwargs={"y": self._condition(cond, part, dropped)},
                noise=noise,
            )
            more_to_come = start + self.microbatch < n and isinstance(self.ddp_model, DistributedDataParallel)
            with self.ddp_model.no_sync() if more_to_come else contextlib.nullcontext():
                losses = compute_losses()
                self.mp_trainer.backward((losses["loss"] * weights).sum() / n)
            self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
            self.meter.add(t, losses, weights)

    def _condition(self, cond: dict, part: slice, dropped: th.Tensor) -> th.Tensor:
        tensors = {name: self._moved(value[part]) for name, value in cond.items() if th.is_tensor(value)}
        y = self.spec.assemble(tensors)
        return self.spec.drop(y, dropped, self.options.drop_hvb_only) if self.options.drop_rate else y

    def _moved(self, tensor: th.Tensor) -> th.Tensor:
        """The tensor on the device; from pinned memory the copy goes on while the program does."""
        return tensor.to(self.device, non_blocking=True)

    def _draw(self, shape: th.Size) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        Draw timesteps, their loss weights, noise and drops for this rank's batch.

        They are drawn for all ranks together, from (seed, step), and shared out as the data are; so a step is the same
        however many ranks take it, and a resumed run needs no generator's state.
        """
        rank, world_size = dist_util.rank(), dist_util.world_size()
        rng = np.random.default_rng([self.options.seed, self.step])
        total = shape[0] * world_size
        t, weights = self.schedule_sampler.sample(total, self.device, rng)
        generator = th.Generator(self.device).manual_seed(int(rng.integers(2**63)))
        noise = th.randn((total, *shape[1:]), generator=generator, device=self.device)
        dropped = self._moved(th.from_numpy(rng.random(total) < self.options.drop_rate))
        return tuple(draw[rank::world_size] for draw in (t, weights, noise, dropped))

    def _anneal_lr(self) -> None:
        if self.options.lr_anneal_steps:
            share = 1 - self.step / self.options.lr_anneal_steps
            for group in self.opt.param_groups:
                group["lr"] = self.options.lr * share

    def _largest_microbatch(self) -> int:
        """Find the largest divisor of the batch size with which a step fits in memory, the same on all ranks."""
        sizes = [n for n in range(self.options.batch_size, 0, -1) if self.options.batch_size % n == 0]
        if self.device.type == "cpu":
            return sizes[0]
        own = next((size for size in sizes if self._fits(size)), 0)
        size = min(dist_util.all_gather(own))
        if not size:
            raise ValueError("--microbatch auto: not even one sample fits in memory: give --use_checkpoint True")
        logger.log(f"--microbatch auto: {size}")
        return size

    def _fits(self, size: int) -> bool:
        """Try a forward and backward pass, with what optimiser and ranks will take besides."""
        side = self.model.image_size
        ballast = []
        try:
            ballast += [th.empty_like(p) for p in self.model.parameters() for _ in range(2 * (not self.opt.state))]
            ballast += [th.empty_like(p) for p in self.model.parameters() if dist_util.world_size() > 1]
            x = th.zeros(size, self.spec.in_channels, side, side, device=self.device)
            y = th.zeros(size, self.spec.channels, side, side, device=self.device)
            self.model(x, th.zeros(size, device=self.device), y=y).float().square().mean().backward()
            ballast += [th.empty_like(p) for p in self.model.parameters()]  # copies during updates
            return True
        except th.OutOfMemoryError:
            return False
        finally:
            self.mp_trainer.zero_grad()
            del ballast
            th.cuda.empty_cache()

    # ---- what is shown and kept ----

    def _check(self) -> None:
        """Look whether training still makes sense, alike on all ranks, and whether files could be written."""
        if self.mp_trainer.skipped_in_a_row >= MAX_SKIPPED:
            last = f"{self.last_loss:.4g}" if math.isfinite(self.last_loss) else "none"
            raise ValueError(
                f"{self.mp_trainer.skipped_in_a_row} steps in a row were not finite, up to step {self.step}, and the "
                f"last finite loss was {last}: lower --lr, or set --grad_clip 1 or --precision bf16; checkpoints that "
                "were saved after training went wrong must be removed before it goes on"
            )
        if dist_util.rank() == 0:
            self.saver.check()
            self.best_saver.check()

    def _log(self) -> dict[str, Any]:
        """Write a row of the log with what was measured since the last one. Collective."""
        means = self.meter.read()
        self.last_loss = means.get("loss", self.last_loss)
        logger.logkvs({"step": self.step, "samples": self.samples, **means})
        logger.logkv("lr", self.opt.param_groups[0]["lr"])
        if self.mp_trainer.grad_norm is not None:
            logger.logkv("grad_norm", self.mp_trainer.grad_norm.item())
        logger.logkv("skipped_steps", self.mp_trainer.skipped)
        if self.mp_trainer.use_fp16:
            logger.logkv("lg_loss_scale", self.mp_trainer.lg_loss_scale)
        logger.logkvs(self._clock.read(self.samples))
        if self.device.type == "cuda":
            logger.logkv("peak_memory_mib", th.cuda.max_memory_allocated(self.device) / 2**20)
        return logger.dumpkvs()

    def _validate(self) -> None:
        """Measure the averaged weights on held-out samples; the best are kept apart. Collective."""
        with self._clock.paused(), self.averages[0].swapped_in():
            losses = self.validation.losses(self.model)
        logger.logkvs({"step": self.step, **{f"val_{name}": value for name, value in losses.items()}})
        logger.dumpkvs()
        # Every rank has the same numbers, and so takes the same decision.
        if losses["loss"] < self.best.get("val_loss", math.inf):
            self.best = {"step": self.step, "val_loss": losses["loss"]}
            if dist_util.rank() == 0:
                self.best_saver.save(self._states())

    def save(self) -> None:
        """Have weights, averages, optimiser and state written, by rank 0, and paint the previews."""
        self.saved_step = self.step
        if dist_util.rank():
            return
        path = bf.join(logger.get_dir(), checkpoint.model_name(self.step))
        self.saver.save(self._states(), lambda: logger.log(f"saved {path}"))
        if self.validation and self.options.preview_samples:
            picture = Path(logger.get_dir(), "previews", f"step{self.step:06d}.png")
            with self._clock.paused(), self.averages[0].swapped_in():
                drawn = self.validation.draw(self.model, picture, self.options.preview_samples)
            logger.logimage("preview", drawn, self.step)

    def _states(self) -> dict[str, dict]:
        """File name -> content of a checkpoint, the model last: with it, all are there."""
        averages = {checkpoint.ema_name(ema.rate, self.step): ema.state_dict() for ema in self.averages}
        return {
            **averages,
            checkpoint.opt_name(self.step): self.mp_trainer.optimizer_state(self.opt),
            checkpoint.state_name(self.step): self.training_state(),
            checkpoint.model_name(self.step): self.model.state_dict(),
        }

    def result(self) -> dict[str, Any]:
        """
        :return: where the run stands: "step", "samples", "checkpoint", the averaged weights to sample from, which are
            the best ones where there are any, and "best", its step and val_loss.
        """
        folder, step = logger.get_dir(), self.step
        if self.best:
            folder, step = os.path.join(folder, "best"), self.best["step"]
        path = os.path.join(folder, checkpoint.ema_name(self.options.ema_rates[0], step))
        return dict(step=self.step, samples=self.samples, checkpoint=path, best=self.best)
