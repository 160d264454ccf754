"""Kimi Delta Attention (KDA) and its gradients, on CPUs and NVIDIA GPUs.

`fwd` is the forward pass, for PyTorch tensors, NumPy arrays and all arrays with DLPack's two methods. Its
docstring has the formula. `fwd` writes into arrays that it is given; `compute` returns new ones, and so
serves JAX. `decode` computes one to sixteen tokens of each of many sequences, whose states it updates in
place, and `apply_records` brings states up to date after draft tokens were verified. `decode_layer` does the
same for a whole layer: convolution, recurrence, norm and output gate in one launch. `chunk_kda` and
`fused_recurrent_kda` have the arguments of flash-linear-attention's functions of these names.
In PyTorch `chunk_kda` has gradients; `bwd` writes them into arrays of any library.
`describe_nonfinite` says where a call has found NaN and infinities. `reference`, `bwd_reference` and
`decode_reference` are the slow fp64 definitions. `devices` and `kernels` list what a call can run on,
`explain` says how it would run, `get_workspace_size` how much scratch memory it may need, and
`get_saved_size` how much memory a forward pass fills for the backward pass. The modules `flash_kda.fla`, for
flash-linear-attention and transformers, and `flash_kda.jax` are imported by those who want them.
"""

from __future__ import annotations

import importlib
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import (
    _arrays,
    _chunk_kda,
    _fla,
    _functional,
    _fused_recurrent_kda,
    _installed,
    _later,
    _lib,
    _nonfinite,
    _reference,
    _shapes,
)
from ._backward import Gradients, bwd, bwd_reference
from ._decode_options import APPLY, DECODE, DECODE_LAYER
from ._options import BOTH_PARAMETERS, Options, cached_options, defaults_for, known_options
from ._pieces import affine_map, affine_map_reference, join_maps

if TYPE_CHECKING:
    from typing import Protocol, SupportsFloat

    from ._call_options import KnownOptions

    class Array(Protocol):
        """A PyTorch tensor, a NumPy array, or anything else with DLPack's two methods."""

        def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

        def __dlpack_device__(self) -> tuple[Any, Any]: ...


__all__ = [
    "Device",
    "Gradients",
    "affine_map",
    "affine_map_reference",
    "apply_records",
    "bwd",
    "bwd_reference",
    "chunk_kda",
    "compute",
    "decode",
    "decode_layer",
    "decode_layer_reference",
    "decode_reference",
    "describe_nonfinite",
    "devices",
    "explain",
    "explain_decode",
    "fused_recurrent_kda",
    "fwd",
    "get_saved_size",
    "get_workspace_size",
    "join_maps",
    "kernels",
    "reference",
]
__version__ = _lib.version()


def __dir__() -> list[str]:
    """What the package offers, without the modules that it is made of."""
    return sorted([*__all__, "__version__"])


_ADAPTERS = (
    "distributed",
    "fla",
    "jax",
)  # modules for other packages, each of which needs an import of its own


def __getattr__(name: str) -> Any:
    """So that `flash_kda.fla.install()` works after `import flash_kda`, which imports no adapter."""
    if name in _ADAPTERS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_ZERO, _AUTO = 0, "auto"  # these defaults are looked for by identity, since 0 == 0.0 == False
_torch_layer: Any = None  # flash_kda._torch, once PyTorch is imported
# The bits in `given` of the first optional arrays of `fwd`, whose order is that of _options.OPTIONAL_ARRAYS.
_A_LOG, _DT_BIAS, _INITIAL_STATE, _FINAL_STATE, _CU_SEQLENS, _NONFINITE = (1 << i for i in range(6))
_PLACE_OF_WORKSPACE = 6  # the first one behind them


def fwd(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    scale: SupportsFloat,
    out: Array,
    A_log: Array | None,
    dt_bias: Array | None,
    lower_bound: SupportsFloat | None,
    initial_state: Array | None = None,
    final_state: Array | None = None,
    cu_seqlens: Array | None = None,
    *,
    kernel: str | None = None,
    threads: int = 0,
    batch_invariant: bool = False,
    max_seqlen: int = 0,
    cut: str = "auto",
    nonfinite: Array | None = None,
    workspace: Array | None = None,
    state_indices: Array | None = None,
    first_slot: int = 0,
    has_initial_state: Array | None = None,
    checkpoint_states: Array | None = None,
    checkpoint_offsets: Array | None = None,
    checkpoint_indices: Array | None = None,
    checkpoint_every: int | None = None,
    checkpoint_starts: Array | None = None,
    use_gate_in_kernel: bool = True,
    use_qk_l2norm_in_kernel: bool = True,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    state_v_first: bool = True,
    saved: Array | None = None,
) -> None:
    """The forward pass of Kimi Delta Attention. Writes `out`, and `final_state` if given; returns None.

    Each head of each sequence keeps a state S of K x V numbers. For every token t, in order:

        g_t      = lower_bound * sigmoid(exp(A_log) * (g + dt_bias))      log decay (nats), one per channel
        q_t, k_t = q / sqrt(sum(q^2) + 1e-6), k / sqrt(sum(k^2) + 1e-6)   over the K channels
        b_t      = sigmoid(beta)
        S        = diag(exp(g_t)) S                                       forget
        u_t      = b_t (v_t - S^T k_t)                                    what the state did not predict
        S        = S + k_t u_t^T                                          write
        o_t      = scale S^T q_t                                          read

    (Kimi Linear, arXiv:2510.26692, with the gate bounded from below: the "safe gate" of
    flash-linear-attention. Options below choose other gates and betas.) B batch rows, T tokens a row, H heads
    of q and k, HV heads of v, N sequences, K = V = 128 channels. HV is a multiple of H: value head j uses
    head j // (HV // H) of q and k.

    Args:
        q, k: bf16 [B, T, H, K], query and key, before their L2 norm.
        v: bf16 [B, T, HV, V], value.
        g: bf16 or fp32 [B, T, HV, K], gate before its activation.
        beta: bf16 or fp32 [B, T, HV], logits of the write strength.
        scale: finite; multiplies the output, usually K ** -0.5.
        out: bf16 [B, T, HV, V], written.
        A_log: fp32, HV elements in any shape, or None with a bounded gate: exp(A_log) is then 1.
        dt_bias: fp32, HV * K elements in any shape, or None: zeros.
        lower_bound: lower bound of one token's log decay, in nats, in [-5, 0]. None chooses the softplus gate
            g_t = -exp(A_log) softplus(g + dt_bias), which has no lower bound.
        initial_state: bf16 or fp32 [N, HV, V, K] (V first), or None: zeros. A pool [slots, HV, V, K] with
            state_indices.
        final_state: the same, written, or None. It has the dtype of initial_state if both are given; it may
            be the same array, which is then updated in place.
        cu_seqlens: int64 or int32 [N + 1] on the device, or None. Sequence n is tokens cu_seqlens[n] to
            cu_seqlens[n + 1] - 1 of the one batch row (B must be 1); the first value is 0, the last one is T,
            and values never decrease. None: each batch row is a sequence, N = B. The values are checked on
            the CPU. On a GPU they are clamped into [0, T] instead, as the call does not wait to look at them.
        kernel: the name of one of `kernels()`; None picks the best for the device.
        threads: number of CPU threads; 0 means as many as the process may run on. The result does not depend
            on it.
        batch_invariant: True promises that a sequence's output and final state have the same bits whatever
            else is in the batch, and wherever the sequence is in the batch. The promise can cost time with
            the kernel "hopper", which then computes batches differently. All other kernels always keep it.
        max_seqlen: number of tokens of the longest sequence, in [0, T], if the caller knows it; 0: not known.
            With cu_seqlens on a GPU the number decides whether a long sequence is worth cutting, which can be
            several times as fast. A wrong number costs time, not correctness. Without cu_seqlens it changes
            nothing.
        cut: how the kernel "hopper" may cut sequences into segments that are computed in parallel: "auto"
            where it pays, "never", "always" whether it pays or not, "mixed" only by the schedule for
            sequences of different lengths. With "always" segments are so long that each CTA pair has about
            one segment of one head, and have at least 128 tokens on average; a sequence without room for two
            stays whole. Meant for tests and benchmarks. Results differ within the error budget. Other kernels
            take every value and cut nothing.
        nonfinite: int64 [10, 2] on the device, written, or None. For debugging a model: the call also counts
            the values that are NaN or an infinity, in the inputs as they are before it and in what it has
            written. Row i is for the i-th of q, k, v, g, beta, A_log, dt_bias, initial_state, out and
            final_state. It has the number of such values, and the place of the first one in the flattened
            array, or -1; `describe_nonfinite` puts the rows into sentences. Every element counts, whatever
            cu_seqlens says, and so does an infinity in g or beta, which is a number to the sigmoid. A_log and
            dt_bias count as they are in fp32.
        workspace: uint8 on the device, contiguous and aligned to 64 bytes, or None: the call gets scratch
            memory by itself. `get_workspace_size` says how many bytes are enough. With a workspace the call
            allocates nothing on the device, unless it copies or converts a tensor (below). Each call in
            flight needs a workspace of its own; calls that follow each other on a stream may share one.
        state_indices: int32 or int64 [N] on the device, or None. initial_state and final_state are then pools
            of slots: sequence n starts from slot state_indices[n] and ends in that slot. If two sequences
            have one slot and one of them writes it, the results of both are unspecified. An index beyond the
            pool is refused on the CPU; on a GPU the sequence starts from zeros and its state is not written.
        first_slot: an index below it means that the sequence starts from zeros and writes no final state. 0
            without state_indices.
        has_initial_state: bool [N] on the device, or None. Where it is False, the sequence starts from zeros;
            its final state is written all the same.
        checkpoint_states: fp32 or bf16 [rows, HV, V, K], written, or None. It gets states from inside of
            sequences; checkpoint_offsets or checkpoint_every says which. Rows without a checkpoint stay as
            they are. With batch_invariant, and with every kernel but "hopper" also without, a checkpoint has
            the bits of the final state of a sequence that ends there. No element is shared with a pool of
            the call.
        checkpoint_offsets: int32 or int64 [N] or [N, C] on the device: after how many tokens of sequence n
            its state is wanted, counted from the sequence's start in this call. Offsets are multiples of 16,
            at most the sequence's length, and need no order; 0 and less ask for none. A wrong one is refused
            on the CPU and left out on a GPU.
        checkpoint_indices: the same shape, int32 or int64, or None: the row for each of these states. None:
            row n C + c. A row beyond the rows is refused on the CPU and left out on a GPU.
        checkpoint_every: instead of checkpoint_offsets, a multiple e of 16: states after e, 2 e, ... tokens
            of each sequence are wanted.
        checkpoint_starts: int32 or int64 [N] on the device, or None: the row of the first of these states of
            sequence n, which the others follow. None: the rows of all sequences follow each other.
        use_gate_in_kernel: False: g is the log decay g_t itself, at most 0, and A_log and dt_bias are None.
            lower_bound then means nothing.
        use_qk_l2norm_in_kernel: False: q and k are normalised already, and used as they are.
        use_beta_sigmoid_in_kernel: False: beta is the write strength b_t itself.
        allow_neg_eigval: True: b_t = 2 sigmoid(beta), in (0, 2). Not with use_beta_sigmoid_in_kernel=False.
        state_v_first: False: all states are [.., K, V], checkpoints and pools too.
        saved: for training: uint8 on the device, contiguous and aligned to 64 bytes, written, or None.
            `get_saved_size` says how many bytes are enough. The call writes there, in a form of its own, what
            `bwd` would otherwise have to compute again. On the CPU no result has other bits for it; on a GPU
            results may have other last bits.

    All arrays are on one device. q, k, v, g and out may have any strides between batch rows, tokens and
    heads; their last dimension is contiguous. beta may have any strides. States, pools and checkpoints may
    have any stride in their first dimension; all their other dimensions are contiguous. All other arrays are
    contiguous. On a GPU the strides of q, k, v, g, out, states, pools and checkpoints are multiples of 16
    bytes, and those between tokens and between heads at most 2^31 - 1 elements. q, k, v, g, out, dt_bias and
    states are aligned to 16 bytes, the workspace to 64, and all others to an element. What is written shares
    no elements with anything else, except final_state with initial_state, and is no array of a library whose
    arrays are immutable, as JAX's are (see `compute`). T may be 0, and so may a sequence's length. Integers
    may be of any type that has `__index__`.

    PyTorch tensors may also be as layers hold them. The call then makes the tensor that it needs, which takes
    time and memory in every call:

    - A tensor whose strides or address do not fit the lines above is copied. `out` and `final_state` are
      computed beside the tensor and then copied into it. A pool, checkpoint_states and a workspace are never
      copied, and get a sentence instead.
    - A_log and dt_bias in 16 bits are converted to fp32.

    On a GPU the call returns once the work is queued: on PyTorch's current stream for tensors, on CuPy's for
    CuPy arrays. Arrays of other libraries (JAX, say) know nothing of the work that is queued, so for them the
    call uses the legacy default stream and waits until the result is there.

    A signal whose handler raises, as Ctrl-C's does, ends a long call on the CPU that was made in the main
    thread, within 100 ms. What `out` and `final_state` hold then is unspecified.

    Raises:
        ValueError: an argument has a wrong shape, value, device or memory.
        TypeError: an argument has a wrong dtype or is of a wrong type.
        RuntimeError: there is no such device or kernel, the driver failed, or gradients or tangents were
            asked for: `chunk_kda` has gradients, and there are no tangents.
    In each of these cases nothing was written. The message of a ValueError or TypeError names the argument.
    """
    if _torch_layer is None and "torch" in sys.modules:
        _find_torch()
    if A_log is not None and dt_bias is not None:
        arrays, given = [q, k, v, g, beta, out, A_log, dt_bias], BOTH_PARAMETERS
    else:
        arrays, given = [q, k, v, g, beta, out], 0
        if A_log is not None:
            arrays.append(A_log)
            given |= _A_LOG
        if dt_bias is not None:
            arrays.append(dt_bias)
            given |= _DT_BIAS
    if initial_state is not None:
        arrays.append(initial_state)
        given |= _INITIAL_STATE
    if final_state is not None:
        arrays.append(final_state)
        given |= _FINAL_STATE
    if cu_seqlens is not None:
        arrays.append(cu_seqlens)
        given |= _CU_SEQLENS
    if nonfinite is not None:
        arrays.append(nonfinite)
        given |= _NONFINITE
    is_tensor = _torch_layer is not None and isinstance(q, _torch_layer.Tensor)
    is_traced = is_tensor and _torch_layer.is_compiling()
    is_plain = (
        lower_bound is not None
        and workspace is None
        and state_indices is None
        and first_slot is _ZERO
        and has_initial_state is None
        and checkpoint_states is None
        and checkpoint_offsets is None
        and checkpoint_indices is None
        and checkpoint_every is None
        and checkpoint_starts is None
        and use_gate_in_kernel is True
        and use_qk_l2norm_in_kernel is True
        and use_beta_sigmoid_in_kernel is True
        and allow_neg_eigval is False
        and state_v_first is True
        and saved is None
    )
    if is_plain and not is_traced:
        if (
            kernel is None
            and threads is _ZERO
            and batch_invariant is False
            and max_seqlen is _ZERO
            and cut is _AUTO
        ):
            options = defaults_for[given]
        else:
            try:
                options = cached_options(given, kernel, threads, batch_invariant, max_seqlen, cut)
            except TypeError:  # a value has a wrong type, or one that the cache cannot look up
                options = known_options(given, kernel, threads, batch_invariant, max_seqlen, cut)
    else:
        later_arrays = (
            workspace, state_indices, has_initial_state, checkpoint_states, checkpoint_offsets,
            checkpoint_indices, checkpoint_starts, saved,
        )  # fmt: skip
        for place, array in enumerate(later_arrays, _PLACE_OF_WORKSPACE):
            if array is not None:
                arrays.append(array)
                given |= 1 << place
        # A compiler traces the constructor, since it cannot trace a cache.
        options = (Options if is_traced else known_options)(
            given, kernel, threads, batch_invariant, max_seqlen, cut, first_slot, checkpoint_every,
            use_gate_in_kernel, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
            state_v_first, lower_bound is not None,
        )  # fmt: skip
        if lower_bound is None:
            lower_bound = 0.0  # which C does not look at
    if is_traced:
        _torch_layer.call_c_traced(arrays, options, scale, lower_bound)
    elif is_tensor:
        _torch_layer.call_c(arrays, options, scale, lower_bound)
    else:
        _arrays.call_c(arrays, options, scale, lower_bound)


def decode(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    scale: SupportsFloat,
    out: Array,
    A_log: Array | None,
    dt_bias: Array | None,
    lower_bound: SupportsFloat | None,
    state: Array,
    *,
    state_indices: Array | None = None,
    first_slot: int = 0,
    num_accepted_tokens: Array | None = None,
    write_states: str = "last",
    cu_seqlens: Array | None = None,
    parents: Array | None = None,
    records: Array | None = None,
    rounding: Array | None = None,
    written_states: Array | None = None,
    written_indices: Array | None = None,
    past_records: Array | None = None,
    accepted: Array | None = None,
    kernel: str | None = None,
    threads: int = 0,
    use_gate_in_kernel: bool = True,
    use_qk_l2norm_in_kernel: bool = True,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    state_v_first: bool = True,
) -> None:
    """A few tokens of each of many sequences, whose states lie in a pool and are updated in place. Writes
    `out`, and states as write_states says; returns None.

    The recurrence is that of `fwd`, in fp32. Each state is read once and written at most once, so the time is
    that of moving the states.

    Args:
        q, k: bf16 [N, T, H, K], T tokens of each of N sequences, 0 to 16. With cu_seqlens [1, total, H, K].
        v, out: bf16 [N, T, HV, V], out is written. With cu_seqlens [1, total, HV, V].
        g: bf16 or fp32 [N, T, HV, K]. With cu_seqlens [1, total, HV, K].
        beta: bf16 or fp32 [N, T, HV]. With cu_seqlens [1, total, HV].
        scale, A_log, dt_bias, lower_bound: as for `fwd`.
        state: the pool, fp32 or bf16 [slots, HV, V, K], read and written.
        state_indices: int32 or int64 [N] on the device, or None: sequence n has slot state_indices[n], or n.
            With write_states="each" it is required, and is [N, S] with S at least the longest sequence.
        first_slot: an index below it means that the sequence has no state: its out and its records are zeros,
            and the pool is neither read nor written for it. An index beyond the pool means the same on a GPU,
            and is refused on the CPU. With write_states="each" a slot below first_slot or beyond the pool
            takes no state, and the others do.
        num_accepted_tokens: int32 or int64 [N], or None. With write_states="each" sequence n starts from slot
            state_indices[n, num_accepted_tokens[n] - 1]. None: from slot state_indices[n, 0]. With
            past_records it is required, and is how many of them are applied.
        write_states: "last": the state after a sequence's last token, to the slot that it came from. "none":
            no state is written, as when draft tokens are verified; see records. "each": the state after token
            i of sequence n, to slot state_indices[n, i].
        cu_seqlens: int32 or int64 [N + 1], or None. Sequence n is tokens cu_seqlens[n] to
            cu_seqlens[n + 1] - 1 of the one row, 0 to 16 of them.
        parents: int32 or int64 [N, P], or None: the tokens of a sequence are a tree. Token i of sequence n
            continues from token parents[n, i] of that sequence, which is less than i, or from the sequence's
            starting state where parents[n, i] is negative. P is at least the longest sequence. Not with
            write_states="last". None: token i continues from token i - 1.
        records: fp32 [N, R, HV, 3, 128], contiguous, written, or None. Row [n, i] gets what `apply_records`
            needs of token i of sequence n: the decay exp(g_t) of each channel, the key k_t, and u_t. R is at
            least the longest sequence.
        rounding: int64 [2] on the device, or None: seed and offset of the random numbers with which a bf16
            state is rounded. None: to the nearest. Rounded to the nearest at each step, a bf16 state does not
            change at all where it forgets too little a token; rounded at random it is right on average. Equal
            seeds, offsets, indices and inputs give equal bits. The caller raises the offset from call to
            call. Ignored with an fp32 state.
        written_states: a second pool [slots2, HV, V, K] in the dtype of state, or None. It takes all states
            that the call writes, and state is read alone. state_indices is then [N], or None, also with
            write_states="each". Not with write_states="none", nor with num_accepted_tokens.
        written_indices: int32 or int64, or None; with written_states alone. The slot of written_states for
            each state that is written. A negative one takes no state; one beyond written_states takes none on
            a GPU, and is refused on the CPU. With write_states="last" [N]; None: slot n for sequence n. With
            "each" [N, W], with [n, i] for token i of sequence n and W at least the longest sequence; None:
            the slot is the token's number among all tokens, n T + i, or cu_seqlens[n] + i.
        past_records: fp32 [N, R2, HV, 3, 128], contiguous, or None; with write_states="none" alone. Records
            that an earlier call wrote. The call first does with them, num_accepted_tokens and accepted what
            `apply_records` does: it writes the state after the accepted tokens to the slot. Then it computes
            its own tokens from there. On a GPU a state crosses memory once in each direction for all of that.
            It must be another tensor than records.
        accepted: int32 or int64 [N, A], or None; with past_records alone. As for `apply_records`.
        kernel, threads: as for `fwd`.
        use_gate_in_kernel, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval: as for
            `fwd`.
        state_v_first: False: the pool is [slots, HV, K, V].

    Strides, addresses, devices and what is copied or converted of PyTorch tensors are as for `fwd`; a pool
    has any stride between slots, is contiguous inside of a slot, and is never copied, nor are records. If two
    sequences have one slot and one of them writes it, the results of both are unspecified; from a slot that
    nothing writes any number of sequences may start. On a GPU the
    values of cu_seqlens, parents and num_accepted_tokens are clamped into their ranges, and a sequence of
    more than 16 tokens ends after 16: the rest of its out is zeros. On the CPU such values are refused.

    A call needs no workspace and allocates nothing, unless it copies or converts a tensor. After the first
    call on a device it is safe under CUDA graph capture. A replayed graph takes the values that
    state_indices, num_accepted_tokens, accepted, cu_seqlens, parents, rounding and written_indices have at
    the replay.

    Raises:
        ValueError, TypeError, RuntimeError: as `fwd`. Nothing was written then.
    """
    if _torch_layer is None and "torch" in sys.modules:
        _find_torch()
    arrays = [q, k, v, g, beta, out, state]
    given = _append_given(
        arrays, A_log, dt_bias, state_indices, num_accepted_tokens, cu_seqlens, parents, records, rounding,
        written_states, written_indices, past_records, accepted,
    )  # fmt: skip
    _hand_over(
        DECODE, arrays, scale, 0.0 if lower_bound is None else lower_bound,
        (given, first_slot, write_states, kernel, threads, use_gate_in_kernel, use_qk_l2norm_in_kernel,
         use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, lower_bound is not None),
    )  # fmt: skip


def decode_layer(
    x: Array,
    weight: Array,
    bias: Array | None,
    conv_state: Array,
    g: Array,
    beta: Array,
    A_log: Array | None,
    dt_bias: Array | None,
    state_indices: Array | None,
    state: Array,
    *,
    out: Array | None = None,
    lower_bound: SupportsFloat | None = None,
    output_gate: Array | None = None,
    norm_weight: Array | None = None,
    norm_eps: float = 1e-5,
    first_slot: int = 0,
    scale: SupportsFloat | None = None,
    num_accepted_tokens: Array | None = None,
    write_states: str = "last",
    cu_seqlens: Array | None = None,
    records: Array | None = None,
    conv_windows: Array | None = None,
    rounding: Array | None = None,
    written_states: Array | None = None,
    written_indices: Array | None = None,
    kernel: str | None = None,
    threads: int = 0,
    use_gate_in_kernel: bool = True,
    use_qk_l2norm_in_kernel: bool = True,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    state_v_first: bool = True,
) -> Any:
    """One step of a KDA layer between its projections, in one launch: the convolution over the last four
    tokens, which gives q, k and v, the recurrence of `decode`, and the norm with the output gate.

        y_t     = silu(bias + sum of weight[j] x_(t-3+j), j = 0 .. 3)    each of the 3 H D channels alone
        q, k, v = the three parts of y_t, and o_t as `fwd` has it
        out     = o_t / sqrt(mean over V of o_t^2 + norm_eps) * norm_weight * sigmoid(output_gate)

    Writes `out`, `state` and `conv_state`, and returns out. All numbers between the arguments and out are
    fp32: q, k and v are not rounded to bf16. D = K = V = 128.

    Args:
        x: bf16 [N, T, 3 H D], T tokens of each of N sequences, 0 to 16: all channels of q, then of k, then of
            v. With cu_seqlens [1, total, 3 H D]. With one token of each sequence also [N, 3 H D]: g, out and
            output_gate may then be [N, H, D] or [1, N, H, D], and beta [N, H] or [1, N, H].
        weight: fp32 or bf16 [3 H D, 4] or [3, 4, H D], the oldest input first.
        bias: fp32 or bf16, 3 H D elements, or None: zeros.
        conv_state: bf16 [slots, 3 H D, L], L at least 3, read and written. Columns 0 to 2 of a slot are its
            window, the last three inputs of each channel, the oldest first.
        g: bf16 or fp32 [N, T, H, D], gate before its activation.
        beta: bf16 or fp32 [N, T, H], logits of the write strength.
        A_log, dt_bias, lower_bound: as for `fwd`; a lower_bound of None chooses the softplus gate.
        state_indices, first_slot: as for `decode`, for state and conv_state alike.
        state: the pool, fp32 or bf16 [slots, H, V, K], of as many slots as conv_state.
        out: bf16, the shape of g, written. None: a new array.
        output_gate: bf16 or fp32 [N, T, H, D], or None: out has no factor sigmoid(output_gate).
        norm_weight: fp32 or bf16 [D], or None: out is not normalised.
        norm_eps: at least 0.
        scale: finite; None: D ** -0.5.
        num_accepted_tokens, write_states, cu_seqlens, records, rounding: as for `decode`. The convolution's
            window goes where the state goes. "last": the window after the last token replaces the sequence's.
            "none": conv_state stays as it is; see conv_windows. "each" with L = 3: the window after token i
            goes to slot state_indices[n, i], and a sequence starts from the window of the slot that its state
            is read from. "each" with L of at least S + 2: slot state_indices[n, 0] has the inputs of all
            draft tokens. A sequence starts from its columns a to a + 2, with a = num_accepted_tokens[n] - 1
            or 0, and leaves columns a + 1 and a + 2 in columns 0 and 1, and its T inputs behind them.
        conv_windows: bf16 [N, C, 3 H D, 3], written, or None: the window after token i of sequence n in
            [n, i]. Once draft tokens were verified, the window after the last accepted one belongs into the
            sequence's slot of conv_state.
        written_states, written_indices: as for `decode`. state and conv_state are then read alone, whatever
            write_states says; conv_windows has the windows.
        kernel, threads: as for `fwd`.
        use_gate_in_kernel, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval: as for
            `fwd`; the norm is that of q and k after the convolution.
        state_v_first: False: the pool is [slots, H, K, V].

    x, g, out and output_gate may have any strides and any address, if their last dimension is contiguous, and
    weight, beta, conv_state and conv_windows any strides at all; on a GPU too. So conv_state may be a
    transposed [slots, L, 3 H D], and its slots may lie in pages beside those of state. state is as for
    `decode`. Neither pool is ever copied. All else is as for `decode`.

    Raises:
        ValueError, TypeError, RuntimeError: as `fwd`. Nothing was written then.
    """
    if _torch_layer is None and "torch" in sys.modules:
        _find_torch()
    result, out = (out, out) if out is not None else _new_out(x, g)
    arrays = [x, weight, conv_state, g, beta, out, state]
    given = _append_given(
        arrays, bias, A_log, dt_bias, state_indices, output_gate, norm_weight, num_accepted_tokens,
        cu_seqlens, records, conv_windows, rounding, written_states, written_indices,
    )  # fmt: skip
    _hand_over(
        DECODE_LAYER, arrays, _SCALE if scale is None else scale, 0.0 if lower_bound is None else lower_bound,
        (given, norm_eps, first_slot, write_states, kernel, threads, use_gate_in_kernel,
         use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first,
         lower_bound is not None),
    )  # fmt: skip
    return result


_SCALE = 128**-0.5


def _new_out(x: Any, g: Any) -> tuple[Any, Any]:
    """A new array for the outputs of decode_layer, and what the call takes to write it."""
    is_torch = _torch_layer is not None and isinstance(x, _torch_layer.Tensor)
    # PyTorch 2.4 cannot trace hasattr().
    if not (is_torch and isinstance(g, _torch_layer.Tensor)) and not hasattr(g, "shape"):
        raise TypeError(f"g is of type {type(g).__name__}; it must be an array")
    if is_torch:
        return _torch_layer.empty_like(x, g.shape, False)
    _arrays.check_makes_arrays(x, "x", "pass an array as out")
    return _arrays.empty_like(x, tuple(g.shape), False)


def apply_records(
    records: Array,
    num_accepted_tokens: Array,
    state: Array,
    *,
    accepted: Array | None = None,
    state_indices: Array | None = None,
    first_slot: int = 0,
    rounding: Array | None = None,
    kernel: str | None = None,
    threads: int = 0,
    state_v_first: bool = True,
) -> None:
    """Brings states up to date after draft tokens were verified: the state of sequence n becomes what it is
    after the first num_accepted_tokens[n] tokens of its records. Updates `state` in place; returns None.

    Each state is read and written once, however many tokens there are.

    Args:
        records: fp32 [N, R, HV, 3, 128], contiguous: what `decode` has written.
        num_accepted_tokens: int32 or int64 [N] on the device: how many tokens of each sequence are applied, 0
            to R, and at most 16. Other values are clamped on a GPU and refused on the CPU. With 0 the state
            stays as it is.
        state: the pool, as for `decode`.
        accepted: int32 or int64 [N, A], or None: which tokens are applied, in this order, where the drafts
            were a tree: the record of token accepted[n, i] is applied as number i. None: tokens 0, 1, 2, ...
            A token outside of [0, R) ends the sequence's list on a GPU and is refused on the CPU.
        state_indices: int32 or int64 [N], or None, and first_slot, as for `decode`: a sequence without a
            state is left out.
        rounding, kernel, threads, state_v_first: as for `decode`.

    Raises:
        ValueError, TypeError, RuntimeError: as `fwd`. Nothing was written then.
    """
    if _torch_layer is None and "torch" in sys.modules:
        _find_torch()
    arrays = [records, num_accepted_tokens, state]
    given = _append_given(arrays, accepted, state_indices, rounding)
    _hand_over(APPLY, arrays, 0.0, 0.0, (given, first_slot, kernel, threads, state_v_first))


def _append_given(arrays: list[Any], *optional: Any) -> int:
    """Appends those of a call's optional arrays that are given, and returns `given` of the call's options.
    The order is that of `optional_arrays` of the function's options."""
    given, bit = 0, 1
    for array in optional:
        if array is not None:
            arrays.append(array)
            given |= bit
        bit += bit
    return given


def _hand_over(
    known: KnownOptions, arrays: list[Any], scale: Any, lower_bound: Any, values: tuple[Any, ...]
) -> None:
    """Hands the arrays of a call to C. values: of the options, `given` first."""
    if _torch_layer is not None and isinstance(arrays[0], _torch_layer.Tensor):
        if _torch_layer.is_compiling():
            # A compiler traces the constructor, since it cannot trace a cache.
            _torch_layer.call_c_traced(arrays, known.cls(*values), scale, lower_bound)
            return
        call_c = _torch_layer.call_c
    else:
        call_c = _arrays.call_c
    try:
        options = known.cached(*values)
    except TypeError:  # a value has a wrong type, or one that the cache cannot look up
        options = known.known(*values)
    call_c(arrays, options, scale, lower_bound)


def describe_nonfinite(
    nonfinite: Any,
    q: Any,
    cu_seqlens: Any = None,
    *,
    v: Any = None,
    initial_state: Any = None,
    final_state: Any = None,
) -> list[str]:
    """What a call of `fwd` has counted, as sentences: one for each array that has NaN or infinities, such as
    "q: 3 of 4096 values are not finite, the first is q[0, 17, 2, 5]". An empty list if all values are finite.

    On a GPU this waits for the call, since it reads `nonfinite`.

    Args:
        nonfinite: what the call of `fwd` has filled in.
        q, cu_seqlens: the arguments of that call, of which only the shapes are read.
        v: likewise, if v has more heads than q.
        initial_state, final_state: likewise, if they are pools.

    Raises:
        ValueError: `nonfinite` has another shape, or counts that a call with such a q cannot have found.
    """
    return _nonfinite.describe(nonfinite, q, cu_seqlens, v, initial_state, final_state)


def compute(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    scale: SupportsFloat,
    A_log: Array | None,
    dt_bias: Array | None,
    lower_bound: SupportsFloat | None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    *,
    output_final_state: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    """The forward pass into new arrays: `fwd` for libraries whose arrays are immutable, as JAX's are, and
    for all who do not keep output arrays of their own.

    Args:
        output_final_state: whether the final state is wanted, too.
        options: `kernel`, `state_indices` and all other arguments that `fwd` takes by keyword alone. With
            checkpoint_offsets or checkpoint_every the call makes checkpoint_states if it is not given, in
            fp32 and with zeros where there is no checkpoint. `checkpoint_rows` says how many rows it has.
            With checkpoint_indices or checkpoint_starts, which may name any row, `checkpoint_rows` must be
            given; otherwise the call finds the number by itself. A checkpoint_states that is given is
            written.
    The other arguments are as for `fwd`.

    Returns:
        out [B, T, HV, V] in bf16, and the final state [N, HV, V, K] or None. With state_indices the final
        state is a changed copy of the pool initial_state. If checkpoints are asked for, checkpoint_states
        comes third. The state has the dtype of initial_state, or fp32 without one. All are of v's library
        and on v's device: PyTorch tensors, NumPy arrays, JAX arrays, or arrays of a library that follows the
        Python array API standard.

    Inside of `jax.jit`, `jax.grad` and `jax.vmap` arrays are tracers, which have no memory and are refused.
    `flash_kda.jax.fwd` is this function for `jax.jit` and `jax.vmap`.

    Raises:
        ValueError, TypeError, RuntimeError: as `fwd`.
    """
    out, written_out, state, written_state, checkpoints, written_checkpoints = _functional.new_results(
        _torch_layer, q, v, initial_state, cu_seqlens, output_final_state, options
    )
    if written_checkpoints is not None:
        options["checkpoint_states"] = written_checkpoints
    fwd(
        q, k, v, g, beta, scale, written_out, A_log, dt_bias, lower_bound, initial_state, written_state,
        cu_seqlens, **options,
    )  # fmt: skip
    return (out, state) if checkpoints is None else (out, state, checkpoints)


def chunk_kda(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any = None,
    cu_seqlens_cpu: Any = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """The forward pass, with gradients, and with the arguments, defaults and results of
    `fla.ops.kda.chunk_kda` in flash-linear-attention 0.6, for PyTorch tensors: replace the
    import, and the call stays as it is.

    q, k, v, g, beta, A_log, dt_bias and initial_state have gradients, from those of out and final_state. A
    gradient has the dtype of its tensor. A device that cannot compute the gradients of a call is refused with
    RuntimeError before anything is computed. Under autocast to bf16, q, k and v are cast to bf16.

    Args:
        q, k: bf16 [B, T, H, K]; used as they are unless use_qk_l2norm_in_kernel.
        v: bf16 [B, T, HV, V], with HV a multiple of H.
        g: bf16 or fp32 [B, T, HV, K], the log decay; with use_gate_in_kernel the gate before its activation.
        beta: bf16 or fp32 [B, T, HV], the write strength; with use_beta_sigmoid_in_kernel its logits.
        scale: multiplies the output; None: K ** -0.5.
        initial_state: fp32 [N, HV, K, V], or None: zeros.
        output_final_state: whether the final state is wanted.
        allow_neg_eigval: with use_beta_sigmoid_in_kernel, 2 sigmoid(beta).
        safe_gate: with use_gate_in_kernel, lower_bound must be in [-5, 0). The flag changes no result.
        lower_bound: with use_gate_in_kernel, the gate is lower_bound * sigmoid(exp(A_log) * (g + dt_bias)),
            or with None -exp(A_log) * softplus(g + dt_bias).
        disable_recompute: True: where gradients are wanted, the forward pass keeps states for the backward
            pass, at most a fifth of the bytes of q, k, v and g in bf16 (on a GPU a quarter). False: the
            backward pass computes them again. On the CPU no result has other bits. False with
            return_intermediate_states.
        return_intermediate_states: whether the state before each chunk is wanted, too; in
            torch.inference_mode() alone.
        state_v_first: states are [.., V, K] instead of [.., K, V].
        cu_seqlens: int64 or int32 [N + 1], where sequences begin, with B = 1.
        cu_seqlens_cpu: the same in CPU memory. The longest sequence is then known, as with max_seqlen of
            `fwd`.
        cp_context: must be None.
        use_graph, max_num_seqs: for CUDA graphs whose sequences change between replays. Calls can always be
            captured, so the flag only makes the intermediate states have the most rows that there can be.
            With use_graph, a max_num_seqs that is given must be N.
        kwargs: A_log (HV elements, or None with a lower_bound), dt_bias (HV * K elements, or None),
            chunk_size (tokens between intermediate states: 64, or 32), transpose_state_layout (an older name
            of state_v_first). FLA does not have these: kernel and batch_invariant, as for `fwd`, and
            workspace_limit, as for `bwd`, which is for the backward pass alone.

    Returns:
        (out, final_state): bf16 [B, T, HV, V], and fp32 [N, HV, K, V] or None. With
        return_intermediate_states also the states before each chunk, bf16 [B, chunks, HV, K, V]; with
        cu_seqlens the chunks of all sequences follow each other.

    Raises:
        ValueError, TypeError, RuntimeError: as `fwd`. A RuntimeError also where gradients are wanted and no
            kernel of the device computes them, or gradients of gradients are asked for.
    """
    call = {
        "q": q, "k": k, "v": v, "g": g, "beta": beta, "scale": scale, "initial_state": initial_state,
        "output_final_state": output_final_state, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        "use_gate_in_kernel": use_gate_in_kernel,
        "use_beta_sigmoid_in_kernel": use_beta_sigmoid_in_kernel, "allow_neg_eigval": allow_neg_eigval,
        "safe_gate": safe_gate, "lower_bound": lower_bound, "disable_recompute": disable_recompute,
        "return_intermediate_states": return_intermediate_states, "state_v_first": state_v_first,
        "cu_seqlens": cu_seqlens, "cu_seqlens_cpu": cu_seqlens_cpu, "cp_context": cp_context,
        "use_graph": use_graph, "max_num_seqs": max_num_seqs,
    }  # fmt: skip
    return _chunk_kda.chunk_kda(call, kwargs)


def fused_recurrent_kda(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    A_log: Any = None,
    dt_bias: Any = None,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Any = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """The forward pass with the arguments, defaults and results of `fla.ops.kda.fused_recurrent_kda` in
    flash-linear-attention 0.6, for PyTorch tensors: replace the import, and the call stays as it is.

    Where every sequence is known to have at most 16 tokens, `decode` computes it, in fp32. Else `fwd` does.
    The host knows it from the shapes: T is at most 16, or with cu_seqlens all sequences have at most 16
    tokens together, or cu_seqlens_cpu says it. The values of a cu_seqlens are not looked at.

    Args:
        q, k: bf16 [B, T, H, K]; used as they are unless use_qk_l2norm_in_kernel.
        v: bf16 [B, T, HV, V], with HV a multiple of H.
        g: bf16 or fp32 [B, T, HV, K], the log decay; with use_gate_in_kernel the gate before its activation.
        beta: bf16 or fp32 [B, T, HV], the write strength; with use_beta_sigmoid_in_kernel its logits.
        A_log, dt_bias: of the gate, HV and HV * K elements; without use_gate_in_kernel they mean nothing.
        scale: multiplies the output; None: K ** -0.5.
        initial_state: bf16 or fp32 [N, HV, K, V], or None: zeros.
        output_final_state: whether the final state is wanted.
        allow_neg_eigval: with use_beta_sigmoid_in_kernel, 2 sigmoid(beta).
        lower_bound: with use_gate_in_kernel, the gate is lower_bound * sigmoid(exp(A_log) * (g + dt_bias)),
            or with None -exp(A_log) * softplus(g + dt_bias).
        state_v_first: states are [.., V, K] instead of [.., K, V].
        cu_seqlens: int64 or int32 [N + 1], where sequences begin, with B = 1.
        kwargs: cu_seqlens_cpu (cu_seqlens in CPU memory), transpose_state_layout (an older name of
            state_v_first).

    Returns:
        (out, final_state): bf16 [B, T, HV, V], and fp32 [N, HV, K, V] or None.

    Raises:
        ValueError, TypeError, RuntimeError: as `fwd`.
    """
    call = {
        "q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias, "scale": scale,
        "initial_state": initial_state, "output_final_state": output_final_state,
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel, "use_gate_in_kernel": use_gate_in_kernel,
        "use_beta_sigmoid_in_kernel": use_beta_sigmoid_in_kernel, "allow_neg_eigval": allow_neg_eigval,
        "lower_bound": lower_bound, "state_v_first": state_v_first, "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    return _fused_recurrent_kda.fused_recurrent_kda(call, kwargs)


def get_workspace_size(
    T_total: int,
    H: int,
    N: int = 1,
    *,
    HV: int | None = None,
    device: Any = None,
    kernel: str | None = None,
    batch_invariant: bool | None = None,
    max_seqlen: int | None = None,
    largest_batch: bool = False,
    **options: Any,
) -> int:
    """The bytes of workspace that a call with T_total tokens in all, H heads and N sequences may need.

    `fwd` allocates its workspace by itself, unless it gets one. An engine that wants no allocation in a call
    asks once, with the most tokens and sequences of a batch and largest_batch=True, and passes the same
    workspace to every call.

    Args:
        HV: heads of v, if they are more than H.
        device: as for `explain`; None: the size is the largest over the devices of this machine.
        kernel: the kernel that the call names; None: the size is the largest over all kernels of the device.
        batch_invariant, max_seqlen: what the call passes; None: the size is the largest over what it may
            pass.
        largest_batch: True: the workspace is for batches of at most T_total tokens and at most N sequences. A
            smaller batch can need more than the largest one, since the host then cuts sequences in another
            way. So the size is the largest over many batches, with a quarter on top for those between them.
        options: what else the call asks for: threads, cut, and the arguments of `explain` from lower_bound on
            (with_state_indices, checkpoints, fp32_gate, ...). Without them the size is enough for calls with
            pools, checkpoints and any gate, too. cut is "auto" by default: its other values, which are meant
            for tests and benchmarks, may need more.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range.
    """
    return _shapes.workspace_size(
        (T_total, H, N, HV), device, batch_invariant, max_seqlen, largest_batch, {"kernel": kernel, **options}
    )


def get_saved_size(
    T_total: int,
    H: int,
    N: int = 1,
    *,
    HV: int | None = None,
    device: Any = None,
    kernel: str | None = None,
    max_seqlen: int | None = None,
    **options: Any,
) -> int:
    """The bytes of `saved` that a forward pass with T_total tokens in all, H heads and N sequences may need.

    Args:
        HV: heads of v, if they are more than H.
        device: as for `explain`; None: the size is the largest over the devices of this machine that can
            train.
        kernel: the kernel that the call names; None: the size is the largest over all kernels of the device.
        max_seqlen: what the call passes; None: the size is the largest over what it may pass.
        options: what else the call asks for: the arguments of `explain` from lower_bound on.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range.
        RuntimeError: no kernel of the device trains.
    """
    return _shapes.saved_size((T_total, H, N, HV), device, max_seqlen, {"kernel": kernel, **options})


def explain(
    T_total: int,
    H: int,
    N: int = 1,
    device: Any = None,
    kernel: str | None = None,
    batch_invariant: bool = False,
    max_seqlen: int = 0,
    cut: str = "auto",
    *,
    HV: int | None = None,
    lower_bound: SupportsFloat | None = -5.0,
    with_state_indices: bool = False,
    checkpoints: int = 0,
    checkpoint_every: int | None = None,
    fp32_gate: bool = False,
    use_gate_in_kernel: bool = True,
    use_qk_l2norm_in_kernel: bool = True,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    state_v_first: bool = True,
) -> str:
    """Which kernel `fwd` would run for T_total tokens in all, H heads and N sequences, why, how it would lay
    the work out, and how much workspace it would use: a few lines to be read, whose wording may change.

    Args:
        device: "cpu", "cuda" (CUDA device 0), "cuda:1", or a torch.device; None is CUDA device 0 if it can be
            used, else the CPU.
        HV: heads of v, if they are more than H.
        with_state_indices: whether the states are in a pool.
        checkpoints: C, how many checkpoint_offsets a sequence has.
        fp32_gate: whether g or beta is fp32.
    All other arguments are as for `fwd`.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range, or there is no such device or kernel.
        RuntimeError: the kernel does not run on the device.
    """
    shape = _shapes.Shape(
        T_total,
        H,
        N,
        HV,
        kernel=kernel,
        batch_invariant=batch_invariant,
        max_seqlen=max_seqlen,
        cut=cut,
        lower_bound=lower_bound,
        with_state_indices=with_state_indices,
        checkpoints=checkpoints,
        checkpoint_every=checkpoint_every,
        fp32_gate=fp32_gate,
        use_gate_in_kernel=use_gate_in_kernel,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
    )
    return _shapes.explain(device, shape)


def explain_decode(
    N: int,
    T: int,
    H: int,
    device: Any = None,
    kernel: str | None = None,
    *,
    function: str = "decode",
    HV: int | None = None,
    write_states: str = "last",
    bf16_state: bool = False,
    fp32_gate: bool = False,
    with_cu_seqlens: bool = False,
    with_parents: bool = False,
    with_records: bool = False,
    with_written_states: bool = False,
    with_past_records: bool = False,
    state_v_first: bool = True,
) -> str:
    """Which kernel a call of `decode`, `decode_layer` or `apply_records` would run for T tokens of each of N
    sequences and H heads, why, in how many CTAs, and how many bytes it would move: a few lines to be read,
    whose wording may change. Nothing is computed.

    Args:
        T: for `apply_records`, R: the tokens of a sequence that have records.
        device: as for `explain`.
        function: "decode", "decode_layer" or "apply_records".
        HV: heads of v, if they are more than H; of `decode` alone.
        bf16_state: whether the pool is bf16.
        fp32_gate: whether g and beta are fp32.
        with_cu_seqlens: whether the N T tokens come in one row, with cu_seqlens.
        with_parents, with_records, with_written_states, with_past_records: whether the call has these arrays.
            There are T past records of a sequence.
    All other arguments are as for `decode`.

    Raises:
        TypeError, ValueError, RuntimeError: as `explain`, and as `decode` would.
    """
    shape = _shapes.DecodeShape(
        N,
        T,
        H,
        function=function,
        HV=HV,
        write_states=write_states,
        kernel=kernel,
        state_v_first=state_v_first,
        bf16_state=bf16_state,
        fp32_gate=fp32_gate,
        with_cu_seqlens=with_cu_seqlens,
        with_parents=with_parents,
        with_records=with_records,
        with_written_states=with_written_states,
        with_past_records=with_past_records,
    )
    return _shapes.explain_decode(device, shape)


@dataclass(frozen=True)
class Device:
    """One device of this machine.

    Attributes:
        type: "cpu" or "cuda".
        index: the CUDA ordinal; 0 for the CPU.
        name: "NVIDIA H100 80GB HBM3".
        arch: "sm_90", "x86-64 avx512".
        kernel: what runs there by default; "" if nothing can.
        reason: why nothing can run there, else "".
        units: SMs of a GPU, threads of the CPU.
        memory: bytes.
    """

    type: str
    index: int
    name: str
    arch: str
    kernel: str
    reason: str
    units: int
    memory: int


def devices() -> list[Device]:
    """The devices of this machine: the CPU first, then the GPUs, if CUDA can be used."""
    return [_describe(info) for info in _lib.device_infos()]


def _describe(info: _lib.DeviceInfo) -> Device:
    def text(field: bytes) -> str:
        return field.decode(errors="replace")

    return Device(
        "cuda" if info.device.type == _lib.CUDA else "cpu",
        info.device.index,
        text(info.name),
        text(info.arch),
        text(info.kernel),
        text(info.reason),
        info.units,
        info.memory,
    )


def kernels() -> list[str]:
    """The names that `fwd` takes as `kernel`."""
    return [info.name.decode() for info in _lib.kernel_infos()]


def reference(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: SupportsFloat,
    A_log: Any,
    dt_bias: Any,
    lower_bound: SupportsFloat | None,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    **options: Any,
) -> tuple[Any, ...]:
    """The recurrence in the docstring of `fwd`, token by token in fp64 on the CPU: slow, and meant for tests.

    Takes the arguments of `fwd` as PyTorch tensors or JAX arrays (of any device), NumPy arrays, or arrays in
    CPU memory that have DLPack's two methods, and by keyword what `fwd` takes by keyword, except workspace
    and nonfinite. Options that change no result (kernel, threads, ...) are taken and change nothing.

    Returns the output [B, T, HV, V] and the final state [N, HV, V, K] in fp64: CPU tensors if q is a tensor,
    else NumPy arrays. With state_indices, too, row n of the final state is the state of sequence n. With
    checkpoint_offsets or checkpoint_every a third array has the checkpoints [rows, HV, V, K], with zeros in
    rows without one. checkpoint_states, of which the shape alone counts, or `checkpoint_rows` says how many
    rows there are, if not as in `compute`. With state_v_first=False all states are [.., K, V].

    Raises:
        ValueError, TypeError: as `fwd`.
    """
    return _reference.reference(
        q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens, options
    )


def decode_reference(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: SupportsFloat,
    A_log: Any,
    dt_bias: Any,
    lower_bound: SupportsFloat | None,
    state: Any,
    **options: Any,
) -> tuple[Any, ...]:
    """What `decode` computes, token by token in fp64 on the CPU: slow, and meant for tests.

    Takes the arguments of `decode`, as `reference` takes those of `fwd`, and by keyword what `decode` takes
    by keyword. Of records the shape alone counts. Writes to none of its arguments.

    Returns the output [N, T, HV, V] and the state after each token [N, T, HV, V, K] in fp64, with cu_seqlens
    [1, total, HV, V] and [total, HV, V, K]: CPU tensors if q is a tensor, else NumPy arrays. A token of a
    sequence without a state has zeros in both. With state_v_first=False states are [.., K, V].

    Raises:
        ValueError, TypeError: as `decode`.
    """
    return _reference.decode_reference(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, state, options)


def decode_layer_reference(
    x: Any,
    weight: Any,
    bias: Any,
    conv_state: Any,
    g: Any,
    beta: Any,
    A_log: Any,
    dt_bias: Any,
    state_indices: Any,
    state: Any,
    **options: Any,
) -> tuple[Any, ...]:
    """What `decode_layer` computes, token by token in fp64 on the CPU: slow, and meant for tests.

    Takes the arguments of `decode_layer`, as `reference` takes those of `fwd`. Of records and conv_windows
    the shape alone counts. Writes to none of its arguments.

    Returns the output, in the shape of g, and for each row of it the state after that token, [.., H, V, K],
    in fp64: CPU tensors if x is a tensor, else NumPy arrays. A token of a sequence without a state has zeros
    in both. With state_v_first=False states are [.., K, V].

    Raises:
        ValueError, TypeError: as `decode_layer`.
    """
    given = {
        "x": x, "weight": weight, "bias": bias, "conv_state": conv_state, "g": g, "beta": beta,
        "A_log": A_log, "dt_bias": dt_bias, "state_indices": state_indices, "state": state,
    }  # fmt: skip
    return _reference.decode_layer_reference(given, options)


_loading = threading.Lock()


def _load_torch_layer() -> None:
    """Imports flash_kda._torch and flash_kda._autograd, which also register the operators. May run in several
    threads."""
    global _torch_layer
    with _loading:
        if _torch_layer is None:
            layer = importlib.import_module("._torch", __name__)
            importlib.import_module("._autograd", __name__)
            _torch_layer = layer


def _find_torch() -> None:
    """PyTorch is used only if the caller imported it, and only once the import is complete."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if spec is not None and not getattr(spec, "_initializing", False):
        _load_torch_layer()


def _layer_of_torch() -> Any:
    """flash_kda._torch, or None where PyTorch is not imported."""
    if _torch_layer is None and "torch" in sys.modules:
        _find_torch()
    return _torch_layer


_find_torch()
if _torch_layer is None:
    _later.when_imported("torch", _load_torch_layer)
_fla.serve()
_installed.warn()
