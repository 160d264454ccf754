"""decode and apply_records on NumPy arrays, tensors and compiled, against the fp64 reference."""

import inspect
from dataclasses import fields

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from decode_problems import (
    WRITES,
    bar_of,
    has_state,
    hold_decode,
    lengths_of,
    make_decode,
    run_decode,
    slot_of_start,
    truth_of_decode,
)
from flash_kda import _call, _decode_options
from problems import BARS, BETAS, GATES, error, hold_slots, make_any, to_numpy

WAYS = [("numpy", "eager"), ("torch", "eager"), ("torch", "aot_eager")]


@pytest.fixture(params=WAYS, ids=" ".join)
def way(request):
    if request.param[0] == "torch":
        pytest.importorskip("torch")
    return request.param


def hold(a, way=("numpy", "eager")):
    after = run_decode(a, *way)
    hold_decode(a, after, truth_of_decode(a))
    return after


# The definition.


def plain_recurrence(a):
    """The state after each token and out, token by token in NumPy, for packed sequences or not, and trees."""
    f64 = lambda x: np.asarray(x).astype(np.float64)  # noqa: E731
    q, k, v, g, beta = (f64(a[n]) for n in ("q", "k", "v", "g", "beta"))
    if a.get("use_qk_l2norm_in_kernel", True):
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    HV, group = v.shape[2], v.shape[2] // q.shape[2]
    if a.get("use_gate_in_kernel", True):
        x = g + (0 if a["dt_bias"] is None else f64(a["dt_bias"]))
        rate = np.ones(HV) if a["A_log"] is None else np.exp(f64(a["A_log"]))
        if a["lower_bound"] is None:
            g = -rate[:, None] * np.logaddexp(0, x)
        else:
            g = a["lower_bound"] / (1 + np.exp(-rate[:, None] * x))
    if a.get("use_beta_sigmoid_in_kernel", True):
        beta = (1 + a.get("allow_neg_eigval", False)) / (1 + np.exp(-beta))
    out, states = np.zeros(v.shape), []
    begin = 0
    for n, length in enumerate(lengths_of(a)):
        row, first = (0, begin) if "cu_seqlens" in a else (n, 0)
        begin += length
        mine = []
        for i in range(length if has_state(a, slot_of_start(a, n)) else 0):
            parent = i - 1 if a.get("parents") is None else a["parents"][n, i]
            start = f64(a["state"][slot_of_start(a, n)])
            if not a.get("state_v_first", True):
                start = start.swapaxes(-1, -2)
            S = (start if parent < 0 else mine[parent]).copy()
            t = row, first + i
            for h in range(HV):
                key, query = k[t][h // group], q[t][h // group]
                S[h] *= np.exp(g[t][h])
                u = beta[t][h] * (v[t][h] - S[h] @ key)
                S[h] += np.outer(u, key)
                out[t][h] = float(np.float32(a["scale"])) * (S[h] @ query)
            mine.append(S)
        states.append(mine)
    return out, states


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tree", [False, True])
def test_the_reference_is_the_recurrence(gate, tree):
    options = {"gate": gate, "tree": tree, "write": "none" if tree else "last", "wide": True, "H": 1, "HV": 2}
    for a in (
        make_decode(**options, beta="twice", seed=1),
        make_decode(**options, lengths=(3, 0, 5, 1), beta="activated", k_first=True, seed=2),
    ):
        out, states = plain_recurrence(a)
        expected = truth_of_decode(a)
        np.testing.assert_allclose(expected["out"], out, rtol=1e-10, atol=1e-12)
        for n, mine in enumerate(states):
            for i, S in enumerate(mine):
                got = expected["states"][n][i]
                got = got if a.get("state_v_first", True) else got.swapaxes(-1, -2)
                np.testing.assert_allclose(got, S, rtol=1e-10, atol=1e-12)


# Decode against the definition.


@pytest.mark.parametrize("T", [0, 1, 2, 5, 16])
@pytest.mark.parametrize("write", WRITES)
def test_tokens(way, T, write):
    if write == "each" and T == 0:
        a = make_decode(T=1, write=write)
        a |= {n: np.ascontiguousarray(a[n][:, :0]) for n in ("q", "k", "v", "g", "beta", "out")}
        hold(a, way)
    else:
        hold(make_decode(T=T, write=write, seed=T), way)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("state", [np.float32, bfloat16])
@pytest.mark.parametrize("integers", [np.int32, np.int64])
def test_packed_sequences(way, write, state, integers):
    a = make_decode(
        lengths=(3, 1, 0, 16, 2),
        write=write,
        state=state,
        integers=integers,
        accepted=write == "each",
        seed=3,
    )
    hold(a, way)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("beta", BETAS)
def test_gates_and_betas(gate, beta):
    hold(make_decode(gate=gate, beta=beta, wide=True, normalised=beta == "activated", seed=4))


def test_options_together(way):
    hold(
        make_decode(gate="softplus", beta="twice", normalised=True, k_first=True, wide=True, HV=3, seed=5),
        way,
    )
    hold(make_decode(gate="activated", beta="activated", k_first=True, H=2, HV=4, seed=6), way)
    hold(make_decode(pool=False, H=2, HV=2, seed=7), way)


@pytest.mark.parametrize("write", ["none", "each"])
def test_trees(way, write):
    a = make_decode(N=4, T=7, tree=True, write=write, records=True, seed=8)
    hold(a, way)


def test_a_slot_that_takes_no_state(way):
    """With write_states="each" a token's slot may be below first_slot: the others are written."""
    a = make_decode(write="each", T=4, accepted=True, seed=9)
    a["num_accepted_tokens"][:] = 1
    a["state_indices"][0, 2] = 0
    hold(a, way)


def test_prefill_then_decode():
    """fwd over all tokens and fwd over the first ones, then decode, end in one state."""
    a = make_any(lengths=(37,), seed=10)
    a.pop("cu_seqlens")
    whole, first = a, {**a}
    for name in ("q", "k", "v", "g", "beta", "out"):
        first[name] = np.ascontiguousarray(a[name][:, :30])
    first["final_state"] = a["final_state"].copy()
    flash_kda.fwd(**whole)
    flash_kda.fwd(**first)
    rest = {n: np.ascontiguousarray(a[n][:, 30:]) for n in ("q", "k", "v", "g", "beta", "out")}
    rest |= {n: a[n] for n in ("scale", "A_log", "dt_bias", "lower_bound")}
    flash_kda.decode(**rest, state=first["final_state"])
    assert error(first["final_state"], whole["final_state"].astype(np.float64)) <= 2e-5
    assert error(rest["out"], whole["out"][:, 30:].astype(np.float64)) <= 2 * BARS["cpu"][0]


def test_strides_of_slots(way):
    """A slot is part of a page."""
    a = make_decode(seed=11)
    expected = truth_of_decode(a)
    slots = a["state"].shape[0]
    page = np.full((slots, 3 * 2 * 128 * 128), 7, np.float32)
    page[:, : 2 * 128 * 128] = a["state"].reshape(slots, -1)
    state = page[:, : 2 * 128 * 128].reshape(slots, 2, 128, 128)
    assert np.shares_memory(state, page)

    def call(**work):
        if way[0] == "numpy":
            flash_kda.decode(**{**work, "state": state})
        else:
            import torch

            flash_kda.decode(
                **{**work, "state": torch.from_numpy(page)[:, : 2 * 128 * 128].view(slots, 2, 128, 128)}
            )

    if way[1] == "eager":
        after = run_decode(a, *way, call=call)
        after["state"] = state
        hold_decode(a, after, expected)
        assert (page[:, 2 * 128 * 128 :] == 7).all()


# Records.


def records_of(a):
    """The arguments of apply_records that follow from those of a call of decode, after the call."""
    names = ("records", "state_indices", "first_slot", "state_v_first")
    return {"state": a["state"], **{n: a[n] for n in names if n in a}}


@pytest.mark.parametrize("state", [np.float32, bfloat16])
@pytest.mark.parametrize("k_first", [False, True])
def test_apply(way, state, k_first):
    a = make_decode(N=5, T=6, write="none", records=True, state=state, k_first=k_first, seed=12)
    after = hold(a, way)
    expected = truth_of_decode(a)
    accepted = np.array([0, 3, 6, 1, 5])
    b = {**records_of(a), "records": after["records"], "num_accepted_tokens": accepted}
    want = a["state"].astype(np.float64)
    for n, m in enumerate(accepted):
        if m and has_state(a, slot_of_start(a, n)):
            want[slot_of_start(a, n)] = expected["states"][n][m - 1]
    done = run_decode(b, *way, name="apply_records")
    hold_slots(a["state"], done["state"], want, bar_of(a["state"]), "state")


def test_apply_equals_decode(way):
    """The first m records applied, and m tokens decoded."""
    a = make_decode(N=3, T=6, write="none", records=True, pool=False, seed=13)
    records = run_decode(a, *way)["records"]
    for m in range(1, 7):
        b = {"records": records, "num_accepted_tokens": np.full(3, m), "state": a["state"]}
        got = run_decode(b, *way, name="apply_records")["state"]
        c = {n: np.ascontiguousarray(a[n][:, :m]) for n in ("q", "k", "v", "g", "beta", "out")}
        c = {**a, **c, "write_states": "last", "records": None}
        want = run_decode(c, *way)["state"]
        assert error(got, want.astype(np.float64)) <= 1e-6


def test_records(way):
    """The rows are decay, key and u. What is beyond a sequence's tokens stays as it is."""
    a = make_decode(
        lengths=(3, 2, 0), write="none", records=True, gate="activated", wide=True, normalised=True, seed=14
    )
    records = run_decode(a, *way)["records"]
    assert records.shape == (3, 4, 2, 3, 128)
    np.testing.assert_allclose(records[0, :3, :, 0], np.exp(a["g"][0, :3]), rtol=1e-6)
    np.testing.assert_allclose(records[0, :3, :, 1], a["k"][0, :3].astype(np.float32).repeat(2, 1))
    assert not records[1, :2].any()  # a sequence without a state
    assert np.isnan(records[0, 3:]).all()
    assert np.isnan(records[1, 2:]).all()
    assert np.isnan(records[2]).all()


@pytest.mark.parametrize("state", [np.float32, bfloat16])
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("T", [1, 8, 9])
def test_past_records(way, state, tree, T):
    """Records that the call applies itself leave what two calls leave."""
    a = make_decode(N=5, T=7, write="none", records=True, state=state, tree=tree, seed=18)
    b = {**records_of(a), "records": run_decode(a, *way)["records"]}
    b["num_accepted_tokens"] = np.array([0, 3, 7, 1, 2])
    if tree:
        b["accepted"] = np.tile(np.arange(7)[::-1].copy(), (5, 1))
        b["accepted"][4, 1] = 0
    c = make_decode(N=5, T=T, write="none", records=True, state=state, tree=tree, seed=19)
    c |= {n: a[n] for n in ("state_indices", "first_slot")}
    want_state = run_decode(b, *way, name="apply_records")["state"]
    want = run_decode({**c, "state": want_state}, *way)
    past = {"past_records" if n == "records" else n: x for n, x in b.items()}
    got = run_decode({**c, **past}, *way)
    # bf16 states may be rounded to the other neighbour where they lie in the middle.
    bar = 1e-6 if state == np.float32 else 2e-4
    assert error(got["state"], want_state.astype(np.float64)) <= bar
    assert error(got["out"], want["out"].astype(np.float64)) <= 3e-4
    np.testing.assert_allclose(got["records"][:, :T], want["records"][:, :T], rtol=3e-3, atol=3e-3)
    untouched = np.setdiff1d(np.arange(a["state"].shape[0]), a["state_indices"][[2, 3, 4]])
    assert got["state"][untouched].tobytes() == a["state"][untouched].tobytes()


def test_past_records_of_the_reference():
    """The definition applies records in fp64."""
    a = make_decode(N=2, T=4, write="none", records=True, pool=False, seed=20)
    records = run_decode(a)["records"]
    count = np.array([3, 4])
    expected = truth_of_decode(a)["states"]
    start = np.stack([expected[n][m - 1] for n, m in enumerate(count)]).astype(np.float32)
    given = {n: x for n, x in a.items() if n not in ("out", "records")}
    got = flash_kda.decode_reference(**given, past_records=records, num_accepted_tokens=count)
    want = flash_kda.decode_reference(**{**given, "state": start})
    for x, y in zip(got, want):
        assert error(x, y) <= 1e-6


def test_apply_of_a_path_in_a_tree(way):
    a = make_decode(N=1, T=6, write="none", records=True, pool=False, tree=True, seed=15)
    a["parents"] = np.array([[-1, 0, 0, 2, 1, 3]])
    records = run_decode(a, *way)["records"]
    path = [0, 2, 3, 5]
    b = {"records": records, "num_accepted_tokens": np.array([4]), "state": a["state"]}
    b["accepted"] = np.array([[*path, -1]])
    got = run_decode(b, *way, name="apply_records")["state"]
    assert error(got[0], truth_of_decode(a)["states"][0][5]) <= 1e-5


# A second pool.


@pytest.mark.parametrize("write", ["last", "each"])
@pytest.mark.parametrize("apart", ["indices", "none"])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("lengths", [None, (3, 1, 0, 16, 2)])
def test_written_states(way, write, apart, pool, lengths):
    """The states that are written go to written_states, and the pool stays as it is."""
    options = {"write": write, "apart": apart, "pool": pool, "lengths": lengths}
    hold(make_decode(**options, seed=21), way)
    hold(make_decode(**options, state=bfloat16, k_first=True, integers=np.int32, seed=22), way)
    if write == "each":
        hold(make_decode(**options, tree=True, seed=23), way)


def test_written_states_of_one_start(way):
    """Any number of sequences may start from a slot that nothing writes."""
    a = make_decode(T=3, write="each", apart="none", seed=24)
    a["state_indices"][:] = 2
    hold(a, way)


# Rounding.


@pytest.mark.parametrize("state", [np.float32, bfloat16])
def test_rounding(way, state):
    """Equal seeds and offsets give equal bits. A rounded number is one of both neighbours in bf16."""
    a = make_decode(T=2, state=state, seed=16)
    plain = run_decode(a, *way)["state"]
    calls = [
        run_decode({**a, "rounding": np.array(r)}, *way)["state"] for r in ([1, 0], [1, 0], [1, 1], [2, 0])
    ]
    assert calls[0].tobytes() == calls[1].tobytes()
    if state == np.float32:
        assert all(x.tobytes() == plain.tobytes() for x in calls)
        return
    assert len({x.tobytes() for x in calls}) == 3
    exact = truth_of_decode(a)["state"]
    for x in calls:
        off = np.abs(x.astype(np.float64) - exact)
        assert (off <= np.abs(exact) * 2**-7 + 1e-5).all()  # less than one step of bf16
    assert (calls[0].astype(np.float32) != plain.astype(np.float32)).mean() > 0.05


def round_to_nearest(x):
    """bf16 of fp32 numbers, as the bits say: half of the last place and then the last place's own bit."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)).astype(np.uint32) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).view(bfloat16)


def decode_zeros(state, decay, **options):
    """A token of zeros leaves the state times the decay, and NaN in rows of V with what is not finite."""
    zeros = [np.zeros((1, 1, 1, 128), bfloat16) for _ in range(3)]  # q, k and v
    g, beta = np.log(decay).reshape(1, 1, 1, 128), np.zeros((1, 1, 1), np.float32)
    activated = {"use_gate_in_kernel": False, "use_beta_sigmoid_in_kernel": False}
    out = np.empty_like(zeros[0])
    flash_kda.decode(*zeros, g, beta, 1.0, out, None, None, None, state, **activated, **options)


def apply_zeros(state, decay, **options):
    """A record of zeros leaves the state times the decay."""
    records = np.zeros((1, 1, 1, 3, 128), np.float32)
    records[..., 0, :] = decay
    flash_kda.apply_records(records, np.array([1]), state, **options)


@pytest.mark.parametrize("kernel", [k for k in flash_kda.kernels() if k.startswith("cpu")])
@pytest.mark.parametrize("k_first", [False, True])
@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("call", [decode_zeros, apply_zeros])
def test_bits_of_a_bf16_state(kernel, k_first, random, call):
    """A bf16 state is the fp32 state rounded, bit by bit, also where that is NaN, an infinity, a zero with a
    sign, half a step of bf16 or beyond the largest bf16."""
    rng = np.random.default_rng(1)
    old = rng.standard_normal((1, 1, 128, 128)).astype(bfloat16)
    for value in (np.nan, np.inf, -np.inf, 0.0, -0.0, 3.38e38, -3.38e38):
        old[0, 0, rng.integers(128, size=3), rng.integers(128, size=3)] = value
    decay = np.linspace(0.25, 1, 128, dtype=np.float32)
    options = {"kernel": kernel, "state_v_first": not k_first}
    got, exact = old.copy(), old.astype(np.float32)
    try:
        call(got, decay, **options, **({"rounding": np.array([3, 4])} if random else {}))
    except RuntimeError as unavailable:  # the kernel needs instructions that this CPU lacks
        assert kernel in str(unavailable)  # noqa: PT017
        pytest.skip(str(unavailable))
    call(exact, decay, **options)
    got = got.astype(np.float32)
    assert np.isnan(exact).any()
    assert np.isinf(exact).any() or call is decode_zeros
    assert (np.isnan(exact) | np.isinf(exact)).mean() < 0.1
    if not random:
        assert (got.view(np.uint32) == round_to_nearest(exact).astype(np.float32).view(np.uint32)).all()
        return
    np.testing.assert_array_equal(np.isnan(got), np.isnan(exact))
    towards_zero = exact.view(np.uint32) & np.uint32(0xFFFF0000)
    below, above = towards_zero.view(np.float32), (towards_zero + np.uint32(0x10000)).view(np.float32)
    in_bf16 = (below == exact) & ~np.isnan(exact)  # nothing is to be rounded, as for infinities
    assert (got[in_bf16].view(np.uint32) == exact[in_bf16].view(np.uint32)).all()
    rest = ~in_bf16 & ~np.isnan(exact)
    assert ((got == below) | (got == above))[rest].all()
    assert 0.3 < (got == above)[rest].mean() < 0.7


def test_a_state_that_forgets_slowly():
    """Each token forgets 1e-4 of the state: rounded to the nearest bf16 after each token the state stays as
    it is, and rounded at random it is right on average."""
    a = make_decode(N=1, T=1, HV=1, gate="activated", beta="activated", pool=False, state=bfloat16, wide=True)
    a["g"][:], a["beta"][:] = -1e-4, 0
    a["state"][:] = 1
    nearest, random = a["state"].copy(), a["state"].copy()
    for step in range(1000):
        flash_kda.decode(**{**a, "state": nearest})
        flash_kda.decode(**{**a, "state": random, "rounding": np.array([7, step])})
    right = np.exp(-1e-4 * 1000)
    assert abs(random.astype(np.float64).mean() / right - 1) < 3e-3
    assert abs(nearest.astype(np.float64).mean() / right - 1) > 3e-2


# The package's own parts.


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (flash_kda.decode, _decode_options.DecodeOptions),
        (flash_kda.apply_records, _decode_options.ApplyOptions),
    ],
)
def test_options_are_parameters(function, options):
    """In the order of the fields, in which the functions pass them, and with the fields' defaults."""
    parameters = inspect.signature(function).parameters.values()
    arrays = options.optional_arrays
    keywords = [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in arrays]
    assert keywords == [
        (f.name, f.default) for f in fields(options) if f.name not in ("given", "has_lower_bound")
    ]
    names = {p.name for p in parameters}
    assert names >= {*arrays, *options.required_arrays}


@pytest.mark.parametrize("module", ["_arrays", "_torch"])
def test_functions_keep_their_prepared_calls(module, monkeypatch):
    """fwd, decode and apply_records take turns, and each finds the call that it has prepared."""
    if module == "_torch":
        pytest.importorskip("torch")
    from problems import to_torch

    calls = _call.PreparedCalls()
    monkeypatch.setattr(getattr(flash_kda, module), "_calls", calls)
    a = make_decode(N=2, T=2, write="none", records=True, seed=17)
    b = {**records_of(a), "num_accepted_tokens": np.array([1, 2])}
    c = make_any(seed=18)
    if module == "_torch":
        a, b, c = (to_torch(x, "cpu") for x in (a, b, c))
    functions = ((flash_kda.decode, a), (flash_kda.apply_records, b), (flash_kda.fwd, c))
    for function, arguments in functions:
        function(**arguments)
    prepared = dict(calls.latest_with)
    assert len(prepared) == 3
    monkeypatch.setattr(getattr(flash_kda, module), "_prepare_and_run", None)
    for function, arguments in functions:
        function(**arguments)
    assert calls.latest_with == prepared


# Refusals.

REFUSED = {
    "q of another shape": ({"q": lambda x: x[:, :3]}, ValueError, "k has shape [3, 4, 1, 128]; it must be"),
    "17 tokens": ({"T": 17}, ValueError, "q has T = 17; there must be at most 16 tokens"),
    "g in fp64": ({"g": lambda x: x.astype(np.float64)}, TypeError, "g has dtype float64; it must be"),
    "no state": ({"state": None}, TypeError, "state is of type"),
    "a state in fp16": (
        {"state": lambda x: x.astype(np.float16)},
        TypeError,
        "state has dtype float16; it must",
    ),
    "too few slots": (
        {"state": lambda x: x[:2].copy(), "state_indices": None, "first_slot": 0},
        ValueError,
        "state has 2 slots; without state_indices it must have one for each of N = 3",
    ),
    "an index beyond the pool": (
        {"state_indices": lambda x: x + 100},
        ValueError,
        "state_indices",
    ),
    "first_slot alone": (
        {"state_indices": None},
        ValueError,
        "first_slot is 1 without state_indices; it must be 0",
    ),
    "write_states": (
        {"write_states": "all"},
        ValueError,
        'write_states is \'all\'; it must be "last", "none" or "each"',
    ),
    "write_states of a type": (
        {"write_states": 1},
        TypeError,
        'write_states is of type int; it must be "last", "none"',
    ),
    "each without slots": (
        {"write_states": "each", "state_indices": None, "first_slot": 0},
        ValueError,
        'state_indices is None; it must be given with write_states="each"',
    ),
    "past_records without none": (
        {"past_records": np.zeros((3, 4, 2, 3, 128), np.float32), "num_accepted_tokens": np.array([1, 1, 1])},
        ValueError,
        'past_records is given without write_states="none"; it must be None',
    ),
    "past_records without numbers": (
        {"past_records": np.zeros((3, 4, 2, 3, 128), np.float32), "write_states": "none"},
        ValueError,
        "num_accepted_tokens is None; it must be given with past_records",
    ),
    "past_records of another shape": (
        {
            "past_records": np.zeros((3, 4, 2, 384), np.float32),
            "num_accepted_tokens": np.array([1, 1, 1]),
            "write_states": "none",
        },
        ValueError,
        "past_records has shape [3, 4, 2, 384]; it must be [N, R, HV, 3, K], K = 128",
    ),
    "accepted without past_records": (
        {"accepted": np.array([[0], [0], [0]]), "write_states": "none"},
        ValueError,
        "accepted is given without past_records; it must be None",
    ),
    "more accepted than there are": (
        {
            "past_records": np.zeros((3, 4, 2, 3, 128), np.float32),
            "num_accepted_tokens": np.array([1, 5, 1]),
            "write_states": "none",
        },
        ValueError,
        "num_accepted_tokens[1] is 5; it must be in [0, 4], where the last is the least of R and 16",
    ),
    "accepted without each": (
        {"num_accepted_tokens": np.array([1, 1, 1])},
        ValueError,
        'num_accepted_tokens is given without write_states="each"; it must be None',
    ),
    "written_states that nothing is written to": (
        {"written_states": np.zeros((3, 2, 128, 128), np.float32), "write_states": "none"},
        ValueError,
        'written_states is given with write_states="none"; it must be None',
    ),
    "written_states and accepted": (
        {
            "written_states": np.zeros((12, 2, 128, 128), np.float32),
            "write_states": "each",
            "num_accepted_tokens": np.array([1, 1, 1]),
        },
        ValueError,
        "num_accepted_tokens is given with written_states; it must be None",
    ),
    "few written_states": (
        {"written_states": np.zeros((11, 2, 128, 128), np.float32), "write_states": "each"},
        ValueError,
        "written_states has 11 slots; without written_indices it must have one for each of the 12 states",
    ),
    "written_states of another dtype": (
        {"written_states": np.zeros((3, 2, 128, 128), bfloat16)},
        TypeError,
        "written_states has dtype bfloat16 and state has dtype float32; they must have one dtype",
    ),
    "written_indices alone": (
        {"written_indices": np.arange(3)},
        ValueError,
        "written_indices is given without written_states; it must be None",
    ),
    "a slot beyond written_states": (
        {
            "written_states": np.zeros((3, 2, 128, 128), np.float32),
            "written_indices": np.array([0, 3, 1]),
        },
        ValueError,
        "written_indices[1] is 3; it must be less than 3, the slots of written_states",
    ),
    "a tree with last": (
        {"parents": np.full((3, 4), -1)},
        ValueError,
        'parents is given with write_states="last"; a tree has no last state, so it must be None',
    ),
    "few records": (
        {"records": np.zeros((3, 3, 2, 3, 128), np.float32)},
        ValueError,
        "records has R = 3; it must be at least T = 4",
    ),
    "flat records": (
        {"records": np.zeros((3, 4, 2, 384), np.float32)},
        ValueError,
        "records has shape [3, 4, 2, 384]; it must be [N, R, HV, 3, K], K = 128",
    ),
    "records with gaps": (
        {"records": np.zeros((3, 8, 2, 3, 128), np.float32)[:, ::2]},
        ValueError,
        "records has strides",
    ),
    "rounding of three": (
        {"rounding": np.zeros(3, np.int64)},
        ValueError,
        "rounding has shape [3]; it must be",
    ),
    "rounding in int32": (
        {"rounding": np.zeros(2, np.int32)},
        TypeError,
        "rounding has dtype int32; it must be int64",
    ),
    "threads": ({"threads": -1}, ValueError, "threads is -1; it must be 0 (all) or more, and fit 32 bits"),
    "first_slot": (
        {"first_slot": -1},
        ValueError,
        "first_slot is -1; it must be 0 (every index is a slot) or more",
    ),
    "kernel": ({"kernel": "fastest"}, ValueError, 'kernel is "fastest"; it must be None or one of cpu'),
    "scale": ({"scale": "one"}, TypeError, "scale is of type str; it must be a number"),
    "an infinite scale": ({"scale": float("inf")}, ValueError, "scale is inf; it must be finite"),
    "lower_bound": ({"lower_bound": -6.0}, ValueError, "lower_bound is -6; it must be in [-5, 0]"),
    "no gate's parameters": (
        {"lower_bound": None, "A_log": None},
        ValueError,
        "A_log is None and lower_bound is None",
    ),
}


def changed(a, change):
    a = dict(a)
    for name, x in change.items():
        if callable(x):
            a[name] = x(a[name])
        else:
            a[name] = x
    return a


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(library, case):
    change, exception, sentence = REFUSED[case]
    change = dict(change)
    a = changed(make_decode(T=change.pop("T", 4), seed=19), change)
    if library == "torch":
        pytest.importorskip("torch")
        if case in ("records with gaps", "no state"):
            pytest.skip("the arrays are NumPy's")
        from problems import to_torch

        a = to_torch(a, "cpu")
    written = {n: a[n] for n in ("out", "state") if a[n] is not None}
    before = {n: x.clone() if library == "torch" else x.copy() for n, x in written.items()}
    with pytest.raises(exception) as raised:
        flash_kda.decode(**a)
    assert sentence in str(raised.value)
    for name, x in written.items():
        x, y = to_numpy({"now": x, "then": before[name]}).values()
        assert x.tobytes() == y.tobytes(), f"{name} was written"


APPLY_REFUSED = {
    "too many tokens": ({"num_accepted_tokens": np.array([0, 9])}, ValueError, "num_accepted_tokens"),
    "flat records": (
        {"records": lambda x: x.reshape(2, 4, 2, 384)},
        ValueError,
        "records has shape [2, 4, 2, 384]",
    ),
    "no token": (
        {"accepted": np.array([[0, 5], [0, 1]]), "num_accepted_tokens": np.array([2, 2])},
        ValueError,
        "accepted",
    ),
    "floats": (
        {"num_accepted_tokens": np.zeros(2, np.float32)},
        TypeError,
        "num_accepted_tokens has dtype float32",
    ),
    "another length": (
        {"num_accepted_tokens": np.zeros(3, np.int64)},
        ValueError,
        "num_accepted_tokens has shape [3]",
    ),
    "heads": ({"state": lambda x: x[:, :1].copy()}, ValueError, "state has shape"),
    "threads": ({"threads": 1.5}, TypeError, "threads is of type float; it must be an int"),
    "state_v_first": (
        {"state_v_first": 1},
        TypeError,
        "state_v_first is of type int; it must be True or False",
    ),
}


@pytest.mark.parametrize("case", APPLY_REFUSED)
def test_refusals_of_apply(case):
    change, exception, sentence = APPLY_REFUSED[case]
    rng = np.random.default_rng(20)
    a = {
        "records": rng.standard_normal((2, 4, 2, 3, 128), dtype=np.float32),
        "num_accepted_tokens": np.array([1, 2]),
    }
    a = changed({**a, "state": np.ones((2, 2, 128, 128), np.float32)}, change)
    with pytest.raises(exception) as raised:
        flash_kda.apply_records(**a)
    assert sentence in str(raised.value)
    assert (a["state"] == 1).all()


def test_out_shares_no_memory():
    a = make_decode(H=2, HV=2, seed=21)
    with pytest.raises(ValueError, match="out"):
        flash_kda.decode(**{**a, "out": a["v"]})


def test_read_only_arrays():
    a = make_decode(write="none", records=True, seed=22)
    a["records"].flags.writeable = False
    with pytest.raises(
        ValueError, match="records is read-only; it must be writable, as the call writes to it"
    ):
        flash_kda.decode(**a)
    zeros = np.zeros_like(a["records"])
    zeros.flags.writeable = False
    before = a["state"].copy()
    b = {**records_of(a), "records": zeros, "num_accepted_tokens": np.zeros(3, np.int64)}
    flash_kda.apply_records(**b)  # which reads them
    assert (a["state"] == before).all()
    a["state"].flags.writeable = False
    with pytest.raises(ValueError, match="state is read-only"):
        flash_kda.apply_records(**b)


def test_unknown_keywords_of_the_reference():
    a = make_decode(seed=23)
    given = {n: x for n, x in a.items() if n != "out"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'cut'"):
        flash_kda.decode_reference(**given, cut="never")


# Other libraries.


def test_dlpack():
    from test_dlpack import Foreign

    a = make_decode(write="each", accepted=True, seed=24)
    expected = truth_of_decode(a)
    work = {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in a.items()}
    flash_kda.decode(**{n: Foreign(x) if isinstance(x, np.ndarray) else x for n, x in work.items()})
    hold_decode(a, work, expected)


def test_jax():
    jax = pytest.importorskip("jax")
    a = make_decode(seed=25)
    expected = truth_of_decode(a)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
    with jax.default_device(jax.devices("cpu")[0]):  # as the arrays of NumPy
        inputs = {n: jax.numpy.asarray(a[n]) for n in names}
    work = {**a, **inputs, "out": a["out"].copy(), "state": a["state"].copy()}
    flash_kda.decode(**work)
    hold_decode(a, {**a, "out": work["out"], "state": work["state"]}, expected)
    for name in ("out", "state"):
        with pytest.raises(
            ValueError, match=f"{name} is an array of jax, whose arrays are immutable, and the call"
        ):
            flash_kda.decode(**{**work, name: jax.numpy.asarray(a[name])})

    def traced(q):
        flash_kda.decode(**{**work, "q": q})
        return q

    with pytest.raises(TypeError, match=r"q is a tracer of jax\.jit, .* call flash_kda\.jax\.decode"):
        jax.jit(traced)(inputs["q"])
