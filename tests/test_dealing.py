"""Work in batches, dealt to one rank; more of them in test_image_sample."""

import pytest
import torch as th
from torch.utils.data import Dataset

from guided_diffusion import dealing, dist_util


class Numbers(Dataset):
    """Item i is i; the epoch stands beside it."""

    def __len__(self):
        return 5

    def __getitem__(self, key):
        return th.tensor([key[1]]), {"epoch": key[0]}


PENDING = {("a", 1): {0, 1, 2, 7}, ("a", 2): {7, 8}, ("b", 1): set(), ("b", 2): set(), ("c", 1): {3}, ("c", 2): set()}


def key(batch, k):
    return divmod(k, 5)


def test_batches_hold_what_is_left_by_checkpoint():
    batches = dealing.cut(PENDING, 2)
    assert [(batch.checkpoint, batch.numbers) for batch in batches] == [
        ("a", [0, 1]),
        ("a", [2, 7]),
        ("a", [8]),
        ("c", [3]),
    ]
    assert batches[1].wanted == {1: {2, 7}, 2: {7}} and batches[2].wanted == {2: {8}}
    assert [(batch.before, len(batch)) for batch in batches] == [(0, 2), (2, 3), (5, 1), (6, 1)]


def test_scales_of_other_conditions_share_no_batch():
    batches = dealing.cut(PENDING, 2, alike=False)
    assert [(batch.checkpoint, batch.wanted) for batch in batches] == [
        ("a", {1: {0, 1}}),
        ("a", {1: {2, 7}}),
        ("a", {2: {7, 8}}),
        ("c", {1: {3}}),
    ]


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_few_samples_go_to_all_ranks(ranks):
    batches = dealing.cut({("a", 1): set(range(6))}, 100, ranks)
    assert [len(batch) for batch in batches] == [6 // min(ranks, 6)] * min(ranks, 6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_come_with_their_batches(num_workers):
    batches = dealing.cut(PENDING, 2)
    dealt = list(dealing.dealt(batches, Numbers(), num_workers, key))
    assert [batch for batch, _ in dealt] == batches
    for batch, [(images, cond)] in dealt:
        numbers = 5 * cond["epoch"] + images[:, 0]
        assert numbers.tolist() == batch.numbers


def test_no_batch_is_taken_before_it_is_asked_for(monkeypatch):
    """Else a rank that is free would find none left, while this one has several waiting."""
    taken = []
    monkeypatch.setattr(dist_util, "world_size", lambda: 2)
    monkeypatch.setattr(dist_util, "deal", lambda count: (taken.append(k) or k for k in range(count)))
    batches = dealing.cut({("a", 1): set(range(20))}, 1)
    ahead = []
    for place, _ in enumerate(dealing.dealt(batches, Numbers(), 1, key)):
        ahead.append(len(taken) - place - 1)
    assert ahead[:15] == [1] * 15 and ahead[16:] == [0] * 4
