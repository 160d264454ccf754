"""Times decode beside the rate at which the same GPU or CPU copies memory, and on a GPU beside
flash-linear-attention's fused_recurrent_kda where that is installed.

    python benchmarks/decode.py
    python benchmarks/decode.py --rows 64x12 256x8 --rounds 5 --json decode.json
    python benchmarks/decode.py --device cpu --rows "256x32 T=1 last" --clock processor

A row is a number of sequences x heads, tokens of each sequence, and what happens to the states. A time is the
median of rounds of CUDA-graph replays, or of plain calls on the CPU. Calls of a graph take turns at slots
of one pool that is far beyond the L2 cache, in a random order, so that every state comes from memory.
"floor" is the time in which the bytes that a call has to move (states, records, inputs and outputs) could
be copied, "of copy" is floor / time. A row with a bar in microseconds, in per cent of the copy rate, or in
terms of another row's time says whether it is met.

On the CPU each round also copies a pool, so that calls and copies take turns, and a row's figures are medians
over its rounds. There the bar of rows with 8192 heads and one token is 60% of the copy rate. With --clock
processor, calls and copies have one thread, and their processor time counts: other work on the machine then
hardly shows.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import json
import os
import statistics
import sys
import time
from typing import Any, Callable, NamedTuple

from peer_timing.shapes import DIM

STATE = DIM * DIM  # elements of a state of one head
L2_BYTES = 50 << 20
LEAST_CPU_SHARE = 0.60  # of the copy rate, where states are too large for a cache
RECORD_BYTES = 3 * DIM * 4  # of a token of a head


class Row(NamedTuple):
    """One line of the table. Its bar is one of: microseconds, a share of the copy rate, a ratio to a row."""

    sequences: int
    heads: int
    tokens: int = 1
    writes: str = "last"
    records: bool = False
    applies: bool = False  # all tokens are applied by a second call
    past: bool = False  # as many tokens of past records are applied by the same call
    bf16: bool = False
    rounds_at_random: bool = False
    k_first: bool = False
    layer: bool = False  # decode_layer: convolution, recurrence, norm and output gate
    most_us: float | None = None
    least_share: float | None = None
    most_ratio: float | None = None  # to the row with one token

    @property
    def name(self) -> str:
        words = [f"{self.sequences}x{self.heads}", f"T={self.tokens}", self.writes]
        words += ["bf16" if self.bf16 else "fp32"]
        words += ["at random"] * self.rounds_at_random + ["K first"] * self.k_first
        words += (
            ["records"] * self.records
            + ["applied"] * self.applies
            + ["past"] * self.past
            + ["layer"] * self.layer
        )
        return " ".join(words)

    @property
    def state_bytes(self) -> int:
        """Of all states that a call reads."""
        return self.sequences * self.heads * STATE * (2 if self.bf16 else 4)

    @property
    def moved_bytes(self) -> int:
        tokens = self.sequences * self.tokens * self.heads
        moved = tokens * (5 * DIM * 2 + 2)  # q, k, v, g and out, beta
        moved += self.state_bytes * (
            1 if self.writes == "none" else self.tokens + 1 if self.writes == "each" else 2
        )
        if self.layer:  # the output gate, windows that are read and written, and weights once
            moved += tokens * DIM * 2 + self.sequences * self.heads * 3 * DIM * 3 * 2 * 2
            moved += self.heads * 3 * DIM * 4 * 4
        if self.records:
            moved += tokens * RECORD_BYTES
        if self.applies:
            moved += tokens * RECORD_BYTES + 2 * self.state_bytes
        if self.past:
            moved += tokens * RECORD_BYTES + self.state_bytes
        return moved


ROWS = [
    Row(1, 12, most_us=4.0),
    Row(64, 12, most_us=29.0),
    Row(64, 12, 4, most_us=32.0),
    Row(64, 12, 4, "none", most_us=32.0),
    Row(256, 8, most_us=72.0),
    Row(256, 16),
    Row(256, 16, 2),
    Row(256, 16, 4, most_ratio=1.15),
    Row(256, 16, 4, "none"),
    Row(256, 16, 8),
    Row(256, 16, 8, "none"),
    Row(256, 16, 8, "none", records=True),
    Row(256, 16, 8, "none", records=True, applies=True),
    Row(256, 16, 8, "none", records=True, past=True, most_ratio=1.5),
    Row(256, 16, 16),
    Row(256, 16, 4, "each"),
    Row(256, 32, least_share=0.85),
    Row(256, 32, bf16=True, least_share=0.80),
    Row(256, 32, bf16=True, rounds_at_random=True),
    Row(256, 32, k_first=True),
    Row(1024, 12, least_share=0.88),
    Row(1, 12, layer=True, most_us=5.5),
    Row(64, 12, layer=True, most_us=34.0),
    Row(64, 12, 4, "none", layer=True),
    Row(256, 32, layer=True),
    Row(256, 32, bf16=True, layer=True),
]

# ---- Timing ------------------------------------------------------------------------------------------------


class Inputs:
    """A pool, and for each call of a graph the tensors of its tokens and its slots."""

    def __init__(self, row: Row, device: str) -> None:
        import torch

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, dtype=torch.bfloat16, device=device)

        # Between two uses of a slot, four times the cache is moved.
        self.sets = max(1, min(64, 4 * L2_BYTES // row.state_bytes))
        columns = row.tokens if row.writes == "each" else 1
        slots = self.sets * row.sequences * columns
        dtype = torch.bfloat16 if row.bf16 else torch.float32
        self.pool = torch.empty(slots, row.heads, DIM, DIM, dtype=dtype, device=device).normal_(std=0.1)
        order = torch.randperm(slots, device=device).to(torch.int32)
        shape = (self.sets, row.sequences, columns) if columns > 1 else (self.sets, row.sequences)
        self.indices = order.reshape(shape)
        self.tokens = []
        for _ in range(self.sets):
            wide = (row.sequences, row.tokens, row.heads, DIM)
            x = {name: normal(*wide) for name in "qkvg"}
            x["beta"] = normal(*wide[:3])
            self.tokens.append(x)
        channels = 3 * row.heads * DIM
        self.windows = normal(slots if row.layer else 0, channels, 3)
        self.weight = normal(channels, 4).float()
        self.norm_weight = torch.ones(DIM, device=device)
        for x in self.tokens if row.layer else ():
            x["x"] = normal(row.sequences, row.tokens, channels)
            x["output_gate"] = normal(row.sequences, row.tokens, row.heads, DIM)
        self.A_log = torch.zeros(row.heads, device=device)
        self.dt_bias = torch.linspace(-10.0, 2.0, DIM, device=device).expand(row.heads, DIM).contiguous()
        self.rounding = torch.tensor([1, 2], device=device) if row.rounds_at_random else None
        self.all_tokens = torch.full((row.sequences,), row.tokens, dtype=torch.int32, device=device)


def own_calls(row: Row, inputs: Inputs, device: str, threads: int = 0) -> list[Callable[[], None]]:
    import torch

    import flash_kda

    calls: list[Callable[[], None]] = []
    for x, indices in zip(inputs.tokens, inputs.indices):
        out = torch.empty_like(x["v"])
        records = None
        if row.records:
            records = torch.empty(row.sequences, row.tokens, row.heads, 3, DIM, device=device)
        options = {"state_indices": indices, "rounding": inputs.rounding, "state_v_first": not row.k_first}
        past = {}
        if row.past:  # any records that keep states in their range
            decays = torch.rand(row.sequences, row.tokens, row.heads, 1, DIM, device=device) / 8 + 0.875
            rest = torch.randn(row.sequences, row.tokens, row.heads, 2, DIM, device=device) / 16
            past = {"past_records": torch.cat([decays, rest], 3), "num_accepted_tokens": inputs.all_tokens}

        def layer(x: Any = x, out: Any = out, options: Any = options) -> None:
            flash_kda.decode_layer(
                x["x"], inputs.weight, None, inputs.windows, x["g"], x["beta"], inputs.A_log, inputs.dt_bias,
                options["state_indices"], inputs.pool, out=out, lower_bound=-5.0,
                output_gate=x["output_gate"], norm_weight=inputs.norm_weight, write_states=row.writes,
                threads=threads,
            )  # fmt: skip

        def call(
            x: Any = x, out: Any = out, records: Any = records, options: Any = options, past: Any = past
        ) -> None:
            flash_kda.decode(
                **x, scale=DIM**-0.5, out=out, A_log=inputs.A_log, dt_bias=inputs.dt_bias, lower_bound=-5.0,
                state=inputs.pool, write_states=row.writes, records=records,
                threads=threads, **past, **options,
            )  # fmt: skip
            if row.applies:
                flash_kda.apply_records(records, inputs.all_tokens, inputs.pool, threads=threads, **options)

        calls.append(layer if row.layer else call)
    return calls


def fla_calls(row: Row, inputs: Inputs) -> list[Callable[[], None]] | None:
    """FLA's kernel of the same call, or None where FLA is not installed or has no such call."""
    import torch

    try:
        from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd
    except ImportError:
        return None
    if row.writes == "none" or row.records or row.rounds_at_random or row.layer:
        return None
    ends = torch.arange(0, (row.sequences + 1) * row.tokens, row.tokens, device="cuda")
    calls: list[Callable[[], None]] = []
    for x, indices in zip(inputs.tokens, inputs.indices):
        packed = {name: value.reshape(1, -1, *value.shape[2:]) for name, value in x.items()}
        if row.writes == "last" and row.tokens > 1:  # FLA writes each state: here all of them to one slot
            indices = indices[:, None].expand(-1, row.tokens).contiguous()
        out = torch.empty_like(packed["v"])

        def call(x: Any = packed, out: Any = out, indices: Any = indices) -> None:
            fused_recurrent_kda_fwd(
                **x, A_log=inputs.A_log, dt_bias=inputs.dt_bias.reshape(-1), initial_state=inputs.pool,
                scale=DIM**-0.5, inplace_final_state=True, state_v_first=not row.k_first, cu_seqlens=ends,
                ssm_state_indices=indices, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
                use_beta_sigmoid_in_kernel=True, lower_bound=-5.0, out=out,
            )  # fmt: skip

        calls.append(call)
    return calls


class Graph:
    """Calls over rotating slots, captured."""

    def __init__(self, calls: list[Callable[[], None]]) -> None:
        import torch

        for call in calls:
            call()
        torch.cuda.synchronize()
        repeats = -(-16 // len(calls))
        self.calls = repeats * len(calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(repeats):
                for call in calls:
                    call()
        self.graph.replay()

    def microseconds(self, replays: int = 8) -> float:
        """Of one call."""
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            self.graph.replay()
        start.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / (replays * self.calls)


class Timing(NamedTuple):
    own_us: float
    floor_us: float
    share: float  # of the copy rate
    fla_us: float | None


class Copy:
    """Copies memory by the C library, in equal parts by each thread, which is the fastest copy there is."""

    def __init__(self, memory: Any, threads: int) -> None:
        import torch

        self.copy, self.memory = torch.zeros_like(memory), memory
        self.bytes = memory.numel() * memory.element_size()
        self.part = -(-self.bytes // threads)
        self.threads = concurrent.futures.ThreadPoolExecutor(threads)

    def part_from(self, begin: int) -> None:
        size = min(self.part, self.bytes - begin)
        ctypes.memmove(self.copy.data_ptr() + begin, self.memory.data_ptr() + begin, size)

    def __call__(self) -> None:
        list(self.threads.map(self.part_from, range(0, self.bytes, self.part)))


def time_on_cpu(row: Row, rounds: int, by_processor: bool) -> Timing:
    """Calls and copies of the pool take turns."""
    clock = time.process_time if by_processor else time.perf_counter
    threads = 1 if by_processor else len(os.sched_getaffinity(0))
    inputs = Inputs(row, "cpu")
    calls = own_calls(row, inputs, "cpu", threads)
    copy = Copy(inputs.pool, threads)

    def call() -> None:
        for one in calls:
            one()

    def seconds(work: Callable[[], None]) -> float:
        start = clock()
        work()
        return clock() - start

    for work in (call, copy):
        work()
    own_us, floor_us = [], []
    for _ in range(rounds):
        own_us.append(1e6 * seconds(call) / len(calls))
        floor_us.append(1e6 * seconds(copy) * row.moved_bytes / (2 * copy.bytes))
    share = statistics.median(floor / own for floor, own in zip(floor_us, own_us))
    return Timing(statistics.median(own_us), statistics.median(floor_us), share, None)


def time_on_gpu(row: Row, rounds: int, rate: float, with_fla: bool) -> Timing:
    inputs = Inputs(row, "cuda")
    timed = Graph(own_calls(row, inputs, "cuda"))
    own = statistics.median(timed.microseconds() for _ in range(rounds))
    del timed
    theirs = None
    calls = fla_calls(row, inputs) if with_fla else None
    if calls:
        try:
            other = Graph(calls)
            theirs = statistics.median(other.microseconds() for _ in range(rounds))
        except Exception as error:  # whatever another library raises
            print(f"FLA: {row.name}: {error}", file=sys.stderr)
    floor = 1e6 * row.moved_bytes / rate
    return Timing(own, floor, floor / own, theirs)


def judge(row: Row, own: float, share: float, one_token: float | None, on_gpu: bool) -> str:
    if row.most_us is not None and on_gpu:
        return f"{row.most_us:.0f} us: {'met' if own <= row.most_us else 'missed'}"
    least = row.least_share if on_gpu or row.least_share is None else LEAST_CPU_SHARE
    if least is not None:
        return f"{100 * least:.0f}%: {'met' if share >= least else 'missed'}"
    if row.most_ratio is not None and one_token is not None:
        ratio = own / one_token
        return f"{row.most_ratio} x T=1: {ratio:.3f}, {'met' if ratio <= row.most_ratio else 'missed'}"
    return ""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="decode.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", nargs="+", metavar="NAME", help="rows whose name begins so; default: all")
    add("--rounds", type=int, default=3, help="default: 3")
    add("--fla", choices=("yes", "no"), default="yes", help="whether FLA is timed too; default: yes")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    add("--clock", choices=("wall", "processor"), default="wall", help="on the CPU; default: wall")
    add("--json", metavar="FILE", help="where the figures go, besides the table")
    options = parser.parse_args(argv)
    rows = [row for row in ROWS if options.rows is None or any(row.name.startswith(n) for n in options.rows)]
    if not rows:
        parser.error(f"--rows names none of: {', '.join(row.name for row in ROWS)}")

    import torch

    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("PyTorch can use no GPU here (--device cpu times the CPU)")
    from peer_timing.timing import copy_rate

    import flash_kda

    rate = copy_rate("cuda") if on_gpu else None
    name, version = torch.cuda.get_device_name() if on_gpu else "CPU", flash_kda.__version__
    copies = f", copies at {rate / 1e12:.3g} TB/s" if rate else ""
    print(f"{name}{copies}, flash_kda {version}\n")
    print("| call | us | floor, us | of copy | bar | FLA, us |")
    print("| --- | --- | --- | --- | --- | --- |")
    results, one_token = [], {}
    with torch.inference_mode():
        for row in rows:
            if rate:
                t = time_on_gpu(row, options.rounds, rate, options.fla == "yes")
                torch.cuda.empty_cache()
            else:
                t = time_on_cpu(row, options.rounds, options.clock == "processor")
            if row.tokens == 1 and not (row.bf16 or row.k_first or row.layer):
                one_token[row.sequences, row.heads] = t.own_us
            verdict = judge(row, t.own_us, t.share, one_token.get((row.sequences, row.heads)), on_gpu)
            print(
                f"| {row.name} | {t.own_us:.2f} | {t.floor_us:.2f} | {100 * t.share:.1f}% | {verdict} "
                f"| {f'{t.fla_us:.2f}' if t.fla_us else ''} |",
                flush=True,
            )
            results.append(
                {"name": row.name, "us": t.own_us, "floor_us": t.floor_us, "share": t.share}
                | {"bar": verdict, "fla_us": t.fla_us}
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": name, "copy_rate": rate, "rows": results}, file)


if __name__ == "__main__":
    main(sys.argv[1:])
