"""PyTorch: the eager call, and the operator torch.ops.flash_kda.fwd that compilers trace.

Imported only once PyTorch itself is there.
"""

from __future__ import annotations

from operator import attrgetter
from threading import get_ident as _thread

import torch

from . import _arrays, _lib
from ._plan import Plan, check_devices, check_options, scratch

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

_REQUIRED = _lib.TENSOR_FIELDS[:8]
_A_LOG, _DT_BIAS = 6, 7
_describe = attrgetter("shape", "dtype", "device")
_is_contiguous = Tensor.is_contiguous
_data_ptr = Tensor.data_ptr
# Types whose memory may be read as it is. Any other (FakeTensor, DTensor, ...) goes through the dispatcher.
_plain_types = frozenset((Tensor, torch.nn.Parameter))
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_grad_enabled = torch.is_grad_enabled
_increment_version = torch.autograd.graph.increment_version
_is_compiling = torch.compiler.is_compiling
_requires_grad = attrgetter("requires_grad")


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# What torch.cuda.current_stream() itself calls, without building an object; absent in CPU-only builds.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)

# A thread has plans of its own, since a plan holds one call's pointers: by thread and what the tensors look
# like, and each thread's latest by thread alone.
_plans: dict[tuple, Plan] = {}
_latest: dict[int, Plan] = {}
_MAX_PLANS = 256


def fwd(
    q,
    k,
    v,
    g,
    beta,
    scale,
    out,
    A_log,
    dt_bias,
    lower_bound,
    initial_state,
    final_state,
    cu_seqlens,
    kernel,
    threads,
) -> None:
    if _is_compiling():
        _refuse_gradients((q, k, v, g, beta, A_log, dt_bias, initial_state))
        torch.ops.flash_kda.fwd(
            q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens,
            kernel, threads,
        )  # fmt: skip
        return
    tensors = [q, k, v, g, beta, out, A_log, dt_bias]
    if initial_state is not None:
        tensors.append(initial_state)
    if final_state is not None:
        tensors.append(final_state)
    if cu_seqlens is not None:
        tensors.append(cu_seqlens)
    if not _plain_types.issuperset(map(type, tensors)) or _dispatch_modes():
        if not all(isinstance(t, Tensor) for t in tensors):
            # Tensors among other arrays are read through DLPack; what is no array gets its sentence there.
            names = _names(initial_state is None, final_state is None, cu_seqlens is None)
            _arrays.fwd(dict(zip(names, tensors)), scale, lower_bound, kernel, threads)
            return
        check_options(scale, lower_bound, kernel, threads)
        _refuse_gradients(tensors)
        torch.ops.flash_kda.fwd(
            q, k, v, g, beta, float(scale), out, A_log, dt_bias, float(lower_bound), initial_state, final_state,
            cu_seqlens, kernel, threads,
        )  # fmt: skip
        return
    if _is_grad_enabled() and any(map(_requires_grad, tensors)):
        _refuse_gradients(tensors)
    _launch(
        tensors,
        initial_state is None,
        final_state is None,
        cu_seqlens is None,
        scale,
        lower_bound,
        kernel,
        threads,
    )
    _increment_version(out)
    if final_state is not None:
        _increment_version(final_state)


def _launch(tensors, no_initial, no_final, no_cu_seqlens, scale, lower_bound, kernel, threads) -> None:
    """tensors: those that are present, in the order of TENSOR_FIELDS."""
    options = (no_initial, no_final, no_cu_seqlens, kernel, threads)
    plan = _latest.get(_thread())
    if plan is None or plan.busy or plan.options != options or not plan.matches(*tensors):
        check_options(scale, lower_bound, kernel, threads)
        if _needs_float32(tensors[_A_LOG]) or _needs_float32(tensors[_DT_BIAS]):
            converted = [*tensors]
            for i in (_A_LOG, _DT_BIAS):
                converted[i] = tensors[i].float()
            _launch(converted, no_initial, no_final, no_cu_seqlens, scale, lower_bound, kernel, threads)
            return
        plan = _find_plan(tensors, options)
    plan.busy = True
    try:
        plan.fill(map(_data_ptr, tensors), scale, lower_bound)
        if not plan.on_gpu:
            plan.workspace.value = scratch.address(plan.workspace_size)
        else:
            plan.stream.value = _current_stream(plan.device_index)
            if plan.workspace_size:
                # Freed when this function returns: the allocator gives it only to later work of the stream.
                workspace = torch.empty(plan.workspace_size, dtype=torch.uint8, device=tensors[0].device)
                plan.workspace.value = workspace.data_ptr()
        plan.run()
    finally:
        plan.busy = False


def _find_plan(tensors, options) -> Plan:
    key = (_thread(), options, *map(_describe, tensors))
    reusable = all(map(_is_contiguous, tensors))
    plan = _plans.get(key) if reusable else None
    if plan is None or plan.busy:
        plan = _new_plan(tensors, _names(*options[:3]), *options[3:])
        plan.options = options
    # Also for a known plan: what torch.compile's guards compare includes inference mode.
    plan.matches = _matcher(tensors)
    if reusable:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
            _latest.clear()
        _plans[key] = _latest[_thread()] = plan
    return plan


def _matcher(tensors):
    """A function that says whether other tensors look the same: type, dtype, device, shape, contiguous."""
    if _TensorGuards is not None:
        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        return _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    looks = [*map(_describe, tensors)]
    return lambda *others: all(map(_is_contiguous, others)) and [*map(_describe, others)] == looks


def _usable_guards():
    """What torch.compile checks its inputs with: all of the above in C++, in a tenth of the time. It is PyTorch's
    own affair, so it is used only if it is there and tells apart what must be told apart."""
    global _TensorGuards
    try:
        from torch._C._dynamo.guards import TensorGuards as _TensorGuards

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
        if same(x, y) and same(x + 1, y + 1) and not any(same(*other) for other in others):
            return _TensorGuards
    except Exception:
        pass
    return None


_TensorGuards = None
_TensorGuards = _usable_guards()


def _needs_float32(parameter: torch.Tensor) -> bool:
    """A layer that was cast as a whole holds its gate's parameters in 16 bits."""
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _names(no_initial: bool, no_final: bool, no_cu_seqlens: bool) -> list[str]:
    optional = zip(_lib.TENSOR_FIELDS[8:], (no_initial, no_final, no_cu_seqlens))
    return [*_REQUIRED, *(name for name, absent in optional if not absent)]


def _new_plan(tensors, names, kernel, threads) -> Plan:
    device = tensors[0].device
    if device.type not in _DEVICES:
        raise ValueError(f"q is on {device}; tensors must be on the CPU or a CUDA device")
    check_devices([(name, str(t.device)) for name, t in zip(names, tensors)])
    for name, t in zip(names, tensors):
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
        for name, t in zip(names, tensors)
    ]
    return Plan((_DEVICES[device.type], device.index or 0), fields, kernel, threads)


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
    "Tensor? cu_seqlens=None, str? kernel_name=None, int threads=0) -> ()",
    # The strides that tracing saw are those that the call gets: it takes contiguous tensors.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


@torch.library.impl("flash_kda::fwd", ("cpu", "cuda"))
def _operator(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound,
    initial_state=None, final_state=None, cu_seqlens=None, kernel_name=None, threads=0,
):  # fmt: skip
    tensors = [q, k, v, g, beta, out, A_log, dt_bias]
    tensors += [t for t in (initial_state, final_state, cu_seqlens) if t is not None]
    _launch(
        tensors,
        initial_state is None,
        final_state is None,
        cu_seqlens is None,
        scale,
        lower_bound,
        kernel_name,
        threads,
    )
    _increment_version(out)
    if final_state is not None:
        _increment_version(final_state)


@torch.library.impl("flash_kda::fwd", "Autograd")
def _operator_autograd(*args, **kwargs):
    _refuse_gradients([t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)])
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.flash_kda.fwd(*args, **kwargs)


@torch.library.register_fake("flash_kda::fwd")
def _operator_fake(*args, **kwargs):
    """Nothing is returned; what is written has its shape already."""
