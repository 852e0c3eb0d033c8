"""Parameters in fp32 (master weights), computation in another dtype: the copies that layers compute with, and how
gradients come back to the parameters. Knows no layer's kind."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch as th
from torch import nn

Parts = Sequence[th.Tensor]


class Casting(nn.Module):
    """What layers share that compute in the dtype of their input, with parameters that may be in another."""

    kept: tuple[th.Tensor, ...] | None = None  # see casts_kept

    def sources(self) -> tuple[Parts, ...]:
        """:return: for each operand, the tensors that it is joined of, along the first dimension."""
        return (self.weight,), (self.bias,)

    def operands(self, dtype: th.dtype) -> tuple[th.Tensor, ...]:
        """:return: weight and bias in a dtype, cast anew where casts_kept holds none."""
        if self.kept is not None and self.kept[0].dtype == dtype:
            return self.kept
        return tuple((th.cat(parts) if len(parts) > 1 else parts[0]).to(dtype) for parts in self.sources())


@contextlib.contextmanager
def casts_kept(blocks: Iterable[nn.Module], dtype: th.dtype) -> Iterator[None]:
    """
    Cast all that the Casting layers of some modules compute with, once for a with block, in which it must not change.

    Gradients go to the parameters as ever, once for each backward pass and block: all of a block together, so that
    ranks share them while others are computed.
    """
    layers = []
    try:
        for block in blocks:
            casting = [layer for layer in block.modules() if isinstance(layer, Casting)]
            operands = [parts for layer in casting for parts in layer.sources()]
            sizes = [len(parts) for parts in operands]
            copies = iter(_Copies.apply(dtype, sizes, *(part for parts in operands for part in parts)))
            for layer in casting:
                layer.kept = tuple(next(copies) for _ in layer.sources())
            layers += casting
        yield
    finally:
        for layer in layers:
            del layer.kept


class _Copies(th.autograd.Function):
    """
    Joined copies of tensors in another dtype, made in one pass, as are their gradients.

    It keeps no tensor for the backward pass, so several can go through it: one of each microbatch.
    """

    @staticmethod
    def forward(ctx, dtype: th.dtype, sizes: list[int], *tensors: th.Tensor) -> tuple[th.Tensor, ...]:
        """:param sizes: of how many of the tensors each copy is joined."""
        ctx.set_materialize_grads(False)
        rest = iter(tensors)
        groups = [[next(rest) for _ in range(size)] for size in sizes]
        ctx.rows = [[len(part) for part in parts] for parts in groups]
        ctx.dtype = tensors[0].dtype
        copies = [_empty(parts, dtype) for parts in groups]
        th._foreach_copy_([place for copy, rows in zip(copies, ctx.rows) for place in copy.split(rows)], list(tensors))
        return tuple(copies)

    @staticmethod
    def backward(ctx, *grads: th.Tensor | None) -> tuple[th.Tensor | None, ...]:
        parts = [part for grad, rows in zip(grads, ctx.rows) for part in _split(grad, rows)]
        found = [part for part in parts if part is not None]
        cast = [th.empty_like(part, dtype=ctx.dtype) for part in found]
        if cast:
            th._foreach_copy_(cast, found)
        rest = iter(cast)
        return None, None, *(None if part is None else next(rest) for part in parts)


def _empty(parts: Parts, dtype: th.dtype) -> th.Tensor:
    """A place for what joins the parts, laid out in memory as they are."""
    first = parts[0]
    by_pixel = first.dim() == 4 and first.is_contiguous(memory_format=th.channels_last)
    layout = th.channels_last if by_pixel else th.contiguous_format
    shape = sum(len(part) for part in parts), *first.shape[1:]
    return th.empty(shape, dtype=dtype, device=first.device, memory_format=layout)


def _split(grad: th.Tensor | None, rows: list[int]) -> Sequence[th.Tensor | None]:
    return [None] * len(rows) if grad is None else grad.split(rows)
