"""Pictures: whole or not, and grids whose captions can be read."""

import errno

import numpy as np
import pytest
from PIL import Image, ImageDraw

from guided_diffusion import pictures


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("suffix", "dtype"), [(".png", np.uint8), (".tif", np.uint16), (".tif", np.int32)])
def test_spoilt_pictures_are_told(tmp_path, suffix, dtype):
    """Cut anywhere they are not whole; with a wrong byte anywhere, they may be, and nothing is raised."""
    path = tmp_path / f"a{suffix}"
    pictures.save_picture(Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 6)).astype(dtype)), path)
    whole = path.read_bytes()
    assert pictures.is_whole(path) and not pictures.is_whole(tmp_path / "none.png")
    for length in range(len(whole) - 4):  # a PNG ends in a checksum of nothing
        path.write_bytes(whole[:length])
        assert not pictures.is_whole(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        pictures.is_whole(path)


def test_a_picture_that_cannot_be_read_is_not_spoilt(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError) as error:
        pictures.is_whole(tmp_path / "a.png")
    assert error.value.errno == errno.EISDIR


def test_lines_fit_and_say_everything():
    length = ImageDraw.Draw(Image.new("L", (1, 1))).textlength
    name = "ema_0.9999_001500_of_a_run_with_a_long_name s1.5"
    for width in (60, 128, 1000):
        lines = pictures.wrapped(name, width)
        assert all(length(line) <= width for line in lines)
        assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    assert pictures.wrapped("", 128) == [""] and pictures.wrapped("short", 128) == ["short"]


def test_captions_stay_over_their_columns(tmp_path):
    """White between columns, however long a caption is, and panels below all of its lines."""
    panels = [np.full((16, 16, 3), 100, np.uint8)] * 2
    path = pictures.draw_grid([panels], ["W" * 60, "second"], "title " * 40, tmp_path / "g.png")
    grid = np.asarray(Image.open(path))
    top = len(grid) - 128 - pictures.GAP
    header = grid[:top]
    assert (grid[top : top + 128, 6:134] == 100).all() and (grid[top - 1] == 255).all()
    title = 2 + pictures.LINE * len(pictures.wrapped("title " * 40, grid.shape[1] - 12))
    assert (header[title:, 134:138] == 255).all() and (header[title:, 6:134] < 255).any(axis=(1, 2)).sum() >= 5 * 6
    assert (header[:, -6:] == 255).all()


def test_panels_of_any_sizes(tmp_path):
    """Small ones enlarged, large ones made smaller; a column is as wide as its widest panel, a row as its highest."""
    sizes = [[(16, 16), (100, 30)], [(1024, 600), (300, 6000)]]
    rows = [[np.full((*size, 3), 50 * k, np.uint8) for k, size in enumerate(row)] for row in sizes]
    grid = np.asarray(Image.open(pictures.draw_grid(rows, ["a", "b"], "title", tmp_path / "g.png")))
    bottom = 512 + pictures.GAP
    assert grid.shape[1] == 300 + 2048 + 3 * pictures.GAP
    assert (grid[-bottom:-6, 6:306] == 0).all() and (grid[-bottom : -bottom + 102, 312:-6] == 50).all()
    above = grid[-bottom - 206 : -bottom - 6]
    assert (above[:128, 6:134] == 0).all() and (above[128:, 6:306] == 255).all() and (above[:, 312:372] == 50).all()
