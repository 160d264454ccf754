"""flash_kda.fla where flash-linear-attention is missing, too old, too new or told to ask no backend.

These tests make flash-linear-attention up, so that they need none. test_fla_releases.py has the real ones.
"""

import subprocess
import sys

import pytest

import flash_kda


def python(code, tmp_path, **environment):
    """Runs the code in a process of its own, with tmp_path in front of all other packages."""
    import os

    path = os.pathsep.join([str(tmp_path), str(flash_kda.__path__[0]).rpartition(os.sep)[0]])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def make(tmp_path, **files):
    """Modules below fla, by their path with dots in place of slashes."""
    named = {name.replace("_dot_", "."): text for name, text in files.items()}
    for name, text in {"fla": "", "fla.ops": "", **named}.items():
        folder = tmp_path.joinpath(*name.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(text)


INSTALL = """
import flash_kda
try:
    flash_kda.fla.install()
except Exception as error:
    print(type(error).__name__, error)
"""


def test_nothing_is_imported_for_it(tmp_path):
    code = (
        "import flash_kda.fla, sys; print([m for m in ('fla', 'torch', 'triton', 'jax') if m in sys.modules])"
    )
    assert python(code, tmp_path) == "[]"


def test_adapters_are_attributes_of_the_package():
    assert flash_kda.fla.install.__module__ == "flash_kda.fla"
    with pytest.raises(AttributeError, match=r"module 'flash_kda' has no attribute 'no_such'"):
        _ = flash_kda.no_such
    assert "fla" not in dir(flash_kda)


def test_without_fla(tmp_path):
    missing = INSTALL.replace("import flash_kda", "import sys; sys.modules['fla'] = None; import flash_kda")
    assert python(missing, tmp_path) == (
        "ImportError flash_kda.fla needs flash-linear-attention 0.5 or newer, which is not installed; "
        "`pip install flash-linear-attention` installs it"
    )


def test_fla_that_fails(tmp_path):
    make(tmp_path, fla_dot_ops_dot_kda="import no_such_module")
    assert python(INSTALL, tmp_path) == "ModuleNotFoundError No module named 'no_such_module'"


def test_fla_before_0_5(tmp_path):
    make(tmp_path, fla="__version__ = '0.4.2'", fla_dot_ops_dot_kda="def chunk_kda(q): ...")
    said = python(INSTALL, tmp_path)
    assert said.startswith(
        "RuntimeError flash-linear-attention 0.4.2 has no registry of KDA backends that flash_kda knows "
        "(ImportError: cannot import name 'backends'"
    )
    assert said.endswith("; the versions from 0.5 to 0.6 have one")


def test_fla_without_dispatch(tmp_path):
    make(
        tmp_path,
        fla_dot_backends="from os import environ as e\n"
        "_DISPATCH_DISABLED = e['FLA_DISABLE_BACKEND_DISPATCH'] == '1'",
        fla_dot_ops_dot_kda="import fla.backends\ndef chunk_kda(q): ...",
    )
    assert python(INSTALL, tmp_path, FLA_DISABLE_BACKEND_DISPATCH="1") == (
        "RuntimeError FLA_DISABLE_BACKEND_DISPATCH was 1 when flash-linear-attention was imported, so it "
        "asks no backend; it must be unset, or 0"
    )


@pytest.mark.parametrize("order", ["fla.ops.kda, flash_kda.fla", "flash_kda.fla, fla.ops.kda"])
def test_its_import_never_fails(tmp_path, order):
    """An unknown FLA stays as it is, and importing the adapter with it says nothing."""
    make(tmp_path, fla_dot_ops_dot_kda="def chunk_kda(q): return 7")
    assert python(f"import {order}; print(fla.ops.kda.chunk_kda(1))", tmp_path) == "7"


def test_gradients_on_a_gpu_take_kernel_hopper(monkeypatch):
    """Those of kernel `portable` take longer than FLA's."""
    from flash_kda import _fla, _lib, _shapes

    asked = []

    def why_no_gradients(device, HV, options):
        asked.append((device[0], dict(options)["kernel"]))
        return "cuda:0 has no kernel hopper" if device[0] == _lib.CUDA else ""

    monkeypatch.setattr(_shapes, "why_no_gradients", why_no_gradients)
    why_not = _fla._why_not_gradients.__wrapped__
    assert why_not((_lib.CPU, 0), 1, ()) == ""
    assert why_not((_lib.CUDA, 0), 1, ()) == (
        "flash_kda computes gradients faster than FLA with kernel hopper alone, "
        "and cuda:0 has no kernel hopper"
    )
    assert asked == [(_lib.CPU, None), (_lib.CUDA, "hopper")]
