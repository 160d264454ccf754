"""States from inside of sequences: checkpoint_states, _offsets, _indices, _every, _starts."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from problems import (
    CHECKPOINTS,
    checkpoints_of,
    copied,
    hold_any,
    make_any,
    run_any,
    to_numpy,
    to_torch,
    truth_of_any,
)

MODES = [("numpy", "eager"), ("torch", "eager"), ("torch", "aot_eager")]
LENGTHS = (50, 5, 0, 64)


@pytest.fixture(params=MODES, ids=" ".join)
def way(request):
    if request.param[0] == "torch":
        pytest.importorskip("torch")
    return request.param


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize("integers", [np.int32, np.int64])
def test_checkpoints(way, kind, dtype, integers):
    a = make_any(LENGTHS, checkpoints=kind, checkpoint_dtype=dtype, integers=integers, seed=1)
    assert [*checkpoints_of(a)]
    hold_any(a, run_any(a, *way), truth_of_any(a))


def test_without_other_states(way):
    a = make_any(LENGTHS, checkpoints="columns", seed=2)
    a |= {"initial_state": None}
    expected = truth_of_any(a)
    expected.pop("final_state")
    a["final_state"] = None
    hold_any(a, run_any(a, *way), expected)


def test_k_first(way):
    a = make_any(LENGTHS, checkpoints="every", k_first=True, seed=3)
    hold_any(a, run_any(a, *way), truth_of_any(a))


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_is_the_final_state_of_the_prefix(kind):
    """Bit for bit, with batch_invariant."""
    a = make_any(LENGTHS, checkpoints=kind, seed=4)
    after = run_any({**a, "batch_invariant": True})
    for n, tokens, row in checkpoints_of(a):
        begin = a["cu_seqlens"][n]
        prefix = {
            name: np.ascontiguousarray(x[:, begin : begin + tokens])
            if name in ("q", "k", "v", "g", "beta", "out")
            else x
            for name, x in a.items()
            if not name.startswith("checkpoint")
        }
        prefix |= {"cu_seqlens": None, "batch_invariant": True}
        prefix |= {name: a[name][n : n + 1] for name in ("initial_state", "final_state")}
        alone = run_any(prefix)
        assert alone["final_state"][0].tobytes() == after["checkpoint_states"][row].tobytes()


def test_batch_rows(way):
    """Without cu_seqlens each batch row is a sequence."""
    a = make_any((80,), checkpoints=None, seed=5)
    for name in ("q", "k", "v", "g", "beta", "out"):
        a[name] = a[name].reshape(2, 40, *a[name].shape[2:])
    a["initial_state"] = np.concatenate([a["initial_state"]] * 2)
    a["final_state"] = np.concatenate([a["final_state"]] * 2)
    plain = run_any({**a, "cu_seqlens": None}, *way)
    states = np.full((4, 2, 128, 128), np.nan, np.float32)
    after = run_any({**a, "cu_seqlens": None, "checkpoint_states": states, "checkpoint_every": 16}, *way)
    assert after["out"].tobytes() == plain["out"].tobytes()
    sequences = {**a, "checkpoint_states": states, "checkpoint_every": 16}
    sequences |= {
        n: x.reshape(1, 80, *x.shape[2:]) for n, x in a.items() if n in ("q", "k", "v", "g", "beta", "out")
    }
    sequences["cu_seqlens"] = np.array([0, 40, 80])
    want = run_any(sequences, *way)
    assert after["checkpoint_states"].tobytes() == want["checkpoint_states"].tobytes()


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_compute(library, kind):
    a = make_any(LENGTHS, checkpoints=kind, seed=6)
    given = {n: x for n, x in a.items() if n not in ("out", "final_state", "checkpoint_states")}
    if kind in ("indices", "starts"):
        given["checkpoint_rows"] = len(a["checkpoint_states"])
    if library == "torch":
        pytest.importorskip("torch")
        given = to_torch(given, "cpu")
    out, state, rows = flash_kda.compute(**given, output_final_state=True)
    after = to_numpy({"out": out, "final_state": state, "checkpoint_states": rows})
    a["checkpoint_states"] = np.zeros(rows.shape, np.float32)
    hold_any({n: a[n] for n in after}, after, truth_of_any(a))
    results = flash_kda.reference(**given)
    assert len(results) == 3
    assert results[2].shape == rows.shape


@pytest.mark.parametrize(
    ("kind", "change", "exception", "sentence"),
    [
        (
            "offsets",
            {"checkpoint_offsets": [8, 0, 0, 0]},
            ValueError,
            "checkpoint_offsets[0] is 8; it must be a multiple of 16 and at most 50, the tokens of",
        ),
        (
            "offsets",
            {"checkpoint_offsets": [64, 0, 0, 0]},
            ValueError,
            "checkpoint_offsets[0] is 64; it must be",
        ),
        (
            "offsets",
            {"checkpoint_offsets": [0, 0]},
            ValueError,
            "checkpoint_offsets has shape [2]; it must be [N] = [4]",
        ),
        (
            "columns",
            {"checkpoint_offsets": [[16, 48, 32], [0, 0, 0], [0, 16, 0], [0, 0, 0]]},
            ValueError,
            "checkpoint_offsets[2, 1] is 16; it must be",
        ),
        (
            "indices",
            {"checkpoint_indices": [[99] * 3] * 4, "checkpoint_offsets": [[16] * 3] + [[0] * 3] * 3},
            ValueError,
            "checkpoint_indices[0, 0] is 99; it must be at least 0 and less than 14, the rows of",
        ),
        ("indices", {"checkpoint_indices": [0, 1, 2, 3]}, ValueError, "checkpoint_indices has 1 dimensions"),
        (
            "every",
            {"checkpoint_every": 24},
            ValueError,
            "checkpoint_every is 24; it must be a multiple of 16 tokens, 16 or more, or None",
        ),
        ("every", {"checkpoint_every": 0}, ValueError, "checkpoint_every is 0; it must be a multiple of 16"),
        (
            "every",
            {"checkpoint_every": 16.0},
            TypeError,
            "checkpoint_every is of type float; it must be an int",
        ),
        (
            "every",
            {"checkpoint_every": None},
            ValueError,
            "checkpoint_states is given without checkpoint_offsets and with checkpoint_every=None; one",
        ),
        (
            "every",
            {"checkpoint_states": None},
            ValueError,
            "checkpoint_every is 16 without checkpoint_states; checkpoint_states must be given too",
        ),
        ("every", {"checkpoint_states": lambda x: x[:1]}, ValueError, "checkpoint_every = "),
        (
            "every",
            {"checkpoint_offsets": [0, 0, 0, 0]},
            ValueError,
            "checkpoint_offsets is given with checkpoint_",
        ),
        (
            "every",
            {"checkpoint_states": lambda x: x.astype(np.float64)},
            TypeError,
            "checkpoint_states has dtype float64; it must be float32 or bfloat16",
        ),
        ("every", {"checkpoint_states": lambda x: x[:, :1]}, ValueError, "checkpoint_states has shape"),
        (
            "starts",
            {"checkpoint_starts": [90, 0, 0, 0]},
            ValueError,
            "checkpoint_starts[0] is 90; it must leave room for 3 checkpoints among the 10 rows",
        ),
        (
            "starts",
            {"checkpoint_every": None, "checkpoint_offsets": [0] * 4},
            ValueError,
            "checkpoint_starts is given with checkpoint_every=None; it must be None",
        ),
        (
            "offsets",
            {"checkpoint_offsets": None},
            ValueError,
            "checkpoint_states is given without checkpoint_off",
        ),
    ],
)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_wrong_arguments(library, kind, change, exception, sentence):
    a = make_any(LENGTHS, checkpoints=kind, seed=7)
    for name, x in change.items():
        a[name] = np.array(x) if isinstance(x, list) else x(a[name]) if callable(x) else x
    before = copied(a)
    if library == "torch":
        pytest.importorskip("torch")
        given = to_torch(a, "cpu")
    else:
        given = a
    with pytest.raises(exception) as raised:
        flash_kda.fwd(**given)
    assert sentence in str(raised.value)
    after = to_numpy(given)
    for name in ("out", "final_state", "checkpoint_states"):
        if before[name] is not None:
            assert np.ascontiguousarray(after[name]).tobytes() == np.ascontiguousarray(before[name]).tobytes()


@pytest.mark.parametrize(
    ("change", "exception", "sentence"),
    [
        (
            {"checkpoint_rows": 3},
            ValueError,
            "checkpoint_rows is given without checkpoint_offsets and checkpoint_e",
        ),
        (
            {"checkpoint_rows": -1, "checkpoint_every": 16},
            ValueError,
            "checkpoint_rows is -1; it must be 0 or more",
        ),
        (
            {"checkpoint_rows": 1.5, "checkpoint_every": 16},
            TypeError,
            "checkpoint_rows is of type float; it must",
        ),
        (
            {"checkpoint_every": 16, "checkpoint_starts": np.zeros(4, int)},
            ValueError,
            "checkpoint_starts is given without checkpoint_rows; checkpoint_rows must say how many rows",
        ),
        ({"no_such_thing": 1}, TypeError, "unexpected keyword argument 'no_such_thing'"),
    ],
)
@pytest.mark.parametrize("call", ["compute", "reference"])
def test_wrong_arguments_of_functions_that_make_rows(call, change, exception, sentence):
    a = make_any(LENGTHS, seed=8)
    given = {n: x for n, x in a.items() if n not in ("out", "final_state")}
    with pytest.raises(exception) as raised:
        getattr(flash_kda, call)(**given, **change)
    assert sentence in str(raised.value)


def test_fake_tensors_of_wrong_shapes():
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = to_torch(make_any(LENGTHS, checkpoints="columns", pool=True, flags=True, seed=9), "cpu")
    tensors["workspace"] = torch.empty(64, dtype=torch.uint8)
    mode = FakeTensorMode()
    fakes = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in tensors.items()}
    flash_kda.fwd(**fakes)
    for name, change, exception, sentence in (
        ("checkpoint_states", lambda x: x[:, :1], ValueError, "checkpoint_states has shape"),
        ("checkpoint_offsets", lambda x: x[:1], ValueError, "checkpoint_offsets has shape"),
        ("state_indices", lambda x: x[:1], ValueError, "state_indices has shape"),
        (
            "has_initial_state",
            lambda x: x.long(),
            TypeError,
            "has_initial_state has dtype int64; it must be bool",
        ),
        ("workspace", lambda x: x.float(), TypeError, "workspace has dtype float32; it must be uint8"),
    ):
        with pytest.raises(exception, match=sentence), mode:
            flash_kda.fwd(**{**fakes, name: change(fakes[name])})
