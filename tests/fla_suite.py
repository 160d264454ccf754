"""Runs flash-linear-attention's own tests of KDA with flash_kda.fla installed, and once more without it.

    python tests/fla_suite.py FOLDER [ARGUMENTS OF PYTEST]

FOLDER is the source of flash-linear-attention (FLA) 0.5 to 0.6, with its tests, which no package on PyPI has.
The tests and FLA itself are imported from there. Most of the tests need a GPU. The last lines say how many
tests passed, which calls this package took, and why it left others to FLA. The exit status is 1 if a test
fails with this package that passes without it. FLA_SUITE_FILES may name other test files, relative to FOLDER.
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

REPORT = "FLA_SUITE_REPORT"  # the file in which the process of pytest leaves what it saw


def files_of(source: Path) -> list[str]:
    """FLA's test files of KDA. Files for other hardware and for several processes are left out."""
    if os.environ.get("FLA_SUITE_FILES"):
        return os.environ["FLA_SUITE_FILES"].split()
    found = sorted(path.relative_to(source) for path in (source / "tests").rglob("test*kda*.py"))
    return [str(path) for path in found if not {"npu", "dist", "cp", "precond"} & set(words_of(path))]


def words_of(path: Path) -> list[str]:
    return [word for part in path.with_suffix("").parts for word in part.split("_")]


def run(source: Path, arguments: list[str], is_on: bool) -> dict[str, Any]:
    """Runs the tests in a process of its own. Returns the outcome of each test, and the calls."""
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        path = os.pathsep.join(filter(None, (str(source), str(here), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, REPORT: str(report), "PYTHONPATH": path}
        environment["FLA_FLASH_KDA"] = "1" if is_on else "0"
        command = [sys.executable, "-m", "pytest", "-p", "fla_suite", "-q", *files_of(source), *arguments]
        status = subprocess.run(command, cwd=source, env=environment).returncode
        if status > 1 or not report.exists():
            sys.exit(f"fla_suite.py: pytest ended with status {status}")
        return json.loads(report.read_text())


# ---- In the process of pytest, of which this file is a plugin ----------------------------------------------

outcomes: dict[str, str] = {}
calls: list[Any] = []


def pytest_configure(config: Any) -> None:
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
        Path(os.environ[REPORT]).write_text(json.dumps(seen))


# ---- What is said ------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        sys.exit(__doc__)
    source = Path(argv[0]).resolve()
    if not files_of(source):
        sys.exit(f"fla_suite.py: {source} has no tests/**/test*kda*.py")
    ours, theirs = (run(source, argv[1:], is_on) for is_on in (True, False))
    for title, seen in (("with flash_kda", ours), ("without it", theirs)):
        count = Counter(seen["outcomes"].values())
        print(f"{title}: " + ", ".join(f"{count[name]} {name}" for name in ("passed", "failed", "skipped")))
    for function, reason, n in ours["calls"]:
        print(f"{n} calls of {function} {'left to FLA: ' + reason if reason else 'taken'}")
    if not ours["calls"]:
        print("FLA offered no call")
    worse = [
        test
        for test, outcome in ours["outcomes"].items()
        if outcome == "failed" and theirs["outcomes"].get(test) != "failed"
    ]
    print("\n".join(f"fails with flash_kda alone: {test}" for test in worse) or "flash_kda breaks no test")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
