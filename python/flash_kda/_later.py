"""Runs a function once another module gets imported."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from typing import Any, Callable


class _Watcher:
    """A finder that finds nothing itself: it asks the others, and wraps the module's execution."""

    def __init__(self, module: str, function: Callable[[], None]):
        self.module, self.function, self.asking = module, function, False

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            self._wrap(spec.loader)
        return spec

    def _wrap(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            vars(loader).pop("exec_module", None)  # another watcher of the module may have done it
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)  # type: ignore[arg-type]
            self.function()

        loader.exec_module = exec_module


def when_imported(module: str, function: Callable[[], None]) -> None:
    sys.meta_path.insert(0, _Watcher(module, function))  # type: ignore[arg-type]
