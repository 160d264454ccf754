"""Modules of released inference engines alone, for tests and benchmarks on machines without the engines.

vLLM and SGLang need a hundred packages, and of each of them few modules are wanted here: layers, kernels and
plug-ins. `python scripts/fetch_engines.py` puts these modules into build-engines/, or FLASH_KDA_ENGINES names
another folder. `alone` makes them importable: everything else that they import is a stand-in, a module whose
attributes are empty classes, unless its attributes are given.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23"}
FETCH = "python scripts/fetch_engines.py"


def find(engine: str) -> Path | None:
    """The folder with the modules of the release of vllm or sglang that is known here, or None."""
    root = os.environ.get("FLASH_KDA_ENGINES") or Path(__file__).resolve().parents[2] / "build-engines"
    folder = Path(root) / f"{engine}-{VERSIONS[engine]}"
    return folder if (folder / engine).is_dir() else None


class _StandIn(ModuleType):
    """A module whose attributes are what was given, its modules, or empty classes."""

    def __init__(self, name: str, finder: _Finder):
        super().__init__(name)
        self.__path__: list[str] = []
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        if self._finder.knows(full):
            return importlib.import_module(full)
        made = type(name, (), {"__init__": lambda self, *arguments, **named: None})
        setattr(self, name, made)
        return made


class _Finder:
    """Finds real modules in a folder, and stands in for all others of some packages."""

    def __init__(self, folder: Path, real: tuple[str, ...], given: dict[str, dict[str, Any]]):
        self.folder, self.real, self.given = folder, real, given
        self.packages = {name.partition(".")[0] for name in (*real, *given)}

    def is_real(self, name: str) -> bool:
        return name not in self.given and any(name == r or name.startswith(r + ".") for r in self.real)

    def knows(self, name: str) -> bool:
        return any(x == name or x.startswith(name + ".") for x in (*self.real, *self.given)) or (
            self.is_real(name) and self._spec_of(name) is not None
        )

    def _spec_of(self, name: str) -> Any:
        return importlib.machinery.PathFinder.find_spec(
            name, [str(self.folder.joinpath(*name.split(".")[:-1]))]
        )

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in self.packages:
            return None
        if self.is_real(name):
            return self._spec_of(name)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> ModuleType:
        return _StandIn(spec.name, self)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.given.get(module.__name__, {}))


@contextlib.contextmanager
def alone(folder: Path, real: tuple[str, ...], given: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Makes the modules named `real`, and the modules in them, importable from the folder. given: attributes
    of stand-ins by the stand-in's name. Modules of their packages are forgotten behind the context."""
    finder = _Finder(folder, real, given)

    def take_out() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] in finder.packages]
        return {name: sys.modules.pop(name) for name in names}

    before = take_out()
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        take_out()
        sys.modules.update(before)
