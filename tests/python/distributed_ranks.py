"""Processes that are the ranks of torch.distributed on the CPU, for tests of flash_kda.distributed.

Eight processes start once and join one process group of gloo. A call of several ranks runs on the first of
them, in a group of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

RANKS = 8
SIZES = (1, 2, 3, 4, 8)
TIMEOUT = timedelta(seconds=60)

spawned = multiprocessing.get_context("forkserver")
spawned.set_forkserver_preload(["torch", "flash_kda", "distributed_ranks"])


def share_of(x, rank, ranks):
    """The rank's tokens of a tensor [1, T, ...]."""
    size = max(-(-x.shape[1] // ranks), 1)
    return x[:, min(rank * size, x.shape[1]) : min((rank + 1) * size, x.shape[1])]


def _serve(rank, file, pipe):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no network is needed
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS, timeout=TIMEOUT
    )
    groups = {size: dist.new_group(list(range(size)), timeout=TIMEOUT) for size in SIZES}
    pipe.send(None)
    while True:
        function, ranks, arguments = pipe.recv()
        if function is None:
            break
        try:
            pipe.send((True, function(rank, ranks, groups[ranks], *arguments)))
        except Exception as error:
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))
    dist.destroy_process_group()


class Ranks:
    """The processes. run() calls a function on some of them."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._ranks = [], []
        for rank in range(RANKS):
            ours, theirs = spawned.Pipe()
            process = spawned.Process(
                target=_serve, args=(rank, Path(self._folder.name, "store"), theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._ranks.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def try_to_run(self, function, ranks, *arguments):
        """What function(rank, ranks, group, *arguments) returns on each of the first ranks: (True, result),
        or (False, (type, message, traceback)) of its exception."""
        for pipe in self._pipes[:ranks]:
            pipe.send((function, ranks, arguments))
        return [pipe.recv() for pipe in self._pipes[:ranks]]

    def run(self, function, ranks, *arguments):
        """The results, by rank. An exception of a rank fails the test."""
        answers = self.try_to_run(function, ranks, *arguments)
        for good, answer in answers:
            assert good, answer[2]
        return [answer for _, answer in answers]

    def close(self):
        for pipe in self._pipes:
            pipe.send((None, 0, ()))
        for process in self._ranks:
            process.join(30)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()
