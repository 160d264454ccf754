"""Times what an engine computes KDA with by itself beside the same call of the engine on this package.

    python benchmarks/engines.py
    python benchmarks/engines.py --prefill 1024 --decode 32 --heads 32 --rounds 5 --json engines.json

Each row is one call of an engine's function: a prompt of so many tokens, or one token of each of so many
sequences. Both sides get the same arguments through the engine's own function, and take turns. A time is the
median of rounds of CUDA-graph replays, and "plain" that of calls in a row, with the host's work. States are
in fp32. On the CPU only plain calls are timed, and only those that the engine can make there.

The engine is flash-linear-attention (FLA): chunk_kda for prompts and fused_recurrent_kda for decode, as FLA's
layer calls them. FLA_FLASH_KDA says in each call whose kernels compute it, and flash_kda.fla.record() whether
that was so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from typing import Any, Callable, NamedTuple

from peer_timing.shapes import DIM

L2_BYTES = 50 << 20  # inputs rotate through more than the cache of the GPU holds
SIDES = ("flash_kda", "engine")


class Row(NamedTuple):
    kind: str  # "prefill" or "decode"
    size: int  # tokens of the one prompt, or sequences
    heads: int
    gate: str


# ---- Calls -------------------------------------------------------------------------------------------------


def inputs(row: Row, device: str, seed: int) -> dict[str, Any]:
    """The arguments of FLA's functions, as FLA's layer passes them."""
    import torch

    N, T = (1, row.size) if row.kind == "prefill" else (row.size, 1)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    x = {name: normal(N, T, row.heads, DIM) for name in ("q", "k", "v", "g")}
    x["beta"] = normal(N, T, row.heads)
    x["A_log"] = torch.zeros(row.heads, device=device)
    x["dt_bias"] = torch.full((row.heads * DIM,), -3.0, device=device)
    x["initial_state"] = torch.zeros(N, row.heads, DIM, DIM, device=device)
    flags = ("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel")
    x |= {**dict.fromkeys(flags, True), "output_final_state": True}
    x["lower_bound"] = -5.0 if row.gate == "bounded" else None
    if row.kind == "prefill" and row.gate == "bounded":
        x["safe_gate"] = True
    return x


def sets_of(row: Row, device: str) -> int:
    state = 2 * DIM * DIM * 4 * row.heads * (row.size if row.kind == "decode" else 1)
    tokens = 5 * row.size * row.heads * DIM * 2
    return 1 if device == "cpu" else max(1, min(32, -(-2 * L2_BYTES // (state + tokens))))


class Declined(Exception):
    """The call was not computed by the side that was to compute it."""


def fla_calls(row: Row, side: str, device: str) -> list[Callable[[], Any]]:
    """Calls of FLA over rotating inputs. Checks who computes them."""
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    import flash_kda.fla

    function: Any = chunk_kda if row.kind == "prefill" else fused_recurrent_kda
    v_first = "state_v_first" if "state_v_first" in names_of(function) else "transpose_state_layout"
    is_on = "1" if side == "flash_kda" else "0"

    def call_of(x: dict[str, Any]) -> Callable[[], Any]:
        def call() -> Any:
            os.environ["FLA_FLASH_KDA"] = is_on
            return function(**x)

        return call

    calls = [call_of({**inputs(row, device, i), v_first: True}) for i in range(sets_of(row, device))]
    with flash_kda.fla.record() as seen:
        calls[0]()
    if side == "flash_kda" and [call.reason for call in seen] != [""]:
        raise Declined(f"this package did not take the call: {seen}")
    if side == "engine" and seen:
        raise Declined(f"FLA offered the call to this package: {seen}")
    return calls


def names_of(function: Any) -> set[str]:
    import inspect

    return set(inspect.signature(inspect.unwrap(function)).parameters)


# ---- Timing ------------------------------------------------------------------------------------------------


def time_row(row: Row, rounds: int, device: str) -> dict[str, float | None]:
    """Milliseconds by side and kind of clock. None where the side cannot make the call."""
    from peer_timing.timing import Timed

    timed = {}
    for side in SIDES:
        try:
            timed[side] = Timed(fla_calls(row, side, device), device)
        except Declined:
            raise
        except Exception as error:  # whatever the engine raises, which on the CPU has no kernels
            if side == "flash_kda":
                raise
            print(f"FLA: {row.kind} {row.size}, H = {row.heads}: {error}", file=sys.stderr)
    turns = [{side: calls.round() for side, calls in timed.items()} for _ in range(rounds)]
    times: dict[str, float | None] = {}
    for side in SIDES:
        for clock in ("graph_ms", "plain_ms"):
            found = [turn[side][clock] for turn in turns if clock in turn.get(side, {})]
            times[f"{side}_{clock}"] = statistics.median(found) if found else None
    return times


def tune_for_the_largest(rows: list[Row]) -> None:
    """FLA's kernels keep for all rows what is fastest for the largest row of each kind."""
    from peer_timing.tuning import tune_once

    tune_once()
    for kind in dict.fromkeys(row.kind for row in rows):
        fla_calls(max((r for r in rows if r.kind == kind), key=lambda r: r.size * r.heads), "engine", "cuda")


def ratio(times: dict[str, float | None], clock: str) -> float | None:
    theirs, ours = times[f"engine_{clock}"], times[f"flash_kda_{clock}"]
    return theirs / ours if theirs is not None and ours is not None else None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="engines.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--prefill", type=int, nargs="*", default=[64, 1024, 8192], metavar="TOKENS", help="of the prompt")
    add("--decode", type=int, nargs="*", default=[1, 32, 256], metavar="N", help="sequences")
    add("--heads", type=int, nargs="+", default=[12, 32, 64, 96], metavar="H")
    add("--gate", choices=("bounded", "softplus"), default="bounded", help="default: bounded")
    add("--rounds", type=int, default=3, help="rounds in which both sides take turns; default: 3")
    add("--fla-tunes-once", action="store_true", help="FLA tunes its kernels for the largest rows alone")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    add("--json", metavar="FILE", help="where the figures go, besides the table")
    options = parser.parse_args(argv)
    sizes = {"prefill": options.prefill, "decode": options.decode}
    rows = [Row(kind, n, H, options.gate) for kind in sizes for n in sizes[kind] for H in options.heads]
    if not rows or min(min(row.size, row.heads) for row in rows) < 1:
        parser.error("--prefill, --decode and --heads must name at least one row, with numbers from 1")

    try:
        import torch

        if options.device == "cpu":
            # Releases of FLA before 0.5.1 enter the device of their tensors, which PyTorch's CPU has not.
            import contextlib

            torch.cpu.device = lambda index: contextlib.nullcontext()  # type: ignore[attr-defined]
        import fla

        import flash_kda.fla
    except ImportError as error:
        parser.error(f"flash-linear-attention cannot be imported: {error}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch can use no GPU here (--device cpu times plain calls on the CPU)")
    if options.device == "cpu" and options.fla_tunes_once:
        parser.error("--fla-tunes-once is for GPUs, and --device is cpu")
    flash_kda.fla.install()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, FLA {fla.__version__}, {options.gate} gate, {options.rounds} rounds\n")
    print(
        "| call | size | H | FLA, ms | flash_kda, ms | ratio | FLA plain, ms | flash_kda plain, ms | ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    results = []
    with torch.inference_mode():
        if options.fla_tunes_once:
            tune_for_the_largest(rows)
        for row in rows:
            times = time_row(row, options.rounds, options.device)
            cells = []
            for clock in ("graph_ms", "plain_ms"):
                pair = [times[f"{side}_{clock}"] for side in ("engine", "flash_kda")]
                cells += ["" if t is None else f"{t:.4f}" for t in pair]
                cells.append("" if ratio(times, clock) is None else f"{ratio(times, clock):.2f}")
            print(f"| {row.kind} | {row.size} | {row.heads} | " + " | ".join(cells) + " |", flush=True)
            results.append({**row._asdict(), **times})
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": name, "fla": fla.__version__, "rows": results}, file)


if __name__ == "__main__":
    main(sys.argv[1:])
