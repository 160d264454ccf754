"""States in a pool: state_indices, first_slot, has_initial_state."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from problems import BARS, copied, error, hold_any, make_any, run_any, to_numpy, to_torch, truth_of_any

MODES = [("numpy", "eager"), ("torch", "eager"), ("torch", "aot_eager")]


@pytest.fixture(params=MODES, ids=" ".join)
def way(request):
    if request.param[0] == "torch":
        pytest.importorskip("torch")
    return request.param


@pytest.mark.parametrize("state", [np.float32, bfloat16])
@pytest.mark.parametrize("integers", [np.int32, np.int64])
@pytest.mark.parametrize("flags", [False, True])
def test_pool(way, state, integers, flags):
    a = make_any(pool=True, state=state, integers=integers, flags=flags, seed=1)
    hold_any(a, run_any(a, *way), truth_of_any(a))


@pytest.mark.parametrize("k_first", [False, True])
def test_in_place(way, k_first):
    """One pool is both states, and other slots stay as they are."""
    a = make_any(pool=True, flags=True, k_first=k_first, seed=2)
    expected = truth_of_any(a)
    a["initial_state"] = a["final_state"]
    before = copied(a)
    after = run_any(a, *way)
    before.pop("initial_state"), after.pop("initial_state")
    hold_any(before, after, expected)


def test_has_initial_state_without_a_pool(way):
    a = make_any(flags=True, seed=3)
    assert a["has_initial_state"].any()
    assert not a["has_initial_state"].all()
    hold_any(a, run_any(a, *way), truth_of_any(a))


def test_only_one_of_both_states(way):
    for name in ("initial_state", "final_state"):
        a = make_any(pool=True, seed=4)
        expected = truth_of_any(a if name == "final_state" else {**a, "initial_state": None})
        a[name] = None
        after = run_any(a, *way)
        if name == "initial_state":
            hold_any(a, after, expected)
        else:
            assert error(after["out"], expected["out"]) <= BARS["cpu"][0]


def test_slots_that_share_pages():
    """A slot is part of a page: the stride between slots is larger than a state."""
    torch = pytest.importorskip("torch")
    a = make_any(pool=True, seed=5)
    a["initial_state"] = a["final_state"]
    plain = run_any(a)
    tensors = to_torch(a, "cpu")
    pages = torch.full((len(a["final_state"]), 2 * 128 * 128 + 96), 7.0)
    pool = torch.as_strided(pages, (len(pages), 2, 128, 128), (pages.shape[1], 128 * 128, 128, 1), 64)
    pool.copy_(tensors["final_state"])
    tensors["initial_state"] = tensors["final_state"] = pool
    with torch.no_grad():
        for _ in range(2):  # the second call has a prepared call that fits
            pool.copy_(torch.from_numpy(a["final_state"]))
            flash_kda.fwd(**tensors)
            assert pool.numpy().tobytes() == plain["final_state"].tobytes()
            assert (pages[:, :64] == 7).all()
            assert (pages[:, 64 + 2 * 128 * 128 :] == 7).all()


def test_other_contents_of_one_prepared_call():
    torch = pytest.importorskip("torch")
    a = make_any(pool=True, flags=True, seed=6)
    tensors = to_torch(a, "cpu")
    rng = np.random.default_rng(6)
    with torch.no_grad():
        for _ in range(4):
            a["state_indices"] = rng.permutation(7)[:4] - 1
            a["has_initial_state"] = rng.integers(0, 2, 4).astype(bool)
            for name in ("state_indices", "has_initial_state", "final_state"):
                tensors[name].copy_(torch.from_numpy(a[name]))
            flash_kda.fwd(**tensors)
            hold_any(a, to_numpy(tensors), truth_of_any(a))


@pytest.mark.parametrize("guards", ["PyTorch's guards", "guards in Python"])
def test_a_state_that_is_updated_in_place_finds_its_prepared_call(guards, monkeypatch):
    """One tensor is both states. Two tensors that look like it are another call."""
    torch = pytest.importorskip("torch")
    from flash_kda import _call, _torch

    if guards == "guards in Python":
        monkeypatch.setattr(_torch, "_Guards", _torch._PythonGuards)
    monkeypatch.setattr(_torch, "_calls", _call.PreparedCalls())
    a = make_any(pool=True, seed=11)
    expected = truth_of_any(a)
    tensors = to_torch(a, "cpu")
    pool = tensors["initial_state"]
    with torch.no_grad():
        for apart in (False, True, False):
            pool.copy_(torch.from_numpy(a["initial_state"]))
            tensors["final_state"] = pool.clone() if apart else pool
            flash_kda.fwd(**tensors)
            names = _torch._calls.latest.options.names
            assert _torch._calls.latest.fits(*(tensors[name] for name in names))
            hold_any({"final_state": a["final_state"]}, to_numpy(tensors), expected)
            other = pool if apart else pool.clone()
            assert guards != "PyTorch's guards" or not _torch._calls.latest.fits(
                *(other if name == "final_state" else tensors[name] for name in names)
            )


def test_arrays_of_other_libraries():
    from test_dlpack import wrap

    a = make_any(pool=True, flags=True, seed=7)
    after = copied(a)
    flash_kda.fwd(**wrap(after))
    hold_any(a, after, truth_of_any(a))


def test_jax():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    a = make_any(pool=True, flags=True, integers=np.int32, checkpoints="columns", seed=8)
    cpu = jax.devices("cpu")[0]
    given = {
        n: jax.device_put(x, cpu) if isinstance(x, np.ndarray) else x
        for n, x in a.items()
        if n not in ("out", "final_state", "checkpoint_states")
    }
    out, pool, checkpoints = flash_kda.compute(**given, output_final_state=True)
    expected = truth_of_any({**a, "checkpoint_states": np.zeros(checkpoints.shape, np.float32)})
    hold_any(
        {"final_state": a["initial_state"], "checkpoint_states": np.zeros(checkpoints.shape, np.float32)},
        {
            n: np.asarray(x)
            for n, x in (("out", out), ("final_state", pool), ("checkpoint_states", checkpoints))
        },
        expected,
    )
    assert np.asarray(given["initial_state"]).tobytes() == a["initial_state"].tobytes()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_compute_returns_a_changed_copy_of_the_pool(library):
    a = make_any(pool=True, flags=True, seed=9)
    given = {n: x for n, x in a.items() if n not in ("out", "final_state")}
    if library == "torch":
        pytest.importorskip("torch")
        given = to_torch(given, "cpu")
    out, pool = flash_kda.compute(**given, output_final_state=True)
    after = to_numpy({**given, "out": out, "final_state": pool})
    hold_any({**a, "final_state": a["initial_state"]}, after, truth_of_any(a))
    given["initial_state"] = None
    with pytest.raises(
        ValueError, match="state_indices is given without initial_state; initial_state must be"
    ):
        flash_kda.compute(**given, output_final_state=True)


@pytest.mark.parametrize(
    ("change", "exception", "sentence"),
    [
        (
            {"state_indices": [0, 1, 7, 2]},
            ValueError,
            "state_indices[2] is 7; it must be less than 7, the slots of initial_state",
        ),
        ({"state_indices": [0, 1, 2]}, ValueError, "state_indices has shape [3]; it must be [N] = [4]"),
        (
            {"state_indices": [0.0] * 4},
            TypeError,
            "state_indices has dtype float64; it must be int64 or int32",
        ),
        (
            {"has_initial_state": [1, 1, 1, 0]},
            TypeError,
            "has_initial_state has dtype int64; it must be bool",
        ),
        ({"has_initial_state": [True]}, ValueError, "has_initial_state has shape [1]; it must be [N] = [4]"),
        ({"first_slot": -1}, ValueError, "first_slot is -1; it must be 0 (every index is a slot) or more"),
        ({"first_slot": 1.0}, TypeError, "first_slot is of type float; it must be an int"),
        (
            {"state_indices": None, "first_slot": 0},
            ValueError,
            "initial_state has shape [7, 2, 128, 128]; it must be [N, HV,",
        ),
        (
            {"state_indices": None, "initial_state": None, "final_state": None},
            ValueError,
            "first_slot is 1 without state_indices; it must be 0",
        ),
        (
            {"initial_state": lambda x: x[:, :1]},
            ValueError,
            "initial_state has shape [7, 1, 128, 128]; it must",
        ),
        ({"final_state": lambda x: x.swapaxes(2, 3)}, ValueError, "final_state has strides"),
    ],
)
@pytest.mark.parametrize("library", ["numpy", "torch", "torch compiled"])
def test_wrong_arguments(library, change, exception, sentence):
    if "compiled" in library and isinstance(change.get("first_slot"), float):
        pytest.skip("PyTorch itself refuses it, as the operator's schema says what it must be")
    a = make_any(pool=True, flags=True, seed=10)
    for name, x in change.items():
        a[name] = np.array(x) if isinstance(x, list) else x(a[name]) if callable(x) else x
    before = copied(a)
    if library == "numpy":
        after = a
        with pytest.raises(exception) as raised:
            flash_kda.fwd(**a)
    else:
        torch = pytest.importorskip("torch")
        tensors = to_torch(a, "cpu")
        if a["final_state"] is not None and not a["final_state"].flags.c_contiguous:
            tensors["final_state"] = torch.from_numpy(a["final_state"])
        call = flash_kda.fwd
        if "compiled" in library:
            torch.compiler.reset()
            call = torch.compile(lambda **t: flash_kda.fwd(**t), fullgraph=True, backend="aot_eager")
            exception = Exception
        with torch.no_grad(), pytest.raises(exception) as raised:
            call(**tensors)
        after = to_numpy(tensors)
    assert sentence in str(raised.value)
    for name in ("out", "final_state"):
        if before[name] is not None:
            assert np.ascontiguousarray(after[name]).tobytes() == np.ascontiguousarray(before[name]).tobytes()
