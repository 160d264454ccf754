"""The options of calls of `bwd`, as _options.py has those of `fwd`.

`bwd` passes values in the order of the fields, and arrays in the order of `optional_arrays`.
tests/python/test_backward.py notices a wrong order.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import _lib
from ._call_options import (
    CallOptions,
    GateAndBeta,
    KnownOptions,
    count,
    flag,
    gate_option,
    kernel_option,
    negated_option,
    option,
    option_fields,
    threads_option,
)

#: the gradients that a call may write, in the order of the arguments of `bwd`
GRADIENTS = ("dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias", "dinitial_state")


@dataclass(frozen=True, eq=False)
class BwdOptions(GateAndBeta, CallOptions):
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
        *GRADIENTS,
        "saved",
        "workspace",
    )
    written_arrays = (*GRADIENTS, "workspace")
    operator_head = ("q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias", "lower_bound")
    instead_of_immutable = "pass a NumPy array or a tensor, which the call can write"
    instead_of_tracer = "call it outside of them"

    kernel: str | None = kernel_option()
    threads: int = threads_option()
    max_seqlen: int = option(0, count(64, "not known", schema="SymInt"))  # C checks that it is at most T
    use_gate_in_kernel: bool = gate_option(True)
    use_qk_l2norm_in_kernel: bool = negated_option("qk_is_normalised")
    use_beta_sigmoid_in_kernel: bool = gate_option(True)
    allow_neg_eigval: bool = gate_option(False)
    state_v_first: bool = negated_option("state_k_first")
    batch_invariant: bool = option(False, flag())
    workspace_limit: int = option(0, count(64, "half of the bytes of q, k, v and g"))
    #: whether lower_bound is a number
    has_lower_bound: bool = True


BwdOptions.operator_rest = (
    *(name for name in BwdOptions.optional_arrays if name not in BwdOptions.operator_head),
    *(f.name for f in option_fields(BwdOptions)),
)

BWD = KnownOptions(BwdOptions)
BWD_BIT = {name: BwdOptions.bits_of(name) for name in BwdOptions.optional_arrays}
