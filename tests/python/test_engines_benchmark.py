"""benchmarks/engines.py runs on the CPU, where flash-linear-attention has no kernels of its own."""

import json
import os
from pathlib import Path

import pytest

import flash_kda
from forks import for_fla

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "engines.py"


def run(*words):
    for module in ("torch", "triton", "einops"):
        pytest.importorskip(module)
    pytest.importorskip("fla.ops.kda", reason="flash-linear-attention is not installed", exc_type=ImportError)
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(flash_kda.__path__[0])}
    return for_fla.run(PROGRAM, "--device", "cpu", *map(str, words), environment=environment)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["bounded", "softplus"])
def test_rows(tmp_path, gate):
    figures = tmp_path / "engines.json"
    sizes = ("--prefill", "64", "100", "--decode", "2", "--heads", "2", "4")
    done = run(*sizes, "--gate", gate, "--rounds", "1", "--json", figures)
    assert done.returncode == 0, done.stderr
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["kind"], row["size"], row["heads"]) for row in rows] == [
        ("prefill", 64, 2), ("prefill", 64, 4), ("prefill", 100, 2), ("prefill", 100, 4), ("decode", 2, 2),
        ("decode", 2, 4),
    ]  # fmt: skip
    assert all(row["flash_kda_plain_ms"] > 0 for row in rows)
    assert all(row["engine_plain_ms"] is None for row in rows)
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(rows)
    assert all(line.count("|") == 10 for line in table)


@pytest.mark.slow
def test_wrong_rows():
    done = run("--heads", "0")
    assert done.returncode == 2
    assert "must name at least one row, with numbers from 1" in done.stderr
    done = run("--fla-tunes-once")
    assert done.returncode == 2
    assert "--fla-tunes-once is for GPUs, and --device is cpu" in done.stderr
