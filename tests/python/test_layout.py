"""Tensors of PyTorch as layers and engines hold them: slices, fp32, the gate's parameters in other shapes."""

import numpy as np
import pytest

import flash_kda
from problems import REFERENCE_ARGUMENTS, hold_to, make, to_numpy, to_torch, truth

torch = pytest.importorskip("torch")

WRITTEN = ("out", "final_state")


def inside(x):
    """A slice, with the values of x, of a larger tensor whose other elements are NaN."""
    larger = x.new_full([size + 8 for size in x.shape], float("nan"))
    view = larger[tuple(slice(0, size) for size in x.shape)]
    view.copy_(x)
    return view


def turned(x):
    """x with its first two dimensions, or its only one, in another order of memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 else torch.stack([x, x], 1)[:, 0]


def packed(tensors):
    """q, k and v as slices of one buffer [B, T, 3 H K], as a convolution gives them, and beta as a slice of a
    projection."""
    B, T, H, K = tensors["q"].shape
    buffer = torch.cat([tensors[name].reshape(B, T, H * K) for name in ("q", "k", "v")], -1)
    q, k, v = (part.reshape(B, T, H, K) for part in buffer.split(H * K, -1))
    assert not q.is_contiguous()
    wide = torch.cat([tensors["beta"], tensors["beta"]], -1)
    return {**tensors, "q": q, "k": k, "v": v, "beta": wide[..., :H]}


CHANGES = {
    "one buffer": packed,
    "slices": lambda t: {n: inside(x) if isinstance(x, torch.Tensor) and n != "cu_seqlens" else x
                         for n, x in t.items()},
    "turned": lambda t: {n: turned(x) if isinstance(x, torch.Tensor) else x for n, x in t.items()},
    "heads first": lambda t: {**t, **{n: t[n].transpose(1, 2).contiguous().transpose(1, 2)
                                      for n in ("q", "k", "v", "g", "out")}},
    "fp32 beta and g": lambda t: {**t, "beta": t["beta"].float(), "g": t["g"].float()},
    "A_log of a layer": lambda t: {**t, "A_log": t["A_log"].reshape(1, 1, -1, 1)},
    "flat dt_bias": lambda t: {**t, "dt_bias": t["dt_bias"].reshape(-1)},
    "dt_bias with ones": lambda t: {**t, "dt_bias": t["dt_bias"][None, None]},
    "parameters in 16 bits": lambda t: {**t, "A_log": t["A_log"].bfloat16().reshape(1, 1, -1, 1),
                                        "dt_bias": t["dt_bias"].bfloat16().reshape(-1)},
    "everything": lambda t: {**packed(t), "beta": t["beta"].float(), "g": inside(t["g"].float()),
                             "A_log": t["A_log"].reshape(1, 1, -1, 1), "dt_bias": t["dt_bias"].reshape(-1)},
}  # fmt: skip
PROBLEMS = {
    "batch": {"T": 37, "B": 2, "H": 3, "initial": np.float32},
    "sequences": {"lengths": [5, 0, 40], "H": 2, "initial": np.float32},
    "one head": {"T": 20, "H": 1},
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("change", CHANGES)
def test_it_is_as_if_the_tensors_were_contiguous(device, change, problem):
    plain = to_torch(make(**PROBLEMS[problem]), device)
    tensors = CHANGES[change](plain)
    if change == "parameters in 16 bits":
        plain = {**plain, **{n: plain[n].bfloat16().float() for n in ("A_log", "dt_bias")}}
    expected = truth(to_numpy(plain))
    given = {n: x.clone() for n, x in tensors.items() if isinstance(x, torch.Tensor) and n not in WRITTEN}
    with torch.no_grad():
        assert flash_kda.fwd(**tensors) is None
        flash_kda.fwd(**plain)
    result = {n: x.contiguous() if isinstance(x, torch.Tensor) else x for n, x in tensors.items()}
    hold_to(to_numpy(result), expected, device)
    for name in WRITTEN:
        assert torch.equal(tensors[name], plain[name]), "the copies are what a contiguous tensor would be"
    for name, x in given.items():
        assert torch.equal(tensors[name].nan_to_num(), x.nan_to_num()), f"{name} was written"


@pytest.mark.parametrize("change", CHANGES)
def test_the_reference_takes_them_too(change):
    plain = to_torch(make(**PROBLEMS["batch"]), "cpu")
    tensors = CHANGES[change](plain)
    if change == "parameters in 16 bits":
        plain = {**plain, **{n: plain[n].bfloat16().float() for n in ("A_log", "dt_bias")}}
    want = flash_kda.reference(**{n: plain[n] for n in REFERENCE_ARGUMENTS if n in plain})
    got = flash_kda.reference(**{n: tensors[n] for n in REFERENCE_ARGUMENTS if n in tensors})
    assert all(map(torch.equal, got, want))


def test_memory_around_a_written_slice_stays(device):
    tensors = to_torch(make(T=20, initial=np.float32), device)
    around = {}
    for name in WRITTEN:
        around[name] = tensors[name].new_full([size + 2 for size in tensors[name].shape], 5.0)
        middle = tuple(slice(1, size + 1) for size in tensors[name].shape)
        tensors[name] = around[name][middle]
    flash_kda.fwd(**tensors)
    for name, x in around.items():
        assert not (tensors[name] == 5).all()
        tensors[name].fill_(5)
        assert (x == 5).all()


def test_a_state_is_updated_in_place(device):
    plain = to_torch(make(T=20, initial=np.float32), device)
    expected = truth(to_numpy(plain))
    state = inside(plain["initial_state"])
    flash_kda.fwd(**{**plain, "initial_state": state, "final_state": state})
    hold_to(to_numpy({**plain, "final_state": state.contiguous()}), expected, device)


def test_autograd_notices_what_was_written_through_a_copy(device):
    tensors = to_torch(make(T=4), device)
    tensors["out"] = inside(tensors["out"])
    loss = (torch.ones((), device=device, requires_grad=True) * tensors["out"]).sum()
    flash_kda.fwd(**tensors)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("name", "change", "exception", "sentence"),
    [
        ("out", lambda x: x[:, :1].expand_as(x), ValueError, "out has stride 0 in dimension 1; its elements"),
        ("final_state", lambda x: x[:, :1].expand_as(x), ValueError, "final_state has strides"),
        ("q", lambda x: x.float(), TypeError, "q has dtype float32; it must be bfloat16"),
        ("g", lambda x: x.double(), TypeError, "g has dtype float64; it must be bfloat16"),
        ("A_log", lambda x: x.repeat(2), ValueError, r"A_log has shape \[4\]; it must have HV = 2 elements"),
        ("A_log", lambda x: x.reshape(1, 1, 1, 1, 2).double(), TypeError, "A_log has dtype float64"),
        ("dt_bias", lambda x: x.reshape(-1)[1:], ValueError, r"dt_bias has shape \[255\]; it must have HV"),
        ("beta", lambda x: x.mT, ValueError, "beta has shape"),
    ],
)
def test_what_stays_wrong(device, name, change, exception, sentence):
    tensors = to_torch(make(T=6, initial=np.float32), device)
    tensors[name] = change(tensors[name])
    with pytest.raises(exception, match=sentence):
        flash_kda.fwd(**tensors)
    assert all(tensors[n].isnan().all() for n in WRITTEN)


def test_the_operator_takes_them():
    plain = to_torch(make(**PROBLEMS["batch"]), "cpu")
    tensors = CHANGES["everything"](plain)
    tensors["out"] = inside(tensors["out"])
    call = torch.compile(flash_kda.fwd, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        call(**tensors)
        flash_kda.fwd(**plain)
    assert torch.equal(tensors["out"], plain["out"])
    assert torch.equal(tensors["final_state"], plain["final_state"])
