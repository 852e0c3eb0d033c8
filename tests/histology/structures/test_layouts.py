"""New layouts: no overlap, no fragment, none that is real; and what the bank and the figures say of drawn ones."""

import numpy as np
import pytest
from skimage.measure import regionprops

from guided_diffusion.histology.slides import toy
from guided_diffusion.histology.structures import bank as banks
from guided_diffusion.histology.structures import layouts, statistics
from guided_diffusion.structures import fragments, oddities


@pytest.fixture(scope="module")
def masks():
    return [toy.draw_slide(seed, 128).inst_map for seed in range(6)]


@pytest.fixture(scope="module")
def bank(masks):
    return banks.Bank.of(masks)


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
    made = [layouts.recombine(bank, size, np.random.default_rng(k)) for k in range(4)]
    for inst_map in made:
        check(inst_map, size)
    assert np.array_equal(made[0], layouts.recombine(bank, size, np.random.default_rng(0)))
    real = set.union(*map(nuclei_of, masks))
    assert all(not nuclei_of(inst_map) & real for inst_map in made) and not np.array_equal(made[0], made[1])
    # As dense as real ones: the toy slides are alike.
    shares = [(inst_map != 0).mean() for inst_map in (*masks, *made)]
    assert np.mean(shares[6:]) == pytest.approx(np.mean(shares[:6]), rel=0.25)


def test_a_perturbed_layout_has_the_same_nuclei_elsewhere(masks):
    for number, real in enumerate(masks):
        made = layouts.perturb(real, np.random.default_rng(number))
        check(made, 128)
        assert not np.array_equal(made != 0, real != 0)
        whole = [region for region in regionprops(real) if not any(layouts._sides(region.bbox, 128))]
        assert len(np.unique(made)) >= 0.9 * len(np.unique(real))
        # Each is where it was, but for a part of its radius: most of a nucleus's pixels are still of one.
        assert np.mean([(made[real == region.label] != 0).mean() for region in whole]) > 0.75


def test_no_cut_edge_comes_into_sight():
    real = np.zeros((40, 40), int)
    real[10:20, :6], real[:5, 20:30], real[35:, 35:] = 1, 2, 3
    for seed in range(20):
        made = layouts.perturb(real, np.random.default_rng(seed))
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


def test_what_a_mask_says():
    inst_map = np.zeros((20, 30), int)
    inst_map[5:8, 5:10], inst_map[5:8, 10:12], inst_map[15:20, 20:25], inst_map[0:2, 28:30] = 7, 3, 9, 4
    nuclei, spread, part = banks.look(inst_map)
    assert part == 25  # of 9, at the border
    pattern = banks.Pattern(**spread, **banks.measures(nuclei))
    assert sorted(nucleus.area for nucleus in nuclei) == [6, 15] and nuclei[1].mask.shape == (3, 5)
    assert pattern.density == pytest.approx((1 + 1 + 0.5 + 0.25) / 600)
    assert nuclei[1].weight == pytest.approx(600 / ((20 - 3) * (30 - 5)))
    # Those of 7 and 3 touch; 9 lies nearest to 3's corner, and 4 to 9's.
    assert pattern.gaps == pytest.approx([1, np.hypot(14, 4), 1, np.hypot(8, 9)])
    with pytest.raises(ValueError, match="no mask has a nucleus"):
        banks.Bank.of([inst_map[:, 24:]])


def test_masks_without_a_whole_nucleus_count():
    """What is cut is no smaller than what shows of it; a mask without nuclei is part of the tissue, too."""
    whole, cut = np.zeros((20, 20), int), np.zeros((20, 20), int)
    whole[2:4, 2:4], whole[8:12, 8:12], whole[14:19, 4:9] = 1, 2, 3
    cut[:3, 5:10] = 1
    bank = banks.Bank.of([whole, cut, np.zeros((20, 20), int)])
    assert bank.areas.tolist() == [4, 16, 25] and len(bank.patterns) == 3
    assert bank.patterns[1].areas.tolist() == [16, 25] and bank.patterns[1].density == 0.5 / 400
    assert bank.patterns[2].density == 0
    made = [layouts.recombine(bank, 40, np.random.default_rng(seed)) for seed in range(30)]
    assert 5 <= sum(not layout.any() for layout in made) <= 20


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


def test_halves_are_of_slides(masks):
    measured = [statistics.measure(mask) for mask in masks]
    same = statistics.between_halves(measured[:1] * 6, list("aabbcc"), np.random.default_rng(0))
    other = statistics.between_halves(measured, list("aabbcc"), np.random.default_rng(0))
    assert same == pytest.approx(dict.fromkeys(statistics.FIGURES, 0)) and all(value > 0 for value in other.values())
