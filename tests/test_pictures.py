"""Pictures: whole or not, and grids whose captions can be read."""

import errno

import numpy as np
import pytest
from PIL import Image

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
    name = "ema_0.9999_001500_of_a_run_with_a_long_name s=1.5"
    for width in (60, 128, 1000):
        for font in (pictures.text_of(500)[0], pictures.text_of(1500)[0]):
            lines = pictures.wrapped(name, width, font)
            assert all(font.getlength(line) <= width for line in lines)
            assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    font = pictures.text_of(500)[0]
    assert pictures.wrapped("", 128, font) == [""] and pictures.wrapped("short", 128, font) == ["short"]
    assert pictures.wrapped("ema_0.99_001500 s=1", 100, font) == ["ema_0.99_", "001500 s=1"]


def test_letters_are_readable_at_a_page_s_width():
    """A page of 840 px shows a picture smaller; its letters are then 9 px high or more, up to 24 columns of panels."""
    for width in (140, 840, 1196, 2000):
        font, line = pictures.text_of(width)
        assert font.size * min(1, 840 / width) >= 9 and line >= sum(font.getmetrics())


def test_captions_stay_over_their_columns(tmp_path):
    """White between columns, however long a caption is, and panels below all of its lines; what stands below, below."""
    panels = [np.full((16, 16, 3), 100, np.uint8)] * 2
    captions, title, note = ["W" * 60, "second"], "title " * 40, "note " * 40
    grid = np.asarray(Image.open(pictures.draw_grid([panels], captions, title, tmp_path / "g.png")))
    top = len(grid) - 128 - pictures.GAP
    header = grid[:top]
    assert (grid[top : top + 128, 6:134] == 100).all() and (grid[top - 1] == 255).all()
    font, line = pictures.text_of(grid.shape[1])
    under_title = 2 + line * len(pictures.wrapped(title, grid.shape[1] - 12, font))
    assert (header[under_title:, 134:138] == 255).all()
    assert (header[under_title:, 6:134] < 255).any(axis=(1, 2)).sum() >= 5 * 6
    assert (header[:, -6:] == 255).all()
    noted = np.asarray(Image.open(pictures.draw_grid([panels], captions, title, tmp_path / "n.png", note)))
    assert (noted[: len(grid)] == grid).all() and (noted[len(grid) :] < 255).any() and (noted[-3:] == 255).all()


def test_a_scale_bar_is_as_long_as_it_says(tmp_path):
    """16 px of 0.5 um, drawn eight times as large: 2 um are 32 px, and 5 um more than half a panel."""
    panels = [np.full((16, 16, 3), 100, np.uint8)] * 2
    plain = np.asarray(Image.open(pictures.draw_grid([panels], ["a", "b"], "t", tmp_path / "a.png")))
    barred = np.asarray(Image.open(pictures.draw_grid([panels], ["a", "b"], "t", tmp_path / "b.png", mpp=0.5)))
    added = barred[len(plain) :, :, 0]
    (rows,) = np.nonzero((added[:, 6:38] == 0).all(axis=1))
    assert len(rows) == 4 and (added[rows, 38:42] == 255).all() and (added[:, 42:] < 255).any()
    unlike = [[panels[0], np.full((64, 64, 3), 100, np.uint8)]]
    drawn = [pictures.draw_grid(unlike, ["a", "b"], "t", tmp_path / f"{mpp}.png", mpp=mpp) for mpp in (0.0, 0.5)]
    assert len({Image.open(path).height for path in drawn}) == 1  # no bar is true of all panels


def test_no_panel_is_enlarged_beyond_the_largest(tmp_path):
    low = np.zeros((60, 2000, 3), np.uint8)
    assert pictures._fitted(low).shape == (60, 2000, 3) and pictures._fitted(low[:, :300]).shape == (180, 900, 3)


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
