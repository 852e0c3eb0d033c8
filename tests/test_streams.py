import itertools

import numpy as np
import torch as th

from guided_diffusion import streams

# Keys that NumPy takes to be alike in groups: it pads with zeros, and joins 32-bit words.
KEYS = [(), (0,), (0, 0), (1,), (1, 0), (1, 0, 0), (2**32,), (0, 1), (2**32, 5), (0, 5 * 2**32 + 1), (5, 1), (1, 5)]


def test_every_purpose_and_key_has_a_stream_of_its_own():
    assert np.array_equal(np.random.default_rng([1, 0]).random(3), np.random.default_rng([1, 0, 0]).random(3))
    names = list(itertools.product(("noise", "dropout", ""), KEYS))
    assert len({streams.rng(purpose, *key).integers(2**62) for purpose, key in names}) == len(names)
    seeds = {streams.seed(purpose, *key) for purpose, key in names}
    assert len(seeds) == len(names) and all(0 <= seed < 2**63 for seed in seeds)
    assert len({streams.generator(purpose, *key).initial_seed() for purpose, key in names}) == len(names)


def test_a_stream_is_the_same_in_every_run_and_for_every_kind_of_integer():
    key = (np.int64(3), np.uint8(7))
    assert np.array_equal(streams.rng("noise", *key).random(5), streams.rng("noise", 3, 7).random(5))
    draws = [th.randn(4, generator=streams.generator("noise", *numbers)) for numbers in (key, (3, 7))]
    assert th.equal(*draws)
    assert streams.seed("noise", 3, 7) == 6710289276270146595  # checkpoints go on with what they began with


def test_what_draws_from_the_global_generator_is_given_a_stream_for_a_while():
    before = th.get_rng_state()
    drawn = []
    for key in ((3, 7), (3, 7), (3, 8)):
        with streams.global_generator("dropout", *key):
            drawn.append(th.dropout(th.ones(100), 0.5, True))
    assert th.equal(drawn[0], drawn[1]) and not th.equal(drawn[0], drawn[2])
    assert th.equal(before, th.get_rng_state())
