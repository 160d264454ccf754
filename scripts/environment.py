"""Keeps the project's virtual environment, .venv: python3 scripts/environment.py GROUP...

A group is a requirements file (see GROUPS). A group that is satisfied already needs no network: neither on
the second run, nor on a machine whose own python3 has the packages, as GPU machines often have PyTorch. The
script uses the standard library alone, and only what Python 3.9 has.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
GROUPS = {
    "build": "scripts/build-requirements.txt",
    "test": "tests/requirements.txt",
    "torch": "tests/requirements-torch.txt",
    "lint": "scripts/lint-requirements.txt",
    "wheel": "scripts/wheel-requirements.txt",
    "docs": "scripts/docs-requirements.txt",
}
NOTES = {
    "torch": "PyTorch for the tests: several GB, this first time only. `make test TORCH=0` goes without it."
}


def say(text: str) -> None:
    print(f"[environment] {text}", flush=True)


def stop(text: str) -> NoReturn:
    sys.exit(f"[environment] {text}")


def succeeds(*command: str | Path) -> bool:
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def as_root() -> list[str] | None:
    """The prefix that makes a command run as root without asking, or None."""
    if os.geteuid() == 0:
        return []
    return ["sudo", "-n"] if succeeds("sudo", "-n", "true") else None


def apt_install(*packages: str) -> bool:
    """Installs Debian packages if that can be done without a question; says whether it did."""
    prefix = as_root()
    if prefix is None or not shutil.which("apt-get"):
        return False
    say(f"apt-get install {' '.join(packages)}")
    install = [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "-q"]
    install += ["--no-install-recommends", *packages]
    if subprocess.run(install).returncode == 0:
        return True
    subprocess.run([*prefix, "apt-get", "update", "-q"])  # a fresh machine has no package lists yet
    return subprocess.run(install).returncode == 0


def need_c_compiler() -> None:
    compiler = os.environ.get("CC", "cc")

    def works() -> bool:
        run = subprocess.run(
            [compiler, "-fsyntax-only", "-x", "c", "-"],
            input=b"#include <stdio.h>\n",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return run.returncode == 0

    if not shutil.which(compiler):
        stop(f"there is no C compiler ({compiler}). On Debian: apt-get install gcc")
    if not works() and not (apt_install("libc6-dev") and works()):
        stop(f"{compiler} cannot compile #include <stdio.h>. On Debian: apt-get install libc6-dev")


def want_cxx_compiler() -> None:
    """nvcc, of which the build fetches one where there is none, needs g++. Without g++ there are no kernels,
    and the build says so."""
    if not shutil.which("g++"):
        apt_install("g++")


def make_venv() -> None:
    """Creates .venv, which sees the packages of python3 if PyTorch is among them."""
    if succeeds(VENV_PYTHON, "-m", "pip", "--version"):
        return
    if sys.version_info < (3, 9):  # noqa: UP036 - this runs before anything could be required
        stop(f"python3 is {sys.version.split()[0]}; it must be 3.9 or newer")
    create = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    say("creating .venv")
    # Debian ships the part of venv that brings pip in a package of its own.
    if not succeeds(*create) and not (apt_install("python3-venv") and succeeds(*create)):
        shutil.rmtree(VENV, ignore_errors=True)
        stop("python3 cannot make a virtual environment. On Debian: apt-get install python3-venv")
    if succeeds(sys.executable, "-c", "import torch"):
        say("python3 has PyTorch, so .venv uses the packages that it has")
        # python3 may itself be of a virtual environment, which --system-site-packages would skip.
        (packages,) = VENV.glob("lib/python3*/site-packages")
        folders = [*site.getsitepackages(), site.getusersitepackages()]
        (packages / "of_python3.pth").write_text("".join(f"{folder}\n" for folder in folders))


def ensure(group: str) -> None:
    path = ROOT / GROUPS[group]
    if not path.exists():
        say(f"{GROUPS[group]} is not there: nothing to install for '{group}'")
        return
    stamp = VENV / f"installed-{group}"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    pip = [str(VENV_PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "-r", str(path)]
    if not succeeds(*pip, "--no-index"):  # succeeds without a look at any index if all packages are there
        say(NOTES.get(group, f"installing {group} packages ({GROUPS[group]})"))
        if subprocess.run([*pip, "--retries", "2"]).returncode != 0:
            if group == "build" and system_build_tools():
                return
            if group == "torch" and succeeds(VENV_PYTHON, "-c", "import torch"):
                say(
                    f"not all of {GROUPS[group]} could be installed; tests that need the rest will be skipped"
                )
                return
            stop(f"could not install {GROUPS[group]} into .venv: the network is needed once")
    stamp.write_text(digest)


def system_build_tools() -> bool:
    """Falls back on the machine's own cmake and ninja, for machines that reach no package index."""
    for tool in ("cmake", "ninja"):
        found = shutil.which(tool)
        if not found:
            return False
        version = subprocess.run([found, "--version"], stdout=subprocess.PIPE, text=True).stdout
        numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
        if tool == "cmake" and numbers < (3, 21):
            return False
        link = VENV / "bin" / tool
        if not link.exists():
            link.symlink_to(found)
    say("using this system's cmake and ninja")
    return True


def main(groups: list[str]) -> None:
    if not groups or any(group not in GROUPS for group in groups):
        stop(f"usage: python3 scripts/environment.py GROUP..., of {', '.join(GROUPS)}")
    need_c_compiler()
    if "build" in groups:
        want_cxx_compiler()
    make_venv()
    for group in groups:
        ensure(group)


if __name__ == "__main__":
    main(sys.argv[1:])
