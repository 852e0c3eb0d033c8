"""Checkpoints x guidance scales x conditions as one job that can be stopped at any moment and goes on where it was.
Knows what goes where and in which order; nothing of flags."""

import contextlib
import glob
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import blobfile as bf
import torch as th
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from . import dist_util, logger
from .conditioning import ConditionSpec
from .gaussian_diffusion import GaussianDiffusion
from .image_datasets import NucleiDataset
from .results import BackgroundWriter, ResultFolder, draw_grid, folder_name, unique_stems
from .samplers import Schedule, kept_conditions, sample, to_uint8
from .unet import UNetModel

GRID_ROWS, SWEEP_ROWS = 12, 6
SPADE_CACHE = ("auto", "on", "off")


@dataclass(frozen=True)
class Scale:
    """A guidance scale, and how the user wrote it, which names its folder."""

    s: float
    text: str


def parse_scales(text: str) -> list[Scale]:
    """:return: the scales in a comma-separated --s, in order, each once."""
    scales = []
    for part in dict.fromkeys(part.strip() for part in text.split(",")):
        try:
            s = float(part)
        except ValueError:
            s = float("nan")
        if not 0 <= s < float("inf"):
            raise ValueError(f"--s {text} does not parse: give one number or several, such as 1.3,1.4,1.5")
        scales.append(Scale(s, part))
    return scales


def parse_interval(text: str) -> tuple[float, float]:
    """:return: the bounds in a --guidance_interval LO,HI; "" is everywhere."""
    if not text:
        return 0.0, float("inf")
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high:
        raise ValueError(
            f"--guidance_interval {text}: give two noise levels (sigma / alpha), the lower first, such as 0.3,5"
        )
    return low, high


def find_checkpoints(text: str) -> list[str]:
    """:return: the files that a comma-separated --model_path names; each part may be a pattern such as run/ema_*.pt."""
    if not text:
        raise ValueError("--model_path is empty: give the checkpoint to sample from")
    paths: dict[str, None] = {}
    for part in [text] if os.path.isfile(text) else text.split(","):
        pattern = any(sign in part for sign in "*?[") and not os.path.isfile(part)
        find = bf.glob if "://" in part else glob.glob
        matches = sorted(find(part)) if pattern else [part]
        if not matches:
            raise ValueError(f"--model_path {part} matches no file: check the path")
        paths.update(dict.fromkeys(matches))
    stems = [PurePath(path).stem for path in paths]
    for stem in stems:
        if stems.count(stem) > 1:
            raise ValueError(f"--model_path names two files {stem}.pt, whose results would mix: sample them apart")
    return list(paths)


@dataclass
class Sweep:
    """
    What to sample, from what, into where.

    :param dataset: gives the conditions; sample k has item k modulo its length.
    :param checkpoints: paths of weights; scales: guidance scales. One of each fills results_path itself, several fill
        a folder MODEL_sS in it each.
    :param count: samples for each pair.
    :param sampler: a key of samplers.SAMPLERS; schedule: its steps.
    :param spade_cache: on, off, or auto: on if memory allows.
    :param keep_colour: the null condition keeps the colour map; interval and guide: see samplers.Denoiser.
    """

    dataset: NucleiDataset
    spec: ConditionSpec
    diffusion: GaussianDiffusion
    checkpoints: Sequence[str]
    scales: Sequence[Scale]
    results_path: str
    count: int
    sampler: str
    schedule: Schedule
    seed: int = 0
    batch_size: int = 1
    num_workers: int = 0
    clip_denoised: bool = True
    spade_cache: str = "auto"
    keep_colour: bool = False
    interval: tuple[float, float] = (0.0, float("inf"))
    guide: UNetModel | None = None

    def __post_init__(self) -> None:
        n = len(self.dataset)
        appearances = [PurePath(self.dataset.appearance_of(k % n)).stem for k in range(self.count)]
        self.stems = unique_stems(appearances)
        single = len(self.checkpoints) == len(self.scales) == 1
        root = Path(self.results_path)
        self.folders = {
            (path, scale): ResultFolder(root if single else root / folder_name(path, scale.text))
            for path in self.checkpoints
            for scale in self.scales
        }

    def check_count(self) -> None:
        """:raises ValueError: where an earlier run made more samples than are asked for now."""
        for folder in self.folders.values():
            have = max(folder.rows(), default=-1) + 1
            if have > self.count:
                raise ValueError(
                    f"{folder.path} holds {have} samples of this run, more than --num_samples {self.count}: give as "
                    "many, or another --results_path"
                )

    def run(self, load_model: Callable[[str], UNetModel]) -> None:
        """
        Sample all that is not finished yet, each rank its share. Collective.

        :param load_model: gives the model with a checkpoint's weights, on this rank's device; called once for each.
        """
        pending = self._pending()
        for folder in self.folders.values():
            folder.open()
        total, left = self.count * len(pending), sum(map(len, pending.values()))
        if left < total:
            logger.log(f"{total - left} of {total} samples are finished already")
        shares = {path: self._share(path, pending) for path in self.checkpoints}
        own = sum(len(ks) for share in shares.values() for ks in share.values())
        with dist_util.progress_bar(total=own, desc="sampling", unit="image") as bar, BackgroundWriter() as writer:
            for path, share in shares.items():
                if not any(pending[path, scale] for scale in self.scales):
                    continue
                model = load_model(path)  # on all ranks, also those that have nothing left to do
                if share:
                    for made in self._sample_from(model, path, share, writer):
                        bar.update(made)
        dist_util.barrier()
        if dist_util.rank() == 0:
            for folder in self.folders.values():
                folder.close()
            self._draw()

    def _pending(self) -> dict[tuple[str, Scale], set[int]]:
        """The samples that are not finished, as rank 0 finds them, so that all ranks go by the same list."""
        pending = {}
        if dist_util.rank() == 0:
            for pair, folder in self.folders.items():
                pending[pair] = set(range(self.count)) - folder.finished().keys()
        return dist_util.all_gather(pending)[0]

    def _share(self, path: str, pending: dict[tuple[str, Scale], set[int]]) -> dict[Scale, set[int]]:
        """What this rank is to do for a checkpoint: of each sample all scales, since they share its condition."""
        numbers = sorted(set.union(*(pending[path, scale] for scale in self.scales)))
        mine = set(numbers[dist_util.rank() :: dist_util.world_size()])
        return {scale: own for scale in self.scales if (own := pending[path, scale] & mine)}

    def _sample_from(
        self, model: UNetModel, path: str, todo: dict[Scale, set[int]], writer: BackgroundWriter
    ) -> Iterator[int]:
        """Sample what is to do for one checkpoint; :return: an iterator over how many samples each step made."""
        device = dist_util.dev()
        numbers = sorted(set.union(*todo.values()))
        loader = DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            sampler=[divmod(k, len(self.dataset)) for k in numbers],
            num_workers=self.num_workers,
        )
        size = self.dataset.image_size
        zeros = self.spec.null(th.empty(1, self.spec.channels, size, size, device=device))
        cache = self._use_cache(model, size)
        first = 0
        with kept_conditions(model, zeros, enabled=cache):
            for batch, cond in loader:
                indices = numbers[first : first + len(batch)]
                first += len(batch)
                y = self.spec.assemble({key: value.to(device) for key, value in cond.items() if th.is_tensor(value)})
                null = self.spec.null(y, keep_colour=True) if self.keep_colour else zeros
                pictures = self.spec.render(y)
                with self._kept(model, y, null, cache):
                    for scale, left in todo.items():
                        wanted = [place for place, k in enumerate(indices) if k in left]
                        if not wanted:
                            continue
                        samples = to_uint8(self._sample(model, y, null, scale, indices))
                        for place in wanted:
                            parts = dict(
                                image=to_uint8(batch[place : place + 1])[0],
                                label=cond["label_ori"][place].numpy(),
                                cond=pictures[place],
                                sample=samples[place],
                                inst=cond["instance"][place, 0].numpy(),
                            )
                            row = self._row(path, scale, indices[place])
                            folder = self.folders[path, scale]
                            writer(lambda folder=folder, row=row, parts=parts: folder.write(row, **parts))
                        yield len(wanted)

    def _sample(
        self, model: UNetModel, y: th.Tensor, null: th.Tensor, scale: Scale, indices: Sequence[int]
    ) -> th.Tensor:
        shown = dist_util.rank() == 0 and sys.stderr.isatty()
        with tqdm(total=len(self.schedule), unit="step", leave=False, disable=not shown) as bar:
            return sample(
                self.sampler,
                self.diffusion,
                model,
                y,
                s=scale.s,
                channels=self.spec.in_channels,
                seed=self.seed,
                indices=indices,
                schedule=self.schedule,
                null=null,
                guide=self.guide,
                interval=self.interval,
                clip_denoised=self.clip_denoised,
                callback=lambda i, x_start: bar.update(),
            )

    @contextlib.contextmanager
    def _kept(self, model: UNetModel, y: th.Tensor, null: th.Tensor, cache: bool) -> Iterator[None]:
        """Keep what a batch's conditions make, in the model and in the guide."""
        own = (y, null) if self.keep_colour else (y,)
        with kept_conditions(model, *own, enabled=cache), contextlib.ExitStack() as stack:
            if self.guide is not None:
                stack.enter_context(kept_conditions(self.guide, y, enabled=cache))
            yield

    def _use_cache(self, model: UNetModel, size: int) -> bool:
        if self.spade_cache != "auto":
            return self.spade_cache == "on"
        batches = 1 + self.keep_colour + (self.guide is not None)
        needed = model.modulation_bytes(size) * (batches * self.batch_size + 1)
        free = free_memory(dist_util.dev())
        if needed > free / 2:
            logger.log(
                f"--spade_cache auto: off, since it would take {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB "
                "are free; a smaller --batch_size turns it on"
            )
        return needed <= free / 2

    def _row(self, path: str, scale: Scale, k: int) -> dict:
        """Where sample k came from, as a row of the manifest."""
        index = k % len(self.dataset)
        return dict(
            index=k,
            stem=self.stems[k],
            seed=self.seed,
            structure=self.dataset.items[index].image,
            appearance=self.dataset.appearance_of(index),
            s=scale.text,
            checkpoint=path,
            sampler=self.sampler,
            steps=len(self.schedule),
        )

    def _draw(self) -> None:
        """Draw grid.png in each folder and, where there are several, sweep.png above them."""
        what = f"{self.sampler}, {len(self.schedule)} steps"
        for (path, scale), folder in self.folders.items():
            title = f"{PurePath(path).name}, s = {scale.text}, {what}"
            picture = folder.write_grid(self.stems[:GRID_ROWS], title)
        if len(self.folders) > 1:
            first = next(iter(self.folders.values()))
            rows = [
                [first.picture("cond", stem), first.picture("images", stem)]
                + [folder.picture("samples", stem) for folder in self.folders.values()]
                for stem in self.stems[:SWEEP_ROWS]
            ]
            captions = [f"{_shortened(PurePath(path).stem)} s{scale.text}" for path, scale in self.folders]
            picture = draw_grid(
                rows, ["condition", "appearance", *captions], what, Path(self.results_path) / "sweep.png"
            )
        logger.log(f"{self.count * len(self.folders)} samples; look at {picture}")


def _shortened(stem: str, length: int = 14) -> str:
    """The end of a checkpoint's name, which tells it from others, as far as it fits above a picture."""
    return stem if len(stem) <= length else f"..{stem[2 - length :]}"


def free_memory(device: th.device) -> int:
    """:return: the bytes of memory that are free on a device."""
    if device.type == "cuda":
        # What torch holds and does not use is free, too.
        return th.cuda.mem_get_info(device)[0] + th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
