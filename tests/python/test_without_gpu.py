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
for shape in ((8192, 4), (8192, 96), (65536, 8, 7), (262144, 1), (30000, 2, 3)):
    enough = flash_kda.get_workspace_size(*shape)
    for options in ({"checkpoint_every": 64}, {"with_state_indices": True}, {"state_v_first": False}):
        for more in ({}, {"lower_bound": None}, {"use_gate_in_kernel": False, "fp32_gate": True}):
            assert flash_kda.get_workspace_size(*shape, **options, **more) <= enough, (shape, options, more)
for name in ("cuda", None):
    assert flash_kda.explain(8192, 96, device=name) == flash_kda.explain(8192, 96, device="cuda:0")
assert workspace(262144, 1) > 0
assert workspace(262144, 1, cut="never") == 0
assert workspace(512, 1) == 0
assert workspace(512, 1, cut="always") > 0
"""


def run(driver, gpu, program, package=None):
    folder = DRIVERS / driver
    if not (folder / "libcuda.so.1").exists():
        pytest.skip(f"the build has no {driver}")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PRETEND_GPU": gpu}
    environment["PYTHONPATH"] = os.pathsep.join(
        [package or str(DRIVERS.parent / "python"), str(Path(__file__).parent)]
    )
    program = 'CUTS = ("auto", "never", "always", "mixed")\n' + program
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


LEFT_OUT = """
import warnings

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import flash_kda
    import flash_kda as again
(warning,) = seen
assert warning.category is RuntimeWarning
assert "built without CUDA kernels, and this machine has an NVIDIA driver" in str(warning.message)
assert "`pip install .` in the source folder builds the kernels" in str(warning.message)

mend = "`pip install .` in the source folder builds them, and fetches nvcc if there is none"
gpu = flash_kda.devices()[1]
assert gpu.kernel == "" and gpu.reason.endswith(mend), gpu
from problems import make
from test_dlpack import wrap

a = wrap(make(T=3), device=(2, 0))
for call in (
    lambda: flash_kda.fwd(**a),
    lambda: flash_kda.fwd(**a, kernel="portable"),
    lambda: flash_kda.explain(10, 1, device="cuda:0"),
):
    try:
        call()
        raise AssertionError("there is no kernel")
    except RuntimeError as error:
        assert str(error).startswith("device is CUDA device 0, but") and str(error).endswith(mend), error
"""

QUIET = """
import warnings

warnings.simplefilter("error")
import flash_kda
"""


@pytest.fixture
def package_without_kernels(tmp_path):
    library = DRIVERS / "without_kernels" / "libflashkda.so"
    if not library.exists():
        pytest.skip("the build has no library without kernels")
    folder = tmp_path / "flash_kda"
    folder.mkdir()
    for module in Path(flash_kda.__path__[0]).glob("*.py"):
        (folder / module.name).symlink_to(module.resolve())
    (folder / library.name).symlink_to(library)
    return str(tmp_path)


def test_kernels_that_were_left_out(package_without_kernels):
    """The import says so once, and every error says what mends it."""
    run("pretend_driver", "90:132", LEFT_OUT, package_without_kernels)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_not_warned_of(package_without_kernels, hidden, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    run("pretend_driver", "90:132", QUIET, package_without_kernels)


def test_a_library_with_kernels_is_imported_quietly():
    run("pretend_driver", "90:132", QUIET)


def test_arrays_on_a_gpu():
    """Through DLPack, with a workspace of the call's own, whatever `cut` is."""
    run("emulator", "90:9", COMPUTE)


def test_workspace_sizes_on_a_gpu():
    """get_workspace_size covers every call that does not set `cut`, and `cut` decides what is cut."""
    run("pretend_driver", "90:132", SIZES)
