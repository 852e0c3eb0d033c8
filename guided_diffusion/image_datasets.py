"""From files to samples: the data set and load_data. Knows the condition only as a ConditionSpec, and nothing of
models."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch as th
from torch.utils.data import Dataset

from . import data_util, dist_util, logger, magnification, streams
from .cell_classes import FOLDER as CLASS_FOLDER
from .conditioning import ConditionSpec, as_rgb, as_signed
from .data_stream import Key, stream
from .files import fingerprint
from .image_transforms import center_crop, random_crop, random_flip_turn
from .images import Item, list_images, list_items, list_structures, list_test_images, split_slides
from .pairing import Pairing
from .pairing import check as check_pairing
from .reading import Sample, count_classes, read_sample, read_structure
from .stains import jitter_stains
from .unlabelled import list_unlabelled

# Decoded files and HV maps are kept in memory up to this many bytes; MoNuSeg's patches take 0.6 GB. Worker processes
# begin with what is there when they are started, and share out what is left.
CACHE_BYTES = 2 << 30
CHECKED = 32  # files of each kind that are read at the start, evenly chosen, so that what is wrong with all shows then


class NucleiDataset(Dataset):
    """
    Samples with their conditions. A key is (epoch, index); all randomness is a function of (seed, epoch, index).

    Item i gives the structure; the appearance (image, colour map, path) comes from source appearance[i]: one of the
    items, or of the images without masks, which are counted after them. Where the spec has mark_unknown, these are
    samples, too, by the numbers that they are counted by, though not counted by len.

    :param items: what list_items gives.
    :param unmasked: items without masks.
    :param spec: the condition's layout.
    :param image_size: height and width of what is given out, in pixels; larger images are cropped.
    :param appearance: an [N] int array, or None for each item's own image.
    :param augment: crop at random places, flip and turn; else crop centrally.
    :param stain_jitter: by how much the stains of an appearance vary, see jitter_stains; 0: not at all.
    :param preserve_nuclei_col: see ConditionSpec.encode; so is ids.
    :param min_nucleus: see read_structure.
    :param field: give structures and appearances out whole, each at its own size; a structure has image_size at least.
    """

    def __init__(
        self,
        items: list[Item],
        spec: ConditionSpec,
        image_size: int,
        *,
        unmasked: Sequence[Item] = (),
        appearance: np.ndarray | None = None,
        augment: bool = False,
        stain_jitter: float = 0.0,
        preserve_nuclei_col: bool = False,
        ids: bool = True,
        min_nucleus: float = 0.0,
        field: bool = False,
        seed: int = 0,
    ) -> None:
        self.items = items
        self.sources = [*items, *unmasked]
        self.unlabelled = len(unmasked)
        self.weights: np.ndarray | None = None  # of the items, see data_stream.Source
        self.copies = 0  # of labelled images among those without masks, which were left out
        self.spec = spec
        self.image_size = image_size
        self.appearance = np.arange(len(items)) if appearance is None else appearance
        self.choose: Callable[[int], np.ndarray] | None = None
        self.augment = augment
        self.stain_jitter = stain_jitter
        self.preserve_nuclei_col = preserve_nuclei_col
        self.ids = ids
        self.min_nucleus = min_nucleus
        self.field = field
        self.seed = seed
        self._cache: dict[int, Sample] = {}
        self._hv_maps: dict[int, np.ndarray] = {}
        self._cached_bytes, self._limit = 0, CACHE_BYTES

    def __len__(self) -> int:
        return len(self.items)

    def identity(self) -> tuple[str, str]:
        """:return: what tells its items' files from others', wherever they lie; and the images without masks."""
        parts = (part for item in self.items for part in (item.image, item.class_mask, item.inst_mask))
        unlabelled = (item.image for item in self.sources[len(self) :])
        folders = itertools.groupby(unlabelled, lambda path: path.rpartition("/")[0])
        return fingerprint(list(filter(None, parts))), " ".join(fingerprint(list(paths)) for _, paths in folders)

    def unchanged(self) -> "NucleiDataset":
        """:return: the samples as they are, not augmented; what has been read is shared."""
        plain = copy.copy(self)
        plain.augment, plain.stain_jitter = False, 0.0
        return plain

    def pair(self, own_seed: int) -> np.ndarray:
        """:return: an array such as `appearance`, as another seed chooses it."""
        return self.appearance if self.choose is None else self.choose(own_seed)

    def read(self, index: int) -> Sample:
        """:return: a source's arrays, from memory where they are still there."""
        if index not in self._cache:
            lends_colours = self.field and index >= len(self)
            item, how = self.sources[index], (self.spec, 1 if lends_colours else self.image_size)
            sample = read_sample(item, *how) if item.image else read_structure(item, *how, self.min_nucleus)
            # Of a hundred thousand images, those that memory keeps would hardly ever be asked for.
            many = not sample.masks and self.unlabelled * sample.nbytes > self._limit // 2
            if many or not self._takes(sample.nbytes):
                return sample
            self._cache[index] = sample
        return self._cache[index]

    def _takes(self, nbytes: int) -> bool:
        """Whether the cache has room for so much more, which then counts as taken."""
        if self._cached_bytes + nbytes > self._limit:
            return False
        self._cached_bytes += nbytes
        return True

    def _hv_map(self, index: int, inst_map: np.ndarray | None) -> np.ndarray | None:
        """An item's HV map, kept if it is the same in every epoch; None where none is to be kept."""
        if self.augment or not self.spec.use_hv_map or inst_map is None:
            return None
        if index not in self._hv_maps:
            hv_map = self.spec.hv_planes(inst_map)
            if not self._takes(hv_map.nbytes):
                return hv_map
            self._hv_maps[index] = hv_map
        return self._hv_maps[index]

    def share_memory(self, processes: int) -> None:
        """Let this process, one of as many that began with what is kept now, keep its share of what may be added."""
        self._limit = self._cached_bytes + (self._limit - self._cached_bytes) // processes

    def __getitem__(self, key: Key) -> tuple[np.ndarray, dict]:
        """
        :param key: (epoch, index), or (epoch, index, source) for another source of the appearance than the usual one.
        :return: the appearance, [C x H x W] uint8, and a dict: the parts that ConditionSpec.encode makes; "path" and
            "structure_path", the images that appearance and structure come from, or the structure's mask; "index".
        """
        epoch, index = key[:2]
        own = int(self.appearance[index]) if index < len(self) else index
        source = key[2] if len(key) == 3 else own
        rng = streams.rng("augmentation", self.seed, epoch, index) if self.augment or self.stain_jitter else None
        structure = self.read(index)
        if source == index:
            image, *masks = self._cut((structure.image, *structure.masks), rng)
        else:
            masks = self._cut(structure.masks, rng)
            (image,) = self._cut((self.read(source).image,), rng)
        class_map, inst_map = masks or (None, None)
        if self.stain_jitter:
            image = jitter_stains(image, self.stain_jitter, rng)
        image = image.transpose(2, 0, 1).copy()
        colours = streams.generator("colour map", self.seed, epoch, index)
        hv_map = self._hv_map(index, inst_map)
        # What the model was trained on had the colours of what it showed: so have a field's windows, which overlap.
        block = self.image_size // 2 if class_map is not None and max(class_map.shape) > self.image_size else 0
        how = (self.preserve_nuclei_col, hv_map, self.ids, block)
        parts = self.spec.encode(image, class_map, inst_map, colours, *how)
        paths = {"path": self.sources[source].image, "structure_path": self.sources[index].path}
        return image, {**parts, **paths, "index": index}

    def check_colours(self, index: int, source: int) -> None:
        """:raises ValueError: where a field's colours go by its nuclei, and the appearance does not lie below these."""
        if not (self.field and self.preserve_nuclei_col and self.read(index).masks):
            return
        size = self.read(index).masks[-1].shape
        turned = self.augment and source != index and size[0] != size[1]
        if turned or self.read(source).image.shape[:2] != size:
            raise ValueError(
                f"--preserve_nuclei_col True takes colours by the nuclei of {self.sources[index].path}, and "
                f"{self.sources[source].image} is {'turned otherwise' if turned else 'of another size'}: turn it off, "
                "or give images of the masks' size, and no --augment True"
            )

    def _cut(self, arrays: tuple[np.ndarray, ...], rng: np.random.Generator | None) -> tuple[np.ndarray, ...]:
        if self.augment:
            return random_flip_turn(arrays if self.field else random_crop(arrays, self.image_size, rng), rng)
        return arrays if self.field else center_crop(arrays, self.image_size)


def load_dataset(
    *,
    data_dir: str,
    dataset_mode: str,
    image_size: int,
    spec: ConditionSpec,
    is_train: bool = True,
    augment: bool = False,
    stain_jitter: float = 0.0,
    preserve_nuclei_col: bool = False,
    ids: bool = True,
    subsample: float = 1.0,
    shuffle_masks: bool = False,
    match_struct: bool = False,
    match_app: bool = False,
    match_other_slide: bool = False,
    appearance_dir: str = "",
    structure_dir: str = "",
    min_nucleus: float = 0.0,
    unlabelled_dir: str = "",
    field: bool = False,
    balance_classes: bool = False,
    features: Callable[[list[str]], np.ndarray] | None = None,
    seed: int = 0,
    val_share: float = 0.0,
    part: str = "",
) -> NucleiDataset:
    """
    Make a data set. Collective. Some files are read, shared out over the ranks, so that what is wrong with all shows
    now; where images are matched, every file is. The others are checked when their turn comes.

    :param data_dir: see list_items; so are dataset_mode and is_train. Where the spec has no mpp, it is the folder's.
    :param subsample: use only this share of the items; shuffle_masks: give each the image of another, by a permutation.
    :param match_struct: give it that of an item with similar nuclei; match_other_slide: from other slides only.
    :param match_app: give it that of an item with a similar image: by `features`, else by its stain.
    :param appearance_dir: give it one of the images in this folder, which need no masks: any, or with match_struct one
        that seems to hold as much of nuclei.
    :param structure_dir: take the structures from these instance masks, and the appearances as with appearance_dir.
    :param unlabelled_dir: images that are samples, too, see list_unlabelled; min_nucleus: see read_structure.
    :param balance_classes: let items come by data_util.balanced_weights, for which all class masks are read.
    :param features: gives an [N x D] array for N paths of images, or raises ValueError for the first it has none of.
    :param seed: of the choices above and of all samples; other parameters as NucleiDataset's.
    :param val_share: see split_slides; part: what to load: "train", "held_out", which may be none, or "" for all.
    """
    choice = dict(shuffle_masks=shuffle_masks, match_struct=match_struct, match_app=match_app)
    choice["match_other_slide"] = match_other_slide
    check_pairing(**choice, appearance_dir=appearance_dir, structure_dir=structure_dir)
    needed, classes = data_dir or not (structure_dir and appearance_dir), spec.class_cond
    items = list_items(data_dir, dataset_mode, is_train, classes) if needed else []
    items, others = _split(items, subsample, part, val_share, seed)
    spec = spec if spec.mpp else replace(spec, mpp=magnification.of_data(data_dir) or magnification.REFERENCE_MPP)
    hidden = [*others, *(list_test_images(data_dir, dataset_mode) if unlabelled_dir and is_train else [])]
    unlabelled, copies = dist_util.from_rank_0(lambda: list_unlabelled(unlabelled_dir, items, hidden))
    items, appearances = _lenders(items, appearance_dir, structure_dir, classes, spec.cell_classes and match_struct)
    looks = dict(augment=augment, stain_jitter=stain_jitter, preserve_nuclei_col=preserve_nuclei_col, ids=ids)
    looks |= dict(unmasked=appearances or unlabelled, min_nucleus=min_nucleus, field=field, seed=seed)
    dataset = NucleiDataset(items, spec, image_size, **looks)
    dataset.copies, dataset.weights = copies, _weights(dataset) if balance_classes else None
    vectors, number = features and features([item.image for item in items]), spec.num_classes * spec.cell_classes
    return _paired(dataset, Pairing(items, appearances, **choice, vectors=vectors, classes=number, seed=seed))


def _lenders(
    items: list[Item], appearance_dir: str, structure_dir: str, classes: bool, masks_too: bool
) -> tuple[list[Item], list[Item]]:
    """The structures, and the images that lend them their colours, where these are not those of the items."""
    appearances = list_images(appearance_dir, "--appearance_dir") if appearance_dir else []
    if not structure_dir:
        return items, appearances
    own = items if masks_too else [replace(item, class_mask=None, inst_mask=None) for item in items]
    return list_structures(structure_dir, "--structure_dir", classes), appearances or own


def _paired(dataset: NucleiDataset, pairing: Pairing) -> NucleiDataset:
    """Choose a data set's appearances. Collective."""
    dataset.choose = functools.partial(pairing.choose, pairing.look(_read(dataset, pairing)))
    dataset.appearance = dataset.choose()
    return dataset


def _split(items: list[Item], subsample: float, part: str, share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """The items of a part of the sample, and the others in it."""
    if subsample != 1:
        items = [items[i] for i in sorted(data_util.subsample_indices(len(items), subsample))]
    if not part:
        return items, []
    training, held_out = split_slides(items, share, seed)
    return (training, held_out) if part == "train" else (held_out, training)


def _weights(dataset: NucleiDataset) -> np.ndarray:
    """
    How often items come by the classes of their nuclei, for which every class mask is read. Collective.

    :raises ValueError: where there are none, or what is wrong with them.
    """
    if not dataset.spec.class_cond:
        raise ValueError(
            "--balance_classes True with --class_cond False: it is for models that are told the classes of cells; turn "
            "that on, or leave it out"
        )
    known = range(1, dataset.spec.num_classes)

    def count(index: int) -> np.ndarray:
        item = dataset.items[index]
        if not item.cell_classes:
            raise ValueError(
                f"--balance_classes True: {item.path} has no classes in {CLASS_FOLDER} beside inst_masks: add them, or "
                "leave it out"
            )
        return count_classes(item, known)

    weights = data_util.balanced_weights(np.array(_each(range(len(dataset)), count, "counting classes")))
    logger.log(f"by the classes of their nuclei patches come {weights.min():.2f} to {weights.max():.2f} times as often")
    return weights


def _read(dataset: NucleiDataset, pairing: Pairing) -> list:
    """
    Read sources: all where the pairing looks at them, else some of each kind. Collective.

    :return: what the pairing says of each, on every rank; nothing where it does not look.
    """

    def describe(index: int) -> object:
        sample = dataset.read(index)
        image = None if sample.image is None else as_rgb(sample.image)
        return pairing.describe(index, image, *sample.masks) if pairing.looks_at_all else None

    everything = range(len(dataset.sources))
    if pairing.looks_at_all:
        return _each(everything, describe, "reading")
    _each([*_some(everything[: len(dataset)]), *_some(everything[len(dataset) :])], describe, "reading")
    return []


def _each(numbers: Sequence[int], look: Callable[[int], object], what: str) -> list:
    """:return: what a look at each source gives, by one rank each, on every rank. Collective."""
    rank, world_size = dist_util.rank(), dist_util.world_size()

    def look_at_share() -> list:
        share = numbers[rank::world_size]
        with ThreadPoolExecutor(2) as pool:
            how = dict(total=len(share), desc=what, unit="image", delay=1, leave=False)
            return list(dist_util.progress_bar(pool.map(look, share), **how))

    shares = dist_util.all_gather(dist_util.agree(look_at_share))
    return [shares[i % world_size][i // world_size] for i in range(len(numbers))]


def _some(numbers: range) -> range:
    return numbers[:: max(1, -(-len(numbers) // CHECKED))]


def load_data(
    *,
    data_dir: str,
    dataset_mode: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = True,
    random_flip: bool = True,
    is_train: bool = True,
    spec: ConditionSpec | None = None,
    start: int = 0,
    num_workers: int = 0,
    seed: int = 0,
    **options,
) -> Iterator[tuple[th.Tensor, dict]]:
    """
    Make an endless iterator over this rank's batches, as the reference's function of this name does: for scripts that
    were written for it. Collective.

    :param random_crop: without effect, as there in the modes that are left; so is random_flip. `augment` does both.
    :param spec: the condition's layout, in place of class_cond and flags among the options.
    :param options: ConditionSpec's flags, but num_classes is not needed; load_dataset's parameters. The others are
        stream's.
    :return: images, [N x C x H x W] fp32 in [-1, 1], and a dict of ConditionSpec.encode's parts, "col_map"
        scaled alike.
    """
    flags = {name: options.pop(name) for name in ConditionSpec.flags() if name in options}
    spec = spec or ConditionSpec.for_data(**flags, class_cond=class_cond)
    dataset = load_dataset(
        data_dir=data_dir,
        dataset_mode=dataset_mode,
        image_size=image_size,
        spec=spec,
        is_train=is_train,
        seed=seed,
        **options,
    )
    order = dict(deterministic=deterministic, start=start, num_workers=num_workers, seed=seed)
    return (_as_there(batch, cond) for batch, cond in stream(dataset, batch_size, **order))


def _as_there(batch: th.Tensor, cond: dict) -> tuple[th.Tensor, dict]:
    return as_signed(batch), {name: as_signed(part) if name == "col_map" else part for name, part in cond.items()}


def count_patches(seen: NucleiDataset, held_out: NucleiDataset | None) -> dict[str, int]:
    """:return: of how many patches and slides a model learns, and on how many it is validated, as its card tells."""
    items = held_out.items if held_out else []
    return {
        "patches": len(seen.items),
        "slides": len({item.slide for item in seen.items}),
        "unlabelled": seen.unlabelled,
        "held_out_patches": len(items),
        "held_out_slides": len({item.slide for item in items}),
    }
