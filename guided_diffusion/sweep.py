"""Checkpoints x guidance scales x conditions as one job that can be stopped at any moment and goes on where it was.
Knows what goes where and in which order; nothing of flags."""

import dataclasses
import functools
import glob
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import blobfile as bf
import numpy as np
import torch as th

from . import cell_classes, dealing, dist_util, files, logger
from .background import BackgroundWriter
from .checkpoint import BEST
from .condition_cache import ConditionCache, SampleFn
from .conditioning import ConditionSpec
from .draws import Draw, own_draw, shared_draw
from .image_datasets import NucleiDataset
from .pictures import draw_grid
from .results import ResultFolder, folder_name, unique_stems
from .sampling_plan import SamplingPlan, to_uint8
from .signals import StopRequest
from .unet import UNetModel
from .windows import count_windows

GRID_ROWS, SWEEP_ROWS = 12, 6
LOOKED_AT = 8  # structures, for how large fields are


@dataclass(frozen=True)
class Scale:
    """A guidance scale, and how the user wrote it, which names its folder."""

    s: float
    text: str


def parse_scales(text: str) -> list[Scale]:
    """:return: the scales in a comma-separated --s, in order, each once, as it is written first."""
    scales: dict[str, Scale] = {}
    for part in (part.strip() for part in text.split(",")):
        try:
            s = float(part)
        except ValueError:
            s = float("nan")
        if not 0 <= s < float("inf"):
            raise ValueError(f"--s {text} does not parse: give one number or several, such as 1.3,1.4,1.5")
        scales.setdefault(f"{s:g}", Scale(s, part))  # what draws go by
    return list(scales.values())


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
    """
    :return: the files that a comma-separated --model_path names. Each part may be a pattern such as run/ema_*.pt, which
        leaves out the names that the best checkpoint has beside its own unless it says "best".
    """
    if not text:
        raise ValueError("--model_path is empty: give the checkpoint to sample from")
    paths: dict[str, None] = {}
    for part in [text] if _matches(text) else text.split(","):
        matches = [part]
        if any(sign in part for sign in "*?[") and not os.path.isfile(part):
            every = BEST in PurePath(part).name
            matches = [path for path in _matches(part) if every or BEST not in PurePath(path).name]
        if not matches:
            raise ValueError(f"--model_path {part} matches no file: check the path")
        paths.update(dict.fromkeys(matches))
    for path in paths:
        files.check_path(path)
        if not files.is_file(path):
            raise FileNotFoundError(f"--model_path {path} is not a file: check the path")
    stems = [PurePath(path).stem for path in paths]
    for stem in stems:
        if stems.count(stem) > 1:
            raise ValueError(f"--model_path names two files {stem}.pt, whose results would mix: sample them apart")
    return list(paths)


def _matches(pattern: str) -> list[str]:
    """The files of a name or pattern; where none fits, its brackets are meant as they stand, as in run[1]/ema_*.pt."""
    if "://" in pattern:
        return sorted(bf.glob(pattern)) if any(sign in pattern for sign in "*?[") else []
    if os.path.isfile(pattern):
        return [pattern]
    return sorted(glob.glob(pattern) or glob.glob(pattern.replace("[", "[[]")))


@dataclass
class Sweep:
    """
    What to sample, from what, into where.

    :param dataset: gives the conditions.
    :param checkpoints: paths of weights; scales: guidance scales. One of each fills results_path itself, several fill
        a folder MODEL_sS in it each.
    :param count: samples for each pair.
    :param plan: how to sample; s and null are filled in.
    :param spade_cache: on, off, or auto: on if memory allows.
    :param keep_colour: the null condition keeps the colour map.
    :param first: take structures by name, not spread over slides.
    :param same_noise: the pairs share conditions and noise; else each draws its own.
    :param field: sample fields, by windows; window_overlap: of these, see windows.starts.
    """

    dataset: NucleiDataset
    spec: ConditionSpec
    plan: SamplingPlan
    checkpoints: Sequence[str]
    scales: Sequence[Scale]
    results_path: str
    count: int
    batch_size: int = 1
    num_workers: int = 0
    spade_cache: str = "auto"
    keep_colour: bool = False
    first: bool = False
    same_noise: bool = False
    field: bool = False
    window_overlap: float = 0.5

    def __post_init__(self) -> None:
        slides = [item.slide for item in self.dataset.items]
        seed = self.plan.seed
        pairs = [(path, scale) for path in self.checkpoints for scale in self.scales]
        if self.same_noise:
            self.draws = dict.fromkeys(
                pairs, shared_draw(slides, self.dataset.appearance, self.dataset.pair, seed, self.first)
            )
        else:
            own = functools.partial(own_draw, slides, self.dataset.pair, seed, first=self.first)
            self.draws = {(path, scale): own(path, scale.s) for path, scale in pairs}
        self.stems = {pair: self._stems(draw) for pair, draw in self.draws.items()}
        dist_util.from_rank_0(self._check_colours)
        single = len(self.checkpoints) == len(self.scales) == 1
        root = Path(self.results_path)
        self.folders = {
            (path, scale): ResultFolder(root if single else root / folder_name(path, scale.text))
            for path, scale in pairs
        }

    def _check_colours(self) -> None:
        """:raises ValueError: where an appearance does not fit its structure, see NucleiDataset.check_colours."""
        taken = {(draw.structure(k), draw.source(k)) for draw in self.draws.values() for k in range(self.count)}
        for pair in sorted(taken if self.field else ()):
            self.dataset.check_colours(*pair)

    def _stems(self, draw: Draw) -> list[str]:
        return unique_stems([PurePath(self.dataset.sources[draw.source(k)].stem).name for k in range(self.count)])

    def _key(self, batch: dealing.Batch, k: int) -> tuple[int, int, int]:
        return self.draws[batch.checkpoint, next(iter(batch.wanted))].key(k)

    def run(self, load_model: Callable[[str], UNetModel]) -> None:
        """
        Sample all that is not finished yet, each rank as much as it finds time for. Collective.

        :param load_model: gives the model with a checkpoint's weights, on this rank's device. Ranks call it when they
            come to a checkpoint, at different times, and not for all: it must not be collective.
        :raises ValueError: where an earlier run made other samples.
        :raises OSError: where not all that was sampled is there in the end.
        :raises signals.Stopped: where this rank is asked to stop, which costs the batch at hand.
        """
        pending = dist_util.from_rank_0(self._take_up)
        total, left = self.count * len(pending), sum(map(len, pending.values()))
        if left < total:
            logger.log(f"{total - left} of {total} samples are finished already")
        at_once = dist_util.from_rank_0(self._at_once)
        batches = dealing.cut(pending, at_once, dist_util.world_size(), alike=self.same_noise)
        dealt = dealing.dealt(batches, self.dataset, self.num_workers, self._key, apart=self.field)
        with dist_util.progress_bar(total=left, desc="sampling", unit="image") as bar, StopRequest() as stop:
            with BackgroundWriter() as writer:
                for path, own in itertools.groupby(dealt, lambda item: item[0].checkpoint):
                    for made in self._sample_from(load_model(path), own, writer, stop):
                        bar.update(made - bar.n)
            dist_util.barrier()
            bar.update(left - bar.n)
        dist_util.from_rank_0(self._finish)

    def _at_once(self) -> int:
        """Samples a batch: of fields as many as have batch_size windows, going by the largest of a few."""
        if not self.field:
            return self.batch_size
        some = range(0, len(self.dataset), -(-len(self.dataset) // LOOKED_AT))
        shapes = [self.dataset.read(index).masks[0].shape for index in some]
        most = max(count_windows(*shape, self.dataset.image_size, self.window_overlap) for shape in shapes)
        return -(-self.batch_size // most)

    def _take_up(self) -> dict[tuple[str, Scale], set[int]]:
        """Put what earlier runs left in order; :return: the samples that are not finished."""
        for pair, folder in self.folders.items():
            self._check_rows(*pair, folder)
        pending = {}
        classes = cell_classes.of_mask(self.dataset.items[0].class_mask) if self.spec.cell_classes else None
        for pair, folder in self.folders.items():
            folder.open(classes)
            pending[pair] = set(range(self.count)) - folder.merge().keys()
        return pending

    def _check_rows(self, path: str, scale: Scale, folder: ResultFolder) -> None:
        """:raises ValueError: where an earlier run made more samples than are asked for now, or others."""
        rows = folder.rows()
        have = max(rows, default=-1) + 1
        if have > self.count:
            raise ValueError(
                f"{folder.path} holds {have} samples of this run, more than --num_samples {self.count}: give as "
                "many, or another --results_path"
            )
        for k, row in rows.items():
            now = self._row(path, scale, k)
            for field in ("structure", "appearance", "stem"):
                if row[field] != now[field]:
                    raise ValueError(
                        f"{folder.path}: sample {k} was made of {field} {row[field]}, and the data now give "
                        f"{now[field]}: give another --results_path, or --overwrite True to start anew"
                    )

    def _finish(self) -> None:
        """Merge the manifests and draw; :raises OSError: where samples are missing."""
        for folder in self.folders.values():
            have = len(folder.merge())
            if have < self.count:
                raise OSError(f"{folder.path} holds {have} of {self.count} samples: run the same again to go on")
        self._draw()

    def _sample_from(
        self,
        model: UNetModel,
        own: Iterable[tuple[dealing.Batch, dealing.Groups]],
        writer: BackgroundWriter,
        stop: StopRequest,
    ) -> Iterator[int]:
        """Sample batches of one checkpoint; :return: an iterator over how many samples all ranks have made, about."""
        device = dist_util.dev()
        cache = ConditionCache(
            model,
            self.spec,
            device,
            batch_size=self.batch_size,
            mode=self.spade_cache,
            keep_colour=self.keep_colour,
            guide=self.plan.guide,
        )
        for batch, groups in own:
            made = batch.before
            tensors = [{name: v.to(device) for name, v in cond.items() if th.is_tensor(v)} for _, cond in groups]
            ys = list(map(self.spec.assemble, tensors))
            pictures = list(map(self.spec.render, ys))
            sample = cache.fields(ys, self.window_overlap) if self.field else cache.patches(*ys)
            for scale, wanted in batch.wanted.items():
                with stop.raised():  # nowhere else, so that no worker process is left in the middle of a word
                    samples = [to_uint8(x) for x in self._sample(sample, batch, scale)]
                for k, parts in zip(batch.numbers, _parts(groups, pictures, samples)):
                    if k in wanted:
                        row, folder = self._row(batch.checkpoint, scale, k), self.folders[batch.checkpoint, scale]
                        writer(functools.partial(folder.write, row, **parts))
                made += len(wanted)
                yield made
            del sample  # which frees its memory before the next batch's is taken

    def _sample(self, sample: SampleFn, batch: dealing.Batch, scale: Scale) -> list[th.Tensor]:
        shown = dist_util.rank() == 0 and sys.stderr.isatty()
        seed = self.draws[batch.checkpoint, scale].seed
        return sample(dataclasses.replace(self.plan, s=scale.s, seed=seed), batch.numbers, shown)

    def _row(self, path: str, scale: Scale, k: int) -> dict:
        """Where sample k came from, as a row of the manifest."""
        draw = self.draws[path, scale]
        structure, appearance = self.dataset.items[draw.structure(k)], self.dataset.sources[draw.source(k)]
        return dict(
            index=k,
            stem=self.stems[path, scale][k],
            seed=self.plan.seed,
            structure=structure.path,
            appearance=appearance.image,
            s=scale.text,
            checkpoint=path,
            sampler=self.plan.sampler,
            steps=len(self.plan),
            structure_slide=structure.slide,
            appearance_slide=appearance.slide,
            noise=f"{draw.seed}/{k}",
            structure_kind=structure.kind,
        )

    def _draw(self) -> None:
        """Draw grid.png in each folder and, where there are several, sweep.png above them."""
        what, note = f"{self.plan.sampler}, {len(self.plan)} steps", self.spec.legend()
        for (path, scale), folder in self.folders.items():
            title = f"{PurePath(path).name}, s = {scale.text}, {what}"
            picture = folder.write_grid(self.stems[path, scale][:GRID_ROWS], title, note, self.spec.mpp)
        if len(self.folders) > 1:
            columns = [self._column("samples", pair) for pair in self.folders]
            captions = [f"{PurePath(path).stem} s={scale.text}" for path, scale in self.folders]
            if self.same_noise:
                pair = next(iter(self.folders))
                columns = [self._column("cond", pair), self._column("images", pair), *columns]
                captions = ["condition", "appearance", *captions]
            else:
                note = "Each column has conditions of its own; --same_noise True shows the same ones."
            path = Path(self.results_path) / "sweep.png"
            picture = draw_grid(list(zip(*columns)), captions, what, path, note, self.spec.mpp)
        logger.log(f"{self.count * len(self.folders)} samples; look at {picture}")

    def _column(self, part: str, pair: tuple[str, Scale]) -> list[np.ndarray]:
        """The first samples' pictures in one of a folder's folders."""
        return [self.folders[pair].picture(part, stem) for stem in self.stems[pair][:SWEEP_ROWS]]


def _parts(
    groups: dealing.Groups, pictures: Sequence[list[np.ndarray]], samples: Sequence[np.ndarray]
) -> Iterator[dict[str, np.ndarray]]:
    """What ResultFolder.write takes of each sample, of the groups' one after another."""
    for (images, cond), of_cond, made in zip(groups, pictures, samples):
        for i, sample in enumerate(made):
            yield dict(
                image=images[i].permute(1, 2, 0).numpy(),
                label=cond["label_ori"][i].numpy(),
                cond=of_cond[i],
                sample=sample,
                inst=cond["instance"][i, 0].numpy(),
            )
