"""fwd on NumPy arrays, and the reference."""

import warnings

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from problems import ARGUMENTS, BARS, error, hold_to, in_threads, make, truth


def recurrence(a, b, h, begin, end, state):
    """The definition, written a second time: head h of a sequence, tokens begin to end - 1 of batch row b.
    state: [V, K]"""
    S = state.astype(np.float64).T.copy()
    outs = []
    for t in range(begin, end):
        q, k, v, g = (a[name][b, t, h].astype(np.float64) for name in ("q", "k", "v", "g"))
        gate = a["lower_bound"] / (1 + np.exp(-np.exp(np.float64(a["A_log"][h])) * (g + a["dt_bias"][h])))
        q, k = (x / np.sqrt((x * x).sum() + 1e-6) for x in (q, k))
        write = 1 / (1 + np.exp(-np.float64(a["beta"][b, t, h])))
        S *= np.exp(gate)[:, None]
        S += np.outer(k, write * (v - S.T @ k))
        outs.append(a["scale"] * S.T @ q)
    return np.array(outs).reshape(-1, 128), S.T


def test_reference_is_the_recurrence():
    a = make(lengths=[3, 0, 9], H=2, initial=np.float32)
    out, state = flash_kda.reference(
        *(a[n] for n in ("q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias", "lower_bound")),
        initial_state=a["initial_state"],
        cu_seqlens=a["cu_seqlens"],
    )
    assert out.dtype == state.dtype == np.float64
    for n in range(3):
        begin, end = a["cu_seqlens"][n : n + 2]
        for h in range(2):
            want_out, want_state = recurrence(a, 0, h, begin, end, a["initial_state"][n, h])
            # The tolerance is fp32's, since scale and lower_bound are floats in C.
            np.testing.assert_allclose(out[0, begin:end, h], want_out, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(state[n, h], want_state, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("T", [0, 1, 15, 16, 17, 63, 64, 65, 200])
def test_lengths(T):
    a = make(T=T, initial=np.float32)
    assert flash_kda.fwd(**a) is None
    if T:
        hold_to(a, truth(a), "cpu")
    else:
        np.testing.assert_array_equal(a["final_state"], a["initial_state"])


@pytest.mark.parametrize("initial", [None, np.float32, bfloat16])
@pytest.mark.parametrize("final", [None, np.float32, bfloat16])
def test_states(initial, final):
    if initial and final and initial != final:
        pytest.skip("both states must have one dtype")
    a = make(T=40, B=3, initial=initial, final=final)
    flash_kda.fwd(**a)
    hold_to(a, truth(a), "cpu")
    if final is bfloat16:
        # A bf16 state is the fp32 state, rounded once.
        wide = {**a, "final_state": np.empty(a["final_state"].shape, np.float32), "out": a["out"].copy()}
        if initial is not None:
            wide["initial_state"] = a["initial_state"].astype(np.float32)
        flash_kda.fwd(**wide)
        np.testing.assert_array_equal(a["final_state"], wide["final_state"].astype(bfloat16))


def test_state_in_place():
    a = make(T=33, initial=np.float32)
    apart = {**a, "out": a["out"].copy()}
    flash_kda.fwd(**apart)
    a["final_state"] = a["initial_state"]
    flash_kda.fwd(**a)
    np.testing.assert_array_equal(a["out"], apart["out"])
    np.testing.assert_array_equal(a["final_state"], apart["final_state"])


@pytest.mark.parametrize("cu_dtype", [np.int64, np.int32])
def test_sequences(cu_dtype):
    a = make(lengths=[5, 0, 64, 1, 130, 0], initial=np.float32, cu_dtype=cu_dtype)
    flash_kda.fwd(**a)
    hold_to(a, truth(a), "cpu")


def test_a_repeated_call_sees_new_memory_and_scalars():
    """The second call of one shape reuses the first one's struct, and must set anew all that may differ."""
    for seed, scale, bound in ((1, 0.1, -5.0), (2, 2.0, -0.5), (3, -1.0, 0.0)):
        a = {**make(seed=seed, initial=np.float32), "scale": scale, "lower_bound": bound}
        flash_kda.fwd(**a)
        hold_to(a, truth(a), "cpu")


def turned(x):
    """The same array object, seen through other strides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        x.strides = (*x.strides[:-1], 0)
    return x


def reshaped(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        x.shape = (1, *x.shape)
    return x


def retyped(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        x.dtype = np.float16 if x.itemsize == 2 else np.int32
    return x


def locked(x):
    x.flags.writeable = False
    return x


EVERY = ("q", "k", "v", "g", "beta", "out", "A_log", "dt_bias", "initial_state", "final_state")
# For each change: the arrays it is made to, the function that makes it, and what the call then raises. The
# array stays the object that it was.
CHANGES = {
    "shape": (
        # A parameter of the gate may have any shape.
        tuple(name for name in EVERY if name not in ("A_log", "dt_bias")),
        reshaped, ValueError, "has . dimensions; it must have",
    ),
    "stride": (
        tuple(name for name in EVERY if name != "beta"),  # which may have any strides
        turned, ValueError, "stride|contiguous",
    ),
    "dtype": (EVERY, retyped, TypeError, "has dtype (float16|int32); it must be"),
    "read-only": (("out", "final_state"), locked, ValueError, "is read-only; it must be writable"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "name"), [(change, name) for change in CHANGES for name in CHANGES[change][0]]
)
def test_no_change_slips_past_a_prepared_call(change, name):
    a = make(T=6, B=2, initial=np.float32)
    flash_kda.fwd(**a)
    for written in ("out", "final_state"):
        a[written].fill(np.nan)
    _, changed, exception, sentence = CHANGES[change]
    with pytest.raises(exception, match=sentence):
        flash_kda.fwd(**{**a, name: changed(a[name])})
    assert all(np.isnan(a[n].astype(np.float32)).all() for n in ("out", "final_state") if n != name)


def test_a_prepared_call_follows_memory_that_moved():
    """ndarray.resize moves an array to other memory, and the array stays the object that it was."""
    a = make(T=6, B=2, initial=np.float32)
    flash_kda.fwd(**a)
    other = make(T=6, B=2, initial=np.float32, seed=5)
    before = {name: a[name].ctypes.data for name in EVERY}
    moved = {name: np.array(a[name]) for name in EVERY}
    flash_kda.fwd(**{**a, **moved})
    blockers = []
    for name, x in moved.items():
        shape = x.shape
        x.resize(1, refcheck=False)
        blockers.append(np.empty(x.nbytes, np.uint8))
        x.resize(shape, refcheck=False)
        x[...] = other[name]
    assert any(moved[name].ctypes.data != before[name] for name in EVERY)
    flash_kda.fwd(**{**a, **moved})
    hold_to({**a, **moved}, truth(other), "cpu")


def test_a_prepared_call_is_for_numpy_arrays():
    """An array of another library may look like NumPy's, but may be read through DLPack alone."""

    class Lookalike:
        def __init__(self, x):
            self.shape, self.strides, self.dtype = x.shape, x.strides, x.dtype
            self.__dlpack__, self.__dlpack_device__ = x.__dlpack__, x.__dlpack_device__

    a = make(T=6, initial=np.float32)
    expected = truth(a)
    for name in ("A_log", "initial_state"):
        flash_kda.fwd(**a)
        a["out"].fill(np.nan)
        flash_kda.fwd(**{**a, name: Lookalike(a[name])})
        hold_to(a, expected, "cpu")


def test_subclasses_and_read_only_inputs():
    a = make(T=6, initial=np.float32)
    expected = truth(a)
    for name in ("q", "A_log", "initial_state"):
        a[name].flags.writeable = False
    flash_kda.fwd(**a)
    hold_to(a, expected, "cpu")

    class Subclass(np.ndarray):
        pass

    a["out"].fill(np.nan)
    flash_kda.fwd(**{name: x.view(Subclass) if isinstance(x, np.ndarray) else x for name, x in a.items()})
    hold_to(a, expected, "cpu")


def test_positions_of_arguments():
    a = make(T=20, lengths=[20], initial=np.float32)
    expected = truth(a)
    flash_kda.fwd(*(a[name] for name in ARGUMENTS))
    hold_to(a, expected, "cpu")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    a = make(T=300, H=3)
    b = {**a, "out": a["out"].copy(), "final_state": a["final_state"].copy()}
    flash_kda.fwd(**a)
    flash_kda.fwd(**b, threads=threads)
    np.testing.assert_array_equal(a["out"], b["out"])
    np.testing.assert_array_equal(a["final_state"], b["final_state"])


@pytest.mark.parametrize(
    "option",
    [
        {"max_seqlen": 1},
        {"max_seqlen": 200},
        {"max_seqlen": 300},
        {"cut": "never"},
        {"cut": "always"},
        {"cut": "mixed"},
    ],
    ids=str,
)
def test_options_for_gpus_change_nothing(option):
    """On a CPU neither max_seqlen, right or wrong, nor cut changes a bit of the result."""
    a = make(lengths=[200, 0, 100])
    b = {**a, "out": a["out"].copy(), "final_state": a["final_state"].copy()}
    flash_kda.fwd(**a)
    flash_kda.fwd(**b, **option)
    np.testing.assert_array_equal(a["out"], b["out"])
    np.testing.assert_array_equal(a["final_state"], b["final_state"])


def test_kernel_by_name():
    a = make()
    expected = truth(a)
    for kernel in flash_kda.kernels():
        if kernel.startswith("cpu"):
            a["out"].fill(np.nan)
            try:
                flash_kda.fwd(**a, kernel=kernel)
            except RuntimeError as unavailable:  # the kernel needs instructions that this CPU lacks
                assert kernel in str(unavailable)  # noqa: PT017
            else:
                hold_to(a, expected, "cpu")


def test_calls_from_many_threads():
    def work(seed):
        a = make(T=50 + seed % 2, seed=seed)
        want = truth(a)
        for _ in range(20):
            a["out"].fill(np.nan)
            flash_kda.fwd(**a)
            assert error(a["out"], want[0]) <= BARS["cpu"][0]

    in_threads(work, range(8))


@pytest.mark.parametrize("kernel", [None, "cpu-portable"])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(kernel):
    lengths = [5, 40, 17]
    batch = make(lengths=lengths, initial=np.float32)
    flash_kda.fwd(**batch, kernel=kernel, batch_invariant=True)
    for n, begin in enumerate(np.cumsum([0, *lengths[:-1]])):
        tokens = slice(begin, begin + lengths[n])
        one = {
            name: np.ascontiguousarray(x[:, tokens]) if np.ndim(x) >= 3 and x.shape[1] == sum(lengths) else x
            for name, x in batch.items()
        }
        one |= {
            name: np.ascontiguousarray(batch[name][n : n + 1]) for name in ("initial_state", "final_state")
        }
        one |= {"cu_seqlens": None, "out": np.zeros_like(one["out"])}
        one["final_state"] = np.zeros_like(one["final_state"])
        flash_kda.fwd(**one, kernel=kernel, batch_invariant=True)
        assert one["out"].tobytes() == np.ascontiguousarray(batch["out"][:, tokens]).tobytes()
        assert one["final_state"].tobytes() == batch["final_state"][n].tobytes()
