"""Gates, betas, q and k that are normalised already, and grouped value heads."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from problems import BARS, BETAS, GATES, error, hold_any, make_any, run_any, truth_of_any

MODES = [("numpy", "eager"), ("torch", "eager"), ("torch", "aot_eager")]


def recurrence(a):
    """The definition, written a second time: out and the state of the last sequence, for one sequence."""
    T, HV = a["v"].shape[1:3]
    group = HV // a["q"].shape[2]
    f = {n: a[n].astype(np.float64) for n in ("q", "k", "v", "g", "beta")}
    outs, states = np.zeros((1, T, HV, 128)), []
    for h in range(HV):
        S = a["initial_state"][0, h].astype(np.float64)
        S = S.copy() if a.get("state_v_first") is False else S.T.copy()
        rate = np.exp(np.float64(a["A_log"][h])) if a["A_log"] is not None else 1.0
        bias = a["dt_bias"][h].astype(np.float64) if a["dt_bias"] is not None else 0.0
        for t in range(T):
            q, k = (f[n][0, t, h // group] for n in ("q", "k"))
            v, g, b = f["v"][0, t, h], f["g"][0, t, h], f["beta"][0, t, h]
            if a.get("use_qk_l2norm_in_kernel", True):
                q, k = (x / np.sqrt((x * x).sum() + 1e-6) for x in (q, k))
            if not a.get("use_gate_in_kernel", True):
                decay = g
            elif a["lower_bound"] is None:
                decay = -rate * np.logaddexp(0, g + bias)
            else:
                decay = a["lower_bound"] / (1 + np.exp(-rate * (g + bias)))
            if a.get("use_beta_sigmoid_in_kernel", True):
                b = (2 if a.get("allow_neg_eigval") else 1) / (1 + np.exp(-b))
            S *= np.exp(decay)[:, None]
            S += np.outer(k, b * (v - S.T @ k))
            outs[0, t, h] = a["scale"] * S.T @ q
        states.append(S if a.get("state_v_first") is False else S.T)
    return outs, np.array(states)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("beta", BETAS)
def test_the_reference_is_the_recurrence(gate, beta):
    for seed, k_first in enumerate((False, True)):
        a = make_any([9], H=1, HV=2, gate=gate, beta=beta, normalised=k_first, k_first=k_first, seed=seed)
        given = {n: x for n, x in a.items() if n not in ("out", "final_state")}
        out, state = flash_kda.reference(**given)
        want_out, want_state = recurrence(a)
        # The tolerance is fp32's, since scale and lower_bound are floats in C.
        np.testing.assert_allclose(out, want_out, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(state[0], want_state, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("library", "mode"), MODES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("wide", [False, True], ids=["bf16", "fp32"])
def test_gates(library, mode, gate, wide):
    if library == "torch":
        pytest.importorskip("torch")
    a = make_any(gate=gate, wide=wide, seed=1)
    hold_any(a, run_any(a, library, mode), truth_of_any(a))


@pytest.mark.parametrize(("library", "mode"), MODES)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("normalised", [False, True])
def test_betas(library, mode, beta, normalised):
    if library == "torch":
        pytest.importorskip("torch")
    a = make_any(beta=beta, normalised=normalised, wide=beta == "twice", seed=2)
    hold_any(a, run_any(a, library, mode), truth_of_any(a))


@pytest.mark.parametrize(("library", "mode"), MODES)
@pytest.mark.parametrize(("H", "HV"), [(1, 4), (2, 6), (3, 3)])
def test_grouped_heads(library, mode, H, HV):
    if library == "torch":
        pytest.importorskip("torch")
    a = make_any(lengths=(17, 33), H=H, HV=HV, seed=3)
    after = run_any(a, library, mode)
    hold_any(a, after, truth_of_any(a))
    wide = {n: np.repeat(a[n], HV // H, axis=2) for n in ("q", "k")}
    assert run_any({**a, **wide})["out"].tobytes() == after["out"].tobytes()


def test_a_gpu_takes_them(cuda):
    for seed, gate in enumerate(GATES):
        a = make_any(gate=gate, beta=BETAS[seed % 3], wide=seed % 2 == 0, normalised=seed == 3, seed=seed)
        hold_any(a, run_any(a, "torch", device=cuda), truth_of_any(a), "cuda")


@pytest.mark.parametrize("gate", ["softplus", "activated"])
def test_gates_without_a_bound(gate):
    """Tokens that forget 300 nats among tokens that forget next to nothing."""
    a = make_any(lengths=(200,), gate=gate, wide=True, seed=4)
    rng = np.random.default_rng(4)
    strong = rng.random(a["g"].shape) < 0.02
    if gate == "activated":
        a["g"] = np.where(strong, -300, -1e-6).astype(np.float32)
    else:
        a["A_log"][:], a["dt_bias"][:] = 0, 0
        a["g"] = np.where(strong, 300, -14).astype(np.float32)
    hold_any(a, run_any(a), truth_of_any(a))


@pytest.mark.parametrize("shape", [(2,), (1, 2, 1), (2, 1, 1, 1)])
def test_parameters_of_any_shape(shape):
    a = make_any(lengths=(20,), seed=5)
    plain = run_any(a)
    for dt_bias in ((256,), (4, 64), (1, 1, 2, 128)):
        other = {**a, "A_log": a["A_log"].reshape(shape), "dt_bias": a["dt_bias"].reshape(dt_bias)}
        assert run_any(other)["out"].tobytes() == plain["out"].tobytes()


@pytest.mark.parametrize(
    ("gate", "change", "exception", "sentence"),
    [
        (
            "bounded",
            {"allow_neg_eigval": True, "use_beta_sigmoid_in_kernel": False},
            ValueError,
            "allow_neg_eigval is True and use_beta_sigmoid_in_kernel is False; ",
        ),
        (
            "softplus",
            {"A_log": None},
            ValueError,
            "A_log is None and lower_bound is None; A_log must be given",
        ),
        (
            "bounded",
            {"use_gate_in_kernel": False},
            ValueError,
            "A_log is given and use_gate_in_kernel is False; g is then the log decay itself, so A_log must",
        ),
        (
            "bounded",
            {"use_gate_in_kernel": False, "A_log": None},
            ValueError,
            "dt_bias is given and use_gate",
        ),
        ("bounded", {"lower_bound": -6}, ValueError, "lower_bound is -6; it must be in [-5, 0]"),
        (
            "bounded",
            {"lower_bound": "no"},
            TypeError,
            "lower_bound is of type str; it must be a number or None",
        ),
        (
            "bounded",
            {"use_gate_in_kernel": None},
            TypeError,
            "use_gate_in_kernel is of type NoneType; it must be True or False",
        ),
        (
            "bounded",
            {"state_v_first": 1},
            TypeError,
            "state_v_first is of type int; it must be True or False",
        ),
        ("bounded", {"allow_neg_eigval": 0}, TypeError, "allow_neg_eigval is of type int; it must be True"),
        ("bounded", {"g": "float64"}, TypeError, "g has dtype float64; it must be bfloat16 or float32"),
        ("bounded", {"beta": "float16"}, TypeError, "beta has dtype float16; it must be bfloat16 or float32"),
        ("bounded", {"A_log": "short"}, ValueError, "A_log has shape [1]; it must have HV = 2 elements"),
        (
            "bounded",
            {"v": "3 heads"},
            ValueError,
            "v has HV = 3 heads and q has H = 2; HV must be a multiple of H",
        ),
    ],
)
@pytest.mark.parametrize("library", ["numpy", "torch", "reference"])
def test_wrong_arguments(library, gate, change, exception, sentence):
    a = make_any(lengths=(20,), gate=gate, H=2 if change.get("v") else 1, seed=6)
    for name, x in change.items():
        if x == "short":
            x = a[name][:1]
        elif x == "3 heads":
            x = np.zeros((1, 20, 3, 128), bfloat16)
        elif name in ("g", "beta"):
            x = a[name].astype(x)
        a[name] = x
    if library == "torch":
        pytest.importorskip("torch")
        from problems import to_torch

        a = to_torch(a, "cpu")
    call, without = flash_kda.fwd, ()
    if library == "reference":
        call, without = flash_kda.reference, ("out", "final_state")
    with pytest.raises(exception) as raised:
        call(**{n: x for n, x in a.items() if n not in without})
    assert sentence in str(raised.value)
    assert bool((a["out"] != a["out"]).all()), "nothing was written"


def test_compute_takes_them():
    for gate in GATES:
        a = make_any(lengths=(20, 5), gate=gate, beta="twice", k_first=True, seed=7)
        given = {n: x for n, x in a.items() if n not in ("out", "final_state")}
        out, state = flash_kda.compute(**given, output_final_state=True)
        want_out, want_state = flash_kda.reference(**given)
        assert error(out, want_out) <= BARS["cpu"][0]
        assert error(state, want_state) <= BARS["cpu"][1]


def test_lower_bound_changes_nothing_of_an_activated_gate():
    a = make_any(lengths=(20,), gate="activated", seed=8)
    assert run_any(a)["out"].tobytes() == run_any({**a, "lower_bound": -7})["out"].tobytes()
