"""The fp64 reference for PyTorch tensors and NumPy arrays."""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_double
from typing import Any

from . import _arrays, _lib
from ._plan import check_numbers


def reference(
    q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens
) -> tuple[Any, Any]:
    check_numbers(scale, lower_bound)
    arrays = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias}
    arrays.update(
        (n, x) for n, x in (("initial_state", initial_state), ("cu_seqlens", cu_seqlens)) if x is not None
    )
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(q, torch.Tensor):
        arrays = {
            n: x.detach().cpu().contiguous() if isinstance(x, torch.Tensor) else x for n, x in arrays.items()
        }
        new = lambda shape: torch.empty(shape, dtype=torch.float64)  # noqa: E731
    elif _arrays.is_numpy(q):
        import numpy

        new = numpy.empty
    else:
        raise TypeError(
            f"q is of type {type(q).__name__}; the reference takes PyTorch tensors and NumPy arrays"
        )

    params = _lib.new_params()
    params.scale, params.lower_bound = scale, lower_bound
    views = {}
    for name, x in arrays.items():
        if _arrays.device_of(name, x)[0] != _lib.CPU:
            raise ValueError(f"{name} is not on the CPU; the reference takes arrays in CPU memory")
        views[name] = view = _arrays.read(name, x, None)
        tensor = getattr(params, name)
        _lib.set_shape(tensor, view.dtype, view.shape, view.stride)
        tensor.data = view.pointer
    _lib.set_shape(params.out, _lib.BF16, views["v"].shape)
    _lib.workspace_size(params)  # checks every shape, so that the results can be allocated

    B, _, H, K = views["q"].shape
    N = views["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in views else B
    out, state = new(views["v"].shape), new((N, H, views["v"].shape[3], K))
    pointers = [_arrays.read("result", x, None).pointer or 8 for x in (out, state)]
    _lib.check(
        _lib.lib.flash_kda_reference(
            ctypes.byref(params), *(ctypes.cast(p, POINTER(c_double)) for p in pointers)
        )
    )
    return out, state
