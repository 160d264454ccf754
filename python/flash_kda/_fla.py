"""flash-linear-attention: which calls of chunk_kda and fused_recurrent_kda this package takes.

flash-linear-attention (FLA) has a backend of its own that calls a package named flash_kda. The backend knows
MoonshotAI's interface: it takes no softplus gate, no states with K first, no more value heads than heads of q
and k, and it looks neither at the device nor at everything that `flash_kda.fwd` refuses; in 0.5.1 and 0.5.2
it also drops `allow_neg_eigval`. So this module replaces that backend, in FLA's own registry, by one that
takes each call that `flash_kda.chunk_kda` can serve, and says no to all others. FLA then computes these by
itself.

The same backend takes FLA's inner function fused_recurrent_kda_fwd, for which FLA has no backend. FLA 0.6
asks its registry before it computes that function. FLA 0.5 does not, so `flash_kda.fla.install` puts FLA's
own dispatcher around it (`dispatch_recurrent`). The inner function also knows pools of states, which stay
with FLA.

FLA imports flash_kda in the middle of the first call that it hands over, if nobody did before. That call was
taken by FLA's own backend, so it goes back to FLA, which then asks this one: see `_give_back`.
"""

from __future__ import annotations

import inspect
import sys
from functools import lru_cache
from typing import Any, NamedTuple

from . import _fla_context, _later, _lib, _shapes

MODULE = "fla.ops.kda"  # which has chunk_kda


class Call(NamedTuple):
    """One call that FLA has offered to this package.

    Attributes:
        function: "chunk_kda" or "fused_recurrent_kda".
        reason: why this package left the call to FLA, or "": this package took it.
    """

    function: str
    reason: str


records: list[list[Call]] = []  # of `flash_kda.fla.record`: each gets every call
is_off = False  # after `flash_kda.fla.uninstall`
takes_contexts = False  # whether `flash_kda.fla.install` was asked for context parallelism


def _decide(function: str, reason: str) -> tuple[bool, str | None]:
    """What a verifier of FLA returns. reason: why the call stays with FLA, or ""."""
    for record in records:
        record.append(Call(function, reason))
    return not reason, reason or None


@lru_cache(maxsize=64)
def why_not_on(type_: str, index: int) -> str:
    """Why the library cannot compute on that device of PyTorch, or ""."""
    kind = {"cpu": _lib.CPU, "cuda": _lib.CUDA}.get(type_)
    for info in _lib.device_infos() if kind is not None else ():
        if (info.device.type, info.device.index) == (kind, index):
            return "" if info.kernel else info.reason.decode(errors="replace")
    return f"there is no device {type_}:{index} that it can use"


@lru_cache(maxsize=256)
def _why_not_kernel(device: tuple[int, int], HV: int, options: tuple[tuple[str, Any], ...]) -> str:
    """Why no kernel of the device computes with these options, or ""."""
    shape = _shapes.Shape(64, 1, 1, HV, **dict(options))
    try:
        _lib.workspace_size(shape.params(_lib.Device(*device)))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


@lru_cache(maxsize=256)
def _why_not_gradients(device: tuple[int, int], HV: int, options: tuple[tuple[str, Any], ...]) -> str:
    """Why gradients of calls with these options stay with FLA on the device, or "". On a GPU they stay with
    FLA unless kernel `hopper` computes them: those of kernel `portable` take longer than FLA's."""
    kernel = "hopper" if device[0] == _lib.CUDA else None
    reason = _shapes.why_no_gradients(device, HV, (*options, ("kernel", kernel)))
    if reason and kernel:
        return f"flash_kda computes gradients faster than FLA with kernel hopper alone, and {reason}"
    return reason


_TENSORS = ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens", "A_log", "dt_bias")
_MAY_BE_ABSENT = ("initial_state", "cu_seqlens", "A_log", "dt_bias")


def _why_not_tensors(call: dict[str, Any]) -> str:
    """Why `fwd` cannot serve a call with these tensors, or ""."""
    import torch

    tensors = [call.get(name) for name in _TENSORS]
    looks: list[Any] = []
    for name, t in zip(_TENSORS, tensors):
        if t is None and name in _MAY_BE_ABSENT:
            looks.append(None)
        elif isinstance(t, torch.Tensor):
            looks.append((t.dtype, t.shape, t.device))
        else:
            return f"flash_kda needs {name}"
    return _why_not_looks(tuple(looks), bool(call.get("use_gate_in_kernel")))


def _first_with_gradient(call: dict[str, Any]) -> str:
    """The name of the first tensor of the call that gets a gradient, or ""."""
    import torch

    if torch.is_grad_enabled():
        for name in _TENSORS:
            is_used = call.get("use_gate_in_kernel") or name not in ("A_log", "dt_bias")
            if is_used and call.get(name) is not None and call[name].requires_grad:
                return name
    return ""


@lru_cache(maxsize=1024)
def _why_not_looks(looks: tuple[Any, ...], with_gate: bool) -> str:
    """looks: dtype, shape and device of each of _TENSORS, or None where there is none. In a model, calls of
    few looks follow each other, so what is found is kept."""
    import torch

    bf16, f32, f16 = torch.bfloat16, torch.float32, torch.float16
    look = dict(zip(_TENSORS, looks))
    (_, q_shape, device), v_shape = look["q"], look["v"][1]
    if len(q_shape) != 4 or len(v_shape) != 4:
        return f"flash_kda does not take q of shape {list(q_shape)} and v of shape {list(v_shape)}"
    (B, T, H, K), HV = q_shape, v_shape[2]
    N = B if look["cu_seqlens"] is None else look["cu_seqlens"][1].numel() - 1
    rows = (B, T, HV, K)
    # The dtypes and the shape that each tensor may have, or its number of elements.
    takes: dict[str, tuple[tuple[Any, ...], Any]] = {
        "q": ((bf16,), (B, T, H, K)),
        "k": ((bf16,), (B, T, H, K)),
        "v": ((bf16,), rows),
        "g": ((bf16, f32), rows),
        "beta": ((bf16, f32), rows[:3]),
        "initial_state": ((f32,), (N, HV, K, K)),
        "cu_seqlens": ((torch.int64, torch.int32), (N + 1,)),
    }
    if with_gate:
        takes |= {"A_log": ((f32, bf16, f16), HV), "dt_bias": ((f32, bf16, f16), HV * K)}
    if K != 128 or v_shape[-1] != 128:
        return f"flash_kda takes K = V = 128, and they are {K} and {v_shape[-1]}"
    if HV % H:
        return f"flash_kda takes HV that is a multiple of H, and they are {HV} and {H}"
    for name, (dtypes, wanted) in takes.items():
        if look[name] is None:
            continue
        dtype, shape, where = look[name]
        if where != device:
            return f"{name} is on {where} and q on {device}"
        if dtype not in dtypes:
            return f"flash_kda does not take {name} of {dtype}"
        if (shape.numel() if isinstance(wanted, int) else shape) != wanted:
            return f"flash_kda does not take {name} of shape {list(shape)}"
    return ""


def why_not(call: dict[str, Any]) -> str:
    """Why `flash_kda.chunk_kda` cannot serve a call of FLA's chunk_kda with these arguments, or ""."""
    import torch

    with_gate, with_sigmoid = call.get("use_gate_in_kernel"), call.get("use_beta_sigmoid_in_kernel")
    lower_bound, twice = call.get("lower_bound"), call.get("allow_neg_eigval")
    if call.get("cp_context") is not None:
        if not takes_contexts:
            return "flash_kda takes cp_context after flash_kda.fla.install(context_parallel=True) alone"
        if reason := _fla_context.why_not(call):
            return reason
        call = {**call, "cu_seqlens": call["cp_context"].cu_seqlens}
    if call.get("return_intermediate_states") and (
        not torch.is_inference_mode_enabled() or call.get("disable_recompute")
    ):
        return "flash_kda returns intermediate states in inference mode alone, without disable_recompute"
    if with_gate and lower_bound is not None and not -5 <= lower_bound <= 0:
        return f"flash_kda takes a lower_bound in [-5, 0], and it is {lower_bound}"
    if with_gate and lower_bound is None and call.get("A_log") is None:
        return "flash_kda needs A_log"
    if twice and not with_sigmoid:
        return "flash_kda takes allow_neg_eigval with use_beta_sigmoid_in_kernel alone"
    reason = _why_not_tensors(call)
    if reason:
        return reason
    q = call["q"]
    kind, index = q.device.type, q.device.index or 0
    state_v_first = bool(call.get("state_v_first") or call.get("transpose_state_layout"))
    options = {
        "lower_bound": lower_bound if lower_bound is None else float(lower_bound),
        "use_gate_in_kernel": bool(with_gate),
        "use_qk_l2norm_in_kernel": bool(call.get("use_qk_l2norm_in_kernel")),
        "use_beta_sigmoid_in_kernel": bool(with_sigmoid),
        "allow_neg_eigval": bool(twice),
        "state_v_first": state_v_first,
        "fp32_gate": call["g"].dtype == torch.float32 or call["beta"].dtype == torch.float32,
        "checkpoints": 1 if call.get("return_intermediate_states") else 0,
    }
    if kind == "cpu" or kind == "cuda":
        device = (_lib.CPU if kind == "cpu" else _lib.CUDA, index)
        group = call["v"].shape[2] // q.shape[2]
        reason = _why_not_kernel(device, group, tuple(options.items()))
        if not reason and _first_with_gradient(call):
            of_bwd = tuple((name, x) for name, x in options.items() if name in _OPTIONS_OF_GRADIENTS)
            reason = _why_not_gradients(device, group, of_bwd)
    return why_not_on(kind, index) or reason


# Those of the options in `why_not` that `bwd` has too.
_OPTIONS_OF_GRADIENTS = (
    "lower_bound",
    "use_gate_in_kernel",
    "use_qk_l2norm_in_kernel",
    "use_beta_sigmoid_in_kernel",
    "allow_neg_eigval",
    "state_v_first",
)


def why_not_recurrent(call: dict[str, Any]) -> str:
    """Why `flash_kda.fused_recurrent_kda` cannot serve a call of FLA's fused_recurrent_kda_fwd with these
    arguments, or ""."""
    for name in ("ssm_state_indices", "num_accepted_tokens", "out"):
        if call.get(name) is not None:
            return f"flash_kda.fused_recurrent_kda does not take {name}"
    if call.get("inplace_final_state", True):
        return "flash_kda.fused_recurrent_kda returns a new final state"
    reason = why_not(call)
    if not reason and (name := _first_with_gradient(call)):
        return f"flash_kda.fused_recurrent_kda has no gradients, and {name} requires a gradient"
    return reason


_OFF = "flash_kda.fla.uninstall() was called"


def _function(name: str) -> Any:
    """A function of the package, as the package has it now."""
    return getattr(sys.modules[__package__], name)


def _keywords_of(name: str) -> set[str]:
    """The keywords that a function of the package takes, without those behind **kwargs."""
    ours = inspect.signature(_function(name)).parameters.values()
    return {p.name for p in ours if p.kind is not p.VAR_KEYWORD}


def _taken(call: dict[str, Any], takes: set[str]) -> dict[str, Any]:
    """A call of FLA as this package takes it. FLA ignores keywords that it does not know."""
    call = dict(call)
    if "transpose_state_layout" in call:  # as FLA 0.5.0 calls it
        call["state_v_first"] = call.pop("transpose_state_layout")
    return {name: x for name, x in call.items() if name in takes}


def _backend_of(theirs: Any, chunk_kda: Any) -> Any:
    """A class like FLA's backend that takes what this package can serve."""
    signature = inspect.signature(inspect.unwrap(chunk_kda))
    of_chunk = _keywords_of("chunk_kda") | {"A_log", "dt_bias", "chunk_size"}
    of_recurrent = _keywords_of("fused_recurrent_kda")

    def named(args: tuple, kwargs: dict) -> dict[str, Any]:
        """The arguments of a call by name. FLA's backend has them in another order than chunk_kda itself."""
        if not args:
            return kwargs
        arguments = signature.bind(*args, **kwargs).arguments
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        more = arguments.pop(rest, {}) if rest else {}
        return {**arguments, **more}

    class Backend(theirs):
        def chunk_kda_verifier(self, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
            return _decide("chunk_kda", _OFF if is_off else why_not(named(args, kwargs)))

        def chunk_kda(self, *args: Any, **kwargs: Any) -> Any:
            call = _taken(named(args, kwargs), of_chunk)
            if call.get("cp_context") is not None:
                return _fla_context.chunk_kda(call)
            return _function("chunk_kda")(**call)

        def fused_recurrent_kda_fwd_verifier(self, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
            reason = "its arguments have no names" if args else why_not_recurrent(kwargs)
            return _decide("fused_recurrent_kda", _OFF if is_off else reason)

        def fused_recurrent_kda_fwd(self, **call: Any) -> Any:
            return _function("fused_recurrent_kda")(**_taken(call, of_recurrent))

    return Backend


def adopt() -> None:
    """Replaces FLA's backend. Raises an exception where FLA is not as the versions known here are."""
    from fla.ops.kda import backends, chunk_kda

    if hasattr(backends, "kda_registry"):  # 0.5
        theirs = backends.FlashKDABackend
        backends.kda_registry.register(_backend_of(theirs, chunk_kda)())
    else:  # 0.6
        from fla.backends import register
        from fla.ops.kda.backends import flash_kda as module

        theirs = module.FlashKDABackend
        Backend = _backend_of(theirs, chunk_kda)
        register(chunk_kda)(Backend)
        register("kda")(Backend)
    in_progress = _frame_of(theirs.chunk_kda)
    if in_progress is not None:
        caller = in_progress.f_back.f_locals  # FLA's dispatcher, which has the arguments of chunk_kda
        _give_back(in_progress, chunk_kda, caller["args"], caller["kwargs"])


def dispatch_recurrent() -> None:
    """Makes FLA 0.5 ask its registry before it computes fused_recurrent_kda_fwd, as FLA 0.6 does."""
    from fla.ops.kda import backends, fused_recurrent

    inner = fused_recurrent.fused_recurrent_kda_fwd
    if hasattr(backends, "kda_registry") and not getattr(inner, "_asks_flash_kda", False):
        asking = backends.dispatch("kda")(inner)
        asking._asks_flash_kda = True
        fused_recurrent.fused_recurrent_kda_fwd = asking


def _adopt_if_possible() -> None:
    """FLA stays as it is where it is not as the versions known here are, since FLA's import must not fail for
    what this package wants of it."""
    try:
        adopt()
    except Exception:
        return


def _frame_of(function: Any) -> Any:
    """The innermost frame of this thread that runs the function, or None."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame


def _give_back(frame: Any, chunk_kda: Any, args: tuple, kwargs: dict) -> None:
    """frame: of FLA's own backend, which imports flash_kda and will call its fwd. Makes this call ask FLA's
    chunk_kda again, which now has the other backend."""
    package: Any = sys.modules[__package__]
    fwd = package.fwd

    def fwd_of_the_first_call(*arguments: Any, **options: Any) -> None:
        if sys._getframe(1) is not frame:
            return fwd(*arguments, **options)
        package.fwd = fwd
        out, final_state = chunk_kda(*args, **kwargs)[:2]
        arguments[6].copy_(out)
        if options.get("final_state") is not None:
            options["final_state"].copy_(final_state)

    package.fwd = fwd_of_the_first_call


def serve() -> None:
    """Adopts FLA's backend now, or once FLA is imported."""
    if hasattr(sys.modules.get(MODULE), "chunk_kda"):
        _adopt_if_possible()
    else:
        _later.when_imported(MODULE, _adopt_if_possible)
