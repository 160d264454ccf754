"""Brings PyTorch's tensors into the dtypes and layouts that the C library takes.

Engines hand over views: slices of one buffer that holds q, k and v, columns of a projection, states that
share pages with others, and the gate's parameters in the shapes of their layers. C takes most of them as they
are. A tensor is copied only where C refuses it: its last dimension has gaps, or on a GPU one of its strides
or its address is no multiple of 16 bytes. The docstring of `fwd` lists what is copied or converted.
"""

from __future__ import annotations

from typing import Any

import torch

from ._backward_options import BwdOptions
from ._decode_options import DecodeLayerOptions, DecodeOptions
from ._map_options import JoinOptions, MapOptions
from ._options import WRITTEN_ARRAYS

_GATE_PARAMETERS = ("A_log", "dt_bias")
_16_BITS = (torch.bfloat16, torch.float16)
_WRITTEN = {
    *WRITTEN_ARRAYS,
    *DecodeOptions.written_arrays,
    *DecodeLayerOptions.written_arrays,
    *BwdOptions.written_arrays,
    *MapOptions.written_arrays,
    *JoinOptions.written_arrays,
}
# How a tensor may lie in memory, as src/check.c, src/check_bwd.c, src/check_map.c and src/check_decode.c have
# it. All others are contiguous.
_ROWS = ("q", "k", "v", "g", "out", "dq", "dk", "dv", "dg", "dout")  # the last dimension is contiguous
_FREE = ("beta", "dbeta")
# Of decode_layer, which reads and writes all but the states element by element.
_ELEMENT_ROWS = ("x", "g", "out", "output_gate")
_ELEMENT_FREE = ("weight", "beta", "conv_state", "conv_windows")
# All but the first dimension are contiguous.
_SLOTS = (
    "initial_state", "final_state", "checkpoint_states", "state", "written_states", "dinitial_state",
    "dfinal_state", "map", "maps", "states", "entering",
)  # fmt: skip
# Pools, of which a call needs few slots, and what it writes in part.
_NEVER_COPIED = (
    "workspace", "saved", "checkpoint_states", "state", "written_states", "records", "past_records",
    "conv_state", "conv_windows",
)  # fmt: skip
_ALIGNED = ("dt_bias", "ddt_bias")  # to _UNIT too
_UNIT = 16  # bytes, of which addresses are multiples, and on a GPU strides
_MOST_STRIDE = 2**31 - 1  # elements, on a GPU


def taken_as(name: str, dtype: Any, shape: tuple) -> tuple[Any, tuple]:
    """The dtype and shape that a tensor has when C takes it. What is wrong stays wrong, so that C refuses
    it."""
    if name in _GATE_PARAMETERS:
        if dtype in _16_BITS:
            dtype = torch.float32
        if len(shape) > 4:  # C counts elements, but of four dimensions at most
            shape = tuple(size for size in shape if size != 1)
    return dtype, shape


def _strides_fit(name: str, t: Any, on_gpu: bool) -> bool:
    """Whether C takes the strides of a tensor that is not contiguous."""
    shape, strides = t.shape, t.stride()
    if name in _FREE:
        return True
    if name in _ROWS:
        free = len(shape) - 1
    elif name in _SLOTS and len(shape) > 1 and shape[0] and t[0].is_contiguous():
        free = 1
    else:
        return False
    if name in _ROWS and shape[-1] > 1 and strides[-1] != 1:
        return False
    if not on_gpu:
        return True
    unit = _UNIT // t.element_size()
    return all(
        size < 2 or (step % unit == 0 and (name in _SLOTS or step <= _MOST_STRIDE))
        for size, step in zip(shape[:free], strides)
    )


def _fits(name: str, t: Any, on_gpu: bool, by_element: bool) -> bool:
    """Whether C takes the tensor's memory as it is. by_element: in a call of decode_layer."""
    if by_element and name not in _SLOTS:
        if t.is_contiguous() or name in _ELEMENT_FREE:
            return True
        return name in _ELEMENT_ROWS and (t.shape[-1] < 2 or t.stride(-1) == 1)
    if (name in _ROWS or name in _SLOTS or name in _ALIGNED) and t.data_ptr() % _UNIT:
        return False
    return t.is_contiguous() or _strides_fit(name, t, on_gpu)


def _by_element(names: tuple[str, ...]) -> bool:
    return "conv_state" in names


def readable(name: str, t: Any, on_gpu: bool, by_element: bool = False) -> Any:
    """A tensor that the call reads, as C takes it."""
    dtype, shape = taken_as(name, t.dtype, t.shape)
    if t.dtype is not dtype:
        t = t.to(dtype)
    if t.shape != shape:
        t = t.reshape(shape)
    return t if _fits(name, t, on_gpu, by_element) else t.clone(memory_format=torch.contiguous_format)


def _has_own_elements(t: Any) -> bool:
    """Whether no dimension repeats its elements, as those of expand() do. Repeated ones cannot be written."""
    return all(step or size <= 1 for size, step in zip(t.shape, t.stride()))


def _is_copied(name: str, names: tuple[str, ...], t: Any, on_gpu: bool) -> bool:
    """Whether the call goes through a copy of the tensor."""
    if name in _NEVER_COPIED or (name in _SLOTS and "state_indices" in names):
        return False
    return not _fits(name, t, on_gpu, _by_element(names)) and (name not in _WRITTEN or _has_own_elements(t))


def must_copy(names: tuple[str, ...], tensors: list, on_gpu: bool) -> bool:
    """Whether for_c would copy a tensor."""
    return any(_is_copied(name, names, t, on_gpu) for name, t in zip(names, tensors))


def for_c(names: tuple[str, ...], tensors: list, on_gpu: bool) -> tuple[list, list[tuple[Any, Any]]]:
    """The tensors of a call as C takes them, and what is left to do after the call: pairs of a tensor that
    the caller wants written and the contiguous one that the call writes instead."""
    if any(t.layout is not torch.strided for t in tensors):
        return tensors, []  # a sparse tensor, say, which is refused later
    taken, copies = [], []
    for name, t in zip(names, tensors):
        if name in _GATE_PARAMETERS or (name not in _WRITTEN and _is_copied(name, names, t, on_gpu)):
            taken.append(readable(name, t, on_gpu, _by_element(names)))
        elif name in _WRITTEN and _is_copied(name, names, t, on_gpu):
            taken.append(torch.empty_like(t, memory_format=torch.contiguous_format))
            copies.append((t, taken[-1]))
        else:
            taken.append(t)
    return taken, copies
