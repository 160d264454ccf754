"""A call's arguments, filled in once and reused.

Checking shapes and filling a struct from Python takes longer than the rest of a call. A Plan holds the
filled flash_kda_fwd_params of one combination of shapes, dtypes and device; a repeated call only sets what
may differ: pointers, scale, lower_bound, stream and workspace. The C library checks all of it every time.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_float, c_void_p
from typing import Any

from . import _lib

# An optional tensor that is absent is null in C. One that is present but empty (which is an error: no
# optional tensor may be) must not look absent, so it gets an address that is never read.
_EMPTY_BUT_PRESENT = 64


class _Scratch(threading.local):
    """Workspace in CPU memory that a thread keeps for its next call."""

    memory: Any = None
    size = 0
    start: int | None = None

    def address(self, size: int) -> int | None:
        if size > self.size:
            self.memory = ctypes.create_string_buffer(size + 63)
            self.start = (ctypes.addressof(self.memory) + 63) & ~63
            self.size = size
        return self.start


scratch = _Scratch()


class Plan:
    __slots__ = (
        "bound",
        "busy",
        "device_index",
        "matches",
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

    def __init__(self, device: tuple[int, int], tensors, kernel: str | None, threads: int):
        """tensors: for each that is present (name, pointer, dtype, shape, strides or None if contiguous)."""
        params = _lib.new_params()
        params.device.type, params.device.index = device
        self.on_gpu, self.device_index = device[0] == _lib.CUDA, device[1]
        self.busy = False
        self.options: tuple = ()
        self.matches: Any = None
        params.kernel = kernel.encode() if kernel is not None else None
        params.cpu_threads = threads
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

    def fill(self, pointers, scale, lower_bound) -> None:
        for view, pointer in zip(self.views, pointers):
            view.value = pointer
        try:
            self.scale.value = scale
            self.bound.value = lower_bound
        except TypeError:
            check_options(scale, lower_bound, None, 0)
            raise

    def run(self) -> None:
        status = _lib.lib.flash_kda_fwd(self.ref)
        if status:
            raise _lib.last_error(status)


def check_options(scale, lower_bound, kernel, threads) -> None:
    """Only what C cannot tell: the types."""
    for name, value in (("scale", scale), ("lower_bound", lower_bound)):
        try:
            c_float(value)
        except TypeError:
            raise TypeError(f"{name} is of type {type(value).__name__}; it must be a number") from None
    if kernel is not None and not isinstance(kernel, str):
        raise TypeError(f"kernel is of type {type(kernel).__name__}; it must be a string or None")
    if not isinstance(threads, int):
        raise TypeError(f"threads is of type {type(threads).__name__}; it must be an int")
    if not -(2**31) <= threads < 2**31:
        raise ValueError(f"threads is {threads}; it must be 0 (all) or more, and fit 32 bits")


def check_devices(devices: list[tuple[str, str]]) -> None:
    """devices: (argument, its device as text) in the order of the call."""
    first_name, first = devices[0]
    for name, device in devices[1:]:
        if device != first:
            raise ValueError(
                f"{name} is on {device} and {first_name} on {first}; all tensors must be on one device"
            )
