"""benchmarks/decode.py runs on the CPU, so that it cannot break unseen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "decode.py"


def test_decode_runs_on_the_cpu(tmp_path):
    pytest.importorskip("torch")
    figures = tmp_path / "decode.json"
    words = ("--device", "cpu", "--rows", "1x12", "--rounds", "1", "--json", figures)
    done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(figures.read_text())["rows"]
    assert [row["name"] for row in rows] == ["1x12 T=1 last fp32", "1x12 T=1 last fp32 layer"]
    assert all(row["us"] > 0 for row in rows)
    assert done.stdout.splitlines()[-1].startswith("| 1x12 T=1 last fp32 layer | ")
