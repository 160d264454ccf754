"""Fetches nvcc from PyPI into a folder of the build: python3 scripts/fetch_nvcc.py FOLDER

cmake/cuda.cmake runs this script where a machine has no nvcc. Nothing is installed outside of FOLDER, so no
rights are needed. The last line of the output is the path of nvcc. If nvcc cannot be had, the last line is
one sentence that says why, and the exit status is 1. The script uses the standard library alone, and only
what Python 3.9 has.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().with_name("nvcc-requirements.txt")


def works(*command: str | Path) -> bool:
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def installer(folder: Path) -> list[str] | None:
    """The command that installs into a folder, without its last arguments, or None if there is none.

    Python runs isolated (-I): the environment in which pip builds a package hides pip itself otherwise.
    """
    pip = ["-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-compile", "--quiet"]
    if works(sys.executable, "-I", "-m", "pip", "--version"):
        return [sys.executable, *pip]
    if shutil.which("uv"):
        return ["uv", "pip", "install", "--python", sys.executable, "--quiet"]
    # Debian's python3 has no pip, but a virtual environment of it may have one.
    if works(sys.executable, "-I", "-m", "venv", "--clear", folder / "pip"):
        return [str(folder / "pip" / "bin" / "python"), *pip]
    return None


def find(folder: Path) -> Path | None:
    return next((path for path in sorted(folder.glob("nvidia/*/bin/nvcc")) if os.access(path, os.X_OK)), None)


def fetch(folder: Path) -> str:
    """Why nvcc could not be fetched, or ""."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"PyPI has no nvcc for {platform.system()} on {platform.machine()}"
    command = installer(folder)
    if command is None:
        return f"there is neither pip for {sys.executable} nor uv to fetch it from PyPI with"
    # Only a whole installation gets the folder's name: one that was interrupted is not found next time.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    arguments = ["--target", str(partial), "-r", str(REQUIREMENTS)]
    done = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0 or find(partial) is None:
        print(done.stdout)
        return "it could not be fetched from PyPI (is there a network?)"
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return ""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python3 scripts/fetch_nvcc.py FOLDER")
        return 2
    folder = Path(arguments[0]).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    reason = "" if find(folder) else fetch(folder)
    if reason:
        print(reason)
        return 1
    print(find(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
