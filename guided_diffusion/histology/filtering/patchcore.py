"""
How far a patch is from real ones of other slides: PatchCore (Roth et al. 2022, "Towards Total Recall in Industrial
Anomaly Detection", arXiv 2106.08265) on the two middle maps of a backbone, over any of several parts of the real ones.

Owns local features, the coreset, distances and scores. Sees tensors and arrays: nothing of files.

Beside the paper, each by what it brought on planted failures of MoNuSeg patches (docs/pipeline.md):
- neighbourhoods of 21 x 21 cells at a stride of 4 (the reference: 9 at 4), where the paper has 3 x 3 at 1: the farthest
  of 256 small spots says how rare a patch's rarest spot is, the farthest of 16 larger ones what a patch is like;
- maps of more than 128 channels are averaged down to 128, as the paper does to 1024;
- local features are whitened over the real patches: stain and organ are the directions of large variance, and would
  hide what blur or noise changes. What the whitening was fitted to lies much nearer than other patches of the same
  slides (of three slides: an AUROC of 1.00), so a score leaves slides out of the whitening, too, not of the bank alone;
- the coreset begins at the vector farthest from the mean, not at random ones, so that order does not matter.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch as th
import torch.nn.functional as F

NEIGHBOURHOOD, STRIDE = 21, 4  # cells of the finer map
MOST_CELLS = 1000  # of either, which no map has on a side
MAP_CHANNELS = 128
_PROJECTED = 128  # dimensions in which the coreset is chosen
_CANDIDATES = 4096
_ROWS, _COLUMNS = 1024, 4096  # of a block of distances: 16 MiB
_AROUND = 9  # bank vectors that re-weight a score
_FLAT = 1e-6  # directions of less than this share of the largest variance are left out
_COARSE = 8  # the first 1 / 8 of the bank bounds distances from above


def local_features(
    maps: Sequence[th.Tensor], neighbourhood: int = NEIGHBOURHOOD, stride: int = STRIDE
) -> tuple[th.Tensor, tuple[int, int]]:
    """
    Describe places of images by what is around them (section 3.1).

    Coarser maps are brought to the finer one's grid, bilinearly; then each channel is averaged over windows, of which
    only the cells within the map count.

    :param maps: [N x C x h x w] fp32 tensors, the finer first.
    :param neighbourhood: side of a window in cells of the finer map, odd; stride: cells between windows.
    :return: an [N x P x D] tensor, P = rows * columns places, D at most 128 a map; and (rows, columns).
    :raises ValueError: for an invalid window or stride.
    """
    check_windows(neighbourhood, stride)
    grid = maps[0].shape[2:]
    parts = []
    for part in maps:
        if part.shape[1] > MAP_CHANNELS:
            flat = part.flatten(2).transpose(1, 2)
            part = F.adaptive_avg_pool1d(flat, MAP_CHANNELS).transpose(1, 2).unflatten(2, part.shape[2:])
        if part.shape[2:] != grid:
            part = F.interpolate(part, size=grid, mode="bilinear", align_corners=False)
        parts.append(part)
    joint = F.avg_pool2d(th.cat(parts, 1), neighbourhood, stride, neighbourhood // 2, count_include_pad=False)
    return joint.flatten(2).transpose(1, 2).contiguous(), (joint.shape[2], joint.shape[3])


def check_windows(neighbourhood: int, stride: int) -> None:
    """:raises ValueError: for a window or stride that local_features cannot use."""
    if not 1 <= neighbourhood < MOST_CELLS or neighbourhood % 2 == 0:
        raise ValueError(
            f"--neighbourhood {neighbourhood}: give an odd number of cells below {MOST_CELLS}, such as {NEIGHBOURHOOD}"
        )
    if not 1 <= stride < MOST_CELLS:
        raise ValueError(f"--stride {stride}: give at least 1 cell, and less than {MOST_CELLS}")


def projected(x: th.Tensor, seed: int) -> th.Tensor:
    """
    Bring vectors to 128 dimensions by a seeded Gaussian matrix, which nearly keeps distances (section 3.2).

    :param x: an [N x D] tensor. :return: an [N x 128] one; x itself where D is at most 128.
    """
    if x.shape[1] <= _PROJECTED:
        return x
    generator = th.Generator().manual_seed(seed)
    matrix = th.randn(x.shape[1], _PROJECTED, generator=generator) / _PROJECTED**0.5
    return x @ matrix.to(x.device)


def greedy_coreset(x: th.Tensor, count: int, progress: Callable[[int], None] = lambda chosen: None) -> th.Tensor:
    """
    Choose vectors that cover all (k-centre greedy, algorithm 1): first the farthest from the mean, then again and again
    the one farthest from all chosen; of equals the first.

    Exact, in rounds: the farthest 4096 are compared with each other, and the greedy choice runs among them for as long
    as it stays above all the rest, whose distances only shrink; then the rest learns of the chosen by one product.

    :param x: an [N x D] tensor. :param count: how many, 1 to N.
    :param progress: called with the number chosen in each round.
    :return: a [count] int64 tensor of different indices, on the CPU, in the order of choice.
    """
    squares = x.square().sum(1)
    nearest = (x - x.double().mean(0).to(x.dtype)).square().sum(1)
    chosen = [int(np.argmax(nearest.cpu().numpy()))]
    nearest.fill_(th.inf)
    new = chosen
    while True:
        _shrink(nearest, x, squares, x[new])
        nearest[new] = -1  # never again, though all that is left may be copies
        progress(len(new))
        if len(chosen) == count:
            return th.tensor(chosen)
        new = _greedy_round(nearest, x, count - len(chosen))
        chosen = chosen + new


def _greedy_round(nearest: th.Tensor, x: th.Tensor, wanted: int) -> list[int]:
    """The next choices, at least one and at most `wanted`."""
    size = min(_CANDIDATES, len(x))
    top, index = nearest.topk(size)
    bound = float(top[-1]) if size < len(x) else -1.0
    index = index.sort().values  # so that of equals the first is found first
    far = nearest[index].cpu().numpy().copy()
    candidates = x[index]
    squares = candidates.square().sum(1)
    between = th.addmm(squares[None], candidates, candidates.T, alpha=-2).add_(squares[:, None]).cpu().numpy()
    places: list[int] = []
    while len(places) < wanted:
        best = int(far.argmax())
        if places and far[best] <= bound:
            break
        places.append(best)
        np.minimum(far, between[best], out=far)
        far[best] = -np.inf
    return index.cpu().numpy()[places].tolist()


def _shrink(nearest: th.Tensor, x: th.Tensor, squares: th.Tensor, centres: th.Tensor) -> None:
    """Lower squared distances to the nearest chosen vector by those to new centres, in place."""
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        found = squared_distances(x[rows], centres, squares[rows])
        nearest[rows] = th.minimum(nearest[rows], found)


def squared_distances(queries: th.Tensor, bank: th.Tensor, squares: th.Tensor | None = None) -> th.Tensor:
    """
    Squared Euclidean distance of each query to its nearest bank vector, exact but for rounding.

    :param queries: a [Q x D] tensor; bank: an [M x D] tensor; squares: the queries' squared norms, if known.
    :return: a [Q] tensor.
    """
    squares = queries.square().sum(1) if squares is None else squares
    bank_squares = bank.square().sum(1)
    nearest = th.empty(len(queries), dtype=queries.dtype, device=queries.device)
    for start in range(0, len(queries), _ROWS):
        rows = slice(start, start + _ROWS)
        blocks = [
            th.addmm(bank_squares[None, first : first + _COLUMNS], queries[rows], part.T, alpha=-2).amin(1)
            for first, part in _parts(bank)
        ]
        nearest[rows] = th.stack(blocks).amin(0) + squares[rows]
    return nearest.clamp_(min=0)


def _parts(bank: th.Tensor) -> Iterator[tuple[int, th.Tensor]]:
    return ((first, bank[first : first + _COLUMNS]) for first in range(0, len(bank), _COLUMNS))


@dataclass(frozen=True)
class Moments:
    """How many vectors there are, their sum, [D], and that of their outer products, [D x D], float64: parts add up."""

    count: int
    total: np.ndarray
    products: np.ndarray

    @classmethod
    def of(cls, x: th.Tensor) -> "Moments":
        parts = [part.double() for part in x.split(65536)]
        total, products = sum(part.sum(0) for part in parts), sum(part.T @ part for part in parts)
        return cls(len(x), total.cpu().numpy(), products.cpu().numpy())

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    def whitening(self, like: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """:return: the mean, [D], and the [D x K] matrix that brings every direction to unit variance; see _FLAT."""
        mean = self.total / self.count
        variances, directions = np.linalg.eigh(self.products / self.count - np.outer(mean, mean))
        used = variances > max(_FLAT * variances[-1], 1e-30)
        return th.from_numpy(mean).to(like), th.from_numpy(directions[:, used] / variances[used] ** 0.5).to(like)


@dataclass(frozen=True)
class Memory:
    """
    Real patches in parts, of which any can be left out.

    :param moments: of each part's local features.
    :param banks: [M x D] tensors, each part's coreset, in the order in which it was chosen; not whitened.
    """

    moments: Sequence[Moments]
    banks: Sequence[th.Tensor]

    @classmethod
    def fit(
        cls,
        features: th.Tensor,
        parts: np.ndarray,
        fraction: float = 0.1,
        max_bank: int = 50_000,
        seed: int = 0,
        progress: Callable[[int], None] = lambda chosen: None,
    ) -> "Memory":
        """
        :param features: an [N x P x D] fp32 tensor of real patches' local features.
        :param parts: [N] int64, the part of each patch, 0 to S - 1, none of them empty.
        :param fraction: the share of its vectors that a bank keeps, in (0, 1]; each keeps one at least.
        :param max_bank: the largest size of all banks together, which the parts share by their patches.
        :param seed: of the projection to 128 dimensions.
        """
        moments, banks = [], []
        for part, count in enumerate(bank_sizes(parts, features.shape[1], fraction, max_bank)):
            own = th.from_numpy(parts == part).to(features.device)
            x = features[own].flatten(0, 1)
            moments.append(Moments.of(x))
            mean, whiten = moments[-1].whitening(x)
            chosen = greedy_coreset(projected((x - mean) @ whiten, seed), count, progress)
            banks.append(x[chosen.to(x.device)])
        return cls(moments, banks)

    def without(self, left_out: Collection[int]) -> "PatchCore":
        """:return: the memory of the other parts, of which there must be one: their whitening and their banks."""
        kept = [part for part in range(len(self.banks)) if part not in left_out]
        mean, whiten = sum((self.moments[part] for part in kept[1:]), self.moments[kept[0]]).whitening(self.banks[0])
        # Each bank's first vectors first, as those cover the most: PatchCore.score begins with these.
        place = th.cat([th.arange(len(self.banks[part])) / len(self.banks[part]) for part in kept])
        bank = th.cat([self.banks[part] for part in kept])[place.argsort(stable=True).to(mean.device)]
        return PatchCore(mean, whiten, (bank - mean) @ whiten)


@dataclass(frozen=True)
class PatchCore:
    """
    What patches are compared with.

    :param mean: [D]; whiten: [D x K], what brings a local feature to unit variance in every direction.
    :param bank: [M x K], whitened. All on one device.
    """

    mean: th.Tensor
    whiten: th.Tensor
    bank: th.Tensor

    def _whitened(self, features: th.Tensor) -> th.Tensor:
        return (features - self.mean) @ self.whiten

    def distances(self, features: th.Tensor) -> th.Tensor:
        """:return: of [N x P x D] local features, the [N x P] distances to the nearest of the bank."""
        x = self._whitened(features)
        return squared_distances(x.flatten(0, 1), self.bank).sqrt().view(x.shape[:2])

    def score(self, features: th.Tensor, reweight: bool = False) -> th.Tensor:
        """
        Score images: the largest distance of any place to its nearest bank vector; lower is more like the real ones.

        Exact, though most places are compared with a part of the bank only: distances to that part are upper bounds,
        and a place whose bound is below another's distance cannot be the largest.

        :param features: an [N x P x D] tensor of local features.
        :param reweight: multiply by 1 - softmax over the 9 bank vectors around the nearest one, itself among them
            (equation 7).
        :return: an [N] fp32 tensor.
        """
        x = self._whitened(features)
        images, places, _ = x.shape
        coarse = self.bank[: max(1, len(self.bank) // _COARSE)]
        bounds = squared_distances(x.flatten(0, 1), coarse).view(images, places)
        known = th.full_like(bounds, -1)
        todo = th.zeros_like(bounds, dtype=th.bool)
        todo.scatter_(1, bounds.topk(max(1, places // 16), dim=1).indices, True)
        known[todo] = squared_distances(x[todo], self.bank)
        todo = ~todo & (bounds > known.amax(1, keepdim=True))
        if todo.any():
            known[todo] = squared_distances(x[todo], self.bank)
        farthest = x[th.arange(images, device=x.device), known.argmax(1)]
        return th.cat([self._score_places(part, reweight) for part in farthest.split(256)])

    def _score_places(self, x: th.Tensor, reweight: bool) -> th.Tensor:
        """Distances of [N x K] vectors to their nearest, by differences and not by products: without cancellation."""
        nearest = self.bank[self._closest(x, 1)[:, 0]]
        score = (x - nearest).norm(dim=1)
        if reweight:
            around = self.bank[self._closest(nearest, min(_AROUND, len(self.bank)))]
            far = (x[:, None] - around).norm(dim=2)
            score = score * (1 - (score - far.logsumexp(1)).exp())
        return score

    def _closest(self, x: th.Tensor, count: int) -> th.Tensor:
        """Indices of the `count` nearest bank vectors of each, [N x count]."""
        return (self.bank.square().sum(1) - 2 * x @ self.bank.T).topk(count, dim=1, largest=False).indices


def bank_sizes(parts: np.ndarray, places: int, fraction: float, max_bank: int) -> list[int]:
    """
    :param parts: the part of each patch, and the other parameters, see Memory.fit. :param places: vectors of a patch.
    :return: how many of its vectors each part's bank keeps: that fraction, but at least 1 and at most its share.
    """
    patches = np.bincount(parts).tolist()
    return [max(1, min(int(own * places * fraction), max_bank * own // len(parts))) for own in patches]
