"""What the package is, apart from computing: imports, signatures, the command."""

import inspect
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flash_kda
from pages import run_python
from problems import ARGUMENTS, make

ROOT = Path(__file__).resolve().parents[2]


def python(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_version_is_the_header_s():
    numbers = re.findall(r"#define FLASH_KDA_VERSION_\w+ (\d+)", (ROOT / "include/flash_kda.h").read_text())
    assert flash_kda.__version__ == ".".join(numbers)


def test_signature_is_the_one_that_callers_know():
    parameters = inspect.signature(flash_kda.fwd).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == list(ARGUMENTS)
    assert [p.name for p in positional if p.default is None] == list(ARGUMENTS[-3:])
    sizes = inspect.signature(flash_kda.get_workspace_size).parameters.values()
    assert [p.name for p in sizes if p.kind is p.POSITIONAL_OR_KEYWORD] == ["T_total", "H", "N"]


def test_dir_shows_what_the_package_offers():
    assert dir(flash_kda) == sorted([*flash_kda.__all__, "__version__"])
    assert all(hasattr(flash_kda, name) for name in dir(flash_kda))


def test_devices():
    devices = flash_kda.devices()
    assert devices[0].type == "cpu"
    assert devices[0].kernel in flash_kda.kernels()
    assert devices[0].units >= 1
    assert devices[0].memory > 0
    assert all(d.type == "cuda" and d.index == i for i, d in enumerate(devices[1:]))


def test_workspace_size_is_enough():
    size = flash_kda.get_workspace_size(100, 3, 2)
    assert isinstance(size, int)
    assert size >= 0
    assert flash_kda.get_workspace_size(0, 1) >= 0
    assert flash_kda.get_workspace_size(T_total=1 << 20, H=96, N=64) >= size


def test_explain():
    text = flash_kda.explain(1000, 3, 2, device="cpu", kernel="cpu-portable")
    assert text.startswith('Kernel "cpu-portable"')
    assert "was asked for" in text
    assert re.search(r"\d+ pieces of work", text)
    assert re.search(r"Workspace: \d+ bytes", text)
    assert flash_kda.explain(1000, 3, device="cpu") == flash_kda.explain(1000, 3, 1, "cpu", None)
    assert 'Kernel "cpu" ' in flash_kda.explain(1000, 3, device="cpu")
    best = next((d for d in flash_kda.devices()[1:2] if d.kernel), flash_kda.devices()[0])
    assert f'Kernel "{best.kernel}" ' in flash_kda.explain(T_total=1000, H=3, N=2)


def test_typed():
    assert (Path(flash_kda.__file__).resolve().parent / "py.typed").exists()


def test_imports_nothing_but_the_standard_library():
    loaded = python(
        "import sys; before = set(sys.modules); import flash_kda; "
        "loaded = {m.partition('.')[0] for m in set(sys.modules) - before}; "
        "print(*sorted(loaded - set(sys.stdlib_module_names)))"
        if sys.version_info >= (3, 10)
        else "import sys, flash_kda; print(*({'flash_kda'} | {'torch', 'numpy'} & set(sys.modules)))"
    )
    assert loaded == "flash_kda"


def test_works_without_torch():
    """On a machine without PyTorch: importing it fails."""
    python(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("no torch here")
sys.meta_path.insert(0, Blocker())
from problems import hold_to, make, truth
import flash_kda
a = make(T=20)
flash_kda.fwd(**a)
hold_to(a, truth(a), "cpu")
"""
    )


def test_operator_is_there_if_torch_is_imported_first():
    pytest.importorskip("torch")
    assert python("import torch, flash_kda; print(torch.ops.flash_kda.fwd)") == "flash_kda.fwd"


@pytest.mark.slow
def test_compiled_use_before_any_eager_one():
    """flash_kda is imported first, then torch, and the first call is a compiled one."""
    pytest.importorskip("torch")
    python(
        """
import flash_kda, torch
bf16 = [torch.randn(1, 20, 1, 128, dtype=torch.bfloat16) for _ in range(5)]
rest = [torch.randn(1, 20, 1, dtype=torch.bfloat16), 0.1], [torch.zeros(1), torch.zeros(1, 128), -5.0]
call = torch.compile(flash_kda.fwd, fullgraph=True, backend="aot_eager")
with torch.no_grad():
    call(*bf16[:4], *rest[0], bf16[4], *rest[1])
"""
    )


def test_torch_is_imported_second():
    """The operator is there, and nothing is left of what waited for the import."""
    pytest.importorskip("torch")
    printed = python(
        "import flash_kda, sys; n = len(sys.meta_path); import torch; "
        "print(n - len(sys.meta_path), 'exec_module' in vars(torch.__spec__.loader), torch.ops.flash_kda.fwd)"
    )
    assert printed == "1 False flash_kda.fwd"


def test_a_missing_import_of_torch_stays_a_clean_error():
    out = python(
        "import flash_kda, sys, importlib.util\n"
        "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        "importlib.invalidate_caches()\n"
        "try: import torch\n"
        "except ModuleNotFoundError as e: print(e.name)"
    )
    assert out == "torch"


def built(name):
    return [p for p in (Path(folder) / name for folder in flash_kda.__path__) if p.exists()]


@pytest.mark.skipif(not built("flash-kda"), reason="the flash-kda command was not built")
def test_command():
    command = built("flash-kda")[0]
    assert command.stat().st_mode & stat.S_IXUSR
    run = subprocess.run([sys.executable, "-m", "flash_kda", "info"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert flash_kda.__version__ in run.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "flash_kda", "no-such-thing"], capture_output=True, text=True
    )
    assert wrong.returncode != 0


@pytest.mark.skipif(bool(built("flash-kda")), reason="the flash-kda command was built")
def test_missing_command():
    run = subprocess.run([sys.executable, "-m", "flash_kda", "info"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "the flash-kda command was not built" in run.stderr


def test_quickstart_runs_as_it_stands():
    pytest.importorskip("torch")
    assert run_python((ROOT / "examples" / "quickstart.py").read_text()).startswith("out (1, 1024, 4, 128), ")


def test_environment_changes_nothing():
    """Variables that steer other libraries' threads and kernels change no bit of the result."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from problems import make; import flash_kda\n"
        "a = make(T=100, H=3); flash_kda.fwd(**a); sys.stdout.buffer.write(a['out'].tobytes())"
    )
    here = make(T=100, H=3)
    flash_kda.fwd(**here)
    environment = {**os.environ, "OMP_NUM_THREADS": "3", "FLASH_KDA_KERNEL": "none", "FLA_FLASH_KDA": "0"}
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment, check=True
    ).stdout
    np.testing.assert_array_equal(np.frombuffer(there, np.uint16), here["out"].view(np.uint16).reshape(-1))
