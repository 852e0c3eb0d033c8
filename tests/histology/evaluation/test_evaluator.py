"""Which figures a set gets, the real floor beside it, and copies that were planted."""

from dataclasses import replace

import numpy as np
import pytest

from guided_diffusion.histology.evaluation.evaluator import METRICS, Evaluator, PatchSet, halves


def draw(count: int, seed: int, slides: int = 4, shift: float = 0.0, size: int = 32) -> PatchSet:
    """Patches of blocks in colours of their slide, and features that tell them apart."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(60, 200, (slides, 3))
    blocks = rng.integers(-50, 50, (count, size // 4, size // 4, 1))
    pixels = np.kron(blocks, np.ones((1, 4, 4, 1))) + colours[np.arange(count) % slides][:, None, None]
    return PatchSet(
        f"set{seed}",
        pixels.astype(np.uint8),
        np.zeros((count, size, size), np.int32),
        (rng.normal(size=(count, 5)) + shift).astype(np.float32),
        [f"slide{i % slides}" for i in range(count)],
    )


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(draw(60, 0), structure=lambda patches: {"f1": 0.5})


def test_every_metric_gives_its_figures(evaluator):
    figures = evaluator.figures(draw(40, 1))
    assert list(figures) == [
        "kid",
        "frechet",
        "precision",
        "recall",
        "colour_od",
        "colour_grey",
        "f1",
        "nearest_features",
        "nearest_pixels",
        "copies",
        "diversity",
    ]
    assert figures["copies"] == 0 and figures["kid"].low < figures["kid"].high
    assert figures["colour_grey"] > 0 and figures["diversity"] > 0


@pytest.mark.parametrize("metric", METRICS)
def test_only_what_is_asked_for(metric):
    train, held_out = draw(30, 0), draw(20, 1)
    figures = Evaluator(train, [metric], structure=lambda patches: {"f1": 1.0}).figures(held_out)
    everything = Evaluator(train, structure=lambda patches: {"f1": 1.0}).figures(held_out)
    assert figures and figures == {name: everything[name] for name in figures}


def test_a_set_further_off_scores_worse(evaluator):
    near, far = evaluator.figures(draw(40, 2)), evaluator.figures(draw(40, 2, shift=3))
    assert far["kid"].low > near["kid"].high and far["frechet"] > near["frechet"]
    assert far["precision"] < near["precision"]


def test_colours_are_held_against_the_appearance(evaluator):
    base = draw(10, 3)
    turned, bright = base.images[:, ::-1], base.images + np.uint8(5)
    rest = base.inst_maps, base.features, base.slides
    same = PatchSet("a", base.images, *rest, list(zip(base.images, turned)))
    brighter = PatchSet("b", bright, *rest, list(zip(bright, base.images)))
    assert evaluator.figures(same)["colour_grey"] == 0
    assert evaluator.figures(brighter)["colour_grey"] == pytest.approx(5)


def test_copies_are_recognised(evaluator):
    train = evaluator.train
    others = draw(20, 7)
    images, features = others.images.copy(), others.features + np.float32(0.5)
    images[3] = np.roll(np.rot90(train.images[11]), 4, axis=1)  # the same picture, lying otherwise
    features[3] = train.features[11] + np.float32(0.3)
    features[5] = train.features[20]
    planted = PatchSet("planted", images, others.inst_maps, features, others.slides)
    found = evaluator.neighbours(planted)
    copied = evaluator.copied(found)
    assert copied[[3, 5]].all() and found.by_pixels[3] == 11 and found.by_features[5] == 20
    assert found.pixel_distance[3] < 0.01
    assert evaluator.figures(planted)["copies"] == copied.mean()


def test_the_bounds_are_how_near_training_patches_lie_to_each_other():
    train = draw(60, 0)
    evaluator = Evaluator(train, ["copies"])
    found = evaluator.neighbours(train)
    away = np.linalg.norm(train.features[:, None].astype(float) - train.features, axis=2) + np.diag(np.full(60, np.inf))
    assert np.allclose(found.feature_distance, away.min(1)) and (found.by_features == away.argmin(1)).all()
    assert (found.by_pixels != np.arange(60)).all() and found.pixel_distance.min() > 0.05
    assert not evaluator.copied(found).any()  # of 60, one in 200 is none
    assert evaluator.figures(replace(train, name="again"))["copies"] == 1  # the same patches, as samples


@pytest.mark.parametrize("held_out", [30, 300])
def test_about_one_real_patch_in_a_hundred_counts_as_a_copy_however_many_are_asked(held_out):
    def patches(count, seed):
        images = np.random.default_rng(seed).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
        return replace(draw(count, seed, size=8), images=images)

    evaluator = Evaluator(patches(1200, 0), ["copies"])
    shares = [evaluator.figures(patches(held_out, seed))["copies"] for seed in range(1, 1 + 600 // held_out)]
    assert 0 < np.mean(shares) < 0.02


def test_halves_are_of_the_same_slides_and_share_no_patch():
    train = replace(draw(21, 0, slides=3), structures=[f"p{i}" for i in range(21)])
    one, other = halves(train)
    assert sorted(one.structures + other.structures) == sorted(train.structures)
    assert set(one.slides) == set(other.slides) == set(train.slides) and one.name != other.name
    for half in (one, other):
        places = [train.structures.index(stem) for stem in half.structures]
        assert np.array_equal(half.images, train.images[places])
        assert np.array_equal(half.features, train.features[places])
        assert half.slides == [train.slides[place] for place in places]
    assert halves(train, seed=1)[0].structures != one.structures


def test_the_patch_of_a_samples_own_structure_is_no_copy():
    """Nuclei where the mask has them, in another texture, are what a sample is to show; another patch's are a copy."""
    base = draw(60, 0)
    train = replace(base, structures=[f"p{i}" for i in range(60)])
    evaluator = Evaluator(train, ["copies"])
    texture = np.random.default_rng(9).normal(0, 8, base.images[:2].shape)
    images = np.clip(base.images[[7, 7]] + texture, 0, 255).astype(np.uint8)
    # Its neighbours by features are training patches, yet no nearer than these are to each other.
    features = base.features[[7, 7]] + evaluator.neighbours(train).feature_distance.min() / 2
    samples = replace(draw(2, 3), images=images, features=features, structures=["p7", "p8"])
    found = evaluator.neighbours(samples)
    assert evaluator.copied_by_pixels(found).tolist() == evaluator.copied(found).tolist() == [False, True]
    assert found.by_pixels[0] != 7 and found.by_pixels[1] == 7


def test_diversity_is_within_conditions(evaluator):
    base = draw(6, 8)
    features = np.repeat(base.features[:3], 2, axis=0)
    alike = PatchSet("c", base.images, base.inst_maps, features, base.slides, None, list("aabbcc"))
    assert evaluator.figures(alike)["diversity"] == pytest.approx(0, abs=1e-6)
    single = PatchSet("d", base.images, base.inst_maps, features, base.slides, None, list("abcdef"))
    assert evaluator.figures(single)["diversity"] is None


def test_a_slide_of_one_patch_has_no_colour_floor():
    train, lone = draw(20, 0), draw(4, 1, slides=4)
    figures = Evaluator(train, ["colour"]).figures(lone)
    assert figures == {"colour_od": None, "colour_grey": None}
