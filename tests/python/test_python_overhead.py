"""benchmarks/python_overhead.py runs, so that a change of the package's inside cannot break it unseen."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flash_kda

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "python_overhead.py"


def test_it_runs():
    pytest.importorskip("torch")
    run = subprocess.run(
        [sys.executable, PROGRAM, "--rounds", "2", "--calls", "2"],
        env={**os.environ, "PYTHONPATH": str(Path(flash_kda.__path__[0]).parent)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    row = r"(torch \w+|numpy), .+ +[\d.]+ us  C alone +[\d.]+ us  overhead +-?[\d.]+ us"
    lines = run.stdout.splitlines()
    assert len(lines) >= 9
    assert all(re.fullmatch(row, line) for line in lines)
