"""
Cutting a slide into patches: where the windows lie, in which order, and the files each patch becomes.

Owns the patch folder's formats. Knows nothing of where a slide comes from.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.measure import label

from ...cell_classes import FOLDER as CLASS_FOLDER
from ...files import writing

MODES = ("valid", "mirror")
SUFFIXES = {"images": ".png", "bin_masks": ".png", "inst_masks": ".tif"}
IGNORE_MASKS = "ignore_masks"  # beside those: not 0 where it is not known whether there are other nuclei
PNG_LEVEL = 2  # a third of the time of the default 6, for a few percent more bytes


def window_positions(height: int, width: int, window: int, step: int) -> list[tuple[int, int]]:
    """
    Top-left corners of the windows in an [height x width] array; their order is the patches' running number.

    Per axis windows start at 0, step, 2 * step, ... while they fit, and one more is flush with the end if a rest
    remains. Order: the regular grid row by row, the flush bottom row, the flush right column, the corner.

    :param window: side of the square window in px, at least 1.
    :param step: distance between windows in px, at least 1.
    :return: (row, column) pairs.
    :raises ValueError: the window does not fit into the array.
    """
    if height < window or width < window:
        raise ValueError(
            f"{width} x {height} px is smaller than the patch of {window} px; choose a smaller --patch_size"
        )
    rows, last_row = _starts(height, window, step)
    columns, last_column = _starts(width, window, step)
    grid = [(row, column) for row in rows for column in columns]
    bottom = [(row, column) for row in last_row for column in columns]
    right = [(row, column) for column in last_column for row in rows]
    return grid + bottom + right + [(row, column) for row in last_row for column in last_column]


def mirror_margins(window: int, step: int, mode: str = "valid") -> tuple[int, int]:
    """
    Pixels by which an image is padded before windows are cut: (top and left, bottom and right).

    :param mode: 'valid' pads nothing; 'mirror' pads window - step in all, so that the windows' centres, step x step
        px each, cover the image.
    :raises ValueError: an invalid window, step or mode.
    """
    if window < 1 or step < 1:
        raise ValueError(f"--patch_size is {window}, --stride is {step}; give at least 1 px")
    if mode not in MODES:
        raise ValueError(f"--mode is {mode!r}; choose one of {', '.join(MODES)}")
    if mode == "valid":
        return 0, 0
    if step > window:
        raise ValueError(f"--stride is {step}; mirror needs at most --patch_size, {window}")
    return (window - step) // 2, (window - step) - (window - step) // 2


def patch_count(height: int, width: int, window: int, step: int, mode: str = "valid") -> int:
    """Number of patches of an [height x width] image; ValueError if it has none."""
    before, after = mirror_margins(window, step, mode)
    return len(window_positions(height + before + after, width + before + after, window, step))


def extract_patches(
    image: np.ndarray, inst_map: np.ndarray, window: int, step: int, mode: str = "valid"
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    Cut an image and its instance map into patches, in the order of `window_positions`. Ids stay those of the whole map.

    :param image: an [H x W x 3] array.
    :param inst_map: an [H x W] array.
    :param mode: 'valid', or 'mirror': both arrays are first padded by `mirror_margins` (reflected, edge not repeated).
    :return: pairs of views, [window x window x 3] and [window x window].
    """
    if image.shape[:2] != inst_map.shape:
        raise ValueError(f"image {image.shape[:2]} and instance map {inst_map.shape} differ in size")
    margins = mirror_margins(window, step, mode)
    if any(margins):
        image = np.pad(image, (margins, margins, (0, 0)), mode="reflect")
        inst_map = np.pad(inst_map, (margins, margins), mode="reflect")
    for row, column in window_positions(*inst_map.shape, window, step):
        cut = slice(row, row + window), slice(column, column + window)
        yield image[cut], inst_map[cut]


def parted(inst_map: np.ndarray) -> np.ndarray:
    """
    Give each 4-connected part of an id a number of its own, as a nucleus and its mirror image need.

    :param inst_map: an [H x W] integer array, 0 = background.
    :return: an array of its type: the first part of an id keeps it, others get numbers above the largest; where its
        type has not as many, all are numbered anew.
    """
    parts = label(inst_map, background=0, connectivity=1)
    numbers, first = np.unique(parts, return_index=True)
    ids = inst_map.reshape(-1)[first]
    again = np.ones(len(ids), bool)
    again[np.unique(ids, return_index=True)[1]] = False
    if int(ids.max()) + int(again.sum()) > np.iinfo(inst_map.dtype).max:
        return parts.astype(inst_map.dtype)
    ids[again] = ids.max() + 1 + np.arange(again.sum())
    return ids[np.searchsorted(numbers, parts)]


def resized(image: np.ndarray, inst_map: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Resize an [H x W x 3] uint8 image, bicubic, and its [H x W] instance map, nearest.

    :return: [height x width x 3] uint8, and [height x width] int32.
    """
    size = (width, height)
    picture = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC)
    instances = Image.fromarray(np.ascontiguousarray(inst_map, np.int32)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(picture), np.asarray(instances)


def patch_files(folder: Path, stem: str, index: int, classes: bool = False) -> dict[str, Path]:
    """The files of patch `index` of slide `stem` below a split's folder, keyed by the subfolder's name."""
    suffixes = SUFFIXES | ({CLASS_FOLDER: ".png"} if classes else {})
    return {name: Path(folder) / name / f"{stem}_{index:03d}{suffix}" for name, suffix in suffixes.items()}


def save_patch(
    files: dict[str, Path], image: np.ndarray, inst_map: np.ndarray, class_map: np.ndarray | None = None
) -> None:
    """
    Write one patch: an RGB PNG, a grey PNG of 0 and 255, a 32-bit signed TIFF (which every torch can collate), and a
    grey PNG of classes where there are any.

    Each file is written aside and then renamed, so a file is either whole or absent.

    :param files: from `patch_files`; the folders exist.
    :param image: an [H x W x 3] uint8 array.
    :param inst_map: an [H x W] integer array, ids up to 2^31 - 1.
    :param class_map: an [H x W] uint8 array, for the file of class_masks.
    """
    binary = np.where(inst_map > 0, 255, 0).astype(np.uint8)
    save_picture(files["images"], image)
    save_picture(files["bin_masks"], binary)
    save_picture(files["inst_masks"], inst_map.astype(np.int32))
    if class_map is not None:
        save_picture(files[CLASS_FOLDER], class_map)


def save_picture(path: Path, pixels: np.ndarray) -> None:
    """Write an [H x W] or [H x W x 3] array as a .png, of uint8, or .tif, of int32 as well, whole or not at all."""
    options = {".png": {"format": "PNG", "compress_level": PNG_LEVEL}, ".tif": {"format": "TIFF"}}[path.suffix]
    with writing(path, durable=False) as file:
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, **options)


def _starts(length: int, window: int, step: int) -> tuple[list[int], list[int]]:
    """Regular window starts on one axis, and the flush one (as a list of none or one)."""
    end = length - window
    return list(range(0, end + 1, step)), [end] if end % step else []
