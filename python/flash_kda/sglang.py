"""SGLang's plug-in: this package as SGLang's kernel class for KDA layers.

SGLang 0.5.23 calls `register` in every process, as the entry point of the group sglang.srt.plugins. Where
SGLang is started with `--linear-attn-prefill-backend flashkda`, the class FlashKDAKernel is then the one
below:

- extend computes prompts of all lengths with all gates in one call, in place on SGLang's pool of states, and
  writes the states that the prefix cache tracks from the same call.
- decode, packed_decode and target_verify take the place of the Triton kernels, where SGLang chose Triton for
  these steps.

The class is derived from SGLang's Triton class, which computes the calls that this package leaves to it.

The environment variable FLASH_KDA_SGLANG: "0" turns the plug-in off. "prefill" leaves decode and verify to
SGLang, "prefill,decode" verify, and "prefill,verify" decode.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch

from . import _engines, _fla

VARIABLE = "FLASH_KDA_SGLANG"
KERNELS = "sglang.srt.layers.attention.linear.kernels"
FLASHKDA, TRITON = f"{KERNELS}.kda_flashkda", f"{KERNELS}.kda_triton"
BACKEND = "sglang.srt.layers.attention.linear.kda_backend"

_CALL = ("ssm_states", "cache_indices", "query_start_loc")
_GATE = ("A_log", "dt_bias")
# The functions of SGLang 0.5.23 that the class below stands for, and their parameters.
KNOWN: dict[str, tuple[str, ...]] = {
    "extend": (
        "self", "q", "k", "v", "g", "beta", *_CALL, *_GATE, "lower_bound", "beta_is_raw",
        "return_intermediate_states", "kwargs",
    ),
    "decode": ("self", "q", "k", "v", "a", "b", *_GATE, *_CALL, "lower_bound", "kwargs"),
    "packed_decode": (
        "self", "mixed_qkv", "a", "b", *_GATE, "scale", "ssm_states", "cache_indices", "num_v_heads",
        "head_v_dim", "lower_bound", "kwargs",
    ),
    "target_verify": (
        "self", *_GATE, "q", "k", "v", "a", "b", *_CALL, "intermediate_states_buffer",
        "intermediate_state_indices", "cache_steps", "retrieve_parent_token", "lower_bound", "cache_ring",
        "replayssm_rawv", "replayssm_rawk", "replayssm_g", "replayssm_beta", "kwargs",
    ),
}  # fmt: skip
KNOWN_DISPATCHER: dict[str, tuple[str, ...]] = {
    "__init__": ("self", "decode_backend", "prefill_backend", "verify_backend")
}

# Keywords of SGLang's calls that change nothing here: what other kernels need, and what extend reads itself.
_EXTEND_MAY_HAVE = frozenset(
    (
        "extend_seq_lens_cpu", "extend_prefix_lens", "layer_id", "is_spec_decode", "track_state",
        "track_chunk_idx", "track_ssm_h_src", "track_ssm_h_batch_src", "chunk_indices", "chunk_offsets",
        "state_checkpoint_cu_starts", "num_state_checkpoints", "state_checkpoint_every_n_tokens",
        "state_checkpoint_indices",
    )
)  # fmt: skip
_TRACKED_CHUNK = 64  # tokens, in which track_chunk_idx counts
_MOST_DRAFTS = 16  # tokens of a sequence in a call of decode

_log = _engines.Log("sglang.flash_kda")


class Refused(Exception):
    """The call is for SGLang's Triton kernels."""


def _check(tensor: Any, more: dict[str, Any], may_have: frozenset[str] = frozenset()) -> None:
    """Refuses a call on a device without a kernel, and one with keywords that this plug-in does not know."""
    device = tensor.device
    why = _fla.why_not_on(device.type, _index(device))
    if why:
        raise Refused(why)
    for name, value in more.items():
        if value is not None and name not in may_have:
            raise Refused(f"it does not know the argument {name}")


def _index(device: torch.device) -> int:
    if device.type != "cuda" or device.index is not None:
        return device.index or 0
    return torch.cuda.current_device()


def _is_deterministic() -> bool:
    """Whether SGLang was asked for the same bits whatever else is in a batch."""
    try:
        execution: Any = sys.modules["sglang.srt.runtime_context"]
        return execution.get_exec().deterministic.enable_deterministic_inference is True
    except (AttributeError, KeyError):
        return False


def _longest(lengths: Any, tokens: int) -> int | None:
    """Tokens of the longest sequence, or None unless the lengths are known to be those of all tokens."""
    if lengths is None:
        return None
    if isinstance(lengths, torch.Tensor):
        if lengths.device.type != "cpu":
            return None
        lengths = lengths.tolist()
    return max(lengths, default=0) if sum(lengths) == tokens else None


def _with_rest(query_start_loc: Any, tokens: int) -> Any:
    """query_start_loc with one more sequence, of the tokens behind all others. A batch that was padded to the
    size of a CUDA graph has such tokens, and the host does not know how many."""
    return torch.cat([query_start_loc, query_start_loc.new_full((1,), tokens)])


def _without_slot(cache_indices: Any) -> Any:
    """cache_indices with one more sequence, which has no state."""
    return torch.cat([cache_indices, cache_indices.new_full((1,), -1)])


def _one_token_each(x: Any, *dims: int) -> Any:
    """Of one token of each of B sequences: [B, 1, *dims], however SGLang has arranged it."""
    return x.reshape(-1, 1, *dims)


class FlashKDA:
    """The methods of SGLang's kernel classes. Stands in front of SGLang's Triton class."""

    supports_packed_decode = True
    supports_packed_decode_safe_gate = True
    supports_track_state_snapshot = True

    def extend(
        self, q: Any, k: Any, v: Any, g: Any, beta: Any, *, ssm_states: Any, cache_indices: Any,
        query_start_loc: Any, A_log: Any = None, dt_bias: Any = None, lower_bound: Any = None,
        beta_is_raw: bool = False, return_intermediate_states: bool = False, **more: Any,
    ) -> Any:  # fmt: skip
        """The output [1, T, HV, V]; with return_intermediate_states a pair with the states before each chunk,
        which are None: SGLang reads track_state in their place."""
        call = {
            "ssm_states": ssm_states, "cache_indices": cache_indices, "query_start_loc": query_start_loc,
            "A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound, "beta_is_raw": beta_is_raw,
        }  # fmt: skip
        try:
            out = _extend(q, k, v, g, beta, return_intermediate_states, more, **call)
        except (Refused, RuntimeError, TypeError, ValueError) as error:
            _give_back("extend", error)
            rest = {"return_intermediate_states": return_intermediate_states, **more}
            return super().extend(q, k, v, g, beta, **call, **rest)  # type: ignore[misc]
        _took("extend", q)
        return (out, None) if return_intermediate_states else out

    def decode(
        self, q: Any, k: Any, v: Any, a: Any, b: Any, *, A_log: Any, dt_bias: Any, ssm_states: Any,
        cache_indices: Any, query_start_loc: Any, lower_bound: Any = None, **more: Any,
    ) -> Any:  # fmt: skip
        """One token of each sequence, [1, B, H, K]. Returns [1, B, HV, V]."""
        try:
            if q.shape[:2] != (1, cache_indices.shape[0]):
                raise Refused("there is not one token for each sequence")
            _check(q, more)
            out = _decode(
                q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), a, b, q.shape[-1] ** -0.5, A_log,
                dt_bias, lower_bound, ssm_states, cache_indices,
            )  # fmt: skip
        except (Refused, RuntimeError, TypeError, ValueError) as error:
            _give_back("decode", error)
            return super().decode(  # type: ignore[misc]
                q, k, v, a, b, A_log=A_log, dt_bias=dt_bias, ssm_states=ssm_states,
                cache_indices=cache_indices, query_start_loc=query_start_loc, lower_bound=lower_bound, **more,
            )  # fmt: skip
        _took("decode", q)
        return out

    def packed_decode(
        self, mixed_qkv: Any, a: Any, b: Any, *, A_log: Any, dt_bias: Any, scale: float, ssm_states: Any,
        cache_indices: Any, num_v_heads: int, head_v_dim: int, lower_bound: Any = None, **more: Any,
    ) -> Any:  # fmt: skip
        """As decode, from the output of the convolution, [B, 2 H K + HV V]."""
        try:
            _check(mixed_qkv, more)
            dim = ssm_states.shape[-1]
            of_v = num_v_heads * head_v_dim
            of_q = (mixed_qkv.shape[-1] - of_v) // 2
            parts = mixed_qkv.split([of_q, of_q, of_v], dim=-1)
            q, k, v = (x.unflatten(-1, (-1, dim)).unsqueeze(1) for x in parts)
            out = _decode(q, k, v, a, b, scale, A_log, dt_bias, lower_bound, ssm_states, cache_indices)
        except (Refused, RuntimeError, TypeError, ValueError) as error:
            _give_back("packed_decode", error)
            return super().packed_decode(  # type: ignore[misc]
                mixed_qkv, a, b, A_log=A_log, dt_bias=dt_bias, scale=scale, ssm_states=ssm_states,
                cache_indices=cache_indices, num_v_heads=num_v_heads, head_v_dim=head_v_dim,
                lower_bound=lower_bound, **more,
            )  # fmt: skip
        _took("packed_decode", mixed_qkv)
        return out

    def target_verify(
        self, A_log: Any, dt_bias: Any, q: Any, k: Any, v: Any, a: Any, b: Any, *, ssm_states: Any,
        cache_indices: Any, query_start_loc: Any, intermediate_states_buffer: Any,
        intermediate_state_indices: Any, cache_steps: int, retrieve_parent_token: Any,
        lower_bound: Any = None, **more: Any,
    ) -> Any:  # fmt: skip
        """The output of draft tokens [1, total, H, K], which are a chain or a tree. The pool stays as it is;
        the state after token i of a sequence goes to step i of the sequence's row of the buffer."""
        call = {
            "ssm_states": ssm_states, "cache_indices": cache_indices, "query_start_loc": query_start_loc,
            "intermediate_states_buffer": intermediate_states_buffer,
            "intermediate_state_indices": intermediate_state_indices, "cache_steps": cache_steps,
            "retrieve_parent_token": retrieve_parent_token, "lower_bound": lower_bound,
        }  # fmt: skip
        try:
            _check(q, {name: x for name, x in more.items() if x is not False})
            out = _verify(A_log, dt_bias, q, k, v, a, b, **call)
        except (Refused, RuntimeError, TypeError, ValueError) as error:
            _give_back("target_verify", error)
            return super().target_verify(A_log, dt_bias, q, k, v, a, b, **call, **more)  # type: ignore[misc]
        _took("target_verify", q)
        return out


def _give_back(step: str, error: Exception) -> None:
    level = logging.INFO if isinstance(error, Refused) else logging.WARNING
    _log.once((step, str(error)), f"gives a call of {step} to SGLang's Triton kernels: {error}", level)


def _took(step: str, tensor: Any) -> None:
    _log.once((step, tensor.device), f"computes {step} on {tensor.device}")


def _extend(
    q: Any, k: Any, v: Any, g: Any, beta: Any, return_intermediate_states: bool, more: dict[str, Any], *,
    ssm_states: Any, cache_indices: Any, query_start_loc: Any, A_log: Any, dt_bias: Any, lower_bound: Any,
    beta_is_raw: bool,
) -> Any:  # fmt: skip
    _check(q, more, _EXTEND_MAY_HAVE)
    track_state = more.get("track_state")
    if more.get("is_spec_decode"):
        raise Refused("its states must be able to go back")
    if return_intermediate_states and track_state is None:
        rows = more.get("track_ssm_h_src")
        if rows is None or rows.numel():
            raise Refused("SGLang reads the states before each chunk")
    tokens, sequences = q.shape[1], query_start_loc.shape[0] - 1
    cache_indices = cache_indices[:sequences]
    offsets = None
    if track_state is not None:
        offsets = more["track_chunk_idx"][:sequences] * _TRACKED_CHUNK
    longest = _longest(more.get("extend_seq_lens_cpu"), tokens)
    if longest is None:
        query_start_loc = _with_rest(query_start_loc, tokens)
        cache_indices = _without_slot(cache_indices)
        offsets = None if offsets is None else _without_slot(offsets)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    with torch.no_grad():  # the gate's parameters may ask for gradients
        _engines.package().fwd(
            q, k, v, g, beta, q.shape[-1] ** -0.5, out, A_log, dt_bias, lower_bound, ssm_states, ssm_states,
            query_start_loc, max_seqlen=longest or 0, state_indices=cache_indices,
            checkpoint_states=track_state, checkpoint_offsets=offsets, use_gate_in_kernel=A_log is not None,
            use_beta_sigmoid_in_kernel=beta_is_raw, batch_invariant=_is_deterministic(),
        )  # fmt: skip
    return out


def _decode(
    q: Any, k: Any, v: Any, a: Any, b: Any, scale: float, A_log: Any, dt_bias: Any, lower_bound: Any,
    ssm_states: Any, cache_indices: Any,
) -> Any:  # fmt: skip
    heads, dim = v.shape[2], ssm_states.shape[-1]
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    with torch.no_grad():
        _engines.package().decode(
            q, k, v, _one_token_each(a, heads, dim), _one_token_each(b, heads), scale, out, A_log, dt_bias,
            lower_bound, ssm_states, state_indices=cache_indices,
        )  # fmt: skip
    return out.transpose(0, 1)


def _verify(
    A_log: Any, dt_bias: Any, q: Any, k: Any, v: Any, a: Any, b: Any, *, ssm_states: Any, cache_indices: Any,
    query_start_loc: Any, intermediate_states_buffer: Any, intermediate_state_indices: Any, cache_steps: int,
    retrieve_parent_token: Any, lower_bound: Any,
) -> Any:  # fmt: skip
    """The states after tokens go to the buffer, as written_states."""
    buffer = intermediate_states_buffer
    if buffer is None:
        raise Refused("there is no buffer for the states")
    if buffer.dtype != ssm_states.dtype:
        raise Refused("the buffer and the pool have different dtypes")
    if cache_steps > _MOST_DRAFTS:
        raise Refused(f"there are more than {_MOST_DRAFTS} draft tokens")
    rows, steps, *head = buffer.shape
    pitch, rest = divmod(buffer.stride(0), buffer.stride(1))
    if rest or pitch < steps or cache_steps > steps:
        raise Refused("rows of the buffer do not follow each other")
    slots = buffer.as_strided((pitch * (rows - 1) + steps, *head), buffer.stride()[1:])
    tokens, heads, dim = q.shape[1], v.shape[2], v.shape[3]
    sequences = query_start_loc.shape[0] - 1
    first = intermediate_state_indices[:sequences].long() * pitch
    written = first[:, None] + torch.arange(cache_steps, device=q.device)
    written = torch.cat([written, written.new_full((1, cache_steps), -1)])
    parents = None
    if retrieve_parent_token is not None:
        parents = retrieve_parent_token[:sequences, :cache_steps].clone()
        parents[:, 0] = -1  # SGLang leaves open what the first token's parent is
        parents = torch.cat([parents, parents.new_full((1, cache_steps), -1)])
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    with torch.no_grad():
        _engines.package().decode(
            q, k, v, a.reshape(1, tokens, heads, dim), b.reshape(1, tokens, heads), dim**-0.5, out, A_log,
            dt_bias, lower_bound, ssm_states, state_indices=_without_slot(cache_indices[:sequences]),
            write_states="each", cu_seqlens=_with_rest(query_start_loc, tokens), parents=parents,
            written_states=slots, written_indices=written,
        )  # fmt: skip
    return out


# ---- How SGLang gets the class -----------------------------------------------------------------------------


def kernel_class(triton: type) -> type:
    """The class for SGLang's FlashKDAKernel, with SGLang's Triton class as the one behind it."""
    return type("FlashKDAKernel", (FlashKDA, triton), {"__module__": __name__})


def _adopt_kernel(module: Any) -> None:
    """module: the one that has FlashKDAKernel, which SGLang has just imported."""
    import importlib

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    triton = importlib.import_module(TRITON).TritonKDAKernel
    why = _engines.differing(triton, KNOWN)
    if not why and not isinstance(getattr(module, "FlashKDAKernel", None), type):
        why = f"{FLASHKDA} has no class FlashKDAKernel"
    if why:
        _log.once("kernel", f"leaves SGLang's kernels as they are: {why}", logging.WARNING)
        return
    HookRegistry.register(f"{FLASHKDA}.FlashKDAKernel", kernel_class(triton), HookType.REPLACE)
    HookRegistry.apply_hooks()
    _log.once("kernel", f"is SGLang's FlashKDAKernel ({VARIABLE}=0 turns it off)")


def _choose(result: Any, dispatcher: Any, *arguments: Any, **named: Any) -> None:
    """Behind the constructor of SGLang's dispatcher: with this package for prefill, decode and verify are the
    package's too, where they would be Triton's."""
    ours = getattr(dispatcher, "extend_kernel", None)
    if not isinstance(ours, FlashKDA):
        return
    taken = [step for step in _steps if getattr(dispatcher, f"{step}_kernel") is dispatcher.triton_kernel]
    for step in taken:
        setattr(dispatcher, f"{step}_kernel", ours)
    if "decode" in taken:
        dispatcher.supports_packed_decode = True
        dispatcher.supports_packed_decode_safe_gate = True
    _log.once("dispatcher", f"is SGLang's kernel for {', '.join(['extend', *taken])}")


def _adopt_dispatcher(module: Any) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    why = _engines.differing(module.KDAKernelDispatcher, KNOWN_DISPATCHER)
    if why:
        _log.once("dispatcher", f"leaves SGLang's decode and verify as they are: {why}", logging.WARNING)
        return
    HookRegistry.register(f"{BACKEND}.KDAKernelDispatcher.__init__", _choose, HookType.AFTER)
    HookRegistry.apply_hooks()


_ALL_STEPS = ("decode", "verify")  # beside prefill
_steps: tuple[str, ...] = _ALL_STEPS  # that are taken over
_registered = False


def register() -> None:
    """The entry point. Changes nothing until SGLang imports what is to be changed."""
    global _registered, _steps
    how = _engines.setting(VARIABLE)
    if _registered or how == "off":
        return
    _registered = True
    named = [name.strip() for name in how.split(",") if name.strip()]
    _steps = tuple(step for step in _ALL_STEPS if not named or step in named)
    unknown = set(named) - {"prefill", *_ALL_STEPS}
    if unknown:
        _log.once("variable", f"does not know {min(unknown)!r} in {VARIABLE}", logging.WARNING)
    _engines.when_there(FLASHKDA, _adopt_kernel, _log)
    if _steps:
        _engines.when_there(BACKEND, _adopt_dispatcher, _log)
