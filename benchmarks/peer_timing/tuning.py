"""How long Triton's tuner takes, which is minutes for each shape of each kernel unless something is done.

Triton kernels of FLA, vLLM and SGLang have up to 36 configurations each. `tune_once` lets a kernel keep what
its first call found. `compile_ahead` compiles all configurations of these first calls in several processes:
they leave the machine code in Triton's cache on the disk, where the tuner of the measuring process finds it.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any


def tune_once() -> None:
    """Makes each Triton kernel keep the configuration that was fastest in its first call."""
    from triton.runtime.autotuner import Autotuner

    tune_and_run = Autotuner.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = tune_and_run(self, *args, **kwargs)
        if len(self.configs) > 1 and getattr(self, "best_config", None) is not None:
            self.configs = [self.best_config]
        return result

    Autotuner.run = run


def tune_nothing() -> None:
    """Makes each Triton kernel run in the first of its configurations, for tests that are about no time."""
    from triton.runtime.autotuner import Autotuner

    tune_and_run = Autotuner.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.configs = self.configs[:1]
        return tune_and_run(self, *args, **kwargs)

    Autotuner.run = run


def only_compile(share: str) -> None:
    """Makes calls of tuned Triton kernels compile some of their configurations and run nothing, so their
    outputs hold whatever was there. share: "i/n", the i-th of every n configurations, counted from 0."""
    from triton.runtime.autotuner import Autotuner

    first, step = map(int, share.split("/"))

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        for config in self.configs[first::step]:
            self.fn.run(*args, **{**kwargs, "warmup": True}, **config.all_kwargs())

    Autotuner.run = run


def compile_ahead(argv: list[str], processes: int) -> None:
    """Runs `python ARGV --only-compile i/n` in n processes at once, and waits for them. A process that fails
    says so itself; what it has not compiled is compiled by whoever needs it."""
    started = [
        subprocess.Popen([sys.executable, *argv, "--only-compile", f"{i}/{processes}"])
        for i in range(processes)
    ]
    for process in started:
        process.wait()
