"""New layouts: no overlap, no fragment, none that is real; and what the bank and the figures say of drawn ones."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import regionprops

from guided_diffusion.histology.slides import toy
from guided_diffusion.histology.structures import bank as banks
from guided_diffusion.histology.structures import layouts, statistics
from guided_diffusion.structures import fragments, oddities


@pytest.fixture(scope="module")
def masks():
    return [toy.draw_slide(seed, 128).inst_map for seed in range(6)]


def layouts_of(inst_maps, classes=lambda ids: {}):
    return [banks.Layout(inst_map, classes(np.unique(inst_map)[1:].tolist())) for inst_map in inst_maps]


@pytest.fixture(scope="module")
def bank(masks):
    return banks.Bank.of(layouts_of(masks))


def nuclei_of(inst_map):
    """The nuclei of a layout, by what lies where."""
    return {(inst_map == own).tobytes() for own in np.unique(inst_map[inst_map != 0])}


def ellipse(side, half, angle=0.0):
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return (along / half[0]) ** 2 + (across / half[1]) ** 2 <= 1


def check(inst_map, size):
    assert inst_map.shape == (size, size) and inst_map.dtype == np.int32
    assert np.array_equal(np.unique(inst_map), np.arange(inst_map.max() + 1))
    assert not fragments(inst_map, 10) and oddities(inst_map) == ""


@pytest.mark.parametrize("size", [64, 128, 300])
def test_recombined_layouts_are_new_and_whole(bank, masks, size):
    made = [layouts.recombine(bank, size, np.random.default_rng(k)).inst_map for k in range(4)]
    for inst_map in made:
        check(inst_map, size)
    assert np.array_equal(made[0], layouts.recombine(bank, size, np.random.default_rng(0)).inst_map)
    real = set.union(*map(nuclei_of, masks))
    assert all(not nuclei_of(inst_map) & real for inst_map in made) and not np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], layouts.recombine(bank, size, np.random.default_rng(9)).inst_map)
    # As dense as real ones: the toy slides are alike.
    shares = [(inst_map != 0).mean() for inst_map in (*masks, *made)]
    assert np.mean(shares[6:]) == pytest.approx(np.mean(shares[:6]), rel=0.25)


@pytest.mark.slow
def test_a_layout_of_a_whole_slide(bank):
    check(layouts.recombine(bank, 1000, np.random.default_rng(0)).inst_map, 1000)


def test_a_perturbed_layout_has_the_same_nuclei_elsewhere(masks):
    known = set.union(*map(nuclei_of, masks))
    for number, real in enumerate(masks):
        made = layouts.perturb(banks.Layout(real), np.random.default_rng(number)).inst_map
        check(made, 128)
        assert len(nuclei_of(made) - known) >= 0.9 * len(nuclei_of(made))
        whole = [region for region in regionprops(real) if not any(layouts._sides(region.bbox, 128))]
        assert len(np.unique(made)) >= 0.9 * len(np.unique(real))
        # Each is where it was, but for a part of its radius: most of a nucleus's pixels are still of one.
        assert np.mean([(made[real == region.label] != 0).mean() for region in whole]) > 0.75


def test_a_perturbed_layout_is_another_one_however_small(masks):
    windows = [mask[y : y + 32, x : x + 32] for mask in masks for y in range(0, 128, 32) for x in range(0, 128, 32)]
    windows = [window for window in windows if window.any()]
    for seed, real in enumerate(windows):
        made = layouts.perturb(banks.Layout(real), np.random.default_rng(seed)).inst_map
        assert nuclei_of(made) != nuclei_of(real)
    assert len(windows) > 50
    full = np.ones((16, 16), int)
    assert np.array_equal(layouts.perturb(banks.Layout(full), np.random.default_rng(0)).inst_map, full)


def test_ids_do_not_tell_layouts_apart():
    real = np.array([[0, 7, 7], [3, 3, 0]])
    assert layouts._alike(real, np.array([[0, 1, 1], [2, 2, 0]]))
    assert not layouts._alike(real, np.array([[0, 1, 1], [1, 1, 0]]))
    assert not layouts._alike(real, np.array([[0, 1, 2], [3, 3, 0]]))
    assert not layouts._alike(real, np.array([[1, 7, 7], [3, 3, 0]]))
    sparse = banks.Layout(np.array([[0, 2**31 - 1, 2**31 - 1], [3, 3, 0]], np.int32), {2**31 - 1: 4, 3: 5}).numbered()
    assert sparse.inst_map.tolist() == [[0, 2, 2], [1, 1, 0]] and sparse.classes == {1: 5, 2: 4}
    assert banks.Layout(np.full((1, 2), 9)).numbered().inst_map.tolist() == [[1, 1]]


def test_gaps_and_sizes_go_together_as_in_a_mask():
    """One mask of small nuclei that touch, one of large ones far apart."""
    small, large = np.zeros((2, 96, 96), int)
    for number, (row, column) in enumerate((row, column) for row in range(4, 88, 18) for column in range(4, 88, 12)):
        small[row : row + 6, column : column + 6] = 2 * number + 1
        small[row : row + 6, column + 6 : column + 11] = 2 * number + 2
    for number, (row, column) in enumerate((row, column) for row in range(8, 80, 36) for column in range(8, 80, 36)):
        large[row : row + 14, column : column + 14] = number + 1
    bank = banks.Bank.of(layouts_of([small] * 6 + [large] * 6))  # of which sizes are drawn among 20 nuclei
    found = []
    for seed in range(8):
        made = layouts.recombine(bank, 192, np.random.default_rng(seed)).inst_map
        found.append((np.median(statistics.measure(made)["area"]), np.median(banks.gaps(made))))
    dense, loose = ([row for row in found if (row[0] < 80) == side] for side in (True, False))
    assert dense and loose
    assert max(gap for _, gap in dense) < 7 < 12 < min(gap for _, gap in loose)


def test_no_cut_edge_comes_into_sight():
    real = np.zeros((40, 40), int)
    real[10:20, :6], real[:5, 20:30], real[35:, 35:] = 1, 2, 3
    for seed in range(20):
        made = layouts.perturb(banks.Layout(real), np.random.default_rng(seed)).inst_map
        assert len(np.unique(made)) >= 3
        for region in regionprops(made):
            assert any(layouts._sides(region.bbox, 40))


@pytest.mark.parametrize("angle", [0.0, 0.7, np.pi / 2, 2.5])
def test_a_nucleus_is_turned_and_scaled(angle):
    nucleus = banks.Nucleus(ellipse(61, (24, 12)), 0.0, 1.0)
    made = layouts.changed(nucleus, angle, 0.8)
    (region,) = regionprops(np.pad(made, 1).astype(int))
    assert region.area == pytest.approx(np.pi * 24 * 12 * 0.64, rel=0.04)
    assert abs(np.sin(banks.angle_of(region.orientation) - angle)) < 0.03
    assert region.axis_major_length / region.axis_minor_length == pytest.approx(2, rel=0.04)
    bent = layouts.changed(nucleus, angle, 0.8, bend=2)
    assert regionprops(bent.astype(int))[0].solidity < region.solidity - 0.05


def test_a_nucleus_is_mirrored():
    half = ellipse(61, (24, 12))
    half[:30, 30:] = False  # a quarter of it is missing
    nucleus = banks.Nucleus(half, 0.0, 1.0)
    same, other = (layouts.changed(nucleus, 0.0, 1.0, mirrored=mirrored) for mirrored in (False, True))
    assert same.shape == other.shape and (same == other[::-1]).mean() > 0.97 and (same == other).mean() < 0.85


def test_neighbours_turn_as_in_the_pattern():
    """Two rods, one across the other, in much room."""
    inst_map = np.zeros((64, 64), int)
    inst_map[30:34, 20:32], inst_map[26:38, 36:40] = 1, 2
    bank = banks.Bank.of([banks.Layout(inst_map)])
    assert bank.patterns[0].turns == pytest.approx([np.pi / 2] * 2)
    made = [layouts.recombine(bank, 128, np.random.default_rng(seed)).inst_map for seed in range(20)]
    # Of any directions it would be pi / 4. Some have come to lie next to another one than they were put beside.
    assert np.mean(statistics.pooled(list(map(statistics.measure, made)))["turn"]) > 1.1


def test_nuclei_lie_along_each_other_far_and_wide():
    """Not only next to each other: with a turn at each, directions would be lost after a few."""
    rng = np.random.default_rng(0)
    inst_map, angles = np.zeros((160, 160), int), rng.normal(0, 0.3, 25)
    for own, angle in enumerate(angles):
        row, column = divmod(own, 5)
        inst_map[row * 32 : row * 32 + 25, column * 32 : column * 32 + 25][ellipse(25, (11, 4), angle)] = own + 1
    bank = banks.Bank.of([banks.Layout(inst_map)])
    made = [layouts.recombine(bank, 320, np.random.default_rng(seed)).inst_map for seed in range(3)]
    found = [region.orientation for own in made for region in regionprops(own) if region.eccentricity > 0.6]
    away = banks.between(np.array(found), np.pi / 2)
    assert len(found) > 200 and np.sqrt(np.mean(away**2)) < 0.5  # of any directions it would be pi / 12**0.5 = 0.91


def test_layouts_side_by_side_have_whole_nuclei_where_they_meet():
    """Each mask has a disc in the middle and one cut in half at each side; there are as many afterwards."""
    inst_map = np.zeros((60, 60), int)
    for own, (row, column) in enumerate([(30, 30), (0, 15), (59, 45), (15, 59), (45, 0)], start=1):
        y, x = np.mgrid[:60, :60]
        inst_map[(y - row) ** 2 + (x - column) ** 2 <= 49] = own
    layout = banks.Layout(inst_map)
    bank = banks.Bank.of([layout])
    counts = []
    for seed in range(8):
        made = layouts.joined([layout], bank.stocks, 240, np.random.default_rng(seed)).inst_map
        check(made, 240)
        inner = [region for region in regionprops(made) if not any(layouts._sides(region.bbox, 240))]
        assert all(region.area == pytest.approx(149, abs=12) for region in inner)  # whole ones alone
        counts.append(len(inner) - 16)
    assert np.mean(counts) == pytest.approx(24, abs=6)  # half of 48 halves


def test_what_a_mask_says():
    inst_map = np.zeros((20, 30), int)
    inst_map[5:8, 5:10], inst_map[5:8, 10:12], inst_map[15:20, 20:25], inst_map[0:2, 28:30] = 7, 3, 9, 4
    nuclei, seen, gaps, turns = banks.look(banks.Layout(inst_map, {3: 2, 4: 2, 7: 1, 9: 1}))
    assert [(nucleus.area, nucleus.number) for nucleus in nuclei] == [(6, 2), (15, 1)]
    assert nuclei[1].mask.shape == (3, 5) and nuclei[1].weight == pytest.approx(600 / ((20 - 3) * (30 - 5)))
    # The largest part is that of 9, at the border.
    assert seen == {1: (pytest.approx(1.5 / 600), 25), 2: (pytest.approx(1.25 / 600), 6)}
    assert banks.look(banks.Layout(inst_map))[1] == {banks.UNKNOWN: (pytest.approx(2.75 / 600), 25)}
    # Those of 7 and 3 touch; 9 lies nearest to 3's corner, and 4 to 9's.
    assert gaps == pytest.approx([1, np.hypot(14, 4), 1, np.hypot(8, 9)])
    assert turns == pytest.approx([np.pi / 2] * 2)  # 7 lies along x, 3 along y; 9 is round and cut, as is 4
    with pytest.raises(ValueError, match="no mask has a nucleus"):
        banks.Bank.of([banks.Layout(inst_map[:, 24:])])


def test_distances_are_exact_to_the_last_bit():
    """Else what layouts are made depends on where in memory a mask lies."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        mask = (rng.random(rng.integers(9, 140, 2)) > 0.1).astype(np.uint8)
        expected = ndimage.distance_transform_edt(mask).astype(np.float32)
        np.testing.assert_array_equal(banks.distances(mask), expected)


def test_masks_without_a_whole_nucleus_count():
    """What is cut is no smaller than what shows of it; a mask without nuclei is part of the tissue, too."""
    whole, cut = np.zeros((20, 20), int), np.zeros((20, 20), int)
    whole[2:4, 2:4], whole[8:12, 8:12], whole[14:19, 4:9] = 1, 2, 3
    cut[:3, 5:10] = 1
    bank = banks.Bank.of(layouts_of([whole, cut, np.zeros((20, 20), int)]))
    assert bank.stocks[banks.UNKNOWN].areas.tolist() == [4, 16, 25] and len(bank.patterns) == 3
    share = bank.patterns[1].shares[banks.UNKNOWN]
    assert share.areas.tolist() == [16, 25] and share.density == 0.5 / 400 and not bank.patterns[2].shares
    made = [layouts.recombine(bank, 40, np.random.default_rng(seed)).inst_map for seed in range(30)]
    assert 5 <= sum(not layout.any() for layout in made) <= 20


def test_one_class_changes_nothing(bank, masks):
    known = layouts_of(masks, lambda ids: dict.fromkeys(ids, 5))
    for seed in range(3):
        made = [layouts.recombine(own, 96, np.random.default_rng(seed)) for own in (bank, banks.Bank.of(known))]
        made += [layouts.perturb(layout, np.random.default_rng(seed)) for layout in (banks.Layout(masks[0]), known[0])]
        for one, other in (made[:2], made[2:]):
            assert np.array_equal(one.inst_map, other.inst_map)
            assert set(one.classes.values()) == {banks.UNKNOWN} and set(other.classes.values()) == {5}


def test_nuclei_keep_their_classes_and_these_their_shares():
    """Discs of 3 sizes, each a class, in masks of class 1 with 2 or of class 1 with 3, which the border cuts alone."""
    inst_maps, radii = np.zeros((2, 60, 60), int), {1: 4, 2: 6, 3: 8}
    y, x = np.mgrid[:60, :60]
    places = [(12, 12, 1), (12, 30, 1), (12, 48, 1), (40, 12, 2)], [(12, 12, 1), (30, 60, 3), (12, 48, 1)]
    for inst_map, discs in zip(inst_maps, places):
        for own, (row, column, number) in enumerate(discs, 1):
            inst_map[(y - row) ** 2 + (x - column) ** 2 <= radii[number] ** 2] = own
    real = [
        banks.Layout(inst_map, {k: disc[2] for k, disc in enumerate(discs, 1)})
        for inst_map, discs in zip(inst_maps, places)
    ]
    bank = banks.Bank.of(real)
    assert (
        list(bank.stocks) == [1, 2] and list(bank.patterns[0].shares) == [1, 2] and list(bank.patterns[1].shares) == [1]
    )
    made = [layouts.recombine(bank, 200, np.random.default_rng(seed)) for seed in range(8)]
    for layout in made:
        check(layout.inst_map, 200)
        assert sorted(layout.classes) == list(range(1, layout.inst_map.max() + 1))
        for region in regionprops(layout.inst_map):
            if not any(layouts._sides(region.bbox, 200)):
                assert abs(np.sqrt(region.area / np.pi) - radii[layout.classes[region.label]]) < 1
    mixed = [list(layout.classes.values()) for layout in made if 2 in layout.classes.values()]
    assert 0 < len(mixed) < len(made)
    shares = [statistics.class_shares(layout, (1, 2))["class 2"][0] for layout in made]
    assert np.mean([share for share in shares if share]) == pytest.approx(0.25, abs=0.06)
    for seed in range(5):
        moved = layouts.perturb(real[0], np.random.default_rng(seed))
        for region in regionprops(moved.inst_map):
            under = real[0].inst_map[moved.inst_map == region.label]
            assert moved.classes[region.label] == real[0].classes[np.bincount(under[under > 0]).argmax()]


def test_figures_by_hand():
    inst_map = np.zeros((20, 30), int)
    inst_map[5:8, 5:10], inst_map[5:8, 10:12], inst_map[15:20, 20:25] = 7, 3, 9
    found = statistics.measure(inst_map)
    assert (
        sorted(found["area"]) == [6, 15]
        and found["count"] == pytest.approx([3 * 1e4 / 600])
        and found["share"] == pytest.approx([46 / 600])
    )
    assert found["touching"] == pytest.approx([2 / 3]) and statistics.touching(inst_map) == {3, 7}
    assert found["neighbour"][:2] == pytest.approx([3.5, 3.5])
    empty = statistics.measure(np.zeros((9, 9), int))
    assert empty["count"] == [0] and not len(empty["neighbour"]) and not len(empty["touching"])
    moved = {name: values + 2 * values.std() for name, values in found.items()}
    away = statistics.distances(found, moved)
    assert away["area"] == pytest.approx(2) and away["eccentricity"] == pytest.approx(2)
    assert np.isnan(statistics.distances(found, empty)["area"])
    shares = statistics.class_shares(banks.Layout(inst_map, {3: 1, 7: 4, 9: 1}), (1, 2, 4))
    assert shares == {"class 1": [pytest.approx(2 / 3)], "class 2": [0], "class 4": [pytest.approx(1 / 3)]}
    assert not len(statistics.class_shares(banks.Layout(0 * inst_map), (1,))["class 1"])


def test_halves_are_of_slides(masks):
    measured = [statistics.measure(mask) for mask in masks]
    same = statistics.between_halves(measured[:1] * 6, list("aabbcc"), np.random.default_rng(0))
    other = statistics.between_halves(measured, list("aabbcc"), np.random.default_rng(0))
    alone = statistics.between_halves(measured, list("aaaaaa"), np.random.default_rng(0))
    assert all(np.isnan(value) for value in alone.values())
    assert same == pytest.approx(dict.fromkeys(statistics.FIGURES, 0)) and all(value > 0 for value in other.values())
