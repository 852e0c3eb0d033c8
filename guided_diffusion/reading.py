"""From the files of an item to arrays, and what is wrong with them. Knows nothing of pairs, epochs and batches."""

import logging
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from . import cell_classes, magnification
from .conditioning import ConditionSpec
from .image_files import read_image, read_inst_mask, read_mask
from .images import Item
from .structures import fragments, oddities


@dataclass(frozen=True)
class Sample:
    """
    One item's arrays.

    :param image: [H x W x C] uint8; None of a structure without an image.
    :param masks: class map, [H x W] uint8 or int32, and instance map, [H x W] int32; empty of an item without masks.
    """

    image: np.ndarray | None
    masks: tuple[np.ndarray, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(array.nbytes for array in (self.image, *self.masks) if array is not None)


def read_sample(item: Item, spec: ConditionSpec, image_size: int) -> Sample:
    """
    Read an item's files; what is missing is derived: instances are the connected parts of the class mask, the class
    mask is 255 (1 with class_cond) in every instance.

    :raises ValueError: where sizes differ or are below image_size, or a class id is out of range.
    """
    image = read_image(item.image, spec.in_channels)
    _check_size(image, item.image, image_size)
    masks = {}
    for path, read in ((item.class_mask, read_mask), (item.inst_mask, read_inst_mask)):
        if path is not None:
            masks[path] = read(path)
            if masks[path].shape != image.shape[:2]:
                raise ValueError(
                    f"{path} is {masks[path].shape[1]} x {masks[path].shape[0]} px, its image {item.image} "
                    f"{image.shape[1]} x {image.shape[0]}: they must be of one size"
                )
    if not masks:
        return Sample(image)
    class_map, inst_map = masks.get(item.class_mask), masks.get(item.inst_mask)
    if inst_map is None:
        inst_map = _connected(class_map if spec.class_cond else class_map != 0)
    if class_map is None:
        class_map = _one_class(inst_map, spec)
    return Sample(image, (_checked(item, spec, class_map, inst_map), inst_map))


def _connected(class_map: np.ndarray) -> np.ndarray:
    """:return: an [H x W] int32 instance map of the connected parts of each class, where no mask tells nuclei apart."""
    inst_map = np.zeros(class_map.shape, np.int32)
    for one in np.unique(class_map[class_map != 0]):
        parts = ndimage.label(class_map == one)[0]
        inst_map += np.where(parts > 0, parts + inst_map.max(), 0).astype(np.int32)
    return inst_map


def read_structure(item: Item, spec: ConditionSpec, image_size: int, min_nucleus: float) -> Sample:
    """
    Read an instance mask that has no image. What is odd in it is warned of.

    :param min_nucleus: the smallest part of a nucleus that may be, in pixels at 40x; those that the border cuts may be
        smaller.
    :raises ValueError: where a part is smaller, or the mask is below image_size.
    """
    inst_map = read_inst_mask(item.inst_mask)
    _check_size(inst_map, item.inst_mask, image_size)
    least = magnification.area(min_nucleus, spec.mpp or magnification.REFERENCE_MPP)
    small = fragments(inst_map, least)
    if small:
        (number, size), others = small[0], f", and {len(small) - 1} more" if len(small) > 1 else ""
        raise ValueError(
            f"{item.inst_mask} has a part of nucleus {number} of {size} px, below {least:.3g} px{others}: remove "
            "it, or give a smaller --min_nucleus, such as 0"
        )
    if odd := oddities(inst_map):
        logging.getLogger(__name__).warning(f"{item.inst_mask}: {odd}")
    class_map = _one_class(inst_map, spec) if item.class_mask is None else read_mask(item.class_mask)
    if class_map.shape != inst_map.shape:
        raise ValueError(
            f"{item.class_mask} is {class_map.shape[1]} x {class_map.shape[0]} px, {item.inst_mask} "
            f"{inst_map.shape[1]} x {inst_map.shape[0]}: they must be of one size"
        )
    return Sample(None, (_checked(item, spec, class_map, inst_map), inst_map))


def count_classes(item: Item, known: range) -> np.ndarray:
    """
    Count the nuclei of each class, by an item's masks alone.

    :param known: the numbers of the classes, from 1.
    :return: a [classes] int64 array.
    :raises ValueError: see cell_classes.of_nuclei.
    """
    inst_map, class_map = read_inst_mask(item.inst_mask), read_mask(item.class_mask)
    numbers = list(cell_classes.of_nuclei(inst_map, class_map, known, item.class_mask).values())
    return np.bincount(numbers, minlength=known.stop)[1:]


def _checked(item: Item, spec: ConditionSpec, class_map: np.ndarray, inst_map: np.ndarray) -> np.ndarray:
    """
    :return: the class map, in 8 bits if these hold it.
    :raises ValueError: where the model takes classes, and the masks do not say one of each nucleus.
    """
    path = item.class_mask or item.inst_mask
    if spec.cell_classes and not item.cell_classes:
        raise ValueError(
            f"{item.inst_mask} has no classes in {cell_classes.FOLDER} beside it, which --class_cond True with "
            "--use_hv_map True reads: add them, or turn --class_cond off"
        )
    spec.check_classes(class_map, path)
    if spec.cell_classes:
        cell_classes.of_nuclei(inst_map, class_map, range(1, spec.num_classes), path)
    return class_map.astype(np.uint8) if class_map.max(initial=0) <= 255 else class_map


def _one_class(inst_map: np.ndarray, spec: ConditionSpec) -> np.ndarray:
    """The class map of nuclei whose classes are not known."""
    return (inst_map != 0) * np.uint8(1 if spec.class_cond else 255)


def _check_size(array: np.ndarray, path: str, image_size: int) -> None:
    if min(array.shape[:2]) < image_size:
        raise ValueError(
            f"{path} is {array.shape[1]} x {array.shape[0]} px, smaller than --image_size {image_size}: "
            "prepare larger patches or lower --image_size"
        )
