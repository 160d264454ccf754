"""Times the backward pass of this package's kernels beside flash-linear-attention's, in one run on one GPU.

    python benchmarks/training.py
    python benchmarks/training.py --shapes 96:8192 8:65536 --kernel portable --kernel hopper --json bwd.json
    python benchmarks/training.py --shapes 96:8192 --launches --workspace-limit 4611686018427387904
    python benchmarks/training.py --kernel hopper --saved --no-fla

A shape is HEADS:LENGTHS, as in peers.py. Each row is the backward pass alone: all gradients (those of q, k,
v, g, beta, A_log, dt_bias and the initial state) from those of the output and the final state. Gates are as
in trained models, states in fp32, and nothing is saved by the forward pass but its inputs. A time is the
median of rounds of CUDA-graph replays over rotating inputs, in which all sides take turns. The floor is the
time in which the bytes of the inputs and gradients could be copied. "Bytes" is the workspace of the call for
each token and head, whose q, k, v and g take 1024. --launches names the launches of each kernel and their
times. --saved adds, for each kernel, the backward pass that reads what the forward pass has saved, and says
how long the forward pass takes with and without saving.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from typing import Any, Callable

from peer_timing.shapes import DIM, label, parse

# Milliseconds that the backward pass may take on an H200.
BARS = {
    "12:2048": 0.13,
    "8:4096": 0.17,
    "16:8192": 0.42,
    "32:8192": 0.75,
    "96:8192": 1.9,
    "32:2048x4": 0.75,
    "8:65536": 1.6,
}
FLA = "FLA"
# Ends of the names of sides, behind that of the kernel.
FORWARD, SAVED = " forward", ", saved"


def kernel_of(side: str) -> str | None:
    name = side.removesuffix(SAVED).removesuffix(FORWARD)
    return None if name == "flash_kda" else name


def bytes_once(shape: str) -> int:
    """q, k, v, g, dout, dq, dk, dv, dg and both beta in bf16; the states and their gradients in fp32."""
    heads, lengths = parse(shape)
    return heads * (sum(lengths) * (9 * DIM + 2) * 2 + len(lengths) * 3 * DIM * DIM * 4)


# ---- Calls -------------------------------------------------------------------------------------------------


def make_sets(shape: str, device: str) -> list[dict[str, Any]]:
    """Arguments of the forward pass with the gradients of its results, more than the L2 cache can hold."""
    import torch
    from peer_timing.inputs import make_sets as forward_sets

    sets = forward_sets(shape, "mixed", "fp32", device)
    for x in sets[4:]:
        x.clear()
    sets = sets[:4]  # a backward pass moves twice the bytes, so a quarter of them is more than the cache
    for x in sets:
        x["dout"] = torch.randn_like(x["v"])
        x["dfinal_state"] = torch.randn_like(x["initial_state"])
    return sets


def forward_calls(
    sets: list[dict[str, Any]], kernel: str | None, saves: bool
) -> tuple[list[Callable[[], tuple]], list[Any]]:
    """Forward passes, and where each of them saves states."""
    import torch

    import flash_kda

    saved = []
    for x in sets:
        _, T, H, _ = x["q"].shape
        N = x["initial_state"].shape[0]
        size = flash_kda.get_saved_size(T, H, N, device=x["q"].device, kernel=kernel) if saves else 0
        saved.append(torch.empty(size, dtype=torch.uint8, device=x["q"].device) if size else None)

    def call_of(x: dict[str, Any], to: Any) -> Callable[[], tuple]:
        given = {n: t for n, t in x.items() if n not in ("dout", "dfinal_state")}

        def call() -> tuple:
            out, state = torch.empty_like(x["v"]), torch.empty_like(x["initial_state"])
            flash_kda.fwd(**given, out=out, final_state=state, saved=to, kernel=kernel)
            return out, state

        return call

    return [call_of(x, to) for x, to in zip(sets, saved)], saved


def our_calls(
    sets: list[dict[str, Any]], kernel: str | None, limit: int, saves: bool = False
) -> list[Callable[[], tuple]]:
    import torch

    import flash_kda

    inputs = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
    saved: list[Any] = [None] * len(sets)
    if saves:
        forward, saved = forward_calls(sets, kernel, True)
        for call in forward:
            call()

    def call_of(x: dict[str, Any], states: Any) -> Callable[[], tuple]:
        def call() -> tuple:
            gradients = {f"d{name}": torch.empty_like(x[name]) for name in inputs}
            flash_kda.bwd(**x, **gradients, saved=states, kernel=kernel, workspace_limit=limit)
            return tuple(gradients.values())

        return call

    return [call_of(x, states) for x, states in zip(sets, saved)]


def fla_calls(sets: list[dict[str, Any]]) -> list[Callable[[], tuple]]:
    """autograd.grad of FLA's chunk_kda, with its own kernels."""
    import os

    import torch
    from fla.ops.kda import chunk_kda

    os.environ["FLA_FLASH_KDA"] = "0"  # or FLA hands the call to this package

    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")

    def call_of(x: dict[str, Any]) -> Callable[[], tuple]:
        leaves = {name: x[name].detach().clone().requires_grad_() for name in names}
        out, state = chunk_kda(
            **{**leaves, "dt_bias": leaves["dt_bias"].flatten()},
            scale=x["scale"],
            lower_bound=x["lower_bound"],
            safe_gate=True,
            cu_seqlens=x.get("cu_seqlens"),
            use_gate_in_kernel=True,
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            output_final_state=True,
            state_v_first=True,
        )
        given = (x["dout"], x["dfinal_state"])
        return lambda: torch.autograd.grad((out, state), list(leaves.values()), given, retain_graph=True)

    return [call_of(x) for x in sets]


def tune_for_the_largest(shapes: list[str], device: str) -> None:
    """FLA's kernels keep for all shapes what is fastest for the largest one."""
    from peer_timing.tuning import tune_once

    tune_once()
    fla_calls(make_sets(max(shapes, key=bytes_once), device)[:1])[0]()


def bytes_of_workspace(shape: str, side: str, limit: int, device: str) -> float:
    """For each token and head: what a call takes from PyTorch beyond what it is given and returns."""
    import torch

    sets = make_sets(shape, device)[:1]
    heads, lengths = parse(shape)
    call = our_calls(sets, kernel_of(side), limit, side.endswith(SAVED))[0]
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    returned = sum(x.numel() * x.element_size() for x in results)
    return (torch.cuda.max_memory_allocated() - before - returned) / (heads * sum(lengths))


# ---- Timing ------------------------------------------------------------------------------------------------


def launches_of(call: Callable[[], tuple], repeats: int = 5) -> list[tuple[str, float]]:
    """The names of the launches of a call and their milliseconds."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    times = [(event.key, event.device_time_total / 1e3 / repeats) for event in profile.key_averages()]
    return [(name, ms) for name, ms in times if ms > 0]


def time_row(
    shape: str, sides: list[str], rounds: int, limit: int, launches: bool, device: str
) -> dict[str, Any]:
    import torch
    from peer_timing.timing import Timed

    sets = make_sets(shape, device)
    timed, row = {}, {}
    for side in sides:
        try:
            if side == FLA:
                calls = fla_calls(sets)
            elif FORWARD in side:
                calls = forward_calls(sets, kernel_of(side), side.endswith(SAVED))[0]
            else:
                calls = our_calls(sets, kernel_of(side), limit, side.endswith(SAVED))
            timed[side] = Timed(calls, device)
        except Exception as error:  # whatever a side raises that cannot make the call
            print(f"{side}, {shape}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            continue
        if launches and side != FLA and device != "cpu":
            row[f"{side}_launches"] = launches_of(calls[0])
    clock = "plain_ms" if device == "cpu" else "graph_ms"
    turns = [{side: calls.round() for side, calls in timed.items()} for _ in range(rounds)]
    row["ms"] = {side: statistics.median(turn[side][clock] for turn in turns) for side in timed}
    row["rms"] = {side: calls.rms() for side, calls in timed.items()}
    timed.clear()
    if device != "cpu":
        torch.cuda.empty_cache()
        ours = [side for side in sides if side != FLA and FORWARD not in side and side in row["ms"]]
        row["bytes"] = {side: bytes_of_workspace(shape, side, limit, device) for side in ours}
        torch.cuda.empty_cache()
    return row


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="training.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs="+", default=list(BARS), metavar="SHAPE", help=f"default: {' '.join(BARS)}")
    add(
        "--kernel",
        action="append",
        default=[],
        help="of this package; given again, one more; default: its choice",
    )
    add("--rounds", type=int, default=5, help="default: 5")
    add(
        "--workspace-limit",
        type=int,
        default=0,
        metavar="BYTES",
        help="as flash_kda.bwd takes it; default: half of the bytes of q, k, v and g",
    )
    add("--no-fla", action="store_true", help="this package alone")
    add("--fla-tunes-once", action="store_true", help="FLA tunes its kernels for the largest shape alone")
    add("--saved", action="store_true", help="time the passes that save states and read them, too")
    add("--launches", action="store_true", help="name the launches of this package and their times")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: plain calls of this package only")
    add("--json", metavar="FILE", help="where the figures go, besides the table")
    options = parser.parse_args(argv)
    try:
        for shape in options.shapes:
            parse(shape)
    except ValueError as error:
        parser.error(f"argument --shapes: {error}")
    if options.workspace_limit < 0:
        parser.error(f"argument --workspace-limit: {options.workspace_limit} is less than 0")
    if options.rounds < 1:
        parser.error(f"argument --rounds: {options.rounds} is not a positive number")
    try:
        import torch
    except ImportError as error:
        parser.error(f"PyTorch cannot be imported: {error}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch can use no GPU here (--device cpu times plain calls on the CPU)")
    from peer_timing.timing import copy_rate

    sides = options.kernel or ["flash_kda"]
    if options.saved:
        sides = [side + end for side in sides for end in ("", SAVED, FORWARD, FORWARD + SAVED)]
    if not options.no_fla and options.device == "cuda" and importlib.util.find_spec("fla") is not None:
        sides.append(FLA)
        if options.fla_tunes_once:
            tune_for_the_largest(options.shapes, options.device)
    rate = copy_rate(options.device)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, copies {rate / 1e12:.2f} TB/s, backward pass alone, {options.rounds} rounds\n")
    print(f"| lengths | H | floor, ms | bar, ms | {', ms | '.join(sides)}, ms | over the floor | bytes |")
    print("|" + " --- |" * (6 + len(sides)))
    results = {}
    for shape in options.shapes:
        row = time_row(
            shape, sides, options.rounds, options.workspace_limit, options.launches, options.device
        )
        floor = 1e3 * bytes_once(shape) / rate
        times = row["ms"]
        cells = [*label(shape), f"{floor:.3f}", f"{BARS[shape]:.2f}" if shape in BARS else ""]
        cells += [f"{times[side]:.3f}" if side in times else "" for side in sides]
        cells.append(f"{times[sides[0]] / floor:.1f}" if sides[0] in times else "")
        cells.append(", ".join(f"{number:.0f}" for number in row.get("bytes", {}).values()))
        print("| " + " | ".join(cells) + " |", flush=True)
        for side in sides:
            for launch, ms in row.get(f"{side}_launches", []):
                print(f"    {side}: {ms:8.3f} ms  {launch}", flush=True)
        results[shape] = row | {"floor_ms": floor}
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": name, "copy_rate": rate, "rows": results}, file)


if __name__ == "__main__":
    main(sys.argv[1:])
