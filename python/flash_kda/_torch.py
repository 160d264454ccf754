"""PyTorch: the eager call, and the operator torch.ops.flash_kda.fwd that compilers trace.

Imported only once PyTorch itself is there.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Callable

import torch

from . import _arrays, _lib
from ._plan import (
    A_LOG,
    DT_BIAS,
    OUT,
    Options,
    Plan,
    Plans,
    check_devices,
    check_numbers,
    check_options,
    names,
)

Tensor = torch.Tensor

_DTYPES = {
    torch.bfloat16: _lib.BF16,
    torch.float32: _lib.F32,
    torch.int32: _lib.I32,
    torch.int64: _lib.I64,
    torch.float16: _lib.F16,
    torch.float64: _lib.F64,
}
_DEVICES = {"cpu": _lib.CPU, "cuda": _lib.CUDA}

# All of what a plan depends on but contiguity.
_describe = attrgetter("__class__", "shape", "dtype", "device")
_is_contiguous = Tensor.is_contiguous
_data_ptr = Tensor.data_ptr
_requires_grad = attrgetter("requires_grad")
# Types whose memory may be read as it is. Any other (FakeTensor, DTensor, ...) goes through the dispatcher.
_plain_types = frozenset((Tensor, torch.nn.Parameter))
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_grad_enabled = torch.is_grad_enabled
_increment_version = torch.autograd.graph.increment_version
_is_compiling = torch.compiler.is_compiling


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# What torch.cuda.current_stream() itself calls, without building an object; absent in CPU-only builds.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)

_plans = Plans()


def fwd(tensors: list, options: Options, scale, lower_bound) -> None:
    """tensors: those that are given, in the order of TENSOR_FIELDS; q is a tensor."""
    if _is_compiling():
        _refuse_gradients(tensors)
        _call_operator(tensors, options, scale, lower_bound)
        return
    plan = _plans.fitting(tensors, options)
    if plan is None or _dispatch_modes():
        if not all(isinstance(t, Tensor) for t in tensors):
            # Tensors among other arrays are read through DLPack; what is no array gets its sentence there.
            _arrays.fwd(tensors, options, scale, lower_bound)
            return
        check_numbers(scale, lower_bound)
        check_options(options)
        _refuse_gradients(tensors)
        if not _plain_types.issuperset(map(type, tensors)) or _dispatch_modes():
            _call_operator(tensors, options, float(scale), float(lower_bound))
            return
        tensors, plan = _prepare(tensors, options)
    elif _is_grad_enabled() and any(map(_requires_grad, tensors)):
        _refuse_gradients(tensors)
    _run(plan, tensors, scale, lower_bound)
    _mark_written(tensors, options)


def _mark_written(tensors, options) -> None:
    """For autograd, which may have saved them."""
    _increment_version(tensors[OUT])
    if options[1]:
        _increment_version(tensors[8 + options[0]])


def _call_operator(tensors, options, scale, lower_bound) -> None:
    """By position: to old compilers a keyword `out` means something else."""
    q, k, v, g, beta, out, A_log, dt_bias = tensors[:8]
    given = tensors[8:]
    initial_state = given.pop(0) if options[0] else None
    final_state = given.pop(0) if options[1] else None
    cu_seqlens = given.pop(0) if options[2] else None
    torch.ops.flash_kda.fwd(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens,
        options[3], options[4], options[6], options[8],
    )  # fmt: skip


def _run(plan: Plan, tensors, scale, lower_bound) -> None:
    plan.busy = True
    try:
        if plan.on_gpu:
            plan.stream.value = _current_stream(plan.device_index)
            if plan.workspace_size:
                # Freed when this function returns: the allocator gives it only to later work of the stream.
                workspace = torch.empty(plan.workspace_size, dtype=torch.uint8, device=tensors[0].device)
                plan.workspace.value = workspace.data_ptr()
        plan.run(map(_data_ptr, tensors), scale, lower_bound)
    finally:
        plan.busy = False


def _prepare(tensors: list, options: Options) -> tuple[list, Plan]:
    """The tensors as C takes them, and a plan for them."""
    for i in (A_LOG, DT_BIAS):
        if _needs_float32(tensors[i]):
            tensors = [*tensors[:i], tensors[i].float(), *tensors[i + 1 :]]
    if not all(t.layout is torch.strided and t.is_contiguous() for t in tensors):
        return tensors, _new_plan(tensors, options)
    key = (options, *map(_describe, tensors))
    plan = _plans.find(key)
    if plan is None:
        plan = _new_plan(tensors, options)
    # Also for a known plan: what torch.compile's guards compare includes inference mode.
    plan.fits = _matcher(tensors)
    _plans.keep(key, plan)
    return tensors, plan


def _matcher(tensors) -> Callable[[Any], bool]:
    """A function that says whether others look the same: type, dtype, device, shape, contiguous."""
    if _TensorGuards is not None:
        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        check = _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return lambda others: check(*others)
    looks = [*map(_describe, tensors)]

    def fits(others) -> bool:
        try:
            return [*map(_describe, others)] == looks and all(map(_is_contiguous, others))
        except (AttributeError, RuntimeError):  # no tensor; a sparse one, neither contiguous nor not
            return False

    return fits


def _usable_guards():
    """What torch.compile checks its inputs with: all of the above in C++, in a tenth of the time. It is PyTorch's
    own affair, so it is used only if it is there and tells apart what must be told apart."""
    global _TensorGuards
    try:
        _TensorGuards = torch._C._dynamo.guards.TensorGuards  # not a package that could be imported
        x, y = torch.empty(1, 2, 3, dtype=torch.bfloat16), torch.empty(4)
        same = _matcher([x, y])
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
        if same((x, y)) and same((x + 1, y + 1)) and not any(same(other) for other in others):
            return _TensorGuards
    except Exception:
        pass
    return None


_TensorGuards = None
_TensorGuards = _usable_guards()


def _needs_float32(parameter: torch.Tensor) -> bool:
    """A layer that was cast as a whole holds its gate's parameters in 16 bits."""
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _new_plan(tensors, options: Options) -> Plan:
    device = tensors[0].device
    if device.type not in _DEVICES:
        raise ValueError(f"q is on {device}; tensors must be on the CPU or a CUDA device")
    named = [*zip(names(options), tensors)]
    check_devices([(name, str(t.device)) for name, t in named])
    for name, t in named:
        if t.layout is not torch.strided:
            raise ValueError(f"{name} has the layout {t.layout}; it must be a dense tensor (torch.strided)")
    fields = [
        (
            name,
            t.data_ptr(),
            _DTYPES.get(t.dtype, _lib.OTHER),
            tuple(t.shape),
            None if t.is_contiguous() else t.stride(),
        )
        for name, t in named
    ]
    return Plan((_DEVICES[device.type], device.index or 0), fields, options)


def _refuse_gradients(tensors) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            "flash_kda has no backward pass yet, and gradients are on for one of its tensors; call it under "
            "torch.no_grad() or torch.inference_mode(), or pass detached tensors"
        )


# The operator. Its name for `kernel` is kernel_name: inductor passes arguments by name beside a `kernel` of its own.
# (torch.library.custom_op would do all of this, but it fails on a written tensor that is left at its default.)
torch.library.define(
    "flash_kda::fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor(a!) out, Tensor A_log, "
    "Tensor dt_bias, float lower_bound, Tensor? initial_state=None, Tensor(b!)? final_state=None, "
    "Tensor? cu_seqlens=None, str? kernel_name=None, int threads=0, "
    "bool batch_invariant=False, SymInt max_seqlen=0) -> ()",
    # The strides that tracing saw are those that the call gets: it takes contiguous tensors.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


@torch.library.impl("flash_kda::fwd", ("cpu", "cuda"))
def _operator(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound,
    initial_state=None, final_state=None, cu_seqlens=None, kernel_name=None, threads=0,
    batch_invariant=False, max_seqlen=0,
):  # fmt: skip
    optional = (initial_state, final_state, cu_seqlens)
    tensors = [q, k, v, g, beta, out, A_log, dt_bias, *(t for t in optional if t is not None)]
    options = (
        *(t is not None for t in optional),
        kernel_name,
        threads,
        type(threads),
        batch_invariant,
        type(batch_invariant),
        max_seqlen,
        type(max_seqlen),
    )
    plan = _plans.fitting(tensors, options)
    if plan is None:
        tensors, plan = _prepare(tensors, options)
    _run(plan, tensors, scale, lower_bound)
    _mark_written(tensors, options)


@torch.library.impl("flash_kda::fwd", "Autograd")
def _operator_autograd(*args, **kwargs):
    _refuse_gradients([t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)])
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.flash_kda.fwd(*args, **kwargs)


@torch.library.register_fake("flash_kda::fwd")
def _operator_fake(*args, **kwargs):
    """Nothing is returned; what is written has its shape already."""
