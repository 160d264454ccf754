"""Times flash_kda beside flash-linear-attention's Triton kernels, in one run on one GPU:

    python benchmarks/peers.py [--json FILE] [--picture FILE] [--rounds N] [--shapes SHAPE...]

A shape is HEADS:LENGTHS, LENGTHS as in `flash-kda bench`: 96:8192, 96:1300,547, 12:2048x4. Per shape: device time of one
call by CUDA-graph replay (the median over rounds in which the two take turns; a graph holds a call for each of
several sets of inputs that together exceed the L2 cache), and the ratio to the floor: the bytes that must
cross memory once over the speed of a large copy in the same run. States are fp32, in and out. Gates are as
in trained models: slow channels beside fast ones in every head.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys

import torch

import flash_kda

SHAPES = [
    "96:8192",
    "96:1300,547,2048,963,271,3063",
    "96:1024x8",
    "64:8192",
    "64:1024x8",
    "24:8192",
    "16:8192",
    "16:2048x8",
    "12:2048",
    "8:4096",
    "8:65536",
    "12:128x64",
    "12:16x256",
    "32:512x32",
]
DIM = 128
L2_BYTES = 50 << 20


def parse(shape: str) -> tuple[int, list[int]]:
    heads, _, lengths = shape.partition(":")
    parts = [part.partition("x") for part in lengths.split(",")]
    return int(heads), [int(tokens) for tokens, _, times in parts for _ in range(int(times or 1))]


def make_inputs(heads: int, lengths: list[int], seed: int) -> dict:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    tokens, count = sum(lengths), len(lengths)
    x = {name: normal(1, tokens, heads, DIM).bfloat16() for name in ("q", "k", "v", "g")}
    x |= {"beta": normal(1, tokens, heads).bfloat16(), "scale": DIM**-0.5, "lower_bound": -5.0}
    x |= {"A_log": torch.zeros(heads, device="cuda")}
    x |= {"dt_bias": torch.linspace(-10, 2, DIM, device="cuda").expand(heads, DIM).contiguous()}
    x |= {"initial_state": 0.1 * normal(count, heads, DIM, DIM)}
    if count > 1:
        x["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda")
    return x


def ours(x: dict):
    out, state = torch.empty_like(x["v"]), torch.empty_like(x["initial_state"])
    return lambda: flash_kda.fwd(**x, out=out, final_state=state)


def triton(x: dict):
    from fla.ops.kda import chunk_kda

    arguments = {name: value for name, value in x.items() if name != "dt_bias"}
    flags = (
        "use_gate_in_kernel",
        "use_qk_l2norm_in_kernel",
        "use_beta_sigmoid_in_kernel",
        "safe_gate",
        "state_v_first",
    )
    options = dict.fromkeys(flags, True) | {"output_final_state": True, "dt_bias": x["dt_bias"].reshape(-1)}
    if "cu_seqlens" in x:
        options["cu_seqlens_cpu"] = x["cu_seqlens"].cpu()

    def call():
        os.environ["FLA_FLASH_KDA"] = "0"  # its own kernels, not ours through its dispatcher
        chunk_kda(**arguments, **options)

    return call


def capture(calls: list) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_rate() -> float:
    """Bytes a second of a large device-to-device copy, reads and writes counted."""
    a = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.zeros_like(a)
    times = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * a.numel() / (1e-3 * statistics.median(times[10:]))  # the first ten warm up


def bytes_once(x: dict) -> int:
    """What must cross memory once: q, k, v, g, beta, out and both states."""
    sizes = {name: t.numel() * t.element_size() for name, t in x.items() if isinstance(t, torch.Tensor)}
    once = sum(sizes[name] for name in ("q", "k", "v", "g", "beta", "initial_state"))
    return once + sizes["v"] + sizes["initial_state"]


def time_shape(shape: str, peers: dict, rounds: int, rate: float) -> dict:
    heads, lengths = parse(shape)
    first = make_inputs(heads, lengths, 0)
    size = bytes_once(first)
    count = min(32, 1 + 2 * L2_BYTES // size)
    sets = [first] + [make_inputs(heads, lengths, seed) for seed in range(1, count)]
    row = {"shape": shape, "floor_ms": 1e3 * size / rate}
    graphs = {}
    with torch.inference_mode():
        for name, peer in peers.items():
            graphs[name] = capture([peer(x) for x in sets])
        times: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(rounds + 2):
            for name, graph in graphs.items():
                times[name].append(replay(graph) / count)
    for name, values in times.items():
        values = sorted(values[2:])  # the first two warm up
        row[name] = {"ms": statistics.median(values), "spread": values[-1] / values[0] - 1}
    return row


def table(rows: list[dict], names: list[str]) -> str:
    head = ["H", "lengths", "floor ms", *itertools.chain(*((f"{n} ms", "x floor") for n in names))]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        heads, _, lengths = row["shape"].partition(":")
        cells = [heads, lengths, f"{row['floor_ms']:.3f}"]
        for n in names:
            cells += [f"{row[n]['ms']:.3f}", f"{row[n]['ms'] / row['floor_ms']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], names: list[str], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(rows) + 1.4))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        ratios = [row[name]["ms"] / row["floor_ms"] for row in rows]
        bars = axes.barh([y + i * height for y in range(len(rows))], ratios, height, label=name)
        axes.bar_label(bars, [f"{row[name]['ms']:.3f} ms" for row in rows], padding=3, fontsize=7)
    axes.set_yticks(
        [y + 0.4 - height / 2 for y in range(len(rows))],
        [row["shape"].replace(":", " heads, ") for row in rows],
        fontsize=8,
    )
    axes.set(
        xscale="log", xlabel="time over the memory floor (1 = every byte crosses memory once at copy speed)"
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="SHAPE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--picture", metavar="FILE")
    options = parser.parse_args()

    peers = {"flash_kda": ours, "FLA": triton}
    try:
        import fla.ops.kda  # noqa: F401
    except ImportError:
        print("flash-linear-attention is not installed: flash_kda alone", file=sys.stderr)
        del peers["FLA"]
    rate = copy_rate()
    rows = []
    for i, shape in enumerate(options.shapes):
        print(f"\r{i + 1} of {len(options.shapes)}: {shape:40}", end="", file=sys.stderr, flush=True)
        rows.append(time_shape(shape, peers, options.rounds, rate))
    print(file=sys.stderr)
    gpu = torch.cuda.get_device_name()
    spread = max(row[name]["spread"] for row in rows for name in peers)
    print(
        f"{gpu}, copy {rate / 1e12:.2f} TB/s, flash_kda {flash_kda.__version__}, PyTorch {torch.__version__}; "
        f"largest spread over {options.rounds} rounds {100 * spread:.0f}%\n"
    )
    print(table(rows, list(peers)))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"gpu": gpu, "copy_bytes_per_second": rate, "rows": rows}, file, indent=1)
    if options.picture:
        draw(rows, list(peers), options.picture)


if __name__ == "__main__":
    main()
