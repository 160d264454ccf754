"""flash-linear-attention: which calls of chunk_kda this package takes.

flash-linear-attention (FLA) has a backend of its own that calls a package named flash_kda. It asks itself
whether a call suits the backend, and its answer looks neither at the device nor at everything that
`flash_kda.fwd` refuses; 0.5.1 and 0.5.2 also drop `allow_neg_eigval`. So this module replaces that backend,
in FLA's own registry, by one that says no to each call that `fwd` cannot serve. FLA then computes it by
itself.

FLA imports flash_kda in the middle of the first call that it hands over, if nobody did before. That call was
taken without being asked about. If it cannot be served, it goes back to FLA: see `_give_back`.
"""

from __future__ import annotations

import inspect
import sys
from functools import lru_cache
from typing import Any

from . import _later, _lib

MODULE = "fla.ops.kda"  # which has chunk_kda


@lru_cache(maxsize=64)
def why_not_on(type_: str, index: int) -> str:
    """Why the library cannot compute on that device of PyTorch, or ""."""
    kind = {"cpu": _lib.CPU, "cuda": _lib.CUDA}.get(type_)
    for info in _lib.device_infos() if kind is not None else ():
        if (info.device.type, info.device.index) == (kind, index):
            return "" if info.kernel else info.reason.decode(errors="replace")
    return f"there is no device {type_}:{index} that it can use"


def why_not(call: dict[str, Any]) -> str:
    """Why `fwd` cannot serve a call of chunk_kda with these arguments, or "". FLA has looked at some of them:
    bf16 q, K, V, heads, the flags for what is fused, gradients."""
    import torch

    from . import _layout

    bf16, f32, f16 = torch.bfloat16, torch.float32, torch.float16
    takes = {
        "k": (bf16,),
        "v": (bf16,),
        "g": (bf16, f32),
        "beta": (bf16, f32),
        "A_log": (f32, bf16, f16),
        "dt_bias": (f32, bf16, f16),
        "initial_state": (f32, bf16),
        "cu_seqlens": (torch.int64, torch.int32),
    }
    q, lower_bound = call["q"], call.get("lower_bound")
    heads, channels = q.shape[2:]
    if call.get("allow_neg_eigval"):
        return "flash_kda has no allow_neg_eigval"
    if lower_bound is None or not -5 <= lower_bound <= 0:
        return f"flash_kda takes a lower_bound in [-5, 0], and it is {lower_bound}"
    for name, dtypes in takes.items():
        t = call.get(name)
        if t is None and name in ("initial_state", "cu_seqlens"):
            continue
        if not isinstance(t, torch.Tensor):
            return f"flash_kda needs {name}"
        if t.device != q.device:
            return f"{name} is on {t.device} and q on {q.device}"
        if t.dtype not in dtypes:
            return f"flash_kda does not take {name} of {t.dtype}"
        if name in ("A_log", "dt_bias") and not _layout.has_gate_shape(name, t.shape, heads, channels):
            return f"flash_kda does not take {name} of shape {list(t.shape)}"
    return why_not_on(q.device.type, q.device.index or 0)


def _backend_of(theirs: Any, chunk_kda: Any) -> Any:
    """A class like FLA's backend that asks `why_not` too."""
    signature = inspect.signature(inspect.unwrap(chunk_kda))

    def named(args: tuple, kwargs: dict) -> dict[str, Any]:
        """The arguments of a call by name. FLA's backend has them in another order than chunk_kda itself."""
        if not args:
            return kwargs
        arguments = signature.bind(*args, **kwargs).arguments
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        return {**arguments, **arguments.pop(rest, {})} if rest else dict(arguments)

    class Backend(theirs):
        def chunk_kda_verifier(self, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
            call = named(args, kwargs)
            accepted, reason = super().chunk_kda_verifier(**call)
            reason = reason if not accepted else why_not(call)
            return not reason, reason or None

        def chunk_kda(self, *args: Any, **kwargs: Any) -> Any:
            return super().chunk_kda(**named(args, kwargs))

    return Backend


def _adopt() -> None:
    """Replaces FLA's backend. FLA stays as it is where it is not as the versions known here are."""
    try:
        from fla.ops.kda import backends, chunk_kda

        if hasattr(backends, "kda_registry"):  # 0.5
            theirs = backends.FlashKDABackend
            Backend = _backend_of(theirs, chunk_kda)
            backends.kda_registry.register(Backend())
        else:  # 0.6
            from fla.backends import register
            from fla.ops.kda.backends import flash_kda as module

            theirs = module.FlashKDABackend
            Backend = _backend_of(theirs, chunk_kda)
            register(chunk_kda)(Backend)
        in_progress = _frame_of(theirs.chunk_kda)
        if in_progress is not None:
            _give_back_unless_served(in_progress, Backend, chunk_kda)
    except Exception:  # FLA's import must not fail for what this package wants of it
        return


def _frame_of(function: Any) -> Any:
    """The innermost frame of this thread that runs the function, or None."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame


def _give_back_unless_served(frame: Any, Backend: Any, chunk_kda: Any) -> None:
    """frame: of FLA's backend, which imports flash_kda and will call its fwd."""
    caller = frame.f_back.f_locals  # FLA's dispatcher, which has the arguments of chunk_kda
    args, kwargs = caller["args"], caller["kwargs"]
    if not Backend().verify("chunk_kda", *args, **kwargs)[0]:
        _give_back(frame, chunk_kda, args, kwargs)


def _give_back(frame: Any, chunk_kda: Any, args: tuple, kwargs: dict) -> None:
    """Makes the call of fwd from that frame ask FLA's chunk_kda again, which now chooses another way."""
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
        _adopt()
    else:
        _later.when_imported(MODULE, _adopt)
