"""flash-linear-attention (FLA) 0.5 to 0.6, and the models of transformers that call it, on this package.

FLA asks a registry of backends before it computes `chunk_kda` or `fused_recurrent_kda`. `install` puts this
package into the registry, and so does importing this module: at once if FLA is imported already, else as soon
as FLA is. A call that this package cannot serve, because its
tensors are in fp16, say, stays with FLA. `record`
shows which calls were taken and which were not, with the reason.

    import flash_kda.fla

    with flash_kda.fla.record() as calls, torch.no_grad():
        model.generate(prompt)
    print(calls[0])  # Call(function='chunk_kda', reason='')

FLA's environment variables hold: with FLA_FLASH_KDA=0 FLA leaves this package out, from one call to the next,
and with FLA_DISABLE_BACKEND_DISPATCH=1 at the import of FLA it leaves out all backends.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator

from . import _fla, _later
from ._fla import Call

__all__ = ["Call", "install", "record", "uninstall"]


def install(context_parallel: bool = False) -> None:
    """Makes FLA call this package for what the package can serve. Imports FLA if nobody did.

    FLA 0.6 asks its registry about `chunk_kda` and `fused_recurrent_kda`. FLA 0.5 asks about `chunk_kda`
    alone, so FLA's dispatcher is put around the inner function of its `fused_recurrent_kda` too.

    Args:
        context_parallel: whether calls of `chunk_kda` with `cp_context` are taken too, by
            `flash_kda.distributed.chunk_kda`. It must be the same on all ranks.

    Raises:
        ImportError: FLA is not installed, or cannot be imported.
        RuntimeError: FLA has no registry of backends as the versions 0.5 to 0.6 have it, or its registry is
            turned off by FLA_DISABLE_BACKEND_DISPATCH=1.
    """
    try:
        importlib.import_module(_fla.MODULE)
    except ModuleNotFoundError as error:
        if error.name not in ("fla", "fla.ops", _fla.MODULE):
            raise
        raise ImportError(
            "flash_kda.fla needs flash-linear-attention 0.5 or newer, which is not installed; "
            "`pip install flash-linear-attention` installs it"
        ) from error
    where = sys.modules.get("fla.backends") or sys.modules.get("fla.ops.backends")
    if getattr(where, "_DISPATCH_DISABLED", False):
        raise RuntimeError(
            "FLA_DISABLE_BACKEND_DISPATCH was 1 when flash-linear-attention was imported, so it asks no "
            "backend; it must be unset, or 0"
        )
    try:
        _fla.adopt()
        _fla.dispatch_recurrent()
    except Exception as error:
        found = getattr(sys.modules.get("fla"), "__version__", "of unknown version")
        raise RuntimeError(
            f"flash-linear-attention {found} has no registry of KDA backends that flash_kda knows "
            f"({type(error).__name__}: {error}); the versions from 0.5 to 0.6 have one"
        ) from error
    _fla.is_off = False
    _fla.takes_contexts = bool(context_parallel)


def uninstall() -> None:
    """Leaves all calls to FLA from now on, until `install` is called again."""
    _fla.is_off = True


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """A list of all calls that FLA offers to this package while the context is open, in all threads.

    FLA offers no calls while FLA_FLASH_KDA is 0. The list then stays empty.
    """
    calls: list[Call] = []
    _fla.records.append(calls)
    try:
        yield calls
    finally:
        _fla.records[:] = [each for each in _fla.records if each is not calls]


def _install_if_possible() -> None:
    # FLA's import must not fail for what this module wants of it. `install` says what is missing.
    with contextlib.suppress(Exception):
        install()


if hasattr(sys.modules.get(_fla.MODULE), "chunk_kda"):
    _install_if_possible()
else:
    _later.when_imported(_fla.MODULE, _install_if_possible)
