"""The fp64 reference for PyTorch tensors and arrays of other libraries."""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_double
from typing import Any

from . import _arrays, _interruptible, _lib
from ._call import check_numbers


def reference(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: Any,
    A_log: Any,
    dt_bias: Any,
    lower_bound: Any,
    initial_state: Any,
    cu_seqlens: Any,
) -> tuple[Any, Any]:
    check_numbers(scale, lower_bound)
    arrays = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias}
    if initial_state is not None:
        arrays["initial_state"] = initial_state
    if cu_seqlens is not None:
        arrays["cu_seqlens"] = cu_seqlens
    arrays = {name: _in_cpu_memory(name, x) for name, x in arrays.items()}
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(q, torch.Tensor):
        from . import _layout

        heads, channels = q.shape[2:] if q.ndim == 4 else (0, 0)
        arrays = {
            name: _layout.readable(name, x, heads, channels) if isinstance(x, torch.Tensor) else x
            for name, x in arrays.items()
        }
        new = lambda shape: torch.empty(shape, dtype=torch.float64)  # noqa: E731
    else:
        import numpy

        new = numpy.empty

    params = _lib.new_params()
    params.scale, params.lower_bound = scale, lower_bound
    shapes, owners = {}, []
    for name, x in arrays.items():
        view, owner = _arrays.read(name, x, None)
        owners.append(owner)  # keeps the memory alive until this function returns
        shapes[name] = view.shape
        tensor = getattr(params, name)
        _lib.set_shape(tensor, view.dtype, view.shape, view.stride)
        tensor.data = view.pointer
    _lib.set_shape(params.out, _lib.BF16, shapes["v"])
    _lib.workspace_size(params)  # checks every shape, so that the results can be allocated

    B, _, H, K = shapes["q"]
    N = shapes["cu_seqlens"][0] - 1 if "cu_seqlens" in shapes else B
    out, state = new(shapes["v"]), new((N, H, shapes["v"][3], K))
    # C refuses a null pointer, so an empty result has an address that is never written.
    out_pointer, state_pointer = (_arrays.read("result", x, None)[0].pointer or 8 for x in (out, state))
    _interruptible.reference(
        params,
        ctypes.cast(out_pointer, POINTER(c_double)),
        ctypes.cast(state_pointer, POINTER(c_double)),
    )
    return out, state


def _in_cpu_memory(name: str, x: Any) -> Any:
    """The array, or a copy of it in CPU memory. Refuses what is no array."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return x.detach().cpu().contiguous()
    if _arrays.device_of(name, x)[0] == _lib.CPU:
        return x
    if _arrays.is_jax(x):
        import numpy

        return numpy.asarray(x)
    raise ValueError(f"{name} is not on the CPU; the reference takes arrays in CPU memory")
