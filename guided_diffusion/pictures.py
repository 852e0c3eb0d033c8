"""Pictures as files: written whole, checked, and drawn side by side in a grid. Knows arrays, and nothing of what they
show."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from . import files

# In pixels: between panels, the least height of a panel, and a line of text.
GAP, MIN_PANEL, LINE = 6, 128, 15


def save_picture(image: Image.Image, path: Path) -> None:
    """
    Write a picture whole or not at all; the format follows the path's suffix, .tif or .png.

    :raises OSError: naming the path, where it cannot be written.
    """
    with files.writing(path, durable=False) as file:  # is_whole sees what a power cut has left
        image.save(file, format="TIFF" if path.suffix == ".tif" else "PNG")


def is_whole(path: Path) -> bool:
    """
    :return: whether a picture is there and not cut off; a PNG's checksums are read, not its pixels.
    :raises OSError: where it cannot be read, which says nothing of the picture.
    """
    try:
        data = io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        return False
    try:
        with Image.open(data) as image:
            image.verify() if path.suffix == ".png" else image.load()
    except Exception:  # Pillow raises half a dozen types for a corrupt file
        return False
    return True


def draw_grid(rows: list[list[np.ndarray]], captions: Sequence[str], title: str, path: Path) -> Path:
    """
    Draw panels in rows and columns, small ones enlarged by a whole factor.

    :param rows: of [H x W x 3] uint8 panels; all of a column are of one size, all of one height.
    :param captions: one a column; a long one takes several lines.
    :param title: what stands above.
    :param path: where to write.
    :return: the path.
    """
    scale = -(-MIN_PANEL // rows[0][0].shape[0])
    rows = [[panel.repeat(scale, axis=0).repeat(scale, axis=1) for panel in row] for row in rows]
    lefts = np.cumsum([GAP, *(panel.shape[1] + GAP for panel in rows[0])])
    head = wrapped(title, int(lefts[-1]) - 2 * GAP)
    texts = [wrapped(caption, panel.shape[1]) for caption, panel in zip(captions, rows[0])]
    header = 4 + LINE * (len(head) + max(map(len, texts)))
    tops = header + np.arange(len(rows) + 1) * (rows[0][0].shape[0] + GAP)
    grid = Image.new("RGB", (int(lefts[-1]), int(tops[-1])), "white")
    draw = ImageDraw.Draw(grid)
    for place, lines in zip([GAP, *lefts], [head, *texts]):
        first = 2 if lines is head else 2 + LINE * len(head)
        for i, line in enumerate(lines):
            draw.text((int(place), first + LINE * i), line, fill="black")
    for top, row in zip(tops, rows):
        for left, panel in zip(lefts, row):
            grid.paste(Image.fromarray(panel), (int(left), int(top)))
    save_picture(grid, path)
    return path


def wrapped(text: str, width: int) -> list[str]:
    """:return: a text in lines of at most that many pixels in draw_grid's font; all of it, and one line at least."""
    length = ImageDraw.Draw(Image.new("L", (1, 1))).textlength
    for characters in range(len(text), 0, -1):
        lines = textwrap.wrap(text, characters)
        if all(length(line) <= width for line in lines):
            return lines
    return [text]
