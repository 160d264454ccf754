"""What index pages and source distributions show: metadata, links, and nothing left out."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def settings():
    if sys.version_info < (3, 11):
        tomllib = pytest.importorskip("tomli")
    else:
        import tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_links_of_the_readme_on_an_index_page(settings):
    """An index page has no files beside it, so links to files of the source must be gone."""
    readme = settings["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = "".join((ROOT / fragment["path"]).read_text(encoding="utf-8") for fragment in readme["fragments"])
    assert re.search(r"\]\((?!https?:|#)", text), "the README in the source has such links"
    shown = text
    for substitution in readme["substitutions"]:
        shown = re.sub(substitution["pattern"], substitution["replacement"], shown)
    assert not re.search(r"\]\((?!https?:|#)", shown)
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", shown, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", shown)) <= headings
    for path in re.findall(r"\]\((?!https?:|#)([^)#]*)", text):
        assert (ROOT / path).exists(), path


def test_metadata(settings):
    project = settings["project"]
    assert project["requires-python"] == ">=3.9"
    assert {"description", "license", "authors", "keywords", "classifiers", "urls"} <= set(project)
    pythons = {
        c.rpartition(" ")[2]
        for c in project["classifiers"]
        if c.startswith("Programming Language :: Python :: 3.")
    }
    assert pythons == {f"3.{minor}" for minor in range(9, 15)}
    command = project["scripts"]["flash-kda"].partition(":")[0]
    assert (ROOT / "python" / f"{command}.py").exists()


def test_a_source_distribution_leaves_nothing_out(settings):
    """`make run`, `make test` and cmake work in what was unpacked, since it is what git has."""
    assert not settings["tool"]["scikit-build"].get("sdist", {}).get("exclude")


@pytest.mark.slow
def test_a_source_distribution_has_everything(tmp_path, monkeypatch):
    build = pytest.importorskip("scikit_build_core.build")
    pytest.importorskip("hatch_fancy_pypi_readme")
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if known.returncode != 0:
        pytest.skip("this is no clone of the repository")
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as archive:
        files = {m.name.partition("/")[2] for m in archive.getmembers() if not m.isdir()}
        info = next(m for m in archive.getmembers() if m.name.endswith("/PKG-INFO"))
        metadata = archive.extractfile(info).read().decode()
    assert set(known.stdout.split()) <= files
    assert not re.search(r"\]\((?!https?:|#)", metadata.partition("\n\n")[2])
