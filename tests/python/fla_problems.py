"""Calls of flash-linear-attention's functions chunk_kda and fused_recurrent_kda for tests of ours, the right
results for them, and what both must refuse."""

import numpy as np
import pytest

import flash_kda
from problems import BARS, error, make_any, to_torch

torch = pytest.importorskip("torch")

FUSED = {"use_gate_in_kernel": True, "use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
ARGUMENTS = (
    "q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias", "lower_bound", "initial_state", "cu_seqlens",
)  # fmt: skip
ACTIVATED = {"q": "normalised", "beta": "activated", "g": "activated"}
# What a call asks for. q, g and beta say how these tensors come; all else are arguments.
CALLS = {
    "everything fused": FUSED,
    "everything fused, V first": {**FUSED, "state_v_first": True},
    "softplus": {**FUSED, "lower_bound": None},
    "2 sigmoid": {**FUSED, "allow_neg_eigval": True},
    "without A_log": {**FUSED, "A_log": None},
    "without dt_bias": {**FUSED, "dt_bias": None, "lower_bound": None},
    "no scale": {**FUSED, "scale": None},
    "without a state": {**FUSED, "initial_state": None},
    "gate alone": {"use_gate_in_kernel": True, "beta": "activated", "q": "normalised"},
    "nothing fused, parameters given": {**ACTIVATED, "A_log": True},
}


def make_call(asks, device="cpu", rows=None, **options):
    """The arguments of a call that asks for a value of CALLS. rows: batch rows of that many tokens each,
    instead of packed sequences."""
    change = dict(asks)
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
    """What the call must return, in fp64."""
    with_gate = call.get("use_gate_in_kernel", False)
    scale = call["scale"] if call.get("scale") is not None else 128**-0.5
    parameters = [call.get(n) if with_gate else None for n in ("A_log", "dt_bias", "lower_bound")]
    more = {n: call.get(n, False) for n in (*FUSED, "allow_neg_eigval", "state_v_first")}
    return flash_kda.reference(
        *(call[n] for n in ("q", "k", "v", "g", "beta")), scale, *parameters, call.get("initial_state"),
        call.get("cu_seqlens"), **more,
    )  # fmt: skip


def hold(got, want, device="cpu", more=0):
    """Asserts that results are within the bars. more: what is added to the bars."""
    for x, y, bar in zip(got, want, BARS[device]):
        assert error(x.detach().double().cpu().numpy(), y.double().numpy()) <= bar + more


def hold_to_fla_s_plain_recurrence(function, fla, call):
    """Asserts that our function agrees with FLA's recurrence, which is in fp32, takes gates and betas that
    are activated, and knows batch rows alone."""
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
        hold(function(**call, output_final_state=True), want, more=1e-4)  # fp32's own error


def hold_to_fla_s_kernel(name, fla, monkeypatch, call, **more):
    """Asserts that our function of that name agrees with FLA's, whose kernels need a GPU."""
    monkeypatch.setenv("FLA_FLASH_KDA", "0")
    with torch.inference_mode():
        theirs = fla[name](**call, output_final_state=True, **more)
        ours = getattr(flash_kda, name)(**call, output_final_state=True, **more)
    for x, y in zip(ours, theirs):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert error(x.double().cpu().numpy(), y.double().cpu().numpy()) <= 2e-2
    return ours


# What both functions refuse of a call with everything fused: arguments, or functions that change them; the
# exception; and a part of its sentence.
WRONG = [
    ({"q": None}, TypeError, "q is of type NoneType; it must be a PyTorch tensor"),
    ({"v": np.zeros((1, 8, 2, 128))}, TypeError, "v is of type ndarray; it must be a PyTorch tensor"),
    ({"q": lambda x: x.float()}, TypeError, "q has dtype float32; it must be bfloat16"),
    ({"k": lambda x: x[:, :3]}, ValueError, "k has shape [1, 3, 1, 128]; it must be"),
    ({"v": lambda x: x[0]}, ValueError, "v has 3 dimensions; it must have 4"),
    ({"lower_bound": -6.0}, ValueError, "lower_bound is -6; it must be in [-5, 0]"),
    (
        {"lower_bound": None, "A_log": None},
        ValueError,
        "A_log is None and lower_bound is None; A_log must be given",
    ),
    (
        {"allow_neg_eigval": True, "use_beta_sigmoid_in_kernel": False},
        ValueError,
        "allow_neg_eigval is True and",
    ),
    (
        {"state_v_first": True, "transpose_state_layout": True},
        ValueError,
        "transpose_state_layout is given with",
    ),
    ({"no_such_thing": 1}, TypeError, "kda() got an unexpected keyword argument 'no_such_thing'"),
]


def hold_refusal(function, call, change, exception, sentence):
    """Asserts that the function refuses the changed call, with a sentence that has this part."""
    for name, x in change.items():
        call[name] = x(call[name]) if callable(x) else x
    with pytest.raises(exception) as raised, torch.no_grad():
        function(**call)
    assert sentence in str(raised.value)
