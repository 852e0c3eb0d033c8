"""PatchCore against brute force."""

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F

from guided_diffusion.histology.filtering import patchcore


def vectors(*shape, seed=0):
    return th.randn(*shape, generator=th.Generator().manual_seed(seed))


def brute_force_coreset(x, count):
    x = x.double()
    chosen = [int((x - x.mean(0)).norm(dim=1).argmax())]
    while len(chosen) < count:
        nearest = th.cdist(x, x[chosen]).amin(1)
        nearest[chosen] = -1
        chosen.append(int(nearest.numpy().argmax()))
    return chosen


@pytest.mark.parametrize("candidates", [1, 7, 50, 4096])
def test_the_coreset_is_the_brute_force_one(monkeypatch, candidates):
    monkeypatch.setattr(patchcore, "_CANDIDATES", candidates)
    monkeypatch.setattr(patchcore, "_ROWS", 64)
    for seed in range(3):
        x = vectors(300, 5, seed=seed)
        for count in (1, 2, 60, 300):
            assert patchcore.greedy_coreset(x, count).tolist() == brute_force_coreset(x, count)


def test_copies_are_chosen_last_and_never_twice():
    x = vectors(6, 3).round(decimals=1).repeat(4, 1)
    chosen = patchcore.greedy_coreset(x, 24).tolist()
    assert sorted(chosen) == list(range(24))
    assert sorted(k % 6 for k in chosen[:6]) == list(range(6))


def test_progress_adds_up():
    seen = []
    patchcore.greedy_coreset(vectors(100, 4), 30, seen.append)
    assert sum(seen) == 30


def test_distances_are_those_of_all_pairs(monkeypatch):
    monkeypatch.setattr(patchcore, "_ROWS", 7)
    monkeypatch.setattr(patchcore, "_COLUMNS", 5)
    queries, bank = vectors(30, 6), vectors(23, 6, seed=1)
    expected = th.cdist(queries.double(), bank.double()).amin(1).square()
    assert th.allclose(patchcore.squared_distances(queries, bank).double(), expected, rtol=1e-4)
    assert float(patchcore.squared_distances(bank, bank).max()) < 1e-5


def test_projection_keeps_distances_roughly():
    x = vectors(40, 600)
    ratio = th.pdist(patchcore.projected(x, 0)) / th.pdist(x)
    assert patchcore.projected(x, 0).shape == (40, 128) and th.equal(
        patchcore.projected(x, 0), patchcore.projected(x, 0)
    )
    assert abs(float(ratio.mean()) - 1) < 0.05 and float(ratio.std()) < 0.1
    assert not th.equal(patchcore.projected(x, 0), patchcore.projected(x, 1))
    assert patchcore.projected(x[:, :9], 0).shape == (40, 9)


# ---- local features ----


def test_a_place_is_the_mean_of_what_is_around_it():
    fine, coarse = vectors(2, 3, 8, 8), vectors(2, 4, 4, 4, seed=1)
    found, grid = patchcore.local_features([fine, coarse], neighbourhood=3, stride=2)
    assert grid == (4, 4) and found.shape == (2, 16, 7)
    joint = th.cat([fine, F.interpolate(coarse, size=(8, 8), mode="bilinear")], 1)
    for place, (row, column) in enumerate((r, c) for r in range(0, 8, 2) for c in range(0, 8, 2)):
        window = joint[:, :, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        assert th.allclose(found[:, place], window.mean((2, 3)), atol=1e-6)


def test_wide_maps_are_averaged_to_128_channels():
    wide = vectors(2, 256, 4, 4)
    found, _ = patchcore.local_features([wide], 1, 1)
    assert th.allclose(found, (wide[:, ::2] + wide[:, 1::2]).flatten(2).transpose(1, 2) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("window", "stride", "what"),
    [(4, 1, "--neighbourhood 4"), (0, 1, "odd"), (3, 0, "--stride 0"), (2**31 + 1, 1, "odd"), (3, 2**31, "less than")],
)
def test_windows_that_are_no_use_are_refused(window, stride, what):
    with pytest.raises(ValueError, match=what):
        patchcore.local_features([vectors(1, 2, 4, 4)], window, stride)


# ---- scores ----


PARTS = np.repeat(np.arange(4), 5)
MIX = vectors(6, 6, seed=9)


def remembered(seed=0, fraction=0.5, max_bank=50_000):
    features = vectors(20, 10, 6, seed=seed) @ MIX + th.arange(4).repeat_interleave(5)[:, None, None]
    return features, patchcore.Memory.fit(features, PARTS, fraction, max_bank)


def fitted():
    return remembered()[1].without([2])


@pytest.mark.parametrize("left_out", [(-1, -1), (-1, 2), (0, 3)])
def test_what_is_left_out_is_in_neither_bank_nor_whitening(left_out):
    features, memory = remembered(fraction=1.0)
    core = memory.without(left_out)
    kept = features[th.from_numpy(~np.isin(PARTS, left_out))].flatten(0, 1)
    assert len(core.bank) == len(kept) and th.allclose(core.mean, kept.mean(0), atol=1e-5)
    assert th.allclose(th.cov(core.bank.T, correction=0), th.eye(6), atol=1e-4)
    assert th.allclose(core.distances(kept[None]), th.zeros(1, len(kept)), atol=5e-3)
    assert float(core.score(kept[:, None]).max()) < 1e-5  # not only nearly


def test_a_direction_without_variance_is_left_out():
    features = vectors(20, 10, 4)
    features[..., 2] = features[..., 0] * 2 + 1
    assert patchcore.Memory.fit(features, PARTS).without([0]).bank.shape == (15, 3)


def test_the_score_is_the_largest_distance_to_the_nearest():
    core = fitted()
    features = vectors(20, 33, 6, seed=3) @ vectors(6, 6, seed=9)
    x = ((features - core.mean) @ core.whiten).double()
    expected = th.cdist(x.flatten(0, 1), core.bank.double()).amin(1).view(20, 33)
    assert th.allclose(core.distances(features).double(), expected, atol=1e-3)
    assert th.allclose(core.score(features).double(), expected.amax(1), atol=1e-5)


def test_the_weight_is_equation_7():
    core = fitted()
    features = vectors(5, 8, 6, seed=3)
    x = ((features - core.mean) @ core.whiten).double()
    bank = core.bank.double()
    for image, found in zip(x, core.score(features, reweight=True).double()):
        far = th.cdist(image, bank)
        place = int(far.amin(1).argmax())
        nearest = int(far[place].argmin())
        around = th.cdist(bank[nearest][None], bank)[0].argsort()[:9]
        weight = 1 - far[place, nearest].exp() / far[place, around].exp().sum()
        assert float(found) == pytest.approx(float(weight * far[place, nearest]), rel=1e-4)


def test_order_and_batches_do_not_matter():
    features, memory = remembered(fraction=0.2)
    images, core = vectors(24, 16, 6, seed=1), memory.without([1])
    order = np.random.default_rng(5).permutation(20)
    shuffled = patchcore.Memory.fit(features[th.from_numpy(order)], PARTS[order], 0.2).without([1])
    scores = core.score(images)
    assert th.allclose(scores, shuffled.score(images), atol=1e-4)
    for size in (1, 5):
        assert th.allclose(scores, th.cat([core.score(part) for part in images.split(size)]), atol=1e-5)
    assert th.allclose(scores.flip(0), core.score(images.flip(0)), atol=1e-5)


def test_bank_sizes():
    parts = np.array([0, 1, 0, 0])
    cases = ((1000, 0.1, 40), (1000, 0.1, 5000), (1, 0.1, 90))  # places of a patch, share, limit
    assert [patchcore.bank_sizes(parts, *case) for case in cases] == [[30, 10], [300, 100], [1, 1]]
    assert [len(bank) for bank in remembered(fraction=0.1)[1].banks] == [5] * 4
    assert [len(bank) for bank in remembered(max_bank=14)[1].banks] == [3] * 4
