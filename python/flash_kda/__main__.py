"""`flash-kda` and `python -m flash_kda`: runs the command that is built with the library."""

from __future__ import annotations

import os
import sys

from ._lib import beside_package


def main() -> None:
    command = beside_package("flash-kda")
    if command is None:
        sys.exit("flash_kda: the flash-kda command was not built (FLASH_KDA_TOOLS=OFF)")
    os.execv(command, ["flash-kda", *sys.argv[1:]])


if __name__ == "__main__":
    main()
