"""A GPU that is none: its tensors refuse the company of the host's, as a real one's do; the CPU computes.

So a tensor that is made on the wrong device is found on a machine without a GPU. Importing it gives the
process a device `pretend:0`, which other tests must not see: `test_gpu.py` runs `on_pretend_gpu.py` in a
process of its own. With PREFIXTUNE_TEST_GPU=cuda it is a real one, and nothing pretends.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["GPU", "IS_REAL", "moved", "on_gpu"]

IS_REAL = os.environ.get("PREFIXTUNE_TEST_GPU") == "cuda"
if not IS_REAL:  # beside a real one the other takes its place, in autograd and where memory is pinned
    _setup_privateuseone_for_python_backend("pretend")
    MODULE: Any = torch.get_device_module("pretend")
    MODULE.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    MODULE.get_rng_state = lambda device=None: torch.get_rng_state()
    MODULE.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
GPU, HOST = torch.device("cuda" if IS_REAL else "pretend", 0), torch.device("cpu")

aten = torch.ops.aten
TAKES_BOTH = {  # from one device to the other, or an index of the host
    aten._to_copy.default,
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
}


class OnGpu(Tensor):
    """A tensor of the device, with its numbers in `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=GPU,
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def is_cuda(self) -> bool:  # the code takes a GPU's ways
        return True

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.inner!r})"


class PretendGpu(TorchDispatchMode):
    """Within it tensors can be made on the device; of the thread that enters it."""

    def __enter__(self) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) moves by way of the mode
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def on_gpu() -> AbstractContextManager[Any]:
    """Within it tensors can be made on the device."""
    return nullcontext() if IS_REAL else PretendGpu()


def moved(model: nn.Module) -> Any:
    """The model with its weights on the device, tied ones still tied."""
    if IS_REAL:
        return model.to(GPU)
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                there = nn.Parameter(OnGpu(tensor.detach()), requires_grad=tensor.requires_grad)
                module._parameters[name] = known.setdefault(id(tensor), there)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnGpu(buffer)
    return model


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    here = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.dim() > 0]
    first_is_there = isinstance(args[0], OnGpu) if args else False
    if there and here and (func not in TAKES_BOTH or ("index" in func.name() and not first_is_there)):
        raise RuntimeError(f"{func}: tensors on {GPU} and on {HOST}")
    asked = kwargs.get("device")
    if asked is not None:
        is_there = torch.device(asked).type == GPU.type
        kwargs = {**kwargs, "device": HOST if is_there else asked}
    else:
        is_there = first_is_there if func is aten.copy_.default else bool(there)
    bare, named = tree_map_only(OnGpu, lambda tensor: tensor.inner, (args, kwargs))
    found = func(*bare, **named)
    if not is_there:
        return found
    found = tree_map_only(Tensor, OnGpu, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if there else found
