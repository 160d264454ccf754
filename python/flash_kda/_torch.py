"""PyTorch: the eager call, and the operator torch.ops.flash_kda.fwd that compilers trace.

This module is imported only once PyTorch itself is there.

An eager call takes one path: `fwd`, then `_prepare_and_run` unless the latest prepared call fits, then
`_run`, then `PreparedCall.run`, which calls C. Tensors that are not plain ones (fake tensors, DTensor, ...),
and all tensors under a dispatch mode, go to the operator instead, and through PyTorch's dispatcher to
`_operator`.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch

from . import _arrays, _layout, _lib
from ._call import PreparedCall, PreparedCalls, View, check_devices, check_numbers
from ._options import (
    OPTION_DEFAULTS,
    OPTIONAL_ARRAYS,
    REQUIRED_ARRAYS,
    Options,
    known_options,
    operator_schema,
)

Tensor = torch.Tensor
is_compiling = torch.compiler.is_compiling

_DTYPES = {
    torch.bfloat16: _lib.BF16,
    torch.float32: _lib.F32,
    torch.int32: _lib.I32,
    torch.int64: _lib.I64,
    torch.float16: _lib.F16,
    torch.float64: _lib.F64,
}
_DEVICES = {"cpu": _lib.CPU, "cuda": _lib.CUDA}

# All that a prepared call depends on, except whether the tensor is contiguous.
_describe = attrgetter("__class__", "shape", "dtype", "device")
_is_contiguous = Tensor.is_contiguous
_data_ptr = Tensor.data_ptr
_requires_grad = attrgetter("requires_grad")
# The types whose memory may be read as it is.
_plain_types = frozenset((Tensor, torch.nn.Parameter))
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_grad_enabled = torch.is_grad_enabled
_increment_version = torch.autograd.graph.increment_version


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# torch.cuda.current_stream() calls this function, and wraps the result in an object. CPU-only builds lack it.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)


class _PythonGuards:
    """Says in Python what torch.compile's TensorGuards say in C++: whether tensors look like earlier ones."""

    def __init__(self, *tensors: Any, **_: Any):
        self.looks = [*map(_describe, tensors)]

    def check(self, *others: Any) -> bool:
        try:
            return [*map(_describe, others)] == self.looks and all(map(_is_contiguous, others))
        except (AttributeError, RuntimeError):  # no tensor; a sparse one, neither contiguous nor not
            return False


def _usable_guards() -> Any:
    """What torch.compile checks its inputs with: type, dtype, device, shape and strides in C++, in a tenth of
    the time of _PythonGuards. It is internal to PyTorch, so it is used only if it is there and tells apart
    what must be told apart."""
    try:
        guards: Any = torch._C._dynamo.guards.TensorGuards  # type: ignore[attr-defined]
        x, y = torch.empty(1, 2, 3, dtype=torch.bfloat16), torch.empty(4)
        sizes, strides = [list(x.shape), list(y.shape)], [list(x.stride()), list(y.stride())]
        fits = guards(x, y, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        others = [
            (x, torch.empty(5)),
            (x, torch.empty(2, 2)),
            (x, torch.empty(8)[::2]),
            (x, torch.empty(4, dtype=torch.float64)),
            (x, torch.empty(4, device="meta")),
            (torch.empty(1, 3, 2, dtype=torch.bfloat16), y),
            (torch.empty(1, 3, 2, dtype=torch.bfloat16).mT, y),
            (torch.empty(2, 2, 3, dtype=torch.bfloat16), y),
            (torch.empty(1, 2, 3, dtype=torch.float16), y),
        ]
        if fits(x, y) and fits(x + 1, y + 1) and not any(fits(*other) for other in others):
            return guards
    except Exception:
        pass
    return _PythonGuards


_Guards = _usable_guards()
_calls = PreparedCalls()


def fwd(tensors: list, options: Options, scale: Any, lower_bound: Any) -> None:
    """An eager call. tensors: the arrays of the call, of which q is a tensor."""
    call = _calls.latest
    if call is not None and (call.options is not options or call.busy or not call.fits(*tensors)):
        call = None
    if call is None and not all(isinstance(t, Tensor) for t in tensors):
        # Tensors among other arrays are read through DLPack. What is no array at all gets its sentence there.
        _arrays.fwd(tensors, options, scale, lower_bound)
        return
    if _is_grad_enabled() and any(map(_requires_grad, tensors)):
        raise _no_backward_pass()
    if _dispatch_modes() or (call is None and not _plain_types.issuperset(map(type, tensors))):
        check_numbers(scale, lower_bound)
        _call_operator(tensors, options, float(scale), float(lower_bound))
    elif call is None:
        _prepare_and_run(tensors, options, scale, lower_bound)
    else:
        _run(call, tensors, scale, lower_bound)


def fwd_traced(tensors: list, options: Options, scale: Any, lower_bound: Any) -> None:
    """A call that a compiler traces. The compiler sees the operator alone."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise _no_backward_pass()
    _call_operator(tensors, options, scale, lower_bound)


def _call_operator(tensors: list, options: Options, scale: Any, lower_bound: Any) -> None:
    """Arguments go by position: to old compilers a keyword `out` means something else."""
    q, k, v, g, beta, out, A_log, dt_bias = tensors[: len(REQUIRED_ARRAYS)]
    rest = iter(tensors[len(REQUIRED_ARRAYS) :])
    optional = [next(rest) if given else None for given in options.given]
    torch.ops.flash_kda.fwd(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, *optional, *options.values()
    )


def _prepare_and_run(tensors: list, options: Options, scale: Any, lower_bound: Any) -> None:
    """A call that the latest prepared call does not fit: finds or prepares one that fits."""
    tensors, copies = _layout.for_c(options.names, tensors)
    # The key has no strides, so a call is kept for contiguous tensors alone. C refuses all others.
    kept = all(t.layout is torch.strided and t.is_contiguous() for t in tensors)
    key = (options, *map(_describe, tensors))
    call = _calls.find(key) if kept else None
    if call is None:
        device = tensors[0].device
        if device.type not in _DEVICES:
            raise ValueError(f"q is on {device}; tensors must be on the CPU or a CUDA device")
        check_devices([(name, str(t.device)) for name, t in zip(options.names, tensors)])
        for name, t in zip(options.names, tensors):
            if t.layout is not torch.strided:
                raise ValueError(
                    f"{name} has the layout {t.layout}; it must be a dense tensor (torch.strided)"
                )
        views = [
            View(
                t.data_ptr(),
                _DTYPES.get(t.dtype, _lib.OTHER),
                tuple(t.shape),
                None if t.is_contiguous() else t.stride(),
            )
            for t in tensors
        ]
        call = PreparedCall(options, (_DEVICES[device.type], device.index or 0), views)
    if kept:
        # A call that was found gets new guards too: the guards compare inference mode, and the key does not.
        call.fits = _Guards(
            *tensors,
            dynamic_dims_sizes=[list(t.shape) for t in tensors],
            dynamic_dims_strides=[list(t.stride()) for t in tensors],
        ).check
        _calls.keep(key, call)
    _run(call, tensors, scale, lower_bound)
    for wanted, written in copies:
        wanted.copy_(written)


def _run(call: PreparedCall, tensors: list, scale: Any, lower_bound: Any) -> None:
    if not call.on_gpu:
        try:
            call.run(map(_data_ptr, tensors), scale, lower_bound)
        except BaseException:  # a call that was interrupted has written
            _count_as_written(call, tensors)
            raise
    else:
        workspace, address = None, None
        if call.workspace_size:
            # The allocator gets the workspace back when this function returns, and gives it only to work
            # that is queued later on the stream.
            workspace = torch.empty(call.workspace_size, dtype=torch.uint8, device=tensors[0].device)
            address = workspace.data_ptr()
        stream = _current_stream(call.device_index)
        call.run(map(_data_ptr, tensors), scale, lower_bound, stream, address)
    _count_as_written(call, tensors)


def _count_as_written(call: PreparedCall, tensors: list) -> None:
    """For autograd, which may have saved a tensor that the call writes."""
    for i in call.written:
        _increment_version(tensors[i])


def _no_backward_pass() -> RuntimeError:
    return RuntimeError(
        "flash_kda has no backward pass yet, and gradients are on for one of its tensors; call it under "
        "torch.no_grad() or torch.inference_mode(), or pass detached tensors"
    )


# torch.library.custom_op would do all of what follows, but it fails on a written tensor that is left at its
# default.
torch.library.define(
    "flash_kda::fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor(a!) out, Tensor A_log, "
    f"Tensor dt_bias, float lower_bound, {operator_schema()}) -> ()",
    # The operator takes contiguous tensors, so compilers must keep the strides that tracing saw.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_DEFAULTS = (*(None for _ in OPTIONAL_ARRAYS), *OPTION_DEFAULTS)


@torch.library.impl("flash_kda::fwd", ("cpu", "cuda"))
def _operator(
    q: Any, k: Any, v: Any, g: Any, beta: Any, scale: Any, out: Any, A_log: Any, dt_bias: Any,
    lower_bound: Any, *rest: Any,
) -> None:  # fmt: skip
    rest += _DEFAULTS[len(rest) :]  # PyTorch leaves out the last arguments if they have their defaults
    optional, values = rest[: len(OPTIONAL_ARRAYS)], rest[len(OPTIONAL_ARRAYS) :]
    tensors = [q, k, v, g, beta, out, A_log, dt_bias, *[t for t in optional if t is not None]]
    options = known_options(tuple([t is not None for t in optional]), *values)
    call = _calls.latest
    if call is not None and call.options is options and not call.busy and call.fits(*tensors):
        _run(call, tensors, scale, lower_bound)
    else:
        _prepare_and_run(tensors, options, scale, lower_bound)


@torch.library.impl("flash_kda::fwd", "Autograd")
def _operator_autograd(*args: Any, **kwargs: Any) -> None:
    arguments = (*args, *kwargs.values())
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
        raise _no_backward_pass()
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.flash_kda.fwd(*args, **kwargs)


@torch.library.register_fake("flash_kda::fwd")
def _operator_fake(*args: Any, **kwargs: Any) -> None:
    """The operator returns nothing, and what it writes has its shape before."""
