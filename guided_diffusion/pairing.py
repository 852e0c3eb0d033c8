"""Which image gives which structure its appearance, by the flags. Knows items and their arrays, and no formula: these
are data_util's."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import data_util, streams
from .images import Item


def check(
    shuffle_masks: bool,
    match_struct: bool,
    match_app: bool,
    match_other_slide: bool,
    appearance_dir: str,
    structure_dir: str,
) -> None:
    """:raises ValueError: where flags contradict each other."""
    if match_struct and shuffle_masks:
        raise ValueError("--match_struct True with --shuffle_masks True: both choose the appearance; turn one off")
    for flag, folder in (("--appearance_dir", appearance_dir), ("--structure_dir", structure_dir)):
        if folder and (match_app or match_other_slide or shuffle_masks):
            raise ValueError(
                f"{flag} {folder} with --match_app, --match_other_slide or --shuffle_masks True, which go by the "
                "images that structures have of their own: turn them off"
            )
    if match_other_slide and not (match_struct or match_app):
        raise ValueError("--match_other_slide True needs --match_struct True or --match_app True: turn one on")


@dataclass(frozen=True)
class Pairing:
    """
    How appearances are chosen. Sources are numbered: the items, then the images without masks.

    :param items: the structures, with images of their own unless unmasked are given.
    :param unmasked: images without masks, which the appearances then come from; they may have some where classes count.
    :param vectors: an [N x D] array that match_app goes by, a row an item; None goes by stain.
    :param classes: how many classes of cells match_struct goes by as well, with background, which is 0; 0: by none.
    :param seed: of the choice; other parameters see load_dataset.
    """

    items: Sequence[Item]
    unmasked: Sequence[Item] = ()
    shuffle_masks: bool = False
    match_struct: bool = False
    match_app: bool = False
    match_other_slide: bool = False
    vectors: np.ndarray | None = None
    classes: int = 0
    seed: int = 0

    @functools.cached_property
    def _by_mixture(self) -> bool:
        """Whether images that lend their appearance to other structures are matched by their own classes."""
        return bool(self.classes and self.unmasked) and all(lender.cell_classes for lender in self.unmasked)

    @property
    def looks_at_all(self) -> bool:
        """Whether the choice depends on what is in the files."""
        return self.match_struct or (self.match_app and self.vectors is None)

    def describe(
        self,
        index: int,
        image: np.ndarray | None,
        class_map: np.ndarray | None = None,
        inst_map: np.ndarray | None = None,
    ) -> object:
        """
        :param index: the source's number.
        :param image: its pixels, [H x W x 3] uint8; class_map and inst_map: its classes and instance ids, [H x W].
            Either is None where it has none; a structure without an image is an item, and takes images without masks.
        :return: what `choose` needs to know of it.
        """
        if self.match_struct and self._by_mixture:
            return np.mean(inst_map > 0), *data_util.class_mixture(class_map, inst_map, self.classes)
        if index >= len(self.items):
            return data_util.haematoxylin_histogram(image) if self.match_struct else None
        if self.match_struct and self.unmasked:
            return np.mean(inst_map > 0)
        if self.match_struct:
            mixture = data_util.class_mixture(class_map, inst_map, self.classes) if self.classes else ()
            return *data_util.area_properties(inst_map), *mixture
        return data_util.stain_descriptor(image) if self.match_app and self.vectors is None else None

    def look(self, described: Sequence) -> object:
        """
        :param described: what `describe` gave for each source, where looks_at_all.
        :return: what `choose` draws from, for any number of seeds.
        """
        count = len(self.items)
        if self.match_struct and self._by_mixture:
            return data_util.near_mixtures(np.array(described[:count]), np.array(described[count:]))
        if self.unmasked and self.match_struct:
            estimates = data_util.nuclear_shares(np.array(described[count:]), [item.slide for item in self.unmasked])
            return np.array(described[:count]), estimates
        if self.unmasked or not count or not (self.match_struct or self.match_app):
            return None
        slides = [item.slide for item in self.items] if self.match_other_slide else None
        if self.match_struct:
            total, median, *mixtures = np.array(described).T
            return data_util.near_struct(total, median, slides, np.transpose(mixtures) if self.classes else None)
        return data_util.near_app(np.array(described) if self.vectors is None else self.vectors, slides)

    def choose(self, seen: object, own_seed: int | None = None) -> np.ndarray:
        """
        :param seen: what `look` gave.
        :param own_seed: of another choice than that of `seed`, whose permutation is the reference's.
        :return: for each item the number of the source that gives its appearance.
        """
        count, seed = len(self.items), self.seed if own_seed is None else own_seed
        if isinstance(seen, data_util.Neighbours):
            return seen.draw(seed) + (count if self.unmasked else 0)
        if self.unmasked and seen is not None:
            return count + data_util.match_shares(*seen, seed)
        if self.unmasked:
            return count + streams.rng("appearances", seed).integers(len(self.unmasked), size=count)
        if not self.shuffle_masks:
            return np.arange(count)
        return data_util.shuffled(count) if own_seed is None else streams.rng("shuffled", seed).permutation(count)
