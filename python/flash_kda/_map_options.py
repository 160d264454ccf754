"""The options of calls of `affine_map` and `join_maps`, as _options.py has those of `fwd`."""

from __future__ import annotations

from dataclasses import dataclass

from . import _lib
from ._call_options import (
    CallOptions,
    GateAndBeta,
    KnownOptions,
    flag,
    gate_option,
    kernel_option,
    negated_option,
    option,
    option_fields,
    threads_option,
)

_NEW_ARRAY = "pass a NumPy array or a tensor, which the call can write"


@dataclass(frozen=True, eq=False)
class MapOptions(GateAndBeta, CallOptions):
    """What one call of `affine_map` asks for."""

    function = _lib.MAP
    operator = "affine_map"
    required_arrays = ("k", "v", "g", "beta")
    optional_arrays = ("A_log", "dt_bias", "initial_state", "cu_seqlens", "map", "state", "workspace")
    written_arrays = ("map", "state", "workspace")
    operator_head = ("k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound")
    instead_of_immutable = _NEW_ARRAY
    instead_of_tracer = "call it outside of them"

    kernel: str | None = kernel_option()
    threads: int = threads_option()
    use_gate_in_kernel: bool = gate_option(True)
    use_qk_l2norm_in_kernel: bool = negated_option("qk_is_normalised")
    use_beta_sigmoid_in_kernel: bool = gate_option(True)
    allow_neg_eigval: bool = gate_option(False)
    state_v_first: bool = negated_option("state_k_first")
    #: whether lower_bound is a number
    has_lower_bound: bool = True


@dataclass(frozen=True, eq=False)
class JoinOptions(CallOptions):
    """What one call of `join_maps` asks for."""

    function = _lib.JOIN
    operator = "join_maps"
    required_arrays = ("maps", "states")
    optional_arrays = ("initial_state", "entering", "final_state")
    written_arrays = ("entering", "final_state")
    operator_head = required_arrays
    instead_of_immutable = _NEW_ARRAY
    instead_of_tracer = "call it outside of them"

    kernel: str | None = kernel_option()
    threads: int = threads_option()
    backwards: bool = option(False, flag())
    state_v_first: bool = negated_option("state_k_first")


for _cls in (MapOptions, JoinOptions):
    _cls.operator_rest = (
        *(name for name in _cls.optional_arrays if name not in _cls.operator_head),
        *(f.name for f in option_fields(_cls)),
    )

MAP = KnownOptions(MapOptions)
JOIN = KnownOptions(JoinOptions)
