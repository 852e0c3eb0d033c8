"""Pictures as files: written whole, checked, and drawn side by side in a grid. Knows arrays, and nothing of what they
show."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import files

# In pixels: between panels, the least height of a panel, the largest height and width.
GAP, MIN_PANEL, MAX_PANEL = 6, 128, (512, 2048)
# Of text: a picture is shown about 70 times as wide as letters are high, so that a page's width leaves them readable.
LETTERS, SMALLEST, LARGEST = 70, 12, 24
BARS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # lengths of scale bars, in um


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


def draw_grid(
    rows: list[list[np.ndarray]], captions: Sequence[str], title: str, path: Path, note: str = "", mpp: float = 0.0
) -> Path:
    """
    Draw panels in rows and columns, small ones enlarged by a whole factor, large ones made smaller.

    :param rows: of [H x W x 3] uint8 panels, of any sizes.
    :param captions: one a column; a long one takes several lines.
    :param title: what stands above.
    :param path: where to write.
    :param note: what stands below, such as what colours mean.
    :param mpp: micrometres a pixel of the panels, for a scale bar below, where all are enlarged alike; 0: none.
    :return: the path.
    """
    scales = {_scale(panel) for row in rows for panel in row}
    rows = [[_fitted(panel) for panel in row] for row in rows]
    widths = [max(panel.shape[1] for panel in column) for column in zip(*rows)]
    heights = [max(panel.shape[0] for panel in row) for row in rows]
    lefts = np.cumsum([GAP, *(width + GAP for width in widths)])
    width = int(lefts[-1])
    font, line = text_of(width)
    texts = [wrapped(caption, column, font) for caption, column in zip(captions, widths)]
    title_lines = wrapped(title, width - 2 * GAP, font)
    bar = _bar(mpp / scales.pop(), min(widths)) if mpp and len(scales) == 1 else None
    note_lines = [*([f"{bar[0]} um"] if bar else []), *(wrapped(note, width - 2 * GAP, font) if note else [])]
    header = 4 + line * (len(title_lines) + max(map(len, texts)))
    tops = header + np.cumsum([0, *(height + GAP for height in heights)])
    bottom = int(tops[-1])
    grid = Image.new("RGB", (width, bottom + (line * len(note_lines) + GAP if note_lines else 0)), "white")
    draw = ImageDraw.Draw(grid)
    below_title = 2 + line * len(title_lines)
    places = [(GAP, 2, title_lines), *((left, below_title, lines) for left, lines in zip(lefts, texts))]
    for left, top, lines in [*places, (GAP, bottom, note_lines)]:
        for i, text in enumerate(lines):
            beside_bar = bar[1] + GAP if bar and lines is note_lines and i == 0 else 0
            draw.text((int(left) + beside_bar, top + line * i), text, fill="black", font=font)
    if bar:
        draw.rectangle((GAP, bottom + line // 2 - 2, GAP + bar[1] - 1, bottom + line // 2 + 1), fill="black")
    for top, row in zip(tops, rows):
        for left, panel in zip(lefts, row):
            grid.paste(Image.fromarray(panel), (int(left), int(top)))
    save_picture(grid, path)
    return path


def _scale(panel: np.ndarray) -> float:
    """How much larger a panel is drawn than it is."""
    height, width = panel.shape[:2]
    most = min(MAX_PANEL[0] / height, MAX_PANEL[1] / width)
    return most if most < 1 else min(-(-MIN_PANEL // height), int(most))


def _fitted(panel: np.ndarray) -> np.ndarray:
    height, width = panel.shape[:2]
    scale = _scale(panel)
    if scale < 1:
        smaller = max(1, round(width * scale)), max(1, round(height * scale))
        return np.asarray(Image.fromarray(panel).resize(smaller, Image.Resampling.BOX))
    return panel.repeat(scale, axis=0).repeat(scale, axis=1)


def _bar(um: float, width: int) -> tuple[int, int]:
    """:return: a scale bar's length in um and in pixels of that many um: the longest below half of a panel's width."""
    length = max((length for length in BARS if length <= width * um / 2), default=BARS[0])
    return length, round(length / um)


def text_of(width: int) -> tuple[ImageFont.FreeTypeFont, int]:
    """:return: the font for a picture of a width, and how far its lines are apart; both in pixels."""
    size = min(max(SMALLEST, round(width / LETTERS)), LARGEST)
    return ImageFont.load_default(size), round(1.4 * size)


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """:return: a text in lines of at most that many pixels, cut at spaces, _ and - where it can be; all of it."""
    lines = [""]
    for piece in re.split(r"(?<=[\s_-])", text):
        if lines[-1] and font.getlength(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        for letter in piece:
            if lines[-1] and letter != " " and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line.strip() for line in lines]
