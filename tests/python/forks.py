"""Runs programs in forks of a process that has imported what takes seconds: python forks.py MODULE...

Each fork is a process of its own, so nothing that one program changes is seen by another one, or by the
tests. Each line of the process's input is a program to run, as a list in JSON: the program's words, its
environment, and the files for its output and its errors. The answer is a line with its exit status.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


class Forks:
    """A process with these modules, which begins with the first program. Modules that are missing are left
    out."""

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._process: subprocess.Popen[str] | None = None

    def run(self, program: Path, *words: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *self._modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
            )
        command = [str(program), *words]
        with tempfile.TemporaryDirectory() as folder:
            files = [f"{folder}/out", f"{folder}/errors"]
            self._process.stdin.write(json.dumps([command, environment, files]) + "\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(command, status, *(Path(file).read_text() for file in files))


# With what FLA imports, and neither FLA nor this package.
for_fla = Forks(
    "torch", "triton", "einops", "torch._dynamo", "torch._inductor.compile_fx", "transformers.modeling_utils"
)


def execute(command: list[str], environment: dict[str, str], files: list[str]) -> int:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    sys.path[0] = os.path.dirname(command[0])
    try:
        runpy.run_path(command[0], run_name="__main__")
        return 0
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main(modules: list[str]) -> None:
    for module in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(execute(*json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
