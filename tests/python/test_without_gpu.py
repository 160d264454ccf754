"""Calls for a GPU on machines without one. An emulated GPU computes, a pretended GPU only tells its plans."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flash_kda

DRIVERS = Path(flash_kda.__path__[0]).parents[1] / "tests"  # of the build folder

COMPUTE = """
import numpy as np
import flash_kda
from problems import hold_to, make, truth
from test_dlpack import wrap

a = make(lengths=[70, 0, 5], H=1, initial=np.float32)
expected = truth(a)
for options in ({"kernel": "portable"}, {"batch_invariant": True}, *({"cut": cut} for cut in CUTS)):
    a["out"].fill(np.nan), a["final_state"].fill(np.nan)
    flash_kda.fwd(**wrap(a, device=(2, 0)), **options)
    hold_to(a, expected, "cuda")
"""

SIZES = """
import re
import flash_kda

def workspace(*shape, **options):
    text = flash_kda.explain(*shape, device="cuda:0", **options)
    return int(re.search(r"Workspace: (\\d+) bytes", text)[1])

for shape in ((0, 1), (8192, 96), (262144, 1), (300000, 1, 3), (65536, 8, 7)):
    enough = flash_kda.get_workspace_size(*shape)
    for options in ({}, {"max_seqlen": shape[0]}, {"batch_invariant": True}, {"cut": "never"}):
        assert workspace(*shape, **options) <= enough
for name in ("cuda", None):
    assert flash_kda.explain(8192, 96, device=name) == flash_kda.explain(8192, 96, device="cuda:0")
assert workspace(262144, 1) > 0
assert workspace(262144, 1, cut="never") == 0
assert workspace(512, 1) == 0
assert workspace(512, 1, cut="always") > 0
"""


def run(driver, gpu, program):
    folder = DRIVERS / driver
    if not (folder / "libcuda.so.1").exists():
        pytest.skip(f"the build has no {driver}")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PRETEND_GPU": gpu}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(DRIVERS.parent / "python")])
    program = 'CUTS = ("auto", "never", "always", "mixed")\n' + program
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_arrays_on_a_gpu():
    """Through DLPack, with a workspace of the call's own, whatever `cut` is."""
    run("emulator", "90:9", COMPUTE)


def test_workspace_sizes_on_a_gpu():
    """get_workspace_size covers every call that does not set `cut`, and `cut` decides what is cut."""
    run("pretend_driver", "90:132", SIZES)
