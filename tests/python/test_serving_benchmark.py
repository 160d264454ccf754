"""benchmarks/serving.py runs on the CPU, so that it cannot break unseen. Engines have no kernels there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "serving.py"


def test_serving_runs_on_the_cpu(tmp_path):
    pytest.importorskip("torch")
    figures = tmp_path / "serving.json"
    words = ("--device", "cpu", "--heads", "2", "--prefill", "64", "--decode", "3", "--rounds", "1")
    words += ("--verify", "2")
    done = subprocess.run(
        [sys.executable, PROGRAM, *words, "--json", figures], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["engine"], row["step"]) for row in rows] == [
        ("vllm", "prefill"), ("vllm", "decode"), ("sglang", "prefill"), ("sglang", "decode"),
        ("sglang", "chain"), ("sglang", "tree"),
    ]  # fmt: skip
    assert all(row["ours"] > 0 and row["today"] is None for row in rows)
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(rows)
    assert all(line.count("|") == 9 for line in table)
