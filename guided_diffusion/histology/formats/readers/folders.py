"""
Data sets of masks beside images: TNBC, NuInsSeg, CryoNuSeg, and what Cellpose and StarDist are trained on.

Sources: the folders as they are published; cellpose.io's and csbdeep's readers.
"""

from functools import partial
from pathlib import Path

import numpy as np

from ....files import by_stem
from ....image_files import EXTENSIONS, read_image, read_inst_mask, read_mask
from ..fields import TRAIN, DataSet, Field, Labelled, numbered, safe
from .opening import PICKLED, Tree, number_in, paired, pairs

ANNOTATORS = {  # of CryoNuSeg -> a word that their folder alone has
    "biologist": "(biologist)",
    "second": "second round",
    "bioinformatician": "bioinformatician",
}
# What else Cellpose leaves beside an image, before the ending of masks, too.
_CELLPOSE_ENDS = ("_outlines", "_flows", "_flows_0", "_flows_1", "_flows_2", "_dP", "_cellprob", "_cp_output", "_cp")


def find_tnbc(tree: Tree) -> DataSet | None:
    """Find TNBC's images: `Slide_XX` and `GT_XX`, XX being the patient. Nuclei that touch come as one."""
    found = {(path.parent, path.name.lower()): path for path in tree.files}
    images, masks = (
        {(parent, name.removeprefix(start)): path for (parent, name), path in found.items() if name.startswith(start)}
        for start in ("slide_", "gt_")
    )
    if not images or not masks:
        return None
    for key in sorted(images.keys() ^ masks.keys()):
        raise ValueError(f"{images.get(key) or masks[key]} has no partner: Slide_{key[1]} and GT_{key[1]} go together")
    fields = []
    for key, folder in images.items():
        patient = key[1]
        for stem, image, mask in pairs(folder, masks[key]):
            slide = safe(f"tnbc-{patient}")
            name, read = numbered(slide, number_in(stem)), partial(_read_binary, image, mask)
            fields.append(Field(name, slide, patient, TRAIN, str(mask), read))
    patients = len({one.slide for one in fields})
    return DataSet(f"TNBC: {len(fields)} images of {patients} patients", fields, 0.25)


def _read_binary(image: Path, mask: Path) -> Labelled:
    from skimage.measure import label  # which takes as long to import as all else of a program's start

    return Labelled(read_image(image), label(read_mask(mask) > 0, connectivity=2))


def find_nuinsseg(tree: Tree) -> DataSet | None:
    """Find NuInsSeg's images: a folder an organ, which counts as a slide, since no more is said of whose they are."""
    fields = []
    for images, masks in tree.holding("tissue images", "label masks modify"):
        slide = safe(images.parent.name)
        for stem, image, mask in pairs(images, masks):
            name, read = numbered(slide, number_in(stem)), partial(_read_pair, image, mask)
            fields.append(Field(name, slide, images.parent.name, TRAIN, str(mask), read))
    if not fields:
        return None
    organs = len({one.slide for one in fields})
    return DataSet(f"NuInsSeg: {len(fields)} images of {organs} organs", fields)


def find_cryonuseg(tree: Tree, annotator: str = "biologist") -> DataSet | None:
    """
    Find CryoNuSeg's images, and one annotator's masks, which may lie in a folder within a folder of the same name.

    :param annotator: of ANNOTATORS.
    """
    raters = [folder for folder in tree.files if folder.name.lower().startswith("annotator ")]
    images = [folder for folder in tree.files if folder.name.lower() == "tissue images"]
    images = [folder for folder in images if any(rater.parent == folder.parent for rater in raters)]
    if not images:
        return None
    if annotator not in ANNOTATORS:
        raise ValueError(f"--annotator {annotator!r}: choose one of {', '.join(ANNOTATORS)}")
    masks = [folder for folder in tree.files if folder.name.lower() == "label masks modify"]
    masks = [folder for folder in masks if ANNOTATORS[annotator] in folder.parent.name.lower()]
    if len(images) > 1 or len(masks) != 1:
        raise ValueError(
            f"{tree.src}: {len(images)} folders 'tissue images' and {len(masks)} 'label masks modify' of --annotator "
            f"{annotator}: CryoNuSeg has one of each; unpack it again"
        )
    fields = [
        Field(safe(stem), safe(stem), annotator, TRAIN, str(mask), partial(_read_pair, image, mask))
        for stem, image, mask in pairs(images[0], masks[0])
    ]
    return DataSet(f"CryoNuSeg, masks of the annotator {annotator}: {len(fields)} images", fields, 0.25)


def find_stardist(tree: Tree) -> DataSet | None:
    """Find what StarDist is trained on: `images` and `masks`, label images of equal names."""
    fields = []
    for images, masks in tree.holding("images", "masks"):
        if by_stem(images, EXTENSIONS):
            fields += _named(tree, images.parent, pairs(images, masks))
    return DataSet(f"a StarDist set: {len(fields)} images", fields) if fields else None


def find_cellpose(tree: Tree) -> DataSet | None:
    """Find what Cellpose is trained on, or made: NAME.tif or NAME_img.tif, and NAME_masks.tif or NAME_cp_masks.tif."""
    fields = []
    for folder, names in tree.files.items():
        if not any("_masks." in name for name in names):
            continue
        files = by_stem(folder, EXTENSIONS)
        masks = {}
        for end in ("_cp_masks", "_masks"):  # the latter are drawn by hand, and go before
            made = {stem.removesuffix(end): path for stem, path in files.items() if stem.endswith(end)}
            masks |= {stem: path for stem, path in made.items() if not stem.endswith(_CELLPOSE_ENDS)}
        ends = (*_CELLPOSE_ENDS, "_masks")
        images: dict[str, str] = {}
        for stem, path in files.items():
            key = stem if stem in masks else stem.removesuffix("_img")
            if not stem.endswith(ends) and images.setdefault(key, path) != path:
                raise ValueError(f"{images[key]} and {path} would both belong to {key}_masks: rename one")
        if masks:
            fields += _named(tree, folder, paired(dict(sorted(images.items())), masks, folder, folder))
    return DataSet(f"a Cellpose set: {len(fields)} images", fields) if fields else None


def _named(tree: Tree, folder: Path, found: list[tuple[str, Path, Path]]) -> list[Field]:
    split = tree.split_of(folder)
    return [
        Field(safe(stem), safe(stem), folder.name, split, str(mask), partial(_read_pair, image, mask))
        for stem, image, mask in found
    ]


def _read_pair(image: Path, mask: Path) -> Labelled:
    """:raises ValueError: see image_files, and where a mask does not tell nuclei apart."""
    from skimage.measure import label

    inst_map = read_inst_mask(mask)
    ids = np.unique(inst_map[inst_map > 0])
    if len(ids) == 1:
        parts = label(inst_map > 0, connectivity=2)
        # The border may cut one nucleus in two, but not into parts that do not touch it; and few masks begin at 255.
        at_border = np.union1d(parts[[0, -1]], parts[:, [0, -1]])
        if parts.max() > 1 and (ids[0] == 255 or not np.isin(parts, [0, *at_border]).all()):
            raise ValueError(f"{mask} has several nuclei, all with the number {ids[0]}: give each a number of its own")
    return Labelled(read_image(image), inst_map)


def pickled(tree: Tree) -> str:
    """:return: which files are of a format that is refused, why, and what to export instead; "" where none are."""
    for folder, names in tree.files.items():
        if any(name.endswith("_seg.npy") for name in names):
            return (
                f"{folder} has Cellpose's _seg.npy, {PICKLED}: have Cellpose save masks (--save_tif, or Save masks as "
                "PNG/tif in its File menu)"
            )
        if folder.name == "labels" and any(name.endswith(".npy") for name in names):
            return (
                f"{folder} has CellViT's labels, {PICKLED}: import the data set that they were made of, or save each "
                "inst_map as masks/NAME.tif beside images/NAME.png (--format stardist)"
            )
    return ""
