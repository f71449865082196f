"""Counts the bytes of live tensors while code runs on tensors without data. Knows no model and no training.

Fake tensors have a device, a shape and a storage with a size, and no memory: the code takes the same path as
on real ones, kernels' choices included, and what autograd keeps alive can be counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["LiveBytes", "fake_copy_in_place"]

aten = torch.ops.aten
REAL_LIMIT = 2**20  # floats computed from ids and masks stay real up to this many bytes


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block: floating-point tensors have no data, and every storage counts as long as it lives.

    Ids, masks, positions and labels stay real, so that code that asks them (is there padding? which tokens
    are targets?) gets the true answer. Where code asks for a number that does not exist (is this loss
    finite?), the answer is 1.

    Args:
        kinds: name of a kind → whether a tensor is of it, asked when its storage first appears; the first
            that says yes has it, and the others are `rest`.

    Attributes:
        live, peak: bytes now, and at most since the last `restart`.
        live_of, peak_of: the same by kind; `peak_of` is the state at the peak.

    Example:
        >>> with LiveBytes() as bytes_:
        ...     y = torch.zeros(1000, 1000) * 2
        >>> bytes_.peak
        8000000
    """

    def __init__(self, kinds: dict[str, Callable[[Tensor], bool]] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.kinds = kinds or {}
        self.live = self.peak = 0
        self.live_of: Counter[str] = Counter()
        self.peak_of: Counter[str] = Counter()
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart(self) -> None:
        """Forget the peak so far: it is what is live now."""
        self.peak, self.peak_of = self.live, Counter(self.live_of)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func is aten._local_scalar_dense.default:
                return 1.0 if tensors[0].is_floating_point() else 1
            if func is aten._grouped_mm.default and args[1].dim() == 3:
                # [S, in] by experts [E, in, out]; torch's shape rule for it takes bfloat16 only
                result = args[0].new_empty(args[0].shape[0], args[1].shape[2])
            else:
                result = func(*_by_index(func, args), **kwargs)
        elif not tensors:
            with self.fake:
                result = func(*args, **kwargs)
            if any(isinstance(leaf, Tensor) and not leaf.is_floating_point() for leaf in tree_leaves(result)):
                result = func(*args, **kwargs)
        else:
            result = tree_map_only(Tensor, self._without_data, func(*args, **kwargs))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return result

    def _without_data(self, tensor: Tensor) -> Tensor:
        large = tensor.is_floating_point() and tensor.untyped_storage().nbytes() > REAL_LIMIT
        return self.fake.from_tensor(tensor) if large and not isinstance(tensor, FakeTensor) else tensor

    def count(self, tensor: Tensor) -> None:
        """Count the tensor's storage until nothing holds it any more; meta tensors are not counted."""
        if tensor.is_meta and not isinstance(tensor, FakeTensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        kind = next((name for name, belongs in self.kinds.items() if belongs(tensor)), "rest")

        def gone(_: object) -> None:
            del self._known[key]
            self.live -= size
            self.live_of[kind] -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.live_of[kind] += size
        if self.live > self.peak:
            self.restart()


def _by_index(func: Any, args: Any) -> Any:
    """x[mask] with a real mask as x[where the mask is set], whose shape is known without x's data."""
    if func not in _INDEXED:
        return args
    indices: list[Tensor | None] = []
    for index in args[1]:
        masked = index is not None and index.dtype in (torch.bool, torch.uint8)
        if masked and not isinstance(index, FakeTensor):
            indices += list(index.nonzero(as_tuple=True))
        else:
            indices.append(index)
    return (args[0], indices, *args[2:])


_INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


def fake_copy_in_place(module: nn.Module, tracker: LiveBytes, *, device: str, dtype: torch.dtype) -> None:
    """Replace each parameter and buffer by one without data on `device`; those without gradient get `dtype`.

    Shared parameters stay shared. Buffers keep their precision, as they do when a model is loaded.
    """
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        held: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in held:
            for name, tensor in list(tensors.items()):
                if tensor is None:
                    continue
                if id(tensor) not in copies:
                    copies[id(tensor)] = _fake(tensor, tracker, device, dtype)
                tensors[name] = copies[id(tensor)]


def _fake(tensor: Tensor, tracker: LiveBytes, device: str, dtype: torch.dtype) -> Tensor:
    frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad and tensor.is_floating_point()
    with tracker.fake:
        copy = torch.empty(tensor.shape, dtype=dtype if frozen else tensor.dtype, device=device)
    tracker.count(copy)
    return (
        nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    )
