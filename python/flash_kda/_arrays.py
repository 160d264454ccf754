"""Arrays of any library: NumPy's own interface, and DLPack for all others.

NumPy's own arrays take one path: `call_c`, then `_prepare_and_run` unless the latest prepared call fits, then
`_run`, then `PreparedCall.run`, which calls C. If one array is of another library, `_read_and_run` reads all
of them, and its prepared call is used once: DLPack has no way to ask what an array looks like without
exporting it.

Shapes and dtypes are checked in C (src/check.c, src/check_decode.c), whose sentence becomes the exception's
(`_lib.last_error`).
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import (
    POINTER,
    c_char,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
    py_object,
)
from operator import attrgetter
from typing import Any, Callable

from . import _lib
from ._call import PreparedCall, PreparedCalls, View, check_devices
from ._call_options import CallOptions
from ._options import Options


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("manager_ctx", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("tensor", _DLTensor),
    ]


_READ_ONLY, _IS_COPIED = 1, 2  # flags of a versioned DLPack tensor
_CPU_TYPES = (1, 3)  # kDLCPU, kDLCUDAHost
_CUDA_TYPES = (2, 13)  # kDLCUDA, kDLCUDAManaged
_LEGACY_STREAM = 1  # CUDA's handle of its legacy default stream, in DLPack too

# (code, bits) of DLPack
_DLPACK_DTYPES = {
    (4, 16): _lib.BF16,
    (2, 32): _lib.F32,
    (0, 32): _lib.I32,
    (0, 64): _lib.I64,
    (2, 16): _lib.F16,
    (2, 64): _lib.F64,
    (6, 8): _lib.BOOL,
    (1, 8): _lib.U8,
}
_NUMPY_DTYPES = {
    "bfloat16": _lib.BF16,
    "float32": _lib.F32,
    "int32": _lib.I32,
    "int64": _lib.I64,
    "float16": _lib.F16,
    "float64": _lib.F64,
    "bool": _lib.BOOL,
    "uint8": _lib.U8,
}

_is_capsule = ctypes.pythonapi["PyCapsule_IsValid"]
_is_capsule.argtypes = [py_object, c_char_p]
_capsule_pointer = ctypes.pythonapi["PyCapsule_GetPointer"]
_capsule_pointer.argtypes = [py_object, c_char_p]
_capsule_pointer.restype = c_void_p


class _ArrayInterface(ctypes.Structure):
    """PyArrayInterface of NumPy's array interface protocol, behind __array_struct__."""

    _fields_ = (
        ("two", c_int),
        ("nd", c_int),
        ("typekind", c_char),
        ("itemsize", c_int),
        ("flags", c_int),
        ("shape", c_void_p),
        ("strides", c_void_p),
        ("data", c_void_p),
        ("descr", c_void_p),
    )


# PyCapsule_GetPointer for an _ArrayInterface as a C array of pointers. Reading an element takes half the time
# of reading the field of a struct.
_interface = ctypes.pythonapi["PyCapsule_GetPointer"]
_interface.argtypes = [py_object, c_void_p]
_interface.restype = POINTER(c_void_p)
_DATA = _ArrayInterface.data.offset // ctypes.sizeof(c_void_p)
_array_struct = attrgetter("__array_struct__")


# Libraries whose arrays never change once they are made: several arrays may share memory, and compiled code
# may rely on what it holds. DLPack hands their memory out as writable all the same.
_IMMUTABLE = ("jax", "jaxlib", "tensorflow")


def is_numpy(x: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, numpy.ndarray)


def library_of(x: Any) -> str:
    """The name of the package that an array's type is from."""
    return type(x).__module__.partition(".")[0]


def is_jax(x: Any) -> bool:
    return library_of(x) in ("jax", "jaxlib")


class _New:
    """A new array of an immutable library, which nobody else has seen yet, so that it may be written."""

    def __init__(self, array: Any):
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


def check_makes_arrays(
    v: Any, name: str = "v", instead: str = "flash_kda.fwd writes arrays that are given to it"
) -> None:
    """Refuses v if empty_like cannot make an array of its library. instead: what else can be done."""
    device_of(name, v)  # refuses what is no array
    if not is_numpy(v) and not all(hasattr(v, name) for name in ("__array_namespace__", "device", "shape")):
        raise TypeError(
            f"{name} is of type {type(v).__module__}.{type(v).__name__}, of which flash_kda cannot make new "
            f"arrays; {instead}"
        )


def empty_like(v: Any, shape: tuple[int, ...], is_fp32: bool, with_zeros: bool = False) -> tuple[Any, Any]:
    """A new array of v's library on v's device, of v's dtype or fp32, and what fwd takes to write it."""
    make = "zeros" if with_zeros else "empty"
    if is_numpy(v):
        import numpy

        array = getattr(numpy, make)(shape, numpy.float32 if is_fp32 else v.dtype)
        return array, array
    library = v.__array_namespace__()
    array = getattr(library, make)(shape, dtype=library.float32 if is_fp32 else v.dtype, device=v.device)
    return array, _writable(array)


def copy_of(name: str, x: Any) -> tuple[Any, Any]:
    """A copy of the array, and what fwd takes to write it."""
    if is_numpy(x):
        array = x.copy(order="C")
        return array, array
    device_of(name, x)  # refuses what is no array
    if not hasattr(x, "__array_namespace__"):
        raise TypeError(
            f"{name} is of type {type(x).__module__}.{type(x).__name__}, which flash_kda cannot copy"
        )
    array = x.__array_namespace__().asarray(x, copy=True)
    return array, _writable(array)


def _writable(array: Any) -> Any:
    """What fwd takes to write a new array."""
    if library_of(array) not in _IMMUTABLE:
        return array
    if hasattr(array, "block_until_ready"):
        array.block_until_ready()
    return _New(array)


_calls = PreparedCalls()  # of NumPy's own arrays, without subclasses
_describe = attrgetter("__class__", "shape", "strides", "dtype")


def call_c(arrays: list, options: CallOptions, scale: Any, lower_bound: Any) -> None:
    """arrays: the arrays of the call, of any libraries."""
    call = _calls.latest_with.get(options)
    if call is not None and not call.busy and call.fits(*arrays):
        _run(call, arrays, scale, lower_bound)
        return
    numpy = sys.modules.get("numpy")
    if numpy is not None and all(type(x) is numpy.ndarray for x in arrays):
        _prepare_and_run(arrays, options, scale, lower_bound)
    else:
        _read_and_run(arrays, options, scale, lower_bound)


def _matcher(looks: list) -> Callable[..., bool]:
    """A function that says whether arrays look like that."""

    def fits(*arrays: Any) -> bool:
        try:
            return [*map(_describe, arrays)] == looks
        except AttributeError:  # what has no shape is no array
            return False

    return fits


def _prepare_and_run(arrays: list, options: CallOptions, scale: Any, lower_bound: Any) -> None:
    """A call on NumPy arrays that the latest prepared call does not fit: finds or prepares one that fits."""
    looks = [*map(_describe, arrays)]
    key = (options, *looks)
    call = _calls.find(key)
    if call is None:
        views = [
            _read_numpy(name, x, written)
            for name, x, written in zip(options.names, arrays, options.is_written)
        ]
        call = PreparedCall(options, (_lib.CPU, 0), views)
        call.fits = _matcher(looks)
    _calls.keep(key, call)
    _run(call, arrays, scale, lower_bound)


def _run(call: PreparedCall, arrays: list, scale: Any, lower_bound: Any) -> None:
    for i in call.written:
        if not arrays[i].flags.writeable:
            raise _read_only(call.options.names[i])
    # Each capsule is alive while its struct is read.
    pointers = [_interface(capsule, None)[_DATA] for capsule in map(_array_struct, arrays)]
    call.run(pointers, scale, lower_bound)


def _read_and_run(arrays: list, options: CallOptions, scale: Any, lower_bound: Any) -> None:
    """A call on arrays of any libraries."""
    each = [*zip(options.names, arrays, options.is_written)]
    devices = [(name, device_of(name, x, type(options), written)) for name, x, written in each]
    check_devices([(name, _device_text(device)) for name, device in devices])
    device = devices[0][1]
    on_gpu = device[0] == _lib.CUDA
    stream, ordered = _stream(arrays, device[1]) if on_gpu else (None, True)
    # Each owner keeps the memory of its view alive until this function returns.
    views, _owners = zip(*(read(name, x, stream, written) for name, x, written in each))
    call = PreparedCall(options, device, views)
    pointers = [view.pointer for view in views]
    workspace = c_void_p()
    if on_gpu and call.workspace_size:
        _lib.check(
            _lib.lib.flash_kda_malloc(_lib.Device(*device), call.workspace_size, ctypes.byref(workspace))
        )
    try:
        call.run(pointers, scale, lower_bound, stream, workspace.value)
        # Without a framework's allocator the workspace can go back only after the device is done with it.
        if workspace or not ordered:
            _lib.check(_lib.lib.flash_kda_synchronize(_lib.Device(*device), stream))
    finally:
        if workspace:
            _lib.lib.flash_kda_free(_lib.Device(*device), workspace)


def device_of(
    name: str, x: Any, options: type[CallOptions] = Options, written: bool = False
) -> tuple[int, int]:
    """The device of an array, as the library numbers devices. Refuses what is no array, and what may not be
    written though the call writes it. options: of the function that is called."""
    if is_numpy(x):
        return _lib.CPU, 0
    library = library_of(x)
    if library == "jax" and type(x).__name__.endswith("Tracer"):
        raise TypeError(
            f"{name} is a tracer of jax.jit, jax.grad or jax.vmap, which has no memory; "
            f"{options.instead_of_tracer}"
        )
    if library in _IMMUTABLE and written:
        raise ValueError(
            f"{name} is an array of {library.replace('jaxlib', 'jax')}, whose arrays are immutable, and the "
            f"call would write to it; {options.instead_of_immutable}"
        )
    if not hasattr(x, "__dlpack__") or not hasattr(x, "__dlpack_device__"):
        raise TypeError(
            f"{name} is of type {type(x).__module__}.{type(x).__name__}; it must be a PyTorch tensor, "
            "a NumPy array, or an array that has __dlpack__"
        )
    kind, index = x.__dlpack_device__()
    if int(kind) in _CPU_TYPES:
        return _lib.CPU, 0
    if int(kind) in _CUDA_TYPES:
        return _lib.CUDA, int(index)
    raise ValueError(
        f"{name} is on a device of DLPack type {int(kind)}; it must be on the CPU or a CUDA device"
    )


def _device_text(device: tuple[int, int]) -> str:
    return "cpu" if device[0] == _lib.CPU else f"cuda:{device[1]}"


def _stream(arrays, index: int) -> tuple[int, bool]:
    """The stream to work on, and whether the libraries of all arrays order their later work after this
    stream's."""
    modules = {type(x).__module__.partition(".")[0] for x in arrays}
    if "torch" in modules:
        import torch

        return torch.cuda.current_stream(index).cuda_stream or _LEGACY_STREAM, modules == {"torch"}
    if "cupy" in modules:
        import cupy

        with cupy.cuda.Device(index):
            return cupy.cuda.get_current_stream().ptr or _LEGACY_STREAM, modules == {"cupy"}
    return _LEGACY_STREAM, False


def read(name: str, x: Any, stream: int | None, written: bool = False) -> tuple[View, Any]:
    """The view of an array on the CPU or, once the stream may use it, on a GPU, and the object that keeps its
    memory alive. written: whether the call writes the array."""
    return (_read_numpy(name, x, written), x) if is_numpy(x) else _read_dlpack(name, x, stream, written)


def _read_only(name: str) -> ValueError:
    return ValueError(f"{name} is read-only; it must be writable, as the call writes to it")


def _read_numpy(name: str, x: Any, written: bool) -> View:
    if written and not x.flags.writeable:
        raise _read_only(name)
    stride = None
    if not x.flags.c_contiguous:
        if any(step % x.itemsize for step in x.strides):
            raise ValueError(
                f"{name} has strides of {x.strides} bytes; they must be multiples of its {x.itemsize}"
            )
        stride = tuple(step // x.itemsize for step in x.strides)
    # An array in another byte order counts as one of another dtype.
    dtype = _NUMPY_DTYPES.get(x.dtype.name, _lib.OTHER) if x.dtype.isnative else _lib.OTHER
    return View(x.__array_interface__["data"][0], dtype, x.shape, stride)


def _export(name: str, x: Any, stream: int | None, written: bool) -> Any:
    """x.__dlpack__(), with as much of the protocol as its library knows."""
    stream_arg = {} if stream is None else {"stream": stream}
    copy_arg = {"copy": False} if written else {}
    for more in ({"max_version": (1, 0), **copy_arg}, {"max_version": (1, 0)}, {}):
        try:
            return x.__dlpack__(**stream_arg, **more)
        except TypeError as error:
            if not more:
                raise TypeError(f"{name} cannot be read through DLPack: {error}") from error
        except (BufferError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} cannot be read through DLPack: {error}") from error
    raise AssertionError


def _read_dlpack(name: str, x: Any, stream: int | None, written: bool) -> tuple[View, Any]:
    capsule = _export(name, x, stream, written)
    if _is_capsule(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if versioned.major != 1:
            raise ValueError(f"{name} came as DLPack {versioned.major}; it must be version 1 or older")
        tensor = versioned.tensor
        if written and versioned.flags & _READ_ONLY:
            raise _read_only(name)
        if written and versioned.flags & _IS_COPIED:
            raise ValueError(
                f"{name} came as a copy through DLPack; it must share its memory, as the call writes to it"
            )
    elif _is_capsule(capsule, b"dltensor"):
        tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    else:
        raise TypeError(f"{name} has a __dlpack__ that returns no DLPack capsule; it must return one")
    ndim = tensor.ndim
    shape = tuple(tensor.shape[:ndim]) if ndim else ()
    stride = tuple(tensor.strides[:ndim]) if ndim and tensor.strides else None
    dtype = _DLPACK_DTYPES.get((tensor.code, tensor.bits), _lib.OTHER) if tensor.lanes == 1 else _lib.OTHER
    pointer = (tensor.data or 0) + tensor.byte_offset
    # The capsule stays unused, so that its destructor returns the memory to its library.
    return View(pointer, dtype, shape, stride), capsule
