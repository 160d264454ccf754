"""Gradients in PyTorch: the operators torch.ops.flash_kda.chunk_kda and chunk_kda_bwd.

`fwd` and `bwd` write into tensors that they are given, and autograd knows no gradients of such functions. So
these two operators return new tensors: the first computes the forward pass and what the backward pass needs
of it, the second the gradients. torch.library.register_autograd joins them. A compiler sees both operators
and nothing inside of them. An eager call with plain tensors does the same without PyTorch's dispatcher:
`_Eager`.

A gradient that is not wanted, like a final state that is not wanted and states that are not saved, is a
tensor without elements, since an operator returns a fixed number of tensors.

This module is imported only once PyTorch itself is there.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch

from . import _lib, _torch
from ._backward_options import BWD, GRADIENTS, BwdOptions
from ._call_options import CallOptions
from ._options import FWD, Options

Tensor = torch.Tensor

#: the inputs that have gradients, in the order of GRADIENTS
INPUTS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
# The options of both operators, in their order. The older ones lie before the arguments that only one of the
# operators has. The younger ones lie behind these arguments, so that exported programs still fit.
_OLDER = (
    "max_seqlen",
    "use_gate_in_kernel",
    "use_qk_l2norm_in_kernel",
    "use_beta_sigmoid_in_kernel",
    "allow_neg_eigval",
    "state_v_first",
)
YOUNGER = {"kernel": None, "batch_invariant": False, "workspace_limit": 0}  # with their defaults
#: the options of both operators
OPTIONS = (*_OLDER, *YOUNGER)
_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
    "Tensor? initial_state, Tensor? cu_seqlens"
)
_REST = (
    "float scale, float? lower_bound, SymInt max_seqlen, bool use_gate_in_kernel, "
    "bool use_qk_l2norm_in_kernel, bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, "
    "bool state_v_first"
)
_LAST = "str? kernel_name=None, bool batch_invariant=False, int workspace_limit=0"
_FORWARD = f"({_TENSORS}, {_REST}, bool output_final_state, bool save, {_LAST}) -> (Tensor, Tensor, Tensor)"
# wanted: bit i is set if the i-th gradient of GRADIENTS is wanted.
_BACKWARD = (
    f"({_TENSORS}, Tensor? saved, Tensor? dout, Tensor? dfinal_state, {_REST}, int wanted, {_LAST}) -> "
    f"({', '.join(['Tensor'] * len(GRADIENTS))})"
)
_READ = (*INPUTS, "cu_seqlens")
_DIM = 128


@lru_cache(maxsize=1024, typed=True)
def _options(known: Any, bits: int, values: tuple, has_lower_bound: bool) -> CallOptions:
    named = {**dict(zip(OPTIONS, values)), "has_lower_bound": has_lower_bound}
    return known.known(bits, *(named.get(f.name, f.default) for f in fields(known.cls) if f.name != "given"))


def _options_of(known: Any, given: dict[str, Any], values: tuple, lower_bound: Any) -> CallOptions:
    """The options of a call with these arrays. values: those of OPTIONS."""
    cls = known.cls
    bits = cls.bits_of(*(name for name in given if name in cls.optional_arrays))
    return _options(known, bits, values, lower_bound is not None)


def _call(known: Any, arrays: dict[str, Any], values: tuple, scale: float, lower_bound: Any) -> None:
    """arrays: of the call by name; those that are None are absent."""
    cls = known.cls
    given = {n: arrays[n] for n in (*cls.required_arrays, *cls.optional_arrays) if arrays.get(n) is not None}
    options = _options_of(known, given, values, lower_bound)
    _torch.call_below_autograd([*given.values()], options, scale, 0.0 if lower_bound is None else lower_bound)


def in_order(numbers_and_options: tuple, *own: Any) -> tuple[Any, ...]:
    """The arguments of an operator behind its tensors. numbers_and_options: scale, lower_bound and the values
    of OPTIONS. own: those that only this operator has."""
    older = 2 + len(_OLDER)
    return (*numbers_and_options[:older], *own, *numbers_and_options[older:])


def taken_apart(arguments: tuple, own: int) -> tuple[Any, Any, tuple, tuple]:
    """From the arguments of an operator behind its tensors: scale, lower_bound, the values of OPTIONS, and
    the arguments that only this operator has. PyTorch leaves out what has its default at the end."""
    scale, lower_bound, *rest = arguments
    older, younger = rest[: len(_OLDER)], rest[len(_OLDER) + own :]
    defaults = tuple(YOUNGER.values())[len(younger) :]
    return scale, lower_bound, (*older, *younger, *defaults), tuple(rest[len(_OLDER) :][:own])


def _shape_of_states(cu_seqlens: Any, v: Tensor) -> tuple[Any, ...]:
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (N, v.shape[2], _DIM, _DIM)


# Sizes that C knows. The keys are all that they depend on.

_Look = tuple[int, tuple[int, ...]]  # dtype and shape


def _looks(given: dict[str, Any]) -> tuple[tuple[str, _Look], ...]:
    return tuple(
        (name, (_torch.DTYPES.get(t.dtype, _lib.OTHER), tuple(map(int, t.shape))))
        for name, t in given.items()
    )


def _params_of(options: CallOptions, device: tuple[int, int], looks: tuple) -> Any:
    params = options.function.new_params()
    params.device.type, params.device.index = device
    options.apply_to(params)
    for name, (dtype, shape) in looks:
        if name in ("A_log", "dt_bias"):  # in any shape, and in 16 bits too
            dtype, shape = _lib.F32, (math.prod(shape),)
        _lib.set_shape(getattr(params, name), dtype, shape)
    return params


@lru_cache(maxsize=256)
def _saved_bytes(options: Options, device: tuple[int, int], looks: tuple) -> int:
    return _lib.saved_size(_params_of(options, device, looks))


@lru_cache(maxsize=256)
def _check_goes_back(options: BwdOptions, device: tuple[int, int], looks: tuple) -> None:
    """Refuses a forward pass whose backward pass no kernel can compute, before anything is computed. An error
    is not kept."""
    _lib.bwd_workspace_size(_params_of(options, device, looks))


def _device_of(t: Tensor) -> tuple[int, int]:
    return (_lib.CUDA if t.device.type == "cuda" else _lib.CPU, t.device.index or 0)


def _bytes_to_save(given: dict[str, Any], values: tuple, lower_bound: Any) -> int:
    options = _options_of(FWD, {**given, "out": given["v"]}, values, lower_bound)
    return _saved_bytes(options, _device_of(given["v"]), _looks({**given, "out": given["v"]}))


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    arrays = {n: x for n, x in zip(_READ, arguments) if x is not None}
    scale, lower_bound, values, own = taken_apart(arguments[len(_READ) :], 2)
    output_final_state, save = own
    v = arrays["v"]
    goes_back = {**arrays, "dv": v}
    options = _options_of(BWD, goes_back, values, lower_bound)
    _check_goes_back(options, _device_of(v), _looks(goes_back))
    out, state, saved = _new_results(arrays, values, lower_bound, output_final_state, save)
    written = {"out": out, "final_state": state if output_final_state else None}
    if saved.numel():
        written["saved"] = saved
    _call(FWD, {**arrays, **written}, values, scale, lower_bound)
    return out, state, saved


def _new_results(
    arrays: dict[str, Any], values: tuple, lower_bound: Any, output_final_state: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    v = arrays["v"]
    shape = _shape_of_states(arrays.get("cu_seqlens"), v) if output_final_state else (0,)
    size = _bytes_to_save(arrays, values, lower_bound) if save else 0
    return (
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
        torch.empty(shape, dtype=torch.float32, device=v.device),
        torch.empty(size, dtype=torch.uint8, device=v.device),
    )


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors without memory get the checks that need none. The size of what is saved is a number of C's, so
    a compiler that keeps sizes open fixes them where something is saved."""
    arrays = {n: x for n, x in zip(_READ, arguments) if x is not None}
    _, lower_bound, values, own = taken_apart(arguments[len(_READ) :], 2)
    output_final_state, save = own
    results = _new_results(
        arrays, (int(values[0]) if save else 0, *values[1:]), lower_bound, output_final_state, save
    )
    written = {"out": results[0], **({"final_state": results[1]} if output_final_state else {})}
    given = {**arrays, **written}
    if _torch.all_have_numbers([*given.values()], []):
        given = {n: given[n] for n in (*Options.required_arrays, *Options.optional_arrays) if n in given}
        options = _options_of(FWD, given, (0, *values[1:]), lower_bound)
        _torch.check_without_memory([*given.values()], options)
    return results


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    names = (*_READ, "saved", "dout", "dfinal_state")
    arrays = {n: x for n, x in zip(names, arguments) if x is not None}
    scale, lower_bound, values, (wanted,) = taken_apart(arguments[len(names) :], 1)
    gradients = _new_gradients(arrays, wanted)
    # Gradients without elements need no call, and C takes their addresses for absent ones.
    written = {n: x for n, x in gradients.items() if x.numel()}
    if written:
        _call(BWD, {**arrays, **written}, values, scale, lower_bound)
    return tuple(_as_input(gradients[name], arrays.get(source)) for name, source in zip(GRADIENTS, INPUTS))


def _new_gradients(arrays: dict[str, Any], wanted: int) -> dict[str, Tensor]:
    """What `bwd` writes: contiguous, and those of A_log, dt_bias and the state in fp32."""
    gradients = {}
    for i, (name, source) in enumerate(zip(GRADIENTS, INPUTS)):
        x = arrays.get(source)
        if x is None or not wanted & (1 << i):
            gradients[name] = torch.empty(0, dtype=torch.float32, device=arrays["v"].device)
        else:
            dtype = torch.float32 if source in ("A_log", "dt_bias", "initial_state") else x.dtype
            gradients[name] = torch.empty(x.shape, dtype=dtype, device=x.device)
    return gradients


def _as_input(gradient: Tensor, x: Any) -> Tensor:
    return gradient if x is None else gradient.to(x.dtype)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    arrays = {n: x for n, x in zip(_READ, arguments) if x is not None}
    _, _, _, (wanted,) = taken_apart(arguments[len(_READ) + 3 :], 1)
    gradients = _new_gradients(arrays, wanted)
    return tuple(_as_input(gradients[name], arrays.get(source)) for name, source in zip(GRADIENTS, INPUTS))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    saved = output[2]
    ctx.save_for_backward(*inputs[: len(_READ)], saved if saved.numel() else None)
    scale, lower_bound, values, _ = taken_apart(inputs[len(_READ) :], 2)
    ctx.rest, ctx.count = (scale, lower_bound, *values), len(inputs)
    ctx.set_materialize_grads(False)


def _gradients_of(ctx: Any, dout: Any, dfinal_state: Any, _: Any) -> tuple[Any, ...]:
    return _go_back(getattr(torch.ops.flash_kda, _BACKWARD_NAME), ctx, dout, dfinal_state)


def _go_back(backward: Any, ctx: Any, dout: Any, dfinal_state: Any) -> tuple[Any, ...]:
    """What autograd wants of a backward pass: a gradient or None for each argument of _FORWARD."""
    needed = ctx.needs_input_grad[: len(INPUTS)]
    others = (None,) * (ctx.count - len(INPUTS))
    if dout is None and dfinal_state is None:
        return (None,) * len(INPUTS) + others
    wanted = sum(1 << i for i, needs in enumerate(needed) if needs)
    gradients = backward(*ctx.saved_tensors, dout, dfinal_state, *in_order(ctx.rest, wanted))
    return tuple(x if needs else None for x, needs in zip(gradients, needed)) + others


class _Eager(torch.autograd.Function):
    """What the operator does, for plain tensors. PyTorch's own way to the operator takes several times as
    long as the call itself needs on the host."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Any, dfinal_state: Any, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph: the operator says that there is no second derivative
            return _gradients_of(ctx, dout, dfinal_state, _)
        return _go_back(_backward, ctx, dout, dfinal_state)


def chunk_kda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """arguments: those of _FORWARD. Tensors are no plain ones under a compiler or a dispatch mode, say."""
    if not torch.compiler.is_compiling() and _torch.are_plain(arguments[: len(_READ)]):
        return _Eager.apply(*arguments)
    return getattr(torch.ops.flash_kda, _FORWARD_NAME)(*arguments)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "flash_kda.chunk_kda has no second derivative, and gradients of its gradients were asked for; they "
        "must not depend on gradients of a loss (create_graph=True)"
    )


def refuse_strange(inputs: dict[str, Any]) -> None:
    """Refuses tensors that an eager call cannot compute with: batched ones of torch.vmap, those with a
    tangent, those of several devices, ..."""
    for name, t in inputs.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is of type {type(t).__name__}; it must be a PyTorch tensor")
    names, tensors = tuple(inputs), [*inputs.values()]
    if _torch.takes_dtensors and _torch.is_dtensor(tensors[0]):
        return  # which DTensor itself hands to the operator
    _torch.refuse_distributed(names, tensors)
    _torch.refuse_unreadable(names, tensors)
    if _torch.has_tangents():
        _torch.refuse_tangents(tensors)


def _refuse_batched(*args: Any, **kwargs: Any) -> Any:
    batched = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and _torch.is_batched(t))
    raise TypeError(f"A tensor of the call {_torch.why_unreadable(batched)}")


def _register(wanted: str, schema: str, run: Any, fake: Any, gradients: Any, setup_context: Any) -> str:
    """Registers the operator unless it is there already, and returns its name: see _torch.Operator."""
    for name in itertools.chain([wanted], (f"{wanted}_{i}" for i in itertools.count(2))):
        qualified = f"flash_kda::{name}"
        found = getattr(torch.ops.flash_kda, name, None)
        if found is None:
            break
        schemas = [str(getattr(found, overload)._schema) for overload in found.overloads()]
        if schemas == [f"{qualified}{schema}"]:
            return name
    torch.library.define(
        qualified, schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    )
    torch.library.impl(qualified, ("cpu", "cuda"))(run)
    torch.library.register_autograd(qualified, gradients, setup_context=setup_context)
    torch.library.impl(qualified, "FuncTorchBatched")(_refuse_batched)
    torch.library.register_fake(qualified)(fake)
    return name


_BACKWARD_NAME = _register("chunk_kda_bwd", _BACKWARD, _backward, _fake_backward, _no_second_derivative, None)
_FORWARD_NAME = _register("chunk_kda", _FORWARD, _forward, _fake_forward, _gradients_of, _setup_context)
