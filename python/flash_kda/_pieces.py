"""Sequences in pieces: `affine_map` says what a piece does to a state, `join_maps` joins pieces, and
`affine_map_reference` is the definition of the first in fp64. distributed.py is made of them."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any

from . import _lib, _reference
from ._map_options import JOIN, MAP, MapOptions

if TYPE_CHECKING:
    from typing import SupportsFloat

_DIM = 128


def affine_map(
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    A_log: Any,
    dt_bias: Any,
    lower_bound: SupportsFloat | None,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    *,
    map: Any = None,
    state: Any = None,
    workspace: Any = None,
    kernel: str | None = None,
    threads: int = 0,
    use_gate_in_kernel: bool = True,
    use_qk_l2norm_in_kernel: bool = True,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    state_v_first: bool = True,
) -> None:
    """What pieces of sequences do to the states that enter them. Writes the arrays that are given as `map`
    and `state`, of which at least one must be; returns None.

    Whatever the gates, a run of tokens changes the state of a head by an affine map: the state [V, K] after a
    piece is the state before it, times `map`, plus the `state` that zeros become. So devices that hold one
    long sequence piece by piece need nothing of each other but these two. `join_maps` joins pieces, and
    `flash_kda.distributed.chunk_kda` does all of it.

    Args:
        k, v, g, beta, A_log, dt_bias, lower_bound: as for `fwd`. Queries are not needed.
        initial_state: as for `fwd`: what `state` begins from. The map does not depend on it.
        cu_seqlens: as for `fwd`: each piece is a sequence.
        map: fp32 [N, HV, K, K], written, or None. Row j is what the piece leaves of a state whose row is the
            j-th unit vector, if v is zeros. Of a piece without tokens it is the identity.
        state: fp32 [N, HV, V, K], written, or None: the final state.
        workspace, kernel, threads: as for `fwd`.
        use_gate_in_kernel, use_qk_l2norm_in_kernel: as for `fwd`.
        use_beta_sigmoid_in_kernel, allow_neg_eigval: as for `fwd`.
        state_v_first: False: map and states are transposed, and the product is `map` times the state.

    Raises:
        ValueError, TypeError, RuntimeError: as `fwd`.
    """
    package: Any = sys.modules[__package__]
    arrays = [k, v, g, beta]
    given = package._append_given(arrays, A_log, dt_bias, initial_state, cu_seqlens, map, state, workspace)
    package._layer_of_torch()
    values = (
        given, kernel, threads, use_gate_in_kernel, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel,
        allow_neg_eigval, state_v_first, lower_bound is not None,
    )  # fmt: skip
    package._hand_over(MAP, arrays, 0.0, 0.0 if lower_bound is None else lower_bound, values)


def affine_map_reference(
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    A_log: Any,
    dt_bias: Any,
    lower_bound: SupportsFloat | None,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    """What `affine_map` computes, token by token in fp64 on the CPU: slow, and meant for tests.

    Takes the arguments of `affine_map`, and its options by keyword; those that change no result are taken and
    change nothing.

    Returns:
        (map, state) in fp64: CPU tensors if k is a tensor, else NumPy arrays.

    Raises:
        ValueError, TypeError: as `affine_map`.
    """
    given = {"k": k, "v": v, "g": g, "beta": beta}
    optional = {"A_log": A_log, "dt_bias": dt_bias, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    given |= {name: x for name, x in optional.items() if x is not None}
    asked, params, shapes, _owners = _reference.filled(
        "affine_map_reference", MapOptions, given, (), 0.0, lower_bound, options
    )
    # C checks that the arrays fit each other before it writes, so results of wrong arrays may have any size.
    borders = shapes["cu_seqlens"] if "cu_seqlens" in shapes else shapes["k"]
    N = max((borders or (0,))[0] - ("cu_seqlens" in shapes), 0)
    shape = (N, *(shapes["v"][2:3] or (0,)), _DIM, _DIM)
    results = [_reference.new64(k, shape), _reference.new64(k, shape)]
    _lib.check(
        _lib.lib.flash_kda_map_reference(ctypes.byref(params), *(_reference.pointer_of(x) for x in results))
    )
    if not asked.state_v_first:
        results = [_reference.transposed(x) for x in results]
    return results[0], results[1]


def join_maps(
    maps: Any,
    states: Any,
    initial_state: Any = None,
    *,
    entering: Any = None,
    final_state: Any = None,
    kernel: str | None = None,
    threads: int = 0,
    backwards: bool = False,
    state_v_first: bool = True,
) -> None:
    """Carries a state through the maps of the P pieces of a sequence, in order. Writes the arrays that are
    given as `entering` and `final_state`, of which at least one must be; returns None.

    Args:
        maps: fp32 [P, HV, K, K], `map` of `affine_map` for each piece.
        states: fp32 [P, HV, V, K], `state` of `affine_map` for each piece without an initial state.
        initial_state: fp32 or bf16 [1, HV, V, K], the state before the first piece, or None: zeros.
        entering: fp32 [P, HV, V, K], written, or None: the state that enters each piece.
        final_state: fp32 [1, HV, V, K], written, or None: the state after the last piece.
        kernel, threads: as for `fwd`.
        backwards: True: gradients, from the last piece to the first, by the transposed maps. `states` is then
            the gradient of each piece's initial state for a gradient of its final state that is zeros
            (dinitial_state of `bwd`). `initial_state` is the gradient of the last piece's final state,
            `entering` the gradient of each piece's final state, and `final_state` that of the first piece's
            initial state.
        state_v_first: False: maps and states are transposed.

    Strides between pieces are free, so maps and states may be slices of one array.

    Raises:
        ValueError, TypeError, RuntimeError: as `fwd`.
    """
    package: Any = sys.modules[__package__]
    arrays = [maps, states]
    given = package._append_given(arrays, initial_state, entering, final_state)
    package._layer_of_torch()
    package._hand_over(JOIN, arrays, 0.0, 0.0, (given, kernel, threads, backwards, state_v_first))
