"""
HoVer-Net's training arrays: train/540x540_164x164/NAME_000.npy, [H x W x 4] int32 of red, green, blue and instance id,
and a fifth channel of classes where there are; the folder says size and step, and is named in its config.py.

A picture of up to the window's size becomes one array. A larger one is cut as HoVer-Net's extract_patches.py does it:
windows of 540 px, every 164, which is what it learns from of each in fast mode, the borders mirrored.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from ....cell_classes import CellClass, painted
from ...slides.patches import extract_patches
from .labelled import Example
from .writer import Record, Writer, npy

WINDOW, STEP = 540, 164
LEAST = 256  # px that the network sees in fast mode; 270 in original mode
_SEEN = 2 * STEP  # a side up to which at least a quarter of a picture is learnt from


class HoVerNet(Writer):
    """
    See the module.

    :param window: side in px of the windows that larger pictures are cut into.
    :raises ValueError: where HoVer-Net could not read them.
    """

    def __init__(self, classes: Sequence[CellClass] = (), window: int = WINDOW) -> None:
        super().__init__(classes)
        if window < LEAST:
            raise ValueError(f"--window {window}: HoVer-Net reads 256 px in fast mode, 270 in original: give more")
        self.window = window

    def files(self, example: Example) -> Iterator[tuple[str, bytes]]:
        entry, (height, width) = example.entry, example.inst_map.shape
        if min(height, width) < LEAST:
            raise ValueError(
                f"{entry.image} is {width} x {height} px: HoVer-Net reads 256 px in fast mode, 270 in original; "
                "sample larger fields, or cut larger patches"
            )
        pieces = [(example.image, example.inst_map)]
        if max(height, width) > self.window:
            pieces = extract_patches(example.image, example.inst_map, self.window, STEP, "mirror")
        for number, (image, inst_map) in enumerate(pieces):
            channels = [image, inst_map[..., None]]
            if self.told:
                channels.append(painted(inst_map, example.of_nucleus)[..., None])
            array = np.concatenate(channels, axis=2, dtype=np.int32)
            folder = f"{array.shape[0]}x{array.shape[1]}_{STEP}x{STEP}"
            yield f"{entry.split}/{folder}/{entry.name}_{number:03d}.npy", npy(array)

    def remarks(self, records: Sequence[Record]) -> Iterator[str]:
        whole = [record for record in records if _SEEN < max(record.size) <= self.window]
        if whole:
            yield (
                f"{len(whole)} images of up to {self.window} px are one array each, of which HoVer-Net learns from "
                f"the central {STEP} px (fast mode) or 80 px: --window 270 cuts them"
            )
        if self.told:
            yield f"nr_type = {max(one.id for one in self.classes) + 1} in HoVer-Net's config.py"
