"""What is timed. A competitor turns one set of arguments into a call.

The call returns (out, final state or None).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from typing import Any, Callable

Call = Callable[[], tuple]
Competitor = Callable[[dict], Call]


def load(spec: dict[str, Any]) -> tuple[Competitor, str]:
    """The competitor that a spec describes, and its version.

    The spec has "kind" ("flash_kda", "fla" or "path"), the "path" of a peer, "kernel" and "cut" of this
    library (None: its own choice), and "tunes_once" of FLA.
    """
    if spec["kind"] == "fla":
        return _load_fla(spec.get("tunes_once", False))
    module = importlib.import_module("flash_kda") if spec["kind"] == "flash_kda" else _load_peer(spec["path"])
    if not callable(getattr(module, "fwd", None)):
        raise ImportError(f"{spec.get('path', 'flash_kda')} defines no fwd")
    version = getattr(module, "__version__", None)
    # Only what was asked for is passed on, so that a build that lacks an argument can be timed without it.
    asked = {name: spec[name] for name in ("kernel", "cut") if spec.get(name)}
    return _writes_into(functools.partial(module.fwd, **asked)), str(version or "of unknown version")


def _load_peer(path: str) -> Any:
    """A .py file, or the package flash_kda in a folder."""
    if os.path.isfile(path):
        spec = importlib.util.spec_from_file_location("timed_peer", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, path)
    module = importlib.import_module("flash_kda")
    # Without resolve(): a build folder's package has links to the modules of its source tree.
    found = Path(os.path.abspath(module.__file__ or ""))
    if Path(os.path.abspath(path)) not in found.parents:
        raise ImportError(f"{path} holds no package flash_kda; Python found one elsewhere")
    return module


def _writes_into(fwd: Callable[..., Any]) -> Competitor:
    import torch

    def competitor(x: dict) -> Call:
        out = torch.empty_like(x["v"])
        final = torch.empty_like(x["initial_state"]) if "initial_state" in x else None
        more = {}
        if "cu_seqlens" in x and "max_seqlen" in inspect.signature(fwd).parameters:
            more["max_seqlen"] = int(x["cu_seqlens"].diff().max())  # a server knows it

        def call() -> tuple:
            fwd(**x, **more, out=out, final_state=final)
            return out, final

        return call

    return competitor


def _load_fla(tunes_once: bool) -> tuple[Competitor, str]:
    # Set before FLA is imported, so that it runs its own Triton kernels and dispatches to no other package.
    os.environ["FLA_FLASH_KDA"] = "0"
    os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"
    if tunes_once:
        from .tuning import tune_once

        tune_once()
    import fla
    from fla.ops.kda import chunk_kda

    flags = {
        "use_gate_in_kernel": True,
        "use_qk_l2norm_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "safe_gate": True,
        "state_v_first": True,
    }
    last: list[Any] = [None, None]  # cu_seqlens and its copy on the host, since FLA caches by identity

    def competitor(x: dict) -> Call:
        arguments = x | flags | {"output_final_state": "initial_state" in x}
        arguments["dt_bias"] = x["dt_bias"].reshape(-1)
        if "cu_seqlens" in x:
            if last[0] is not x["cu_seqlens"]:
                last[:] = [x["cu_seqlens"], x["cu_seqlens"].cpu()]
            arguments["cu_seqlens_cpu"] = last[1]
        return lambda: chunk_kda(**arguments)

    return competitor, fla.__version__
