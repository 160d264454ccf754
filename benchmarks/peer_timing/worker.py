"""One competitor in a process of its own: python -m peer_timing.worker SPEC

SPEC is a JSON object: {"kind", "path", "device", "kernel", "cut", "tunes_once"}, as competitors.py reads it.
The worker says once which competitor it is, then answers one request a line:

    {"do": "copy_rate"}                                      {"copy_bytes_per_second"}
    {"do": "prepare", "shape", "gates", "states"}            {"rms"}: inputs made, warmed up, captured
    {"do": "round"}                                          {"graph_ms", "plain_ms"} of one call
    {"do": "release"}                                        {}: its memory is free for other workers

Any answer may be {"error": sentence} instead. The end of its input ends it.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
from typing import Any


def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


class Worker:
    def __init__(self, spec: dict[str, Any]) -> None:
        from .competitors import load

        self.device: str = spec["device"]
        self.timed: Any = None
        self.competitor, self.version = load(spec)  # first, for it may need no PyTorch to fail
        import torch

        self.torch = torch
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("PyTorch can use no GPU here (--device cpu times plain calls on the CPU)")

    def hello(self) -> dict[str, Any]:
        torch = self.torch
        about = {"version": self.version, "torch": torch.__version__, "python": platform.python_version()}
        if self.device == "cpu":
            return about | {"device": cpu_name(), "driver": None, "cuda": None}
        name = torch.cuda.get_device_name()
        return about | {"device": name, "driver": driver_version(), "cuda": torch.version.cuda}

    def copy_rate(self) -> dict[str, float]:
        from .timing import copy_rate

        try:
            return {"copy_bytes_per_second": copy_rate(self.device)}
        finally:
            self.release()

    def prepare(self, shape: str, gates: str, states: str) -> dict[str, Any]:
        from .inputs import make_sets
        from .timing import Timed

        self.timed = Timed(
            [self.competitor(x) for x in make_sets(shape, gates, states, self.device)], self.device
        )
        return {"rms": self.timed.rms()}

    def round(self) -> dict[str, float]:
        return {kind: round(milliseconds, 6) for kind, milliseconds in self.timed.round().items()}

    def release(self) -> dict[str, Any]:
        self.timed = None
        gc.collect()
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
        return {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        do = {name: getattr(self, name) for name in ("copy_rate", "prepare", "round", "release")}
        with self.torch.inference_mode():
            return do[request.pop("do")](**request)


def sentence(error: BaseException) -> str:
    """The first line that says something; the rest is for whoever debugs the competitor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def main() -> None:
    # The answers have standard output to themselves; whatever a competitor prints goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        worker = Worker(json.loads(sys.argv[1]))
        say(worker.hello())
    except Exception as error:
        say({"error": sentence(error)})
        return
    for line in sys.stdin:
        try:
            say(worker.answer(json.loads(line)))
        except Exception as error:
            say({"error": sentence(error)})


if __name__ == "__main__":
    main()
