"""Arrays of other libraries, which are read through DLPack."""

import ctypes
import sys
from ctypes import POINTER, c_int64, c_void_p, py_object

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from flash_kda._arrays import _DLTensor, _Versioned
from problems import hold_to, make, to_numpy, to_torch, truth

CODES = {
    "bfloat16": (4, 16),
    "float32": (2, 32),
    "int64": (0, 64),
    "int32": (0, 32),
    "bool": (6, 8),
    "uint8": (1, 8),
}

_new_capsule = ctypes.pythonapi["PyCapsule_New"]  # a function of our own: JAX sets the types of the other one
_new_capsule.argtypes = [c_void_p, ctypes.c_char_p, c_void_p]
_new_capsule.restype = py_object


class _Unversioned(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("manager_ctx", c_void_p), ("deleter", c_void_p))


class Foreign:
    """An array of no known library over the memory of a NumPy array."""

    def __init__(self, x, versioned=True, flags=0, device=(1, 0), major=1, offset=0):
        self.x, self.versioned, self.flags, self.device, self.major = x, versioned, flags, device, major
        self.offset = offset
        self.asked = None

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        if not self.versioned and "max_version" in options:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.asked = options
        self.shape = (c_int64 * self.x.ndim)(*self.x.shape)
        self.strides = (c_int64 * self.x.ndim)(*(s // self.x.itemsize for s in self.x.strides))
        code, bits = CODES[self.x.dtype.name]
        self.managed = _Versioned(self.major, 0) if self.versioned else _Unversioned()
        self.managed.tensor = _DLTensor(
            self.x.ctypes.data - self.offset,
            *self.device,
            self.x.ndim,
            code,
            bits,
            1,
            ctypes.cast(self.shape, POINTER(c_int64)),
            ctypes.cast(self.strides, POINTER(c_int64)),
            self.offset,
        )
        if self.versioned:
            self.managed.flags = self.flags
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        return _new_capsule(ctypes.addressof(self.managed), name, None)


def wrap(a, **options):
    return {n: Foreign(x, **options) if isinstance(x, np.ndarray) else x for n, x in a.items()}


@pytest.mark.parametrize("options", [{}, {"versioned": False}, {"device": (3, 0)}, {"offset": 32}])
def test_any_library(options):
    a = make(lengths=[3, 0, 70], initial=bfloat16, final=bfloat16)
    expected = truth(a)
    foreign = wrap(a, **options)
    flash_kda.fwd(**foreign)
    hold_to(a, expected, "cpu")
    assert "stream" not in foreign["q"].asked  # a CPU has no streams
    if foreign["q"].versioned:
        assert foreign["out"].asked["copy"] is False


def test_mixed_with_numpy():
    a = make(initial=np.float32)
    expected = truth(a)
    flash_kda.fwd(**{**a, "k": Foreign(a["k"]), "out": Foreign(a["out"])})
    hold_to(a, expected, "cpu")


@pytest.mark.parametrize("name", ["out", "final_state"])
def test_what_is_written_must_be_writable(name):
    a = make(T=4)
    with pytest.raises(ValueError, match=f"{name} is read-only; it must be writable"):
        flash_kda.fwd(**{**a, name: Foreign(a[name], flags=1)})
    with pytest.raises(ValueError, match=f"{name} came as a copy through DLPack; it must share its memory"):
        flash_kda.fwd(**{**a, name: Foreign(a[name], flags=2)})
    flash_kda.fwd(**{**a, "q": Foreign(a["q"], flags=3)})  # an input may be a read-only copy


def test_refusals():
    a = make(T=4)
    with pytest.raises(
        ValueError, match="v is on a device of DLPack type 10; it must be on the CPU or a CUDA device"
    ):
        flash_kda.fwd(**{**a, "v": Foreign(a["v"], device=(10, 0))})
    with pytest.raises(ValueError, match="k is on cuda:1 and q on cpu; all tensors must be on one device"):
        flash_kda.fwd(**{**a, "k": Foreign(a["k"], device=(2, 1))})
    with pytest.raises(ValueError, match="g came as DLPack 2; it must be version 1 or older"):
        flash_kda.fwd(**{**a, "g": Foreign(a["g"], major=2)})
    with pytest.raises(TypeError, match="A_log has dtype int32; it must be float32"):
        flash_kda.fwd(**{**a, "A_log": Foreign(a["A_log"].view(np.int32))})
    broken = Foreign(a["beta"])
    broken.__class__ = type("Broken", (Foreign,), {"__dlpack__": lambda self, **_: 3})
    with pytest.raises(TypeError, match="beta has a __dlpack__ that returns no DLPack capsule"):
        flash_kda.fwd(**{**a, "beta": broken})
    stubborn = Foreign(a["beta"])
    stubborn.__class__ = type("Stubborn", (Foreign,), {"__dlpack__": fail})
    with pytest.raises(ValueError, match="beta cannot be read through DLPack: not today"):
        flash_kda.fwd(**{**a, "beta": stubborn})
    assert np.isnan(a["out"].astype(np.float32)).all()


def fail(self, **_):
    raise BufferError("not today")


def test_capsules_are_returned():
    """No reference to an array survives the call."""
    a = make(T=4)
    foreign = wrap(a)
    before = {n: sys.getrefcount(x) for n, x in foreign.items() if isinstance(x, Foreign)}
    for _ in range(10):
        flash_kda.fwd(**foreign)
    assert before == {n: sys.getrefcount(x) for n, x in foreign.items() if isinstance(x, Foreign)}


class Veiled:
    """A PyTorch tensor that offers DLPack and nothing else."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.streams = []

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **options):
        self.streams.append(options.get("stream"))
        options.pop("max_version", None), options.pop("copy", None)
        return self.tensor.__dlpack__(**options)


def test_veiled_tensors(device):
    torch = pytest.importorskip("torch")
    a = make(initial=np.float32, B=2)
    expected = truth(a)
    tensors = to_torch(a, device)
    veiled = {n: Veiled(x) if isinstance(x, torch.Tensor) else x for n, x in tensors.items()}
    flash_kda.fwd(**veiled)
    hold_to(to_numpy(tensors), expected, device)
    assert veiled["q"].streams == ([1] if device == "cuda" else [None])  # 1: the legacy default stream


def test_veiled_among_tensors(device):
    torch = pytest.importorskip("torch")
    a = make()
    expected = truth(a)
    tensors = to_torch(a, device)
    flash_kda.fwd(**{**tensors, "v": Veiled(tensors["v"]), "out": Veiled(tensors["out"])})
    if device == "cuda":
        torch.cuda.synchronize()
    hold_to(to_numpy(tensors), expected, device)


def test_numpy_among_tensors():
    pytest.importorskip("torch")
    a = make()
    expected = truth(a)
    tensors = to_torch(a, "cpu")
    flash_kda.fwd(**{**tensors, "out": a["out"], "final_state": a["final_state"]})
    hold_to(a, expected, "cpu")


def test_jax_inputs():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    a = make(T=40)
    expected = truth(a)
    # JAX arrays cannot be written, so NumPy's arrays take the results.
    with jax.default_device(jax.devices("cpu")[0]):
        inputs = {n: jax.numpy.asarray(a[n]) for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")}
    flash_kda.fwd(**{**a, **inputs})
    hold_to(a, expected, "cpu")


def test_cupy(cuda):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    torch = pytest.importorskip("torch")
    a = make(lengths=[40, 3], initial=np.float32)
    expected = truth(a)
    tensors = to_torch(a, cuda)
    stream = cupy.cuda.Stream(non_blocking=True)
    torch.cuda.synchronize()
    with stream:
        # Not every CuPy has bf16, so bf16 tensors stay PyTorch's, and are used on CuPy's stream.
        arrays = {
            n: cupy.from_dlpack(x) if isinstance(x, torch.Tensor) and x.dtype != torch.bfloat16 else x
            for n, x in tensors.items()
        }
        flash_kda.fwd(**arrays)
    torch.cuda.synchronize()
    stream.synchronize()
    hold_to(to_numpy(tensors), expected, cuda)
