"""How the build gets nvcc where a machine has none. pip is made up, nvcc is tests/pretend_nvcc/nvcc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from test_scripts import ROOT, load

NVCC = "nvidia/cu13/bin/nvcc"
# Stands in for pip: notes its arguments, and installs a nvcc into the folder after --target.
PIP = f"""\
#!/bin/sh
echo "$*" >>"$PIP_LOG"
[ -z "$PIP_FAILS" ] || {{ echo "ERROR: no network"; exit 1; }}
while [ "$1" != --target ]; do shift; done
mkdir -p "$2/nvidia/cu13/bin"
cp {ROOT}/tests/pretend_nvcc/nvcc "$2/{NVCC}"
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    pip = tmp_path / "pip"
    pip.write_text(PIP)
    pip.chmod(0o755)
    monkeypatch.setenv("PIP_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PIP_FAILS", "")
    (tmp_path / "log").touch()
    module = load("scripts/fetch_nvcc.py")
    monkeypatch.setattr(module, "installer", lambda folder: [str(pip)])
    return module


def test_fetch(script, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "build" / "nvcc"
    (tmp_path / "build" / "nvcc.partial").mkdir(parents=True)  # an earlier call was interrupted
    monkeypatch.setenv("PIP_FAILS", "1")
    assert script.main([str(folder)]) == 1
    assert capsys.readouterr().out.endswith("could not be fetched from PyPI (is there a network?)\n")
    assert not folder.exists()
    monkeypatch.setenv("PIP_FAILS", "")
    for _ in range(2):
        assert script.main([str(folder)]) == 0
        assert capsys.readouterr().out == f"{folder / NVCC}\n"
    calls = (tmp_path / "log").read_text().splitlines()
    assert len(calls) == 2, "what was fetched once is not fetched again"
    assert calls[-1].endswith(f"-r {ROOT}/scripts/nvcc-requirements.txt")


def test_without_pip(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "installer", lambda folder: None)
    assert script.main([str(tmp_path / "nvcc")]) == 1
    assert "there is neither pip for" in capsys.readouterr().out
    monkeypatch.setattr(script.platform, "machine", lambda: "riscv64")
    assert script.main([str(tmp_path / "nvcc")]) == 1
    assert capsys.readouterr().out == "PyPI has no nvcc for Linux on riscv64\n"
    assert script.main([]) == 2


def test_the_installer_is_one_of_this_machine(tmp_path):
    command = load("scripts/fetch_nvcc.py").installer(tmp_path)
    assert command is None or shutil.which(command[0])


def test_versions_are_of_one_toolkit():
    """nvcc and its parts come from one release, or they do not fit each other."""
    text = (ROOT / "scripts" / "nvcc-requirements.txt").read_text()
    ranges = dict(re.findall(r"^(nvidia-[a-z-]+)(.*)$", text, re.MULTILINE))
    assert set(ranges) == {
        f"nvidia-{n}" for n in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")
    }
    assert set(ranges.values()) == {">=13.0,<13.1"}


@pytest.fixture
def configure(tmp_path):
    """Configures the project for a machine without nvcc, and returns what the build says about itself."""
    cmake = shutil.which("cmake")
    if not cmake or not shutil.which("gcc"):
        pytest.skip("cmake or gcc is missing")
    python = tmp_path / "python"

    def run(says: str, status: int, *options: str) -> tuple[int, str]:
        python.write_text(f"#!/bin/sh\necho {says}\nexit {status}\n")
        python.chmod(0o755)
        folders = ["/usr/local/cuda/bin", *os.environ["PATH"].split(os.pathsep)]
        ignored = ";".join(folder for folder in folders if (Path(folder) / "nvcc").exists())
        quick = ["-DFLASH_KDA_TESTS=OFF", "-DFLASH_KDA_TOOLS=OFF", f"-DCMAKE_IGNORE_PATH={ignored}"]
        done = subprocess.run(
            [cmake, "-S", ROOT, "-B", tmp_path / "build", *quick, f"-DPython3_EXECUTABLE={python}", *options],
            capture_output=True,
            text=True,
            env={n: x for n, x in os.environ.items() if n != "CUDA_HOME"},
        )
        return done.returncode, re.sub(r"\s+", " ", done.stdout + done.stderr)

    return run


def test_configure_without_nvcc(configure):
    status, said = configure(f"{ROOT}/tests/pretend_nvcc/nvcc", 0, "-DFLASH_KDA_CUDA_ARCHS=90")
    assert status == 0
    assert "there is no nvcc, so it is fetched from PyPI into " in said
    assert f"CUDA kernels with {ROOT}/tests/pretend_nvcc/nvcc for 90" in said
    reason = "it could not be fetched"
    mend = "Install a CUDA toolkit of version 12.9 or newer, or build where PyPI can be reached"
    status, said = configure(reason, 1)
    assert status == 0
    assert f"there is no nvcc, and {reason}, so the library has the CPU backend alone. {mend}." in said
    # Under pip, which hides what a successful build prints.
    status, said = configure(reason, 1, "-DSKBUILD=2", "-DFLASH_KDA_DRIVER=/lib/libcuda.so.1")
    assert status != 0
    assert (
        f"there is no nvcc, and {reason}, so no kernels can be built, but this machine has an NVIDIA" in said
    )
    assert "-Ccmake.define.FLASH_KDA_CUDA=OFF` builds the CPU backend alone" in said
    status, said = configure(reason, 1, "-DSKBUILD=2", "-DFLASH_KDA_CUDA=OFF")
    assert status == 0
    assert "without kernels (FLASH_KDA_CUDA=OFF)" in said
