"""What the package says about a wrong installation."""

import subprocess
import sys
from pathlib import Path

import pytest

import flash_kda
from flash_kda import _installed, _lib

MODULES = Path(__file__).resolve().parents[2] / "python"


@pytest.fixture
def other(tmp_path):
    """A folder with another package that is called flash_kda."""
    package = tmp_path / "other" / "flash_kda"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def fwd(): ...\n")
    return package.parent


def test_another_package_of_the_same_name(other, tmp_path):
    ours = str(Path(flash_kda.__path__[0]).parent)
    assert _installed.other_package([ours, str(tmp_path), str(MODULES)]) == "", "copies of this one are fine"
    sentence = _installed.other_package([ours, str(other)])
    assert f"in {other / 'flash_kda'}. This one is meant to replace the other" in sentence
    code = "import warnings; warnings.simplefilter('error'); import flash_kda"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{ours!r}, {str(other)!r}]\n{code}"],
        capture_output=True,
        text=True,
    )
    assert "RuntimeWarning: there are two packages called flash_kda" in run.stderr


def test_the_command_says_that_another_package_hides_this_one(other, tmp_path):
    """The command is a module of its own, since the other package has no command."""
    installed = tmp_path / "installed"
    (installed / "flash_kda").mkdir(parents=True)
    (installed / "flash_kda" / "_lib.py").touch()
    (installed / "flash_kda" / "__init__.py").touch()
    (installed / "flash_kda" / "flash-kda").write_text("#!/bin/sh\necho the command: $1\n")
    (installed / "flash_kda" / "flash-kda").chmod(0o755)
    (installed / "flash_kda_command.py").symlink_to(MODULES / "flash_kda_command.py")
    for first, hidden in ((installed, False), (other, True)):
        # As the script that pip makes for the command, but with another order of sys.path.
        paths = [str(first), str(installed)]
        code = f"import sys; sys.path[:0] = {paths!r}; sys.argv = ['flash-kda', 'info']\n"
        run = subprocess.run(
            [sys.executable, "-c", f"{code}import flash_kda_command; flash_kda_command.main()"],
            capture_output=True,
            text=True,
        )
        assert run.stdout == "the command: info\n", run.stderr
        assert ("`import flash_kda` does not find this package" in run.stderr) is hidden


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            "/lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.9' not found (required by x.so)\n"
            "/lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.34' not found (required by x.so)",
            "x.so needs version 2.34 of the C library (glibc) or newer, and this system has ",
        ),
        ("x.so: wrong ELF class: ELFCLASS32", "x.so cannot be loaded on this system ("),
        ("libm.so.6: cannot open shared object file: No such file", "x.so cannot be loaded on this system ("),
        ("something else", "x.so cannot be loaded: something else"),
    ],
)
def test_a_library_that_cannot_be_loaded(monkeypatch, error, sentence):
    assert _lib._why_not_loaded("x.so", error).startswith(sentence)

    def refuse(path):
        raise OSError(error)

    monkeypatch.setattr(_lib.ctypes, "CDLL", refuse)
    with pytest.raises(ImportError, match=r"flash_kda: .*x?libflashkda\.so"):
        _lib._load()
