"""The README's code is run as it stands, and so is the example of docs/debugging.md."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pages import run_python

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
    printed = run_python(blocks("python", name)[0])
    assert [line.strip() for line in said[1].splitlines()] == printed.splitlines()


def test_python_blocks_run() -> None:
    pytest.importorskip("torch")
    found = blocks("python")
    assert found
    for block in found:
        run_python(block)


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
