"""One batch on several ranks: flash_kda.distributed against a call of one process and against fp64."""

import importlib.util
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

import flash_kda
import problems
from problems import BETAS, GATES

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("PyTorch has no torch.distributed here", allow_module_level=True)

import flash_kda.distributed as sharded  # noqa: E402
from distributed_ranks import Ranks, share_of, spawned  # noqa: E402
from flash_kda import _fla_context  # noqa: E402
from training_problems import BARS, FLAGS, INPUTS, by_reference, error, make_call, upstream  # noqa: E402

OF_TOKENS = INPUTS[:5]


@pytest.fixture(scope="module")
def ranks():
    processes = Ranks()
    yield processes
    processes.close()


def arguments(call):
    """A call of chunk_kda as flash_kda.distributed.chunk_kda takes it."""
    names = (*INPUTS, *FLAGS, "scale", "cu_seqlens", "lower_bound", "allow_neg_eigval", "state_v_first")
    return {name: call[name] for name in (*names, "output_final_state")}


def on_device(tensors, device):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}


def on_a_rank(rank, ranks, group, call, dout, dstate, more):
    """What a rank computes: its out, its final states, and its gradients by input."""
    device = more.pop("device", "cpu")
    call, dout, dstate = on_device(call, device), *on_device({0: dout, 1: dstate}, device).values()
    leaves = {}
    for name in INPUTS:
        if call[name] is not None:
            x = share_of(call[name], rank, ranks) if name in OF_TOKENS else call[name]
            leaves[name] = x.detach().clone().requires_grad_(dout is not None)
    out, state = sharded.chunk_kda(**{**arguments(call), **leaves}, group=group, **more)
    if dout is None:
        return out.detach().cpu(), state.detach().cpu(), {}
    of_rank = torch.zeros_like(dstate)
    last = [max(int(end) - 1, 0) for end in call["cu_seqlens"][1:]]
    size = max(-(-call["q"].shape[1] // ranks), 1)
    for n, token in enumerate(last):
        is_empty = call["cu_seqlens"][n] == call["cu_seqlens"][n + 1]
        if is_empty:
            token = min(int(call["cu_seqlens"][n]), max(call["q"].shape[1] - 1, 0))
        if token // size == rank:
            of_rank[n] = dstate[n]
    torch.autograd.backward((out, state), (share_of(dout, rank, ranks), of_rank))
    return out.detach().cpu(), state.detach().cpu(), {name: x.grad.cpu() for name, x in leaves.items()}


def together(results, call):
    """The whole batch's results from those of the ranks."""
    outs, states, gradients = zip(*results)
    whole = {}
    for name in gradients[0]:
        of_ranks = [g[name] for g in gradients]
        whole[name] = torch.cat(of_ranks, 1) if name in OF_TOKENS else torch.stack(of_ranks).sum(0)
    return torch.cat(outs, 1), torch.stack(states).sum(0), whole


def alone(call, dout, dstate):
    """What one process computes."""
    leaves = {n: call[n].detach().clone().requires_grad_() for n in INPUTS if call[n] is not None}
    out, state = flash_kda.chunk_kda(**{**call, **leaves})
    torch.autograd.backward((out, state), (dout, dstate))
    return out.detach(), state.detach(), {name: x.grad for name, x in leaves.items()}


def reference(call):
    names = ("q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias", "lower_bound", "initial_state")
    return flash_kda.reference(
        *(call[n] for n in names), call["cu_seqlens"],
        **{n: call[n] for n in (*FLAGS, "allow_neg_eigval", "state_v_first")},
    )  # fmt: skip


def check(ranks, size, call, seed=0, bars=problems.BARS["cpu"], **more):
    """Holds a call on that many ranks to fp64. bars: errors of out and of the states."""
    dout, dstate = upstream(call, seed)
    results = ranks.run(on_a_rank, size, call, dout, dstate, more)
    out, state, gradients = together(results, call)
    true_out, true_state = reference(call)
    out_bar, state_bar = bars
    assert error(out, true_out) <= out_bar
    assert error(state, true_state) <= state_bar
    for name, want in by_reference(call, dout, dstate).items():
        if want is None:
            assert name not in gradients
        else:
            got = gradients[name]
            assert error(got, want.reshape(got.shape)) <= BARS[got.dtype], name
    return out, state, gradients


# ---- Which rank has what ----


def pieces_of(borders, ranks):
    return [sharded.share_of(borders, rank, ranks) for rank in range(ranks)]


def check_shares(borders, ranks):
    """Every token of every sequence is in one part of one rank, and the ranks agree on who sends what."""
    shares = pieces_of(borders, ranks)
    begin, seen = 0, {n: 0 for n in range(len(borders) - 1)}
    for rank, share in enumerate(shares):
        parts = [share.head] if share.head else []
        parts += [share.inner] if share.inner.last > share.inner.first else []
        parts += [share.tail] if share.tail and share.tail != share.head else []
        at = 0
        for part in parts:
            assert part.begin == at
            at = part.end
            for n in range(part.first, part.last):
                first, last = max(borders[n], begin + part.begin), min(borders[n + 1], begin + part.end)
                assert (first, last) == (borders[n] if n > part.first or part is share.inner else first, last)
                seen[n] += last - first
        assert at == share.tokens
        for n in range(share.inner.first, share.inner.last):
            assert begin <= borders[n] <= borders[n + 1] <= begin + share.tokens
        if share.head:
            n = share.head.first
            assert borders[n] < begin < borders[n + 1]
            assert shares[share.first_rank].tail.first == n
            assert all(x.head == x.tail != None for x in shares[share.first_rank + 1 : rank])  # noqa: E711
        if share.tail:
            n = share.tail.first
            assert borders[n] < begin + share.tokens < borders[n + 1]
            assert shares[share.last_rank].head.first == n
            assert all(x.head == x.tail != None for x in shares[rank + 1 : share.last_rank])  # noqa: E711
        begin += share.tokens
    assert begin == borders[-1]
    assert seen == {n: borders[n + 1] - borders[n] for n in seen}
    owners = [n for share in shares for n in range(share.inner.first, share.inner.last)]
    owners += [share.tail.first for share in shares if share.tail and share.tail != share.head]
    assert sorted(owners) == list(seen)
    assert {share.exchanges for share in shares} == {any(share.tail for share in shares)}
    assert {share.sends_maps for share in shares} == {any(x.tail and x.tail == x.head for x in shares)}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_shares(ranks):
    generator = random.Random(ranks)
    for borders in ([0, 0], [0, 1], [0, 0, 0, 7, 7], [0, 64], [0, 16, 32, 48, 64], [0, 1, 2, 3, 63, 64, 64]):
        check_shares(borders, ranks)
    for _ in range(300):
        lengths = [generator.choice((0, 0, 1, 2, 5, 17, 40)) for _ in range(generator.randint(1, 8))]
        check_shares([sum(lengths[:n]) for n in range(len(lengths) + 1)], ranks)


def test_shares_are_those_of_torch_chunk():
    for T in range(30):
        for ranks in (1, 2, 3, 4, 8):
            got = [share.tokens for share in pieces_of([0, T], ranks)]
            want = [len(x) for x in torch.arange(T).chunk(ranks)] if T else [0]
            assert got == want + [0] * (ranks - len(want))


# ---- Against fp64 ----

SHAPES = {
    "one sequence": (83,),
    "everywhere": (5, 30, 0, 1, 21, 0, 40),
    "borders between sequences": (32, 32, 32, 32),
    "all on one rank": (1, 1, 0, 2),
    "fewer tokens than ranks": (1, 0, 2),
    "no tokens": (0, 0),
    "the last one crosses": (0, 3, 2, 90),
    "the first one crosses": (70, 1, 1, 0),
}


@pytest.mark.parametrize("size", [2, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(ranks, shape, size):
    call = make_call(lengths=SHAPES[shape], HV=1, seed=size)
    if sum(SHAPES[shape]):
        check(ranks, size, call)
    else:
        dout, dstate = upstream(call)
        out, state, gradients = together(ranks.run(on_a_rank, size, call, dout, dstate, {}), call)
        assert out.shape == call["v"].shape
        assert torch.equal(state, call["initial_state"])
        assert torch.equal(gradients["initial_state"], dstate)
        assert not gradients["A_log"].any()


OPTIONS = {
    **{f"{gate} gate": {"gate": gate} for gate in GATES},
    **{f"{beta} beta": {"beta": beta} for beta in BETAS},
    "normalised": {"normalised": True},
    "K first": {"k_first": True},
    "fp32 g and beta": {"wide": True},
    "grouped heads": {"H": 2, "HV": 4},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(ranks, case):
    call = make_call(lengths=(9, 0, 50, 3), seed=3, **OPTIONS[case])
    check(ranks, 4, call)
    check(ranks, 3, call)


def test_without_optional_tensors(ranks):
    call = make_call(lengths=(9, 50, 3), seed=4)
    call |= {"A_log": None, "dt_bias": None, "initial_state": None}
    check(ranks, 4, call)


def test_saved_states(ranks):
    call = make_call(lengths=(20, 1500), HV=1, seed=5)
    dout, dstate = upstream(call)
    kept = ranks.run(on_a_rank, 3, call, dout, dstate, {"disable_recompute": True})
    again = ranks.run(on_a_rank, 3, call, dout, dstate, {})
    equal(kept, again)


def test_options_that_fla_does_not_have(ranks):
    """They change no bits on the CPU."""
    call = make_call(lengths=(9, 50, 3), HV=1, seed=5)
    dout, dstate = upstream(call)
    options = {"kernel": "cpu", "batch_invariant": True, "workspace_limit": 1}
    plain = ranks.run(on_a_rank, 3, call, dout, dstate, {})
    equal(plain, ranks.run(on_a_rank, 3, call, dout, dstate, options))


def equal(a, b):
    """Results of ranks have the same bits."""
    for (out, state, gradients), (other_out, other_state, other) in zip(a, b):
        assert torch.equal(out, other_out)
        assert torch.equal(state, other_state)
        assert gradients.keys() == other.keys()
        for name in gradients:
            assert torch.equal(gradients[name], other[name]), name


@pytest.mark.slow
def test_equal_calls_have_equal_bits(ranks):
    call = make_call(lengths=(9, 0, 50, 3), seed=6)
    dout, dstate = upstream(call)
    first = ranks.run(on_a_rank, 8, call, dout, dstate, {})
    for _ in range(3):
        equal(first, ranks.run(on_a_rank, 8, call, dout, dstate, {}))


def test_one_rank_is_one_process(ranks):
    """On a single rank nothing is exchanged, and all bits are those of flash_kda.chunk_kda."""
    call = make_call(lengths=(9, 0, 50, 3), seed=7)
    dout, dstate = upstream(call)
    equal(ranks.run(on_a_rank, 1, call, dout, dstate, {}), [alone(call, dout, dstate)])


def test_sequences_that_do_not_cross_are_those_of_one_process(ranks):
    call = make_call(lengths=(32, 32, 0, 32), seed=8)
    dout, dstate = upstream(call)
    out, state, gradients = together(ranks.run(on_a_rank, 3, call, dout, dstate, {}), call)
    true_out, true_state, want = alone(call, dout, dstate)
    assert torch.equal(out, true_out)
    assert torch.equal(state, true_state)
    for name in OF_TOKENS:
        assert torch.equal(gradients[name], want[name]), name


def test_long_memory(ranks):
    """Slow channels: what the first rank wrote is still there on the last one."""
    call = make_call(lengths=(2400,), HV=1, gate="bounded", seed=9)
    call["dt_bias"] = torch.full_like(call["dt_bias"], -8.0)
    call["A_log"] = torch.zeros_like(call["A_log"])
    check(ranks, 8, call)


def test_inference(ranks):
    call = make_call(lengths=(9, 0, 50, 3), seed=10)
    dout, dstate = upstream(call)
    without = ranks.run(on_a_rank, 4, call, None, None, {})
    trained = ranks.run(on_a_rank, 4, call, dout, dstate, {})
    equal(without, [(out, state, {}) for out, state, _ in trained])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("gate", ["bounded", "activated"])
def test_ranks_that_share_a_gpu(ranks, cuda, gate, size):
    """gloo carries the messages of GPU tensors through the CPU, so all ranks may have one GPU."""
    call = make_call(lengths=(9, 0, 250, 3, 90), gate=gate, seed=14)
    check(ranks, size, call, bars=(2.2e-3, 8e-4), device=cuda)


# ---- Final states on all ranks ----


def with_all_states(rank, ranks, group, call, dstates):
    """Each rank has a gradient of its own for all final states."""
    state = call["initial_state"].clone().requires_grad_()
    leaves = {n: share_of(call[n], rank, ranks).clone().requires_grad_() for n in OF_TOKENS}
    _, final = sharded.chunk_kda(
        **{**arguments(call), **leaves, "initial_state": state}, group=group, final_state_on_all_ranks=True
    )
    (final * dstates[rank]).sum().backward()
    return final.detach(), state.grad, {n: x.grad for n, x in leaves.items()}


def test_final_states_on_all_ranks(ranks):
    call = make_call(lengths=(9, 0, 50, 3), seed=11)
    dout, _ = upstream(call)
    dstates = [upstream(call, seed)[1] for seed in range(4)]
    results = ranks.run(with_all_states, 4, call, dstates)
    _, true_state = reference(call)
    for final, _, _ in results:
        assert torch.equal(final, results[0][0])
        assert error(final, true_state) <= problems.BARS["cpu"][1]
    want = by_reference(call, torch.zeros_like(dout), torch.stack(dstates).sum(0))
    state_gradient = torch.stack([x for _, x, _ in results]).sum(0)
    assert error(state_gradient, want["initial_state"]) <= BARS[torch.float32]
    for name in ("k", "v", "g", "beta"):
        got = torch.cat([x[name] for _, _, x in results], 1)
        assert error(got, want[name]) <= BARS[got.dtype], name


# ---- Contexts of flash-linear-attention ----


def local_context(borders, rank, ranks):
    """What FLA's context of a rank says: where sequences begin and end within its share, without empty ones,
    and on how many ranks before it the first of them has tokens."""
    share = borders[-1] // ranks
    start = share * rank
    inside = sorted({min(max(b, start), start + share) - start for b in borders})
    first = max(b for b in borders if b <= start)
    return [*inside], rank - first // share


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_contexts_say_where_all_sequences_begin(ranks):
    random.seed(ranks)
    for _ in range(200):
        T = ranks * random.randrange(1, 9)
        borders = [0, *sorted(random.choices(range(T + 1), k=random.randrange(6))), T]
        shares = [local_context(borders, rank, ranks) for rank in range(ranks)]
        assert _fla_context.joined(shares) == sorted(set(borders))


def with_a_context(rank, ranks, group, call, dout):
    local, ranks_before = local_context(call["cu_seqlens"].tolist(), rank, ranks)
    context = SimpleNamespace(
        group=group, cu_seqlens=torch.tensor(local, dtype=torch.int32), cu_seqlens_cpu=None,
        pre_num_ranks=ranks_before,
    )  # fmt: skip
    names = [n for n in (*INPUTS, *FLAGS, "scale", "lower_bound") if n != "initial_state"]
    found = []
    for _ in range(2):  # the second time nothing is asked
        leaves = {n: share_of(call[n], rank, ranks).clone().requires_grad_() for n in OF_TOKENS}
        of_fla = {"output_final_state": False, "use_graph": False, "cu_seqlens": context.cu_seqlens}
        given = {**{n: call[n] for n in names}, **leaves, **of_fla, "cp_context": context}
        assert _fla_context.why_not(given) == ""
        out, state = _fla_context.chunk_kda(given)
        assert state is None
        out.backward(share_of(dout, rank, ranks))
        found.append((out.detach(), torch.zeros(0), {n: x.grad for n, x in leaves.items()}))
    equal(found[:1], found[1:])
    return found[0]


def test_contexts_of_fla(ranks):
    call = make_call(lengths=(9, 50, 5), seed=12)
    call["initial_state"] = None
    dout, _ = upstream(call, 12)
    results = ranks.run(with_a_context, 4, call, dout)
    out, _, gradients = together(results, call)
    assert error(out, reference(call)[0]) <= problems.BARS["cpu"][0]
    want = by_reference(call, dout, torch.zeros(3, call["v"].shape[2], 128, 128))
    for name in OF_TOKENS:
        assert error(gradients[name], want[name]) <= BARS[gradients[name].dtype], name


def test_contexts_that_stay_with_fla():
    call = {"cp_context": SimpleNamespace(group=1, cu_seqlens=torch.tensor([0, 4]), layout="contiguous")}
    assert _fla_context.why_not(call) == ""
    assert "no output_final_state" in _fla_context.why_not({**call, "output_final_state": True})
    assert "no initial_state" in _fla_context.why_not({**call, "initial_state": torch.zeros(1)})
    zigzag = SimpleNamespace(group=1, cu_seqlens=torch.tensor([0, 4]), layout="zigzag")
    assert "and it is zigzag" in _fla_context.why_not({"cp_context": zigzag})
    assert "one of them is missing" in _fla_context.why_not({"cp_context": SimpleNamespace(group=None)})


# ---- One sequence without borders ----


def one_sequence(rank, ranks, group, call, dout, dstate, cuts):
    begin, end = cuts[rank], cuts[rank + 1]
    leaves = {n: call[n][:, begin:end].clone().requires_grad_() for n in OF_TOKENS}
    state = call["initial_state"].clone().requires_grad_()
    out, final = sharded.chunk_kda(
        **{**arguments(call), **leaves, "initial_state": state, "cu_seqlens": None}, group=group
    )
    torch.autograd.backward((out, final), (dout[:, begin:end], dstate))
    return (
        out.detach(),
        final.detach(),
        {**{n: x.grad for n, x in leaves.items()}, "initial_state": state.grad},
    )


@pytest.mark.parametrize("cuts", [(0, 10, 33, 50), (0, 50, 50, 50), (0, 0, 0, 50), (0, 20, 20, 50)])
def test_one_sequence_in_any_shares(ranks, cuts):
    call = make_call(lengths=(50,), seed=12)
    dout, dstate = upstream(call)
    results = ranks.run(one_sequence, 3, call, dout, dstate, cuts)
    true_out, true_state = reference(call)
    want = by_reference(call, dout, dstate)
    assert error(torch.cat([out for out, _, _ in results], 1), true_out) <= problems.BARS["cpu"][0]
    assert error(results[-1][1], true_state) <= problems.BARS["cpu"][1]
    for name in OF_TOKENS:
        got = torch.cat([x[name] for _, _, x in results], 1)
        assert error(got, want[name]) <= BARS[got.dtype], name
    got = torch.stack([x["initial_state"] for _, _, x in results]).sum(0)
    assert error(got, want["initial_state"]) <= BARS[torch.float32]


# ---- What is sent ----


def count_bytes(rank, ranks, group, call, dout, dstate):
    """The bytes that a rank sends in all-gathers, and the names of other collectives."""
    dist, sent, others = torch.distributed, [], []
    all_gather, all_reduce = dist.all_gather, dist.all_reduce
    dist.all_gather = lambda to, x, **more: (sent.append(x.nbytes), all_gather(to, x, **more))[1]
    dist.all_reduce = lambda x, **more: (others.append("all_reduce"), all_reduce(x, **more))[1]
    try:
        on_a_rank(rank, ranks, group, call, dout, dstate, {})
    finally:
        dist.all_gather, dist.all_reduce = all_gather, all_reduce
    return sent, others


@pytest.mark.parametrize(
    ("lengths", "size", "kilobytes"),
    [
        ((90,), 3, [128, 128]),  # rank 1 has a map
        ((40, 50), 3, [64, 64]),  # no sequence covers a rank
        ((30, 30, 30), 3, []),  # none crosses
        ((80,), 2, [64, 64]),
    ],
)
def test_bytes(ranks, lengths, size, kilobytes):
    call = make_call(lengths=lengths, HV=2, H=2)
    results = ranks.run(count_bytes, size, call, *upstream(call))
    assert results == [([2 * 1024 * x for x in kilobytes], [])] * size


# ---- DTensors ----


def with_dtensors(rank, ranks, group, call, dout, dstate):
    """What a rank computes of DTensors whose heads are sharded, put together again, and their placements."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = DeviceMesh.from_group(group, "cpu")
    dimensions = {"A_log": 0, "dt_bias": 0, "initial_state": 1}
    leaves = {
        n: distribute_tensor(call[n], mesh, [Shard(dimensions.get(n, 2))]).requires_grad_(dout is not None)
        for n in INPUTS
    }
    cu_seqlens = distribute_tensor(call["cu_seqlens"], mesh, [Replicate()])
    wide = {**call, **leaves, "cu_seqlens": cu_seqlens}
    try:
        flash_kda.chunk_kda(**wide)
    except TypeError as error:
        refusal = str(error)
    sharded.register_head_sharding()
    try:
        out, state = flash_kda.chunk_kda(**wide)
    finally:
        flash_kda._torch.takes_dtensors = False
    gradients = {}
    if dout is not None:
        dout, dstate = distribute_tensor(dout, mesh, [Shard(2)]), distribute_tensor(dstate, mesh, [Shard(1)])
        torch.autograd.backward((out, state), (dout, dstate))
        gradients = {n: x.grad.full_tensor() for n, x in leaves.items()}
    places = [x.placements[0] for x in (out, state, *(x.grad for x in leaves.values() if x.grad is not None))]
    found = out.detach().full_tensor(), state.detach().full_tensor(), gradients
    return refusal, [getattr(x, "dim", None) for x in places], found


needs_register_sharding = pytest.mark.skipif(
    not importlib.util.find_spec("torch.distributed.tensor.experimental"), reason="PyTorch before 2.5"
)


@needs_register_sharding
@pytest.mark.parametrize("size", [2, 4])
def test_dtensors_with_sharded_heads(ranks, size):
    call = make_call(lengths=(20, 0, 30), H=4, HV=8, seed=13)
    dout, dstate = upstream(call)
    want = alone(call, dout, dstate)
    for refusal, places, found in ranks.run(with_dtensors, size, call, dout, dstate):
        assert "q is a DTensor" in refusal
        assert places == [2, 1, 2, 2, 2, 2, 2, 0, 0, 1]
        equal([found], [want])
    for _, places, (out, state, _) in ranks.run(with_dtensors, size, call, None, None):
        assert places == [2, 1]
        equal([(out, state, {})], [(*want[:2], {})])


@needs_register_sharding
def test_heads_that_cannot_be_sharded_are_brought_together(ranks):
    """Three heads of q and k on two ranks, of which each has half of the six value heads."""
    call = make_call(lengths=(20, 30), H=3, HV=6, seed=14)
    dout, dstate = upstream(call)
    want = alone(call, dout, dstate)
    for _, _, found in ranks.run(with_dtensors, 2, call, dout, dstate):
        equal([found], [want])


# ---- What is refused, and lost ranks ----


def refused(ranks, call, size=2, **more):
    """The exceptions of the ranks, as (type, message)."""
    answers = ranks.try_to_run(on_a_rank, size, call, None, None, more)
    assert not any(good for good, _ in answers)
    return [answer[:2] for _, answer in answers]


def test_refusals(ranks):
    call = make_call(lengths=(20, 21))
    wrong = {**call, "cu_seqlens": torch.tensor([0, 20, 50])}
    for rank, (kind, message) in enumerate(refused(ranks, wrong)):
        assert kind == "ValueError"
        assert message == (
            f"q has T_local = {21 - rank} tokens; rank {rank} of 2 must have 25 of the 50 tokens of "
            "cu_seqlens"
        )
    for changes, kind, part in (
        ({"cu_seqlens": torch.tensor([0, 30, 20, 41])}, "ValueError", "cu_seqlens begins with"),
        ({"cu_seqlens": torch.tensor([41])}, "ValueError", "it must be [N + 1]"),
        ({"cu_seqlens": torch.tensor([0.0, 41.0])}, "TypeError", "cu_seqlens is of torch.float32"),
        ({"initial_state": call["initial_state"][:1]}, "ValueError", "the states of all N = 2 sequences"),
        ({"initial_state": call["initial_state"].bfloat16()}, "TypeError", "initial_state is of"),
        ({"q": call["q"].float()}, "TypeError", "q has dtype float32"),
        ({"k": call["k"][..., :64]}, "ValueError", "k has shape"),
        ({"beta": call["beta"][..., :1]}, "ValueError", "beta has shape"),
        ({"scale": float("nan")}, "ValueError", "scale is nan"),
        ({"lower_bound": -7.0}, "ValueError", "lower_bound is -7"),
    ):
        found = refused(ranks, {**call, **changes})
        assert all(k == kind and part in message for k, message in found), found


def test_without_process_group():
    call = make_call(lengths=(20,))
    with pytest.raises(RuntimeError, match="init_process_group"):
        sharded.chunk_kda(**arguments(call))


def no_second_derivative(rank, ranks, group, call, dout):
    v = share_of(call["v"], rank, ranks).clone().requires_grad_()
    of_rank = {n: share_of(call[n], rank, ranks) for n in OF_TOKENS}
    out, _ = sharded.chunk_kda(**{**arguments(call), **of_rank, "v": v}, group=group)
    torch.autograd.grad(out, v, share_of(dout, rank, ranks).requires_grad_(), create_graph=True)


def test_second_derivatives_are_refused(ranks):
    call = make_call(lengths=(20,))
    for good, answer in ranks.try_to_run(no_second_derivative, 2, call, upstream(call)[0]):
        assert not good
        assert "no second derivative" in answer[1]


def is_lost(rank, ranks, file, call):
    """Ranks in a group of their own, of which the last one calls nothing and ends."""
    import datetime
    import os

    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=5),
    )
    if rank == ranks - 1:
        return
    try:
        of_rank = {n: share_of(call[n], rank, ranks) for n in OF_TOKENS}
        sharded.chunk_kda(**{**arguments(call), **of_rank})
    except RuntimeError as error:
        Path(f"{file}.{rank}").write_text(str(error))


def test_a_lost_rank_ends_the_others(tmp_path):
    """In torch.distributed's own error, and soon."""
    call = make_call(lengths=(60,))
    started = [spawned.Process(target=is_lost, args=(rank, 3, tmp_path / "store", call)) for rank in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(2):
        assert (tmp_path / f"store.{rank}").read_text()
