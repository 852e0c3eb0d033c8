"""
What a set of patches is worth beside the real ones that training saw: one figure after another.

Owns which figures there are, what is compared with what, and how copies are recognised. Knows no files and no flags.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ... import progress, streams
from . import image_metrics as im

METRICS = ("kid", "frechet", "precision_recall", "colour", "structure", "copies", "diversity")
BY_FEATURES = ("kid", "frechet", "precision_recall", "copies", "diversity")  # those that look at features
CANDIDATES = 20  # nearest training patches by features, which a patch is compared with by pixels
# The share of training patches that lie nearer to another one than what counts as a copy, by features and by pixels.
USUAL = 0.005

Figures = dict[str, "float | im.Estimate | None"]
# (patches of a set) -> figures, by an independent segmenter.
StructureMetric = Callable[["PatchSet"], Figures]


@dataclass(frozen=True)
class PatchSet:
    """
    Patches of one kind.

    :param name: what to call them.
    :param images: [N x H x W x 3] uint8.
    :param inst_maps: [N x H x W] int32, the nuclei they should show.
    :param features: [N x D] float32; unused where none of BY_FEATURES is asked for.
    :param slides: the slide that each one's structure comes from; of a structure that was made, its appearance.
    :param structures: the patch that it comes from, by its stem; of real patches, each one itself.
    :param coloured: of synthetic images, whole, each one and the image whose colours it took: [H x W x 3] uint8.
    :param classes: of each patch, the class of each nucleus by its id, where they are known; other ids may be there.
    :param kinds: of synthetic patches, which kind of structure each one has, see images.Item.
    :param conditions: of synthetic patches, a name of each one's condition.
    :param originals: of synthetic patches, the real ones that show these very nuclei, [N x H x W x 3] uint8.
    """

    name: str
    images: np.ndarray
    inst_maps: np.ndarray
    features: np.ndarray
    slides: Sequence[str]
    coloured: Sequence[tuple[np.ndarray, np.ndarray]] | None = None
    conditions: Sequence[str] | None = None
    originals: np.ndarray | None = None
    structures: Sequence[str] | None = None
    kinds: Sequence[str] | None = None
    classes: Sequence[Mapping[int, int]] | None = None


@dataclass(frozen=True)
class Neighbours:
    """
    The training patches that come nearest to each patch of a set.

    :param by_features: [N] indices, and feature_distance, [N], theirs.
    :param by_pixels: [N] indices of the best match among CANDIDATES, and pixel_distance, [N], theirs. The
        patch that its structure comes from is none of them: its nuclei lie there by design, so that every faithful
        sample would pass for a copy. By features it counts.
    """

    by_features: np.ndarray
    feature_distance: np.ndarray
    by_pixels: np.ndarray
    pixel_distance: np.ndarray


class Evaluator:
    """
    Measures sets of patches against the patches that training saw.

    :param train: the real training patches, at least two; how near they lie to each other sets the bounds that tell
        copies.
    :param metrics: some of METRICS.
    :param structure: measures agreement of image and mask; None leaves that figure out.
    :param seed: of subsets.
    """

    def __init__(
        self,
        train: PatchSet,
        metrics: Sequence[str] = METRICS,
        structure: StructureMetric | None = None,
        seed: int = 0,
    ) -> None:
        self.train = train
        self.metrics = metrics
        self.structure = structure
        self.seed = seed
        self._found: dict[str, Neighbours] = {}
        self._thumbnails = np.stack([im.thumbnail(image) for image in train.images]) if "copies" in metrics else None
        self._bounds = self._usual_distances() if "copies" in metrics else None

    def figures(self, patches: PatchSet) -> Figures:
        """:return: figure -> value, of all metrics asked for; None where the set does not allow it."""
        measures = {
            "kid": self._kid,
            "frechet": self._frechet,
            "precision_recall": self._precision_recall,
            "colour": self._colour,
            "structure": self.structure or (lambda patches: {}),
            "copies": self._copies,
            "diversity": self._diversity,
        }
        figures: Figures = {}
        for metric in METRICS:
            if metric in self.metrics:
                figures |= measures[metric](patches)
        return figures

    def _kid(self, patches: PatchSet) -> Figures:
        rng = streams.rng("kernel distance", self.seed)
        return {"kid": im.kernel_distance(self.train.features, patches.features, rng)}

    def _frechet(self, patches: PatchSet) -> Figures:
        return {"frechet": im.frechet_distance(self.train.features, patches.features)}

    def _precision_recall(self, patches: PatchSet) -> Figures:
        precision, recall = im.precision_recall(self.train.features, patches.features)
        return {"precision": precision, "recall": recall}

    def _colour(self, patches: PatchSet) -> Figures:
        """Samples beside their appearance images; a real patch beside the next one of its slide."""
        pairs = patches.coloured
        if pairs is None:
            pairs = [(patches.images[i], patches.images[j]) for i, j in _next_of_slide(patches.slides)]
        if not pairs:
            return {"colour_od": None, "colour_grey": None}
        od, grey = np.mean([im.colour_error(*pair) for pair in pairs], axis=0)
        return {"colour_od": float(od), "colour_grey": float(grey)}

    def _copies(self, patches: PatchSet) -> Figures:
        found = self.neighbours(patches)
        return {
            "nearest_features": float(np.median(found.feature_distance)),
            "nearest_pixels": float(np.median(found.pixel_distance)),
            "copies": float(self.copied(found).mean()),
        }

    def _diversity(self, patches: PatchSet) -> Figures:
        """Among samples of one condition; of real patches, among those of one slide."""
        groups = patches.slides if patches.conditions is None else patches.conditions
        return {"diversity": im.diversity(patches.features, groups)}

    # ---- copies ----

    def neighbours(self, patches: PatchSet) -> Neighbours:
        """:return: the training patches nearest to each of a set's; looked for once a set."""
        if patches.name not in self._found:
            self._found[patches.name] = self._neighbours(patches)
        return self._found[patches.name]

    def _neighbours(self, patches: PatchSet) -> Neighbours:
        itself = patches is self.train
        count = min(CANDIDATES, len(self.train.images) - itself)
        candidates, away = im.nearest(patches.features, self.train.features, count + itself)
        rows = np.arange(len(candidates))
        if itself:  # each patch's others: its own place goes last
            order = np.argsort(candidates == rows[:, None], axis=1, kind="stable")[:, :count]
            candidates, away = candidates[rows[:, None], order], away[rows[:, None], order]
        bar = progress.bar(patches.images, f"{patches.name}: looking for copies", leave=False, delay=2)
        aligned = np.array(
            [im.aligned_distance(im.thumbnail(image), self._thumbnails[near]) for image, near in zip(bar, candidates)]
        )
        if patches.structures is not None and self.train.structures is not None:
            stems = np.array(self.train.structures)
            aligned[stems[candidates] == np.array(patches.structures)[:, None]] = np.inf
        best = aligned.argmin(axis=1)
        return Neighbours(candidates[:, 0], away[:, 0], candidates[rows, best], aligned[rows, best])

    def _usual_distances(self) -> tuple[float, float]:
        """:return: the distances, by features and by pixels, that training patches keep from each other as a rule."""
        found = self.neighbours(self.train)
        return tuple(
            float(np.quantile(distance, USUAL, method="lower"))
            for distance in (found.feature_distance, found.pixel_distance)
        )

    def copied(self, found: Neighbours) -> np.ndarray:
        """:return: [N] bool: nearer to a training patch than those usually are to each other, by features or pixels."""
        return (found.feature_distance < self._bounds[0]) | self.copied_by_pixels(found)

    def copied_by_pixels(self, found: Neighbours) -> np.ndarray:
        """:return: [N] bool: nearer to a training patch than those usually are to each other, by pixels."""
        return found.pixel_distance < self._bounds[1]


def halves(patches: PatchSet, seed: int = 0) -> tuple[PatchSet, PatchSet]:
    """:return: a random half of real patches, and the other: of the same slides, so that either may be the other."""
    order = streams.rng("halves", seed).permutation(len(patches.images))

    def part(name: str, rows: np.ndarray) -> PatchSet:
        own = np.sort(rows)
        slides, stems = ([list_[i] for i in own] if list_ else None for list_ in (patches.slides, patches.structures))
        parts = (array[own] for array in (patches.images, patches.inst_maps, patches.features))
        return PatchSet(f"{patches.name}, {name}", *parts, slides, structures=stems)

    middle = len(order) // 2
    return part("half", order[:middle]), part("other half", order[middle:])


def _next_of_slide(slides: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of a patch and the next one of its slide, round; none of slides with one patch."""
    members: dict[str, list[int]] = {}
    for i, slide in enumerate(slides):
        members.setdefault(slide, []).append(i)
    return [
        (i, group[(place + 1) % len(group)])
        for group in members.values()
        for place, i in enumerate(group)
        if len(group) > 1
    ]
