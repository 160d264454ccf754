"""The parent's side: starts the workers, lets them take turns, and gathers the figures."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from .shapes import bytes_once

WARM_ROUNDS = 2
OVERDUE = "the time limit came first"
BENCHMARKS = Path(__file__).resolve().parents[1]
Tick = Callable[[float], None]  # called while a worker is busy, with the seconds since its request


class RaceError(Exception):
    """One sentence."""


class Overdue(RaceError):
    pass


class Worker:
    about: dict[str, Any] | None = None  # who it says it is

    def __init__(self, spec: dict[str, Any]) -> None:
        folders = [str(BENCHMARKS), os.environ.get("PYTHONPATH")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peer_timing.worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))},
        )

    def ask(self, request: dict[str, Any], deadline: float | None = None, tick: Tick | None = None) -> Any:
        assert self.process.stdin
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise RaceError(f"its process ended with {self.process.wait()}") from None
        return self.answer(deadline, tick)

    def answer(self, deadline: float | None = None, tick: Tick | None = None) -> Any:
        out, start = self.process.stdout, time.monotonic()
        assert out
        # There is one answer to one request, so nothing waits in the buffer.
        while not select.select([out], [], [], 1)[0]:
            if deadline is not None and time.monotonic() > deadline:
                raise Overdue(OVERDUE)
            if tick:
                tick(time.monotonic() - start)
        line = out.readline()
        if not line.endswith("\n"):
            raise RaceError(f"its process ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RaceError(answer["error"])
        return answer

    def end(self) -> None:
        self.process.kill()  # it may be deep in a kernel or a compiler, and holds nothing worth a farewell
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@dataclass
class Competitor:
    name: str
    spec: dict[str, Any]
    only: list[str] | None = None  # the shapes that it runs; None: all
    limit: float | None = None  # seconds from the start, after which it runs nothing more
    worker: Worker | None = None

    def begin(self) -> None:
        """Starts the process, without waiting for it."""
        self.worker = Worker(self.spec)

    def ready(self) -> Worker:
        if self.worker is None:
            self.begin()
        assert self.worker
        if self.worker.about is None:
            self.worker.about = self.worker.answer()
        return self.worker

    def stop(self) -> None:
        if self.worker:
            self.worker.end()
        self.worker = None


@dataclass
class Race:
    competitors: list[Competitor]
    gates: str
    states: str
    rounds: int
    say: Callable[[str], None]  # for what the reader must know
    progress: Callable[[str], None]

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    def start(self) -> dict[str, Any]:
        """Which competitors race, on which device, and how fast its memory is."""
        for competitor in self.competitors:  # side by side, since the import of PyTorch takes seconds
            competitor.begin()
        about: dict[str, dict[str, Any]] = {}
        for competitor in self.competitors:
            try:
                about[competitor.name] = competitor.ready().about or {}
            except RaceError as error:
                raise RaceError(f"{competitor.name}: {error}") from None
        first = self.competitors[0]
        environment = {key: about[first.name][key] for key in ("device", "driver", "cuda", "torch", "python")}
        environment["competitors"] = {name: answer["version"] for name, answer in about.items()}
        return environment | first.ready().ask({"do": "copy_rate"})

    def stop(self) -> None:
        for competitor in self.competitors:
            competitor.stop()

    def shape(self, shape: str, copy_rate: float) -> dict[str, Any]:
        """One row of figures: every competitor's time in every round, and who was left out and why."""
        size = bytes_once(shape, self.states)
        row: dict[str, Any] = {"shape": shape, "gates": self.gates, "states": self.states, "bytes": size}
        row |= {"floor_ms": 1e3 * size / copy_rate, "times": {}, "rms": {}, "left_out": {}}
        racers = [c for c in self.competitors if self._prepare(c, row)]
        for turn in range(WARM_ROUNDS + self.rounds):
            self.progress(f"{shape}: round {turn + 1} of {WARM_ROUNDS + self.rounds}")
            first = turn % max(1, len(racers))
            for competitor in racers[first:] + racers[:first]:  # another one begins in every round
                times = self._attempt(competitor, row, {"do": "round"})
                if times is None:
                    racers = [c for c in racers if c is not competitor]
                elif turn >= WARM_ROUNDS:
                    figures = row["times"].setdefault(competitor.name, {})
                    for kind, milliseconds in times.items():
                        figures.setdefault(kind, []).append(milliseconds)
        for competitor in racers:
            try:
                competitor.ready().ask({"do": "release"})
            except RaceError:
                competitor.stop()  # a new process starts with the next shape
        return row

    def _prepare(self, competitor: Competitor, row: dict[str, Any]) -> bool:
        shape, limit = row["shape"], competitor.limit
        if competitor.only is not None and shape not in competitor.only:
            return False
        request = {"do": "prepare", "shape": shape, "gates": self.gates, "states": self.states}
        answer = self._attempt(competitor, row, request, None if limit is None else self.began + limit)
        if answer is not None:
            row["rms"][competitor.name] = answer["rms"]
        return answer is not None

    def _attempt(
        self,
        competitor: Competitor,
        row: dict[str, Any],
        request: dict[str, Any],
        deadline: float | None = None,
    ) -> dict[str, Any] | None:
        """The answer, or None if there is none.

        Then the competitor is left out of the row, and its process, whose state is unknown, is ended.
        """

        def tick(seconds: float) -> None:
            self.progress(f"{row['shape']}: {competitor.name}, {request['do']}, {seconds:.0f} s")

        try:
            if deadline is not None and time.monotonic() > deadline:
                raise Overdue(OVERDUE)
            answer: dict[str, Any] = competitor.ready().ask(request, deadline, tick)
            return answer
        except RaceError as error:
            after = f" ({competitor.limit:.0f} s)" if isinstance(error, Overdue) else ""
            row["left_out"][competitor.name] = f"{error}{after}"
            self.say(f"{competitor.name} is left out of {row['shape']}: {error}{after}")
            for figures in (row["times"], row["rms"]):
                figures.pop(competitor.name, None)
            competitor.stop()
            return None
