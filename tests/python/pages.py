"""Runs the Python of a page as a program of its own.

Most examples import PyTorch, which takes seconds. So a server of processes imports it once, and each example
runs in a fork of that server: nothing that one example changes is seen by another one, or by the tests.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import tempfile
import traceback
from pathlib import Path

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["flash_kda", *(["torch"] if importlib.util.find_spec("torch") else [])])


def _execute(code: str, folder: str) -> None:
    for number, name in ((1, "said"), (2, "errors")):
        os.dup2(os.open(Path(folder, name), os.O_CREAT | os.O_WRONLY), number)
    try:
        exec(compile(code, "<page>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_python(code: str) -> str:
    """What the program prints. A program that fails fails the test, which shows the program's errors."""
    with tempfile.TemporaryDirectory() as folder:
        process = _processes.Process(target=_execute, args=(code, folder))
        process.start()
        process.join()
        assert process.exitcode == 0, Path(folder, "errors").read_text(encoding="utf-8")
        return Path(folder, "said").read_text(encoding="utf-8")
