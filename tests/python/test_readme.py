"""The README's code is run as it stands, and so is the example of docs/debugging.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flash_kda

ROOT = Path(__file__).resolve().parents[2]


def blocks(language: str, page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "docs/debugging.md"])
def test_it_prints_what_the_page_says(name: str) -> None:
    pytest.importorskip("torch")
    page = (ROOT / name).read_text(encoding="utf-8")
    said = re.search(r"^prints\n\n((?:    .*\n)+)", page, flags=re.MULTILINE)
    assert said
    run = subprocess.run(
        [sys.executable, "-c", *blocks("python", name)],
        env={**os.environ, "PYTHONPATH": str(Path(flash_kda.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert [line.strip() for line in said[1].splitlines()] == run.stdout.splitlines(), run.stderr


def test_python_blocks_run() -> None:
    pytest.importorskip("torch")
    found = blocks("python")
    assert found
    package_folder = str(Path(flash_kda.__file__).parent.parent)
    for block in found:
        run = subprocess.run(
            [sys.executable, "-c", block],
            env={**os.environ, "PYTHONPATH": package_folder},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr


def test_the_example_is_a_file_too() -> None:
    assert blocks("python")[0] in (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")


def test_c_block_compiles(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (block,) = blocks("c")
    source = tmp_path / "readme.c"
    source.write_text(
        '#include <stdio.h>\n#include "flash_kda.h"\n'
        "void *scratch(size_t bytes);\n"
        "void example(void *stream, void *q, int64_t B, int64_t T, int64_t H);\n"
        "void example(void *stream, void *q, int64_t B, int64_t T, int64_t H)\n{\n" + block + "}\n"
    )
    run = subprocess.run(
        [
            compiler,
            "-std=c11",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fsyntax-only",
            f"-I{ROOT}/include",
            str(source),
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
