"""What is wrong with the nuclei of a mask."""

import numpy as np

from guided_diffusion.structures import fragments, oddities, without_fragments


def drawn(rows):
    return np.array([[int(sign) for sign in row.replace(".", "0")] for row in rows])


def test_fragments_are_parts_and_not_cut_by_the_border():
    inst_map = drawn(["1......22", "...11..22", "..1......", ".....2...", "33......."])
    assert fragments(inst_map, 4) == [(1, 3), (2, 1)]  # 1's pixels touch at a corner
    assert fragments(inst_map, 3) == [(2, 1)] and not fragments(inst_map, 0)
    assert not fragments(np.zeros((3, 3), int), 10)


def test_a_nucleus_keeps_what_is_no_fragment():
    inst_map = drawn([".......", ".11..3.", ".11.1..", ".....2.", "......."])
    assert np.array_equal(
        without_fragments(inst_map, 2), drawn([".......", ".11....", ".11....", ".......", "......."])
    )
    assert np.array_equal(without_fragments(inst_map, 1), inst_map)


def test_what_is_odd_is_named():
    assert oddities(drawn(["11.22", "11.22"])) == ""
    assert oddities(drawn(["11.22", "...22", "11..."])) == "nucleus 1 has several parts"
    ring = drawn([".......", ".4445..", ".4.45..", ".4445..", "......."])
    assert oddities(ring) == "nucleus 4 has a hole"
    # A gap between two nuclei is none, nor one that the border closes.
    assert oddities(drawn([".......", ".4455..", ".4..5..", ".4455..", "......."])) == ""
    assert oddities(drawn(["44.", "4.4", "444"])[:, :2]) == ""
    assert oddities(drawn(["1.1", "2.2", "...", "3.3"])) == "nucleus 1 and 2 more have several parts"
