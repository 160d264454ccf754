"""What the plug-ins for inference engines, vllm.py and sglang.py, have in common.

A plug-in must never break its engine. So each of them changes the engine only where the engine is as the
release that the plug-in knows, says in one line of the log what it did or why it did nothing, and gives a
call that this package refuses back to the engine. A call that is refused has written nothing.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from typing import Any, Callable

from . import _later

_OFF = ("0", "off", "false", "no")


def setting(variable: str) -> str:
    """The environment variable in lower case, "off" if it turns the plug-in off."""
    value = os.environ.get(variable, "").strip().lower()
    return "off" if value in _OFF else value


def package() -> Any:
    """flash_kda, which is looked up at each call, as tests and users may replace its functions."""
    return sys.modules[__package__]


class Log:
    """Lines of a plug-in in its engine's log. A line is said once for each key, and the lines end after some,
    as reasons may hold sizes of calls, of which a server has many."""

    _MOST = 64

    def __init__(self, name: str):
        self._logger = logging.getLogger(name)
        self._said: set[Any] = set()

    def once(self, key: Any, line: str, level: int = logging.INFO) -> None:
        if key not in self._said and len(self._said) < self._MOST:
            self._said.add(key)
            self._logger.log(level, "flash_kda: %s", line)


def when_there(module: str, adopt: Callable[[Any], None], log: Log) -> None:
    """Calls adopt with the module, now or once the engine has imported it. What adopt raises becomes a line
    of the log, as it would otherwise be raised in the middle of the engine's import."""

    def guarded() -> None:
        try:
            adopt(sys.modules[module])
        except Exception as error:
            log.once(
                ("adopt", module),
                f"leaves {module} as it is, which failed to be changed: {type(error).__name__}: {error}",
                logging.WARNING,
            )

    found = sys.modules.get(module)
    if found is not None and not getattr(found.__spec__, "_initializing", False):
        guarded()
    else:
        _later.when_imported(module, guarded)


def parameters_of(function: Any) -> tuple[str, ...]:
    """The names of a function's parameters, in their order."""
    return tuple(inspect.signature(function).parameters)


def differing(owner: Any, known: dict[str, tuple[str, ...]]) -> str:
    """The first of the owner's functions whose parameters are not the known ones, in words, or ""."""
    for name, parameters in known.items():
        function = getattr(owner, name, None)
        if function is None:
            return f"{owner.__name__} has no {name}"
        if parameters_of(function) != parameters:
            return f"{owner.__name__}.{name} takes other arguments than those that this plug-in knows"
    return ""
