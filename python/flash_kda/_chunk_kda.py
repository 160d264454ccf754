"""chunk_kda with the arguments, defaults and results of flash-linear-attention 0.6, in terms of fwd.

The names and their meaning are FLA's, so that a caller may replace the import. What differs from fwd: states
are [.., K, V] unless state_v_first, q, k, g and beta are used as they are unless the flags ask for more, and
the results are new tensors.

Where a tensor requires a gradient, _autograd.py computes the call, and else fwd does.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

_DIM = 128
_OWN = ("kernel", "batch_invariant", "workspace_limit")  # options that FLA does not have
# The keywords behind **kwargs.
_MAY_FOLLOW = ("A_log", "dt_bias", "chunk_size", "transpose_state_layout", *_OWN)


def chunk_kda(call: dict[str, Any], more: dict[str, Any]) -> tuple[Any, ...]:
    """call: the arguments by name. more: the keywords that the signature does not name."""
    import torch

    q, k, v, cu_seqlens = call["q"], call["k"], call["v"], call["cu_seqlens"]
    for name in ("q", "k", "v", "g", "beta"):
        if not isinstance(call[name], torch.Tensor):
            raise TypeError(f"{name} is of type {type(call[name]).__name__}; it must be a PyTorch tensor")
    state_v_first = _check(call, more, torch)
    with_gate = call["use_gate_in_kernel"]
    lower_bound = call["lower_bound"] if with_gate else None
    q, k, v = _for_autocast(torch, q, k, v)
    inputs = {
        "q": q, "k": k, "v": v, "g": call["g"], "beta": call["beta"],
        "A_log": more.get("A_log") if with_gate else None,
        "dt_bias": more.get("dt_bias") if with_gate else None,
        "initial_state": call["initial_state"],
    }  # fmt: skip
    if _computes_with_gradients(torch, inputs):
        return _with_gradients(torch, inputs, call, more, lower_bound, state_v_first)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    HV = v.shape[2] if v.ndim == 4 else 0
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    final_state = None
    if call["output_final_state"]:
        final_state = torch.empty(N, HV, _DIM, _DIM, dtype=torch.float32, device=v.device)
    options = {name: more[name] for name in _OWN if name in more and name != "workspace_limit"}
    if call["cu_seqlens_cpu"] is not None and not torch.compiler.is_compiling():
        options["max_seqlen"] = longest_of(call["cu_seqlens_cpu"])
    states = None
    if call["return_intermediate_states"]:
        states = _ChunkStates(call, more.get("chunk_size", 64), N, HV, torch)
        options |= states.options
    package: Any = sys.modules[__package__]
    package.fwd(
        q,
        k,
        v,
        call["g"],
        call["beta"],
        _DIM**-0.5 if call["scale"] is None else call["scale"],
        out,
        A_log=inputs["A_log"],
        dt_bias=inputs["dt_bias"],
        lower_bound=lower_bound,
        initial_state=call["initial_state"],
        final_state=final_state,
        cu_seqlens=cu_seqlens,
        use_gate_in_kernel=with_gate,
        use_qk_l2norm_in_kernel=call["use_qk_l2norm_in_kernel"],
        use_beta_sigmoid_in_kernel=call["use_beta_sigmoid_in_kernel"],
        allow_neg_eigval=call["allow_neg_eigval"],
        state_v_first=state_v_first,
        **options,
    )
    if states is None:
        return out, final_state
    return out, final_state, states.finished(call["initial_state"])


def _computes_with_gradients(torch: Any, inputs: dict[str, Any]) -> bool:
    """Whether the operator with gradients computes the call. It also computes calls with DTensors."""
    package: Any = sys.modules[__package__]
    if not torch.compiler.is_compiling():
        layer = package._layer_of_torch()
        if layer.takes_dtensors and layer.is_dtensor(inputs["q"]):
            return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs.values())


def _for_autocast(torch: Any, *tensors: Any) -> tuple[Any, ...]:
    """q, k and v in the dtype of autocast where that is bf16, as autocast has the arguments of a product."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) is not torch.bfloat16:
        return tensors
    return tuple(x.to(torch.bfloat16) if x.is_floating_point() else x for x in tensors)


def _with_gradients(
    torch: Any,
    inputs: dict[str, Any],
    call: dict[str, Any],
    more: dict[str, Any],
    lower_bound: Any,
    state_v_first: bool,
) -> tuple[Any, Any]:
    """inputs: the tensors that have gradients, in the order of the operator's arguments."""
    from . import _autograd

    max_seqlen = 0
    if not torch.compiler.is_compiling():
        given = {**inputs, "cu_seqlens": call["cu_seqlens"]}
        _autograd.refuse_strange({name: x for name, x in given.items() if x is not None})
        if call["cu_seqlens_cpu"] is not None:
            max_seqlen = longest_of(call["cu_seqlens_cpu"])
    out, final_state, _ = _autograd.chunk_kda(
        *inputs.values(),
        call["cu_seqlens"],
        _DIM**-0.5 if call["scale"] is None else call["scale"],
        lower_bound,
        max_seqlen,
        call["use_gate_in_kernel"],
        call["use_qk_l2norm_in_kernel"],
        call["use_beta_sigmoid_in_kernel"],
        call["allow_neg_eigval"],
        state_v_first,
        call["output_final_state"],
        call["disable_recompute"],
        *(more.get(name, default) for name, default in _autograd.YOUNGER.items()),
    )
    return out, final_state if call["output_final_state"] else None


def _check(call: dict[str, Any], more: dict[str, Any], torch: Any) -> bool:
    """Refuses what fwd would not notice. Returns state_v_first."""
    unknown = [name for name in more if name not in _MAY_FOLLOW]
    if unknown:
        raise TypeError(f"chunk_kda() got an unexpected keyword argument {unknown[0]!r}")
    state_v_first = is_v_first(call, more, 5)
    if call["cp_context"] is not None:
        raise ValueError("cp_context is given; flash_kda computes on one device, so it must be None")
    chunk_size = more.get("chunk_size", 64)
    if chunk_size not in (32, 64):
        raise ValueError(f"chunk_size is {chunk_size!r}; it must be 32 or 64")
    bound = call["lower_bound"]
    if call["safe_gate"] and call["use_gate_in_kernel"] and (bound is None or not -5 <= bound < 0):
        raise ValueError(f"lower_bound is {bound} with safe_gate=True; it must be in [-5, 0)")
    if not isinstance(call["disable_recompute"], bool):
        kind = type(call["disable_recompute"]).__name__
        raise TypeError(f"disable_recompute is of type {kind}; it must be True or False")
    initial_state = call["initial_state"]
    is_tensor = isinstance(initial_state, torch.Tensor)
    if initial_state is not None and not (is_tensor and initial_state.dtype == torch.float32):
        kind = initial_state.dtype if is_tensor else type(initial_state).__name__
        raise TypeError(f"initial_state is of {kind}; it must be a tensor of torch.float32")
    if call["return_intermediate_states"]:
        if not torch.is_inference_mode_enabled():
            raise ValueError(
                "return_intermediate_states is True outside of torch.inference_mode(); it must be False there"
            )
        if call["disable_recompute"]:
            raise ValueError(
                "return_intermediate_states is True with disable_recompute=True; one of them must be False"
            )
    N, most = call["cu_seqlens"], call["max_num_seqs"]
    if call["use_graph"] and N is not None and most is not None and N.shape[0] - 1 != most:
        raise ValueError(
            f"cu_seqlens has {N.shape[0]} entries with max_num_seqs={most}; it must have {most + 1}, with "
            "sequences of no tokens at its end"
        )
    return state_v_first


def is_v_first(call: dict[str, Any], more: dict[str, Any], stacklevel: int) -> bool:
    """state_v_first, also by its older name. stacklevel: of the warning, which is for the package's
    caller."""
    if "transpose_state_layout" not in more:
        return call["state_v_first"]
    if call["state_v_first"]:
        raise ValueError(
            "transpose_state_layout is given with state_v_first=True; it is an older name of "
            "state_v_first, and must not be given too"
        )
    warnings.warn(
        "transpose_state_layout is now called state_v_first", DeprecationWarning, stacklevel=stacklevel
    )
    return more["transpose_state_layout"]


def longest_of(cu_seqlens_cpu: Any) -> int:
    return int(cu_seqlens_cpu.diff().max()) if cu_seqlens_cpu.numel() > 1 else 0


class _ChunkStates:
    """The state before each chunk of each sequence, [B, chunks, HV, .., ..] in bf16.

    fwd writes the state after each chunk, as checkpoints: after chunk i of a sequence it belongs to chunk
    i + 1. So a sequence's rows begin one behind its first chunk. The state after its last chunk, if that is
    full, lands in the first row of the next sequence, or in a spare row at the end, and is overwritten by the
    state that the next sequence starts from.
    """

    def __init__(self, call: dict[str, Any], chunk: int, N: int, HV: int, torch: Any):
        v, cu_seqlens = call["v"], call["cu_seqlens"]
        self.torch, self.N = torch, N
        B, T = v.shape[:2]
        if cu_seqlens is None:
            self.rows = B * -(-T // chunk)
            first = torch.arange(N, device=v.device) * -(-T // chunk)
            self.is_empty = torch.full((N,), T == 0, device=v.device)
        else:
            lengths = cu_seqlens.diff().long()
            chunks = torch.div(lengths + (chunk - 1), chunk, rounding_mode="floor")
            first = chunks.cumsum(0) - chunks
            self.is_empty = chunks == 0
            if call["use_graph"]:
                self.rows = -(-T // chunk) + N - 1  # the most that N sequences of T tokens can have
            elif call["cu_seqlens_cpu"] is not None:
                self.rows = int(
                    torch.div(call["cu_seqlens_cpu"].diff() + (chunk - 1), chunk, rounding_mode="floor").sum()
                )
            else:
                self.rows = int(chunks.sum())
        self.shape = (B, self.rows // max(B, 1), HV, _DIM, _DIM)
        self.first = first
        self.memory = torch.empty(self.rows + 1, HV, _DIM, _DIM, dtype=v.dtype, device=v.device)
        self.options = {
            "checkpoint_states": self.memory,
            "checkpoint_every": chunk,
            "checkpoint_starts": first + 1,
        }

    def finished(self, initial_state: Any) -> Any:
        """The states, once fwd has run."""
        # A sequence without tokens has no chunk: its state goes to the spare row.
        to = self.torch.where(self.is_empty, self.rows, self.first)
        if initial_state is None:
            self.memory.index_fill_(0, to, 0)
        else:
            self.memory.index_copy_(0, to, initial_state.to(self.memory.dtype))
        return self.memory[: self.rows].view(self.shape)
