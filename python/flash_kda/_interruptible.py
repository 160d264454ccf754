"""Calls of C that take long on the CPU, which Ctrl-C can stop.

Python runs the handlers of signals in its main thread, between two steps of Python code: a call of C in the
main thread would keep them waiting. So C computes a long call from the main thread in a thread of its own,
and lets Python handle signals meanwhile. If a handler raises (KeyboardInterrupt, or anything else: a
timeout's exception, SystemExit), C stops computing, and the exception goes on once C has stopped, since C
uses the caller's arrays until then. What the call has written is unspecified in that case. A handler that
returns changes nothing. More signals wait until the call is over.

In other threads Python runs no handlers, so there C is called as it is.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from . import _lib

_fwd = _lib.lib.flash_kda_fwd, _lib.with_signals("flash_kda_fwd")
_reference = _lib.lib.flash_kda_reference, _lib.with_signals("flash_kda_reference")
_bwd = _lib.lib.flash_kda_bwd, _lib.with_signals("flash_kda_bwd")
_affine_map = _lib.lib.flash_kda_map, _lib.with_signals("flash_kda_map")
_bwd_reference = _lib.lib.flash_kda_bwd_reference, _lib.with_signals("flash_kda_bwd_reference")
_decode = _lib.lib.flash_kda_decode, _lib.with_signals("flash_kda_decode")
_decode_reference = _lib.lib.flash_kda_decode_reference, _lib.with_signals("flash_kda_decode_reference")
_decode_layer = _lib.lib.flash_kda_decode_layer, _lib.with_signals("flash_kda_decode_layer")
_decode_layer_reference = (
    _lib.lib.flash_kda_decode_layer_reference,
    _lib.with_signals("flash_kda_decode_layer_reference"),
)
_apply = _lib.lib.flash_kda_apply, _lib.with_signals("flash_kda_apply")


def fwd(params: _lib.FwdParams) -> None:
    """The forward pass. params.interrupt is not looked at."""
    _call(_fwd, params)


def reference(params: _lib.FwdParams, out64: Any, state64: Any, checkpoints64: Any = None) -> None:
    """The fp64 definition. params.interrupt is not looked at."""
    _call(_reference, params, out64, state64, checkpoints64)


def bwd(params: _lib.BwdParams) -> None:
    """The backward pass. params.interrupt is not looked at."""
    _call(_bwd, params)


def affine_map(params: _lib.MapParams) -> None:
    """Maps of pieces. params.interrupt is not looked at."""
    _call(_affine_map, params)


def bwd_reference(params: _lib.BwdParams, gradients: Any) -> None:
    """Its fp64 definition. params.interrupt is not looked at."""
    _call(_bwd_reference, params, gradients)


def decode(params: _lib.DecodeParams) -> None:
    """A few tokens of each sequence. params.interrupt is not looked at."""
    _call(_decode, params)


def decode_reference(params: _lib.DecodeParams, out64: Any, states64: Any) -> None:
    """Its fp64 definition. params.interrupt is not looked at."""
    _call(_decode_reference, params, out64, states64)


def decode_layer(params: _lib.DecodeLayerParams) -> None:
    """A few tokens of a layer. params.interrupt is not looked at."""
    _call(_decode_layer, params)


def decode_layer_reference(params: _lib.DecodeLayerParams, out64: Any, states64: Any) -> None:
    """Its fp64 definition. params.interrupt is not looked at."""
    _call(_decode_layer_reference, params, out64, states64)


def apply_records(params: _lib.ApplyParams) -> None:
    """Brings states up to date. params.interrupt is not looked at."""
    _call(_apply, params)


def _call(variants: tuple[Any, Any], params: Any, *more: Any) -> None:
    in_main_thread = threading.get_ident() == threading.main_thread().ident
    status = variants[in_main_thread](ctypes.byref(params), *more)
    if status:
        raise _lib.last_error(status)
