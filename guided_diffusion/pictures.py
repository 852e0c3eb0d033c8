"""Pictures as files: written whole, checked, and drawn side by side in a grid. Knows arrays, and nothing of what they
show."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from . import files

# In pixels: between panels, the least height of a panel, the largest height and width, and a line of text.
GAP, MIN_PANEL, MAX_PANEL, LINE = 6, 128, (512, 2048), 15


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
    Draw panels in rows and columns, small ones enlarged by a whole factor, large ones made smaller.

    :param rows: of [H x W x 3] uint8 panels, of any sizes.
    :param captions: one a column; a long one takes several lines.
    :param title: what stands above.
    :param path: where to write.
    :return: the path.
    """
    rows = [[_fitted(panel) for panel in row] for row in rows]
    widths = [max(panel.shape[1] for panel in column) for column in zip(*rows)]
    heights = [max(panel.shape[0] for panel in row) for row in rows]
    lefts = np.cumsum([GAP, *(width + GAP for width in widths)])
    head = wrapped(title, int(lefts[-1]) - 2 * GAP)
    texts = [wrapped(caption, width) for caption, width in zip(captions, widths)]
    header = 4 + LINE * (len(head) + max(map(len, texts)))
    tops = header + np.cumsum([0, *(height + GAP for height in heights)])
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


def _fitted(panel: np.ndarray) -> np.ndarray:
    height, width = panel.shape[:2]
    shrink = min(MAX_PANEL[0] / height, MAX_PANEL[1] / width)
    if shrink < 1:
        smaller = max(1, round(width * shrink)), max(1, round(height * shrink))
        return np.asarray(Image.fromarray(panel).resize(smaller, Image.Resampling.BOX))
    scale = -(-MIN_PANEL // height)
    return panel.repeat(scale, axis=0).repeat(scale, axis=1)


def wrapped(text: str, width: int) -> list[str]:
    """:return: a text in lines of at most that many pixels in draw_grid's font; all of it, and one line at least."""
    length = ImageDraw.Draw(Image.new("L", (1, 1))).textlength
    for characters in range(len(text), 0, -1):
        lines = textwrap.wrap(text, characters)
        if all(length(line) <= width for line in lines):
            return lines
    return [text]
