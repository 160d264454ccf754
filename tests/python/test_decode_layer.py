"""decode_layer on NumPy arrays, tensors and compiled, against a plain NumPy layer and the fp64 reference."""

import inspect
from dataclasses import fields

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from decode_problems import has_state, run_decode
from flash_kda import _decode_options
from problems import error, hold_slots, to_numpy, to_torch

D = 128
WAYS = [("numpy", "eager"), ("torch", "eager"), ("torch", "aot_eager")]
OUT_BAR, STATE_BAR, BF16_STATE_BAR = 2.3e-3, 1e-5, 2.3e-3
WRITTEN = ("conv_state", "out", "state", "records", "conv_windows", "written_states")


@pytest.fixture(params=WAYS, ids=" ".join)
def way(request):
    if request.param[0] == "torch":
        pytest.importorskip("torch")
    return request.param


def make_layer(
    N=3,
    T=1,
    H=2,
    lengths=None,
    write="last",
    gate="bounded",
    state=np.float32,
    wide=False,
    norm=True,
    L=3,
    accepted=False,
    windows=False,
    records=False,
    bias=True,
    weight_by_part=False,
    apart=None,
    seed=0,
):
    """The arguments of decode_layer with what the names ask for. lengths: of packed sequences, in place of N
    and T. Sequence 1 has a slot below first_slot. apart: "indices" or "none", of written_states. What
    decode_layer writes holds NaN, except the pools."""
    rng = np.random.default_rng(seed)
    rows, tokens = (N, T) if lengths is None else (1, sum(lengths))
    if lengths is not None:
        N, T = len(lengths), max(lengths)
    channels = 3 * H * D

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    other = np.float32 if wide else bfloat16
    each = write == "each" and not apart  # a slot of the pool for each token
    columns = T if each else 1
    slots = N * columns + 3
    indices = rng.permutation(slots - 1)[: N * columns].reshape(N, columns) + 1
    if N > 1:
        indices[1] = 0
    a = {
        "x": normal(rows, tokens, channels).astype(bfloat16),
        "weight": (0.5 * normal(channels, 4)).astype(other),
        "bias": (0.5 * normal(channels)).astype(other) if bias else None,
        "conv_state": normal(slots, channels, L).astype(bfloat16),
        "g": normal(rows, tokens, H, D).astype(other),
        "beta": normal(rows, tokens, H).astype(other),
        "A_log": rng.uniform(-1, 1, H).astype(np.float32),
        "dt_bias": rng.uniform(-6, 1, (H, D)).astype(np.float32),
        "state_indices": (indices if each else indices[:, 0]).astype(np.int32),
        "state": (0.5 * normal(slots, H, D, D)).astype(state),
        "out": np.full((rows, tokens, H, D), np.nan, bfloat16),
        "lower_bound": None if gate == "softplus" else -5.0,
        "first_slot": 1,
        "write_states": write,
    }
    if weight_by_part:
        by_part = a["weight"].reshape(3, H * D, 4).transpose(0, 2, 1)
        a["weight"] = np.ascontiguousarray(by_part)
    if norm:
        a["norm_weight"] = (1 + 0.3 * normal(D)).astype(other)
        a["output_gate"] = normal(rows, tokens, H, D).astype(other)
    if lengths is not None:
        a["cu_seqlens"] = np.cumsum([0, *lengths]).astype(np.int32)
    if accepted:
        a["num_accepted_tokens"] = rng.integers(1, columns + 1, N)
    if windows:
        a["conv_windows"] = np.full((N, T, channels, 3), np.nan, bfloat16)
    if records:
        a["records"] = np.full((N, T, H, 3, D), np.nan, np.float32)
    if apart:
        columns = T + 1 if write == "each" else 1
        states = N * columns if apart == "indices" else rows * tokens if write == "each" else N
        a["written_states"] = np.full((states + 2, H, D, D), np.nan, state)
    if apart == "indices":
        indices = rng.permutation(states + 2)[: N * columns].reshape(N, columns)
        indices[-1, -1] = -1
        a["written_indices"] = indices if write == "each" else np.ascontiguousarray(indices[:, 0])
    return a


def lengths_of(a):
    return np.diff(a["cu_seqlens"]) if "cu_seqlens" in a else np.full(*a["x"].shape[:2])


def start_of(a, n):
    """The slots of the state and of the window that sequence n starts from, and the window's first column."""
    if a["write_states"] != "each" or "written_states" in a:
        return (a["state_indices"][n],) * 2 + (0,)
    first = a["num_accepted_tokens"][n] - 1 if "num_accepted_tokens" in a else 0
    if a["conv_state"].shape[2] == 3:
        return (a["state_indices"][n, first],) * 2 + (0,)
    return a["state_indices"][n, first], a["state_indices"][n, 0], first


def inputs_of(a, n):
    """The window of sequence n and its x: [3 + length, channels], or None: it has no state."""
    slot, window, column = start_of(a, n)
    if not (has_state(a, slot) and has_state(a, window)):
        return None
    begin = a["cu_seqlens"][n] if "cu_seqlens" in a else 0
    x = a["x"][0 if "cu_seqlens" in a else n, begin : begin + lengths_of(a)[n]]
    return np.concatenate([a["conv_state"][window, :, column : column + 3].T, x])


def plain_layer(a):
    """out, and the state after each token of each sequence, in fp64 NumPy."""
    f64 = lambda x: np.asarray(x).astype(np.float64)  # noqa: E731
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    H = a["g"].shape[2]
    weight = f64(a["weight"])
    if weight.ndim == 3:
        weight = weight.transpose(0, 2, 1).reshape(-1, 4)
    bias = 0 if a["bias"] is None else f64(a["bias"])
    out, states = np.zeros(a["g"].shape), []
    for n, length in enumerate(lengths_of(a)):
        inputs = inputs_of(a, n)
        states.append([])
        if inputs is None:
            continue
        row, begin = (0, a["cu_seqlens"][n]) if "cu_seqlens" in a else (n, 0)
        S = f64(a["state"][start_of(a, n)[0]])
        for i in range(length):
            y = bias + (weight * f64(inputs[i : i + 4]).T).sum(1)
            q, k, v = (y * sigmoid(y)).reshape(3, H, D)
            q, k = (z / np.sqrt((z * z).sum(-1, keepdims=True) + 1e-6) for z in (q, k))
            gate = f64(a["g"][row, begin + i]) + f64(a["dt_bias"])
            rate = np.exp(f64(a["A_log"]))[:, None]
            if a["lower_bound"] is None:
                decay = np.exp(-rate * np.logaddexp(0, gate))
            else:
                decay = np.exp(a["lower_bound"] * sigmoid(rate * gate))
            b = sigmoid(f64(a["beta"][row, begin + i]))[:, None]
            S = S * decay[:, None]
            u = b * (v - np.einsum("hvk,hk->hv", S, k))
            S = S + u[:, :, None] * k[:, None]
            o = float(np.float32(D**-0.5)) * np.einsum("hvk,hk->hv", S, q)
            if "norm_weight" in a:
                o = o / np.sqrt((o * o).mean(-1, keepdims=True) + float(np.float32(1e-5)))
                o = o * f64(a["norm_weight"]) * sigmoid(f64(a["output_gate"][row, begin + i]))
            out[row, begin + i] = o
            states[n].append(S)
    return out, states


def pools_after(a, states):
    """The right pools: of states in fp64, and the bits of the windows."""
    pool, conv = a["state"].astype(np.float64), a["conv_state"].copy()
    for n, length in enumerate(lengths_of(a)):
        inputs = inputs_of(a, n)
        if inputs is None or not length or a["write_states"] == "none" or "written_states" in a:
            continue
        if a["write_states"] == "last":
            pool[a["state_indices"][n]] = states[n][-1]
            conv[a["state_indices"][n], :, :3] = inputs[-3:].T
            continue
        for i in range(length):
            slot = a["state_indices"][n, i]
            pool[slot] = states[n][i]
            if conv.shape[2] == 3:
                conv[slot] = inputs[i + 1 : i + 4].T
        if conv.shape[2] > 3:
            conv[a["state_indices"][n, 0], :, : length + 2] = inputs[1:].T
    return pool, conv


def buffer_after(a, states):
    """The right written_states in fp64, and which of its slots are written."""
    buffer, first = a["written_states"].astype(np.float64), 0
    for n, length in enumerate(lengths_of(a)):
        each = a["write_states"] == "each"
        for i in range(length if each else 1):
            slot = first + i if each else n
            if "written_indices" in a:
                slot = a["written_indices"][n, i] if each else a["written_indices"][n]
            if slot >= 0 and states[n]:
                buffer[slot] = states[n][i if each else -1]
        first += length
    return buffer


def hold(a, way=("numpy", "eager"), call=None):
    after = run_layer(a, *way, call=call)
    out, states = plain_layer(a)
    for name, x in a.items():
        if isinstance(x, np.ndarray) and name not in WRITTEN:
            assert after[name].tobytes() == x.tobytes(), f"{name} was written"
    if out.size:
        assert error(after["out"], out) <= OUT_BAR
    pool, conv = pools_after(a, states)
    bar = STATE_BAR if a["state"].dtype == np.float32 else BF16_STATE_BAR
    hold_slots(a["state"], after["state"], pool, bar, "state")
    if "written_states" in a:
        pools = a["written_states"], after["written_states"], buffer_after(a, states)
        hold_slots(*pools, bar, "written_states")
    assert after["conv_state"].tobytes() == conv.tobytes()
    for n, length in enumerate(lengths_of(a)):
        inputs = inputs_of(a, n)
        for i in range(length):
            if "conv_windows" in a:
                want = np.zeros_like(a["conv_windows"][n, i]) if inputs is None else inputs[i + 1 : i + 4].T
                assert after["conv_windows"][n, i].tobytes() == np.ascontiguousarray(want).tobytes()
            if inputs is None:
                row = (0, a["cu_seqlens"][n] + i) if "cu_seqlens" in a else (n, i)
                assert not after["out"][row].astype(np.float32).any()
    return after


def run_layer(a, library="numpy", mode="eager", device="cpu", call=None):
    """decode_layer returns out, which run_decode takes for granted that it does not."""
    function = call or flash_kda.decode_layer

    def without_result(**arguments):
        function(**arguments)

    return run_decode(a, library, mode, device, call=without_result)


# Against the definition.


@pytest.mark.parametrize(
    "options", [{}, {"T": 3, "gate": "softplus"}, {"lengths": (2, 0, 3), "write": "each"}]
)
def test_the_reference_is_the_layer(options):
    a = make_layer(**options, seed=1)
    out, states = plain_layer(a)
    given = {n: x for n, x in a.items() if n != "out"}
    got, after = flash_kda.decode_layer_reference(**given)
    np.testing.assert_allclose(got, out, rtol=1e-9, atol=1e-12)
    for n, mine in enumerate(states):
        begin = a["cu_seqlens"][n] if "cu_seqlens" in a else 0
        for i, S in enumerate(mine):
            at = after[0 if "cu_seqlens" in a else n, begin + i]
            np.testing.assert_allclose(at, S, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("T", [0, 1, 4, 16])
@pytest.mark.parametrize("write", ["last", "none", "each"])
def test_tokens(way, T, write):
    if write == "each" and T == 0:
        pytest.skip("a slot for no token")
    hold(make_layer(T=T, write=write, seed=T), way)


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "softplus", "wide": True},
        {"norm": False, "bias": False},
        {"state": bfloat16, "weight_by_part": True},
        {"lengths": (3, 1, 0, 4), "records": True, "windows": True, "write": "none"},
        {"T": 3, "write": "each", "accepted": True},
        {"T": 3, "write": "each", "accepted": True, "L": 6, "windows": True},
        {"L": 5},
    ],
    ids=str,
)
def test_options(way, options):
    hold(make_layer(**options, seed=2), way)


@pytest.mark.parametrize("write", ["last", "each"])
@pytest.mark.parametrize("apart", ["indices", "none"])
@pytest.mark.parametrize(
    "options",
    [{"T": 1}, {"T": 4, "state": bfloat16, "L": 5}, {"lengths": (3, 0, 5), "windows": True}],
    ids=str,
)
def test_written_states(way, write, apart, options):
    """Both pools stay as they are, and conv_windows has the windows."""
    hold(make_layer(write=write, apart=apart, **options, seed=12), way)


def test_written_states_of_one_start():
    """Sequences may start from one slot, since nothing writes it."""
    a = make_layer(N=3, T=2, write="each", apart="none", windows=True, seed=13)
    a["state_indices"][:] = 2
    hold(a)


def test_state_k_first():
    a = make_layer(T=2, seed=3)
    one = flash_kda.decode_layer_reference(**{n: x for n, x in a.items() if n != "out"})
    a["state"] = np.ascontiguousarray(a["state"].swapaxes(-1, -2))
    a["state_v_first"] = False
    other = flash_kda.decode_layer_reference(**{n: x for n, x in a.items() if n != "out"})
    np.testing.assert_allclose(other[0], one[0], rtol=1e-12)
    np.testing.assert_allclose(other[1].swapaxes(-1, -2), one[1], rtol=1e-12)
    after = run_layer(a)
    slot = a["state_indices"][0]
    assert error(after["state"][slot], other[1][0, 1]) <= STATE_BAR


def test_verify_then_apply():
    """Drafts are verified, two are accepted, and both pools are brought up to date."""
    a = make_layer(N=1, T=4, write="none", records=True, windows=True, seed=4)
    after = run_layer(a)
    slot = int(a["state_indices"][0])
    flash_kda.apply_records(
        after["records"], np.array([2]), after["state"], state_indices=a["state_indices"], first_slot=1
    )
    after["conv_state"][slot, :, :3] = after["conv_windows"][0, 1]
    right = {**a, **{n: np.ascontiguousarray(a[n][:, :2]) for n in ("x", "g", "beta", "out", "output_gate")}}
    del right["records"], right["conv_windows"]
    want = run_layer({**right, "write_states": "last"})
    assert error(after["state"][slot], want["state"][slot].astype(np.float64)) <= 1e-6
    assert after["conv_state"].tobytes() == want["conv_state"].tobytes()


# As an engine calls it.


@pytest.mark.parametrize("packed", [False, True])
def test_tensors_without_a_dimension_of_tokens(way, packed):
    a = make_layer(lengths=(1, 1, 1) if packed else None, seed=5)
    want = run_layer(a)
    shapes = [lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])]
    if not packed:
        shapes.append(lambda x: x.swapaxes(0, 1))
    for shape in shapes:
        b = {**a, "x": shapes[0](a["x"])}
        b |= {n: np.ascontiguousarray(shape(a[n])) for n in ("g", "beta", "out", "output_gate")}
        got = run_layer(b, *way)
        for name in ("out", "state", "conv_state"):
            assert got[name].tobytes() == want[name].tobytes()


def test_views_of_an_engine():
    """Rows of odd strides, and slots of both pools in pages of one buffer, with the channels last."""
    torch = pytest.importorskip("torch")
    a = make_layer(N=2, seed=6)
    want = run_layer(a)
    t = to_torch(a, "cpu")
    N, _, channels = a["x"].shape
    H, slots = a["g"].shape[2], a["state"].shape[0]
    x = torch.zeros(N, channels + 17, dtype=torch.bfloat16)
    x[:, 1 : channels + 1] = t["x"][:, 0]
    gate = torch.zeros(N, H * D + 7, dtype=torch.bfloat16)
    gate[:, : H * D] = t["output_gate"].reshape(N, H * D)
    beta = torch.zeros(1, N, H + 1, dtype=torch.bfloat16)
    beta[..., :H] = t["beta"][:, 0]
    state_bytes, conv_bytes = H * D * D * 4, channels * 3 * 2
    pages = torch.zeros(slots * (state_bytes + conv_bytes), dtype=torch.uint8)
    conv = torch.as_strided(
        pages.view(torch.bfloat16), (slots, channels, 3), ((state_bytes + conv_bytes) // 2, 1, channels)
    )
    state = torch.as_strided(
        pages.view(torch.float32), (slots, H, D, D), ((state_bytes + conv_bytes) // 4, D * D, D, 1),
        conv_bytes // 4,
    )  # fmt: skip
    conv.copy_(t["conv_state"])
    state.copy_(t["state"])
    out = flash_kda.decode_layer(
        x[:, 1 : channels + 1], t["weight"], t["bias"], conv, t["g"].transpose(0, 1), beta[..., :H],
        t["A_log"], t["dt_bias"], t["state_indices"], state, lower_bound=-5.0,
        output_gate=gate[:, : H * D].view(N, H, D), norm_weight=t["norm_weight"], first_slot=1,
    )  # fmt: skip
    assert out.shape == (1, N, H, D)
    assert out.dtype == torch.bfloat16
    got = to_numpy(
        {"out": out.transpose(0, 1).contiguous(), "state": state.contiguous(), "conv": conv.contiguous()}
    )
    assert got["out"].tobytes() == want["out"].tobytes()
    assert got["state"].tobytes() == want["state"].tobytes()
    assert got["conv"].tobytes() == want["conv_state"].tobytes()


def test_out_is_made_and_returned():
    a = make_layer(seed=7)
    want = run_layer(a)["out"]
    given = a.pop("out")
    assert flash_kda.decode_layer(**{**to_copy(a), "out": given}) is given
    made = flash_kda.decode_layer(**to_copy(a))
    assert made.dtype == bfloat16
    assert made.tobytes() == want.tobytes()


def to_copy(a):
    return {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in a.items()}


# The package's own parts.


def test_options_are_parameters():
    """In the order of the fields, in which decode_layer passes them, and with the fields' defaults."""
    options = _decode_options.DecodeLayerOptions
    parameters = inspect.signature(flash_kda.decode_layer).parameters.values()
    others = (*options.optional_arrays, "out", "scale", "lower_bound")
    keywords = [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in others]
    assert keywords == [
        (f.name, f.default) for f in fields(options) if f.name not in ("given", "has_lower_bound")
    ]
    assert {p.name for p in parameters} >= {*options.optional_arrays, *options.required_arrays}


CASES = {
    "x dtype": (dict(x=np.float32), TypeError, "x has dtype float32; it must be bfloat16"),
    "conv_state dtype": (dict(conv_state=np.float32), TypeError, "conv_state has dtype float32"),
    "norm_eps": (dict(norm_eps=-1.0), ValueError, "norm_eps is not a finite number of at least 0"),
    "norm_eps type": (dict(norm_eps="1"), TypeError, "norm_eps is of type str; it must be a number"),
    "write_states": (dict(write_states="all"), ValueError, "write_states is 'all'"),
    "first_slot": (dict(first_slot=-1), ValueError, "first_slot is -1"),
    "scale": (dict(scale=float("inf")), ValueError, "scale is inf; it must be finite"),
    "lower_bound": (dict(lower_bound=1.0), ValueError, "lower_bound is 1; it must be in"),
    "g": (dict(g=None), TypeError, "g is of type builtins.NoneType"),
}


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_refusals(library, case):
    changes, kind, sentence = CASES[case]
    a = make_layer(seed=8)
    for name, change in changes.items():
        a[name] = a[name].astype(change) if isinstance(change, type) else change
    if library == "torch":
        pytest.importorskip("torch")
        a = to_torch(a, "cpu")
    with pytest.raises(kind, match=sentence):
        flash_kda.decode_layer(**a)


def test_pools_are_never_copied():
    pytest.importorskip("torch")
    t = to_torch(make_layer(seed=9), "cpu")
    with pytest.raises(ValueError, match="state has strides"):
        flash_kda.decode_layer(**{**t, "state": t["state"].mT})


def test_operator():
    torch = pytest.importorskip("torch")
    assert str(torch.ops.flash_kda.decode_layer.default._schema) == (
        "flash_kda::decode_layer(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) conv_state, Tensor g, "
        "Tensor beta, Tensor? A_log, Tensor? dt_bias, Tensor? state_indices, Tensor(b!) state, "
        "Tensor(c!) out, float scale, float? lower_bound, Tensor? output_gate=None, "
        "Tensor? norm_weight=None, Tensor? num_accepted_tokens=None, Tensor? cu_seqlens=None, "
        "Tensor(d!)? records=None, Tensor(e!)? conv_windows=None, Tensor? rounding=None, "
        "Tensor(f!)? written_states=None, Tensor? written_indices=None, "
        "float norm_eps=1.0000000000000001e-05, int first_slot=0, "
        'str write_states="last", str? kernel_name=None, '
        "int threads=0, bool use_gate_in_kernel=True, bool use_qk_l2norm_in_kernel=True, "
        "bool use_beta_sigmoid_in_kernel=True, bool allow_neg_eigval=False, bool state_v_first=True) -> ()"
    )
    a = make_layer(T=2, write="each", accepted=True, windows=True, seed=10)
    torch.library.opcheck(
        torch.ops.flash_kda.decode_layer.default, (), {**to_torch(a, "cpu"), "scale": D**-0.5}
    )


def test_compile_a_step():
    """A layer's step in one graph, with a new out, and arithmetic around it."""
    torch = pytest.importorskip("torch")
    torch.compiler.reset()
    a = make_layer(seed=11)
    del a["out"]
    names = [n for n, x in a.items() if isinstance(x, np.ndarray)]
    rest = {n: x for n, x in a.items() if n not in names}

    def step(**t):
        return flash_kda.decode_layer(**{**t, "x": t["x"] * 2}, **rest) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        one, other = (to_torch({n: a[n] for n in names}, "cpu") for _ in range(2))
        for _ in range(2):
            assert torch.equal(compiled(**one), step(**other))
            assert torch.equal(one["state"], other["state"])
            assert torch.equal(one["conv_state"], other["conv_state"])


def test_gradients_are_refused():
    torch = pytest.importorskip("torch")
    t = to_torch(make_layer(seed=12), "cpu")
    t["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="computes no gradients"):
        flash_kda.decode_layer(**t)
    assert torch.isnan(t["out"]).all()


@pytest.mark.parametrize(
    "options", [{}, {"T": 4, "write": "each", "accepted": True, "L": 6}, {"state": bfloat16}], ids=str
)
def test_on_a_gpu(cuda, options):
    hold(make_layer(**options, seed=13), ("torch", "eager", cuda))


def test_cuda_graph(cuda):
    """A replayed graph goes on with what the pools hold then."""
    import torch

    a = make_layer(seed=14)
    t, u = to_torch(a, cuda), to_torch(a, cuda)
    with torch.no_grad():
        flash_kda.decode_layer(**to_torch(a, cuda))  # loads the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            flash_kda.decode_layer(**t)
        for _ in range(3):
            graph.replay()
            flash_kda.decode_layer(**u)
    for name in ("out", "state", "conv_state"):
        assert torch.equal(t[name], u[name])
