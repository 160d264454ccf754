"""Brings PyTorch's tensors into the shapes, dtypes and layouts that the C library takes.

Engines hand over views and conversions that the C library refuses: slices of one buffer that holds q, k and
v, gates and write strengths in fp32, and the gate's parameters in the shapes of their layers. Tensors that C
takes as they are pass unchanged. The docstring of `fwd` lists what is copied or converted.
"""

from __future__ import annotations

from typing import Any

import torch

from ._options import WRITTEN_ARRAYS

_GATE_PARAMETERS = ("A_log", "dt_bias")
_BF16_ALONE = ("g", "beta")
_16_BITS = (torch.bfloat16, torch.float16)


def _without_ones(shape: Any) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def has_gate_shape(name: str, shape: Any, heads: int, channels: int) -> bool:
    """Whether a parameter of the gate is [H] (A_log), [H, K] or [H K] (dt_bias), apart from dimensions of
    size 1. Other shapes with as many elements, [K, H] say, would be misread."""
    can_be = ((heads,),) if name == "A_log" else ((heads, channels), (heads * channels,))
    return _without_ones(shape) in map(_without_ones, can_be)


def taken_as(name: str, dtype: Any, shape: tuple, heads: int, channels: int) -> tuple[Any, tuple]:
    """The dtype and shape that a tensor has when C takes it. What is wrong stays wrong, so that C refuses
    it."""
    if name in _GATE_PARAMETERS:
        if dtype in _16_BITS:
            dtype = torch.float32
        if has_gate_shape(name, shape, heads, channels):
            shape = (heads,) if name == "A_log" else (heads, channels)
    elif name in _BF16_ALONE and dtype is torch.float32:
        dtype = torch.bfloat16
    return dtype, shape


def readable(name: str, t: Any, heads: int, channels: int) -> Any:
    """A tensor that the call reads, as C takes it."""
    dtype, shape = taken_as(name, t.dtype, t.shape, heads, channels)
    if t.dtype is not dtype:
        t = t.to(dtype)
    if t.shape != shape:
        t = t.reshape(shape)
    return t.contiguous()


def _has_own_elements(t: Any) -> bool:
    """Whether no dimension repeats its elements, as those of expand() do. Repeated ones cannot be written."""
    return all(step or size <= 1 for size, step in zip(t.shape, t.stride()))


def for_c(names: tuple[str, ...], tensors: list) -> tuple[list, list[tuple[Any, Any]]]:
    """The tensors of a call as C takes them, and what is left to do after the call: pairs of a tensor that
    the caller wants written and the contiguous one that the call writes instead."""
    if any(t.layout is not torch.strided for t in tensors) or tensors[0].ndim != 4:
        return tensors, []  # a sparse tensor, say, which is refused later
    heads, channels = tensors[0].shape[2:]
    taken, copies = [], []
    for name, t in zip(names, tensors):
        if name not in WRITTEN_ARRAYS:
            taken.append(readable(name, t, heads, channels))
        elif t.is_contiguous() or not _has_own_elements(t):
            taken.append(t)
        else:
            taken.append(torch.empty_like(t, memory_format=torch.contiguous_format))
            copies.append((t, taken[-1]))
    return taken, copies
