"""One batch on several ranks of torch.distributed, each of which holds a share of the tokens.

The ranks of a group hold the tokens of a packed batch in the order of their numbers. A sequence that crosses
from one rank to the next is computed in pieces. Whatever the gates, a piece changes the state by an affine
map, so ranks need nothing of each other but maps and states, 64 KB each of a head, and what they compute is
the sequence's own result (docs/distributed.md).

A rank has at most one piece that continues a sequence of the rank before it, and at most one that the next
rank continues. They are the same piece if a sequence covers all of the rank. So a rank's tokens are, in this
order, `head`, `inner` sequences that begin and end here, and `tail`. Forwards a rank sends what it knows of
its tail: the state after it, or, if the tail does not begin here, its map and the state that zeros become. It
receives what the ranks before it send, joins the state that enters its head, and computes the head.
Backwards the same goes from right to left with gradients of states: a rank sends what it knows of its head,
and receives what it needs for its tail.

Head parallelism needs nothing of this: a rank that has all tokens of some heads calls
`flash_kda.chunk_kda`.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from . import _autograd, _chunk_kda, _lib, _torch
from ._backward_options import BWD
from ._call import check_devices, check_numbers

__all__ = ["Range", "Share", "chunk_kda", "register_head_sharding", "share_of"]

Tensor = torch.Tensor
_DIM = 128
_INITIAL_STATE = 1 << _autograd.INPUTS.index("initial_state")


# ---- Which rank has what --------------------------------------------------------------------------------


class Range(NamedTuple):
    """Tokens of a rank, and the sequences that they belong to.

    Attributes:
        begin, end: the tokens, counted from the rank's first one.
        first, last: sequences first to last - 1 of the batch.
    """

    begin: int
    end: int
    first: int
    last: int


class Share(NamedTuple):
    """What a rank has of a batch.

    Attributes:
        tokens: how many tokens the rank has.
        head: the piece of a sequence that begins on an earlier rank, or None.
        inner: the sequences that begin and end here. Sequences without tokens are among them.
        tail: the piece of a sequence that ends on a later rank, or None. Head and tail are the same piece if
            the sequence does both.
        first_rank: the rank on which the head's sequence begins.
        last_rank: the rank on which the tail's sequence ends.
        exchanges: whether a sequence of the batch crosses from one rank to the next.
        sends_maps: whether a sequence of the batch covers all of a rank, so that maps are sent, too.
    """

    tokens: int
    head: Range | None
    inner: Range
    tail: Range | None
    first_rank: int
    last_rank: int
    exchanges: bool
    sends_maps: bool


def share_of(borders: list[int], rank: int, ranks: int) -> Share:
    """What a rank has of a batch whose sequence n is tokens borders[n] to borders[n + 1] - 1.

    Each rank has the T / ranks tokens (rounded up) behind those of the rank before it, and the last ranks
    have what is left, as torch.chunk divides a tensor. A sequence without tokens belongs to the rank of the
    token behind it, and at the end of the batch to that of the last token.
    """
    T, N = borders[-1], len(borders) - 1
    size = max(-(-T // ranks), 1)
    begin, end = min(rank * size, T), min((rank + 1) * size, T)

    def rank_of(token: int) -> int:
        return max(min(token, T - 1), 0) // size

    firsts = [rank_of(borders[n]) for n in range(N)]
    lasts = [rank_of(borders[n + 1] - 1) if borders[n + 1] > borders[n] else firsts[n] for n in range(N)]
    here = [n for n in range(N) if firsts[n] <= rank <= lasts[n]]
    heads = [n for n in here if firsts[n] < rank]
    tails = [n for n in here if lasts[n] > rank]
    inner = [n for n in here if n not in heads and n not in tails]
    head = Range(0, min(borders[heads[0] + 1], end) - begin, heads[0], heads[0] + 1) if heads else None
    tail = None
    if tails:
        tail = Range(max(borders[tails[0]], begin) - begin, end - begin, tails[0], tails[0] + 1)
    until = tail.begin if tail else end - begin
    first = inner[0] if inner else 0
    return Share(
        end - begin,
        head,
        Range(min(head.end if head else 0, until), until, first, first + len(inner)),
        tail,
        firsts[heads[0]] if heads else rank,
        lasts[tails[0]] if tails else rank,
        any(last > first for first, last in zip(firsts, lasts)),
        any(last > first + 1 for first, last in zip(firsts, lasts)),
    )


def _share_of_one(tokens: int, rank: int, ranks: int) -> Share:
    """A single sequence, of which each rank has as many tokens as it likes."""
    whole, nothing = Range(0, tokens, 0, 1), Range(0, 0, 0, 0)
    if ranks == 1:
        return Share(tokens, None, whole, None, 0, 0, False, False)
    head, tail = (whole if rank else None), (whole if rank < ranks - 1 else None)
    return Share(tokens, head, nothing, tail, 0, ranks - 1, True, ranks > 2)


# ---- Checks -----------------------------------------------------------------------------------------------


def _refuse_wrong(options: tuple[Any, ...], N: int, inputs: dict[str, Any]) -> None:
    """Refuses what C would refuse, before anything is sent: an error that all ranks have must not become a
    rank that waits for another one. inputs: the tensors that have gradients, by name."""
    given = {name: x for name, x in inputs.items() if x is not None}
    _autograd.refuse_strange(given)
    check_devices([(name, str(x.device)) for name, x in given.items()])
    scale, lower_bound, *values = options
    check_numbers(scale, 0.0 if lower_bound is None else lower_bound)
    given["dv"] = given["v"]
    asked = _autograd._options_of(BWD, given, tuple(values), lower_bound)
    params = _autograd._params_of(asked, _autograd._device_of(given["v"]), _autograd._looks(given))
    _lib.set_shape(params.cu_seqlens, _lib.I64, (N + 1,))
    params.scale, params.lower_bound = scale, 0.0 if lower_bound is None else lower_bound
    _lib.bwd_workspace_size(params)


# ---- One call ---------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What a call asks for beside its tensors."""

    share: Share
    borders: list[int] | None
    sequences: int
    group: Any
    rank: int
    ranks: int
    options: tuple[Any, ...]  # scale, lower_bound and those of _autograd.OPTIONS
    output_final_state: bool
    everywhere: bool
    save: bool

    @property
    def state_v_first(self) -> bool:
        return self.named["state_v_first"]

    @property
    def named(self) -> dict[str, Any]:
        """The options by name."""
        return dict(zip(("scale", "lower_bound", *_autograd.OPTIONS), self.options))


def _local_borders(call: _Call, part: Range, device: Any) -> Tensor | None:
    """cu_seqlens of a part; None: it is one sequence."""
    if part.last - part.first == 1 or call.borders is None:
        return None
    at = call.borders[part.first : part.last + 1]
    return torch.tensor([x - at[0] for x in at], dtype=torch.int64, device=device)


def _tokens_of(tensors: tuple, part: Range) -> list[Any]:
    """The part's tokens of q, k, v, g and beta."""
    return [x[:, part.begin : part.end] for x in tensors[:5]]


def _forward(
    call: _Call, tensors: tuple, part: Range, initial_state: Any, with_state: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out, final states and what is saved, of a part."""
    borders = _local_borders(call, part, tensors[2].device)
    return _autograd._forward(
        *_tokens_of(tensors, part),
        *tensors[5:7],
        initial_state,
        borders,
        *_autograd.in_order(call.options, with_state, call.save),
    )


def _backward(
    call: _Call,
    tensors: tuple,
    part: Range,
    initial_state: Any,
    saved: Any,
    dout: Any,
    dstate: Any,
    wanted: int,
) -> tuple[Tensor, ...]:
    """The gradients of the inputs, of a part."""
    borders = _local_borders(call, part, tensors[2].device)
    dout = None if dout is None else dout[:, part.begin : part.end]
    return _autograd._backward(
        *_tokens_of(tensors, part), *tensors[5:7], initial_state, borders,
        saved if saved is not None and saved.numel() else None, dout, dstate,
        *_autograd.in_order(call.options, wanted),
    )  # fmt: skip


def _map_of(call: _Call, tensors: tuple, part: Range, to: Tensor) -> None:
    """to[0] becomes the map of a piece, and to[1] the state that it makes of zeros."""
    _, k, v, g, beta = _tokens_of(tensors, part)
    A_log, dt_bias = tensors[5:7]
    named = call.named
    package: Any = sys.modules[__package__]
    names = (
        "use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval",
        "state_v_first", "kernel",
    )  # fmt: skip
    flags = {name: named[name] for name in names}
    package.affine_map(k, v, g, beta, A_log, dt_bias, named["lower_bound"], map=to[:1], state=to[1:], **flags)


def _joined(call: _Call, first: Tensor, others: Tensor, backwards: bool) -> Tensor:
    """The state [1, HV, ..] after pieces, of which the first one leaves `first`, and others[i] has the map of
    another one and the state that it makes of zeros. Backwards `others` are in the order of the ranks, too,
    and `first` is of the last rank."""
    if not others.shape[0]:
        return first[None].clone()
    package: Any = sys.modules[__package__]
    state = torch.empty_like(first[None])
    package.join_maps(
        others[:, 0], others[:, 1], first[None], final_state=state, backwards=backwards,
        state_v_first=call.state_v_first,
    )  # fmt: skip
    return state


class _Exchange:
    """One all-gather of what the ranks know of their heads or tails, in the background. Where no sequence
    crosses from rank to rank there is none, and no rank reads or writes a message.

    Attributes:
        message: what this rank sends: the map, if maps are sent, and the state, both of each head. Zeros
            where the rank knows nothing that others need.
        received: the messages of all ranks, once wait() has returned.
    """

    def __init__(self, call: _Call, v: Tensor):
        self._call = call
        self._work: Any = None
        shape = (2 if call.share.sends_maps else 1, v.shape[2], _DIM, _DIM)
        self.message = torch.zeros(shape if call.share.exchanges else 0, dtype=torch.float32, device=v.device)
        self.received = self.message.new_empty(call.ranks, *self.message.shape)

    def start(self) -> None:
        if self._call.share.exchanges:
            self._work = dist.all_gather(
                [*self.received.unbind(0)], self.message, group=self._call.group, async_op=True
            )

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()


def _concatenated(parts: list[tuple[Range, Tensor]], like: Tensor) -> Tensor:
    tensors = [x for _, x in sorted(parts, key=lambda part: part[0].begin) if x.shape[1]]
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(tensors, 1) if tensors else torch.empty_like(like)


def _rows(states: Any, part: Range) -> Any:
    return None if states is None else states[part.first : part.last]


class _ForwardPass:
    """The forward pass of a rank.

    Attributes:
        out, final_state: its results.
        entering: the state [1, HV, ..] that enters the head, or None.
        own_map: the map [HV, K, K] of a rank that one sequence covers, or None.
        saved: what the backward pass may read, of each part.
    """

    def __init__(self, call: _Call, tensors: tuple):
        self._call, self._tensors = call, tensors
        self._outs: list[tuple[Range, Tensor]] = []
        self.saved: dict[Range, Tensor] = {}
        self.entering: Tensor | None = None
        self.own_map: Tensor | None = None
        share, v, initial_state = call.share, tensors[2], tensors[7]
        shape = (call.sequences if call.output_final_state else 0, v.shape[2], _DIM, _DIM)
        self.final_state = torch.zeros(shape, dtype=torch.float32, device=v.device)
        exchange = _Exchange(call, v)
        if share.tail and share.head == share.tail:
            _map_of(call, tensors, share.tail, exchange.message)
            self.own_map = exchange.message[0].clone()
        elif share.tail:
            exchange.message[-1] = self._compute(share.tail, _rows(initial_state, share.tail))[0]
        exchange.start()
        if share.inner.last > share.inner.first:
            self._keep(share.inner, self._compute(share.inner, _rows(initial_state, share.inner)))
        exchange.wait()
        if share.head:
            received = exchange.received
            between = received[share.first_rank + 1 : call.rank]
            self.entering = _joined(call, received[share.first_rank, -1], between, False)
            state = self._compute(share.head, self.entering)
            if share.head != share.tail:
                self._keep(share.head, state)
        if call.everywhere and call.output_final_state:
            dist.all_reduce(self.final_state, group=call.group)
        self.out = _concatenated(self._outs, v)

    def _compute(self, part: Range, initial_state: Any) -> Tensor:
        """The final states of a part."""
        out, states, self.saved[part] = _forward(self._call, self._tensors, part, initial_state, True)
        self._outs.append((part, out))
        return states

    def _keep(self, part: Range, states: Tensor) -> None:
        if self._call.output_final_state:
            self.final_state[part.first : part.last] = states


class _BackwardPass:
    """The backward pass of a rank, which goes as the forward pass does, from right to left.

    Attributes:
        found: the gradients of each part, in the order of the inputs.
        dinitial_state: the gradient of initial_state, or None if it is not wanted.
    """

    def __init__(self, ctx: Any, dout: Any, dfinal_state: Any, needed: tuple[bool, ...]):
        call, inputs = ctx.call, len(_autograd.INPUTS)
        self._call, self._dout = call, dout
        self._tensors, (self._entering, own_map, *saved) = (
            ctx.saved_tensors[:inputs],
            ctx.saved_tensors[inputs:],
        )
        self._saved = dict(zip(ctx.parts, saved))
        self._wanted = sum(1 << i for i, needs in enumerate(needed) if needs)
        self.found: list[tuple[Range, tuple[Tensor, ...]]] = []
        share, v, initial_state = call.share, self._tensors[2], self._tensors[7]
        self.dinitial_state = torch.zeros_like(initial_state) if needed[7] else None
        exchange = _Exchange(call, v)
        if share.head and share.head == share.tail:
            exchange.message[0] = own_map
            # What reaches the head from the outputs here. What comes from later ranks is added by joining.
            exchange.message[1] = self._gradients(share.head, self._entering, None, _INITIAL_STATE)[7][0]
        elif share.head:
            dstate = _rows(dfinal_state, share.head)
            exchange.message[-1] = self._compute(share.head, self._entering, dstate)[0]
        exchange.start()
        if share.inner.last > share.inner.first:
            self._compute(share.inner, _rows(initial_state, share.inner), _rows(dfinal_state, share.inner))
        exchange.wait()
        if share.tail:
            received = exchange.received
            between = received[call.rank + 1 : share.last_rank]
            dstate = _joined(call, received[share.last_rank, -1], between, True)
            state = self._entering if share.head == share.tail else _rows(initial_state, share.tail)
            self._compute(share.tail, state, dstate)

    def _gradients(self, part: Range, initial_state: Any, dstate: Any, wanted: int) -> tuple[Tensor, ...]:
        saved = self._saved[part]
        return _backward(self._call, self._tensors, part, initial_state, saved, self._dout, dstate, wanted)

    def _compute(self, part: Range, initial_state: Any, dstate: Any) -> Tensor:
        """The gradients of the states that a part begins from."""
        is_head = part == self._call.share.head
        wanted = self._wanted | (_INITIAL_STATE if is_head else 0)
        gradients = self._gradients(part, initial_state, dstate, wanted)
        self.found.append((part, gradients))
        if self.dinitial_state is not None and not is_head:
            self.dinitial_state[part.first : part.last] = gradients[7]
        return gradients[7]


def _summed(call: _Call, dfinal_state: Any, v: Tensor) -> Tensor:
    """The sum over the ranks of the gradients of final states that all of them have."""
    shape = (call.sequences, v.shape[2], _DIM, _DIM)
    total = torch.zeros(shape, device=v.device) if dfinal_state is None else dfinal_state.clone()
    total = total.contiguous()
    dist.all_reduce(total, group=call.group)
    return total


class _Distributed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> tuple[Tensor, Tensor]:
        run = _ForwardPass(call, tensors)
        ctx.save_for_backward(*tensors, run.entering, run.own_map, *run.saved.values())
        ctx.call, ctx.parts = call, list(run.saved)
        ctx.set_materialize_grads(False)
        return run.out, run.final_state

    @staticmethod
    def backward(ctx: Any, dout: Any, dfinal_state: Any) -> tuple[Any, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "flash_kda.distributed.chunk_kda has no second derivative, and gradients of its gradients "
                "were asked for; they must not depend on gradients of a loss (create_graph=True)"
            )
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        tensors = ctx.saved_tensors[: len(_autograd.INPUTS)]
        if call.everywhere and call.output_final_state:
            dfinal_state = _summed(call, dfinal_state, tensors[2])
        run = _BackwardPass(ctx, dout, dfinal_state, needed)
        return (None, *_gathered_gradients(tensors, needed, run.found, run.dinitial_state))


def _gathered_gradients(
    tensors: tuple, needed: tuple, found: list[tuple[Range, tuple[Tensor, ...]]], dstates: Any
) -> list[Any]:
    """The gradients of the inputs from those of the parts."""
    gradients: list[Any] = []
    for i, (x, needs) in enumerate(zip(tensors, needed)):
        if not needs:
            gradients.append(None)
        elif i < 5:
            gradients.append(_concatenated([(part, of_part[i]) for part, of_part in found], x))
        elif i < 7:
            parts = [of_part[i] for _, of_part in found if of_part[i].numel()]
            total = torch.zeros_like(x, dtype=torch.float32)
            for of_part in parts:
                total += of_part.reshape(x.shape)
            gradients.append(total.to(x.dtype))
        else:
            gradients.append(dstates)
    return gradients


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
    state_v_first: bool = False,
    cu_seqlens: Any = None,
    cu_seqlens_cpu: Any = None,
    *,
    A_log: Any = None,
    dt_bias: Any = None,
    group: Any = None,
    final_state_on_all_ranks: bool = False,
    kernel: str | None = None,
    batch_invariant: bool = False,
    workspace_limit: int = 0,
) -> tuple[Any, Any]:
    """`flash_kda.chunk_kda` for a packed batch whose tokens are spread over the ranks of a group, with
    gradients. Every rank of the group calls it, with the same options and with its own share of the tokens.

    Rank r holds the r-th of as many equal shares of the tokens as there are ranks, as torch.chunk divides a
    tensor: T / ranks tokens each, rounded up, and the last ranks have what is left, which may be nothing.
    Sequences may cross from rank to rank anywhere.

    Args:
        q, k, v, g, beta: the rank's share, [1, T_local, ...], as for `flash_kda.chunk_kda`.
        initial_state: fp32 [N, HV, K, V] of all N sequences, or None: zeros. A rank reads the states of
            sequences that begin on it.
        output_final_state: whether final states are wanted.
        cu_seqlens: int64 or int32 [N + 1], where sequences begin in the whole batch, the same on every rank.
            None: the tokens of all ranks are one sequence, and ranks may hold any number of them.
        cu_seqlens_cpu: the same in CPU memory. Without it a cu_seqlens on a GPU is copied, which waits.
        A_log, dt_bias: as for `flash_kda.chunk_kda`, the same on every rank.
        group: the process group; None: all ranks.
        final_state_on_all_ranks: True: every rank gets all final states. False: a rank gets those of
            sequences whose last token it has, and zeros for others.
        kernel, batch_invariant, workspace_limit: as for `flash_kda.chunk_kda`.
        others: as for `flash_kda.chunk_kda`.

    Returns:
        (out, final_state): the rank's share of out, bf16 [1, T_local, HV, V], and fp32 [N, HV, K, V] or None.

    Gradients are of the sum of what all ranks call backward() on. q, k, v, g and beta get those of the rank's
    share. initial_state gets its rows on the ranks where the sequences begin, and zeros elsewhere. A_log and
    dt_bias get the part of the rank's tokens. Their gradient is the sum over the ranks, as data parallelism
    sums gradients of parameters. Either every rank of the group goes backward through the call or none does.

    A call sends one all-gather forward and one backward, of 128 KB for each head and rank, or 64 KB where no
    sequence covers all of a rank, and none where no sequence crosses. With final_state_on_all_ranks there is
    also one all-reduce of all final states, and backward of their gradients. Results have the same bits in
    every run with the same number of ranks.

    Raises:
        ValueError, TypeError, RuntimeError: as `flash_kda.chunk_kda`. A rank that raises sends nothing, so
            the others end in the error of torch.distributed that the group's timeout brings.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised; init_process_group() must be called first")
    call = {
        "q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state,
        "state_v_first": state_v_first, "cp_context": None, "lower_bound": lower_bound,
        "safe_gate": safe_gate, "use_gate_in_kernel": use_gate_in_kernel,
        "disable_recompute": disable_recompute, "return_intermediate_states": False,
        "cu_seqlens": cu_seqlens, "max_num_seqs": None, "use_graph": False,
    }  # fmt: skip
    _chunk_kda._check(call, {}, torch)
    for name in ("q", "k", "v", "g", "beta"):
        if not isinstance(call[name], Tensor):
            raise TypeError(f"{name} is of type {type(call[name]).__name__}; it must be a PyTorch tensor")
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("group does not have this rank; every rank that calls must be in it")
    if q.ndim != 4 or v.ndim != 4 or q.shape[0] != 1:
        raise ValueError(
            f"q has shape {list(q.shape)} and v {list(v.shape)}; they must be [1, T_local, H, K] and [1, "
            "T_local, HV, V], with all sequences in one row"
        )
    borders = _borders_of(cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu)
    if borders is None:
        share = _share_of_one(q.shape[1], rank, ranks)
    else:
        share = share_of(borders, rank, ranks)
        if q.shape[1] != share.tokens:
            raise ValueError(
                f"q has T_local = {q.shape[1]} tokens; rank {rank} of {ranks} must have {share.tokens} of "
                f"the {borders[-1]} tokens of cu_seqlens"
            )
    N = 1 if borders is None else len(borders) - 1
    if initial_state is not None and (initial_state.ndim != 4 or initial_state.shape[0] != N):
        raise ValueError(
            f"initial_state has shape {list(initial_state.shape)}; it must have the states of all N = {N} "
            "sequences"
        )
    q, k, v = _chunk_kda._for_autocast(torch, q, k, v)
    with_gate = use_gate_in_kernel
    options = (
        _DIM**-0.5 if scale is None else scale, lower_bound if with_gate else None, 0, with_gate,
        use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, kernel,
        batch_invariant, workspace_limit,
    )  # fmt: skip
    inputs = (q, k, v, g, beta, A_log if with_gate else None, dt_bias if with_gate else None, initial_state)
    _refuse_wrong(options, N, dict(zip(_autograd.INPUTS, inputs)))
    out, final_state = _Distributed.apply(
        _Call(
            share, borders, N, group, rank, ranks, options, output_final_state, final_state_on_all_ranks,
            disable_recompute,
        ),
        *inputs,
    )  # fmt: skip
    return out, final_state if output_final_state else None


def _borders_of(cu_seqlens: Any) -> list[int] | None:
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int64, torch.int32):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens is of {kind}; it must be a tensor of int64 or int32")
    borders = cu_seqlens.tolist()
    if cu_seqlens.ndim != 1 or len(borders) < 2:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; it must be [N + 1] for N >= 1")
    if borders[0] != 0 or any(b < a for a, b in zip(borders, borders[1:])):
        raise ValueError("cu_seqlens begins with another number than 0 or decreases; it must do neither")
    return borders


# ---- DTensors that are sharded over heads -----------------------------------------------------------------


def register_head_sharding() -> None:
    """Makes `flash_kda.chunk_kda` take DTensors, whose heads may be sharded. Nothing is exchanged then, since
    heads do not depend on each other.

    q, k, v, g and beta are sharded over dimension 2, A_log and dt_bias over dimension 0, initial_state over
    dimension 1, and cu_seqlens is replicated. All tensors of a call are DTensors. Results and gradients are
    sharded as what they belong to. DTensors with other placements, and with a number of heads that the mesh's
    size does not divide, are brought together by DTensor itself before the call, and each rank then computes
    all heads. Without this function a DTensor is refused.

    It registers sharding strategies of two operators with torch.distributed.tensor, whose interface for that
    is experimental.

    Raises:
        RuntimeError: this version of PyTorch has no register_sharding.
    """
    try:
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:
        raise RuntimeError("PyTorch has no register_sharding here; it must be 2.5 or newer") from None
    operators = torch.ops.flash_kda
    register_sharding(getattr(operators, _autograd._FORWARD_NAME).default)(_forward_shardings)
    register_sharding(getattr(operators, _autograd._BACKWARD_NAME).default)(_backward_shardings)
    _torch.takes_dtensors = True


_READ = _autograd._READ
_HEAD_DIMENSIONS = {**dict.fromkeys(_autograd.INPUTS, 2), "A_log": 0, "dt_bias": 0, "initial_state": 1}


def _placements(specs: tuple, dimensions: list[Any]) -> tuple[list[Any], list[Any]]:
    """Of tensors: all replicated, and sharded over these dimensions. A dimension of None: replicated."""
    from torch.distributed.tensor import Replicate, Shard

    whole = [None if spec is None else Replicate() for spec in specs]
    return whole, [
        x if x is None or dimension is None else Shard(dimension) for x, dimension in zip(whole, dimensions)
    ]


def _divides(specs: tuple) -> bool:
    """Whether every rank of the mesh can have as many heads, with the heads of q and k that they share."""
    q = specs[0]
    return q.shape[2] % q.mesh.size() == 0


def _forward_shardings(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """What DTensor may do: pairs of the placements of results and of arguments."""
    from torch.distributed.tensor import Replicate, Shard

    specs, rest = arguments[: len(_READ)], [None] * (len(arguments) - len(_READ))
    with_state, saves = _autograd.taken_apart(arguments[len(_READ) :], 2)[3]
    whole, sharded = _placements(specs, [_HEAD_DIMENSIONS.get(name) for name in _READ])
    ways: list[Any] = [([Replicate()] * 3, whole + rest)]
    if _divides(specs) and not saves:  # what is saved has no dimension of heads
        ways.append(([Shard(2), Shard(1) if with_state else Replicate(), Replicate()], sharded + rest))
    return ways


def _backward_shardings(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    from torch.distributed.tensor import Replicate

    tensors = len(_READ) + 3  # saved, dout, dfinal_state
    specs, rest = arguments[:tensors], [None] * (len(arguments) - tensors)
    (wanted,) = _autograd.taken_apart(arguments[tensors:], 1)[3]
    saved = specs[len(_READ)]
    dimensions = [*(_HEAD_DIMENSIONS.get(name) for name in _READ), None, 2, 1]
    whole, sharded = _placements(specs, dimensions)
    # A gradient that is not wanted has no elements.
    gradients = [
        x if x is not None and wanted >> i & 1 else Replicate()
        for i, x in enumerate(sharded[: len(_autograd.INPUTS)])
    ]
    ways: list[Any] = [([Replicate()] * len(_autograd.INPUTS), whole + rest)]
    if _divides(specs) and saved is None:
        ways.append((gradients, sharded + rest))
    return ways
