"""Arrays of any library: NumPy's own interface, and DLPack for all others."""

from __future__ import annotations

import ctypes
import functools
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
from typing import Any, Callable, NamedTuple

from . import _lib
from ._plan import OUT, Options, Plan, Plans, check_devices, check_numbers, check_options, names

_WRITTEN = ("out", "final_state")


class Array(NamedTuple):
    """Where an array is and what it looks like."""

    pointer: int
    dtype: int
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None  # in elements; None if contiguous
    device: tuple[int, int]
    owner: Any  # keeps the memory alive


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
}
_NUMPY_DTYPES = {
    "bfloat16": _lib.BF16,
    "float32": _lib.F32,
    "int32": _lib.I32,
    "int64": _lib.I64,
    "float16": _lib.F16,
    "float64": _lib.F64,
}

_is_capsule = ctypes.pythonapi.PyCapsule_IsValid
_is_capsule.argtypes = [py_object, c_char_p]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
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


# An _ArrayInterface as a row of pointers, of which one is read: half the time of reading a field.
_interface = ctypes.pythonapi["PyCapsule_GetPointer"]
_interface.argtypes = [py_object, c_void_p]
_interface.restype = POINTER(c_void_p)
_DATA = _ArrayInterface.data.offset // ctypes.sizeof(c_void_p)
_array_struct = attrgetter("__array_struct__")


def is_numpy(x: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, numpy.ndarray)


_plans = Plans()  # of NumPy's own arrays, without subclasses
_describe = attrgetter("__class__", "shape", "strides", "dtype")


def fwd(arrays: list, options: Options, scale, lower_bound) -> None:
    """arrays: those that are given, in the order of TENSOR_FIELDS."""
    plan = _plans.fitting(arrays, options)
    if plan is None:
        check_numbers(scale, lower_bound)
        check_options(options)
        numpy = sys.modules.get("numpy")
        if numpy is None or not all(type(x) is numpy.ndarray for x in arrays):
            _fwd_once(arrays, options, scale, lower_bound)
            return
        plan = _find_plan(arrays, options)
    plan.busy = True
    try:
        if not arrays[OUT].flags.writeable:
            raise _read_only("out")
        if options[1] and not arrays[8 + options[0]].flags.writeable:
            raise _read_only("final_state")
        # A capsule must outlive the reading of its struct.
        pointers = [_interface(capsule, None)[_DATA] for capsule in map(_array_struct, arrays)]
        plan.run(pointers, scale, lower_bound)
    finally:
        plan.busy = False


def _find_plan(arrays: list, options: Options) -> Plan:
    looks = [*map(_describe, arrays)]
    key = (options, *looks)
    plan = _plans.find(key)
    if plan is None:
        views = [(name, _read_numpy(name, x)) for name, x in zip(names(options), arrays)]
        plan = Plan((_lib.CPU, 0), [(name, *a[:4]) for name, a in views], options)
        plan.fits = _matcher(looks)
    _plans.keep(key, plan)
    return plan


def _matcher(looks: list) -> Callable[[list], bool]:
    def fits(arrays: list) -> bool:
        try:
            return [*map(_describe, arrays)] == looks
        except AttributeError:  # what has no shape is no array
            return False

    return fits


def _fwd_once(arrays: list, options: Options, scale, lower_bound) -> None:
    """Of any libraries: what it reads is not kept."""
    named = dict(zip(names(options), arrays))
    devices = {name: device_of(name, x) for name, x in named.items()}
    check_devices([(name, _device_text(device)) for name, device in devices.items()])
    device = devices["q"]
    on_gpu = device[0] == _lib.CUDA
    stream, ordered = _stream(arrays, device[1]) if on_gpu else (None, True)
    views = {name: read(name, x, stream) for name, x in named.items()}
    fields = [(name, a.pointer, a.dtype, a.shape, a.stride) for name, a in views.items()]
    plan = Plan(device, fields, options)
    run = functools.partial(plan.run, [a.pointer for a in views.values()], scale, lower_bound)
    if not on_gpu:
        run()
        return
    plan.stream.value = stream
    if plan.workspace_size:
        _run_with_workspace(plan, run, _lib.Device(*device), stream)
    else:
        run()
    if not ordered:
        _lib.check(_lib.lib.flash_kda_synchronize(_lib.Device(*device), stream))


def _run_with_workspace(plan: Plan, run: Callable[[], None], device: _lib.Device, stream: int | None) -> None:
    """Without a framework's allocator the memory can go back only after the device is done with it."""
    memory = c_void_p()
    _lib.check(_lib.lib.flash_kda_malloc(device, plan.workspace_size, ctypes.byref(memory)))
    try:
        plan.workspace.value = memory.value
        run()
        _lib.check(_lib.lib.flash_kda_synchronize(device, stream))
    finally:
        _lib.lib.flash_kda_free(device, memory)


def device_of(name: str, x: Any) -> tuple[int, int]:
    if is_numpy(x):
        return _lib.CPU, 0
    if not hasattr(x, "__dlpack__") or not hasattr(x, "__dlpack_device__"):
        raise TypeError(
            f"{name} is of type {type(x).__module__}.{type(x).__name__}; it must be a PyTorch tensor, a NumPy array, "
            "or an array that has __dlpack__"
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
    """The stream to work on, and whether the arrays' libraries order their own later work after it."""
    modules = {type(x).__module__.partition(".")[0] for x in arrays}
    if "torch" in modules:
        import torch

        return torch.cuda.current_stream(index).cuda_stream or _LEGACY_STREAM, modules == {"torch"}
    if "cupy" in modules:
        import cupy

        with cupy.cuda.Device(index):
            return cupy.cuda.get_current_stream().ptr or _LEGACY_STREAM, modules == {"cupy"}
    return _LEGACY_STREAM, False


def read(name: str, x: Any, stream: int | None) -> Array:
    return _read_numpy(name, x) if is_numpy(x) else _read_dlpack(name, x, stream)


def _read_only(name: str) -> ValueError:
    return ValueError(f"{name} is read-only; it must be writable, as the call writes to it")


def _read_numpy(name: str, x: Any) -> Array:
    if name in _WRITTEN and not x.flags.writeable:
        raise _read_only(name)
    stride = None
    if not x.flags.c_contiguous:
        if any(step % x.itemsize for step in x.strides):
            raise ValueError(
                f"{name} has strides of {x.strides} bytes; they must be multiples of its {x.itemsize}"
            )
        stride = tuple(step // x.itemsize for step in x.strides)
    # Another byte order is another type.
    dtype = _NUMPY_DTYPES.get(x.dtype.name, _lib.OTHER) if x.dtype.isnative else _lib.OTHER
    return Array(x.__array_interface__["data"][0], dtype, x.shape, stride, (_lib.CPU, 0), x)


def _export(name: str, x: Any, stream: int | None) -> Any:
    """x.__dlpack__(), with as much of the protocol as its library knows."""
    stream_arg = {} if stream is None else {"stream": stream}
    copy_arg = {"copy": False} if name in _WRITTEN else {}
    for more in ({"max_version": (1, 0), **copy_arg}, {"max_version": (1, 0)}, {}):
        try:
            return x.__dlpack__(**stream_arg, **more)
        except TypeError as error:
            if not more:
                raise TypeError(f"{name} cannot be read through DLPack: {error}") from error
        except (BufferError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} cannot be read through DLPack: {error}") from error
    raise AssertionError


def _read_dlpack(name: str, x: Any, stream: int | None) -> Array:
    capsule = _export(name, x, stream)
    if _is_capsule(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if versioned.major != 1:
            raise ValueError(f"{name} came as DLPack {versioned.major}; it must be version 1 or older")
        tensor = versioned.tensor
        if name in _WRITTEN and versioned.flags & _READ_ONLY:
            raise _read_only(name)
        if name in _WRITTEN and versioned.flags & _IS_COPIED:
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
    kind = _lib.CPU if tensor.device_type in _CPU_TYPES else _lib.CUDA
    dtype = _DLPACK_DTYPES.get((tensor.code, tensor.bits), _lib.OTHER) if tensor.lanes == 1 else _lib.OTHER
    pointer = (tensor.data or 0) + tensor.byte_offset
    # Left as it is, the capsule returns the memory to its library when it goes.
    return Array(pointer, dtype, shape, stride, (kind, tensor.device_id if kind else 0), capsule)
