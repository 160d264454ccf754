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
    """TEAMS, SOLVERS, PRODUCTS, ... of the kernel whose blocks carry `rows` rows of V."""
    text = "".join((KERNEL / name).read_text() for name in ("fwd_shape.h", "shared.cuh", "walk.cuh"))

    def constant(name: str) -> int:
        match = re.search(
            rf"\b{name}(?:\(rows\))? (?:= )?(?:\(?\(?rows\)? == 128 \? (\d+) : (\d+)|(\d+))", text
        )
        assert match, f"{name} is not where it was"
        return int(match[3] or match[1 if rows == 128 else 2])

    found = {name: constant(name) for name in ("TEAM_WARPS", "INPUTS", "STAGES", "PIECES_AHEAD", "PRODUCTS")}
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
    def __init__(self, size: int, fills: int, empties: int) -> None:
        self.full = [Barrier(fills) for _ in range(size)]
        self.empty = [Barrier(empties) for _ in range(size)]
        self.slots: list[dict[str, Any]] = [{} for _ in range(size)]


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
        warps = self.recurrence_warps + n["TEAMS"] * n["TEAM_WARPS"] + n["SOLVERS"] + 1
        self.pieces = Ring(n["PIECES_AHEAD"], 1, warps)
        self.inputs = Ring(n["INPUTS"], 1, n["TEAM_WARPS"])
        self.products = Ring(n["PRODUCTS"], n["TEAM_WARPS"], 1)
        self.stages = Ring(n["STAGES"], n["TEAM_WARPS"] + 2, self.recurrence_warps)
        self.copies: list[tuple[Ring, int, str, Any]] = []  # in flight, in order
        self.norms: dict[tuple[int, int], int] = {}
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

    def take(self, slot: Slot) -> Steps:
        yield from self.pieces.full[slot.index].wait(slot.parity)
        piece = self.pieces.slots[slot.index]["piece"]
        yield
        assert self.pieces.slots[slot.index]["piece"] is piece, "a piece was overwritten"
        self.pieces.empty[slot.index].arrive()
        slot.advance(1)
        return piece

    def chunks(self, first: int, step: int) -> Generator[Any, None, None]:
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
        for chunk in self.chunks(first, step):
            if chunk is None:
                yield
            else:
                yield from body(chunk)

    def loader(self) -> Steps:
        n = self.n
        dealt, input_slot, stage, walk = (
            Slot(n[name]) for name in ("PIECES_AHEAD", "INPUTS", "STAGES", "PIECES_AHEAD")
        )
        values, done, behind, valueless = (-1, 0), 0, 0, 0

        def pass_pieces() -> Steps:
            nonlocal values, done, behind
            while done >= values[1] and behind > 0:
                values = yield from self.take(walk)
                done, behind = 0, behind - 1

        def load_values() -> Steps:
            nonlocal done, valueless
            yield from pass_pieces()
            assert done < values[1], "no chunk to load values of"
            yield from self.stages.empty[stage.index].wait(stage.parity ^ 1)
            self.copies.append((self.stages, stage.index, "v", (values[0], done // CHUNK)))
            stage.advance(1)
            done, valueless = done + CHUNK, valueless - 1
            yield from pass_pieces()

        def deal() -> Steps:
            nonlocal behind
            yield from pass_pieces()
            while behind >= n["PIECES_AHEAD"] - 1 and valueless > 0:
                yield from load_values()
            piece = next(self.todo)
            yield from self.pieces.empty[dealt.index].wait(dealt.parity ^ 1)
            self.pieces.slots[dealt.index] = {"piece": piece}
            self.pieces.full[dealt.index].arrive()
            dealt.advance(1)
            behind += 1
            return piece

        piece = yield from deal()
        while piece[0] >= 0:
            now, piece = piece, (yield from deal())
            for first in range(0, now[1], CHUNK):
                yield from self.inputs.empty[input_slot.index].wait(input_slot.parity ^ 1)
                self.copies.append((self.inputs, input_slot.index, "qkg", (now[0], first // CHUNK)))
                input_slot.advance(1)
                valueless += 1
                if valueless > n["INPUTS"] - 2:
                    yield from load_values()
        while valueless > 0:
            yield from load_values()

    def prepare(self, team: int, part: str) -> Steps:
        n = self.n
        source, stage, parts = (Slot(n[name], team) for name in ("INPUTS", "STAGES", "PRODUCTS"))
        turn = 0

        def body(chunk: Any) -> Steps:
            nonlocal turn
            yield from self.inputs.full[source.index].wait(source.parity)
            held = self.inputs.slots[source.index]
            assert held["qkg"] == chunk, f"inputs of {held} for {chunk}"
            self.norms[team, turn] = self.norms.get((team, turn), 0) + 1
            while self.norms[team, turn] < n["TEAM_WARPS"]:
                yield
            turn += 1
            yield from self.stages.empty[stage.index].wait(stage.parity ^ 1)
            yield from self.work()
            self.put(self.stages, stage.index, part, chunk)
            yield from self.products.empty[parts.index].wait(parts.parity ^ 1)
            self.put(self.products, parts.index, part, chunk)
            yield
            assert held is self.inputs.slots[source.index], "inputs were given away while they were read"
            held[part] = "read"
            if len(held) == 1 + n["TEAM_WARPS"]:
                self.inputs.slots[source.index] = {}
            for barrier in (
                self.inputs.empty[source.index],
                self.products.full[parts.index],
                self.stages.full[stage.index],
            ):
                barrier.arrive()
            for slot in (source, stage, parts):
                slot.advance(n["TEAMS"])

        yield from self.each_chunk(team, n["TEAMS"], body)

    def solve(self, solver: int) -> Steps:
        n = self.n
        stage, parts = (Slot(n[name], solver) for name in ("STAGES", "PRODUCTS"))

        def body(chunk: Any) -> Steps:
            yield from self.products.full[parts.index].wait(parts.parity)
            yield from self.stages.empty[stage.index].wait(stage.parity ^ 1)
            held = self.products.slots[parts.index]
            wanted = {f"part {warp}": chunk for warp in range(n["TEAM_WARPS"])}
            assert held == wanted, f"products of {held} for {chunk}"
            yield from self.work()
            self.products.slots[parts.index] = {}
            self.products.empty[parts.index].arrive()
            yield from self.work()
            self.put(self.stages, stage.index, "solve", chunk)
            self.stages.full[stage.index].arrive()
            for slot in (stage, parts):
                slot.advance(n["SOLVERS"])

        yield from self.each_chunk(solver, n["SOLVERS"], body)

    def recurrence(self, warp: int) -> Steps:
        slot, walk = Slot(self.n["STAGES"]), Slot(self.n["PIECES_AHEAD"])
        parts = ["v", "solve", *(f"part {w}" for w in range(self.n["TEAM_WARPS"]))]
        piece = yield from self.take(walk)
        while piece[0] >= 0:
            for first in range(0, piece[1], CHUNK):
                chunk = (piece[0], first // CHUNK)
                yield from self.stages.full[slot.index].wait(slot.parity)
                for _ in range(2):
                    held = {name: x for name, x in self.stages.slots[slot.index].items() if name in parts}
                    assert held == dict.fromkeys(parts, chunk), f"stage of {held} for {chunk}"
                    yield from self.work()
                self.done[warp].append(chunk)
                self.stages.slots[slot.index][f"read {warp}"] = True
                if sum(name.startswith("read") for name in self.stages.slots[slot.index]) == len(self.done):
                    self.stages.slots[slot.index] = {}
                self.stages.empty[slot.index].arrive()
                slot.advance(1)
                yield
            self.done[warp].append((piece[0], "state"))
            piece = yield from self.take(walk)

    def land(self) -> None:
        """The oldest copy in flight arrives."""
        ring, index, name, chunk = self.copies.pop(0)
        self.put(ring, index, name, chunk)
        ring.full[index].arrive()

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
                b.round * b.count + b.count - b.missing for r in self.rings() for b in (*r.full, *r.empty)
            ]
            now = (rounds, len(self.copies), len(self.warps))
            idle, seen = (idle + 1, seen) if now == seen else (0, now)
            assert idle < patience, f"deadlock: {', '.join(self.warps)} wait"

    def rings(self) -> tuple[Ring, ...]:
        return self.pieces, self.inputs, self.products, self.stages
