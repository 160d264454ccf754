"""Arrays of any library: NumPy's own interface, and DLPack for all others."""

from __future__ import annotations

import ctypes
import sys
from ctypes import (
    POINTER,
    c_char_p,
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
from threading import get_ident
from typing import Any, NamedTuple

from . import _lib
from ._plan import Plan, check_devices, check_options, scratch

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


def is_numpy(x: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, numpy.ndarray)


def fwd(arrays: dict[str, Any], scale, lower_bound, kernel, threads) -> None:
    """arrays: those that are present, by name, in the order of TENSOR_FIELDS."""
    check_options(scale, lower_bound, kernel, threads)
    if all(map(is_numpy, arrays.values())):
        _numpy_fwd(arrays, scale, lower_bound, kernel, threads)
        return
    devices = {name: device_of(name, x) for name, x in arrays.items()}
    check_devices([(name, _device_text(device)) for name, device in devices.items()])
    device = devices["q"]
    on_gpu = device[0] == _lib.CUDA
    stream, ordered = _stream(arrays.values(), device[1]) if on_gpu else (None, True)
    views = {name: read(name, x, stream) for name, x in arrays.items()}
    fields = [(name, a.pointer, a.dtype, a.shape, a.stride) for name, a in views.items()]
    plan = Plan(device, fields, kernel, threads)
    plan.fill([a.pointer for a in views.values()], scale, lower_bound)
    if not on_gpu:
        plan.workspace.value = scratch.address(plan.workspace_size)
        plan.run()
        return
    plan.stream.value = stream
    if plan.workspace_size:
        _run_with_workspace(plan, _lib.Device(*device), stream)
    else:
        plan.run()
    if not ordered:
        _lib.check(_lib.lib.flash_kda_synchronize(_lib.Device(*device), stream))


# By thread, since a plan holds one call's pointers.
_numpy_plans: dict[tuple, Plan] = {}
_MAX_PLANS = 256
_describe = attrgetter("shape", "strides", "dtype")


def _numpy_fwd(arrays, scale, lower_bound, kernel, threads) -> None:
    key = (get_ident(), kernel, threads, *arrays, *map(_describe, arrays.values()))
    plan = _numpy_plans.get(key)
    if plan is None or plan.busy:
        views = {name: _read_numpy(name, x) for name, x in arrays.items()}
        fields = [(name, a.pointer, a.dtype, a.shape, a.stride) for name, a in views.items()]
        plan = Plan((_lib.CPU, 0), fields, kernel, threads)
        if len(_numpy_plans) >= _MAX_PLANS:
            _numpy_plans.clear()
        _numpy_plans[key] = plan
    plan.busy = True
    try:
        pointers = []
        for name, x in arrays.items():
            pointer, read_only = x.__array_interface__["data"]
            if read_only and name in _WRITTEN:
                raise _read_only(name)
            pointers.append(pointer)
        plan.fill(pointers, scale, lower_bound)
        plan.workspace.value = scratch.address(plan.workspace_size)
        plan.run()
    finally:
        plan.busy = False


def _run_with_workspace(plan: Plan, device: _lib.Device, stream: int | None) -> None:
    """Without a framework's allocator the memory can go back only after the device is done with it."""
    memory = c_void_p()
    _lib.check(_lib.lib.flash_kda_malloc(device, plan.workspace_size, ctypes.byref(memory)))
    try:
        plan.workspace.value = memory.value
        plan.run()
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
