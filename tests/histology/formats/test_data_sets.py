"""How data sets are divided into what is trained and what is tested on."""

import pytest

from guided_diffusion.histology.formats import data_sets
from guided_diffusion.histology.formats.fields import TEST, TRAIN, DataSet, Field


def data_set(*fields):
    """:param fields: name, slide, part and split of each."""
    return DataSet("three images", [Field(*four, where=f"file of {four[0]}", read=None) for four in fields])


def test_a_slide_is_never_in_both_splits():
    whole = data_set(("a0", "a", "fold1", TRAIN), ("a1", "a", "fold2", TRAIN), ("b0", "b", "fold2", TRAIN))
    assert [one.split for one in data_sets.split(whole, ["b"]).fields] == [TRAIN, TRAIN, TEST]
    with pytest.raises(ValueError, match="file of a0 and file of a1 are of one slide, a, but in both splits"):
        data_sets.split(whole, ["fold2"])
    parted = data_set(("a0", "a", "fold1", TRAIN), ("a1", "a", "fold1", TEST))
    with pytest.raises(ValueError, match="are of one slide, a, but in both splits"):
        data_sets.split(parted, [])
