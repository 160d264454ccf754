"""The command `flash-kda`, outside of the package so that another package of the same name cannot hide it."""

from __future__ import annotations

import importlib.util
import os
import sys

_PACKAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "flash_kda")


def main() -> None:
    spec = importlib.util.find_spec("flash_kda")
    if (
        spec is None
        or spec.origin is None
        or not os.path.exists(spec.origin[: -len("__init__.py")] + "_lib.py")
    ):
        print(
            f"flash-kda: warning: `import flash_kda` does not find this package, in {_PACKAGE}, but "
            f"{spec.origin if spec else 'none'}: remove the other package",
            file=sys.stderr,
        )
    command = os.path.join(_PACKAGE, "flash-kda")
    if not os.path.exists(command):  # an editable installation has the modules in another folder
        from flash_kda.__main__ import main as run

        run()
    os.execv(command, ["flash-kda", *sys.argv[1:]])
