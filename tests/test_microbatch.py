"""How many samples fit: which errors mean that memory ran out, by a model that raises them."""

import contextlib

import pytest
import torch as th
from torch import nn

from guided_diffusion.microbatch import largest_microbatch

NO_MEMORY = [
    th.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
]


class Limited(nn.Module):
    """Takes so many samples at once."""

    image_size, in_channels, num_classes = 4, 3, 6
    parameters_cast = contextlib.nullcontext

    def __init__(self, limit, error):
        super().__init__()
        self.w, self.limit, self.error = nn.Parameter(th.ones(1)), limit, error

    def forward(self, x, t, y):
        assert x.shape[1:] == (3, 4, 4) and y.shape[1:] == (6, 4, 4) and len(x) == len(t) == len(y)
        if len(x) > self.limit:
            raise self.error
        return self.w * x


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_the_largest_that_fits(error):
    model = Limited(3, error)
    assert largest_microbatch(model, [8, 4, 2, 1], spare=3) == 2
    assert model.w.grad is None
    with pytest.raises(ValueError, match="not even one sample fits in memory: give --use_checkpoint True"):
        largest_microbatch(Limited(0, error), [8, 4, 2, 1], spare=3)


def test_other_errors_are_errors():
    with pytest.raises(RuntimeError, match="device-side assert"):
        largest_microbatch(Limited(1, RuntimeError("CUDA error: device-side assert triggered")), [2, 1], spare=0)
