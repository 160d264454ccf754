"""Finds the package, and says which one is tested."""

import importlib.util
import os
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))  # problems.py

# An installed package (a wheel under test) goes first, then what `make` built.
if importlib.util.find_spec("flash_kda") is None:
    built = ROOT / os.environ.get("BUILD", "build") / "python"
    sys.path.insert(0, str(built))
    # Processes that tests start find the package that is tested.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(built), os.environ.get("PYTHONPATH"))))

# JAX would take most of a GPU's memory for itself, and other tests run beside it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import flash_kda  # noqa: E402

REPORTS = pytest.StashKey()


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: takes 5 seconds or more of processor time; left to make test-all"
    )


def pytest_report_header():
    return f"flash_kda {flash_kda.__version__} from {flash_kda.__path__[0]}"


def _cuda_missing():
    usable = [d for d in flash_kda.devices() if d.type == "cuda" and d.kernel]
    if not usable:
        return "flash_kda can use no CUDA device here"
    torch = pytest.importorskip(
        "torch", reason="the tests reach GPUs through PyTorch, which is not installed"
    )
    return None if torch.cuda.is_available() else "PyTorch can use no CUDA device here"


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """A test that takes this fixture runs on every device there is."""
    reason = _cuda_missing() if request.param == "cuda" else None
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def cuda():
    reason = _cuda_missing()
    if reason:
        pytest.skip(reason)
    return "cuda"


@pytest.fixture(scope="session")
def fla():
    """flash-linear-attention's chunk_kda and fused_recurrent_kda, its plain recurrence, and its gates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FLA warns where there is no GPU
        pytest.importorskip("fla", reason="flash-linear-attention is not installed", exc_type=ImportError)
        kda = pytest.importorskip("fla.ops.kda", reason="this release has no KDA", exc_type=ImportError)
        from fla.ops.kda import gate, naive
    return {**vars(kda), **vars(naive), **vars(gate)}


@pytest.fixture
def record_report(request):
    """A function that takes lines for the end of pytest's output, whether the test passes or not."""
    reports = request.config.stash.setdefault(REPORTS, [])
    return lambda lines: reports.append((request.node.name, lines))


def pytest_terminal_summary(terminalreporter, config):
    for name, lines in config.stash.get(REPORTS, []):
        terminalreporter.section(name, sep="-")
        terminalreporter.write_line(lines.rstrip())
