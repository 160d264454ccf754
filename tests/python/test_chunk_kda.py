"""chunk_kda: the arguments, defaults and results of flash-linear-attention's function of that name."""

import inspect
import warnings

import numpy as np
import pytest

import flash_kda
from problems import BARS, error, make_any, to_torch

torch = pytest.importorskip("torch")

FUSED = {"use_gate_in_kernel": True, "use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


@pytest.fixture(scope="module")
def fla():
    """FLA's functions: chunk_kda itself, and its plain recurrence and gates in PyTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FLA warns where there is no GPU
        pytest.importorskip("fla", reason="flash-linear-attention is not installed", exc_type=ImportError)
        kda = pytest.importorskip("fla.ops.kda", reason="this release has no KDA", exc_type=ImportError)
        from fla.ops.kda import gate, naive
    return {"chunk_kda": kda.chunk_kda, **vars(naive), **vars(gate)}


def arguments(device="cpu", **options):
    """Arguments of chunk_kda, whose states are K first unless the options ask for V first. All in one batch
    row of equal sequences, or with cu_seqlens."""
    a = make_any(**options)
    tensors = to_torch(a, device)
    names = (
        "q",
        "k",
        "v",
        "g",
        "beta",
        "scale",
        "initial_state",
        "cu_seqlens",
        "A_log",
        "dt_bias",
        "lower_bound",
    )
    return {n: tensors[n] for n in names}


def truth_of(call):
    """What chunk_kda must return, in fp64."""
    with_gate = call.get("use_gate_in_kernel", False)
    scale = call["scale"] if call.get("scale") is not None else 128**-0.5
    parameters = [call.get(n) if with_gate else None for n in ("A_log", "dt_bias", "lower_bound")]
    more = {n: call.get(n, False) for n in (*FUSED, "allow_neg_eigval", "state_v_first")}
    return flash_kda.reference(
        *(call[n] for n in ("q", "k", "v", "g", "beta")), scale, *parameters, call.get("initial_state"),
        call.get("cu_seqlens"), **more,
    )  # fmt: skip


def hold(got, want, device="cpu"):
    for x, y, bar in zip(got, want, BARS[device]):
        assert error(x.detach().double().cpu().numpy(), y.numpy()) <= bar


def test_signature(fla):
    """The names, their order, their kinds and their defaults."""
    ours = inspect.signature(flash_kda.chunk_kda).parameters.values()
    theirs = inspect.signature(inspect.unwrap(fla["chunk_kda"])).parameters.values()
    if "max_num_seqs" not in {p.name for p in theirs}:
        pytest.skip("this is an older release")
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


CALLS = {
    "everything fused": {**FUSED, "safe_gate": True},
    "everything fused, V first": {**FUSED, "safe_gate": True, "state_v_first": True},
    "softplus": {**FUSED, "lower_bound": None},
    "bounded without the flag": {**FUSED},
    "2 sigmoid": {**FUSED, "allow_neg_eigval": True},
    "without A_log": {**FUSED, "A_log": None},
    "without dt_bias": {**FUSED, "dt_bias": None, "lower_bound": None},
    "another scale": {**FUSED, "scale": 0.5},
    "no scale": {**FUSED, "scale": None},
    "without a state": {**FUSED, "initial_state": None},
    "gate alone": {"use_gate_in_kernel": True, "beta": "activated", "q": "normalised"},
    "nothing fused": {"beta": "activated", "q": "normalised", "g": "activated"},
    "nothing fused, parameters given": {
        "beta": "activated",
        "q": "normalised",
        "g": "activated",
        "A_log": True,
    },
}


def call_of(case, device="cpu", **options):
    change = dict(CALLS[case])
    call = arguments(
        device,
        gate="activated" if change.pop("g", None) else "bounded",
        beta=change.pop("beta", "sigmoid"),
        normalised=change.pop("q", None) == "normalised",
        wide=True,
        **options,
    )
    if change.get("A_log") is True:
        change["A_log"] = torch.zeros(call["v"].shape[2], device=device)
    return {**call, **change}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("compiled", [False, True])
def test_against_the_reference(device, case, compiled):
    call = call_of(case, device, seed=1)
    function = flash_kda.chunk_kda
    if compiled:
        torch.compiler.reset()
        function = torch.compile(flash_kda.chunk_kda, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out, state = function(**call, output_final_state=True)
        hold((out, state), truth_of(call), device)
        assert out.dtype == torch.bfloat16
        assert state.dtype == torch.float32
        assert flash_kda.chunk_kda(**call)[1] is None


@pytest.mark.parametrize("case", [case for case in CALLS if "V first" not in case])
def test_against_fla_s_plain_recurrence(fla, case):
    """FLA's recurrence is in fp32, takes gates and betas that are activated, and knows batch rows alone."""
    call = call_of(case, H=1, HV=2, lengths=(40,), seed=2)
    call["cu_seqlens"] = None
    q, k, v, g, beta = (call[n].float() for n in ("q", "k", "v", "g", "beta"))
    if call.get("use_qk_l2norm_in_kernel"):
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    if call.get("use_gate_in_kernel"):
        A_log, dt_bias = call["A_log"], call["dt_bias"]
        if call["lower_bound"] is None:
            g = fla["naive_kda_gate"](g, A_log, dt_bias)
        else:
            g = fla["naive_kda_lowerbound_gate"](g, A_log, dt_bias, call["lower_bound"])
    if call.get("use_beta_sigmoid_in_kernel"):
        beta = beta.sigmoid() * (2 if call.get("allow_neg_eigval") else 1)
    want = fla["naive_recurrent_kda"](q, k, v, g, beta, call["scale"], call["initial_state"], True)
    with torch.no_grad():
        got = flash_kda.chunk_kda(**call, output_final_state=True)
    for x, y, bar in zip(got, want, BARS["cpu"]):
        assert error(x.double().numpy(), y.double().numpy()) <= bar + 1e-4  # fp32's own error


@pytest.mark.parametrize("case", ["everything fused", "softplus", "2 sigmoid", "nothing fused"])
def test_against_fla_s_kernels(cuda, fla, monkeypatch, case):
    monkeypatch.setenv("FLA_FLASH_KDA", "0")
    call = call_of(case, cuda, lengths=(100, 64, 3), H=2, HV=4, seed=3)
    call |= {n: call[n].bfloat16() for n in ("g", "beta") if case != "nothing fused"}
    with torch.inference_mode():
        more = {"output_final_state": True, "return_intermediate_states": True}
        theirs = fla["chunk_kda"](**call, **more)
        ours = flash_kda.chunk_kda(**call, **more)
    for x, y in zip(ours, theirs):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert error(x.double().cpu().numpy(), y.double().cpu().numpy()) <= 2e-2
    hold(ours, truth_of(call), cuda)


def states_before_chunks(call, chunk, lengths):
    """The states before each chunk of each sequence, by the reference."""
    states, begin = [], 0
    for n, length in enumerate(lengths):
        for tokens in range(0, length, chunk):
            part = {**call, "cu_seqlens": None}
            for name in ("q", "k", "v", "g", "beta"):
                part[name] = call[name][:, begin : begin + tokens]
            if call.get("initial_state") is not None:
                part["initial_state"] = call["initial_state"][n : n + 1]
            states.append(truth_of(part)[1][0])
        begin += length
    return torch.stack(states)


@pytest.mark.parametrize("options", [{}, {"state_v_first": True}, {"initial_state": None}, {"chunk_size": 32},
                                     {"cu_seqlens_cpu": True}, {"use_graph": True}], ids=str)  # fmt: skip
def test_intermediate_states(device, options):
    lengths = (64, 0, 130, 5, 128)
    call = {**call_of("everything fused", device, lengths=lengths, seed=4), **options}
    if "cu_seqlens_cpu" in options:
        call["cu_seqlens_cpu"] = call["cu_seqlens"].cpu()
    chunk = options.get("chunk_size", 64)
    with torch.inference_mode():
        out, state, h = flash_kda.chunk_kda(**call, output_final_state=True, return_intermediate_states=True)
    plain = {n: x for n, x in call.items() if n not in ("chunk_size", "cu_seqlens_cpu", "use_graph")}
    hold((out, state), truth_of(plain), device)
    want = states_before_chunks(plain, chunk, lengths)
    most = -(-sum(lengths) // 64) + len(lengths) - 1
    assert h.shape == (1, most if options.get("use_graph") else len(want), 2, 128, 128)
    assert h.dtype == torch.bfloat16
    for got, right in zip(h[0], want):
        if right.any():
            assert error(got.double().cpu().numpy(), right.numpy()) <= 3e-3  # rounded to bf16
        else:
            assert not got.any()


@pytest.mark.parametrize("T", [5, 64, 100])
def test_intermediate_states_of_batch_rows(T):
    call = call_of("everything fused", lengths=(3 * T,), seed=5)
    call["cu_seqlens"] = None
    for name in ("q", "k", "v", "g", "beta"):
        call[name] = call[name].reshape(3, T, *call[name].shape[2:])
    call["initial_state"] = torch.randn(3, 2, 128, 128)
    with torch.inference_mode():
        out, state, h = flash_kda.chunk_kda(**call, return_intermediate_states=True)
    assert state is None
    assert h.shape == (3, -(-T // 64), 2, 128, 128)
    for b in range(3):
        row = {**call, "initial_state": call["initial_state"][b : b + 1]}
        row |= {n: call[n][b : b + 1] for n in ("q", "k", "v", "g", "beta")}
        want = states_before_chunks(row, 64, (T,))
        assert error(h[b].double().numpy(), want.numpy()) <= 3e-3
    hold((out,), truth_of(call))


def test_an_older_name_of_state_v_first():
    call = call_of("everything fused", seed=6)
    want = flash_kda.chunk_kda(**call, output_final_state=True, state_v_first=True)
    with pytest.warns(DeprecationWarning, match="transpose_state_layout is now called state_v_first"):
        got = flash_kda.chunk_kda(**call, output_final_state=True, transpose_state_layout=True)
    assert all(map(torch.equal, got, want))


def test_tensors_as_a_layer_holds_them():
    """Slices of one buffer, a flat dt_bias, parameters in 16 bits."""
    call = call_of("softplus", lengths=(30,), H=2, HV=2, seed=7)
    buffer = torch.cat([call[n].reshape(1, 30, -1) for n in ("q", "k", "v")], -1)
    for name, part in zip(("q", "k", "v"), buffer.split(256, -1)):
        call[name] = part.unflatten(-1, (2, 128))
    call |= {"A_log": call["A_log"].bfloat16().reshape(1, 1, 2, 1), "dt_bias": call["dt_bias"].reshape(-1)}
    with torch.no_grad():
        got = flash_kda.chunk_kda(**call, output_final_state=True)
    hold(got, truth_of({**call, "A_log": call["A_log"].float().reshape(2)}))


@pytest.mark.parametrize(
    ("change", "exception", "sentence"),
    [
        ({"q": None}, TypeError, "q is of type NoneType; it must be a PyTorch tensor"),
        ({"v": np.zeros((1, 8, 2, 128))}, TypeError, "v is of type ndarray; it must be a PyTorch tensor"),
        ({"q": lambda x: x.float()}, TypeError, "q has dtype float32; it must be bfloat16"),
        ({"k": lambda x: x[:, :3]}, ValueError, "k has shape [1, 3, 1, 128]; it must be"),
        ({"beta": lambda x: x[0]}, ValueError, "beta has 2 dimensions; it must have 3: [B, T, HV]"),
        ({"v": lambda x: x[0]}, ValueError, "v has 3 dimensions; it must have 4"),
        (
            {"lower_bound": None, "safe_gate": True},
            ValueError,
            "lower_bound is None with safe_gate=True; it must",
        ),
        (
            {"lower_bound": 0.0, "safe_gate": True},
            ValueError,
            "lower_bound is 0.0 with safe_gate=True; it must",
        ),
        ({"lower_bound": -6.0}, ValueError, "lower_bound is -6; it must be in [-5, 0]"),
        (
            {"lower_bound": None, "A_log": None},
            ValueError,
            "A_log is None and lower_bound is None; A_log must be",
        ),
        (
            {"allow_neg_eigval": True, "use_beta_sigmoid_in_kernel": False},
            ValueError,
            "allow_neg_eigval is True and",
        ),
        (
            {"initial_state": lambda x: x.bfloat16()},
            TypeError,
            "initial_state is of torch.bfloat16; it must be a",
        ),
        (
            {"initial_state": lambda x: x[:0]},
            ValueError,
            "initial_state has shape [0, 2, 128, 128]; it must be",
        ),
        (
            {"cp_context": 1},
            ValueError,
            "cp_context is given; flash_kda computes on one device, so it must be None",
        ),
        ({"chunk_size": 16}, ValueError, "chunk_size is 16; it must be 32 or 64"),
        (
            {"return_intermediate_states": True},
            ValueError,
            "return_intermediate_states is True outside of torch.inf",
        ),
        (
            {"use_graph": True, "max_num_seqs": 3},
            ValueError,
            "cu_seqlens has 2 entries with max_num_seqs=3; it must",
        ),
        (
            {"state_v_first": True, "transpose_state_layout": True},
            ValueError,
            "transpose_state_layout is given with",
        ),
        ({"no_such_thing": 1}, TypeError, "unexpected keyword argument 'no_such_thing'"),
    ],
)
def test_wrong_arguments(change, exception, sentence):
    call = call_of("everything fused", lengths=(8,), seed=9)
    call["safe_gate"] = False
    for name, x in change.items():
        call[name] = x(call[name]) if callable(x) else x
    with pytest.raises(exception) as raised, torch.no_grad():
        flash_kda.chunk_kda(**call)
    assert sentence in str(raised.value)


def test_intermediate_states_without_recompute():
    call = call_of("everything fused", lengths=(8,), seed=9)
    with pytest.raises(ValueError, match="with disable_recompute=True; one of them"), torch.inference_mode():
        flash_kda.chunk_kda(**call, return_intermediate_states=True, disable_recompute=True)
