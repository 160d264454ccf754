"""benchmarks/python_overhead.py runs, so that a change of the package's inside cannot break it unseen."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flash_kda

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "python_overhead.py"
PRETENDED = Path(flash_kda.__path__[0]).parents[1] / "tests" / "pretend_driver"
ROW = r"(torch \w+|numpy), .+ +[\d.]+ us  C alone +[\d.]+ us  overhead +-?[\d.]+ us"


def run(*words, **environment):
    pytest.importorskip("torch")
    environment = {**os.environ, "PYTHONPATH": str(Path(flash_kda.__path__[0]).parent), **environment}
    command = [sys.executable, PROGRAM, "--rounds", "2", "--calls", "2", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_it_runs():
    done = run()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 14
    assert all(re.fullmatch(ROW, line) for line in lines)


def test_calls_on_the_pretended_gpu():
    if not (PRETENDED / "libcuda.so.1").exists():
        pytest.skip("the build has no pretended driver")
    done = run("--pretended", LD_LIBRARY_PATH=str(PRETENDED))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(re.fullmatch(ROW + "  (within|above)", line) for line in lines)
    calls = [line.split(",")[1:3] for line in lines[1:]]
    assert [" ".join(call).split("inference")[0].strip() for call in calls] == [
        *("decode  T = 1", "decode  T = 4", "decode_layer  T = 1", "decode_layer  T = 4", "apply_records")
    ]


def test_calls_on_no_other_driver():
    """On another driver kernels would read the CPU's memory."""
    done = run("--pretended", LD_LIBRARY_PATH="")
    assert done.returncode != 0
    assert "driver" in done.stderr or "libcuda.so.1" in done.stderr
