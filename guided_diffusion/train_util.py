"""The training loop. Knows models, diffusion, conditions and checkpoints by their interfaces, and no flag's name."""

import contextlib
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import blobfile as bf
import torch as th
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from . import checkpoint, dist_util, logger, streams
from .checkpoint_sets import take_up
from .checkpointer import Checkpointer
from .conditioning import ConditionSpec, as_signed
from .data_stream import unlabelled_before
from .ema import Ema
from .fp16_util import MixedPrecisionTrainer, compute_dtype
from .gaussian_diffusion import GaussianDiffusion
from .meters import LossMeter, StepClock, shown
from .microbatch import largest_microbatch
from .resample import ScheduleSampler, UniformSampler
from .signals import StopRequest
from .train_options import TrainOptions
from .validation import Validation

MAX_SKIPPED = 50  # steps in a row that are not finite, after which training has failed
SKIPPED_UNSAVED = 5  # such steps in a row that are no chance any more: the checkpoints before are better than a new one
CHECK_INTERVAL = 10  # steps between two looks at it, each of which waits for the device


class TrainLoop:
    """
    Trains a model until the last step, writing checkpoints into the logger's folder. All ranks run it alike.

    :param model: the U-Net, on its device, with parameters in fp32.
    :param diffusion: the diffusion process.
    :param data: endless batches of this rank, which begin where the resumed run stopped: images, and their conditions'
        parts (see ConditionSpec), or under "y" the conditions themselves.
    :param spec: the condition's layout; None finds it out from the model and the first batch's parts.
    :param options: how to train; None makes them of `numbers`.
    :param schedule_sampler: of timesteps; uniform if None.
    :param validation: measures the averaged weights and samples with them; the best ones are kept. None does neither.
    :param train_preview: samples on training conditions beside it.
    :param resume_checkpoint: a model to go on from, with all that lies beside it; where its name has no step, its
        weights are what to begin with.
    :param init_checkpoint: a checkpoint whose weights to begin with, at step 0.
    :param checkpointer: of the folder; None makes one, which writes no config.json.
    :param use_fp16: as the flag; None leaves the model's precision as it is.
    :param num_classes: for callers of the reference's; the model knows it.
    :param numbers: fields of TrainOptions, by which the reference's callers say how to train.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        data: Iterator[tuple[th.Tensor, dict]],
        spec: ConditionSpec | None = None,
        options: TrainOptions | None = None,
        schedule_sampler: ScheduleSampler | None = None,
        validation: Validation | None = None,
        train_preview: Validation | None = None,
        resume_checkpoint: str = "",
        init_checkpoint: str = "",
        checkpointer: Checkpointer | None = None,
        use_fp16: bool | None = None,
        num_classes: int | None = None,
        **numbers: Any,
    ) -> None:
        self.model = model
        self.diffusion = diffusion
        self.spec = spec
        self.data = data
        self.options = options = options or TrainOptions(**numbers)
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.validation = validation
        self.train_preview = train_preview
        self.checkpointer = checkpointer
        self.device = next(model.parameters()).device
        self.step = self.samples = 0
        self.saved_step = None
        self.meter = LossMeter(diffusion.num_timesteps, self.device)
        self.last_loss = math.nan
        self.began = ""  # what was taken up from a checkpoint, in words

        if use_fp16 is not None:
            model.convert_to(compute_dtype(use_fp16, self.device))
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
        elif init_checkpoint:
            self.began = f"beginning at step 0 with the weights of {init_checkpoint}"

        self.ddp_model = model
        if dist_util.world_size() > 1:
            gpu = [self.device] if self.device.type == "cuda" else None
            self.ddp_model = DistributedDataParallel(model, device_ids=gpu, gradient_as_bucket_view=True)
        self.microbatch = options.microbatch_size or self._largest_microbatch()
        for samples in filter(None, (validation, train_preview)):
            samples.batch_size = self.microbatch

    # ---- resuming ----

    def _resume(self, path: str) -> None:
        """Take up what lies beside the weights: averages, optimiser, and the rest of the state."""
        self.step = self.saved_step = checkpoint.resume_step(path)
        self.samples = self.step * self.options.batch_size * dist_util.world_size()
        averages = {checkpoint.ema_name(ema.rate, self.step): partial(self._load_average, ema) for ema in self.averages}
        others = {
            checkpoint.opt_name(self.step): self._load_optimizer,
            checkpoint.state_name(self.step): self._load_state,
        }
        self.began = take_up(path, {**averages, **others})

    def _load_average(self, ema: Ema, state: dict[str, Any], path: str) -> None:
        checkpoint.check_fit(self.model, state, path)
        ema.load_state_dict(state)

    def _load_optimizer(self, state: dict[str, Any], path: str) -> None:
        try:
            self.mp_trainer.load_optimizer_state(self.opt, state)
        except ValueError as error:
            raise ValueError(f"{path} holds {error}: remove it to begin one anew") from None

    def _load_state(self, state: dict[str, Any], path: str) -> None:
        self.samples = state["samples"]
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
            "mp_trainer" and "schedule_sampler" (their state_dict), and "batch_size" and "world_size", to tell when they
            change. Noise, drops and the place in the data follow from step and samples.
        """
        return dict(
            samples=self.samples,
            batch_size=self.options.batch_size,
            world_size=dist_util.world_size(),
            mp_trainer=self.mp_trainer.state_dict(),
            schedule_sampler=self.schedule_sampler.state_dict(),
        )

    def _largest_microbatch(self) -> int:
        """The largest divisor of the batch size with which a step fits in memory, the same on all ranks."""
        sizes = [n for n in range(self.options.batch_size, 0, -1) if self.options.batch_size % n == 0]
        if self.device.type == "cpu":
            return sizes[0]
        # Still to come: Adam's two averages at the first step, and the ranks' buckets.
        size = largest_microbatch(self.model, sizes, 2 * (not self.opt.state) + (dist_util.world_size() > 1))
        logger.log(f"--microbatch auto: {size}")
        return size

    # ---- the loop ----

    def run_loop(self) -> None:
        """
        Train to the last step, or until the process is asked to stop (see StopRequest); a checkpoint follows every
        save_interval steps and the end.

        :raises ValueError: where step after step is not finite.
        :raises OSError: where a checkpoint cannot be written.
        """
        with contextlib.ExitStack() as stack:
            if self.checkpointer is None:
                if logger.get_dir() is None:
                    logger.configure(rank=dist_util.rank())
                self.checkpointer = stack.enter_context(Checkpointer(logger.get_dir(), self.options.kept_checkpoints))
                self.checkpointer.begin()
            logger.cut_back(self.step)
            if self.began:
                logger.log(self.began)
            stop = stack.enter_context(StopRequest())
            self._run_until(stop)
            self.checkpointer.wait()
        # What it holds of the process group must not be the last: a group that ends that way waits, without letting
        # other threads run Python, for its own thread, which may wait to run Python: for ever.
        self.ddp_model = self.model
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
                    bar.set_postfix(shown(self._log()), refresh=False)
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
        if any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in self.model.modules()):
            key = self.options.seed, self.step, dist_util.rank()
            with streams.global_generator("dropout", *key, device=self.device):
                self._forward_backward(batch, cond)
        else:
            self._forward_backward(batch, cond)

    def _forward_backward(self, batch: th.Tensor, cond: dict) -> None:
        draws = self._draw(batch.shape)
        parts = [slice(start, start + self.microbatch) for start in range(0, len(batch), self.microbatch)]
        with self.model.parameters_cast():
            for part in parts:
                t, weights, noise, dropped = (draw[part] for draw in draws)
                y = self._condition(cond, part, dropped)
                with self._gradients_shared(last=part is parts[-1]):
                    losses = self.diffusion.training_losses(
                        self.ddp_model, as_signed(self._moved(batch[part])), t, model_kwargs={"y": y}, noise=noise
                    )
                    self.mp_trainer.backward((losses["loss"] * weights).sum() / len(batch))
                self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
                self.meter.add(t, losses, weights)

    def _gradients_shared(self, last: bool) -> contextlib.AbstractContextManager:
        """A context in which ranks average their gradients with the last microbatch, once for the whole batch."""
        one_rank = not isinstance(self.ddp_model, DistributedDataParallel)
        return contextlib.nullcontext() if last or one_rank else self.ddp_model.no_sync()

    def _condition(self, cond: dict, part: slice, dropped: th.Tensor) -> th.Tensor:
        if "y" in cond:
            y = self._moved(cond["y"][part])
        else:
            self.spec = self.spec or ConditionSpec.of(cond, self.model.num_classes, self.model.in_channels)
            y = self.spec.assemble({name: self._moved(cond[name][part]) for name in self.spec.parts(cond)})
        if not self.options.drop_rate:
            return y
        return self.spec.drop(y, dropped, self.options.drop_hvb_only) if self.spec else y * ~dropped.view(-1, 1, 1, 1)

    def _moved(self, tensor: th.Tensor) -> th.Tensor:
        """The tensor on the device; from pinned memory the copy goes on while the program does."""
        return tensor.to(self.device, non_blocking=True)

    def _draw(self, shape: th.Size) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        Draw timesteps, their loss weights, noise and drops for this rank's batch.

        They are drawn for all ranks together, from (seed, step), and shared out as the data are; the noise of each
        sample, which is large, on its own rank alone. So a step is the same however many ranks take it, and a resumed
        run needs no generator's state.
        """
        rank, world_size = dist_util.rank(), dist_util.world_size()
        place = self.options.seed, self.step
        rng = streams.rng("training", *place)
        total = shape[0] * world_size
        t, weights = self.schedule_sampler.sample(total, self.device, rng)
        dropped = self._moved(th.from_numpy(rng.random(total) < self.options.drop_rate))
        noise = th.empty(shape, device=self.device)
        for own, k in zip(noise, range(rank, total, world_size)):
            own.normal_(generator=streams.generator("noise", *place, k, device=self.device))
        return *(draw[rank::world_size] for draw in (t, weights)), noise, dropped[rank::world_size]

    def _anneal_lr(self) -> None:
        if self.options.lr_anneal_steps:
            share = 1 - self.step / self.options.lr_anneal_steps
            for group in self.opt.param_groups:
                group["lr"] = self.options.lr * share

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
            self.checkpointer.check()

    def _log(self) -> dict[str, Any]:
        """Write a row of the log with what was measured since the last one. Collective."""
        means = self.meter.read()
        self.last_loss = means.get("loss", self.last_loss)
        logger.logkvs({"mode": "train", "step": self.step, "samples": self.samples, **means})
        if self.options.unlabelled_dir:
            unlabelled = unlabelled_before(self.samples, self.options.unlabelled_share)
            logger.logkv("unlabelled_samples", unlabelled)
        logger.logkv("param_norm", th.nn.utils.get_total_norm(self.mp_trainer.master_params).item())
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
        with self._clock.paused(), self.averages[0].swapped_in(), self.model.uncompiled():
            losses = self.validation.losses(self.model)
        logger.logkvs({"mode": "val", "step": self.step, **{f"val_{name}": value for name, value in losses.items()}})
        logger.dumpkvs()
        # Every rank has the same numbers, and so takes the same decision.
        if losses["loss"] < self.checkpointer.best.get("val_loss", math.inf):
            self.checkpointer.save_best(self.step, losses["loss"], self._states)

    def save(self) -> None:
        """Have weights, averages, optimiser and state written, by rank 0, and previews sampled."""
        self.saved_step = self.step
        if dist_util.rank():
            return
        path = bf.join(logger.get_dir(), checkpoint.model_name(self.step))
        self.checkpointer.save(self._states(), lambda: logger.log(f"saved {path}"))
        if self.validation and self.options.preview_samples:
            with self._clock.paused(), self.averages[0].swapped_in(), self.model.uncompiled():
                self._preview(self.validation, "sample_val", "")
                if self.train_preview:
                    self._preview(self.train_preview, "sample_train", "_train")

    def _preview(self, samples: Validation, tag: str, suffix: str) -> None:
        picture = Path(logger.get_dir(), "previews", f"step{self.step:06d}{suffix}.png")
        logger.logimage(tag, samples.draw(self.model, picture, self.options.preview_samples), self.step)

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
            the best ones where there are any of this rate, and "best", its step and val_loss.
        """
        folder, best, rate = logger.get_dir(), self.checkpointer.best, self.options.ema_rates[0]
        path = os.path.join(folder, checkpoint.ema_name(rate, self.step))
        if best:
            of_best = os.path.join(folder, checkpoint.BEST, checkpoint.ema_name(rate, best["step"]))
            path = of_best if os.path.exists(of_best) else path
        return dict(step=self.step, samples=self.samples, checkpoint=path, best=best)
