"""benchmarks/options.py runs every one of its rows on the CPU, so that no option's row can break unseen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "options.py"


@pytest.mark.slow
def test_every_option_runs(tmp_path):
    pytest.importorskip("torch")
    figures = tmp_path / "options.json"
    words = ("--device", "cpu", "--shape", "4:64,80", "--rounds", "1", "--json", figures)
    done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {row["name"] for row in json.loads(figures.read_text())["rows"]}
    assert len(names) >= 10
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(json.loads(figures.read_text())["rows"])
    assert all(line.count("|") == 11 for line in table)


def test_an_unknown_row_is_named(monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(PROGRAM.parent)
    import options

    with pytest.raises(SystemExit) as stopped:
        options.main(["--device", "cpu", "--rows", "no such row"])
    assert stopped.value.code == 2
    assert "--rows names none of: slices, pool" in capsys.readouterr().err
