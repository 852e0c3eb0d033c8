"""
The raw MoNuSeg archives: which slides there are, their pixels and their nuclei as an instance map.

Owns the folder layouts the data is published in, Aperio XML and how its outlines become pixels. Knows nothing of
patches nor of what the maps are used for, and writes nothing.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np

from ...files import by_stem
from ...image_files import EXTENSIONS, read_image, read_inst_mask
from ...slides import MANIFEST

TRAIN_SPLIT = "MoNuSegTrainingData"
TEST_SPLIT = "MoNuSegTestData"

XML_SUFFIXES = (".xml",)

_IMAGE_FOLDERS = ("images", "tissue images")
_XML_FOLDERS = ("annotations",)
_MASK_FOLDERS = ("inst_masks",)
# The words of a folder's name that say which split it feeds; "testg" as the reference's MoNuSegTestgData has it.
_SPLIT_WORDS = {
    TRAIN_SPLIT: ("train", "training", "traindata", "trainingdata", "trainset", "trainingset"),
    TEST_SPLIT: ("test", "tests", "testg", "testing", "testdata", "testingdata", "testset", "testingset"),
}
# What the reference's mask script writes beside the images; its masks and overlays are no slides.
_DERIVED_FOLDERS = ("bin_masks", "overlay", "rgb_image")
_MAX_DEPTH = 3
_HEAD = 4096  # bytes of an XML that hold its first element


@dataclass(frozen=True)
class Slide:
    """
    One image and the file that says where its nuclei are.

    :param split: TRAIN_SPLIT or TEST_SPLIT.
    :param stem: the name both files share.
    :param image: the image file.
    :param annotation: an Aperio .xml, or an instance mask.
    :param folder: the folder both were found under.
    """

    split: str
    stem: str
    image: Path
    annotation: Path
    folder: Path


def find_slides(raw: Path) -> list[Slide]:
    """
    Find all slides at most three folders below `raw`, in any mixture of the layouts they are published in.

    A folder of slides holds `Tissue Images` or `images` beside `Annotations` or `inst_masks` (an .xml goes before
    a mask of the same stem), or .tif and .xml files side by side. It feeds the split that its name, or else that of
    its nearest ancestor up to `raw`, has as a word: train or training, test or testing, as in MoNuSegTestData. A
    folder with a manifest of prepared patches, one named `patches_*` (the reference's output) and hidden ones are
    skipped.

    :param raw: the folder to search.
    :return: the slides, training before test, sorted by stem.
    :raises ValueError: no slide, a file without its partner, a stem used twice, a folder of unknown split.
    """
    raw = Path(raw)
    if not raw.is_dir():
        raise FileNotFoundError(f"RAW: there is no folder {raw}; give the folder the MoNuSeg archives were unpacked in")
    if (raw / MANIFEST).exists():
        raise ValueError(f"RAW: {raw} holds prepared patches ({MANIFEST}); give the folder of the MoNuSeg archives")
    slides = [slide for folder in _walk(raw) for slide in _slides_in(folder, raw)]
    if not slides:
        raise ValueError(
            f"RAW: found no slides in {raw}; expected 'Tissue Images' (or 'images') beside 'Annotations' (or "
            f"'inst_masks'), or .tif and .xml side by side, at most {_MAX_DEPTH} folders deep"
        )
    first: dict[str, Slide] = {}
    for slide in slides:
        other = first.setdefault(slide.stem, slide)
        if other is not slide:
            raise ValueError(
                f"{other.image} and {slide.image} are the same slide by name; remove or rename one of them"
            )
    return sorted(slides, key=lambda slide: (slide.split != TRAIN_SPLIT, slide.stem))


def read_slide(slide: Slide) -> tuple[np.ndarray, np.ndarray]:
    """
    Read one slide.

    :return: an [H x W x 3] uint8 RGB image and an [H x W] int32 instance map, 0 = background.
    :raises ValueError: a file that cannot be used, or the two do not fit each other.
    """
    image = read_image(slide.image)
    height, width = image.shape[:2]
    if slide.annotation.suffix.lower() not in XML_SUFFIXES:
        inst_map = read_inst_mask(slide.annotation)
        if inst_map.shape != (height, width):
            raise ValueError(
                f"{slide.annotation} is {inst_map.shape[1]} x {inst_map.shape[0]} px but its image {slide.image} is "
                f"{width} x {height} px; give the mask that was made for this image"
            )
        return image, inst_map
    polygons = read_polygons(slide.annotation)
    drawn = [polygon for polygon in polygons if len(polygon)]
    if drawn and not any(_touches(polygon, height, width) for polygon in drawn):
        raise ValueError(
            f"{slide.annotation}: every region lies outside its image {slide.image} ({width} x {height} px); "
            f"give the annotation that was made for this image"
        )
    return image, rasterise(polygons, height, width)


def read_polygons(path: Path) -> list[np.ndarray]:
    """
    Read the outlines of an Aperio XML: every `Region` of every layer, in document order.

    :return: per region a [V x 2] int32 array of (x, y), truncated toward zero; V = 0 if it has no vertex.
    :raises ValueError: not well-formed, has a document type, has no region, or a vertex that is not two numbers.
    """
    parser = ElementTree.XMLParser(target=_RegionCollector())
    try:
        parser.feed(Path(path).read_bytes())
        regions = parser.close()
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{path}: not a usable Aperio XML ({error}); export or download it again") from error
    if not regions:
        raise ValueError(f"{path}: no Region in this XML; give the annotation of the nuclei, exported from ImageScope")
    return [_to_pixels(vertices, path, number) for number, vertices in enumerate(regions, start=1)]


def frame_among(polygons: Sequence[np.ndarray]) -> tuple[int, int] | None:
    """
    Find a region that surrounds the field, as an outline of what was annotated does: filled, it swallows the nuclei
    before it, or turns what lies between those after it into a nucleus.

    :param polygons: as read_polygons gives them.
    :return: the first one's number, from 1, that has more than half of the others' middles inside, and how many.
    """
    drawn = [number for number, polygon in enumerate(polygons, start=1) if len(polygon)]
    low, high = (np.array([bound(polygons[n - 1], axis=0) for n in drawn]).reshape(-1, 2) for bound in (np.min, np.max))
    middles = (low + high) / 2
    for place, number in enumerate(drawn):
        near = ((middles >= low[place]) & (middles <= high[place])).all(axis=1)
        near[place] = False
        if 2 * near.sum() >= len(drawn):
            outline = polygons[number - 1].astype(np.float32)
            count = sum(cv2.pointPolygonTest(outline, middle, False) >= 0 for middle in middles[near].tolist())
            if 2 * count > len(drawn) - 1:
                return number, count
    return None


def read_mpp(slide: Slide) -> float | None:
    """:return: the micrometres a pixel that a slide's Aperio XML begins with; None where it has no such number."""
    if slide.annotation.suffix.lower() not in XML_SUFFIXES:
        return None
    collector = _RegionCollector()
    try:
        with open(slide.annotation, "rb") as file:
            ElementTree.XMLParser(target=collector).feed(file.read(_HEAD))
        value = float(collector.attributes.get("MicronsPerPixel", "nan"))
    except (ElementTree.ParseError, LookupError, ValueError):
        return None  # what is wrong with the file is read_polygons' to say
    return value if 0 < value <= 100 else None


def rasterise(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """
    Fill outlines into an instance map, number n (from 1) with id n; later ones overwrite earlier ones.

    OpenCV's rules: border pixels belong to the shape, a loop within a loop is a hole (even-odd), and what lies
    outside the map is cut off. An outline without vertices leaves its number unused.

    :param polygons: [V x 2] int32 arrays of (x, y).
    :return: an [H x W] int32 map, 0 = background.
    """
    inst_map = np.zeros((height, width), dtype=np.int32)
    for number, polygon in enumerate(polygons, start=1):
        if len(polygon):
            cv2.fillPoly(inst_map, [np.ascontiguousarray(polygon, dtype=np.int32)], number)
    return inst_map


class _RegionCollector:
    """A parser target that keeps the vertices of each region and builds no tree."""

    def __init__(self):
        self.attributes: dict[str, str] = {}  # of the outermost element
        self.regions: list[list[tuple[float, float]]] = []
        self._open: list[list[tuple[float, float]]] = []

    def doctype(self, name, public_id, system):
        raise ValueError("it has a document type declaration, which could define entities")

    def start(self, tag, attributes):
        tag = tag.rpartition("}")[2]
        self.attributes = self.attributes or {"": tag, **attributes}
        if tag == "Region":
            self.regions.append([])
            self._open.append(self.regions[-1])
        elif tag == "Vertex" and self._open:
            try:
                vertex = float(attributes["X"]), float(attributes["Y"])
            except KeyError as error:
                raise ValueError(f"a Vertex in region {len(self.regions)} has no {error.args[0]}") from error
            for region in self._open:
                region.append(vertex)

    def end(self, tag):
        if tag.rpartition("}")[2] == "Region":
            self._open.pop()

    def close(self):
        return self.regions


def _to_pixels(vertices: list[tuple[float, float]], path: Path, number: int) -> np.ndarray:
    points = np.trunc(np.array(vertices, dtype=np.float64).reshape(-1, 2))
    if not (np.abs(points) < 2**31).all():
        raise ValueError(f"{path}: region {number} has a vertex that is no pixel position; export the XML again")
    return points.astype(np.int32)


def _touches(polygon: np.ndarray, height: int, width: int) -> bool:
    (x0, y0), (x1, y1) = polygon.min(axis=0), polygon.max(axis=0)
    return bool(x1 >= 0 and y1 >= 0 and x0 < width and y0 < height)


def _walk(raw: Path) -> Iterator[Path]:
    """`raw` and the folders below it that may hold slides, in sorted order."""
    named = _IMAGE_FOLDERS + _XML_FOLDERS + _MASK_FOLDERS + _DERIVED_FOLDERS
    for folder, subfolders, _ in os.walk(raw, followlinks=True):
        here = Path(folder)
        if len(here.relative_to(raw).parts) >= _MAX_DEPTH:
            subfolders.clear()
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith((".", "__", "patches_"))
            and name.lower() not in named
            and not (here / name / MANIFEST).exists()
        )
        yield here


def _slides_in(folder: Path, raw: Path) -> list[Slide]:
    """Pair the files of one folder by stem; empty if it holds no slides."""
    children = {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}
    images = _by_stem([children[name] for name in _IMAGE_FOLDERS if name in children], EXTENSIONS)
    outlines = _by_stem([children[name] for name in _XML_FOLDERS if name in children], XML_SUFFIXES)
    masks = _by_stem([children[name] for name in _MASK_FOLDERS if name in children], EXTENSIONS)
    slides = _pair(images, masks | outlines, folder, raw)
    if any(
        path.suffix.lower() in (".xml", ".tif", ".tiff") for path in folder.iterdir() if not path.name.startswith(".")
    ):
        slides += _pair(_by_stem([folder], EXTENSIONS), _by_stem([folder], XML_SUFFIXES), folder, raw)
    return slides


def _by_stem(folders: Sequence[Path], suffixes: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        for stem, file in by_stem(folder, suffixes).items():
            if stem in found:
                raise ValueError(f"{found[stem]} and {file} are the same slide by name; remove or rename one of them")
            found[stem] = Path(file)
    return found


def _pair(images: dict[str, Path], annotations: dict[str, Path], folder: Path, raw: Path) -> list[Slide]:
    for stem, path in images.items():
        if stem not in annotations:
            raise ValueError(f"{path}: no annotation named {stem}.xml and no instance mask; add it or remove the image")
    for stem, path in annotations.items():
        if stem not in images:
            raise ValueError(f"{path}: no image named {stem}.tif belongs to it; add the image or remove this file")
    if not images:
        return []
    split = _split_of(folder, raw)
    return [Slide(split, stem, path, annotations[stem], folder) for stem, path in images.items()]


def _split_of(folder: Path, raw: Path) -> str:
    for name in reversed((raw.resolve().name, *folder.relative_to(raw).parts)):
        splits = [split for split, words in _SPLIT_WORDS.items() if not _words(name).isdisjoint(words)]
        if len(splits) > 1:
            raise ValueError(f"{folder}: '{name}' has the words train and test; name the folder after one of them")
        if splits:
            return splits[0]
    if folder == raw:
        return TRAIN_SPLIT
    raise ValueError(
        f"{folder} holds slides, but is it training or test data? Name it 'train' or 'test', "
        f"or give that folder itself as RAW"
    )


def _words(name: str) -> set[str]:
    """The words of a name in lower case; they end at whatever is no letter, and where a capital begins another."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return set(re.split(r"[\W\d_]+", parted.lower()))
