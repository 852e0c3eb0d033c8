"""
Training of the segmenter: loss, schedule, validation, early stop, and a checkpoint that a run is resumed from.

Owns the loop. Knows nothing of folders of data nor of flags.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch as th
import torch.nn.functional as F

from ... import progress
from ...cell_classes import CellClass
from ...devices import PRECISIONS
from ...files import writing
from ...magnification import REFERENCE_MPP, length, odd_length
from ...signals import leave_to_parent
from ..evaluation import class_metrics, instance_metrics
from .data import UNKNOWN, Crops, Example
from .decoding import FILE, Segmenter, as_content, as_input, load_checked
from .net import ADAPT, load_imagenet_weights, seeded_net

CHECKPOINT = "checkpoint.pt"
_KIND = "segmenter training"
_WARM_UP = 0.05  # share of the run
_WEIGHT_DECAY = 0.01
_HV_WEIGHT, _GRADIENT_WEIGHT = 4, 4
_SLOPE = 5  # px of 40x, the kernel of the loss's derivatives
_MAX_NORM = 5.0  # of the gradient


@dataclass(frozen=True)
class Settings:
    """
    What decides the weights of a run, but for its data.

    :param steps: of the optimiser; None where minutes alone end the run.
    :param minutes: of training, all sessions together; None for no limit. The learning rate follows whichever of
        the two is further on, so with minutes a run is not the same twice.
    :param crop: side of the training crops in px, a multiple of 16.
    :param eval_interval: steps between validations and checkpoints.
    :param patience: validations without a better score after which to stop; 0 never stops early.
    :param synthetic_first: share of the steps, the first ones, that take synthetic images alone; the rest then takes
        real ones alone. 0: all take either.
    :param real_last: share of the steps, the last ones, that take real images alone, where those before take either.
    :param mpp: micrometres a pixel of the images.
    :param adapt: of validation, see Segmenter.
    """

    steps: int | None = 4000
    minutes: float | None = None
    batch_size: int = 8
    crop: int = 128
    lr: float = 2e-3
    precision: str = "fp32"
    seed: int = 0
    eval_interval: int = 200
    patience: int = 10
    colour_augment: bool = True
    pretrained: bool = True
    synthetic_first: float = 0.0
    real_last: float = 0.0
    mpp: float = REFERENCE_MPP
    adapt: float = ADAPT

    @property
    def real_from(self) -> int | None:
        """The crop from which on all are of real images alone; None where all are of either kind."""
        share = self.synthetic_first or 1 - self.real_last
        return round(share * self.steps) * self.batch_size if self.steps and share < 1 else None


def segmentation_loss(out: th.Tensor, target: th.Tensor, mpp: float = REFERENCE_MPP) -> th.Tensor:
    """
    HoVer-Net's loss: cross-entropy and Dice of the nuclei, squared error of the position and of its slope in nuclei;
    cross-entropy and Dice of the classes.

    :param out: [N x (3 + K) x H x W] float32: logit, x, y, and a logit for each of K classes, perhaps none.
    :param target: [N x 3 x H x W]: 0 or 1, x, y; with classes a fourth map, see Crops. A pixel of neither,
        data.UNKNOWN, costs nothing.
    :param mpp: micrometres a pixel; the slope is by pixels of 40x.
    :return: a scalar.
    """
    logit, nucleus = out[:, :1], target[:, :1].clamp(min=0)
    known = (target[:, :1] >= 0).to(out)
    probability = logit.sigmoid() * known
    overlap = 2 * (probability * nucleus).sum() + 1
    dice = 1 - overlap / (probability.sum() + nucleus.sum() + 1)
    error = (out[:, 1:3] - target[:, 1:3]) * known
    kernels = _sobel(odd_length(_SLOPE, mpp)).to(error)
    slope = F.conv2d(error, kernels, padding=kernels.shape[-1] // 2, groups=2) * length(1, mpp)
    steepness = (slope.square() * nucleus).sum() / (nucleus.sum() + 1)
    cross_entropy = F.binary_cross_entropy_with_logits(logit, nucleus, known)
    loss = cross_entropy + dice + _HV_WEIGHT * error.square().mean() + _GRADIENT_WEIGHT * steepness
    return loss + _class_loss(out[:, 3:], target[:, 3].long()) if out.shape[1] > 3 else loss


def _class_loss(logits: th.Tensor, places: th.Tensor) -> th.Tensor:
    """
    Cross-entropy, and Dice, the mean over the classes. HoVer-Net's has background for a class, too; here pixels outside
    nuclei do not count, since another map tells them.

    :param logits: [N x K x H x W]. :param places: [N x H x W]: 1 to K in nuclei, 0 outside.
    """
    inside = places > 0
    own, truth = logits.permute(0, 2, 3, 1)[inside], places[inside] - 1
    probability, one_hot = own.softmax(1), F.one_hot(truth, logits.shape[1])
    overlap = 2 * (probability * one_hot).sum(0) + 1
    dice = 1 - overlap / (probability.sum(0) + one_hot.sum(0) + 1)
    return F.cross_entropy(own, truth, reduction="sum") / (len(own) + 1) + dice.mean()


def validate(segmenter: Segmenter, examples: Sequence[Example]) -> dict[str, float]:
    """
    :return: F1@0.5, AJI and Dice, the mean over the examples' slides; of a segmenter that knows classes the means of
        their F1 and the share of classes that are right, where there are any; and the score: the mean of F1, AJI and
        the classes' F1.
    """
    tallies = []
    for example in examples:
        found, classes = segmenter.find(example.image)
        truth, found = where_known(example.inst_map, found)
        tallies.append(
            class_metrics.tally(truth, example.of_nucleus, found, classes, segmenter.classes)
            if segmenter.classes
            else instance_metrics.tally(truth, found)
        )
    summary = instance_metrics.summarise(tallies, [example.slide for example in examples])
    names = ("f1@0.5", "aji", "dice", "class_f1", "class_accuracy")
    means = {name: summary[name]["mean"] for name in names if name in summary and summary[name]["mean"] is not None}
    judged = [means[name] for name in ("f1@0.5", "aji", "class_f1") if name in means]
    return {**means, "score": sum(judged) / len(judged)}


def where_known(truth: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    :param truth: an [H x W] instance map, UNKNOWN where that says nothing; found: another one.
    :return: both with background there, and without the nuclei that were found in it by more than half.
    """
    unknown = truth == UNKNOWN
    if not unknown.any():
        return truth, found
    inside = np.bincount(found[unknown], minlength=found.max() + 1)
    dropped = 2 * inside > np.bincount(found.ravel())
    return np.where(unknown, 0, truth), np.where(unknown | dropped[found], 0, found)


class Training:
    """
    One run, new or resumed from its last checkpoint.

    :param settings: of the run.
    :param examples: to train on; held: to validate on, may be empty.
    :param out: folder for the checkpoint and segmenter.pt.
    :param slides: that the examples show, noted in segmenter.pt as those of `held` are.
    :param classes: that it learns to tell apart, noted there, too.
    :raises ValueError: the folder's checkpoint is broken.
    :raises ImportError: the package with the pretrained weights is missing.
    """

    def __init__(
        self,
        settings: Settings,
        examples: Sequence[Example],
        held: Sequence[Example],
        out: Path,
        device: th.device,
        slides: Sequence[str] = (),
        classes: Sequence[CellClass] = (),
    ) -> None:
        self.settings, self.held, self.out, self.device, self.slides = settings, held, out, device, slides
        self.classes = classes
        schedule = (settings.real_from, settings.synthetic_first > 0)
        self.crops = Crops(examples, settings.crop, settings.seed, settings.colour_augment, *schedule, classes)
        net = seeded_net(settings.seed, len(classes))
        if settings.pretrained:
            load_imagenet_weights(net)
        self.net = net.to(device, memory_format=th.channels_last)
        self.optimizer = th.optim.AdamW(self.net.parameters(), lr=settings.lr, weight_decay=_WEIGHT_DECAY)
        self.step, self.seconds = 0, 0.0
        self.best: dict[str, Any] = {"score": -1.0, "step": 0, "net": None}
        self.history: list[dict[str, float]] = []
        if (out / CHECKPOINT).exists():
            self._load()

    def run(self, workers: int = 0, report: Callable[[dict[str, float]], None] = lambda row: None) -> dict[str, Any]:
        """
        Train to the end and write segmenter.pt. The checkpoint stays, for the caller to remove with the result kept.

        :param workers: processes that make crops.
        :param report: is called with each validation's figures.
        :return: steps, seconds, stopped_early, best_step, and the best validation's figures.
        """
        started = time.monotonic() - self.seconds
        losses: list[float] = []
        with progress.bar(total=self.settings.steps, initial=self.step, desc="training") as bar:
            batches = self._batches(workers)
            while not self._finished():
                losses.append(self._train_step(*next(batches)))
                self.seconds = time.monotonic() - started
                self.step += 1
                bar.update()
                if self.step % self.settings.eval_interval == 0 or self._finished():
                    report(self._evaluate(float(np.mean(losses))))
                    best = {"best": f"{self.best['score']:.3f}"} if self.held else {}
                    bar.set_postfix(loss=f"{np.mean(losses):.3f}", **best)
                    losses.clear()
                    self.seconds = time.monotonic() - started
                    self._save()
        chosen = self.best["net"] if self.held else None
        if chosen is not None:
            self.net.load_state_dict(chosen)
        held_slides = {example.slide for example in self.held}
        content = as_content(self.net, self.slides, held_slides, self.settings.mpp, self.classes)
        save_atomically(content, self.out / FILE)
        return self._result()

    def progress(self) -> float:
        """How far the run is, 0 to 1."""
        limits = ((self.settings.steps, self.step), (self.settings.minutes, self.seconds / 60))
        return min(1.0, max(done / limit for limit, done in limits if limit))

    def _result(self) -> dict[str, Any]:
        chosen = [row for row in self.history if row["step"] == self.best["step"]] if self.held else []
        return {
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "stopped_early": self.progress() < 1,
            "best_step": self.best["step"] if self.held else self.step,
            "validation": {k: v for k, v in chosen[0].items() if k != "step"} if chosen else None,
            "history": self.history,
        }

    def _finished(self) -> bool:
        # What real images alone bring, at the end, shows from there on.
        switch = (self.settings.real_from or 0) // self.settings.batch_size
        missed = (self.step - max(self.best["step"], switch)) // self.settings.eval_interval
        tired = bool(self.held) and 0 < self.settings.patience <= missed
        return self.progress() >= 1 or tired

    def _batches(self, workers: int) -> Iterator[list[th.Tensor]]:
        first = self.step * self.settings.batch_size
        last = self.settings.steps * self.settings.batch_size if self.settings.steps else 1 << 40
        loader = th.utils.data.DataLoader(
            self.crops,
            self.settings.batch_size,
            sampler=range(first, last),
            num_workers=workers,
            worker_init_fn=leave_to_parent,
            multiprocessing_context="fork" if workers else None,  # whatever Python's default: see signals
            generator=th.Generator(),  # else the loader draws from the global one
        )
        return iter(loader)

    def _train_step(self, images: th.Tensor, target: th.Tensor) -> float:
        self.net.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * _schedule(self.progress())
        dtype = PRECISIONS[self.settings.precision]
        with th.autocast(self.device.type, dtype, enabled=dtype != th.float32):
            out = self.net(as_input(images.numpy(), self.device))
        loss = segmentation_loss(out.float(), target.to(self.device), self.settings.mpp)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = th.nn.utils.clip_grad_norm_(self.net.parameters(), _MAX_NORM)
        if th.isfinite(norm):
            self.optimizer.step()
        return float(loss.detach())

    def _evaluate(self, loss: float) -> dict[str, float]:
        row = {"step": self.step, "loss": loss}
        if self.held:
            row |= validate(self._segmenter(), self.held)
            if row["score"] > self.best["score"]:
                weights = {name: value.detach().cpu().clone() for name, value in self.net.state_dict().items()}
                self.best = {"score": row["score"], "step": self.step, "net": weights}
        self.history.append(row)
        return row

    def _segmenter(self) -> Segmenter:
        known = dict(adapt=self.settings.adapt, mpp=self.settings.mpp, classes=self.classes)
        return Segmenter(self.net, self.device, **known)

    def _save(self) -> None:
        content = {
            "kind": _KIND,
            "settings": asdict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "history": self.history,
        }
        save_atomically(content, self.out / CHECKPOINT)

    def _load(self) -> None:
        path = self.out / CHECKPOINT
        content = load_checked(path, _KIND)
        try:
            self.net.load_state_dict(content["net"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.step, self.seconds = int(content["step"]), float(content["seconds"])
            self.best, self.history = dict(content["best"]), list(content["history"])
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise ValueError(f"{path} is of another layout: delete it or give another --results_path") from None


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as file:
        th.save(content, file)


def _schedule(progress: float) -> float:
    """Learning rate as a share of the largest: a linear warm-up, then half a cosine down to 0."""
    if progress < _WARM_UP:
        return max(progress, _WARM_UP / 100) / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


def _sobel(side: int) -> th.Tensor:
    """[2 x 1 x side x side] kernels: the slope of x along x, and of y along y."""
    derivative, smooth = (kernel[:, 0] for kernel in cv2.getDerivKernels(1, 0, side, normalize=True))
    along_x = th.from_numpy(np.outer(smooth, derivative))
    return th.stack([along_x, along_x.T])[:, None]
