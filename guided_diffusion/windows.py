"""Fields: images of any size, sampled by overlapping windows of the one size that a model knows. At every step the
windows' predictions are blended with smooth weights, so that no window ends anywhere. Knows where windows lie and what
samplers ask of a denoiser; nothing of models, conditions or files.

The idea is MultiDiffusion's (Bar-Tal et al. 2023), with weights that fall to nothing at a window's border."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch as th

from .samplers import Denoised, Denoiser

# Of [N x C x size x size] windows of x_t, the number of the step, and which of the batches of windows they are.
WindowDenoiser = Callable[[th.Tensor, int, int], Denoised]


def starts(length: int, size: int, overlap: float) -> list[int]:
    """
    Say where windows begin along one side of a field.

    :param length: of the side, in pixels, at least size.
    :param size: of a window.
    :param overlap: the least share of a window that the next one covers, in [0, 1).
    :return: as few places as that takes, evenly spaced: the first window begins where the side does, the last ends so.
    """
    stride = max(1, round(size * (1 - overlap)))
    count = 1 - (size - length) // stride
    return np.rint(np.linspace(0, length - size, count)).astype(int).tolist()


def tiles(shape: tuple[int, int], size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """
    :param shape: height and width of an image; size: those of the tiles, no larger.
    :return: the rows and columns of as few tiles as cover it, evenly spaced.
    """
    sides = [[slice(place, place + own) for place in starts(length, own, 0.0)] for length, own in zip(shape, size)]
    return list(itertools.product(*sides))


def count_windows(height: int, width: int, size: int, overlap: float) -> int:
    """:return: how many windows a field has; parameters as starts'."""
    return len(starts(height, size, overlap)) * len(starts(width, size, overlap))


def _weights(places: Sequence[int], size: int) -> list[th.Tensor]:
    """
    The share that each window along a side has in its pixels, [size] fp32: a squared sine over the sum of all windows'.

    These sum to 1 at each pixel; where a window is alone, as in a field of one window, its share is 1 exactly.
    """
    rise = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    total = np.zeros(places[-1] + size)
    for place in places:
        total[place : place + size] += rise
    return [th.from_numpy(rise / total[place : place + size]).float() for place in places]


@dataclasses.dataclass(frozen=True)
class Window:
    """
    A square of one of several fields.

    :param field: its number.
    :param rows: which of the field's; so are columns.
    :param row_weights: [size] fp32; so are column_weights. A pixel's weight is the product of its row's and column's.
    """

    field: int
    rows: slice
    columns: slice
    row_weights: th.Tensor
    column_weights: th.Tensor


class Fields:
    """
    Fields of one or several sizes as one tensor, [C x P] with P their pixels, as samplers step it; and their windows.

    :param shapes: height and width of each field, at least size.
    :param size: height and width of a window.
    :param overlap: see starts.
    :param batch_size: windows that are denoised at once, of whichever fields.
    :param device: where the fields are.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        size: int,
        overlap: float,
        batch_size: int,
        device: th.device | str = "cpu",
    ) -> None:
        self.shapes = list(shapes)
        self.size, self.device = size, device
        windows = [w for number, shape in enumerate(shapes) for w in _windows(number, shape, size, overlap, device)]
        self.batches = [windows[first : first + batch_size] for first in range(0, len(windows), batch_size)]

    def join(self, fields: Sequence[th.Tensor]) -> th.Tensor:
        """:return: [C x H x W] tensors of these shapes as one, [C x P]."""
        return th.cat([field.flatten(1) for field in fields], dim=1)

    def split(self, x: th.Tensor) -> list[th.Tensor]:
        """:return: views of a [C x P] tensor as its fields, [C x H x W]."""
        parts = x.split([height * width for height, width in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes)]

    def cut(self, fields: Sequence[th.Tensor], batch: int) -> th.Tensor:
        """:return: one batch of windows of [C x H x W] fields, [N x C x size x size]."""
        return th.stack([fields[w.field][:, w.rows, w.columns] for w in self.batches[batch]])

    def blended(self, denoise: WindowDenoiser) -> Denoiser:
        """
        Wrap a denoiser of windows, so that it is one of the fields.

        :param denoise: what it says of one window may not depend on the others that it is shown.
        :return: a denoiser of [C x P] tensors. Windows are added up in one order, whatever the size of the batches.
        """

        def denoiser(x: th.Tensor, i: int) -> Denoised:
            fields = self.split(x)
            sums = {part.name: th.zeros_like(x) for part in dataclasses.fields(Denoised)}
            for batch in range(len(self.batches)):
                out = denoise(self.cut(fields, batch), i, batch)
                weights = self._batch_weights(batch)
                for name, total in sums.items():
                    self._add(total, batch, getattr(out, name) * weights)
            return Denoised(**sums)

        return denoiser

    def _batch_weights(self, batch: int) -> th.Tensor:
        rows, columns = (
            th.stack([getattr(w, f"{side}_weights") for w in self.batches[batch]]) for side in ("row", "column")
        )
        return rows[:, None, :, None] * columns[:, None, None, :]

    def _add(self, total: th.Tensor, batch: int, windows: th.Tensor) -> None:
        fields = self.split(total)
        for w, window in zip(self.batches[batch], windows):
            fields[w.field][:, w.rows, w.columns] += window


def _windows(field: int, shape: tuple[int, int], size: int, overlap: float, device: th.device | str) -> list[Window]:
    """The windows of one field, row by row."""
    rows, columns = (_along(length, size, overlap, device) for length in shape)
    return [
        Window(field, row, column, row_weights, column_weights)
        for row, row_weights in rows
        for column, column_weights in columns
    ]


def _along(length: int, size: int, overlap: float, device: th.device | str) -> list[tuple[slice, th.Tensor]]:
    """Where the windows along a side are, and their weights there."""
    places = starts(length, size, overlap)
    weights = (w.to(device) for w in _weights(places, size))
    return [(slice(place, place + size), own) for place, own in zip(places, weights)]
