"""
What a segmenter learns from: a MoNuSeg-layout folder, which of it is held out, and augmented crops of the rest.

Owns the split and the leak rule, the crops and the colour jitter. Crop k of a run is a function of (seed, k) alone:
not of batch size, workers or where a run was resumed. Knows nothing of networks or losses.
"""

import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import torch as th

from ... import cell_classes, streams
from ...cell_classes import CellClass
from ...files import by_stem, reading_table
from ...image_files import EXTENSIONS, read_image, read_inst_mask, read_mask
from ...images import check_complete
from ...slides import hold_out as hold_out_slides
from ...slides import slides_of, without_number
from ...stains import jitter_stains
from ..evaluation.runs import MANIFEST
from ..slides.annotations import TRAIN_SPLIT
from ..slides.patches import IGNORE_MASKS
from .decoding import hv_target

_SCALES = (0.8, 1.25)
_JITTER = 0.35  # of the stains
_VAL_PIXELS = 400 * 400  # of each held-out slide
UNKNOWN = -1  # in an instance map, where it is not known whether there are nuclei


@dataclass(frozen=True)
class Pair:
    """
    An image, its instance mask and perhaps the mask of its cells' classes.

    :param stem: their common name.
    :param slides: where the picture comes from: its own slide, or those of a synthetic one's structure and appearance.
    :param ignored: its mask in IGNORE_MASKS, if it has one.
    """

    stem: str
    image: Path
    mask: Path
    slides: frozenset[str]
    synthetic: bool = False
    ignored: Path | None = None
    class_mask: Path | None = None


@dataclass(frozen=True)
class Example:
    """
    An [H x W x 3] uint8 image and its [H x W] int32 instance map, UNKNOWN where that says nothing; the slide, where it
    is of a known one; the class id of each nucleus by its id, where classes are known.
    """

    stem: str
    image: np.ndarray
    inst_map: np.ndarray
    slide: str = ""
    synthetic: bool = False
    of_nucleus: Mapping[int, int] = field(default_factory=dict)


def find_pairs(folder: Path) -> list[Pair]:
    """
    Pair a split's images/ with its inst_masks/ by stem, in sub-folders, too, and with its class_masks/, which all have
    or none; what manifest.csv says is synthetic is.

    :param folder: a split, e.g. DATA/MoNuSegTrainingData.
    :return: the pairs, sorted by stem.
    :raises FileNotFoundError: where a folder is missing.
    :raises ValueError: where there is no image, or a stem has no partner or two.
    """
    images, masks = (files_in(folder / name, deep=True) for name in ("images", "inst_masks"))
    if not images:
        raise ValueError(f"{folder / 'images'} holds no image ({', '.join(EXTENSIONS)})")
    class_masks = {}
    if (folder / cell_classes.FOLDER).is_dir():
        class_masks = files_in(folder / cell_classes.FOLDER, deep=True)
        check_partners(images, class_masks, folder / cell_classes.FOLDER)
    check_partners(images, masks, folder / "inst_masks")
    ignored = files_in(folder / IGNORE_MASKS, deep=True) if (folder / IGNORE_MASKS).is_dir() else {}
    for stem, mask in sorted([*masks.items(), *class_masks.items(), *ignored.items()]):
        if stem not in images:
            raise ValueError(f"{mask} has no image in {folder / 'images'}: add it or remove the mask")
    sources = _synthetic_sources(folder.parent / MANIFEST)
    own = slides_of(folder.parent, list(images.values()))
    return [
        Pair(
            stem,
            image,
            masks[stem],
            sources.get(stem) or frozenset([slide]),
            stem in sources,
            ignored.get(stem),
            class_masks.get(stem),
        )
        for (stem, image), slide in zip(images.items(), own)
    ]


def training_pairs(data: Path) -> list[Pair]:
    """
    The pairs of DATA/MoNuSegTrainingData.

    :raises FileNotFoundError: if it is not there.
    :raises ValueError: as `find_pairs`; or where the folder was not prepared to the end.
    """
    folder = data / TRAIN_SPLIT
    if not folder.is_dir():
        raise FileNotFoundError(f"DATA {data} has no {TRAIN_SPLIT}: make it with scripts/prepare_monuseg.py")
    check_complete(data, "DATA")
    return find_pairs(folder)


def classes_of(pairs: Sequence[Pair]) -> list[CellClass]:
    """
    :return: the classes that the pairs' class masks name; none where they have no such masks.
    :raises ValueError: where nothing says what their numbers mean.
    """
    mask = pairs[0].class_mask
    if mask is None:
        return []
    classes = cell_classes.of_mask(str(mask))
    if not classes:
        raise ValueError(
            f"{mask} has classes, but no folder above it the {cell_classes.TABLE} that names them: write it, or train "
            f"without {cell_classes.FOLDER}"
        )
    return classes


def check_no_overlap(pairs: Iterable[Pair], test_slides: Iterable[str], where: Path) -> None:
    """
    :param test_slides: that the model will be tested on; where: the images lie.
    :raises ValueError: if one of them is among those trained on, or made from.
    """
    test = {*test_slides}
    for pair in pairs:
        for slide in sorted(pair.slides & test):
            raise ValueError(f"slide {slide} of {where} is trained on, too ({pair.image}): remove it from one of them")


def checksum(pairs: Iterable[Pair]) -> str:
    """:return: a SHA-256 of the names and the contents of the pairs' files; what is no file is left to its reader."""
    found = hashlib.sha256()
    for pair in pairs:
        for path in filter(None, (pair.image, pair.mask, pair.ignored, pair.class_mask)):
            content = path.read_bytes() if path.is_file() else b""
            found.update(f"{path.name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return found.hexdigest()


def files_in(folder: Path, deep: bool = False) -> dict[str, Path]:
    """Stem -> image or mask of a folder, see files.by_stem; :raises FileNotFoundError: if it is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: every image needs an instance mask beside images/")
    return {stem: Path(path) for stem, path in by_stem(folder, EXTENSIONS, deep).items()}


def check_partners(images: dict[str, Path], masks: dict[str, Path], where: Path) -> None:
    """:raises ValueError: naming the first image that has no mask."""
    for stem in sorted(images.keys() - masks.keys()):
        raise ValueError(f"{images[stem]} has no mask {stem}.* in {where}: add it or remove the image")


def hold_out(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """
    Hold some slides out of training, see slides.hold_out.

    Real pictures of the chosen slides are the validation set. A synthetic picture is never validated on, and one whose
    structure or appearance comes from a chosen slide is left out.

    :param share: of the real slides, in [0, 1).
    :param seed: of the choice.
    :return: (to train on, held out, left out).
    :raises ValueError: where nothing would be left to train on, or a synthetic picture's slides are not known.
    """
    slides = {slide for pair in pairs if not pair.synthetic for slide in pair.slides}
    chosen = hold_out_slides(slides, share, seed)
    if not chosen:
        return list(pairs), [], []
    for pair in pairs:
        if "" in pair.slides:
            raise ValueError(
                f"{MANIFEST} does not say where {pair.stem} comes from, so it may show a held-out slide: "
                "add its structure and appearance, or give --val_share 0"
            )
    train, held, left = [], [], []
    for pair in pairs:
        clean = pair.slides.isdisjoint(chosen)
        (train if clean else left if pair.synthetic else held).append(pair)
    return train, held, left


def read_pair(pair: Pair, classes: Sequence[CellClass] = ()) -> Example:
    """
    :param classes: that its class mask may name; none: that mask is left alone.
    :raises ValueError: a file that cannot be used, or they do not fit each other.
    """
    example = read_example(pair.stem, pair.image, pair.mask, pair.class_mask if classes else None, classes)
    if pair.ignored:
        ignored = read_mask(pair.ignored)
        _check_size(pair.ignored, ignored, pair.image, example.image)
        example.inst_map[(ignored > 0) & (example.inst_map == 0)] = UNKNOWN
    return replace(example, slide=min(pair.slides), synthetic=pair.synthetic)


def read_example(
    stem: str, image_path: Path, mask_path: Path, class_path: Path | None = None, classes: Sequence[CellClass] = ()
) -> Example:
    """As `read_pair`."""
    image, inst_map = read_image(image_path), read_inst_mask(mask_path)
    _check_size(mask_path, inst_map, image_path, image)
    if class_path is None:
        return Example(stem, image, inst_map)
    of_nucleus = cell_classes.of_nuclei(inst_map, read_mask(class_path), cell_classes.ids_of(classes), str(class_path))
    return Example(stem, image, inst_map, of_nucleus=of_nucleus)


def _check_size(mask_path: Path, mask: np.ndarray, image_path: Path, image: np.ndarray) -> None:
    if image.shape[:2] != mask.shape:
        raise ValueError(
            f"{mask_path} is {mask.shape[1]} x {mask.shape[0]} px but {image_path} is "
            f"{image.shape[1]} x {image.shape[0]} px: give the mask that was made for this image"
        )


def validation_part(examples: Sequence[Example]) -> list[Example]:
    """Up to 160 000 px of each slide: the centre of a large image, or patches spread over the slide."""
    slides: dict[str, list[Example]] = {}
    for example in examples:
        slides.setdefault(example.slide, []).append(example)
    part = []
    for members in slides.values():
        pixels = members[0].inst_map.size
        count = min(max(1, _VAL_PIXELS // pixels), len(members))
        chosen = [members[k * len(members) // count] for k in range(count)]
        part += [_centre(example, int(_VAL_PIXELS**0.5)) for example in chosen]
    return part


class Crops(th.utils.data.Dataset):
    """
    Augmented crops, any number of them; a place is as likely to be drawn as any other.

    :param examples: whole slides or patches, in memory.
    :param crop: side in px.
    :param seed: of all draws.
    :param colour: jitter the stains.
    :param real_from: crops from this one on are of real examples alone; None: all are of either.
    :param apart: those before it are of synthetic ones alone.
    :param classes: of the examples' nuclei.
    :raises ValueError: an image is smaller than the crop; or with real_from there are none of a kind.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        crop: int,
        seed: int,
        colour: bool = True,
        real_from: int | None = None,
        apart: bool = False,
        classes: Sequence[CellClass] = (),
    ) -> None:
        for example in examples:
            if min(example.inst_map.shape) < crop:
                height, width = example.inst_map.shape
                raise ValueError(f"--crop {crop} is larger than {example.stem}, {width} x {height} px: give less")
        self.crop, self.seed, self.colour, self.real_from = crop, seed, colour, real_from
        self._places = {one.id: place for place, one in enumerate(classes, start=1)}
        parts: list[Sequence[Example]] = [examples]
        if real_from is not None:
            made, real = ([example for example in examples if example.synthetic == kind] for kind in (True, False))
            if not (made and real):
                raise ValueError("--synthetic_first and --real_last take images of both kinds: DATA has none of one")
            parts = [made if apart else examples, real]
        areas = [np.cumsum([example.inst_map.size for example in part]) for part in parts]
        self._parts = [(part, area / area[-1]) for part, area in zip(parts, areas)]

    def __getitem__(self, index: int) -> tuple[th.Tensor, th.Tensor]:
        """
        :return: [crop x crop x 3] uint8 and [3 x crop x crop] float32: nucleus (0 or 1, UNKNOWN), x and y in it; with
            classes, a fourth map: the place of the nucleus's class among them, from 1, 0 outside nuclei.
        """
        rng = streams.rng("crop", self.seed, index)
        examples, shares = self._parts[0 if self.real_from is None or index < self.real_from else 1]
        example = examples[int(np.searchsorted(shares, rng.random(), side="right"))]
        image, inst_map = self._cut(example, rng)
        if self.colour:
            image = jitter_stains(image, _JITTER, rng)
        nucleus, nuclei = np.sign(inst_map), np.maximum(inst_map, 0)
        maps = [nucleus[..., None], hv_target(nuclei)]
        if self._places:
            places = {nucleus: self._places[own] for nucleus, own in example.of_nucleus.items()}
            maps.append(cell_classes.painted(nuclei, places)[..., None])
        target = np.concatenate(maps, axis=2, dtype=np.float32)
        return th.tensor(image), th.from_numpy(np.ascontiguousarray(target.transpose(2, 0, 1)))

    def _cut(self, example: Example, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A window of random place and size, brought to the crop's size, turned and mirrored."""
        height, width = example.inst_map.shape
        window = min(round(self.crop / rng.uniform(*_SCALES)), height, width)
        row, column = rng.integers(height - window + 1), rng.integers(width - window + 1)
        cut = slice(row, row + window), slice(column, column + window)
        image, inst_map = example.image[cut], example.inst_map[cut]
        if window != self.crop:
            size = (self.crop, self.crop)
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
            inst_map = cv2.resize(inst_map, size, interpolation=cv2.INTER_NEAREST_EXACT)
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
        turned = [np.rot90(array, turns) for array in (image, inst_map)]
        turned = [np.flip(array, 1) if mirror else array for array in turned]
        return np.ascontiguousarray(turned[0]), np.ascontiguousarray(turned[1])


def _synthetic_sources(path: Path) -> dict[str, frozenset[str]]:
    """Stem -> slides of structure and appearance, of the synthetic rows of a manifest; '' stands for an unknown one."""
    if not path.exists():
        return {}
    with reading_table(path), open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and not {"stem", "source"} <= rows[0].keys():
        raise ValueError(f"{path} has no columns stem and source: give a folder of scripts/assemble_set.py")
    return {
        row["stem"]: frozenset(
            row.get(slide) or without_number(Path(row.get(name) or "").stem)
            for name, slide in (("structure", "structure_slide"), ("appearance", "slide"))
        )
        for row in rows
        if row["source"] != "real"
    }


def _centre(example: Example, side: int) -> Example:
    height, width = example.inst_map.shape
    row, column = max(0, (height - side) // 2), max(0, (width - side) // 2)
    cut = slice(row, row + side), slice(column, column + side)
    return replace(example, image=example.image[cut], inst_map=example.inst_map[cut])
