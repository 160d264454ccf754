"""fused_recurrent_kda: the arguments, defaults and results of flash-linear-attention's function of that
name."""

import inspect
import warnings

import numpy as np
import pytest

import flash_kda
from problems import BARS, error, make_any, to_torch

torch = pytest.importorskip("torch")

FUSED = {"use_gate_in_kernel": True, "use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
ARGUMENTS = (
    "q",
    "k",
    "v",
    "g",
    "beta",
    "A_log",
    "dt_bias",
    "scale",
    "initial_state",
    "lower_bound",
    "cu_seqlens",
)


@pytest.fixture(scope="module")
def fla():
    """FLA's functions: fused_recurrent_kda itself, and its plain recurrence and gates in PyTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FLA warns where there is no GPU
        pytest.importorskip("fla", reason="flash-linear-attention is not installed", exc_type=ImportError)
        kda = pytest.importorskip("fla.ops.kda", reason="this release has no KDA", exc_type=ImportError)
        from fla.ops.kda import gate, naive
    return {"fused_recurrent_kda": kda.fused_recurrent_kda, **vars(naive), **vars(gate)}


@pytest.fixture
def used(monkeypatch):
    """The names of the functions that compute."""
    seen = []
    for name in ("fwd", "decode"):
        function = getattr(flash_kda, name)

        def spy(*args, name=name, function=function, **kwargs):
            seen.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(flash_kda, name, spy)
    return seen


CALLS = {
    "everything fused": {**FUSED},
    "everything fused, V first": {**FUSED, "state_v_first": True},
    "softplus": {**FUSED, "lower_bound": None},
    "2 sigmoid": {**FUSED, "allow_neg_eigval": True},
    "without A_log": {**FUSED, "A_log": None},
    "without dt_bias": {**FUSED, "dt_bias": None, "lower_bound": None},
    "no scale": {**FUSED, "scale": None},
    "without a state": {**FUSED, "initial_state": None},
    "gate alone": {"use_gate_in_kernel": True, "beta": "activated", "q": "normalised"},
    "nothing fused, parameters given": {
        "beta": "activated",
        "q": "normalised",
        "g": "activated",
        "A_log": True,
    },
}


def call_of(case, device="cpu", rows=None, **options):
    """rows: batch rows of that many tokens each, instead of packed sequences."""
    change = dict(CALLS[case])
    if rows is not None:
        options["lengths"] = rows
    a = make_any(
        gate="activated" if change.pop("g", None) else "bounded",
        beta=change.pop("beta", "sigmoid"),
        normalised=change.pop("q", None) == "normalised",
        wide=True,
        **options,
    )
    if rows is not None:
        a.pop("cu_seqlens")
        for name in ("q", "k", "v", "g", "beta"):
            a[name] = a[name].reshape(len(rows), rows[0], *a[name].shape[2:])
    tensors = to_torch(a, device)
    call = {n: tensors[n] for n in ARGUMENTS if n in tensors}
    if change.get("A_log") is True:
        change["A_log"] = torch.zeros(call["v"].shape[2], device=device)
    return {**call, **change}


def truth_of(call):
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
    ours = inspect.signature(flash_kda.fused_recurrent_kda).parameters.values()
    theirs = inspect.signature(inspect.unwrap(fla["fused_recurrent_kda"])).parameters.values()
    if "state_v_first" not in {p.name for p in theirs}:
        pytest.skip("this is an older release")
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


SHAPES = {
    "one token": ({"rows": (1, 1, 1)}, "decode"),
    "16 tokens": ({"rows": (16, 16)}, "decode"),
    "17 tokens": ({"rows": (17, 17)}, "fwd"),
    "short sequences": ({"lengths": (5, 0, 11)}, "decode"),
    "sequences of unknown length": ({"lengths": (5, 0, 12)}, "fwd"),
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(device, used, case, shape):
    options, function = SHAPES[shape]
    call = call_of(case, device, **options, seed=1)
    before = None if call["initial_state"] is None else call["initial_state"].clone()
    with torch.no_grad():
        out, state = flash_kda.fused_recurrent_kda(**call, output_final_state=True)
        again, none = flash_kda.fused_recurrent_kda(**call)
    hold((out, state), truth_of(call), device)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert none is None
    assert torch.equal(again, out)
    assert before is None or torch.equal(call["initial_state"], before), "the initial state was written"
    assert used == [function] * 2


@pytest.mark.parametrize("case", [case for case in CALLS if "V first" not in case])
@pytest.mark.parametrize("T", [3, 40])
def test_against_fla_s_plain_recurrence(fla, case, T):
    """FLA's recurrence is in fp32, takes gates and betas that are activated, and knows batch rows alone."""
    call = call_of(case, rows=(T, T), H=1, HV=2, seed=2)
    q, k, v, g, beta = (call[n].float() for n in ("q", "k", "v", "g", "beta"))
    if call.get("use_qk_l2norm_in_kernel"):
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    if call.get("use_gate_in_kernel"):
        if call["lower_bound"] is None:
            g = fla["naive_kda_gate"](g, call["A_log"], call["dt_bias"])
        else:
            g = fla["naive_kda_lowerbound_gate"](g, call["A_log"], call["dt_bias"], call["lower_bound"])
    if call.get("use_beta_sigmoid_in_kernel"):
        beta = beta.sigmoid() * (2 if call.get("allow_neg_eigval") else 1)
    want = fla["naive_recurrent_kda"](q, k, v, g, beta, call["scale"], call["initial_state"], True)
    with torch.no_grad():
        got = flash_kda.fused_recurrent_kda(**call, output_final_state=True)
    for x, y, bar in zip(got, want, BARS["cpu"]):
        assert error(x.double().numpy(), y.double().numpy()) <= bar + 1e-4  # fp32's own error


@pytest.mark.parametrize("case", ["everything fused", "softplus", "2 sigmoid"])
@pytest.mark.parametrize("T", [1, 8, 100])
def test_against_fla_s_kernel(cuda, fla, monkeypatch, case, T):
    monkeypatch.setenv("FLA_FLASH_KDA", "0")
    call = call_of(case, cuda, rows=(T, T), H=2, HV=4, seed=3)
    with torch.inference_mode():
        theirs = fla["fused_recurrent_kda"](**call, output_final_state=True)
        ours = flash_kda.fused_recurrent_kda(**call, output_final_state=True)
    for x, y in zip(ours, theirs):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert error(x.double().cpu().numpy(), y.double().cpu().numpy()) <= 2e-2


@pytest.mark.parametrize("case", ["everything fused", "without a state", "nothing fused, parameters given"])
@pytest.mark.parametrize("shape", ["one token", "17 tokens", "sequences of unknown length"])
def test_compiled(device, case, shape):
    torch.compiler.reset()
    call = call_of(case, device, **SHAPES[shape][0], seed=4)
    function = torch.compile(flash_kda.fused_recurrent_kda, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        hold(function(**call, output_final_state=True), truth_of(call), device)


def test_lengths_in_cpu_memory(device, used):
    """cu_seqlens_cpu says that every sequence is short."""
    call = call_of("everything fused", device, lengths=(16, 16, 3, 0), seed=5)
    with torch.no_grad():
        got = flash_kda.fused_recurrent_kda(
            **call, output_final_state=True, cu_seqlens_cpu=call["cu_seqlens"].cpu()
        )
    hold(got, truth_of(call), device)
    assert used == ["decode"]


@pytest.mark.parametrize("T", [2, 20])
def test_a_state_in_bf16(T):
    """It is converted to fp32, and so is the final state."""
    call = call_of("everything fused", rows=(T, T), seed=6)
    call["initial_state"] = call["initial_state"].bfloat16()
    with torch.no_grad():
        out, state = flash_kda.fused_recurrent_kda(**call, output_final_state=True)
        assert torch.equal(flash_kda.fused_recurrent_kda(**call)[0], out)
    hold((out, state), truth_of(call))
    assert state.dtype == torch.float32


def test_an_older_name_of_state_v_first():
    call = call_of("everything fused", rows=(2,), seed=7)
    want = flash_kda.fused_recurrent_kda(**call, output_final_state=True, state_v_first=True)
    with pytest.warns(
        DeprecationWarning, match="transpose_state_layout is now called state_v_first"
    ) as warned:
        got = flash_kda.fused_recurrent_kda(**call, output_final_state=True, transpose_state_layout=True)
    assert all(map(torch.equal, got, want))
    assert warned[0].filename == __file__


@pytest.mark.parametrize("T", [2, 20])
def test_a_gradient_is_refused(T):
    for name in ("q", "g", "A_log", "initial_state"):
        call = call_of("everything fused", rows=(T,), seed=8)
        call[name] = call[name].clone().requires_grad_()
        with pytest.raises(RuntimeError, match="computes no gradients"):
            flash_kda.fused_recurrent_kda(**call, output_final_state=True)
        with torch.no_grad():
            flash_kda.fused_recurrent_kda(**call)


@pytest.mark.parametrize(
    ("change", "exception", "sentence"),
    [
        ({"q": None}, TypeError, "q is of type NoneType; it must be a PyTorch tensor"),
        ({"v": np.zeros((1, 8, 2, 128))}, TypeError, "v is of type ndarray; it must be a PyTorch tensor"),
        ({"q": lambda x: x.float()}, TypeError, "q has dtype float32; it must be bfloat16"),
        ({"k": lambda x: x[:, :3]}, ValueError, "k has shape [1, 3, 1, 128]; it must be"),
        ({"v": lambda x: x[0]}, ValueError, "v has 3 dimensions; it must have 4"),
        ({"q": lambda x: x[0]}, ValueError, "q has 3 dimensions; it must have 4"),
        ({"lower_bound": -6.0}, ValueError, "lower_bound is -6; it must be in [-5, 0]"),
        ({"lower_bound": None, "A_log": None}, ValueError, "A_log is None and lower_bound is None"),
        (
            {"allow_neg_eigval": True, "use_beta_sigmoid_in_kernel": False},
            ValueError,
            "allow_neg_eigval is True and",
        ),
        (
            {"initial_state": lambda x: x.half()},
            TypeError,
            "initial_state is of torch.float16; it must be a tensor",
        ),
        ({"initial_state": 3}, TypeError, "initial_state is of int; it must be a tensor"),
        (
            {"initial_state": lambda x: torch.cat([x, x])},
            ValueError,
            "initial_state has shape [2, 2, 128, 128]; it must be [N, HV, K, V] = [1, 2, 128, 128]",
        ),
        (
            {"state_v_first": True, "transpose_state_layout": True},
            ValueError,
            "transpose_state_layout is given with",
        ),
        (
            {"no_such_thing": 1},
            TypeError,
            "fused_recurrent_kda() got an unexpected keyword argument 'no_such_thing'",
        ),
    ],
)
@pytest.mark.parametrize("T", [8, 20])
def test_wrong_arguments(change, exception, sentence, T):
    call = call_of("everything fused", rows=(T,), seed=9)
    for name, x in change.items():
        call[name] = x(call[name]) if callable(x) else x
    with pytest.raises(exception) as raised, torch.no_grad():
        flash_kda.fused_recurrent_kda(**call)
    assert sentence in str(raised.value)


# As a backend of FLA.


@pytest.mark.parametrize("T", [1, 30])
def test_fla_hands_its_calls_over(device, fla, used, monkeypatch, T):
    for name in ("FLA_FLASH_KDA", "FLA_DISABLE_BACKEND_DISPATCH"):
        monkeypatch.delenv(name, raising=False)
    call = call_of("softplus", device, rows=(T, T), seed=10)
    with torch.inference_mode():
        got = fla["fused_recurrent_kda"](**call, output_final_state=True)
    if not used:
        pytest.skip("this release of FLA has no place for another backend")
    hold(got, truth_of(call), device)
    assert used == ["decode" if T <= 16 else "fwd"]


def test_what_fla_keeps():
    """Pools of states, a state in place, a given output, and what fwd does not take."""
    from flash_kda import _fla

    call = {**call_of("softplus", rows=(2, 2), seed=11), "inplace_final_state": False}
    with torch.no_grad():
        assert _fla.why_not_recurrent(call) == ""
        for change in (
            {"inplace_final_state": True},
            {"ssm_state_indices": torch.zeros(2)},
            {"num_accepted_tokens": torch.zeros(2)},
            {"out": call["v"]},
            {"lower_bound": -6.0},
            {"q": call["q"].half()},
            {"beta": call["beta"][..., None].expand(call["v"].shape)},
        ):
            assert _fla.why_not_recurrent({**call, **change}), change
    call["q"].requires_grad_()
    assert "requires a gradient" in _fla.why_not_recurrent(call)
