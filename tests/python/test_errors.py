"""Every wrong argument: the exception, its sentence, and that nothing was written."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from problems import make, to_torch

BIG = 2**31

# What to change in right arguments, the exception, and its sentence. A change that is callable is given the
# arguments.
WRONG = {
    "q of another dtype": (
        {"q": lambda a: cast(a["q"], "float32")},
        TypeError,
        "q has dtype float32; it must be bfloat16",
    ),
    "k in fp16": (
        {"k": lambda a: cast(a["k"], "float16")},
        TypeError,
        "k has dtype float16; it must be bfloat16",
    ),
    "A_log in fp64": (
        {"A_log": lambda a: cast(a["A_log"], "float64")},
        TypeError,
        "A_log has dtype float64; it must be float32",
    ),
    "A_log of integers": (
        {"A_log": lambda a: cast(a["A_log"], "int64")},
        TypeError,
        "A_log has dtype int64; it must be float32",
    ),
    "out in fp32": (
        {"out": lambda a: cast(a["out"], "float32")},
        TypeError,
        "out has dtype float32; it must be bfloat16",
    ),
    "a state of fp64": (
        {"initial_state": lambda a: cast(a["initial_state"], "float64")},
        TypeError,
        "initial_state has dtype float64; it must be float32 or bfloat16",
    ),
    "states of two dtypes": (
        {"final_state": lambda a: cast(a["final_state"], "bfloat16")},
        TypeError,
        "final_state has dtype bfloat16 and initial_state float32; they must have the same",
    ),
    "cu_seqlens of floats": (
        {"cu_seqlens": lambda a: cast(a["cu_seqlens"], "float32")},
        TypeError,
        "cu_seqlens has dtype float32; it must be int64 or int32",
    ),
    "k of another length": (
        {"k": lambda a: a["k"][:, :7]},
        ValueError,
        "k has shape [1, 7, 2, 128]; it must be [B, T, H, K] = [1, 8, 2, 128]",
    ),
    "K other than 128": (
        {"q": lambda a: first_channels(a["q"])},
        ValueError,
        "q has K = 64; the head size K must be 128",
    ),
    "V other than 128": (
        {"v": lambda a: first_channels(a["v"])},
        ValueError,
        "v has V = 64; the head size V must be 128",
    ),
    "q of rank 3": (
        {"q": lambda a: a["q"][0]},
        ValueError,
        "q has 3 dimensions; it must have 4: [B, T, H, K]",
    ),
    "q of rank 5": (
        {"q": lambda a: a["q"][None]},
        ValueError,
        "q has 5 dimensions; it must have 4: [B, T, H, K]",
    ),
    "beta of rank 4": (
        {"beta": lambda a: a["beta"][..., None]},
        ValueError,
        "beta has 4 dimensions; it must have 3: [B, T, HV]",
    ),
    "dt_bias too short": (
        {"dt_bias": lambda a: a["dt_bias"].reshape(-1)[:-2]},
        ValueError,
        "dt_bias has shape [254]; it must have HV * K = 256 elements",
    ),
    "no heads": ({"q": lambda a: a["q"][:, :, :0]}, ValueError, "q has H = 0; there must be at least 1 head"),
    "states for another N": (
        {"initial_state": lambda a: a["initial_state"][:1]},
        ValueError,
        "initial_state has shape [1, 2, 128, 128]; it must be [N, HV, V, K] = [2, 2, 128, 128], with N from "
        "the 3 entries of cu_seqlens",
    ),
    "an empty state is not an absent one": (
        {"initial_state": lambda a: a["initial_state"][:0]},
        ValueError,
        "initial_state has shape [0, 2, 128, 128]; it must be [N, HV, V, K] = [2, 2, 128, 128]",
    ),
    "an empty final state": (
        {"final_state": lambda a: a["final_state"][:0]},
        ValueError,
        "final_state has shape [0, 2, 128, 128]; it must be [N, HV, V, K] = [2, 2, 128, 128]",
    ),
    "cu_seqlens empty": (
        {"cu_seqlens": lambda a: a["cu_seqlens"][:0]},
        ValueError,
        "cu_seqlens has 0 entries; it must have N + 1 for N >= 1 sequences",
    ),
    "cu_seqlens without a sequence": (
        {"cu_seqlens": lambda a: a["cu_seqlens"][:1]},
        ValueError,
        "cu_seqlens has 1 entries; it must have N + 1 for N >= 1 sequences",
    ),
    "nonfinite of floats": (
        {"nonfinite": lambda a: cast(like(a["q"], [[0, 0]] * 10), "float32")},
        TypeError,
        "nonfinite has dtype float32; it must be int64",
    ),
    "nonfinite for fewer arrays": (
        {"nonfinite": lambda a: like(a["q"], [[0, 0]] * 9)},
        ValueError,
        "nonfinite has shape [9, 2]; it must be [tensors, 2] = [10, 2]",
    ),
    "nonfinite flat": (
        {"nonfinite": lambda a: like(a["q"], [0] * 20)},
        ValueError,
        "nonfinite has 1 dimensions; it must have 2: [tensors, 2]",
    ),
    "scale not finite": ({"scale": float("nan")}, ValueError, "scale is nan; it must be finite"),
    "scale infinite": ({"scale": float("inf")}, ValueError, "scale is inf; it must be finite"),
    "scale missing": ({"scale": None}, TypeError, "scale is of type NoneType; it must be a number"),
    "scale as text": ({"scale": "1"}, TypeError, "scale is of type str; it must be a number"),
    "scale too large": (
        {"scale": 10**400},
        ValueError,
        "scale is an int too large for a float; it must be finite",
    ),
    "scale as an array": ({"scale": lambda a: a["A_log"]}, TypeError, "; it must be a number"),
    "lower_bound too low": ({"lower_bound": -6}, ValueError, "lower_bound is -6; it must be in [-5, 0]"),
    "lower_bound positive": ({"lower_bound": 0.5}, ValueError, "lower_bound is 0.5; it must be in [-5, 0]"),
    "lower_bound not finite": (
        {"lower_bound": float("nan")},
        ValueError,
        "lower_bound is nan; it must be in [-5, 0]",
    ),
    "lower_bound as text": (
        {"lower_bound": "-5"},
        TypeError,
        "lower_bound is of type str; it must be a number or None",
    ),
    "q missing": ({"q": None}, TypeError, "q is of type builtins.NoneType; it must be a PyTorch tensor"),
    "v as a list": ({"v": [1.0]}, TypeError, "v is of type builtins.list; it must be a PyTorch tensor"),
    "out missing": (
        {"out": None},
        TypeError,
        "out is of type builtins.NoneType; it must be a PyTorch tensor",
    ),
    "cu_seqlens as a list": (
        {"cu_seqlens": [0, 3, 8]},
        TypeError,
        "cu_seqlens is of type builtins.list; it must be a PyTorch tensor",
    ),
    "out over q": ({"out": lambda a: a["q"]}, ValueError, "out overlaps q; it must have memory of its own"),
    "out over v": ({"out": lambda a: a["v"]}, ValueError, "out overlaps v; it must have memory of its own"),
    "an unknown kernel": ({"kernel": "fastest"}, ValueError, "fastest"),
    "a kernel's name with more after its end": (
        {"kernel": "cpu\0"},
        ValueError,
        'kernel is "cpu?"; it must be None or',
    ),
    "a kernel's name that is no text": (
        {"kernel": "\ud800"},
        ValueError,
        'kernel is "?"; it must be None or',
    ),
    "kernel as a list": (
        {"kernel": ["cpu"]},
        TypeError,
        "kernel is of type list; it must be a string or None",
    ),
    "kernel as a number": ({"kernel": 3}, TypeError, "kernel is of type int; it must be a string or None"),
    "threads negative": ({"threads": -1}, ValueError, "threads is -1; it must be 0 (all) or more"),
    "threads as a float": ({"threads": 2.0}, TypeError, "threads is of type float; it must be an int"),
    "batch_invariant as a number": (
        {"batch_invariant": 1},
        TypeError,
        "batch_invariant is of type int; it must be True or False",
    ),
    "batch_invariant missing": (
        {"batch_invariant": None},
        TypeError,
        "batch_invariant is of type NoneType; it must be True or False",
    ),
    "max_seqlen negative": (
        {"max_seqlen": -1},
        ValueError,
        "max_seqlen is -1; it must be 0 (not known) or more",
    ),
    "max_seqlen as a float": (
        {"max_seqlen": 2.0},
        TypeError,
        "max_seqlen is of type float; it must be an int",
    ),
    "max_seqlen beyond all": (
        {"max_seqlen": BIG},
        ValueError,
        f"max_seqlen is {BIG}; it must be in [0, T] = [0, ",
    ),
    "cut unknown": (
        {"cut": "often"},
        ValueError,
        'cut is \'often\'; it must be "auto", "never", "always" or "mixed"',
    ),
    "cut as a number": (
        {"cut": 1},
        TypeError,
        'cut is of type int; it must be "auto", "never", "always" or "mixed"',
    ),
    "cut missing": (
        {"cut": None},
        TypeError,
        'cut is of type NoneType; it must be "auto", "never", "always" or "mixed"',
    ),
    "too many threads": (
        {"threads": BIG},
        ValueError,
        f"threads is {BIG}; it must be 0 (all) or more, and fit 32 bits",
    ),
}

# Wrong for NumPy alone: tensors of PyTorch are brought into the right layout (test_layout.py).
WRONG_FOR_NUMPY = {
    "k with gaps between channels": (
        {"k": lambda a: np.concatenate([a["k"], a["k"]], axis=3)[..., ::2]},
        ValueError,
        "k has strides [4096, 512, 256, 2]; its last dimension must be contiguous, with stride 1",
    ),
    "cu_seqlens with gaps": (
        {"cu_seqlens": lambda a: np.stack([a["cu_seqlens"]] * 2, 1)[:, 0]},
        ValueError,
        "cu_seqlens has strides [2]; it must be contiguous, with strides [1]",
    ),
}

# Wrong values of cu_seqlens, which are checked on the CPU alone.
WRONG_SEQUENCES = {
    "starts late": ([1, 3, 8], "cu_seqlens[0] is 1; it must be 0"),
    "decreases": ([0, 9, 8], "cu_seqlens[2] is 8 after 9; it must not decrease"),
    "negative": ([0, -1, 8], "cu_seqlens[1] is -1 after 0; it must not decrease"),
    "ends early": ([0, 3, 7], "cu_seqlens ends with 7; its last entry must be T = 8"),
    "ends late": ([0, 3, 9], "cu_seqlens ends with 9; its last entry must be T = 8"),
}


def cast(x, dtype):
    if isinstance(x, np.ndarray):
        return x.astype(bfloat16 if dtype == "bfloat16" else dtype)
    import torch

    return x.to(getattr(torch, dtype))


def first_channels(x):
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x[..., :64])
    return x[..., :64].contiguous()


@pytest.fixture(params=["numpy", "torch cpu", "torch cpu with guards in Python", "torch cuda"])
def arguments(request, monkeypatch):
    """Two sequences of 8 tokens in all, and both states. Guards tell whether a prepared call fits: PyTorch's
    own, or this package's where PyTorch has none that can be used."""
    a = make(lengths=[3, 5], initial=np.float32)
    if request.param == "numpy":
        return a
    torch = pytest.importorskip("torch")
    device = request.param.split()[1]
    if device == "cuda":
        request.getfixturevalue("cuda")
    if "guards in Python" in request.param:
        from flash_kda import _call, _torch

        monkeypatch.setattr(_torch, "_Guards", _torch._PythonGuards)
        monkeypatch.setattr(_torch, "_calls", _call.PreparedCalls())
    with torch.no_grad():
        return to_torch(a, device)


def untouched(a):
    return all(bool((a[name] != a[name]).all()) for name in ("out", "final_state"))


def refused(a, change, exception, sentence):
    wrong = {**a, **{name: value(a) if callable(value) else value for name, value in change.items()}}
    with pytest.raises(exception) as raised:
        flash_kda.fwd(**wrong)
    assert sentence in str(raised.value)
    assert untouched(a)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(arguments, case):
    refused(arguments, *WRONG[case])


@pytest.mark.parametrize("case", WRONG_FOR_NUMPY)
def test_wrong_argument_of_numpy(case):
    refused(make(lengths=[3, 5], initial=np.float32), *WRONG_FOR_NUMPY[case])


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument_after_a_right_call(arguments, case):
    """The right call leaves a prepared call, which must not hide what is wrong with the next call."""
    flash_kda.fwd(**{**arguments, **{name: copy(arguments[name]) for name in ("out", "final_state")}})
    refused(arguments, *WRONG[case])


@pytest.mark.parametrize(
    ("name", "right", "wrong", "sentence"),
    [
        ("threads", 2, 2.0, "threads is of type float; it must be an int"),
        ("max_seqlen", 5, 5.0, "max_seqlen is of type float; it must be an int"),
        ("batch_invariant", True, 1, "batch_invariant is of type int; it must be True or False"),
    ],
)
def test_an_equal_value_of_another_type_after_a_right_call(arguments, name, right, wrong, sentence):
    """In Python 2 == 2.0 and True == 1, but the options of a call are told apart by their types as well."""
    fresh = {name: copy(arguments[name]) for name in ("out", "final_state")}
    flash_kda.fwd(**{**arguments, **fresh}, **{name: right})
    refused(arguments, {name: wrong}, TypeError, sentence)


def copy(x):
    return x.copy() if isinstance(x, np.ndarray) else x.clone()


@pytest.mark.parametrize("case", WRONG_SEQUENCES)
@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_values_of_cu_seqlens(arguments, case, dtype):
    if not isinstance(arguments["q"], np.ndarray) and arguments["q"].is_cuda:
        pytest.skip("on a GPU the values are clamped instead of checked")
    values, sentence = WRONG_SEQUENCES[case]
    change = {"cu_seqlens": lambda a: cast(like(a["q"], values), dtype)}
    refused(arguments, change, ValueError, sentence)


def like(x, values):
    if isinstance(x, np.ndarray):
        return np.array(values)
    import torch

    return torch.tensor(values, device=x.device)


def test_cu_seqlens_with_batch():
    a = make(T=4, B=2)
    refused(a, {"cu_seqlens": np.array([0, 4, 8])}, ValueError, "cu_seqlens is given with B = 2; B must be 1")


def test_states_that_overlap_in_part():
    a = make(T=4, B=2, initial=np.float32)
    memory = np.full((3, 2, 128, 128), np.nan, np.float32)
    a["initial_state"], a["final_state"] = memory[:2], memory[1:]
    sentence = (
        "final_state overlaps initial_state in part; they must be apart, or the same memory with the same"
    )
    refused(a, {}, ValueError, sentence)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "out", "initial_state", "final_state", "dt_bias"])
def test_misaligned(name):
    a = make(T=4, initial=np.float32)
    x = a[name]
    memory = np.full(x.nbytes + 64, 255, np.uint8)
    begin = -memory.ctypes.data % 16 + x.itemsize
    shifted = memory[begin : begin + x.nbytes].view(x.dtype).reshape(x.shape)
    shifted[...] = x
    refused(
        a,
        {name: shifted},
        ValueError,
        f"{name} is at address {hex(shifted.ctypes.data)}; it must be aligned to 16 bytes",
    )


@pytest.mark.parametrize("name", ["out", "final_state"])
def test_read_only(name):
    a = make(T=4)
    a[name].flags.writeable = False
    refused(a, {}, ValueError, f"{name} is read-only; it must be writable, as the call writes to it")


def test_foreign_byte_order():
    a = make(T=4)
    refused(
        a,
        {"A_log": lambda a: a["A_log"].astype(">f4")},
        TypeError,
        "A_log has dtype another type; it must be float32",
    )


def test_strides_of_part_of_an_element():
    a = make(T=4)
    records = np.zeros(2, dtype=[("a", "f4"), ("b", "i2")])
    refused(
        a,
        {"A_log": records["a"]},
        ValueError,
        "A_log has strides of (6,) bytes; they must be multiples of its 4",
    )


def test_reference_checks_too():
    a = make(T=4)
    keep = {n: a[n] for n in ("q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias", "lower_bound")}
    with pytest.raises(ValueError, match=r"k has shape \[1, 3, 2, 128\]; it must be"):
        flash_kda.reference(**{**keep, "k": a["k"][:, :3]})
    with pytest.raises(TypeError, match=r"q is of type builtins.list; it must be a PyTorch tensor, a NumPy"):
        flash_kda.reference(**{**keep, "q": [1.0]})
    with pytest.raises(TypeError, match="g has dtype float64; it must be bfloat16 or float32"):
        flash_kda.reference(**{**keep, "g": a["g"].astype(np.float64)})


@pytest.mark.parametrize(
    ("sizes", "exception", "sentence"),
    [
        ((-1, 1), ValueError, "T_total is -1; it must be at least 0"),
        ((8, 0), ValueError, "H is 0; it must be at least 1"),
        ((8, 1, 0), ValueError, "N is 0; it must be at least 1"),
        ((2.5, 1), TypeError, "T_total is of type float; it must be an int"),
        ((BIG, 1), ValueError, f"T_total is {BIG}; it must be at least 0 and fit 32 bits"),
        ((BIG - 1, 1), ValueError, "tokens"),
    ],
)
@pytest.mark.parametrize("call", [flash_kda.get_workspace_size, flash_kda.explain])
def test_wrong_sizes_of_a_shape(call, sizes, exception, sentence):
    with pytest.raises(exception) as raised:
        call(*sizes)
    assert sentence in str(raised.value)


class Index:
    """An integer of another library."""

    def __init__(self, number):
        self.number = number

    def __index__(self):
        return self.number


class UnhashableIndex(Index):
    __hash__ = None


@pytest.mark.parametrize("integer", [np.int32, np.uint8, Index, UnhashableIndex, lambda n: np.array(n)])
def test_integers_of_other_libraries(arguments, integer):
    fresh = {name: copy(arguments[name]) for name in ("out", "final_state")}
    flash_kda.fwd(**{**arguments, **fresh}, threads=integer(2), max_seqlen=integer(5))
    refused(
        arguments, {"max_seqlen": integer(9)}, ValueError, "max_seqlen is 9; it must be in [0, T] = [0, 8]"
    )
    refused(arguments, {"max_seqlen": Index(-1)}, ValueError, "max_seqlen is -1; it must be 0 (not known) or")
    if isinstance(arguments["q"], np.ndarray):
        explained = flash_kda.explain(integer(100), integer(2), integer(1), max_seqlen=integer(7))
        assert explained == flash_kda.explain(100, 2, 1, max_seqlen=7)
        assert flash_kda.get_workspace_size(integer(100), integer(2)) == flash_kda.get_workspace_size(100, 2)
        with pytest.raises(ValueError, match="H is 0; it must be at least 1"):
            flash_kda.explain(100, integer(0))


def test_options_with_equal_integers_are_one_object():
    from flash_kda._options import known_options

    given = 3
    options = known_options(given, None, 2, False, 5, "auto")
    for integer in (np.int64, Index, UnhashableIndex):
        assert known_options(given, None, integer(2), False, integer(5), "auto") is options


def test_sentences_are_python_s():
    """None where C says NULL, and no word of pointers."""
    from test_dlpack import Foreign

    class WithoutMemory(Foreign):
        def __dlpack__(self, **options):
            capsule = super().__dlpack__(**options)
            self.managed.tensor.data = None
            return capsule

    a = make(T=4)
    refused(a, {"k": WithoutMemory(a["k"])}, ValueError, "k has no memory; it must have its 2048 bytes")
    refused(a, {"kernel": "zz"}, ValueError, 'kernel is "zz"; it must be None or one of cpu')


def test_explain_of_a_device():
    torch = pytest.importorskip("torch")
    expected = flash_kda.explain(100, 2, device="cpu")
    for device in (torch.device("cpu"), torch.device("cpu", 0), "cpu:0"):
        assert flash_kda.explain(100, 2, device=device) == expected
    with pytest.raises(ValueError, match=r"device is device\(type='meta'\); it must be None or one of cpu"):
        flash_kda.explain(100, 2, device=torch.device("meta"))


@pytest.mark.parametrize(
    ("options", "exception", "sentence"),
    [
        ({"device": "gpu"}, ValueError, "device is 'gpu'; it must be None or one of cpu"),
        ({"device": 0}, ValueError, "device is 0; it must be None or one of cpu"),
        ({"kernel": 3}, TypeError, "kernel is of type int; it must be a string or None"),
        ({"batch_invariant": 1}, TypeError, "batch_invariant is of type int; it must be True or False"),
        ({"cut": "often"}, ValueError, 'cut is \'often\'; it must be "auto", "never", "always" or "mixed"'),
        ({"max_seqlen": 1.5}, TypeError, "max_seqlen is of type float; it must be an int"),
        ({"max_seqlen": 101}, ValueError, "max_seqlen is 101; it must be in [0, T] = [0, 100]"),
        ({"device": "cpu", "kernel": "zz"}, ValueError, 'kernel is "zz"; it must be None or one of cpu, '),
        (
            {"device": "cpu", "kernel": "cpu\0"},
            ValueError,
            'kernel is "cpu?"; it must be None or one of cpu, ',
        ),
    ],
)
def test_explain_of_wrong_options(options, exception, sentence):
    with pytest.raises(exception) as raised:
        flash_kda.explain(100, 2, **options)
    assert sentence in str(raised.value)
