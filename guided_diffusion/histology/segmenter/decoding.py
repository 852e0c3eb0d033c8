"""
From an H&E image to an instance map: the trained segmenter, its file, and how its maps become nuclei.

Method: HoVer-Net's (Graham et al., Medical Image Analysis 2019). Beside whether a pixel is nucleus, the network
predicts where in its nucleus the pixel lies, from -1 to 1 in both directions; between two nuclei that touch, these
maps fall from 1 to -1, which parts them. Where it was trained on classes, a nucleus is of the class that most of its
pixels have. Owns the file and the way to instances. Knows nothing of training.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch as th
from scipy import ndimage
from skimage.measure import label, regionprops
from skimage.morphology import remove_small_objects
from skimage.segmentation import find_boundaries, relabel_sequential, watershed

from ...cell_classes import CellClass, as_rows, from_rows
from ...magnification import REFERENCE_MPP, area, length, odd_length
from ...slides import without_number
from .net import ADAPT, STRIDE, AdaptiveNorm, SegmenterNet, seeded_net

KIND = "nuclei segmenter"
FILE = "segmenter.pt"

_TILE = 512  # px of an image's side that pass through the network at a time, and what is added on each side
_MARGIN = 64
_NUCLEUS = 0.4  # probability from which a pixel is nucleus
_MAX_KERNEL = 31  # px, of OpenCV's derivatives
_STEEP = 0.0  # above it, a pixel is no seed: one of its positions falls
# In px of 40x:
_DERIVATIVE = 13  # the kernel that differentiates the maps
_OPENING = 1  # the radius of what seeds are opened by
_MIN_SEED = 20
_MIN_AREA = 50
_MIN_CUT = 20  # of what the border of the image cuts


class Maps(NamedTuple):
    """
    What a network says of an image's pixels.

    :param probability: of nucleus, an [H x W] float32 array in [0, 1].
    :param position: in the nucleus, an [H x W x 2] float32 array, x first, about -1 to 1.
    :param of_class: of K classes, if it is nucleus: an [H x W x K] float32 array of probabilities.
    """

    probability: np.ndarray
    position: np.ndarray
    of_class: np.ndarray


class Segmenter:
    """
    A trained network in evaluation mode.

    :param net: the network; it is moved to the device.
    :param device: where it runs.
    :param flips: average over the image and its three mirrored versions: four times the time for a little more.
    :param slides: that the network was trained on.
    :param held_slides: that its weights were chosen by, as the best among those of the run.
    :param adapt: what AdaptiveNorm takes of the image at hand, a share in [0, 1].
    :param mpp: micrometres a pixel of the images that it was trained on, and that it is given.
    :param classes: of nuclei, that it tells apart, as many as the network.
    """

    def __init__(
        self,
        net: SegmenterNet,
        device: th.device,
        flips: bool = False,
        slides: Iterable[str] = (),
        held_slides: Iterable[str] = (),
        adapt: float = ADAPT,
        mpp: float = REFERENCE_MPP,
        classes: Sequence[CellClass] = (),
    ) -> None:
        self.net = net.to(device, memory_format=th.channels_last).eval()
        for module in net.modules():
            if isinstance(module, AdaptiveNorm):
                module.adapt = adapt
        self.device = device
        self.flips = flips
        self.mpp = mpp
        self.classes = list(classes)
        self.slides, self.held_slides = frozenset(slides), frozenset(held_slides)

    def knows(self, stem: str, slide: str) -> str:
        """
        :param stem: of an image; slide: that it is of. A network may know either, or NAME of a stem NAME_000.
        :return: how the network knows its slide, "was trained on slide NAME" or the like; "" where it does not.
        """
        name = stem.rpartition("/")[2]
        for how, slides in (("was trained on", self.slides), ("was chosen by", self.held_slides)):
            for known in (slide, without_number(name), name):
                if known in slides:
                    return f"{how} slide {known}"
        return ""

    def check_classes(self, classes: Sequence[CellClass], where: str) -> None:
        """
        :param classes: of the data that it is measured on; where: the folder whose they are.
        :raises ValueError: where their numbers or names are not the segmenter's.
        """
        own, others = ([f"{one.id} {one.name}" for one in known] for known in (self.classes, classes))
        if own != others:
            raise ValueError(
                f"{where} has other classes of nuclei ({', '.join(others) or 'unnamed'}) than the segmenter "
                f"was trained on ({', '.join(own)}): give data of its classes, or take their class_masks away"
            )

    def segment(self, image: np.ndarray) -> np.ndarray:
        """See find. :return: the map alone."""
        return self.find(image)[0]

    def find(self, image: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
        """
        :param image: an [H x W x 3] uint8 array of any size.
        :return: an [H x W] int32 map, 0 = background, nuclei numbered from 1; and the class of each by its id, if the
            segmenter knows classes.
        """
        maps = self.predict(image)
        inst_map = instances(maps.probability, maps.position, self.mpp)
        return inst_map, voted(inst_map, maps.of_class, self.classes) if self.classes else {}

    def predict(self, image: np.ndarray) -> Maps:
        """:param image: an [H x W x 3] uint8 array of any size."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"segment: expected [H x W x 3] uint8, got {image.shape} {image.dtype}")
        maps = self._tiled(image)
        if self.flips:
            for axes in ((0,), (1,), (0, 1)):
                mirrored = np.flip(self._tiled(np.flip(image, axes)), axes).copy()
                for axis in axes:
                    mirrored[..., 2 - axis] *= -1
                maps += mirrored
            maps /= 4
        return Maps(maps[..., 0], maps[..., 1:3], maps[..., 3:])

    def _tiled(self, image: np.ndarray) -> np.ndarray:
        """All maps as one [H x W x (3 + K)] float32 array; the network sees every pixel in 64 px of context."""
        height, width = image.shape[:2]
        rows, tall = _tiles(height)
        columns, wide = _tiles(width)
        after = rows[-1] + tall - height + _MARGIN, columns[-1] + wide - width + _MARGIN
        padded = np.pad(image, ((_MARGIN, after[0]), (_MARGIN, after[1]), (0, 0)), mode="reflect")
        maps = np.empty((rows[-1] + tall, columns[-1] + wide, 3 + len(self.classes)), np.float32)
        inner = slice(_MARGIN, -_MARGIN)
        for row in rows:
            for column in columns:
                tile = padded[row : row + tall + 2 * _MARGIN, column : column + wide + 2 * _MARGIN]
                maps[row : row + tall, column : column + wide] = self._run(tile)[inner, inner]
        return maps[:height, :width]

    @th.inference_mode()
    def _run(self, tile: np.ndarray) -> np.ndarray:
        out = self.net(as_input(tile[None], self.device))[0].float()
        return th.cat([out[:1].sigmoid(), out[1:3], out[3:].softmax(0)]).permute(1, 2, 0).cpu().numpy()


def as_input(images: np.ndarray, device: th.device) -> th.Tensor:
    """[N x H x W x 3] uint8 -> the network's [N x 3 x H x W] float32."""
    x = th.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)  # strides of channels_last
    return (x.float() - 127) / 128


def instances(probability: np.ndarray, position: np.ndarray, mpp: float = REFERENCE_MPP) -> np.ndarray:
    """
    Turn a segmenter's maps into nuclei.

    Seeds are the parts of the nuclei where the position rises evenly; from them the nuclei are flooded, even ground
    first and the steep falls between neighbours last.

    :param probability: an [H x W] float32 array in [0, 1].
    :param position: an [H x W x 2] float32 array, x first.
    :param mpp: micrometres a pixel.
    :return: an [H x W] int32 map of 4-connected nuclei, numbered from 1, of at least 50 px of 40x; of 20 where the
        border cuts them.
    """
    nucleus = probability >= _NUCLEUS
    energy = _steepness(position, mpp)
    even = nucleus & (energy < _STEEP)
    if radius := round(length(_OPENING, mpp)):
        even = ndimage.binary_opening(even, iterations=radius)
    seeds = label(remove_small_objects(even, max_size=math.ceil(area(_MIN_SEED, mpp)) - 1), connectivity=1)
    bodies = label(nucleus, connectivity=1)
    lone = nucleus & ~np.isin(bodies, bodies[seeds > 0])  # a body without a seed is one nucleus
    seeds[lone] = bodies[lone] + seeds.max()
    inst_map = _cleaned(watershed(energy, seeds, mask=nucleus), mpp)
    return relabel_sequential(inst_map)[0].astype(np.int32)


def voted(inst_map: np.ndarray, of_class: np.ndarray, classes: Sequence[CellClass]) -> dict[int, int]:
    """
    :param inst_map: an [H x W] map of nuclei, numbered from 1. :param of_class: see Maps.
    :return: nucleus -> the id of the class that most of its pixels have, of equals the first.
    """
    votes = np.zeros((inst_map.max(initial=0) + 1, len(classes)), int)
    np.add.at(votes, (inst_map, of_class.argmax(-1)), 1)
    return {nucleus: classes[most].id for nucleus, most in enumerate(votes.argmax(1).tolist()) if nucleus}


def outlined(image: np.ndarray, inst_map: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """
    :param image: an [H x W x 3] uint8 array.
    :param inst_map: an [H x W] integer array.
    :return: a copy with the outermost pixels of every nucleus in the colour.
    """
    edge = find_boundaries(inst_map, connectivity=1, mode="inner")
    return np.where(edge[..., None], np.array(colour, np.uint8), image)


def hv_target(inst_map: np.ndarray) -> np.ndarray:
    """
    Where in its nucleus each pixel lies: what a perfect network would predict.

    Offset from the nucleus's centre of mass, divided by the largest offset on that side (left and right, above and
    below apart), so that every nucleus runs from -1 to 1.

    :param inst_map: an [H x W] integer array; each id is one nucleus.
    :return: an [H x W x 2] float32 array in [-1, 1], x first; 0 on the background.
    """
    target = np.zeros((*inst_map.shape, 2), np.float32)
    rows, columns = np.nonzero(inst_map)
    if not len(rows):
        return target
    nuclei, nucleus = np.unique(inst_map[rows, columns], return_inverse=True)
    size = np.bincount(nucleus)
    for axis, pixels in enumerate((columns, rows)):
        offset = pixels - (np.bincount(nucleus, pixels) / size)[nucleus]
        low, high = np.zeros(len(nuclei)), np.zeros(len(nuclei))
        np.minimum.at(low, nucleus, offset)
        np.maximum.at(high, nucleus, offset)
        reach = np.where(offset < 0, -low[nucleus], high[nucleus])
        target[rows, columns, axis] = np.divide(offset, reach, out=np.zeros_like(offset), where=reach > 0)
    return target


def as_content(
    net: SegmenterNet,
    slides: Iterable[str],
    held_slides: Iterable[str] = (),
    mpp: float = REFERENCE_MPP,
    classes: Sequence[CellClass] = (),
) -> dict[str, Any]:
    """
    :return: what a segmenter's file holds: weights, the slides that they come from, those that chose them, mpp, and the
        classes, if it tells any apart.
    """
    facts = {"slides": sorted(slides), "held_slides": sorted(held_slides), "mpp": mpp}
    facts |= {"classes": as_rows(classes)} if classes else {}
    return {"kind": KIND, "net": net.state_dict(), **facts}


def load_segmenter(path: str | Path, device: th.device, flips: bool = False, adapt: float = ADAPT) -> Segmenter:
    """
    Read what scripts/train_segmenter.py wrote.

    :param path: the file, or the folder it lies in; the others are Segmenter's.
    :raises FileNotFoundError: there is none.
    :raises ValueError: it is broken, or a checkpoint of something else.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    content = load_checked(path, KIND)
    classes = from_rows(content.get("classes", []), str(path))
    net = seeded_net(classes=len(classes))
    try:
        net.load_state_dict(content["net"])
        # Files of earlier versions do not name what was held out, and decoded as for 40x.
        facts = content["slides"], content.get("held_slides", ()), adapt, float(content.get("mpp", REFERENCE_MPP))
        return Segmenter(net, device, flips, *facts, classes)
    except (KeyError, RuntimeError, TypeError, AttributeError):
        raise ValueError(f"{path} is a segmenter of another layout: train it again") from None


def load_checked(path: Path, kind: str) -> dict[str, Any]:
    """
    Read one of the segmenter's files, tensors and plain values only.

    :raises FileNotFoundError: there is none.
    :raises ValueError: it is broken, or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: make one with scripts/train_segmenter.py")
    try:
        content = th.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise a dozen types
        reason = str(error).split("\n")[0][:100]
        raise ValueError(f"{path} is broken, or no checkpoint ({reason}): copy or train it again") from None
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind:
        raise ValueError(f"{path} is a checkpoint of another kind, not a {kind}: give what train_segmenter.py wrote")
    return content


def _tiles(length: int) -> tuple[list[int], int]:
    """Starts of equal tiles that cover a side, and their size: a multiple of 16, at most 512."""
    count = math.ceil(length / _TILE)
    size = math.ceil(length / count / STRIDE) * STRIDE
    return [number * size for number in range(count)], size


def _steepness(position: np.ndarray, mpp: float) -> np.ndarray:
    """How fast the position falls, an [H x W] float32 array: below 0 where both rise, 1 at the sharpest edge."""
    side = min(odd_length(_DERIVATIVE, mpp), _MAX_KERNEL)
    derivative, smooth = cv2.getDerivKernels(1, 0, side, normalize=True, ktype=cv2.CV_32F)
    peak = 2 * smooth.max()  # a step from 1 to -1
    x = cv2.sepFilter2D(np.ascontiguousarray(position[..., 0]), cv2.CV_32F, derivative, smooth)
    y = cv2.sepFilter2D(np.ascontiguousarray(position[..., 1]), cv2.CV_32F, smooth, derivative)
    return -np.minimum(x, y) / peak


def _cleaned(inst_map: np.ndarray, mpp: float) -> np.ndarray:
    """Close the holes that lie wholly within one nucleus, and remove what is too small for one, in place."""
    whole, cut = area(_MIN_AREA, mpp), area(_MIN_CUT, mpp)
    for region in regionprops(inst_map):
        part = inst_map[region.slice]
        part[region.image_filled & (part == 0)] = region.label
        top, left, bottom, right = region.bbox
        inside = min(top, left) > 0 and bottom < inst_map.shape[0] and right < inst_map.shape[1]
        if region.area_filled < (whole if inside else cut):
            part[part == region.label] = 0
    return inst_map
