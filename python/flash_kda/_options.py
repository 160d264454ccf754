"""The options of a call of `fwd`: what it asks for apart from the contents of its arrays, scale and
lower_bound.

_call_options.py has the machinery. An option is one field of `Options`, and one argument of the operator. To
add an option, change

1. _options.py: one field of `Options`, at the end of those that are options, and another split of
   `OPERATOR_ARGUMENTS`, which puts the option behind the arguments that are there already;
2. _lib.py: the struct's field in `FwdParams`, as include/flash_kda.h has it;
3. __init__.py, `fwd`: the parameter, its lines in the docstring, its default in `is_plain`, and its value
   where `fwd` calls `known_options`; `explain` and _shapes.py likewise if it changes what runs.

To add an optional array, change

1. _options.py: its name at the end of `OPTIONAL_ARRAYS`, and in `WRITTEN_ARRAYS` if the call writes it;
2. _lib.py: the struct's field in `FwdParams`;
3. __init__.py, `fwd`: the parameter, its lines in the docstring, and its place in `is_plain` and in the list
   of arrays behind it.

Order counts in two places: `fwd` passes values to `known_options` in the order of the fields, and appends
arrays in the order of `OPTIONAL_ARRAYS`. tests/python/test_structure.py and test_errors.py notice a wrong
order. The operator's arguments only grow at the end: `OPERATOR_ARGUMENTS` has their order. Each `_GROWN_...`
is a place where arguments of a later version of the operator begin.
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
    count,
    first_slot_option,
    flag,
    gate_option,
    kernel_option,
    negated_option,
    option,
    option_fields,
    threads_option,
)

REQUIRED_ARRAYS = ("q", "k", "v", "g", "beta", "out")
OPTIONAL_ARRAYS = (
    "A_log",
    "dt_bias",
    "initial_state",
    "final_state",
    "cu_seqlens",
    "nonfinite",
    "workspace",
    "state_indices",
    "has_initial_state",
    "checkpoint_states",
    "checkpoint_offsets",
    "checkpoint_indices",
    "checkpoint_starts",
    "saved",
)
WRITTEN_ARRAYS = ("out", "final_state", "nonfinite", "workspace", "checkpoint_states", "saved")


@dataclass(frozen=True, eq=False)
class Options(GateAndBeta, CallOptions):
    """What one call of `fwd` asks for."""

    function = _lib.FWD
    operator = "fwd"
    required_arrays = REQUIRED_ARRAYS
    optional_arrays = OPTIONAL_ARRAYS
    written_arrays = WRITTEN_ARRAYS
    operator_head = ("q", "k", "v", "g", "beta", "scale", "out", "A_log", "dt_bias", "lower_bound")
    instead_of_immutable = "flash_kda.compute returns new arrays instead"
    instead_of_tracer = "call flash_kda.jax.fwd there, or flash_kda.compute outside of them"

    kernel: str | None = kernel_option()
    threads: int = threads_option()
    batch_invariant: bool = option(False, flag())
    max_seqlen: int = option(0, count(64, "not known", schema="SymInt"))  # C checks that it is at most T
    cut: str = option("auto", choice("auto", "never", "always", "mixed"))
    first_slot: int = first_slot_option()
    checkpoint_every: int | None = option(
        None,
        Takes(
            int,
            "an int or None",
            "int?",
            lambda tokens: 0 < tokens < 1 << 63 and tokens % 16 == 0,
            "a multiple of 16 tokens, 16 or more, or None",
            to_c=lambda tokens: tokens or 0,
            or_none=True,
        ),
    )
    use_gate_in_kernel: bool = gate_option(True)
    use_qk_l2norm_in_kernel: bool = negated_option("qk_is_normalised")
    use_beta_sigmoid_in_kernel: bool = gate_option(True)
    allow_neg_eigval: bool = gate_option(False)
    state_v_first: bool = negated_option("state_k_first")
    #: whether lower_bound is a number
    has_lower_bound: bool = True


OPTION_NAMES = tuple(f.name for f in option_fields(Options))
_GROWN_FROM = OPTION_NAMES.index("first_slot"), OPTIONAL_ARRAYS.index("workspace")
_GROWN_LAST = OPTIONAL_ARRAYS.index("saved")
# The arguments of the operator behind lower_bound, in their order. `saved` is the newest. A new option must
# not come before it, so OPTION_NAMES has to be split once more when there is one.
OPERATOR_ARGUMENTS = (
    *OPTIONAL_ARRAYS[OPTIONAL_ARRAYS.index("initial_state") : _GROWN_FROM[1]],
    *OPTION_NAMES[: _GROWN_FROM[0]],
    *OPTIONAL_ARRAYS[_GROWN_FROM[1] : _GROWN_LAST],
    *OPTION_NAMES[_GROWN_FROM[0] :],
    *OPTIONAL_ARRAYS[_GROWN_LAST:],
)

Options.operator_rest = OPERATOR_ARGUMENTS

bits_of = Options.bits_of
BOTH_PARAMETERS = bits_of("A_log", "dt_bias")

FWD = KnownOptions(Options)
cached_options, known_options, defaults_for = FWD.cached, FWD.known, FWD.defaults_for
