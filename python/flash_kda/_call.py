"""Prepared calls: the C library's argument struct, filled in once and reused.

Checking shapes and filling a struct from Python takes longer than the rest of a call. A prepared call
therefore keeps the filled struct of one combination of function, options, shapes, dtypes and device. A call
of the same combination only sets what may differ: pointers, scale, lower_bound, stream and workspace.
The C library checks all of the struct every time. Whether a prepared call fits is decided by what the arrays
look like at the time of the call, never by which objects they are, since an array may be resized, moved or
retyped in place.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Iterable
from ctypes import c_float, c_void_p
from typing import Any, Callable, NamedTuple

from . import _interruptible, _lib
from ._call_options import CallOptions

# C takes an optional tensor with a null pointer for an absent one. An optional array that is present but
# empty is an error, so it must not look absent: it gets this address, which is never read.
_EMPTY_BUT_PRESENT = 64

# Tokens of a head, for each thread, from which on a call on the CPU counts as long. A CPU with AVX-512
# computes them in 10 ms, of which starting a thread is a hundredth, and a slow CPU in 80 ms.
_LONG_TOKENS = 8000


class Work(NamedTuple):
    """What a call computes."""

    rows: int  # of the batch; without cu_seqlens they are the sequences
    tokens: int  # of all rows
    heads: int


def _work_of_v(params: Any) -> Work:
    rows, tokens, heads = params.v.shape[:3]
    return Work(rows, rows * tokens, heads)


def _work_of_layer(params: Any) -> Work:
    sizes = params.x.shape[: params.x.ndim]
    return Work(sizes[0], math.prod(sizes[:-1]), sizes[-1] // (3 * 128))


def _work_of_records(params: Any) -> Work:
    rows, tokens, heads = params.records.shape[:3]
    return Work(rows, rows * tokens, heads)


class LongCalls(NamedTuple):
    """How long calls of a function are made, and what tells that a call is long."""

    call: Callable[[Any], None]
    work: Callable[[Any], Work]
    tokens_of_a_state: int  # that take as long as a state that is read and written


# By the functions' operators. Other functions have no long calls.
_LONG = {
    "fwd": LongCalls(_interruptible.fwd, _work_of_v, 16),
    "bwd": LongCalls(_interruptible.bwd, _work_of_v, 16),
    "decode": LongCalls(_interruptible.decode, _work_of_v, 5),
    "decode_layer": LongCalls(_interruptible.decode_layer, _work_of_layer, 5),
    "apply_records": LongCalls(_interruptible.apply_records, _work_of_records, 5),
    "affine_map": LongCalls(_interruptible.affine_map, _work_of_v, 16),
}


class View(NamedTuple):
    """An array as C sees it."""

    pointer: int
    dtype: int
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None  # in elements; None: contiguous


class Scratch(threading.local):
    """The CPU workspace that a thread keeps for its next call."""

    size_bytes = 0
    block: tuple[Any, int | None] = (None, None)  # who keeps the memory alive, and where the workspace starts

    def grow(self, size_bytes: int) -> None:
        memory = ctypes.create_string_buffer(size_bytes + 63)
        self.block = memory, (ctypes.addressof(memory) + 63) & ~63
        self.size_bytes = size_bytes

    def take(self, size_bytes: int) -> tuple[Any, int | None]:
        """The block, of at least that size, which the thread's next call will not find here."""
        if self.size_bytes < size_bytes:
            self.grow(size_bytes)
        block = self.block
        self.size_bytes, self.block = 0, (None, None)
        return block

    def give_back(self, block: tuple[Any, int | None]) -> None:
        size_bytes = ctypes.sizeof(block[0]) - 63
        if self.size_bytes < size_bytes:
            self.block, self.size_bytes = block, size_bytes


_scratch = Scratch()


class PreparedCall:
    """A filled struct. It holds the pointers of one call at a time, so each thread prepares its own calls."""

    __slots__ = (
        "busy",
        "call_long",
        "device_index",
        "fits",
        "function",
        "is_long",
        "lower_bound",
        "numbers",
        "on_gpu",
        "options",
        "params",
        "pick_written",
        "pointers",
        "reference",
        "scale",
        "stream",
        "workspace",
        "workspace_size",
        "written",
    )

    def __init__(self, options: CallOptions, device: tuple[int, int], views: Iterable[View]):
        """views: of the arrays of the call, in their order."""
        params = options.function.new_params()
        params.device.type, params.device.index = device
        options.apply_to(params)
        self.on_gpu, self.device_index = device[0] == _lib.CUDA, device[1]
        self.options, self.function = options, options.function.call
        self.written, self.pick_written = options.written, options.pick_written
        self.busy = False  # True while run() runs
        # Whether arrays, passed one by one, look like the ones the call was prepared for.
        self.fits: Callable[..., bool] = lambda *arrays: False
        self.params = params
        self.reference = ctypes.byref(params)
        self.pointers = []
        given_bytes = None  # of a workspace that the caller gives
        for name, view in zip(options.names, views):
            if name in ("workspace", "saved"):
                size_bytes = _bytes_of(name, view)
                if name == "workspace":
                    given_bytes = size_bytes
                else:
                    params.saved_size = size_bytes
                self.pointers.append(self._field(c_void_p, name))
                continue
            if name in ("records", "past_records"):
                view = flat_records(name, view)
            tensor = getattr(params, name)
            dtype = _lib.OTHER if view.dtype == _lib.U8 else view.dtype
            _lib.set_shape(tensor, dtype, view.shape, view.stride)
            tensor.data = view.pointer
            if not view.pointer and name in options.optional_arrays:
                tensor.data = _EMPTY_BUT_PRESENT
            self.pointers.append(self._field(c_void_p, name))
        # scale and lower_bound as they are in the struct, if they are numbers that cannot change in place.
        self.numbers: tuple[Any, Any] = (None, None)
        self.scale = self._field(c_float, "scale")
        self.lower_bound = self._field(c_float, "lower_bound")
        self.stream = self._field(c_void_p, "stream")
        self.workspace = self._field(c_void_p, "workspace")
        bytes_needed = options.function.workspace_size(params)  # which checks all shapes and options too
        # Bytes that run() needs from its caller, or on the CPU from the thread.
        self.workspace_size = bytes_needed if given_bytes is None else 0
        params.workspace_size = bytes_needed if given_bytes is None else given_bytes
        long = _LONG.get(options.operator)
        self.is_long = long is not None and not self.on_gpu and _is_long(params, long)
        self.call_long: Callable[[Any], None] = options.function.call if long is None else long.call

    def _field(self, kind: Any, name: str) -> Any:
        """One field of the struct as an object of its own, which takes half the time to set. A tensor's first
        field is its pointer. Of a field that the struct lacks the object is alone."""
        field = getattr(type(self.params), name, None)
        return kind() if field is None else kind.from_buffer(self.params, field.offset)

    def run(
        self,
        pointers: Iterable[int],
        scale: Any,
        lower_bound: Any,
        stream: int | None = None,
        workspace: int | None = None,
    ) -> None:
        """Calls C with these pointers to the call's arrays. stream is for GPUs, and so is workspace, where it
        is none of the arrays: the CPU's workspace is the thread's own."""
        # A finalizer or signal handler may run meanwhile and make a call, which then must not use this
        # struct.
        self.busy = True
        try:
            for field, pointer in zip(self.pointers, pointers):
                field.value = pointer
            numbers = self.numbers
            if scale is not numbers[0] or lower_bound is not numbers[1]:
                self._set_numbers(scale, lower_bound)
            if self.on_gpu:
                self.stream.value = stream
                if self.workspace_size:
                    self.workspace.value = workspace
            elif self.is_long:
                self._run_long()
                return
            elif self.workspace_size:
                if _scratch.size_bytes < self.workspace_size:
                    _scratch.grow(self.workspace_size)
                # The local name keeps the memory alive until C returns, even if the scratch grows meanwhile.
                _memory, self.workspace.value = _scratch.block
            status = self.function(self.reference)
        finally:
            self.busy = False
        if status:
            raise _lib.last_error(status)

    def _set_numbers(self, scale: Any, lower_bound: Any) -> None:
        self.numbers = (None, None)
        try:
            self.scale.value = scale
            self.lower_bound.value = lower_bound
        except (TypeError, ValueError, OverflowError):
            check_numbers(scale, lower_bound)
            raise
        if type(scale) is float and type(lower_bound) is float:
            self.numbers = scale, lower_bound

    def _run_long(self) -> None:
        """Handlers of signals run meanwhile, and may call fwd, so the call has a workspace of its own."""
        if not self.workspace_size:
            self.call_long(self.params)
            return
        block = _scratch.take(self.workspace_size)
        self.workspace.value = block[1]
        self.call_long(self.params)
        _scratch.give_back(block)


def _bytes_of(name: str, view: View) -> int:
    """The size of memory without a form that the caller gives. Whether it is enough is for C to check."""
    if view.dtype != _lib.U8:
        dtype = _lib.DTYPE_NAMES.get(view.dtype, "another type")
        raise TypeError(f"{name} has dtype {dtype}; it must be uint8")
    if view.stride is not None and view.stride != _lib.row_major(view.shape):
        raise ValueError(f"{name} has strides {list(view.stride)}; it must be contiguous")
    return math.prod(view.shape)


_RECORD = (3, 128)  # rows and channels


def flat_records(name: str, view: View) -> View:
    """C's tensors have four dimensions, so a head's record is a row of 384 numbers there."""
    if len(view.shape) != 5 or view.shape[3:] != _RECORD:
        raise ValueError(f"{name} has shape {list(view.shape)}; it must be [N, R, HV, 3, K], K = 128")
    if view.stride is not None and any(
        size > 1 and step != right
        for size, step, right in zip(view.shape, view.stride, _lib.row_major(view.shape))
    ):
        raise ValueError(f"{name} has strides {list(view.stride)}; it must be contiguous")
    return view._replace(shape=(*view.shape[:3], math.prod(_RECORD)), stride=None)


def _is_long(params: Any, long: LongCalls) -> bool:
    """Whether a call on the CPU may take so long that signals should not wait for it."""
    rows, tokens, heads = long.work(params)
    borders = getattr(params, "cu_seqlens", None)
    sequences = borders.shape[0] - 1 if borders is not None and borders.data else rows
    work = heads * (tokens + long.tokens_of_a_state * sequences)
    if work < _LONG_TOKENS:
        return False
    cpus = os.cpu_count() or 1
    return work >= _LONG_TOKENS * min(params.cpu_threads or cpus, cpus, 4 * sequences * heads)


class PreparedCalls(threading.local):
    """The calls that a thread has prepared."""

    latest: PreparedCall | None = None  # of all
    _MOST = 256

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], PreparedCall] = {}
        # The latest call with these options. Functions take turns in a layer, and each finds its own call.
        self.latest_with: dict[CallOptions, PreparedCall] = {}

    def find(self, key: tuple[Any, ...]) -> PreparedCall | None:
        call = self._known.get(key)
        return None if call is None or call.busy else call

    def keep(self, key: tuple[Any, ...], call: PreparedCall) -> None:
        if len(self._known) >= self._MOST:
            self._known.clear()
            self.latest_with.clear()
        self._known[key] = self.latest_with[call.options] = self.latest = call


def check_numbers(scale: Any, lower_bound: Any) -> None:
    """Whether C can take them as floats. Their values are for C to check."""
    for name, value in (("scale", scale), ("lower_bound", lower_bound)):
        try:
            c_float(value)
        except (TypeError, ValueError):  # ValueError: a tensor of several numbers
            or_none = " or None" if name == "lower_bound" else ""
            raise TypeError(
                f"{name} is of type {type(value).__name__}; it must be a number{or_none}"
            ) from None
        except OverflowError:
            raise ValueError(f"{name} is an int too large for a float; it must be finite") from None


def check_devices(devices: Iterable[tuple[str, str]]) -> None:
    """devices: each array's name and its device as text, in the order of the call."""
    (first_name, first), *others = devices
    for name, device in others:
        if device != first:
            raise ValueError(
                f"{name} is on {device} and {first_name} on {first}; all tensors must be on one device"
            )
