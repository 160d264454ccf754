"""The fp64 reference for PyTorch tensors and arrays of other libraries."""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_double
from typing import Any

from . import _arrays, _functional, _interruptible, _lib
from ._call import check_numbers, flat_records
from ._decode_options import DecodeLayerOptions, DecodeOptions
from ._options import OPTIONAL_ARRAYS, REQUIRED_ARRAYS, Options

_NOT_READ = ("out", "final_state", "nonfinite", "workspace", "saved")
_READ = tuple(name for name in REQUIRED_ARRAYS + OPTIONAL_ARRAYS if name not in _NOT_READ)
_DIM = 128


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
    more: dict[str, Any],
) -> tuple[Any, ...]:
    rows = _functional.checkpoint_rows(None, getattr(v, "shape", ()), more)
    given = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias}
    given |= {"initial_state": initial_state, "cu_seqlens": cu_seqlens}
    given |= {name: more.pop(name) for name in OPTIONAL_ARRAYS if name in more and name not in _NOT_READ}
    given = {name: given[name] for name in _READ if given.get(name) is not None or name in REQUIRED_ARRAYS}
    states = given.get("checkpoint_states")
    options, params, shapes, _owners = filled(
        "reference", Options, given, ("checkpoint_states",), scale, lower_bound, more
    )
    if states is not None:
        rows = states.shape[0]

    # C checks that the arrays fit each other before it writes, so results of wrong arrays may have any size.
    borders = shapes["cu_seqlens"] if "cu_seqlens" in shapes else shapes["q"]
    N = max((borders or (0,))[0] - ("cu_seqlens" in shapes), 0)
    heads = shapes["v"][2:3] or (0,)
    out, state = new64(q, shapes["v"]), new64(q, (N, *heads, _DIM, _DIM))
    results = [out, state]
    if rows is not None:
        results.append(new64(q, (rows, *heads, _DIM, _DIM)))
        if states is None:
            _lib.set_shape(params.checkpoint_states, _lib.F32, (rows, *heads, _DIM, _DIM))
    _interruptible.reference(params, *map(pointer_of, results))
    if not options.state_v_first:
        results[1:] = [transposed(x) for x in results[1:]]
    return tuple(results)


def decode_reference(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: Any,
    A_log: Any,
    dt_bias: Any,
    lower_bound: Any,
    state: Any,
    more: dict[str, Any],
) -> tuple[Any, ...]:
    given = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state, "A_log": A_log, "dt_bias": dt_bias}
    given |= {name: more.pop(name) for name in DecodeOptions.optional_arrays if name in more}
    required = DecodeOptions.required_arrays
    given = {name: x for name, x in given.items() if x is not None or name in required}
    options, params, shapes, _owners = filled(
        "decode_reference", DecodeOptions, given, ("records",), scale, lower_bound, more
    )
    heads = shapes["v"][2:3] or (0,)
    tokens = shapes["v"][1:2] if "cu_seqlens" in shapes else shapes["v"][:2]
    results = [new64(q, shapes["v"]), new64(q, (*tokens, *heads, _DIM, _DIM))]
    _interruptible.decode_reference(params, *map(pointer_of, results))
    if not options.state_v_first:
        results[1] = transposed(results[1])
    return tuple(results)


def decode_layer_reference(given: dict[str, Any], more: dict[str, Any]) -> tuple[Any, ...]:
    cls = DecodeLayerOptions
    given |= {name: more.pop(name) for name in cls.optional_arrays if name in more}
    given = {name: x for name, x in given.items() if x is not None or name in cls.required_arrays}
    scale, lower_bound = more.pop("scale", None), more.pop("lower_bound", None)
    more.pop("out", None)
    options, params, shapes, _owners = filled(
        "decode_layer_reference",
        cls,
        given,
        ("records", "conv_windows"),
        _DIM**-0.5 if scale is None else scale,
        lower_bound,
        more,
    )
    results = [new64(given["x"], shapes["g"]), new64(given["x"], (*shapes["g"], _DIM))]
    _interruptible.decode_layer_reference(params, *map(pointer_of, results))
    if not options.state_v_first:
        results[1] = transposed(results[1])
    return tuple(results)


def filled(
    caller: str,
    cls: Any,
    given: dict[str, Any],
    shape_alone: tuple[str, ...],
    scale: Any,
    lower_bound: Any,
    more: dict[str, Any],
) -> tuple[Any, Any, dict[str, tuple[int, ...]], list[Any]]:
    """The options and C's struct of a call with the given arrays, the arrays' shapes, and the owners of their
    memory. shape_alone: the names of arrays that the reference does not read."""
    check_numbers(scale, 0.0 if lower_bound is None else lower_bound)
    unknown = [name for name in more if name not in cls.__dataclass_fields__ or name.startswith("has_")]
    if unknown:
        raise TypeError(f"{caller}() got an unexpected keyword argument {unknown[0]!r}")
    bits = cls.bits_of(*(name for name in given if name in cls.optional_arrays))
    options = cls(bits, **more, has_lower_bound=lower_bound is not None).checked()
    params = cls.function.new_params()
    options.apply_to(params)
    params.kernel = None
    params.scale, params.lower_bound = scale, 0.0 if lower_bound is None else lower_bound
    shapes, owners = {}, []
    for name, x in given.items():
        tensor = getattr(params, name)
        if name in shape_alone:
            _lib.set_shape(tensor, _lib.F32, tuple(x.shape))
            continue
        view, owner = _arrays.read(name, _readable(name, x), None)
        if name == "past_records":
            view = flat_records(name, view)
        owners.append(owner)
        shapes[name] = view.shape
        _lib.set_shape(tensor, view.dtype, view.shape, view.stride)
        tensor.data = view.pointer or _EMPTY
    return options, params, shapes, owners


def pointer_of(result: Any) -> Any:
    """C refuses a null pointer, so an empty result has an address that is never written."""
    return ctypes.cast(_arrays.read("result", result, None)[0].pointer or 8, POINTER(c_double))


_EMPTY = 64  # the address of an empty array, which C would otherwise take for an absent one


def _torch_of(x: Any) -> Any:
    """PyTorch, if x is a tensor of it."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(x, torch.Tensor) else None


def new64(q: Any, shape: tuple[int, ...]) -> Any:
    """Zeros in fp64: a CPU tensor if q is a tensor, else a NumPy array."""
    torch = _torch_of(q)
    if torch is not None:
        return torch.zeros(shape, dtype=torch.float64)
    import numpy

    return numpy.zeros(shape)


def transposed(x: Any) -> Any:
    """States with K before V instead of V before K."""
    if _torch_of(x) is not None:
        return x.mT.contiguous()
    import numpy

    return numpy.ascontiguousarray(x.swapaxes(-1, -2))


def _readable(name: str, x: Any) -> Any:
    """The array, or a copy of it in CPU memory that C can read. Refuses what is no array."""
    if _torch_of(x) is not None:
        from . import _layout

        return _layout.readable(name, x.detach().cpu(), False)
    if _arrays.device_of(name, x)[0] == _lib.CPU:
        return x
    if _arrays.is_jax(x):
        import numpy

        return numpy.asarray(x)
    raise ValueError(f"{name} is not on the CPU; the reference takes arrays in CPU memory")
