"""The order in which samples take structures, and what the folders of a sweep have in common."""

from collections import Counter

import numpy as np
import pytest

from guided_diffusion.draws import own_draw, shared_draw, spread

SLIDES = [name for name, count in (("a", 50), ("b", 20), ("c", 3), ("d", 7)) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 4, 9, 12, 40, 80])
def test_any_number_is_spread_over_slides(count):
    chosen = spread(SLIDES, 0)[:count]
    counts = Counter(SLIDES[i] for i in chosen)
    sizes = Counter(SLIDES)
    assert len(set(chosen)) == count
    # As even as the slides' sizes allow: none has two more than another that has items left.
    for slide, size in sizes.items():
        assert counts[slide] == size or counts[slide] >= max(counts.values()) - 1


def test_a_slide_s_items_are_spread_too():
    halves = [np.mean([i < 25 for i in spread(["a"] * 50, seed)[:10]]) for seed in range(40)]
    assert np.mean(halves) == pytest.approx(0.5, abs=0.1) and len(set(halves)) > 2


def test_thirty_slides_of_64_give_each_its_share():
    slides = [f"s{k // 64:02d}" for k in range(1920)]
    assert set(Counter(slides[i] for i in spread(slides, 3)[:1000]).values()) == {33, 34}
    assert sorted(spread(slides, 3)) == list(range(1920)) and (spread(slides, 3) != spread(slides, 4)).any()


def shift(seed):
    return np.roll(np.arange(80), seed % 79 + 1)


def test_draws_of_a_sweep_are_their_own_whatever_others_there_are():
    pairs = [("x/run/a.pt", 1.0), ("a.pt", 1.5), ("b.pt", 1.0)]
    draws = [own_draw(SLIDES, shift, 0, *pair, first=False) for pair in pairs]
    triples = {(d.structure(k), d.source(k), f"{d.seed}/{k}") for d in draws for k in range(60)}
    assert len(triples) == 180 and len({(s, a) for s, a, _ in triples}) > 150
    assert [d.key(k)[1:] for d in draws for k in range(5)] == [
        (d.structure(k), d.source(k)) for d in draws for k in range(5)
    ]
    again = own_draw(SLIDES, shift, 0, "y/a.pt", 1.0, first=False)
    assert again.seed == draws[0].seed and (again.order == draws[0].order).all()
    assert own_draw(SLIDES, shift, 1, *pairs[0], first=False).seed != draws[0].seed
    assert len({d.key(0)[0] for d in draws}) == 3 and draws[0].key(80)[0] == draws[0].key(0)[0] + 1


def test_a_structure_has_another_appearance_in_each_turn():
    draw = shared_draw(SLIDES, np.arange(80), shift, 7, first=False)
    assert [draw.source(k) for k in range(80)] == draw.order.tolist() == [draw.structure(80 + k) for k in range(80)]
    shifts = {turn: {(draw.source(80 * turn + k) - draw.structure(k)) % 80 for k in range(80)} for turn in range(4)}
    assert shifts[0] == {0} and all(len(own) == 1 for own in shifts.values()) and len(set.union(*shifts.values())) == 4
    assert draw.key(85) == (1, draw.structure(5), draw.source(85))


def test_a_shared_draw_is_the_reference_s_where_the_first_are_taken():
    draw = shared_draw(SLIDES, np.arange(80)[::-1], shift, 7, first=True)
    assert [draw.key(k) for k in (0, 1, 79, 80)] == [(0, 0, 79), (0, 1, 78), (0, 79, 0), (1, 0, 79)]
    assert draw.seed == 7
