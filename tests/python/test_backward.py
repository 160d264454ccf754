"""bwd and bwd_reference: against autograd of a plain recurrence in fp64, finite differences, arrays of all
libraries, the operator, errors."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from problems import BETAS, GATES, make_any, to_numpy, to_torch

torch = pytest.importorskip("torch")

from training_problems import INPUTS, error, gradients, in_fp64, make_call, recurrence, upstream  # noqa: E402

NAMES = flash_kda.Gradients._fields
ARGUMENTS = ("q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias", "lower_bound", "initial_state")
OPTIONS = (
    "use_gate_in_kernel",
    "use_qk_l2norm_in_kernel",
    "use_beta_sigmoid_in_kernel",
    "allow_neg_eigval",
    "state_v_first",
)
BARS = {"float32": 1e-3, "bfloat16": 3.5e-3}


def reference_of(call, dout=None, dstate=None):
    return flash_kda.bwd_reference(
        *(call[n] for n in ARGUMENTS), call["cu_seqlens"], dout=dout, dfinal_state=dstate,
        **{n: call[n] for n in OPTIONS},
    )  # fmt: skip


def hold_reference(call, seed=0, bar=1e-12):
    dout, dstate = upstream(call, seed)
    want = gradients(call, dout, dstate)
    got = reference_of(call, dout, dstate)
    for name, source in zip(NAMES, INPUTS):
        x = getattr(got, name)
        if want[source] is None and name != "dinitial_state":
            assert x is None
        elif want[source] is not None:
            assert x.dtype == torch.float64
            assert error(x, want[source].reshape(x.shape)) <= bar, name


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("beta", BETAS)
def test_reference_against_autograd(gate, beta):
    hold_reference(make_call((17, 0, 12), gate=gate, beta=beta, wide=True, seed=1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k_first": True},
        {"normalised": True},
        {"H": 1, "HV": 3},
        {"H": 2, "HV": 2, "lengths": (9,), "rows": 3},
        {"state": bfloat16},
        {"integers": np.int32},
    ],
    ids=str,
)
def test_reference_of_other_calls_against_autograd(options):
    hold_reference(make_call(**{"lengths": (17, 0, 12), "seed": 2, **options}))


def test_reference_without_states():
    call = make_call((20,), seed=3)
    call["initial_state"] = None
    hold_reference(call)
    zeros = {**call, "initial_state": torch.zeros(1, 2, 128, 128)}
    dout, dstate = upstream(call)
    a, b = reference_of(call, dout, dstate), reference_of(zeros, dout, dstate)
    assert torch.equal(a.dinitial_state, b.dinitial_state)


@pytest.mark.parametrize("name", INPUTS)
def test_reference_against_finite_differences(name):
    """Of flash_kda.reference, along a random direction. The input's dtype holds the steps without rounding,
    and two of them give an error of the fourth order."""
    call = make_call((12, 7), gate="bounded", wide=True, seed=4)
    step = 2.0**-8
    rng = torch.Generator().manual_seed(1)
    x = call[name]
    grid = (x.float() / x.float().abs().max() / step * 0.4).round() * step  # below 1/2: 8 bits hold steps
    call[name] = grid.to(x.dtype)
    direction = torch.randint(0, 2, x.shape, generator=rng).double() * 2 - 1
    dout, dstate = upstream(call)

    def loss(steps):
        moved = (call[name].double() + steps * step * direction).to(x.dtype)
        assert torch.equal(moved.double(), call[name].double() + steps * step * direction)
        given = {**call, name: moved}
        out, state = flash_kda.reference(
            *(given[n] for n in ARGUMENTS), call["cu_seqlens"], **{n: call[n] for n in OPTIONS}
        )
        return float((out * dout.double()).sum() + (state * dstate.double()).sum())

    one, two = (loss(1) - loss(-1)) / (2 * step), (loss(2) - loss(-2)) / (4 * step)
    found = getattr(reference_of(call, dout, dstate), "d" + name)
    want = float((found.reshape(x.shape) * direction).sum())
    assert abs((4 * one - two) / 3 - want) <= 1e-4 * float(found.norm())


def test_plain_recurrence_by_gradcheck():
    """The plain recurrence is held to finite differences by PyTorch itself, and to flash_kda.reference."""
    call = in_fp64(make_call((6, 4), wide=True, seed=5))
    leaves = [call[n].requires_grad_() for n in INPUTS]
    assert torch.autograd.gradcheck(
        lambda *x: recurrence({**call, **dict(zip(INPUTS, x))}), leaves, fast_mode=True
    )
    call = make_call((30, 0, 5), seed=6)
    want = flash_kda.reference(
        *(call[n] for n in ARGUMENTS), call["cu_seqlens"], **{n: call[n] for n in OPTIONS}
    )
    for x, y in zip(recurrence(in_fp64(call)), want):
        assert error(x, y) <= 1e-13


# bwd itself.


def problem(lengths=(33, 0, 60), seed=0, wide=False, **options):
    """The arguments of bwd in NumPy. What it will write holds NaN."""
    a = make_any(lengths=lengths, seed=seed, wide=wide, **options)
    rng = np.random.default_rng(seed)
    for name in ("out", "final_state"):
        a.pop(name)
    shape, state = a["v"].shape, a["initial_state"].shape
    a["dout"] = rng.standard_normal(shape, dtype=np.float32).astype(bfloat16)
    a["dfinal_state"] = rng.standard_normal(state, dtype=np.float32)
    for name, source in zip(NAMES, INPUTS):
        if a[source] is not None:
            dtype = np.float32 if source == "initial_state" else a[source].dtype
            a[name] = np.full(a[source].shape, np.nan, dtype)
    return a


def truth(a):
    written = (*NAMES, "saved", "workspace", "kernel", "threads")
    return flash_kda.bwd_reference(**{n: x for n, x in a.items() if n not in written})


def hold(a, expected):
    for name in NAMES:
        if a.get(name) is None:
            continue
        got, want = a[name].astype(np.float64), np.asarray(getattr(expected, name))
        assert np.isfinite(got).all(), name
        norm = np.sqrt((want**2).sum())
        assert np.sqrt(((got - want.reshape(got.shape)) ** 2).sum()) <= BARS[a[name].dtype.name] * norm, name


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("wide", [False, True])
def test_numpy(gate, wide):
    a = problem(gate=gate, wide=wide)
    assert flash_kda.bwd(**a) is None
    hold(a, truth(a))


def test_gradients_that_are_not_wanted():
    a = problem()
    expected = truth(a)
    for wanted in NAMES:
        part = {n: x.copy() if n == wanted else x for n, x in a.items() if n not in NAMES or n == wanted}
        flash_kda.bwd(**part)
        hold(part, expected)
    for missing in ("dout", "dfinal_state"):
        part = {n: x.copy() if n in NAMES else x for n, x in a.items() if n != missing}
        flash_kda.bwd(**part)
        hold(part, truth(part))


def test_torch_tensors():
    a = problem(k_first=True, beta="twice")
    tensors = to_torch(a, "cpu")
    flash_kda.bwd(**tensors)
    hold(to_numpy(tensors), truth(a))
    # The same tensors again, and as they may lie in a layer.
    other = to_torch(a, "cpu")
    for name in ("dout", "dq", "dv", "dbeta"):
        other[name] = torch.stack([other[name], other[name]], -1)[..., 0]
    flash_kda.bwd(**other)
    for name in NAMES:
        assert torch.equal(other[name], tensors[name])


class Dlpack:
    """An array of a library that speaks DLPack alone."""

    def __init__(self, array):
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


def test_dlpack():
    a = problem(wide=True)
    tensors = to_torch(a, "cpu")
    flash_kda.bwd(**{n: Dlpack(x) if isinstance(x, torch.Tensor) else x for n, x in tensors.items()})
    hold(to_numpy(tensors), truth(a))


def aligned(size_bytes):
    memory = np.zeros(size_bytes + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size_bytes]


@pytest.mark.parametrize("lengths", [(700,), (300, 0, 500)])
def test_saved(lengths):
    """Gradients have the same bits with and without what the forward pass has saved."""
    a = problem(lengths, HV=2)
    size = flash_kda.get_saved_size(sum(lengths), 1, len(lengths), HV=2, device="cpu")
    tokens = sum(lengths)
    assert 0 < size <= 2 * 128 * tokens * (2 * 1 + 2 * 2) / 5
    saved = aligned(size)
    results = {"out": np.empty_like(a["v"]), "final_state": np.empty_like(a["initial_state"])}
    plain = {n: x.copy() for n, x in results.items()}
    forward = {n: x for n, x in a.items() if n not in (*NAMES, "dout", "dfinal_state")}
    flash_kda.fwd(**forward, **results, saved=saved)
    flash_kda.fwd(**forward, **plain)
    assert all(results[n].tobytes() == plain[n].tobytes() for n in plain)
    assert saved.any()
    flash_kda.bwd(**a)
    again = {n: x.copy() if n in NAMES else x for n, x in a.items()}
    flash_kda.bwd(**again, saved=saved)
    for name in NAMES:
        assert again[name].tobytes() == a[name].tobytes()
    hold(a, truth(a))


@pytest.mark.parametrize("options", [{"batch_invariant": True}, {"workspace_limit": 1}])
def test_options_of_the_workspace(options):
    """On the CPU they change nothing; test_backward.c has the workspaces of GPUs."""
    a = problem()
    flash_kda.bwd(**a)
    again = {n: x.copy() if n in NAMES else x for n, x in a.items()}
    flash_kda.bwd(**again, **options)
    assert all(again[name].tobytes() == a[name].tobytes() for name in NAMES)


def test_saved_size():
    size = flash_kda.get_saved_size
    assert size(320, 4, device="cpu") == 0
    assert size(321, 4, device="cpu") == 4 * 65536
    assert size(8192, 96, device="cpu") <= 8192 * 96 * 4 * 256 / 5
    assert size(641, 2, HV=4, kernel="cpu") == size(641, 2, HV=4, device="cpu")
    with pytest.raises(ValueError, match="H is 0; it must be at least 1"):
        size(10, 0)
    with pytest.raises(TypeError, match="T_total is of type str"):
        size("10", 1)


def test_schema_of_the_operator():
    """Programs that were exported hold names and positions."""
    written = ", ".join(f"Tensor({mark}!)? {name}=None" for mark, name in zip("abcdefgh", NAMES))
    assert str(torch.ops.flash_kda.bwd.default._schema) == (
        "flash_kda::bwd(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor? A_log, "
        "Tensor? dt_bias, float? lower_bound, Tensor? initial_state=None, Tensor? cu_seqlens=None, "
        f"Tensor? dout=None, Tensor? dfinal_state=None, {written}, Tensor? saved=None, "
        "Tensor(i!)? workspace=None, str? kernel_name=None, int threads=0, SymInt max_seqlen=0, "
        "bool use_gate_in_kernel=True, bool use_qk_l2norm_in_kernel=True, "
        "bool use_beta_sigmoid_in_kernel=True, bool allow_neg_eigval=False, bool state_v_first=True, "
        "bool batch_invariant=False, int workspace_limit=0) -> ()"
    )


def test_opcheck():
    tensors = to_torch(problem(), "cpu")
    torch.library.opcheck(torch.ops.flash_kda.bwd.default, (), tensors)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend):
    a = problem(gate="softplus")
    tensors = to_torch(a, "cpu")
    torch.compiler.reset()
    torch.compile(lambda **t: flash_kda.bwd(**t), fullgraph=True, backend=backend)(**tensors)
    hold(to_numpy(tensors), truth(a))


def without(*names):
    return dict.fromkeys(names)


@pytest.mark.parametrize(
    ("change", "exception", "sentence"),
    [
        (without(*NAMES), ValueError, "are all None; at least one gradient must be given"),
        ({"q": None}, TypeError, "q is of type"),
        ({"dout": np.zeros((1, 93, 2, 128), np.float32)}, TypeError, "dout has dtype float32; it must be bf"),
        ({"dout": np.zeros((1, 92, 2, 128), bfloat16)}, ValueError, "dout has shape [1, 92, 2, 128]; it"),
        ({"dg": np.zeros((1, 93, 2, 128), np.float32)}, TypeError, "dg has dtype float32; it must be bf"),
        ({"dA_log": np.zeros(3, np.float32)}, ValueError, "dA_log has shape [3]; it must have HV = 2"),
        ({"A_log": None}, ValueError, "dA_log is given without A_log; it must be None"),
        ({"saved": np.zeros(3, np.float32)}, TypeError, "saved has dtype float32; it must be uint8"),
        ({"lengths": 1}, TypeError, "unexpected keyword argument 'lengths'"),
        ({"threads": -1}, ValueError, "threads is -1; it must be 0"),
        ({"kernel": "no such"}, ValueError, "no such"),
        ({"batch_invariant": 1}, TypeError, "batch_invariant is of type int; it must be True or False"),
        ({"workspace_limit": 0.5}, TypeError, "workspace_limit is of type float; it must be an int"),
        ({"lower_bound": -6.0}, ValueError, "lower_bound is -6; it must be in [-5, 0]"),
        ({"use_gate_in_kernel": False}, ValueError, "A_log is given and use_gate_in_kernel is False"),
    ],
)  # fmt: skip
def test_wrong_arguments(change, exception, sentence):
    a = {**problem(), **change}
    with pytest.raises(exception) as raised:
        flash_kda.bwd(**a)
    assert sentence in str(raised.value)
    assert all(a.get(n) is None or n in change or np.isnan(a[n].astype(np.float32)).all() for n in NAMES)


def test_what_is_written_shares_no_memory():
    a = problem()
    with pytest.raises(ValueError, match=r"dq .*overlap|overlap.* dq"):
        flash_kda.bwd(**{**a, "dk": a["dq"]})


def test_what_is_written_is_writable():
    a = problem()
    a["dv"].flags.writeable = False
    with pytest.raises(ValueError, match="dv is read-only; it must be writable"):
        flash_kda.bwd(**a)


def test_wrong_arguments_of_the_reference():
    a = problem()
    part = {n: x for n, x in a.items() if n not in NAMES}
    with pytest.raises(TypeError, match="unexpected keyword argument 'out'"):
        flash_kda.bwd_reference(**part, out=1)
    with pytest.raises(ValueError, match=r"k has shape \[1, 92, 1, 128\]; it must be"):
        flash_kda.bwd_reference(**{**part, "k": part["k"][:, 1:]})


def test_gradients_of_gradients_are_refused():
    tensors = to_torch(problem(), "cpu")
    tensors["dout"].requires_grad_()
    with pytest.raises(RuntimeError, match="computes no gradients"):
        flash_kda.bwd(**tensors)
