"""Tests the package with the oldest and the newest Python on this machine, or with all, side by side:
test_pythons.py BUILD [--all]

The package of the build folder runs as it is, since it has no compiled part that depends on Python. Each
version gets an environment of its own in BUILD/pythons, with the oldest NumPy that the package supports on
Pythons that have it and the newest one on the others. PyTorch is left out. Versions are looked for on PATH
as python3.9, python3.10 and so on, and in ~/.pyenv. The last line names the versions that are not there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = range(9, 15)  # the second number of the version
OLDEST_NUMPY, NEWEST_PYTHON_WITH_IT = "numpy==1.26.4", 12
TESTS = (
    "numpy", "dlpack", "interruptible", "installed", "errors", "structure", "structs", "compute", "decode",
    "decode_layer",
)  # fmt: skip


def find(minor: int) -> str | None:
    """A Python of that version that starts: a pyenv shim of a version that is not selected does not."""
    name = f"python3.{minor}"
    shims = Path.home() / ".pyenv" / "versions"
    for path in (shutil.which(name), *sorted(map(str, shims.glob(f"3.{minor}.*/bin/python")))):
        if path and subprocess.run([path, "-c", "pass"], capture_output=True).returncode == 0:
            return path
    return None


def make_environment(python: str, minor: int, folder: Path) -> Path:
    own = folder / "bin" / "python"
    if not own.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
        numpy = OLDEST_NUMPY if minor <= NEWEST_PYTHON_WITH_IT else "numpy"
        install = [str(own), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, numpy, "ml_dtypes", "pytest", "tqdm"], check=True)
    return own


def test(python: Path, build: Path) -> bool:
    files = [str(ROOT / "tests" / "python" / f"test_{name}.py") for name in TESTS]
    environment = {**os.environ, "PYTHONPATH": str(build / "python")}
    run = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    result = subprocess.run(run, env=environment, cwd=build, stdout=subprocess.PIPE, text=True)
    lines = result.stdout.strip().splitlines()
    print(*(lines if result.returncode else lines[-1:]), sep="\n", flush=True)
    return result.returncode == 0


def main(build: Path, with_all: bool) -> int:
    pythons = {minor: find(minor) for minor in SUPPORTED}
    absent = [f"3.{minor}" for minor, python in pythons.items() if python is None]
    found = [minor for minor, python in pythons.items() if python is not None]

    def try_version(minor: int) -> bool:
        version, python = f"3.{minor}", str(pythons[minor])
        print(f"Python {version}: {python}", flush=True)
        return test(make_environment(python, minor, build / "pythons" / version), build)

    tried = found if with_all else sorted({*found[:1], *found[-1:]})
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        results = dict(zip(tried, pool.map(try_version, tried)))
    passed = [f"3.{minor}" for minor in tried if results[minor]]
    failed = [f"3.{minor}" for minor in tried if not results[minor]]
    print(f"pythons: passed {' '.join(passed) or 'none'}; failed {' '.join(failed) or 'none'}; ", end="")
    print(f"not on this machine {' '.join(absent) or 'none'}")
    return bool(failed) or not passed


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[2:] not in ([], ["--all"]):
        sys.exit("usage: python scripts/test_pythons.py BUILD [--all]")
    sys.exit(main(Path(sys.argv[1]).resolve(), len(sys.argv) == 3))
