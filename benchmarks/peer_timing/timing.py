"""Clocks. Needs PyTorch."""

from __future__ import annotations

import math
import statistics
import time
from typing import Callable

import torch

LEAST_CALLS = 4  # in a graph, so that the launch of the graph itself weighs little
WARM_MS, TIMED_MS = 10, 5  # of work in a round, before the clock starts and under it


def repeats(milliseconds: float, of_one: float, most: int = 200) -> int:
    return max(1, min(most, math.ceil(milliseconds / max(of_one, 1e-6))))


class Timed:
    """Calls over rotating inputs, warmed up, and captured into a graph on a GPU."""

    def __init__(self, calls: list[Callable[[], tuple]], device: str) -> None:
        self.calls, self.on_gpu = calls, device != "cpu"
        self.first = calls[0]()
        if not self.on_gpu:
            return
        for call in calls:  # whatever is tuned or cached for an input happens before the capture
            call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        self.calls_in_graph = len(calls) * repeats(LEAST_CALLS, len(calls))
        with torch.cuda.graph(self.graph):
            # Outputs that stay referenced do not share memory: they rotate as the inputs do.
            self.kept = [call() for call in calls]
            for i in range(len(calls), self.calls_in_graph):
                calls[i % len(calls)]()
        self._replay(1)
        self.replay_ms = self._replay(1)

    def _replay(self, times: int, warm: int = 1) -> float:
        """Milliseconds of one replay.

        All replays are queued before the GPU gets to them, so the host's speed does not count.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(warm):
            self.graph.replay()
        start.record()
        for _ in range(times):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times

    def _plain(self, count: int) -> float:
        """Milliseconds of one call of `count` in a row, from the first call until all work is done."""
        start = time.perf_counter()
        for i in range(count):
            self.calls[i % len(self.calls)]()
        if self.on_gpu:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / count

    def round(self) -> dict[str, float]:
        """One measurement of each kind, in milliseconds a call."""
        if not self.on_gpu:
            return {"plain_ms": self._plain(1)}
        replays = repeats(TIMED_MS, self.replay_ms), repeats(WARM_MS, self.replay_ms)
        graph_ms = self._replay(*replays) / self.calls_in_graph
        self._plain(LEAST_CALLS)
        return {"graph_ms": graph_ms, "plain_ms": self._plain(max(LEAST_CALLS, repeats(TIMED_MS, graph_ms)))}

    def rms(self) -> list[float]:
        """The RMS of out and of the final state of the first call.

        Competitors whose numbers differ do not do the same work.
        """
        norms = [
            (torch.linalg.vector_norm(x, dtype=torch.float32), x.numel()) for x in self.first if x is not None
        ]
        return [float(norm) / math.sqrt(count) for norm, count in norms]


def copy_rate(device: str) -> float:
    """Bytes a second of a large copy within the device's memory, reads and writes counted."""
    size = 1 << 30 if device != "cpu" else 1 << 26
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    times = []
    if device == "cpu":
        for _ in range(10):
            start = time.perf_counter()
            b.copy_(a)
            times.append(time.perf_counter() - start)
    else:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(41)]
        for event in events:
            event.record()
            b.copy_(a)
        torch.cuda.synchronize()
        times = [1e-3 * start.elapsed_time(end) for start, end in zip(events, events[1:])]
    return 2 * size / statistics.median(times[len(times) // 2 :])  # the first half warms up
