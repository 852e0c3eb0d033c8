"""
A GPU that computes nothing: tensors that say they are on one, which show launches, waits and mixed devices.

It is torch's FakeTensorMode, which refuses tensors of two devices in one operator. What that lacks where torch was
built for CPUs alone is made up for here, and only here: to torch's C++ the tensors are of its device "meta", to Python
they are on the GPU.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch as th
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = th.device("cuda", 0)
MEMORY = 80 * 2**30  # bytes, all free
_Generator, _make_subclass = th.Generator, th.Tensor._make_subclass
_aten = th.ops.aten
# What computes nothing on a GPU, besides views of what is there: memory, and marks for a profiler.
_NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view"}
_NO_LAUNCH |= {"_record_function_enter_new", "_record_function_exit"}


class _Mode(FakeTensorMode):
    """Takes for the GPU's what torch's C++ makes like a tensor there."""

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == th.device("meta"):
            kwargs["device"] = GPU
        return super().dispatch(func, types, args, kwargs)


def _as_meta(cls, data, requires_grad=False, **options):
    return _make_subclass(cls, data, requires_grad, **({} if issubclass(cls, FakeTensor) else options))


def _attention(q, k, v):
    """By the kernel that a GPU has for it."""
    if q.dtype == th.float32:
        return _aten._scaled_dot_product_efficient_attention(q, k, v, None, q.requires_grad)[0]
    return _aten._scaled_dot_product_flash_attention(q, k, v)[0]


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """In a with block, tensors compute nothing, and can be made on the device GPU."""
    mode = _Mode(allow_non_fake_inputs=True)
    with (
        mock.patch.object(th.Tensor, "_make_subclass", staticmethod(_as_meta)),
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
        mock.patch.object(th, "Generator", lambda device="cpu": _Generator()),
        mock.patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True),
        mock.patch("torch.random.fork_rng", lambda *_, **__: contextlib.nullcontext()),
        mock.patch("torch.cuda.mem_get_info", lambda device: (MEMORY, MEMORY)),
        mock.patch("torch.cuda.reset_peak_memory_stats", lambda device: None),
        mode,
    ):
        yield


def _in_memory(leaf: object) -> bool:
    """Of an operator's arguments: whether it is a tensor of more than a value, which the CPU hands over by itself."""
    return th.is_tensor(leaf) and leaf.dim() > 0


class Launches(TorchDispatchMode):
    """Counts, by operator, what a GPU would be given to compute; a foreach operator is one."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        moved = name != "_to_copy" or (out.dtype, out.device) != (args[0].dtype, args[0].device)
        if not func.is_view and name not in _NO_LAUNCH and moved:
            self.counts[name] += 1
        return out


class Waits(TorchDispatchMode):
    """
    Lists, by operator, what would have a program wait for the GPU: reading a value, and copies between devices but for
    those that are said not to. A value that is read is 1; what makes tensors as large as values say is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].device == GPU:
            self.found.append(name)
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **kwargs)
        if name == "_to_copy":
            waits = out.device != args[0].device and not kwargs.get("non_blocking")
        elif name == "copy_":
            waits = args[0].device != args[1].device and not (args[2:] == (True,) or kwargs.get("non_blocking"))
        else:
            # Such as a tensor that is indexed by one in the CPU's memory.
            waits = len({tensor.device for tensor in tree_leaves((args, kwargs)) if _in_memory(tensor)}) > 1
        if waits:
            self.found.append(name)
        return out
