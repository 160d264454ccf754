"""decode and apply_records on PyTorch tensors: operators, compilers, CUDA graphs, refusals."""

import numpy as np
import pytest

import flash_kda
from decode_problems import hold_decode, make_decode, run_decode, truth_of_decode
from problems import error, in_threads, to_numpy, to_torch
from torch_calls import COMPILERS, call_behind_other_work, captured

torch = pytest.importorskip("torch")

INPUTS = ("q", "k", "v", "g", "beta", "scale", "out", "A_log", "dt_bias", "lower_bound", "state")


def check(a, device, call=flash_kda.decode):
    expected = truth_of_decode(a)
    tensors = to_torch(a, device)
    with torch.no_grad():
        assert call(**tensors) is None
    hold_decode(a, to_numpy(tensors), expected)
    return tensors


def applied(a):
    """Arguments of apply_records."""
    rng = np.random.default_rng(0)
    N = a["state_indices"].shape[0]
    records = rng.standard_normal((N, 5, a["v"].shape[2], 3, 128), dtype=np.float32) / 12
    b = {"records": records, "num_accepted_tokens": rng.integers(0, 6, N), "state": a["state"]}
    return {**b, "state_indices": a["state_indices"], "first_slot": a["first_slot"]}


def test_positions_of_arguments(device):
    a = make_decode(seed=1)
    rest = [n for n in a if n not in INPUTS]
    check(a, device, lambda **t: flash_kda.decode(*(t[n] for n in INPUTS), **{n: t[n] for n in rest}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"write": "each", "accepted": True},
        {"write": "none", "records": True},
        {"lengths": (3, 0, 5)},
        {"write": "each", "tree": True},
        {"write": "each", "apart": "indices", "tree": True},
        {"write": "each", "apart": "none", "lengths": (3, 0, 5)},
        {"apart": "indices"},
    ],
    ids=str,
)
def test_devices(device, options):
    check(make_decode(**options, seed=2), device)


def test_reference_of_tensors(device):
    a = make_decode(seed=3)
    given = {n: x for n, x in a.items() if n != "out"}
    out, states = flash_kda.decode_reference(**given)
    t_out, t_states = flash_kda.decode_reference(**to_torch(given, device))
    np.testing.assert_array_equal(t_out.numpy(), out)
    np.testing.assert_array_equal(t_states.numpy(), states)


# The operators.


def test_operators(device):
    a = make_decode(seed=4)
    check(a, device, torch.ops.flash_kda.decode)
    b = applied(a)
    want = run_decode(b, name="apply_records")["state"]
    got = run_decode(b, "torch", device=device, call=torch.ops.flash_kda.apply_records)["state"]
    assert error(got, want.astype(np.float64)) <= 1e-6


def test_schemas():
    """Exported programs hold names and positions."""
    assert str(torch.ops.flash_kda.decode.default._schema) == (
        "flash_kda::decode(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor(a!) out, "
        "Tensor? A_log, Tensor? dt_bias, float? lower_bound, Tensor(b!) state, Tensor? state_indices=None, "
        "Tensor? num_accepted_tokens=None, Tensor? cu_seqlens=None, Tensor? parents=None, "
        "Tensor(c!)? records=None, Tensor? rounding=None, Tensor(d!)? written_states=None, "
        "Tensor? written_indices=None, Tensor? past_records=None, Tensor? accepted=None, int first_slot=0, "
        'str write_states="last", str? kernel_name=None, int threads=0, bool use_gate_in_kernel=True, '
        "bool use_qk_l2norm_in_kernel=True, bool use_beta_sigmoid_in_kernel=True, "
        "bool allow_neg_eigval=False, bool state_v_first=True) -> ()"
    )
    assert str(torch.ops.flash_kda.apply_records.default._schema) == (
        "flash_kda::apply_records(Tensor records, Tensor num_accepted_tokens, Tensor(a!) state, "
        "Tensor? accepted=None, Tensor? state_indices=None, Tensor? rounding=None, int first_slot=0, "
        "str? kernel_name=None, int threads=0, bool state_v_first=True) -> ()"
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"write": "each", "accepted": True},
        {"write": "none", "records": True, "tree": True},
        {"write": "each", "apart": "indices"},
        {"write": "none", "records": True, "past": True},
    ],
    ids=str,
)
def test_opcheck(device, options):
    a = make_decode(**options, seed=5)
    torch.library.opcheck(torch.ops.flash_kda.decode.default, (), to_torch(a, device))


def test_opcheck_of_apply(device):
    b = applied(make_decode(seed=6))
    torch.library.opcheck(torch.ops.flash_kda.apply_records.default, (), to_torch(b, device))


# Compilers.


@pytest.mark.parametrize("backend", ["eager", *COMPILERS])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compile_a_step(device, backend, mode):
    """Verify, then bring the states up to date, in one graph, with arithmetic around both."""
    torch.compiler.reset()
    a = make_decode(N=3, T=4, write="none", seed=7)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "state", "state_indices")

    def step(q, k, v, g, beta, A_log, dt_bias, state, state_indices, accepted):
        out = torch.empty_like(v)
        records = torch.empty(*v.shape[:3], 3, 128, device=v.device)
        flash_kda.decode(
            q, k, v * 2, g, beta, 128**-0.5, out, A_log, dt_bias, -5.0, state, state_indices=state_indices,
            first_slot=1, write_states="none", records=records,
        )  # fmt: skip
        flash_kda.apply_records(records, accepted, state, state_indices=state_indices, first_slot=1)
        # In fp64, since inductor adds in an order of its own, which in fp32 changes the sixth digit.
        return out + 1, state.sum(dtype=torch.float64)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    accepted = torch.tensor([1, 3, 4], device=device)
    with mode():
        one, other = (to_torch({n: a[n] for n in names}, device) for _ in range(2))
        for _ in range(2):
            got, want = compiled(**one, accepted=accepted), step(**other, accepted=accepted)
            assert torch.equal(got[0], want[0])
            torch.testing.assert_close(got[1], want[1])
            assert torch.equal(one["state"], other["state"])


@pytest.mark.parametrize("backend", COMPILERS)
def test_compile_writes_arguments(device, backend):
    torch.compiler.reset()
    a = make_decode(write="each", accepted=True, seed=8)
    check(a, device, torch.compile(lambda **t: flash_kda.decode(**t), fullgraph=True, backend=backend))


@pytest.mark.parametrize("backend", COMPILERS)
def test_compile_past_records(device, backend):
    """The state is written, though write_states is "none"."""
    torch.compiler.reset()
    a = make_decode(write="none", records=True, past=True, seed=26)
    compiled = torch.compile(lambda **t: flash_kda.decode(**t), fullgraph=True, backend=backend)
    got, want = (run_decode(a, "torch", device=device, call=call) for call in (compiled, flash_kda.decode))
    for name in ("out", "state", "records"):
        assert got[name].tobytes() == want[name].tobytes(), name
    assert got["state"].tobytes() != a["state"].tobytes()


def test_compile_dynamic_shapes(device):
    torch.compiler.reset()
    names = ("q", "k", "v", "g", "beta", "out", "A_log", "dt_bias", "state", "state_indices")

    def step(**t):
        flash_kda.decode(**t, scale=0.1, lower_bound=-5.0, first_slot=1)
        return t["out"] + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for N in (2, 5, 9):
            a = make_decode(N=N, T=3, seed=N)
            one, other = (to_torch({n: a[n] for n in names}, device) for _ in range(2))
            assert torch.equal(compiled(**one), step(**other))
            assert torch.equal(one["state"], other["state"])


@pytest.mark.parametrize("strict", [True, False])
def test_export(device, strict):
    a = make_decode(seed=9)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "state", "state_indices")

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, g, beta, A_log, dt_bias, state, state_indices):
            out, state = torch.empty_like(v), state.clone()
            flash_kda.decode(
                q,
                k,
                v,
                g,
                beta,
                0.1,
                out,
                A_log,
                dt_bias,
                -5.0,
                state,
                state_indices=state_indices,
                first_slot=1,
            )
            return out, state

    inputs = to_torch({n: a[n] for n in names}, device)
    with torch.no_grad():
        program = torch.export.export(Layer(), (), inputs, strict=strict)
        assert "flash_kda.decode" in program.graph_module.code
        assert all(map(torch.equal, program.module()(**inputs), Layer()(**inputs)))


def test_fake_tensors_are_checked():
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = to_torch(make_decode(seed=10), "cpu")
    with FakeTensorMode() as mode, torch.no_grad():
        fakes = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in tensors.items()}
        assert flash_kda.decode(**fakes) is None
        for change, sentence in (
            ({"k": fakes["q"][:, :2]}, r"k has shape \[3, 2, 1, 128\]; it must be"),
            ({"write_states": "each"}, "state_indices has 1 dimensions; it must have 2"),
            ({"write_states": "all"}, "write_states is 'all'; it must be"),
            ({"records": fakes["state"]}, r"records has shape .*; it must be \[N, R, HV, 3, K\]"),
        ):
            with pytest.raises(Exception, match=sentence):
                flash_kda.decode(**{**fakes, **change})


def test_functionalization_leaves_the_graph_whole():
    """Writes become auto_functionalized, and reach the caller's tensors."""
    torch.compiler.reset()
    seen = []

    def keep(graph, _):
        seen.append(graph)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=keep)
    a = make_decode(seed=11)
    check(a, "cpu", torch.compile(lambda **t: flash_kda.decode(**t), fullgraph=True, backend=backend))
    (graph,) = seen
    assert "flash_kda.decode" in graph.code


# CUDA.


def test_cuda_graph(cuda):
    """A replayed graph takes the indices of the replay, and raises the offset of random numbers itself."""
    a = make_decode(T=1, seed=12)
    tensors = to_torch(a, cuda)
    graph = captured(lambda: flash_kda.decode(**tensors))
    b = make_decode(T=1, seed=13)
    expected = truth_of_decode(b)
    for name, x in to_torch(b, cuda).items():
        if isinstance(x, torch.Tensor):
            tensors[name].copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    hold_decode(b, to_numpy(tensors), expected)


def test_ten_thousand_replays(cuda):
    """Replays with other indices each time leave the bits that plain calls leave."""
    slots, times = 9, 10_000
    a = make_decode(N=4, T=1, seed=15)
    names = ("q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias", "lower_bound")
    tensors = {name: value for name, value in to_torch(a, cuda).items() if name in names}
    pool = torch.randn(slots, tensors["v"].shape[2], 128, 128, device=cuda)
    plain, out = pool.clone(), torch.empty_like(tensors["v"])
    # An index of 0 has no state, as the padding of a batch.
    order = torch.stack([torch.randperm(slots, device=cuda)[:4] for _ in range(times)]).int()
    indices = order[0].clone()

    def step(state, which):
        flash_kda.decode(**tensors, out=out, state=state, state_indices=which, first_slot=1)

    step(pool.clone(), indices)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(pool, indices)
    for i in range(times):
        indices.copy_(order[i])
        graph.replay()
        step(plain, order[i])
    assert torch.isfinite(plain).all()
    assert torch.equal(pool, plain)


def test_speculation_in_a_graph(cuda):
    """A step applies what was accepted of the step before, and verifies new tokens. Two buffers of records
    take turns. A replay with other numbers leaves the bits that plain calls leave."""
    steps = 6
    a = to_torch(make_decode(N=4, T=3, write="none", past=True, records=True, seed=27), cuda)
    names = ("q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias", "lower_bound", "state_indices")
    fixed = {name: a[name] for name in (*names, "first_slot", "write_states")}
    counts = torch.randint(0, 4, (steps, 4), device=cuda, dtype=torch.int32)

    def call(x, past, now, count):
        flash_kda.decode(
            **fixed, out=x["out"], state=x["state"], past_records=x["records"][past],
            records=x["records"][now], num_accepted_tokens=count,
        )  # fmt: skip

    def fresh():
        records = torch.stack([a["past_records"], a["past_records"]])
        return {"out": torch.empty_like(a["v"]), "state": a["state"].clone(), "records": records}

    plain, replayed, count = fresh(), fresh(), counts[0].clone()
    call(fresh(), 0, 1, count)
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    for i, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            call(replayed, i, 1 - i, count)
    for step in range(steps):
        call(plain, step % 2, 1 - step % 2, counts[step])
        count.copy_(counts[step])
        graphs[step % 2].replay()
        for name in plain:
            assert torch.equal(plain[name], replayed[name]), name
    assert not torch.equal(plain["state"], a["state"])


def test_current_stream(cuda):
    a = make_decode(seed=14)
    expected = truth_of_decode(a)
    tensors = call_behind_other_work(flash_kda.decode, to_torch(a, cuda))
    hold_decode(a, to_numpy(tensors), expected)


# What is copied, converted and refused.


def test_tensors_as_a_layer_holds_them(device):
    """Slices of one buffer, indices that are columns, parameters in 16 bits."""
    a = make_decode(H=2, HV=2, seed=15)
    for name in ("A_log", "dt_bias"):
        a[name] = to_numpy({"x": torch.from_numpy(a[name]).bfloat16().float()})["x"]
    expected = truth_of_decode(a)
    t = to_torch(a, device)
    buffer = torch.cat([t[n].flatten(2) for n in ("q", "k", "v")], -1)
    for name, part in zip(("q", "k", "v"), buffer.split(256, -1)):
        t[name] = part.unflatten(-1, (2, 128))
    t["state_indices"] = torch.stack([t["state_indices"]] * 3, -1)[:, 1]
    t |= {"A_log": t["A_log"].bfloat16().reshape(1, 1, 2, 1), "dt_bias": t["dt_bias"].bfloat16().reshape(-1)}
    out = t["out"]
    t["out"] = torch.empty(*out.shape, 2, dtype=out.dtype, device=device)[..., 0]  # computed beside it
    for _ in range(2):
        t["state"].copy_(torch.from_numpy(a["state"]))
        flash_kda.decode(**t)
        got = to_numpy({"out": t["out"].contiguous(), "state": t["state"]})
        hold_decode(a, {**a, **got}, expected)


def test_a_pool_is_never_copied(device):
    t = to_torch(make_decode(seed=16), device)
    t["state"] = torch.stack([t["state"]] * 2, -1)[..., 0]
    with pytest.raises(ValueError, match="state has"):
        flash_kda.decode(**t)
    assert t["out"].isnan().all()


@pytest.mark.parametrize("name", ["q", "g", "beta", "A_log", "dt_bias", "state"])
@pytest.mark.parametrize("call", ["decode", "operator"])
def test_gradients_are_refused(device, name, call):
    t = to_torch(make_decode(seed=17), device)
    t[name].requires_grad_()
    function = flash_kda.decode if call == "decode" else torch.ops.flash_kda.decode
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"computes no gradients.*torch.no_grad\(\)"):
            function(**t)
        assert t["out"].isnan().all()
    with torch.no_grad():
        function(**t)
    assert not t["out"].isnan().any()


def test_gradients_of_records_are_refused():
    b = to_torch(applied(make_decode(seed=18)), "cpu")
    b["records"].requires_grad_()
    with pytest.raises(RuntimeError, match="computes no gradients"):
        flash_kda.apply_records(**b)


def test_tangents_are_refused():
    from torch.autograd import forward_ad

    t = to_torch(make_decode(seed=19), "cpu")
    with forward_ad.dual_level(), torch.no_grad():
        t["v"] = forward_ad.make_dual(t["v"], torch.ones_like(t["v"]))
        with pytest.raises(
            RuntimeError, match="no forward-mode derivative, and one of its tensors has a tangent"
        ):
            flash_kda.decode(**t)


def test_autograd_notices_what_was_written(device):
    t = to_torch(make_decode(seed=20, write="last", records=True, apart="indices"), device)
    weight = torch.ones((), device=device, requires_grad=True)
    for name in ("out", "records", "written_states"):
        loss = (weight * t[name]).sum()
        flash_kda.decode(**t)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    del t["written_states"], t["written_indices"]
    for name in ("out", "state", "records"):
        loss = (weight * t[name]).sum()
        flash_kda.decode(**t)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_tensors_without_memory():
    t = to_torch(make_decode(seed=21), "cpu")
    meta = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in t.items()}
    with pytest.raises(ValueError, match="q is on meta; tensors must be on the CPU or a CUDA device"):
        flash_kda.decode(**meta)
    with pytest.raises(ValueError, match="state is on meta and q on cpu; all tensors must be on one device"):
        flash_kda.decode(**{**t, "state": t["state"].to("meta")})
    with pytest.raises(TypeError, match=r"batched tensor of torch.vmap"):
        torch.vmap(lambda x: flash_kda.decode(**{**t, "beta": x}))(torch.stack([t["beta"]] * 2))


def test_distributed_tensors_are_refused():
    class DTensor(torch.Tensor):
        pass

    t = to_torch(make_decode(seed=22), "cpu")
    with pytest.raises(TypeError, match="state is a DTensor, and a call computes on one device"):
        flash_kda.decode(**{**t, "state": t["state"].as_subclass(DTensor)})


def test_no_change_slips_past_a_prepared_call():
    t = to_torch(make_decode(seed=23), "cpu")
    for _ in range(2):
        flash_kda.decode(**t)
    for change, exception, sentence in (
        ({"state": t["state"].double()}, TypeError, "state has dtype float64; it must be"),
        ({"state": t["state"][:, :1]}, ValueError, r"state has .*; it must"),
        ({"v": t["v"][:, :1]}, ValueError, "v has shape"),
        (
            {"state_indices": t["state_indices"].float()},
            TypeError,
            "state_indices has dtype float32; it must be",
        ),
    ):
        with pytest.raises(exception, match=sentence):
            flash_kda.decode(**{**t, **change})


def test_calls_from_many_threads(device):
    def work(seed):
        a = make_decode(T=2 + seed % 2, seed=seed)
        want = truth_of_decode(a)
        for _ in range(10):
            t = to_torch(a, device)
            flash_kda.decode(**t)
            hold_decode(a, to_numpy(t), want)

    in_threads(work, range(6))
