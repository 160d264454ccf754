"""benchmarks/training.py runs on the CPU, so that it cannot break unseen."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import training


def test_training_runs_on_the_cpu(tmp_path, capsys):
    figures = tmp_path / "training.json"
    words = ("--device", "cpu", "--shapes", "1:16", "2:5,4", "--kernel", "cpu", "--kernel", "cpu-portable")
    training.main([*words, "--rounds", "1", "--json", str(figures)])
    rows = json.loads(figures.read_text())["rows"]
    assert rows.keys() == {"1:16", "2:5,4"}
    for row in rows.values():
        assert row["ms"].keys() == row["rms"].keys() == {"cpu", "cpu-portable"}
        assert min(row["ms"].values()) > 0
        assert row["floor_ms"] > 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(rows)
    assert all(line.count("|") == table[0].count("|") for line in table[2:])


def test_passes_that_save_states(tmp_path):
    figures = tmp_path / "training.json"
    words = ("--device", "cpu", "--shapes", "1:330", "--kernel", "cpu", "--rounds", "1", "--saved")
    training.main([*words, "--json", str(figures)])
    row = json.loads(figures.read_text())["rows"]["1:330"]
    assert row["ms"].keys() == {"cpu", "cpu, saved", "cpu forward", "cpu forward, saved"}
    assert row["rms"]["cpu"] == row["rms"]["cpu, saved"]  # on the CPU gradients have the same bits


def test_a_kernel_that_is_unknown_is_left_out(capsys):
    training.main(["--device", "cpu", "--shapes", "1:3", "--kernel", "none", "--rounds", "1"])
    assert (
        'none, 1:3: ValueError: kernel is "none"; it must be None or one of cpu, ' in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--shapes", "8192"], "argument --shapes: shape '8192': it must be HEADS:LENGTHS"),
        (["--rounds", "0"], "argument --rounds: 0 is not a positive number"),
        (["--workspace-limit", "-1"], "argument --workspace-limit: -1 is less than 0"),
    ],
)
def test_wrong_arguments_of_training(words, sentence, capsys):
    with pytest.raises(SystemExit):
        training.main(words)
    assert sentence in capsys.readouterr().err
