"""How many samples fit in a GPU's memory at once, found out by trying. Knows nothing of data or of training."""

import re
from collections.abc import Sequence

import torch as th

from . import dist_util
from .unet import UNetModel

# What CUDA's libraries say when they get no memory; torch itself raises OutOfMemoryError, a RuntimeError, too.
_NO_MEMORY = re.compile("out of memory|ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|unable to find an engine", re.I)


def largest_microbatch(model: UNetModel, sizes: Sequence[int], spare: int) -> int:
    """
    Find the largest number of samples with which a forward and a backward pass fit in memory on all ranks. Collective.

    :param model: on its GPU, with its gradients dropped; they are dropped again.
    :param sizes: the numbers to choose from, falling.
    :param spare: how many tensors of each parameter's size must fit in besides: of the optimiser and the ranks.
    :raises ValueError: where not even the last one fits.
    """
    size = min(dist_util.all_gather(next((size for size in sizes if _fits(model, size, spare)), 0)))
    if not size:
        raise ValueError("--microbatch auto: not even one sample fits in memory: give --use_checkpoint True")
    device = next(model.parameters()).device
    if device.type == "cuda":
        th.cuda.reset_peak_memory_stats(device)  # the log's peak is that of training
    return size


def _fits(model: UNetModel, size: int, spare: int) -> bool:
    device = next(model.parameters()).device
    x, y = ((size, channels, model.image_size, model.image_size) for channels in (model.in_channels, model.num_classes))
    ballast = []
    try:
        ballast = [th.empty_like(p) for p in model.parameters() for _ in range(spare)]
        with model.parameters_cast():
            out = model(th.zeros(x, device=device), th.zeros(size, device=device), y=th.zeros(y, device=device))
            out.float().square().mean().backward()
        ballast += [th.empty_like(p) for p in model.parameters()]  # copies during updates
        return True
    except RuntimeError as error:
        if not _NO_MEMORY.search(str(error)):
            raise
        return False
    finally:
        del ballast
        model.zero_grad(set_to_none=True)
        th.cuda.empty_cache()
