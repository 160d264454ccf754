"""libflashkda through ctypes: what include/flash_kda.h declares, and the exceptions for its errors."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from ctypes import c_char, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any, Callable, NamedTuple

OK, INVALID_VALUE, INVALID_DTYPE, UNAVAILABLE, DEVICE_ERROR, INTERRUPTED = range(6)
BF16, F32, I32, I64, F16, F64, OTHER, BOOL = range(1, 9)
U8 = -1  # of a workspace, which C takes without a dtype
DTYPE_NAMES = dict(
    zip(range(1, 9), ("bfloat16", "float32", "int32", "int64", "float16", "float64", "another type", "bool"))
)
CPU, CUDA = 0, 1
GATE_BOUNDED, GATE_SOFTPLUS, GATE_ACTIVATED = range(3)
BETA_SIGMOID, BETA_TWICE_SIGMOID, BETA_ACTIVATED = range(3)

LIBRARY = "libflashkda.so"


class Device(ctypes.Structure):
    _fields_ = [("type", c_int32), ("index", c_int32)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("ndim", c_int32),
        ("shape", c_int64 * 4),
        ("stride", c_int64 * 4),
    ]


class FwdParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("device", Device),
        ("stream", c_void_p),
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("g", Tensor),
        ("beta", Tensor),
        ("out", Tensor),
        ("A_log", Tensor),
        ("dt_bias", Tensor),
        ("initial_state", Tensor),
        ("final_state", Tensor),
        ("cu_seqlens", Tensor),
        ("scale", c_float),
        ("lower_bound", c_float),
        ("workspace", c_void_p),
        ("workspace_size", c_size_t),
        ("kernel", c_char_p),
        ("cpu_threads", c_int32),
        ("batch_invariant", c_int32),
        ("max_seqlen", c_int64),
        ("cut", c_int32),
        ("reserved", c_int32),
        ("interrupt", c_void_p),
        ("nonfinite", Tensor),
        ("state_indices", Tensor),
        ("has_initial_state", Tensor),
        ("first_slot", c_int64),
        ("checkpoint_states", Tensor),
        ("checkpoint_offsets", Tensor),
        ("checkpoint_indices", Tensor),
        ("checkpoint_starts", Tensor),
        ("checkpoint_every", c_int64),
        ("gate", c_int32),
        ("beta_kind", c_int32),
        ("qk_is_normalised", c_int32),
        ("state_k_first", c_int32),
        ("saved", c_void_p),
        ("saved_size", c_size_t),
    ]


class BwdParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("device", Device),
        ("stream", c_void_p),
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("g", Tensor),
        ("beta", Tensor),
        ("A_log", Tensor),
        ("dt_bias", Tensor),
        ("initial_state", Tensor),
        ("cu_seqlens", Tensor),
        ("dout", Tensor),
        ("dfinal_state", Tensor),
        ("dq", Tensor),
        ("dk", Tensor),
        ("dv", Tensor),
        ("dg", Tensor),
        ("dbeta", Tensor),
        ("dA_log", Tensor),
        ("ddt_bias", Tensor),
        ("dinitial_state", Tensor),
        ("scale", c_float),
        ("lower_bound", c_float),
        ("workspace", c_void_p),
        ("workspace_size", c_size_t),
        ("saved", c_void_p),
        ("saved_size", c_size_t),
        ("kernel", c_char_p),
        ("cpu_threads", c_int32),
        ("gate", c_int32),
        ("beta_kind", c_int32),
        ("qk_is_normalised", c_int32),
        ("state_k_first", c_int32),
        ("batch_invariant", c_int32),
        ("max_seqlen", c_int64),
        ("interrupt", c_void_p),
        ("workspace_limit", c_size_t),
    ]


class Gradients64(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("dq", ctypes.POINTER(c_double)),
        ("dk", ctypes.POINTER(c_double)),
        ("dv", ctypes.POINTER(c_double)),
        ("dg", ctypes.POINTER(c_double)),
        ("dbeta", ctypes.POINTER(c_double)),
        ("dA_log", ctypes.POINTER(c_double)),
        ("ddt_bias", ctypes.POINTER(c_double)),
        ("dinitial_state", ctypes.POINTER(c_double)),
    ]


class MapParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("device", Device),
        ("stream", c_void_p),
        ("k", Tensor),
        ("v", Tensor),
        ("g", Tensor),
        ("beta", Tensor),
        ("A_log", Tensor),
        ("dt_bias", Tensor),
        ("initial_state", Tensor),
        ("cu_seqlens", Tensor),
        ("map", Tensor),
        ("state", Tensor),
        ("workspace", c_void_p),
        ("workspace_size", c_size_t),
        ("kernel", c_char_p),
        ("lower_bound", c_float),
        ("cpu_threads", c_int32),
        ("gate", c_int32),
        ("beta_kind", c_int32),
        ("qk_is_normalised", c_int32),
        ("state_k_first", c_int32),
        ("interrupt", c_void_p),
    ]


class JoinParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("device", Device),
        ("stream", c_void_p),
        ("maps", Tensor),
        ("states", Tensor),
        ("initial_state", Tensor),
        ("entering", Tensor),
        ("final_state", Tensor),
        ("kernel", c_char_p),
        ("backwards", c_int32),
        ("state_k_first", c_int32),
        ("cpu_threads", c_int32),
        ("reserved", c_int32),
    ]


class DecodeParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("device", Device),
        ("stream", c_void_p),
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("g", Tensor),
        ("beta", Tensor),
        ("out", Tensor),
        ("A_log", Tensor),
        ("dt_bias", Tensor),
        ("state", Tensor),
        ("state_indices", Tensor),
        ("num_accepted_tokens", Tensor),
        ("cu_seqlens", Tensor),
        ("parents", Tensor),
        ("records", Tensor),
        ("rounding", Tensor),
        ("scale", c_float),
        ("lower_bound", c_float),
        ("write_states", c_int32),
        ("gate", c_int32),
        ("beta_kind", c_int32),
        ("qk_is_normalised", c_int32),
        ("state_k_first", c_int32),
        ("cpu_threads", c_int32),
        ("first_slot", c_int64),
        ("kernel", c_char_p),
        ("interrupt", c_void_p),
        ("written_states", Tensor),
        ("written_indices", Tensor),
        ("past_records", Tensor),
        ("accepted", Tensor),
    ]


class DecodeLayerParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("device", Device),
        ("stream", c_void_p),
        ("x", Tensor),
        ("weight", Tensor),
        ("bias", Tensor),
        ("conv_state", Tensor),
        ("g", Tensor),
        ("beta", Tensor),
        ("out", Tensor),
        ("A_log", Tensor),
        ("dt_bias", Tensor),
        ("output_gate", Tensor),
        ("norm_weight", Tensor),
        ("state", Tensor),
        ("state_indices", Tensor),
        ("num_accepted_tokens", Tensor),
        ("cu_seqlens", Tensor),
        ("records", Tensor),
        ("conv_windows", Tensor),
        ("rounding", Tensor),
        ("scale", c_float),
        ("lower_bound", c_float),
        ("norm_eps", c_float),
        ("write_states", c_int32),
        ("gate", c_int32),
        ("beta_kind", c_int32),
        ("qk_is_normalised", c_int32),
        ("state_k_first", c_int32),
        ("cpu_threads", c_int32),
        ("reserved", c_int32),
        ("first_slot", c_int64),
        ("kernel", c_char_p),
        ("interrupt", c_void_p),
        ("written_states", Tensor),
        ("written_indices", Tensor),
    ]


class ApplyParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("device", Device),
        ("stream", c_void_p),
        ("records", Tensor),
        ("num_accepted_tokens", Tensor),
        ("accepted", Tensor),
        ("state", Tensor),
        ("state_indices", Tensor),
        ("rounding", Tensor),
        ("state_k_first", c_int32),
        ("cpu_threads", c_int32),
        ("first_slot", c_int64),
        ("kernel", c_char_p),
        ("interrupt", c_void_p),
    ]


class Interpreter(ctypes.Structure):
    _fields_ = [("release", c_void_p), ("acquire", c_void_p), ("handle_signals", c_void_p)]


class DeviceInfo(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("device", Device),
        ("name", c_char * 128),
        ("arch", c_char * 32),
        ("kernel", c_char * 32),
        ("reason", c_char * 256),
        ("units", c_int32),
        ("memory", c_uint64),
    ]


class KernelInfo(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("name", c_char_p),
        ("device_type", c_int32),
        ("archs", c_char_p),
        ("description", c_char_p),
    ]


def beside_package(name: str) -> str | None:
    """The path of a built file in the package's folder, or None. An editable install has two folders."""
    package = importlib.util.find_spec(__name__.rpartition(".")[0])
    for folder in (package and package.submodule_search_locations) or ():
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path
    return None


def _why_not_loaded(path: str, error: str) -> str:
    """A sentence for the loader's error about the library."""
    import platform
    import re

    needed = re.findall(r"version `GLIBC_([0-9.]+)' not found", error)
    if needed:
        newest = max(needed, key=lambda version: [int(number) for number in version.split(".")])
        return (
            f"{path} needs version {newest} of the C library (glibc) or newer, and this system has "
            f"{platform.libc_ver()[1] or 'an older one'}; `pip install .` in the source folder builds the "
            "library for this system"
        )
    if "invalid ELF header" in error or "wrong ELF class" in error or "cannot open shared object" in error:
        system = f"{platform.machine()}, Python of {8 * ctypes.sizeof(c_void_p)} bits"
        return f"{path} cannot be loaded on this system ({system}): {error}"
    return f"{path} cannot be loaded: {error}"


def _load() -> ctypes.CDLL:
    path = beside_package(LIBRARY)
    if path is None:
        raise ImportError(
            f"flash_kda: {LIBRARY} is not beside the package; install it with `pip install .`, or build it "
            "with CMake and put <build folder>/python on PYTHONPATH"
        )
    try:
        lib = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(f"flash_kda: {_why_not_loaded(path, str(error))}") from error
    params = ctypes.POINTER(FwdParams)
    decode_params, apply_params = ctypes.POINTER(DecodeParams), ctypes.POINTER(ApplyParams)
    layer_params, bwd_params = ctypes.POINTER(DecodeLayerParams), ctypes.POINTER(BwdParams)
    map_params, join_params = ctypes.POINTER(MapParams), ctypes.POINTER(JoinParams)
    signatures = {
        "flash_kda_fwd": [params],
        "flash_kda_fwd_workspace_size": [params, ctypes.POINTER(c_size_t)],
        "flash_kda_fwd_saved_size": [params, ctypes.POINTER(c_size_t)],
        "flash_kda_explain": [params, c_char_p, c_size_t],
        "flash_kda_reference": [params, *[ctypes.POINTER(c_double)] * 3],
        "flash_kda_bwd": [bwd_params],
        "flash_kda_bwd_workspace_size": [bwd_params, ctypes.POINTER(c_size_t)],
        "flash_kda_bwd_reference": [bwd_params, ctypes.POINTER(Gradients64)],
        "flash_kda_map": [map_params],
        "flash_kda_map_workspace_size": [map_params, ctypes.POINTER(c_size_t)],
        "flash_kda_map_reference": [map_params, *[ctypes.POINTER(c_double)] * 2],
        "flash_kda_join": [join_params],
        "flash_kda_check_join": [join_params],
        "flash_kda_explain_decode": [decode_params, c_char_p, c_size_t],
        "flash_kda_explain_decode_layer": [layer_params, c_char_p, c_size_t],
        "flash_kda_explain_apply": [apply_params, c_char_p, c_size_t],
        "flash_kda_decode": [decode_params],
        "flash_kda_check_decode": [decode_params],
        "flash_kda_decode_reference": [decode_params, *[ctypes.POINTER(c_double)] * 2],
        "flash_kda_decode_layer": [layer_params],
        "flash_kda_check_decode_layer": [layer_params],
        "flash_kda_decode_layer_reference": [layer_params, *[ctypes.POINTER(c_double)] * 2],
        "flash_kda_apply": [apply_params],
        "flash_kda_check_apply": [apply_params],
        "flash_kda_list_devices": [
            ctypes.POINTER(DeviceInfo),
            c_int32,
            ctypes.POINTER(c_int32),
            ctypes.POINTER(c_char_p),
        ],
        "flash_kda_list_kernels": [ctypes.POINTER(KernelInfo), c_int32, ctypes.POINTER(c_int32)],
        "flash_kda_malloc": [Device, c_size_t, ctypes.POINTER(c_void_p)],
        "flash_kda_free": [Device, c_void_p],
        "flash_kda_synchronize": [Device, c_void_p],
    }
    for name, argtypes in signatures.items():
        function = getattr(lib, name)
        function.argtypes = argtypes
        function.restype = ctypes.c_int
    for name in ("flash_kda_version", "flash_kda_last_error"):
        getattr(lib, name).restype = c_char_p
    return lib


lib = _load()

# The functions ..._for() are called with Python's lock held, unlike those of `lib`. They wait for the work in
# C, and give the lock up during the wait.
_calls_of_the_interpreter = ctypes.PyDLL(lib._name)


def with_signals(name: str) -> Callable[..., int]:
    """The variant of a function of C that lets Python handle signals while it computes: see
    flash_kda_fwd_for() in the header. It raises the exception that a handler has raised."""
    function = getattr(_calls_of_the_interpreter, name + "_for")
    function.argtypes = [ctypes.POINTER(Interpreter), *getattr(lib, name).argtypes]
    function.restype = ctypes.c_int
    names = ("PyEval_SaveThread", "PyEval_RestoreThread", "PyErr_CheckSignals")
    interpreter = Interpreter(*(ctypes.cast(getattr(ctypes.pythonapi, x), c_void_p) for x in names))
    return functools.partial(function, ctypes.byref(interpreter))


# What a sentence says of C, and what it says in Python.
_IN_PYTHON = (
    ("it must be NULL or", "it must be None or"),
    ("is null; it must point to its", "has no memory; it must have its"),
    ("must be absent", "must be None"),
    ("is absent; it must be given", "is None; it must be given"),
    *((f"FLASH_KDA_WRITE_{name.upper()}", f'write_states="{name}"') for name in ("last", "none", "each")),
    ("checkpoint_every = 0", "checkpoint_every=None"),
    ("workspace_size is", "workspace has"),
    ("saved_size is", "saved has"),
    ("are all absent", "are all None"),
)


def last_error(status: int) -> Exception:
    """The exception for a status of the C library, with its sentence."""
    kind = {INVALID_VALUE: ValueError, INVALID_DTYPE: TypeError}.get(status, RuntimeError)
    # C cuts a long name of a kernel at a byte, which may be inside of a character of UTF-8.
    sentence = lib.flash_kda_last_error().decode(errors="replace")
    for c, python in _IN_PYTHON:
        sentence = sentence.replace(c, python)
    return kind(sentence)


def check(status: int) -> None:
    if status:
        raise last_error(status)


def version() -> str:
    return lib.flash_kda_version().decode()


def device_infos() -> list[DeviceInfo]:
    count = c_int32()
    check(lib.flash_kda_list_devices(None, 0, ctypes.byref(count), None))
    infos = (DeviceInfo * count.value)()
    for info in infos:
        info.struct_size = ctypes.sizeof(DeviceInfo)
    check(lib.flash_kda_list_devices(infos, len(infos), ctypes.byref(count), None))
    return list(infos)


def kernel_infos() -> list[KernelInfo]:
    count = c_int32()
    check(lib.flash_kda_list_kernels(None, 0, ctypes.byref(count)))
    infos = (KernelInfo * count.value)()
    for info in infos:
        info.struct_size = ctypes.sizeof(KernelInfo)
    check(lib.flash_kda_list_kernels(infos, len(infos), ctypes.byref(count)))
    return list(infos)


def _size(of: Any, params: Any) -> int:
    size = c_size_t()
    check(of(ctypes.byref(params), ctypes.byref(size)))
    return size.value


def workspace_size(params: FwdParams) -> int:
    return _size(lib.flash_kda_fwd_workspace_size, params)


def saved_size(params: FwdParams) -> int:
    return _size(lib.flash_kda_fwd_saved_size, params)


def bwd_workspace_size(params: BwdParams) -> int:
    return _size(lib.flash_kda_bwd_workspace_size, params)


def map_workspace_size(params: MapParams) -> int:
    return _size(lib.flash_kda_map_workspace_size, params)


def explain(params: Any, name: str = "flash_kda_explain") -> str:
    """What the function with that name says of a call with the struct."""
    text = ctypes.create_string_buffer(1200)
    check(getattr(lib, name)(ctypes.byref(params), text, len(text)))
    return text.value.decode()


class Function(NamedTuple):
    """A function of C that takes arrays."""

    params: Any  # its struct
    call: Any  # the function itself
    #: Checks all that needs no memory, and returns how many bytes of workspace the function needs.
    workspace_size: Callable[[Any], int]

    def new_params(self) -> Any:
        params = self.params()
        params.struct_size = ctypes.sizeof(self.params)
        return params


def _without_workspace(check_shapes: Any) -> Callable[[Any], int]:
    def workspace_size(params: Any) -> int:
        check(check_shapes(ctypes.byref(params)))
        return 0

    return workspace_size


def _function(name: str, params: Any, workspace_size: Callable[[Any], int]) -> Function:
    """The function flash_kda_<name>. Its `call` is an object of its own that does not check the type of its
    argument, which takes longer than the rest of what ctypes does: its callers pass a reference to such a
    struct, and nothing else."""
    return Function(params, lib[f"flash_kda_{name}"], workspace_size)


FWD = _function("fwd", FwdParams, workspace_size)
BWD = _function("bwd", BwdParams, bwd_workspace_size)
MAP = _function("map", MapParams, map_workspace_size)
JOIN = _function("join", JoinParams, _without_workspace(lib.flash_kda_check_join))
DECODE = _function("decode", DecodeParams, _without_workspace(lib.flash_kda_check_decode))
DECODE_LAYER = _function(
    "decode_layer", DecodeLayerParams, _without_workspace(lib.flash_kda_check_decode_layer)
)
APPLY = _function("apply", ApplyParams, _without_workspace(lib.flash_kda_check_apply))


def set_shape(tensor: Tensor, dtype: int, shape, stride=None) -> None:
    """Fills in all but the pointer. More than 4 dimensions are only counted: the library refuses them."""
    tensor.dtype = dtype
    tensor.ndim = len(shape)
    tensor.shape[: min(4, len(shape))] = shape[:4]
    if stride is None:
        stride = row_major(shape)
    tensor.stride[: min(4, len(stride))] = stride[:4]


def row_major(shape) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))
