"""What this package takes of chunk_kda's calls, in every release of flash-linear-attention that knows it.

The release that is installed is tested as it is, the others if PyPI can be reached. fla_calls.py has the
calls without an adapter, fla_adapter_calls.py those with flash_kda.fla.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flash_kda
from forks import for_fla

pytest.importorskip("torch")
RELEASES = ("0.5.0", "0.5.1", "0.5.2", "0.6.0")
BUILD = Path(flash_kda.__path__[0]).parents[1]


def folder_of(release):
    """A folder with that release, which is fetched once, or "" for the one that is installed."""
    if release == "installed":
        if importlib.util.find_spec("fla") is None:
            pytest.skip("flash-linear-attention is not installed")
        return ""
    if importlib.util.find_spec("fla") and importlib.metadata.version("fla-core") == release:
        pytest.skip(f"fla-core {release} is the release that is installed")
    folder = BUILD / "fla" / release
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1"]
        pip += ["--target", str(folder), f"fla-core=={release}", f"flash-linear-attention=={release}"]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"fla-core {release} could not be fetched from PyPI")
    return str(folder)


def in_all_ways(*ways):
    """Each release in the first way, and the oldest one and the one that is installed in all of them, since
    each test imports FLA, which takes seconds."""
    return [
        (release, way)
        for release in ("installed", *RELEASES)
        for way in (ways if release in ("installed", RELEASES[0]) else ways[:1])
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("release", "first"), in_all_ways("flash_kda", "allow_neg_eigval", "device"))
def test_calls(release, first):
    run("fla_calls.py", first, folder_of(release))


@pytest.mark.slow
@pytest.mark.parametrize(("release", "how"), in_all_ways("after", "before", "install"))
def test_calls_with_the_adapter(release, how):
    run("fla_adapter_calls.py", how, folder_of(release))


def run(script, *words):
    for module in ("triton", "einops"):
        pytest.importorskip(module)
    environment = {
        n: x for n, x in os.environ.items() if n not in ("FLA_FLASH_KDA", "FLA_DISABLE_BACKEND_DISPATCH")
    }
    environment["PYTHONPATH"] = os.path.dirname(flash_kda.__path__[0])
    done = for_fla.run(Path(__file__).with_name(script), *words, environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ok\n")
