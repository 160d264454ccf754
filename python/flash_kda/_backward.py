"""The backward pass of `fwd` for arrays in CPU memory, and its fp64 definition."""

from __future__ import annotations

import ctypes
from ctypes import c_void_p
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import _arrays, _interruptible, _lib, _reference
from ._call_options import (
    CallOptions,
    GateAndBeta,
    count,
    gate_option,
    kernel_option,
    negated_option,
    option,
    threads_option,
)

_DIM = 128


class Gradients(NamedTuple):
    """What `bwd_reference` returns: fp64 arrays in the shapes of the arguments that they belong to."""

    dq: Any
    dk: Any
    dv: Any
    dg: Any
    dbeta: Any
    dA_log: Any
    ddt_bias: Any
    dinitial_state: Any


@dataclass(frozen=True, eq=False)
class BackwardOptions(GateAndBeta, CallOptions):
    """What one call of `bwd` asks for."""

    function = _lib.BWD
    operator = "bwd"
    required_arrays = ("q", "k", "v", "g", "beta")
    optional_arrays = (
        "A_log",
        "dt_bias",
        "initial_state",
        "cu_seqlens",
        "dout",
        "dfinal_state",
        *Gradients._fields,
    )
    written_arrays = Gradients._fields

    kernel: str | None = kernel_option()
    threads: int = threads_option()
    max_seqlen: int = option(0, count(64, "not known", schema="SymInt"))
    use_gate_in_kernel: bool = gate_option(True)
    use_qk_l2norm_in_kernel: bool = negated_option("qk_is_normalised")
    use_beta_sigmoid_in_kernel: bool = gate_option(True)
    allow_neg_eigval: bool = gate_option(False)
    state_v_first: bool = negated_option("state_k_first")
    #: whether lower_bound is a number
    has_lower_bound: bool = True


def _filled(
    caller: str, inputs: dict[str, Any], scale: Any, lower_bound: Any, more: dict[str, Any]
) -> tuple[Any, Any, dict[str, tuple[int, ...]], list[Any]]:
    """As _reference._filled, for the arrays that a call reads."""
    required = BackwardOptions.required_arrays
    given = {name: x for name, x in inputs.items() if x is not None or name in required}
    return _reference._filled(caller, BackwardOptions, given, (), scale, lower_bound, more)


def bwd(
    inputs: dict[str, Any], gradients: dict[str, Any], scale: Any, lower_bound: Any, more: dict[str, Any]
) -> None:
    for name, x in (inputs | gradients).items():
        if x is None:
            continue
        if _arrays.device_of(name, x, BackwardOptions, name in gradients)[0] != _lib.CPU:
            raise ValueError(f"{name} is not on the CPU; the backward pass takes arrays in CPU memory")
    options, params, _shapes, owners = _filled("bwd", inputs, scale, lower_bound, more)
    options.apply_to(params)  # the kernel's name too
    for name, x in gradients.items():
        if x is None:
            continue
        view, owner = _arrays.read(name, x, None, written=True)
        owners.append(owner)
        _lib.set_shape(getattr(params, name), view.dtype, view.shape, view.stride)
        getattr(params, name).data = view.pointer or _reference._EMPTY
    cpu, workspace = _lib.Device(_lib.CPU, 0), c_void_p()
    params.workspace_size = _lib.BWD.workspace_size(params)
    _lib.check(_lib.lib.flash_kda_malloc(cpu, params.workspace_size, ctypes.byref(workspace)))
    try:
        params.workspace = workspace
        _interruptible.bwd(params)
    finally:
        _lib.lib.flash_kda_free(cpu, workspace)


def bwd_reference(inputs: dict[str, Any], scale: Any, lower_bound: Any, more: dict[str, Any]) -> Gradients:
    options, params, shapes, _owners = _filled("bwd_reference", inputs, scale, lower_bound, more)
    # C checks that the arrays fit each other before it writes, so results of wrong arrays may have any size.
    borders = shapes["cu_seqlens"] if "cu_seqlens" in shapes else shapes["q"]
    N = max((borders or (0,))[0] - ("cu_seqlens" in shapes), 0)
    heads = shapes["v"][2:3] or (0,)
    of_results = (
        shapes["q"],
        shapes["k"],
        shapes["v"],
        shapes["g"],
        shapes["beta"],
        heads,
        (*heads, _DIM),
        (N, *heads, _DIM, _DIM),
    )
    results = Gradients(*(_reference._new(inputs["q"], shape) for shape in of_results))
    to = _lib.Gradients64(ctypes.sizeof(_lib.Gradients64), *map(_reference._pointer, results))
    _interruptible.bwd_reference(params, ctypes.byref(to))
    if options.state_v_first:
        return results
    return results._replace(dinitial_state=_reference._transposed(results.dinitial_state))
