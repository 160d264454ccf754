"""scripts/fetch_engines.py, with a pip that makes small wheels; and benchmarks/peer_timing/releases.py, which
makes modules of a release importable alone."""

import importlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from peer_timing import releases  # noqa: E402


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("fetch_engines", ROOT / "scripts" / "fetch_engines.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fetched = []

    def pip(command, check):
        assert check
        assert command[1:4] == ["-m", "pip", "download"]
        fetched.append(command[-1])
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "small.whl", "w") as wheel:
            for name in ("vllm/plugins/__init__.py", "vllm/_flashkda_C.abi3.so", "vllm/entrypoints/cli.py"):
                wheel.writestr(name, "")
            for name in ("sglang/srt/plugins/hook_registry.py", "sglang/launch_server.py"):
                wheel.writestr(name, "")

    monkeypatch.setattr(subprocess, "run", pip)
    module.fetched = fetched
    return module


def test_fetch_engines(script, tmp_path, capsys):
    script.main(["--into", str(tmp_path)])
    assert script.fetched == ["vllm==0.33.0", "sglang==0.5.23"]
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "vllm-0.33.0/vllm/plugins/__init__.py",
        "vllm-0.33.0/vllm/_flashkda_C.abi3.so",
        "sglang-0.5.23/sglang/srt/plugins/hook_registry.py",
    }, "wheels stay, or modules that nobody needs"
    script.main(["--into", str(tmp_path), "vllm"])
    assert len(script.fetched) == 2, "what is there is fetched again"
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script.main(["--into", str(tmp_path), "another"])
    assert "another is no engine that is known here" in capsys.readouterr().err


def test_modules_alone(tmp_path):
    for name, text in (
        ("a/__init__.py", "raise ImportError('the package itself is not wanted')"),
        ("a/b/kernels.py", "from a.utils import answer, Anything\nfrom a.b import near\nimport far.away\n"),
        ("a/b/near.py", "value = 3"),
    ):
        path = tmp_path / "engine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = set(sys.modules), list(sys.meta_path)
    given = {"a.utils": {"answer": 42}, "far": {}}
    with releases.alone(tmp_path / "engine", ("a.b.kernels", "a.b.near"), given):
        kernels = importlib.import_module("a.b.kernels")
        assert (kernels.answer, kernels.near.value) == (42, 3)
        assert isinstance(kernels.Anything, type)
        assert kernels.far.away.Whatever() is not None
        with pytest.raises(ImportError):
            importlib.import_module("a.b.kernels.deeper")
    assert set(sys.modules) == before[0], "modules of the release stay"
    assert sys.meta_path == before[1]


def test_where_releases_are(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_KDA_ENGINES", str(tmp_path))
    assert releases.find("vllm") is None
    (tmp_path / "vllm-0.33.0" / "vllm").mkdir(parents=True)
    assert releases.find("vllm") == tmp_path / "vllm-0.33.0"
    with pytest.raises(ImportError, match=r"fetch_engines\.py sglang"), releases.sglang_kernels():
        pass
