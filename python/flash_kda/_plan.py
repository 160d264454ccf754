"""A call's arguments, filled in once and reused.

Checking shapes and filling a struct from Python takes longer than the rest of a call. A Plan holds the
filled flash_kda_fwd_params of one combination of shapes, dtypes and device; a repeated call only sets what
may differ: pointers, scale, lower_bound, stream and workspace. The C library checks all of it every time.
Whether a plan fits is decided by what the arrays look like at the time of the call, never by which objects
they are: an array may be resized, moved or retyped in place.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_float, c_void_p
from typing import Any, Callable

from . import _lib

# An optional tensor that is absent is null in C. One that is present but empty (which is an error: no
# optional tensor may be) must not look absent, so it gets an address that is never read.
_EMPTY_BUT_PRESENT = 64


class Scratch(threading.local):
    """Workspace in CPU memory that a thread keeps for its next call: who holds it, and where it starts."""

    block: tuple[Any, int | None] = (None, None)
    size = 0

    def reserve(self, size: int) -> tuple[Any, int | None]:
        if size > self.size:
            memory = ctypes.create_string_buffer(size + 63)
            self.block = memory, (ctypes.addressof(memory) + 63) & ~63
            self.size = size
        return self.block


scratch = Scratch()


_REQUIRED, _OPTIONAL = _lib.TENSOR_FIELDS[:8], _lib.TENSOR_FIELDS[8:]
OUT, A_LOG, DT_BIAS = 5, 6, 7  # where they are among a call's arrays

# What a call asks for apart from its arrays and numbers: for each optional array whether it is given, then
# kernel, threads, batch_invariant, max_seqlen, each of the last three with its type, since 2 == 2.0 and True == 1.
Options = tuple


def names(options: Options) -> list[str]:
    """Of the arrays of a call, in its order."""
    return [*_REQUIRED, *(name for name, given in zip(_OPTIONAL, options) if given)]


class Plan:
    __slots__ = (
        "bound",
        "busy",
        "device_index",
        "fits",
        "on_gpu",
        "options",
        "params",
        "ref",
        "scale",
        "stream",
        "views",
        "workspace",
        "workspace_size",
    )

    def __init__(self, device: tuple[int, int], tensors, options: Options):
        """tensors: for each that is given (name, pointer, dtype, shape, strides or None if contiguous)."""
        params = _lib.new_params()
        params.device.type, params.device.index = device
        self.on_gpu, self.device_index = device[0] == _lib.CUDA, device[1]
        self.busy = False
        self.options = options
        # Whether other arrays look like those it was made for.
        self.fits: Callable[[list], bool] = lambda arrays: False
        kernel, threads, _, batch_invariant, _, max_seqlen, _ = options[3:]
        params.kernel = kernel_name(kernel)
        params.cpu_threads = threads
        params.batch_invariant = batch_invariant
        params.max_seqlen = max_seqlen
        self.params = params
        self.ref = ctypes.byref(params)
        self.views = []
        for name, pointer, dtype, shape, stride in tensors:
            tensor = getattr(params, name)
            _lib.set_shape(tensor, dtype, shape, stride)
            tensor.data = pointer
            if not pointer and name in ("initial_state", "final_state", "cu_seqlens"):
                tensor.data = _EMPTY_BUT_PRESENT
            self.views.append(self._view(c_void_p, name))
        self.scale = self._view(c_float, "scale")
        self.bound = self._view(c_float, "lower_bound")
        self.stream = self._view(c_void_p, "stream")
        self.workspace = self._view(c_void_p, "workspace")
        self.workspace_size = _lib.workspace_size(params)
        params.workspace_size = self.workspace_size

    def _view(self, kind, field: str):
        """Access to one field without going through the struct: half the time."""
        return kind.from_buffer(self.params, getattr(_lib.FwdParams, field).offset)

    def run(self, pointers, scale, lower_bound) -> None:
        """On the CPU; on a GPU stream and workspace are set before."""
        if not self.on_gpu:
            _memory, self.workspace.value = scratch.reserve(self.workspace_size)
        for view, pointer in zip(self.views, pointers):
            view.value = pointer
        try:
            self.scale.value = scale
            self.bound.value = lower_bound
        except (TypeError, ValueError, OverflowError):
            check_numbers(scale, lower_bound)
            raise
        status = _fwd(self.ref)
        if status:
            raise _lib.last_error(status)


_fwd = _lib.lib.flash_kda_fwd


class Plans(threading.local):
    """A thread's plans, since a plan holds one call's pointers."""

    latest: Plan | None = None

    def __init__(self) -> None:
        self.known: dict[tuple, Plan] = {}

    def fitting(self, arrays: list, options: Options) -> Plan | None:
        """The latest plan, if it can be used again."""
        plan = self.latest
        if plan is None or plan.busy or plan.options != options or not plan.fits(arrays):
            return None
        return plan

    def find(self, key: tuple) -> Plan | None:
        plan = self.known.get(key)
        return None if plan is None or plan.busy else plan

    def keep(self, key: tuple, plan: Plan) -> None:
        if len(self.known) >= _MAX_PLANS:
            self.known.clear()
        self.known[key] = self.latest = plan


_MAX_PLANS = 256


# Of numbers and options only what C cannot tell is checked: the types.


def check_numbers(scale, lower_bound) -> None:
    for name, value in (("scale", scale), ("lower_bound", lower_bound)):
        try:
            c_float(value)
        except (TypeError, ValueError):  # ValueError: a tensor of several
            raise TypeError(f"{name} is of type {type(value).__name__}; it must be a number") from None
        except OverflowError:
            raise ValueError(f"{name} is an int too large for a float; it must be finite") from None


def check_options(options: Options) -> None:
    kernel, threads, _, batch_invariant, _, max_seqlen, _ = options[3:]
    if kernel is not None and not isinstance(kernel, str):
        raise TypeError(f"kernel is of type {type(kernel).__name__}; it must be a string or None")
    if not isinstance(threads, int):
        raise TypeError(f"threads is of type {type(threads).__name__}; it must be an int")
    if not 0 <= threads < 2**31:
        raise ValueError(f"threads is {threads}; it must be 0 (all) or more, and fit 32 bits")
    checked_flag("batch_invariant", batch_invariant)
    checked_max_seqlen(max_seqlen)


def checked_max_seqlen(value: Any) -> int:
    """That it is at most T is for C to check."""
    if not isinstance(value, int):
        raise TypeError(f"max_seqlen is of type {type(value).__name__}; it must be an int")
    if not 0 <= value < 2**63:
        raise ValueError(f"max_seqlen is {value}; it must be 0 (not known) or more, and fit 64 bits")
    return value


def checked_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is of type {type(value).__name__}; it must be True or False")
    return value


def kernel_name(kernel: str | None) -> bytes | None:
    """A character that C cannot read makes it a name that no kernel has."""
    return None if kernel is None else kernel.encode(errors="replace").replace(b"\0", b"?")


def check_devices(devices: list[tuple[str, str]]) -> None:
    """devices: (argument, its device as text) in the order of the call."""
    first_name, first = devices[0]
    for name, device in devices[1:]:
        if device != first:
            raise ValueError(
                f"{name} is on {device} and {first_name} on {first}; all tensors must be on one device"
            )
