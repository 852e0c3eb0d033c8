"""
Random streams: each draw of a run has a purpose and a place, and its numbers follow from these and the seed alone.

No stream is part of another, and none depends on what was drawn before. Knows nothing of what is drawn. torch is
imported where its generators are asked for: half of the programs draw without it, and start seconds earlier for it.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch as th


def _entropy(purpose: str, key: tuple[int, ...]) -> int:
    # Hashed: NumPy pads seeds with zeros, so that [s, n] and [s, n, 0] are one to it, and joins their 32-bit words.
    words = (purpose, *map(int, key))
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest(), "little")


def rng(purpose: str, *key: int) -> np.random.Generator:
    """
    Make the NumPy generator of one stream.

    :param purpose: what is drawn, in words; other purposes give unrelated streams.
    :param key: the run's seed, then the place in the run, such as (seed, epoch, index); also their number counts.
    """
    return np.random.default_rng(_entropy(purpose, key))


def seed(purpose: str, *key: int) -> int:
    """:return: a 63-bit seed for one stream of another library, see rng."""
    return _entropy(purpose, key) >> 193


def generator(purpose: str, *key: int, device: "th.device | str" = "cpu") -> "th.Generator":
    """:return: the torch generator of one stream on a device, see rng. Kinds of device draw different numbers."""
    import torch as th

    return th.Generator(device).manual_seed(seed(purpose, *key))


@contextlib.contextmanager
def global_generator(purpose: str, *key: int, device: "th.device | str" = "cpu") -> Iterator[None]:
    """Give what draws from torch's global generator, such as dropout, one stream for a with block, see rng."""
    import torch as th

    with th.random.fork_rng([device] if th.device(device).type == "cuda" else []):
        th.manual_seed(seed(purpose, *key))
        yield
