"""The options of calls of `decode`, `decode_layer` and `apply_records`, as _options.py has those of `fwd`.

The functions pass values in the order of the fields, and arrays in the order of `optional_arrays`.
tests/python/test_decode.py and test_decode_layer.py notice a wrong order.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import _lib
from ._call_options import (
    CallOptions,
    GateAndBeta,
    KnownOptions,
    Takes,
    choice,
    first_slot_option,
    gate_option,
    kernel_option,
    negated_option,
    option,
    option_fields,
    threads_option,
)

_COPY = "pass a NumPy array or a tensor that holds a copy of it"


@dataclass(frozen=True, eq=False)
class DecodeOptions(GateAndBeta, CallOptions):
    """What one call of `decode` asks for."""

    function = _lib.DECODE
    operator = "decode"
    required_arrays = ("q", "k", "v", "g", "beta", "out", "state")
    optional_arrays = (
        "A_log",
        "dt_bias",
        "state_indices",
        "num_accepted_tokens",
        "cu_seqlens",
        "parents",
        "records",
        "rounding",
        "written_states",
        "written_indices",
        "past_records",
        "accepted",
    )
    written_arrays = ("out", "state", "records", "written_states")
    operator_head = ("q", "k", "v", "g", "beta", "scale", "out", "A_log", "dt_bias", "lower_bound", "state")
    instead_of_immutable = _COPY
    instead_of_tracer = "call flash_kda.jax.decode there, or decode outside of them"

    first_slot: int = first_slot_option()
    write_states: str = option("last", choice("last", "none", "each"))
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
class DecodeLayerOptions(GateAndBeta, CallOptions):
    """What one call of `decode_layer` asks for."""

    function = _lib.DECODE_LAYER
    operator = "decode_layer"
    required_arrays = ("x", "weight", "conv_state", "g", "beta", "out", "state")
    optional_arrays = (
        "bias",
        "A_log",
        "dt_bias",
        "state_indices",
        "output_gate",
        "norm_weight",
        "num_accepted_tokens",
        "cu_seqlens",
        "records",
        "conv_windows",
        "rounding",
        "written_states",
        "written_indices",
    )
    written_arrays = ("conv_state", "out", "state", "records", "conv_windows", "written_states")
    operator_head = (
        "x", "weight", "bias", "conv_state", "g", "beta", "A_log", "dt_bias", "state_indices", "state", "out",
        "scale", "lower_bound",
    )  # fmt: skip
    instead_of_immutable = _COPY
    instead_of_tracer = "call it outside of them"

    norm_eps: float = option(1e-5, Takes((int, float), "a number", "float"))
    first_slot: int = first_slot_option()
    write_states: str = option("last", choice("last", "none", "each"))
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
class ApplyOptions(CallOptions):
    """What one call of `apply_records` asks for."""

    function = _lib.APPLY
    operator = "apply_records"
    required_arrays = ("records", "num_accepted_tokens", "state")
    optional_arrays = ("accepted", "state_indices", "rounding")
    written_arrays = ("state",)
    operator_head = required_arrays
    instead_of_immutable = _COPY
    instead_of_tracer = "call it outside of them"

    first_slot: int = first_slot_option()
    kernel: str | None = kernel_option()
    threads: int = threads_option()
    state_v_first: bool = negated_option("state_k_first")


for _cls in (DecodeOptions, DecodeLayerOptions, ApplyOptions):
    _cls.operator_rest = (
        *(name for name in _cls.optional_arrays if name not in _cls.operator_head),
        *(f.name for f in option_fields(_cls)),
    )

DECODE = KnownOptions(DecodeOptions)
DECODE_LAYER = KnownOptions(DecodeLayerOptions)
APPLY = KnownOptions(ApplyOptions)
