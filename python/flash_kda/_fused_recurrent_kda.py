"""fused_recurrent_kda with the arguments, defaults and results of flash-linear-attention 0.6, in terms of
`decode` and `fwd`, as _chunk_kda.py has chunk_kda.

The final state is a new tensor. `decode` reads the initial state and writes the final one beside it
(`written_states`), unless a sequence may have no tokens: `decode` writes no state of such a sequence, so the
final state begins as a copy then. Where no final state is wanted, `decode` writes none.
"""

from __future__ import annotations

import sys
from typing import Any

from ._chunk_kda import is_v_first, longest_of

_DIM = 128
_MOST_TOKENS = 16  # of a sequence in a call of decode
_MAY_FOLLOW = ("cu_seqlens_cpu", "transpose_state_layout")  # the keywords behind **kwargs
_SAME_IN_BOTH = (
    "cu_seqlens",
    "use_gate_in_kernel",
    "use_qk_l2norm_in_kernel",
    "use_beta_sigmoid_in_kernel",
    "allow_neg_eigval",
)


def fused_recurrent_kda(call: dict[str, Any], more: dict[str, Any]) -> tuple[Any, ...]:
    """call: the arguments by name. more: the keywords that the signature does not name."""
    import torch

    for name in ("q", "k", "v", "g", "beta"):
        if not isinstance(call[name], torch.Tensor):
            raise TypeError(f"{name} is of type {type(call[name]).__name__}; it must be a PyTorch tensor")
    unknown = [name for name in more if name not in _MAY_FOLLOW]
    if unknown:
        raise TypeError(f"fused_recurrent_kda() got an unexpected keyword argument {unknown[0]!r}")
    state_v_first = is_v_first(call, more, 4)
    v, cu_seqlens = call["v"], call["cu_seqlens"]
    N = call["q"].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    are_ranks_right = call["q"].ndim == v.ndim == 4
    state_shape = (N, v.shape[2] if are_ranks_right else 0, _DIM, _DIM)
    initial_state = call["initial_state"]
    _check_state(initial_state, state_shape if are_ranks_right else None, state_v_first, torch)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    gate = ("A_log", "dt_bias", "lower_bound")
    arguments = {name: call[name] if call["use_gate_in_kernel"] else None for name in gate}
    arguments |= {name: call[name] for name in ("q", "k", "v", "g", "beta", *_SAME_IN_BOTH)}
    arguments |= {"scale": _DIM**-0.5 if call["scale"] is None else call["scale"]}
    arguments |= {"out": out, "state_v_first": state_v_first}
    package: Any = sys.modules[__package__]
    final_state, f32 = None, torch.float32
    longest = _longest(call, more, torch)
    if longest is not None and longest <= _MOST_TOKENS:
        state, write_states = initial_state, "last" if call["output_final_state"] else "none"
        if state is None:
            state = torch.zeros(state_shape, dtype=f32, device=v.device)
            final_state = state if call["output_final_state"] else None
        elif call["output_final_state"] and state.dtype == f32 and cu_seqlens is None and longest > 0:
            state, final_state = state.contiguous(), torch.empty(state_shape, dtype=f32, device=v.device)
            arguments["written_states"] = final_state
        elif call["output_final_state"]:
            state = final_state = state.to(f32, copy=True, memory_format=torch.contiguous_format)
        package.decode(**arguments, state=state, write_states=write_states)
    else:
        if initial_state is not None:
            initial_state = initial_state.to(f32)
        if call["output_final_state"]:
            final_state = torch.empty(state_shape, dtype=f32, device=v.device)
        arguments |= {"initial_state": initial_state, "final_state": final_state}
        package.fwd(**arguments, max_seqlen=longest or 0)
    return out, final_state


def _longest(call: dict[str, Any], more: dict[str, Any], torch: Any) -> Any:
    """How many tokens a sequence has at most, as far as the host knows, or None."""
    q, cu_seqlens_cpu = call["q"], more.get("cu_seqlens_cpu")
    tokens = q.shape[1] if q.ndim == 4 else 0
    if call["cu_seqlens"] is None or tokens <= _MOST_TOKENS:
        return tokens
    if cu_seqlens_cpu is None or torch.compiler.is_compiling():
        return None
    return longest_of(cu_seqlens_cpu)


def _check_state(initial_state: Any, shape: Any, state_v_first: bool, torch: Any) -> None:
    """Refuses what neither `decode`, for which the state is a pool, nor a conversion to fp32 would notice.
    shape: what the state must have, or None if other tensors are wrong."""
    if initial_state is None:
        return
    is_tensor = isinstance(initial_state, torch.Tensor)
    if not is_tensor or initial_state.dtype not in (torch.float32, torch.bfloat16):
        kind = initial_state.dtype if is_tensor else type(initial_state).__name__
        raise TypeError(f"initial_state is of {kind}; it must be a tensor of torch.float32 or torch.bfloat16")
    if shape is not None and tuple(initial_state.shape) != shape:
        dims = "[N, HV, V, K]" if state_v_first else "[N, HV, K, V]"
        raise ValueError(
            f"initial_state has shape {list(initial_state.shape)}; it must be {dims} = {list(shape)}"
        )
