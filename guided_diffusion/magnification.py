"""
Micrometres a pixel (mpp), and what lengths and areas are in the pixels of data of any magnification.

All constants in pixels, the reference's among them, are meant for 40x, 0.25 um a pixel: whoever has one asks here what
it is in the data at hand. A data folder says its mpp in the prepare.json that scripts/prepare_monuseg.py leaves; what
does not say it is taken for 40x. Knows nothing of images or models.
"""

import math
from pathlib import Path

from .files import write_json
from .slides import MANIFEST, owners, read_manifest

REFERENCE_MPP = 0.25  # um a pixel, of 40x
_ALIKE = 1.1  # ratio up to which two scales count as one: scanners' 40x is 0.23 to 0.27 um a pixel


def length(pixels: float, mpp: float) -> float:
    """:return: a length in pixels of 40x in pixels of `mpp` um."""
    return pixels * (REFERENCE_MPP / mpp)


def area(pixels: float, mpp: float) -> float:
    """:return: an area in pixels of 40x in pixels of `mpp` um."""
    return pixels * (REFERENCE_MPP / mpp) ** 2


def odd_length(pixels: int, mpp: float) -> int:
    """:return: the side of a kernel, odd in pixels of 40x, in pixels of `mpp` um: the nearest odd one, at least 3."""
    return max(3, 2 * math.floor(length(pixels, mpp) / 2) + 1)


def alike(one: float, other: float) -> bool:
    """:return: whether two mpp differ by no more than scanners of one magnification do."""
    return max(one, other) <= _ALIKE * min(one, other)


def nominal(mpp: float) -> float:
    """:return: 0.25 of 0.2456 or 0.2527, which both are 40x; 0.5 of 20x, and so on; what lies between, as it is."""
    nearest = REFERENCE_MPP * 2.0 ** round(math.log2(mpp / REFERENCE_MPP))
    return nearest if alike(mpp, nearest) else mpp


# ---- of data folders ----


def check(mpp: float, where: str) -> float:
    """:return: the mpp. :raises ValueError: where it is none."""
    if not (isinstance(mpp, (int, float)) and 0.001 <= mpp <= 100):
        raise ValueError(f"{where} {mpp}: give micrometres a pixel, such as 0.25 (40x) or 0.5 (20x)")
    return float(mpp)


def of_data(folder: str | Path) -> float | None:
    """
    :param folder: a data folder, or any folder in it, local or a blobfile URL.
    :return: the mpp of its patches, by the nearest prepare.json; None where that does not say it.
    :raises ValueError: where it cannot be read.
    """
    for place in owners(folder) if folder else ():
        manifest = read_manifest(place)
        if manifest is not None:
            mpp = manifest.get("mpp")
            return None if mpp is None else check(mpp, f"{place}/{MANIFEST}: mpp")
    return None


def pass_on(data: Path, folder: Path) -> None:
    """Have a folder that is made of a data folder's patches say the same mpp."""
    mpp = of_data(data)
    if mpp is not None:
        write_json(folder / MANIFEST, {"mpp": mpp})


def assumption(folder: str | Path) -> str:
    """:return: what to say where nothing says a data folder's mpp."""
    return f"{folder} does not say its micrometres a pixel: {REFERENCE_MPP} (40x) is assumed; --mpp says otherwise"


def mismatch(model: str | Path, mpp: float, folder: str | Path) -> str:
    """:return: what to say where a model was trained at another mpp than a data folder's; "" where it was not."""
    found = of_data(folder)
    if found is None or alike(mpp, found):
        return ""
    return (
        f"{model} was trained at {mpp:g} um a pixel, {folder} has {found:g}: its nuclei are {mpp / found:.2g} times as "
        "large as those that the model knows"
    )
