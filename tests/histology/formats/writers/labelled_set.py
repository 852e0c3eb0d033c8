"""A small labelled set with all that makes layouts err, and its writing without the program: for several tests."""

from pathlib import Path

import numpy as np
import pytest

from guided_diffusion.cell_classes import CellClass
from guided_diffusion.histology.formats.writers.labelled import Entry, Example
from guided_diffusion.histology.formats.writers.writer import Record, Writer

BOTH = pytest.mark.parametrize("told", [True, False], ids=["classes", "no classes"])
CLASSES = [
    CellClass(1, "epithelial", (213, 94, 0)),
    CellClass(2, 'odd: "é"', (0, 9, 8)),
    CellClass(5, "dead", (1, 2, 3)),
]


def draw_nuclei(seed: int, height: int, width: int) -> np.ndarray:
    """
    Discs that touch and overlap the border, and, where there is room: one with a hole and a nucleus in it, one in two
    parts that meet in a corner, one of a single pixel, and an id of more than 16 bits.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    inst = np.zeros((height, width), np.int32)
    for number in range(3, 60, 4):
        row, column = rng.integers(0, height), rng.integers(0, width)
        inst[(rows - row) ** 2 + (columns - column) ** 2 <= rng.integers(4, 30)] = number
    inst[:13, :13] = 0
    inst[1:8, 1:8] = 200
    inst[3:6, 3:6] = 0
    inst[4, 4] = 201
    inst[8:10, 8:10] = 200
    inst[11, 2:11] = 70_000
    return inst


def example(name: str, split: str, inst_map: np.ndarray, classes: bool) -> Example:
    rng = np.random.default_rng(len(name))
    image = rng.integers(0, 256, (*inst_map.shape, 3), np.uint8)
    ids = np.unique(inst_map[inst_map > 0]).tolist()
    of_nucleus = {nucleus: CLASSES[nucleus % 3].id if classes else 1 for nucleus in ids}
    row = {"source": "real" if split == "test" else "synthetic", "slide": "007", "s": "" if split == "test" else "1.5"}
    return Example(Entry(name, split, Path(f"{name}.png"), Path(f"{name}.tif"), row=row), image, inst_map, of_nucleus)


def labelled_set(told: bool) -> tuple[list[CellClass], list[Example]]:
    """
    :return: the classes, if they are to be told apart, and three pictures of the training split, one of the test split,
        of several sizes; one has no nucleus.
    """
    return CLASSES if told else [], [
        example("a b_000", "train", draw_nuclei(0, 40, 48), told),
        example("a b_001", "train", np.zeros((32, 24), np.int32), told),
        example("é_000", "train", draw_nuclei(1, 32, 32), told),
        example("z_0", "test", draw_nuclei(2, 24, 40), told),
    ]


def write(writer: Writer, examples: list[Example], folder: Path) -> list[Record]:
    """Write a set as the program does."""
    writer.check([one.entry for one in examples])
    records = []
    for one in examples:
        files = dict(writer.files(one))
        records.append(writer.record(one, next(iter(files))))
        put(folder, files)
    put(folder, dict(writer.tables(records)))
    return records


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        assert not (folder / name).exists()
        (folder / name).write_bytes(content)
