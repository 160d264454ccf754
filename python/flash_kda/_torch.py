"""PyTorch: the eager call, and the operators (torch.ops.flash_kda.fwd, ...) that compilers trace.

This module is imported only once PyTorch itself is there.

An eager call takes one path: `call_c`, then `_prepare_and_run` unless the latest prepared call fits, then
`_run`, then `PreparedCall.run`, which calls C. Tensors that are not plain ones (fake tensors, say), and all
tensors under a dispatch mode, go to the function's operator instead, and through PyTorch's dispatcher to
`Operator._run`.

A tensor whose memory does not hold what the tensor means (a tensor of torch.vmap, a lazy negation, ...) is
refused by `refuse_unreadable`. Such tensors, and calls under torch.jit.trace, differ from others in their
dispatch keys, which the guards of a prepared call compare, so only a call that fits no prepared one needs
this.
"""

from __future__ import annotations

import itertools
from operator import attrgetter, itemgetter
from typing import Any, Callable

import torch
from torch.autograd import forward_ad as _forward_ad

from . import _arrays, _layout, _lib
from ._backward_options import BWD
from ._call import PreparedCall, PreparedCalls, View, check_devices, check_numbers
from ._call_options import CallOptions, KnownOptions, operator_defaults, operator_schema, option_fields
from ._decode_options import APPLY, DECODE, DECODE_LAYER
from ._map_options import JOIN, MAP
from ._options import FWD

Tensor = torch.Tensor
is_compiling = torch.compiler.is_compiling

DTYPES = {
    torch.bfloat16: _lib.BF16,
    torch.float32: _lib.F32,
    torch.int32: _lib.I32,
    torch.int64: _lib.I64,
    torch.float16: _lib.F16,
    torch.float64: _lib.F64,
    torch.bool: _lib.BOOL,
    torch.uint8: _lib.U8,
}
_DEVICES = {"cpu": _lib.CPU, "cuda": _lib.CUDA}

# All that a prepared call depends on, except the tensor's strides.
_describe = attrgetter("__class__", "shape", "dtype", "device")
_stride = Tensor.stride
_data_ptr = Tensor.data_ptr
_requires_grad = attrgetter("requires_grad")
# The types whose memory may be read as it is.
_plain_types = frozenset((Tensor, torch.nn.Parameter))
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_grad_enabled = torch.is_grad_enabled
_increment_version = torch.autograd.graph.increment_version


def _increment_versions(tensors: Any) -> None:
    for t in tensors:
        _increment_version(t)


def _usable_increment() -> Any:
    """The function of C++ behind increment_version, which takes several tensors at once in newer releases. It
    is internal to PyTorch, so it is used only if it is there and does what it must."""
    try:
        increment: Any = torch._C._increment_version  # type: ignore[attr-defined]
        x, y = torch.empty(1), torch.empty(1)
        before = x._version, y._version
        increment((x, y))
        if (x._version, y._version) == (before[0] + 1, before[1] + 1):
            with torch.inference_mode():
                increment((torch.empty(1),))  # has no version
            return increment
    except Exception:
        pass
    return _increment_versions


_count_writes = _usable_increment()


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# torch.cuda.current_stream() calls this function, and wraps the result in an object. CPU-only builds lack it.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)


_tracing_state = torch._C._get_tracing_state  # of torch.jit.trace
is_batched = torch._C._functorch.is_batchedtensor
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def why_unreadable(t: Tensor) -> str:
    """Why the tensor's memory does not hold what the tensor means, and what to do instead; "" if it does."""
    if is_batched(t):
        return (
            "is a batched tensor of torch.vmap, which flash_kda does not take; call it outside of torch.vmap "
            "on all batch rows at once, in the first dimension of its tensors"
        )
    if _is_wrapped(t) or torch._is_functional_tensor(t):
        return (
            "is a tensor of a function transform (torch.func.jvp, torch.func.functionalize, ...), which "
            "flash_kda does not take; call it outside of the transform"
        )
    if t.is_neg():
        return "is a view that is negated lazily (is_neg()); pass the result of its resolve_neg()"
    if t.is_conj():
        return "is a view that is conjugated lazily (is_conj()); it must be a tensor of real numbers"
    return ""


def refuse_unreadable(names: tuple[str, ...], tensors: list) -> None:
    for name, t in zip(names, tensors):
        why = why_unreadable(t)
        if why:
            raise TypeError(f"{name} {why}")


class _PythonGuards:
    """Says in Python what torch.compile's TensorGuards say in C++: whether tensors look like earlier ones."""

    def __init__(self, *tensors: Any, **_: Any):
        self.looks = [*map(_describe, tensors)]
        self.strides = [*map(_stride, tensors)]

    def check(self, *others: Any) -> bool:
        try:
            return (
                [*map(_describe, others)] == self.looks
                and [*map(_stride, others)] == self.strides
                and _tracing_state() is None
                and not any(map(why_unreadable, others))
            )
        except (AttributeError, RuntimeError, TypeError):  # no tensor; a sparse one, which has no strides
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


def _guards_for(tensors: list) -> Callable[..., bool]:
    """A function that says whether tensors look like these. PyTorch's guards refuse a tensor that comes
    twice, as a state does that is updated in place, so they see each tensor once."""
    first: dict[int, int] = {}
    unique = [i for i, t in enumerate(tensors) if first.setdefault(id(t), i) == i]
    once = [tensors[i] for i in unique]
    check = _Guards(
        *once,
        dynamic_dims_sizes=[list(t.shape) for t in once],
        dynamic_dims_strides=[list(t.stride()) for t in once],
    ).check
    if len(unique) == len(tensors):
        return check
    again = [(i, first[id(t)]) for i, t in enumerate(tensors) if first[id(t)] != i]
    pick = itemgetter(*unique)

    def fits(*others: Any) -> bool:
        for i, j in again:
            if others[i] is not others[j]:
                return False
        return check(*pick(others))

    return fits


_calls = PreparedCalls()


def call_c(tensors: list, options: CallOptions, scale: Any, lower_bound: Any) -> None:
    """An eager call. tensors: the arrays of the call, of which the first one is a tensor."""
    call = _calls.latest_with.get(options)
    if call is not None and (call.busy or not call.fits(*tensors)):
        call = None
    if call is None and not all(isinstance(t, Tensor) for t in tensors):
        # Tensors among other arrays are read through DLPack. What is no array at all gets its sentence there.
        _arrays.call_c(tensors, options, scale, lower_bound)
        return
    if _is_grad_enabled() and any(map(_requires_grad, tensors)):
        raise _no_gradients()
    if _forward_ad._current_level >= 0:  # as has_tangents() says
        refuse_tangents(tensors)
    if _dispatch_modes() or (call is None and not _plain_types.issuperset(map(type, tensors))):
        refuse_distributed(options.names, tensors)
        check_numbers(scale, lower_bound)
        _call_operator(tensors, options, float(scale), float(lower_bound))
    elif call is None and _tracing_state() is not None:
        # torch.jit.trace records operators alone.
        _call_operator(tensors, options, scale, lower_bound)
    elif call is None:
        _prepare_and_run(tensors, options, scale, lower_bound)
    else:
        _run(call, tensors, scale, lower_bound)


def call_c_traced(tensors: list, options: CallOptions, scale: Any, lower_bound: Any) -> None:
    """A call that a compiler traces. The compiler sees the operator alone."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise _no_gradients()
    _call_operator(tensors, options, scale, lower_bound)


def empty_like(
    v: Tensor, shape: tuple[int, ...], is_fp32: bool, with_zeros: bool = False
) -> tuple[Tensor, Tensor]:
    """A new tensor on v's device, of v's dtype or fp32, twice: as _arrays.empty_like returns it."""
    make = torch.zeros if with_zeros else torch.empty
    tensor = make(shape, dtype=torch.float32 if is_fp32 else v.dtype, device=v.device)
    return tensor, tensor


def copy_of(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of the tensor, twice."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is of type {type(x).__name__}; it must be a tensor, as v is one")
    tensor = x.clone(memory_format=torch.contiguous_format)
    return tensor, tensor


def _call_operator(tensors: list, options: CallOptions, scale: Any, lower_bound: Any) -> None:
    """Arguments go by position: to old compilers a keyword `out` means something else."""
    left = iter(tensors)
    values: dict[str, Any] = {name: next(left) for name in options.required_arrays}
    for name in options.optional_arrays:
        values[name] = next(left) if options.has(name) else None
    values["scale"] = scale
    values["lower_bound"] = lower_bound if getattr(options, "has_lower_bound", True) else None
    arguments = [
        values[name] if name in values else getattr(options, name)
        for name in (*options.operator_head, *options.operator_rest)
    ]
    getattr(torch.ops.flash_kda, OPERATORS[options.operator])(*arguments)


def call_below_autograd(tensors: list, options: CallOptions, scale: Any, lower_bound: Any) -> None:
    """A call of an operator's implementation, which gets plain tensors."""
    call = _calls.latest_with.get(options)
    if call is not None and not call.busy and call.fits(*tensors):
        _run(call, tensors, scale, lower_bound)
    else:
        _prepare_and_run(tensors, options, scale, lower_bound)


def _prepare_and_run(tensors: list, options: CallOptions, scale: Any, lower_bound: Any) -> None:
    """A call that the latest prepared call does not fit: finds or prepares one that fits."""
    refuse_unreadable(options.names, tensors)
    device = tensors[0].device
    tensors, copies = _layout.for_c(options.names, tensors, device.type == "cuda")
    kept = all(t.layout is torch.strided for t in tensors)  # C refuses all others
    strides = [*map(_stride, tensors)] if kept else []
    key = (options, *map(_describe, tensors), *strides)
    call = _calls.find(key) if kept else None
    if call is None:
        if device.type not in _DEVICES:
            raise ValueError(
                f"{options.names[0]} is on {device}; tensors must be on the CPU or a CUDA device"
            )
        check_devices([(name, str(t.device)) for name, t in zip(options.names, tensors)])
        for name, t in zip(options.names, tensors):
            if t.layout is not torch.strided:
                raise ValueError(
                    f"{name} has the layout {t.layout}; it must be a dense tensor (torch.strided)"
                )
        views = [
            View(
                t.data_ptr(),
                DTYPES.get(t.dtype, _lib.OTHER),
                tuple(t.shape),
                None if t.is_contiguous() else t.stride(),
            )
            for t in tensors
        ]
        call = PreparedCall(options, (_DEVICES[device.type], device.index or 0), views)
    if kept:
        # A call that was found gets new guards too: the guards compare inference mode, and the key does not.
        call.fits = _guards_for(tensors)
        _calls.keep(key, call)
    _run(call, tensors, scale, lower_bound)
    for wanted, written in copies:
        wanted.copy_(written)


def _run(call: PreparedCall, tensors: list, scale: Any, lower_bound: Any) -> None:
    if not call.on_gpu:
        try:
            call.run(map(_data_ptr, tensors), scale, lower_bound)
        except ValueError:
            if not _layout.must_copy(call.options.names, tensors, False):
                raise
            # Tensors that look like those of a prepared call may begin where C cannot read them.
            _prepare_and_run(tensors, call.options, scale, lower_bound)
            return
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
        try:
            call.run(map(_data_ptr, tensors), scale, lower_bound, stream, address)
        except ValueError:
            if not _layout.must_copy(call.options.names, tensors, True):
                raise
            _prepare_and_run(tensors, call.options, scale, lower_bound)
            return
    _count_writes(call.pick_written(tensors))


def _count_as_written(call: PreparedCall, tensors: list) -> None:
    """For autograd, which may have saved a tensor that the call writes."""
    _count_writes(call.pick_written(tensors))


def _no_gradients() -> RuntimeError:
    return RuntimeError(
        "this function of flash_kda computes no gradients, and gradients are on for one of its tensors; "
        "flash_kda.chunk_kda computes them. Call this function under torch.no_grad() or "
        "torch.inference_mode(), or pass detached tensors"
    )


def are_plain(tensors: Any) -> bool:
    """Whether an eager call may read these tensors' memory by itself; None counts as plain."""
    return (
        not _dispatch_modes()
        and _tracing_state() is None
        and _plain_types.issuperset(type(t) for t in tensors if t is not None)
    )


def has_tangents() -> bool:
    """Whether forward-mode automatic differentiation is on."""
    return _forward_ad._current_level >= 0


def refuse_tangents(tensors: Any) -> None:
    """Refuses tensors of forward-mode automatic differentiation, which have a tangent beside their value.
    Those of function transforms are refused later."""
    if any(not _is_wrapped(t) and _forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            "flash_kda has no forward-mode derivative, and one of its tensors has a tangent "
            "(torch.autograd.forward_ad.make_dual); pass its primal, which unpack_dual() gives"
        )


takes_dtensors = False  # after flash_kda.distributed.register_head_sharding()


def is_dtensor(t: Any) -> bool:
    return type(t).__name__ == "DTensor"


def refuse_distributed(names: tuple[str, ...], tensors: list) -> None:
    for name, t in zip(names, tensors):
        if is_dtensor(t):
            raise TypeError(
                f"{name} is a DTensor, and a call computes on one device; pass the local tensors that "
                "to_local() gives. Batch rows and heads may be sharded, tokens and channels must not be"
            )


# torch.library.custom_op would do all of what follows, but it fails on a written tensor that is left at its
# default.
class Operator:
    """The operator of one function in the namespace flash_kda."""

    def __init__(self, known: KnownOptions):
        self._options, self._known = known.cls, known.known
        cls = known.cls
        arguments = (*cls.operator_head, *cls.operator_rest)
        self._defaults = operator_defaults(cls)
        self._length = len(arguments)
        # Where the arguments have the arrays, in the order of a call, and the bits of the optional ones.
        names = (*cls.required_arrays, *cls.optional_arrays)
        self._arrays = [
            (arguments.index(name), cls.bits_of(name) if name in cls.optional_arrays else 0) for name in names
        ]
        self._values = [arguments.index(f.name) for f in option_fields(cls)]
        self._kernel = [f.name for f in option_fields(cls)].index("kernel")
        self._scale, self._lower_bound = (
            arguments.index(name) if name in arguments else None for name in ("scale", "lower_bound")
        )
        self._schema = f"({operator_schema(cls)}) -> ()"
        self.name = self._register(cls.operator)

    def _arrays_and_options(self, arguments: tuple) -> tuple[list, int, list, Any, Any]:
        """The tensors of a call of the operator, which optional ones it has, the values of its options, scale
        and lower_bound."""
        if len(arguments) < self._length:  # PyTorch leaves out the last arguments if they have their defaults
            arguments += self._defaults[len(arguments) - self._length :]
        tensors, given = [], 0
        for place, bit in self._arrays:
            if arguments[place] is not None:
                tensors.append(arguments[place])
                given |= bit
        scale = 0.0 if self._scale is None else arguments[self._scale]
        lower_bound = 0.0 if self._lower_bound is None else arguments[self._lower_bound]
        return tensors, given, [arguments[place] for place in self._values], scale, lower_bound

    def _options_of(self, given: int, values: list, lower_bound: Any) -> CallOptions:
        more = () if self._lower_bound is None else (lower_bound is not None,)
        return self._known(given, *values, *more)

    def _run(self, *arguments: Any) -> None:
        tensors, given, values, scale, lower_bound = self._arrays_and_options(arguments)
        options = self._options_of(given, values, lower_bound)
        call_below_autograd(tensors, options, scale, 0.0 if lower_bound is None else lower_bound)

    def _autograd(self, *args: Any, **kwargs: Any) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise _no_gradients()
        if has_tangents():
            refuse_tangents(tensors)
        with torch._C._AutoDispatchBelowAutograd():
            getattr(torch.ops.flash_kda, self.name)(*args, **kwargs)

    def _batched(self, *args: Any, **kwargs: Any) -> None:
        batched = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and is_batched(t))
        raise TypeError(f"A tensor of the call {why_unreadable(batched)}")

    def _fake(self, *arguments: Any) -> None:
        """The operator returns nothing, and what it writes has its shape before."""
        tensors, given, values, _, lower_bound = self._arrays_and_options(arguments)
        if not all_have_numbers(tensors, values):
            return
        values = [*map(_example, values)]
        values[self._kernel] = None  # the names of kernels depend on the device, and there may be none
        check_without_memory(tensors, self._options_of(given, values, lower_bound))

    def _register(self, wanted: str) -> str:
        """Registers the operator, and returns its name in the namespace flash_kda. The name is the wanted
        one, with a number behind it if another library has an operator of the wanted name there already. If
        the package was imported before in this process, and its modules were dropped, the operator that was
        registered then is used."""
        for name in itertools.chain([wanted], (f"{wanted}_{i}" for i in itertools.count(2))):
            qualified = f"flash_kda::{name}"
            found = getattr(torch.ops.flash_kda, name, None)
            if found is None:
                break
            schemas = [str(getattr(found, overload)._schema) for overload in found.overloads()]
            if schemas == [f"{qualified}{self._schema}"]:
                return name
        torch.library.define(
            qualified,
            self._schema,
            # Strides decide what is copied, so compilers must keep those that tracing saw.
            tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
        )
        torch.library.impl(qualified, ("cpu", "cuda"))(self._run)
        torch.library.impl(qualified, "Autograd")(self._autograd)
        torch.library.impl(qualified, "FuncTorchBatched")(self._batched)
        torch.library.register_fake(qualified)(self._fake)
        return name


def all_have_numbers(tensors: list, values: list) -> bool:
    """Whether the compiler has a number for each size and value that it keeps open."""
    symbols = [x for t in tensors for x in t.shape] + values
    return not any(isinstance(x, torch.SymInt) and not x.node.has_hint() for x in symbols)


def check_without_memory(tensors: list, options: CallOptions) -> None:
    """The checks that need no memory: devices, dtypes and shapes. Sizes that a compiler keeps open are
    checked with the numbers that it traces with, which binds them to nothing; sizes without such numbers are
    checked once the call runs."""
    names = options.names
    shapes = [tuple(map(_example, t.shape)) for t in tensors]
    check_devices([(name, str(t.device)) for name, t in zip(names, tensors)])
    taken = [_layout.taken_as(name, t.dtype, shape) for name, t, shape in zip(names, tensors, shapes)]
    views = [View(64, DTYPES.get(dtype, _lib.OTHER), shape, None) for dtype, shape in taken]
    PreparedCall(options, (_lib.CPU, 0), views)


def _example(x: Any) -> Any:
    """x, or of a symbolic integer the number that the compiler traces with."""
    return x.node.hint if isinstance(x, torch.SymInt) else x


# The name of each function's operator.
OPERATORS = {
    known.cls.operator: Operator(known).name for known in (FWD, BWD, MAP, JOIN, DECODE, DECODE_LAYER, APPLY)
}
