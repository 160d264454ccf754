"""The documentation site: its examples run and print what the pages say, the C header becomes sections, links
fit, and a broken link fails the build."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flash_kda
from pages import run_python

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
CODE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def load_hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts" / "docs_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


@pytest.fixture(scope="module")
def hooks():
    return load_hooks()


def python_sections():
    """Each section of a page that has Python: its blocks in their order, and what they print."""
    for page in PAGES:
        if page.stem == "debugging":  # of test_readme.py
            continue
        for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            blocks = CODE.findall(section)
            code = "".join(text for language, text in blocks if language == "python")
            if code:
                said = "".join(text for language, text in blocks if language == "text")
                title = section.partition("\n")[0].strip("# ")
                # Importing FLA and transformers takes more than five seconds.
                marks = [pytest.mark.slow] if re.search(r"^import (fla|transformers)\b", code, re.M) else []
                yield pytest.param(code, said, id=f"{page.stem}: {title}", marks=marks)


@pytest.mark.parametrize(("code", "said"), list(python_sections()))
def test_python_of_a_section(code, said):
    for module in re.findall(r"^import (\w+)", code, re.MULTILINE):
        pytest.importorskip(module)
    printed = run_python(code)
    assert not said or printed == said


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if "\n```c\n" in page.read_text(encoding="utf-8")],
    ids=lambda page: page.stem,
)
def test_c_of_a_page_compiles(page, tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    for language, block in CODE.findall(page.read_text(encoding="utf-8")):
        if language != "c":
            continue
        source = tmp_path / "page.c"
        source.write_text(
            '#include "flash_kda.h"\nflash_kda_fwd_params p;\nvoid example(void);\n'
            f"void example(void)\n{{\n{block}}}\n"
        )
        command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{ROOT}/include"]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_troubleshooting_quotes_what_is_said():
    sources = [*(ROOT / "src").rglob("*.c"), *(ROOT / "python" / "flash_kda").glob("*.py")]
    said = "".join(path.read_text(encoding="utf-8") for path in sources)
    said = re.sub(r'"\s*f?"', "", said)  # a sentence in several strings
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quotes = re.findall(r'^## "(.*)"$', page, re.MULTILINE)
    assert quotes
    for quote in quotes:
        assert quote in said, quote


def test_header_becomes_sections(hooks):
    header = (ROOT / "include" / "flash_kda.h").read_text(encoding="utf-8")
    names = [name for item in hooks.header_items(header) for name in item[0]]
    functions = re.findall(r"^FLASH_KDA_API .*?(\w+)\(", header, re.MULTILINE)
    types = re.findall(r"^typedef \w+ (\w+) \{", header, re.MULTILINE)
    assert "flash_kda_fwd" in functions
    assert "flash_kda_fwd_params" in types
    assert sorted(names) == sorted(functions + types)
    shown = hooks.header_markdown(header)
    for name in ("flash_kda_fwd", "flash_kda_malloc", "flash_kda_tensor"):
        assert f"{{#{name}}}" in shown
    assert "[`flash_kda_synchronize()`](#flash_kda_malloc)" in shown, "a group has one section"
    shown_words = set(re.findall(r"\w+", shown))
    body = header.partition("#ifndef")[0] + header.partition('extern "C" {')[2].partition("#ifdef __cp")[0]
    assert set(re.findall(r"\w+", body)) - shown_words <= {"endif"}, "nothing of the header is lost"


def test_a_comment_without_a_declaration_is_refused(hooks):
    with pytest.raises(ValueError, match="no declaration"):
        hooks.header_items(
            'extern "C" {\n#endif\n\n/* Lost. */\n\ntypedef struct a {\n} a;\n#ifdef __cplusplus'
        )


def test_links_fit_the_site(hooks):
    for target, source, fits in (
        ("overview.md#the-roofline", "docs/segments.md", "overview.md#the-roofline"),
        ("docs/accuracy.png", "README.md", "accuracy.png"),
        ("../README.md#speed", "docs/performance.md", "readme.md#speed"),
        ("../include/flash_kda.h", "docs/api-c.md", None),
        ("../nowhere.md", "docs/api-c.md", "../nowhere.md"),
        ("#c", "docs/tutorial.md", "#c"),
        ("https://example.org/a.md", "README.md", "https://example.org/a.md"),
    ):
        assert hooks.link_target(target, source) == fits
    text = "[`a[1]`](../LICENSE) ![p](p.png)\n```c\n[x](../LICENSE)\n```\n"
    fit = hooks.with_links_of_the_site(text, "docs/a.md")
    assert fit == "`a[1]` ![p](p.png)\n```c\n[x](../LICENSE)\n```\n"


def test_markers(hooks):
    assert "| random |" in hooks.expanded("<!-- section Accuracy of README.md -->")
    assert "int main(void)" in hooks.expanded("<!-- file examples/forward.c -->")
    with pytest.raises(ValueError, match="no section"):
        hooks.expanded("<!-- section Nothing of README.md -->")


def build_site(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],  # --quiet would let warnings pass
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_site_builds_and_a_broken_link_fails_it(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    for folder in ("docs", "examples", "include", "python", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml", ROOT / "LICENSE"):
        shutil.copy(file, tmp_path)
    done = build_site(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "build-docs"
    python = (site / "api-python.html").read_text(encoding="utf-8")
    for name in flash_kda.__all__:
        assert f'id="flash_kda.{name}"' in python
    assert "#flash_kda_malloc" in (site / "api-c.html").read_text(encoding="utf-8")
    faq = tmp_path / "docs" / "faq.md"
    page = faq.read_text(encoding="utf-8")
    for broken in ("nowhere.md", "install.md#nowhere", "../nowhere.md", "../README.md#nowhere"):
        faq.write_text(f"{page}\n[here]({broken})\n", encoding="utf-8")
        done = build_site(tmp_path)
        assert done.returncode != 0, broken
        assert "nowhere" in done.stdout + done.stderr
