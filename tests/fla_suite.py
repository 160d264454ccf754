"""Runs flash-linear-attention's own tests of KDA with flash_kda.fla installed, and those that fail once more
without it.

    python tests/fla_suite.py FOLDER [ARGUMENTS OF PYTEST]

FOLDER is the source of flash-linear-attention (FLA) 0.5 to 0.6, with its tests, which no package on PyPI has.
The tests and FLA itself are imported from there. Most of the tests need a GPU. The last lines say how many
tests passed, which calls this package took, and why it left others to FLA. The exit status is 1 if a test
fails with this package that passes without it. FLA_SUITE_FILES may name other test files, relative to FOLDER.
With `-n 8` pytest-xdist shares the tests out among eight processes. With FLA_SUITE_TUNES=0 FLA's Triton
kernels run in their first configurations: tuning takes minutes for each shape, and no test is about it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

REPORT = "FLA_SUITE_REPORT"  # the folder in which each process of pytest leaves what it saw


def files_of(source: Path) -> list[str]:
    """FLA's test files of KDA. Files for other hardware and for several processes are left out."""
    if os.environ.get("FLA_SUITE_FILES"):
        return os.environ["FLA_SUITE_FILES"].split()
    found = sorted(path.relative_to(source) for path in (source / "tests").rglob("test*kda*.py"))
    return [str(path) for path in found if not {"npu", "dist", "cp", "precond"} & set(words_of(path))]


def words_of(path: Path) -> list[str]:
    return [word for part in path.with_suffix("").parts for word in part.split("_")]


def run(source: Path, tests: list[str], arguments: list[str], is_on: bool) -> dict[str, Any]:
    """Runs the tests in a process of its own. Returns the outcome of each test, and the calls."""
    here = Path(__file__).resolve().parent
    benchmarks = here.parent / "benchmarks"
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(
            filter(None, (str(source), str(here), str(benchmarks), os.environ.get("PYTHONPATH")))
        )
        environment = {**os.environ, REPORT: folder, "PYTHONPATH": path}
        environment["FLA_FLASH_KDA"] = "1" if is_on else "0"
        command = [sys.executable, "-m", "pytest", "-p", "fla_suite", "-q", *tests, *arguments]
        status = subprocess.run(command, cwd=source, env=environment).returncode
        seen = [json.loads(file.read_text()) for file in Path(folder).iterdir()]
    if status > 1 or not seen:
        sys.exit(f"fla_suite.py: pytest ended with status {status}")
    number: Counter[tuple[str, str]] = Counter()
    for one in seen:
        number.update({(function, reason): n for function, reason, n in one["calls"]})
    return {
        "outcomes": {test: outcome for one in seen for test, outcome in one["outcomes"].items()},
        "calls": [(*call, n) for call, n in number.most_common()],
    }


# ---- In the process of pytest, of which this file is a plugin ----------------------------------------------

outcomes: dict[str, str] = {}
calls: list[Any] = []


def pytest_configure(config: Any) -> None:
    if os.environ.get("FLA_SUITE_TUNES") == "0":
        from peer_timing.tuning import tune_nothing

        tune_nothing()
    if REPORT in os.environ:
        import flash_kda.fla

        flash_kda.fla.install()
        recording = flash_kda.fla.record()
        calls.append(recording.__enter__())
        config.add_cleanup(lambda: recording.__exit__(None, None, None))


def pytest_runtest_logreport(report: Any) -> None:
    """A test has failed if any of its phases has, and passed if its call has."""
    if report.failed or report.skipped or report.when == "call":
        outcomes[report.nodeid] = "failed" if report.failed else report.outcome


def pytest_sessionfinish() -> None:
    if REPORT in os.environ:
        count = Counter((call.function, call.reason) for call in (calls[0] if calls else ()))
        seen = {"outcomes": outcomes, "calls": [[*call, n] for call, n in count.most_common()]}
        Path(os.environ[REPORT], f"{os.getpid()}.json").write_text(json.dumps(seen))


# ---- What is said ------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        sys.exit(__doc__)
    source = Path(argv[0]).resolve()
    if not files_of(source):
        sys.exit(f"fla_suite.py: {source} has no tests/**/test*kda*.py")
    ours = run(source, files_of(source), argv[1:], True)
    count = Counter(ours["outcomes"].values())
    print("with flash_kda: " + ", ".join(f"{count[name]} {name}" for name in ("passed", "failed", "skipped")))
    for function, reason, n in ours["calls"]:
        print(f"{n} calls of {function} {'left to FLA: ' + reason if reason else 'taken'}", flush=True)
    if not ours["calls"]:
        print("FLA offered no call", flush=True)
    failed = [test for test, outcome in ours["outcomes"].items() if outcome == "failed"]
    outcomes = run(source, failed, argv[1:], False)["outcomes"] if failed else {}
    worse = [test for test in failed if outcomes.get(test) != "failed"]
    for test in failed:
        print(f"fails {'with flash_kda alone' if test in worse else 'in both cases'}: {test}")
    if not worse:
        print("flash_kda breaks no test")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
