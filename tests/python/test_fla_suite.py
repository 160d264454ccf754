"""tests/fla_suite.py: FLA's own tests of KDA with this package installed.

FLA's tests come with FLA's source alone. Where FLA_SOURCE names it, and there is a GPU, they run here. The
other tests give the script a folder with tests made up for the CPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flash_kda

PROGRAM = Path(__file__).resolve().parents[1] / "fla_suite.py"


def run(*words):
    environment = {n: x for n, x in os.environ.items() if not n.startswith("FLA_") or n == "FLA_SOURCE"}
    environment["PYTHONPATH"] = os.path.dirname(flash_kda.__path__[0])
    return subprocess.run([sys.executable, PROGRAM, *words], env=environment, capture_output=True, text=True)


def test_fla_s_own_tests(cuda):
    source = os.environ.get("FLA_SOURCE")
    if not source:
        pytest.skip("FLA_SOURCE names no source of flash-linear-attention")
    done = run(source)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


MADE_UP = """
import os
import pytest, torch
from fla.ops.kda import chunk_kda


def call(**change):
    x = {n: torch.zeros(1, 20, 2, 128, dtype=torch.bfloat16) for n in "qkvg"}
    with torch.inference_mode():
        return chunk_kda(**{**x, "beta": torch.zeros(1, 20, 2), **change})


def test_taken():
    if os.environ["FLA_FLASH_KDA"] == "0":
        pytest.skip("FLA would need a GPU")
    assert call()[0].shape == (1, 20, 2, 128)


def test_declined():
    with pytest.raises(Exception):
        call(g=torch.zeros(1, 20, 2, 128, dtype=torch.float64))


def test_that_fails_with_both():
    assert 1 == 2


def test_that_fails_with_flash_kda():
    assert os.environ["FLA_FLASH_KDA"] == "0" or WORKS
"""


@pytest.mark.slow
@pytest.mark.parametrize("works", [True, False])
def test_what_it_says(tmp_path, works):
    for module in ("torch", "triton", "einops"):
        pytest.importorskip(module)
    pytest.importorskip("fla.ops.kda", reason="flash-linear-attention is not installed", exc_type=ImportError)
    folder = tmp_path / "tests" / "ops"
    folder.mkdir(parents=True)
    (folder / "test_kda.py").write_text(MADE_UP.replace("WORKS", str(works)))
    (folder / "test_kda_npu.py").write_text("raise NotImplementedError")
    done = run(tmp_path, "-p", "no:cacheprovider")
    assert done.returncode == (0 if works else 1), done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line]
    counts = "3 passed, 1 failed" if works else "2 passed, 2 failed"
    first = said.index(f"with flash_kda: {counts}, 0 skipped")
    assert said[first + 1 : first + 3] == [
        "1 calls of chunk_kda taken",
        "1 calls of chunk_kda left to FLA: flash_kda does not take g of torch.float64",
    ]
    file = "tests/ops/test_kda.py"
    assert f"fails in both cases: {file}::test_that_fails_with_both" in said
    worse = f"fails with flash_kda alone: {file}::test_that_fails_with_flash_kda"
    assert (worse in said) != works
    assert ("flash_kda breaks no test" in said) == works


def test_a_folder_without_tests(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"fla_suite.py: {tmp_path} has no tests/**/test*kda*.py\n"
