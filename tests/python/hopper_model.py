"""The hand-over between the roles of the Hopper kernel, without its arithmetic: warps as coroutines that a scheduler
interleaves at random, mbarriers with their parities, slots that remember which chunk is in them.

A wait that ends a round too early, a slot overwritten while it is read, a missing arrival and a deadlock all show within a few
hundred runs, without a GPU. The coroutines follow load.cuh, prepare.cuh, solve.cuh and recurrence.cuh wait for wait
and arrival for arrival; the sizes of the rings are read from the headers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

KERNEL = Path(__file__).resolve().parents[2] / "kernels" / "hopper"
CHUNK = 16
Steps = Generator[None, None, Any]
END = (-1, 0)  # the piece after the last one


def sizes(rows: int) -> dict[str, int]:
    """TEAMS, SOLVERS, SLOTS, ... of the kernel whose blocks carry `rows` rows of V."""
    text = "".join((KERNEL / name).read_text() for name in ("fwd_shape.h", "shared.cuh", "walk.cuh"))

    def constant(name: str) -> int:
        match = re.search(
            rf"\b{name}(?:\(rows\))? (?:=\s+)?(?:\(?\(?rows\)? == 128 \? (\d+) : (\d+)|(\d+))", text
        )
        assert match, f"{name} is not where it was"
        return int(match[3] or match[1 if rows == 128 else 2])

    found = {name: constant(name) for name in ("TEAM_WARPS", "SLOTS", "PIECES_AHEAD")}
    found["TEAMS"] = constant("FKDA_HOPPER_PREPARE_WARPS") // found["TEAM_WARPS"]
    found["SOLVERS"] = constant("FKDA_HOPPER_SOLVE_WARPS")
    return found


class Barrier:
    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.round = 0

    def arrive(self) -> None:
        self.missing -= 1
        assert self.missing >= 0, "more arrivals than expected"
        if self.missing == 0:
            self.round, self.missing = self.round + 1, self.count

    def wait(self, parity: int) -> Steps:
        while self.round % 2 == parity:
            yield


class Ring:
    """Slots with a row of barriers for each of the named events."""

    def __init__(self, size: int, **arrivals: int) -> None:
        self.barriers = {event: [Barrier(count) for _ in range(size)] for event, count in arrivals.items()}
        self.slots: list[dict[str, Any]] = [{} for _ in range(size)]

    def __getattr__(self, event: str) -> list[Barrier]:
        return self.barriers[event]


class Slot:
    def __init__(self, size: int, first: int = 0) -> None:
        self.size, self.index, self.parity = size, first % size, first // size % 2

    def advance(self, steps: int) -> None:
        self.index += steps
        if self.index >= self.size:
            self.index, self.parity = self.index - self.size, self.parity ^ 1


class Block:
    """One block that works through pieces of these lengths."""

    def __init__(self, lengths: list[int], seed: int, rows: int = 128, **changed: int) -> None:
        n = {**sizes(rows), **changed}
        self.n, self.random = n, random.Random(seed)
        self.todo: Iterator[tuple[int, int]] = iter([*enumerate(lengths), END])
        self.recurrence_warps = 2  # of four or eight: they are alike
        warps = self.recurrence_warps + n["TEAMS"] * n["TEAM_WARPS"] + n["SOLVERS"]
        self.pieces = Ring(n["PIECES_AHEAD"], full=1, empty=warps)
        self.chunks = Ring(n["SLOTS"], loaded=1, ready=n["TEAM_WARPS"] + 1, empty=self.recurrence_warps)
        self.products = Ring(n["TEAMS"], full=n["TEAM_WARPS"], empty=1)
        self.copies: list[tuple[int, Any]] = []  # in flight: the slot, the chunk
        self.together: dict[Any, int] = {}  # warps of a team that have come to a barrier of theirs
        self.done: list[list[Any]] = [[] for _ in range(self.recurrence_warps)]
        self.warps: dict[str, Steps] = {"loader": self.loader()}
        for team in range(n["TEAMS"]):
            for warp in range(n["TEAM_WARPS"]):
                self.warps[f"prepare {team}.{warp}"] = self.prepare(team, f"part {warp}")
        for solver in range(n["SOLVERS"]):
            self.warps[f"solve {solver}"] = self.solve(solver)
        for warp in range(self.recurrence_warps):
            self.warps[f"recurrence {warp}"] = self.recurrence(warp)

    def work(self) -> Steps:
        for _ in range(self.random.randint(0, 6)):
            yield

    def put(self, ring: Ring, index: int, name: str, chunk: Any) -> None:
        assert name not in ring.slots[index], f"{name} of {ring.slots[index][name]} overwritten by {chunk}"
        ring.slots[index][name] = chunk

    def look(self, slot: Slot) -> Steps:
        yield from self.pieces.full[slot.index].wait(slot.parity)
        return self.pieces.slots[slot.index]["piece"]

    def leave(self, slot: Slot, piece: Any) -> None:
        assert self.pieces.slots[slot.index]["piece"] is piece, "a piece was overwritten"
        self.pieces.empty[slot.index].arrive()
        slot.advance(1)

    def take(self, slot: Slot) -> Steps:
        piece = yield from self.look(slot)
        yield
        self.leave(slot, piece)
        return piece

    def walk(self, first: int, step: int) -> Generator[Any, None, None]:
        """Every step-th chunk for one warp: None while it waits, then the chunk. It goes on to the next piece only
        when it is done with the chunk."""
        slot, over = Slot(self.n["PIECES_AHEAD"]), first
        while True:
            piece, length = yield from self.take(slot)
            if piece < 0:
                return
            count = -(-length // CHUNK)
            while over < count:
                yield (piece, over)
                over += step
            over -= count

    def each_chunk(self, first: int, step: int, body: Any) -> Steps:
        for chunk in self.walk(first, step):
            if chunk is None:
                yield
            else:
                yield from body(chunk)

    def loader(self) -> Steps:
        dealt, slot = Slot(self.n["PIECES_AHEAD"]), Slot(self.n["SLOTS"])

        def deal() -> Steps:
            piece = next(self.todo)
            yield from self.pieces.empty[dealt.index].wait(dealt.parity ^ 1)
            self.pieces.slots[dealt.index] = {"piece": piece}
            self.pieces.full[dealt.index].arrive()
            dealt.advance(1)
            return piece

        piece = yield from deal()
        while piece[0] >= 0:
            now, piece = piece, (yield from deal())
            for first in range(0, now[1], CHUNK):
                yield from self.chunks.empty[slot.index].wait(slot.parity ^ 1)
                assert not self.chunks.slots[slot.index], "a slot is filled while it is in use"
                self.copies.append((slot.index, (now[0], first // CHUNK)))
                slot.advance(1)

    def team_barrier(self, at: Any) -> Steps:
        self.together[at] = self.together.get(at, 0) + 1
        while self.together[at] < self.n["TEAM_WARPS"]:
            yield

    def prepare(self, team: int, part: str) -> Steps:
        slot, turn = Slot(self.n["SLOTS"], team), 0

        def body(chunk: Any) -> Steps:
            nonlocal turn
            yield from self.chunks.loaded[slot.index].wait(slot.parity)
            held = self.chunks.slots[slot.index]
            assert held.get("inputs") == chunk, f"inputs of {held} for {chunk}"
            yield from self.work()  # reads both halves, for the norms
            yield from self.team_barrier((team, turn))
            yield from self.work()
            assert held is self.chunks.slots[slot.index], "a chunk was given away while it was prepared"
            self.put(self.chunks, slot.index, part, chunk)
            yield from self.products.empty[team].wait(turn % 2 ^ 1)
            self.put(self.products, team, part, chunk)
            yield
            self.products.full[team].arrive()
            self.chunks.ready[slot.index].arrive()
            turn += 1
            slot.advance(self.n["TEAMS"])

        yield from self.each_chunk(team, self.n["TEAMS"], body)

    def solve(self, solver: int) -> Steps:
        n = self.n
        slot, parts = Slot(n["SLOTS"], solver), Slot(n["TEAMS"], solver)

        def body(chunk: Any) -> Steps:
            yield from self.products.full[parts.index].wait(parts.parity)
            held = self.products.slots[parts.index]
            wanted = {f"part {warp}": chunk for warp in range(n["TEAM_WARPS"])}
            assert held == wanted, f"products of {held} for {chunk}"
            yield from self.work()
            self.products.slots[parts.index] = {}
            self.products.empty[parts.index].arrive()
            yield from self.work()
            self.put(self.chunks, slot.index, "solve", chunk)
            self.chunks.ready[slot.index].arrive()
            slot.advance(n["SOLVERS"])
            parts.advance(n["SOLVERS"])

        yield from self.each_chunk(solver, n["SOLVERS"], body)

    def recurrence(self, warp: int) -> Steps:
        slot, walk = Slot(self.n["SLOTS"]), Slot(self.n["PIECES_AHEAD"])
        parts = ["inputs", "solve", *(f"part {w}" for w in range(self.n["TEAM_WARPS"]))]
        piece = yield from self.look(walk)
        while piece[0] >= 0:
            for first in range(0, piece[1], CHUNK):
                chunk = (piece[0], first // CHUNK)
                yield from self.chunks.ready[slot.index].wait(slot.parity)
                for _ in range(2):
                    held = {name: x for name, x in self.chunks.slots[slot.index].items() if name in parts}
                    assert held == dict.fromkeys(parts, chunk), f"stage of {held} for {chunk}"
                    yield from self.work()
                self.done[warp].append(chunk)
                self.chunks.slots[slot.index][f"read {warp}"] = True
                if sum(name.startswith("read") for name in self.chunks.slots[slot.index]) == len(self.done):
                    self.chunks.slots[slot.index] = {}
                self.chunks.empty[slot.index].arrive()
                slot.advance(1)
                yield
            self.done[warp].append((piece[0], "state"))
            self.leave(walk, piece)
            piece = yield from self.look(walk)

    def land(self) -> None:
        """One of the copies in flight arrives: they may overtake each other."""
        index, chunk = self.copies.pop(self.random.randrange(len(self.copies)))
        self.put(self.chunks, index, "inputs", chunk)
        self.chunks.loaded[index].arrive()

    def run(self, patience: int = 4000) -> None:
        """Until all warps are done; fails if nothing happens for so many turns."""
        idle, seen = 0, None
        while self.warps:
            if idle % 200 == 0:
                speed = {name: self.random.choice([1, 1, 3, 10, 100]) for name in self.warps}
            if self.copies and self.random.random() < 0.3:
                self.land()
            name = self.random.choices(list(self.warps), [speed[name] for name in self.warps])[0]
            for _ in range(self.random.choice([1, 1, 5, 30])):
                try:
                    next(self.warps[name])
                except StopIteration:
                    del self.warps[name]
                    break
            rounds = [
                b.round * b.count + b.count - b.missing
                for ring in (self.pieces, self.chunks, self.products)
                for barriers in ring.barriers.values()
                for b in barriers
            ]
            now = (rounds, len(self.copies), len(self.warps))
            idle, seen = (idle + 1, seen) if now == seen else (0, now)
            assert idle < patience, f"deadlock: {', '.join(self.warps)} wait"
