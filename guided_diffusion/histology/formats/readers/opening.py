"""
What readers share: the folders of a data set, arrays from its files, and files that belong together.

Nothing is unpickled. Whatever a file holds that is not what it should be ends in ValueError, with the file's name.
"""

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from ....files import by_stem
from ....image_files import EXTENSIONS
from ...slides.annotations import TEST_SPLIT, split_named
from ..fields import TEST, TRAIN

_MAX_DEPTH = 5
_MAX_ID = np.iinfo(np.int32).max
_MAGIC = b"\x93NUMPY"
PICKLED = "pickled objects, which could run a program when they are read"


class Tree:
    """
    The folders of a data set, listed once.

    :param src: the folder that holds it, at most five folders up.
    """

    def __init__(self, src: Path) -> None:
        self.src = src
        self.files: dict[Path, list[str]] = {}
        for folder, below, names in os.walk(src, followlinks=True):
            here = Path(folder)
            deep = len(here.relative_to(src).parts) >= _MAX_DEPTH
            below[:] = [] if deep else sorted(name for name in below if not name.startswith((".", "__")))
            self.files[here] = sorted(name for name in names if not name.startswith("."))

    def called(self, name: str) -> list[Path]:
        """:return: the files of a name."""
        return [folder / name for folder, names in self.files.items() if name in names]

    def holding(self, images: str, masks: str) -> list[tuple[Path, Path]]:
        """
        :param images: a folder's name in lower case; masks: that of the one that belongs to it.
        :return: the folders named so, in lower or upper case, of each folder that has both.
        :raises ValueError: where some folder has images alone, and another both.
        """
        below: dict[Path, dict[str, Path]] = {}
        for folder in self.files:
            below.setdefault(folder.parent, {}).setdefault(folder.name.lower(), folder)
        found = [(names[images], names[masks]) for names in below.values() if {images, masks} <= names.keys()]
        alone = [names[images] for names in below.values() if images in names and masks not in names]
        if found and alone:
            raise ValueError(
                f"{alone[0]} has no '{masks}' beside it, as {found[0][0]} has: add it, or remove the former"
            )
        return found

    def parts(self, path: Path) -> tuple[str, ...]:
        """:return: the names that lead to a path, from the data set's own folder on."""
        return (self.src.resolve().name, *path.relative_to(self.src).parts)

    def split_of(self, path: Path) -> str:
        """:return: TEST where the nearest of a path's names that has the word train or test has the latter."""
        named = filter(None, map(split_named, reversed(self.parts(path))))
        return TEST if next(named, None) == TEST_SPLIT else TRAIN


def pairs(images: Path, masks: Path, suffixes: Sequence[str] = EXTENSIONS) -> list[tuple[str, Path, Path]]:
    """:return: stem, image and mask of two folders' files, by their stems. :raises ValueError: where one is alone."""
    return paired(by_stem(images, EXTENSIONS), by_stem(masks, suffixes), images, masks)


def paired(
    images: dict[str, str], masks: dict[str, str], image_folder: Path, mask_folder: Path
) -> list[tuple[str, Path, Path]]:
    """Pair files by stems, see pairs."""
    for stem in sorted(images.keys() ^ masks.keys()):
        alone, folder = (images[stem], mask_folder) if stem in images else (masks[stem], image_folder)
        raise ValueError(f"{alone} has no partner in {folder}: add it, or remove this file")
    return [(stem, Path(images[stem]), Path(masks[stem])) for stem in images]


@functools.lru_cache(maxsize=8)
def load_npy(path: Path) -> np.ndarray:
    """:return: the array of an .npy, mapped from disk, so that slices of large ones can be read."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        with open(path, "rb") as file:
            plain = file.read(len(_MAGIC)) == _MAGIC
        if plain and isinstance(error, ValueError) and "object" in str(error).lower():
            raise ValueError(f"{path} holds {PICKLED}: save plain arrays") from None
        what = str(error) if plain else "it does not begin as one"
        raise ValueError(f"{path} is not a whole .npy ({what}): copy or download it again") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is no .npy of one array: save it with numpy.save")
    return array


def load_mat(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """
    :param names: of variables.
    :return: those that a MATLAB file of version 4 to 7 has.
    """
    content = _from_mat(scipy.io.loadmat, path, variable_names=list(names))
    return {name: value for name, value in content.items() if name in names and isinstance(value, np.ndarray)}


def mat_names(path: Path) -> set[str]:
    """:return: which variables a MATLAB file has."""
    return {name for name, _, _ in _from_mat(scipy.io.whosmat, path)}


def _from_mat(read: Callable[..., Any], path: Path, **options: Any) -> Any:
    try:
        return read(path, appendmat=False, **options)
    except FileNotFoundError:
        raise
    except NotImplementedError:
        raise ValueError(f"{path} is of MATLAB 7.3, which is not read: save it with -v7") from None
    except Exception as error:  # a damaged file raises a dozen types
        raise ValueError(f"{path} is not a whole .mat ({error}): copy or download it again") from None


def whole(array: np.ndarray, where: str, most: int = _MAX_ID) -> np.ndarray:
    """
    :param array: of integers, perhaps in floating point. :param where: what names it in an error.
    :return: the same as int32. :raises ValueError: where a number is not whole, negative or above `most`.
    """
    if array.dtype.kind not in "buif":
        raise ValueError(f"{where} holds {array.dtype}, not numbers")
    within = array.size == 0 or bool(array.min() >= 0 and array.max() <= most)  # of NaN neither
    numbers = array.astype(np.int32) if within else array
    if not within or (numbers != array).any():
        raise ValueError(f"{where} holds numbers other than whole ones from 0 to {most}")
    return numbers


def rgb(array: np.ndarray, where: str) -> np.ndarray:
    """:return: an [H x W x 3] array of 0 to 255, of any type, as uint8; see whole."""
    return whole(array, where, 255).astype(np.uint8)


def number_in(name: str) -> int:
    """:return: the last number in a name; 0 where it has none."""
    found = re.findall(r"\d+", name)
    return int(found[-1]) if found else 0
