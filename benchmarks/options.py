"""Times what each option of the forward pass costs, beside the same call without it, in one process.

    python benchmarks/options.py
    python benchmarks/options.py --rows pool slices --rounds 5 --json options.json

Each row is a shape with an option and the call that it is measured against, which take turns. A time is the
median of rounds of CUDA-graph replays over rotating inputs, states in fp32, gates as in trained models. On
the CPU it is that of a plain call. The column "beyond" takes off the time in which the bytes that only the
option moves could be copied. Where flash-linear-attention is installed and takes the option, its time of the
same call stands in the last column.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any, Callable, NamedTuple

from peer_timing.inputs import make_sets
from peer_timing.shapes import DIM, bytes_once, label, parse

Arguments = dict[str, Any]
STATE = DIM * DIM  # elements of a state of one head


class Row(NamedTuple):
    """One line of the table. option and base change the arguments that fwd gets, in place."""

    name: str
    shape: str
    option: Callable[[Arguments, str], None]
    bar: float  # the ratio that may not be exceeded
    base: Callable[[Arguments, str], None] = lambda x, shape: None
    more_bytes: Callable[[str], int] = lambda shape: 0  # that only the option moves


# ---- What is timed -----------------------------------------------------------------------------------------


def slices(x: Arguments, shape: str) -> None:
    """q, k and v as slices of a fused projection [1, T, 3 H D], beta as the columns of another."""
    import torch

    tokens, heads = x["q"].shape[1], x["q"].shape[2]
    fused = torch.cat([x[name].flatten(2) for name in "qkv"], dim=2)
    for name, part in zip("qkv", fused.split(heads * DIM, dim=2)):
        x[name] = part.unflatten(2, (heads, DIM))
    wide = torch.zeros(1, tokens, heads + 8, dtype=x["beta"].dtype, device=x["beta"].device)
    wide[..., :heads] = x["beta"]
    x["beta"] = wide[..., :heads]


def pool(x: Arguments, shape: str) -> None:
    """Both states in one pool, sequence n in the slot of a random permutation."""
    import torch

    dense = x["initial_state"]
    order = torch.randperm(2 * len(dense), device=dense.device)[: len(dense)]
    x["initial_state"] = torch.zeros(2 * len(dense), *dense.shape[1:], dtype=dense.dtype, device=dense.device)
    x["initial_state"][order] = dense
    x["final_state"] = x["initial_state"]
    x["state_indices"] = order.to(torch.int32)


def two_checkpoints(x: Arguments, shape: str) -> None:
    import torch

    _, lengths = parse(shape)
    offsets = [[length // 3 // 64 * 64 + 16, length // 64 * 64 - 64] for length in lengths]
    x["checkpoint_offsets"] = torch.tensor(offsets, dtype=torch.int32, device=x["q"].device)
    x["checkpoint_states"] = torch.empty(
        2 * len(lengths), x["v"].shape[2], DIM, DIM, dtype=torch.float32, device=x["q"].device
    )


def bytes_of_two(shape: str) -> int:
    heads, lengths = parse(shape)
    return 2 * len(lengths) * heads * STATE * 4


def every_64(x: Arguments, shape: str) -> None:
    import torch

    _, lengths = parse(shape)
    rows = sum(length // 64 for length in lengths)
    x["checkpoint_every"] = 64
    x["checkpoint_states"] = torch.empty(
        rows, x["v"].shape[2], DIM, DIM, dtype=torch.bfloat16, device=x["q"].device
    )


def bytes_of_every_64(shape: str) -> int:
    heads, lengths = parse(shape)
    return sum(length // 64 for length in lengths) * heads * STATE * 2


def grouped(x: Arguments, shape: str) -> None:
    """A quarter as many heads of q and k."""
    for name in "qk":
        x[name] = x[name][:, :, : x[name].shape[2] // 4].contiguous()


def softplus(x: Arguments, shape: str) -> None:
    """The unbounded gate, with biases that give it the same span."""
    x["lower_bound"] = None


def activated(x: Arguments, shape: str) -> None:
    """The log decay itself in fp32, computed before the call."""
    import torch

    gate = torch.sigmoid(x["A_log"].exp()[:, None] * (x["g"].float() + x["dt_bias"]))
    x["g"] = x["lower_bound"] * gate
    x |= {"A_log": None, "dt_bias": None, "lower_bound": None, "use_gate_in_kernel": False}


def negative_eigenvalues(x: Arguments, shape: str) -> None:
    x["allow_neg_eigval"] = True


def normalised(x: Arguments, shape: str) -> None:
    import torch

    for name in "qk":
        x[name] = torch.nn.functional.normalize(x[name].float(), dim=-1).bfloat16()
    x["use_qk_l2norm_in_kernel"] = False


def k_first(x: Arguments, shape: str) -> None:
    x["initial_state"] = x["initial_state"].transpose(2, 3).contiguous()
    x["state_v_first"] = False


ROWS = [
    *(Row("slices", shape, slices, 1.02) for shape in ("96:8192", "16:8192", "96:1024x8", "12:2048")),
    Row("pool", "16:256x64", pool, 1.02),
    Row("two checkpoints", "96:1024x8", two_checkpoints, 1.03, more_bytes=bytes_of_two),
    Row("two checkpoints", "16:8192", two_checkpoints, 1.06, more_bytes=bytes_of_two),
    Row("checkpoint_every=64, bf16", "96:8192", every_64, 1.6, more_bytes=bytes_of_every_64),
    *(Row("HV = 4 H", shape, grouped, 1.0) for shape in ("96:8192", "96:1024x8")),
    *(Row("softplus", shape, softplus, 1.08) for shape in ("96:8192", "16:8192", "96:1024x8", "12:2048")),
    *(Row("activated, fp32", shape, activated, 1.15) for shape in ("96:8192", "16:8192", "96:1024x8")),
    Row("allow_neg_eigval", "96:8192", negative_eigenvalues, 1.08),
    Row("normalised q, k", "96:8192", normalised, 1.08),
    Row("K-first states", "96:1024x8", k_first, 1.03),
]

# ---- Timing ------------------------------------------------------------------------------------------------


def prepare(
    fwd: Callable[..., Any], shape: str, change: Callable[[Arguments, str], None], device: str
) -> Any:
    """Calls over inputs that change() has changed, captured into a graph on a GPU."""
    import torch
    from peer_timing.timing import Timed

    _, lengths = parse(shape)
    calls = []
    for x in make_sets(shape, "mixed", "fp32", device):
        x["out"] = torch.empty_like(x["v"])
        change(x, shape)
        x.setdefault("final_state", torch.empty_like(x["initial_state"]))
        if len(lengths) > 1:
            x["max_seqlen"] = max(lengths)

        def call(x: Arguments = x) -> tuple[Any, Any]:
            fwd(**x)
            return x["out"], x["final_state"]

        calls.append(call)
    return Timed(calls, device)


def fla_call() -> Callable[..., Any] | None:
    """fwd in terms of FLA's own kernels, or None where FLA is not installed."""
    import os

    os.environ["FLA_FLASH_KDA"] = "0"
    os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"
    try:
        from peer_timing.tuning import tune_once

        tune_once()
        from fla.ops.kda import chunk_kda
    except ImportError:
        return None
    flags = ("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel")

    def fwd(**x: Any) -> None:
        if "state_indices" in x or "checkpoint_states" in x:
            raise NotImplementedError("FLA has no such option")
        if not x.get("use_gate_in_kernel", True):
            x.pop("A_log"), x.pop("dt_bias"), x.pop("lower_bound")
        elif x["lower_bound"] is not None:
            x["safe_gate"] = True
        if x.get("dt_bias") is not None:
            x["dt_bias"] = x["dt_bias"].reshape(-1)
        for name in flags:
            x.setdefault(name, True)
        x.setdefault("state_v_first", True)
        for name in ("out", "final_state", "max_seqlen"):
            x.pop(name, None)
        chunk_kda(**x, output_final_state=True)

    return fwd


def medians(timed: dict[str, Any], rounds: int, device: str) -> dict[str, float]:
    kind = "plain_ms" if device == "cpu" else "graph_ms"
    turns = [{name: calls.round()[kind] for name, calls in timed.items()} for _ in range(rounds)]
    return {name: statistics.median(turn[name] for turn in turns) for name in timed}


def time_row(
    row: Row, shape: str, rounds: int, device: str, fla: Callable[..., Any] | None
) -> dict[str, Any]:
    import flash_kda

    changes = {"base": row.base, "option": row.option}
    times: dict[str, Any] = medians(
        {name: prepare(flash_kda.fwd, shape, change, device) for name, change in changes.items()},
        rounds,
        device,
    )
    times["fla"] = None
    if fla is not None:
        try:
            times |= medians({"fla": prepare(fla, shape, row.option, device)}, rounds, device)
        except Exception as error:  # whatever another library raises
            print(f"FLA: {row.name}, {shape}: {error}", file=sys.stderr)
    return times


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="options.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", nargs="+", metavar="NAME", help="rows whose name begins so; default: all")
    add("--rounds", type=int, default=3, help="rounds in which both calls take turns; default: 3")
    add("--fla", choices=("yes", "no"), default="yes", help="whether FLA is timed too; default: yes")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    add("--shape", metavar="SHAPE", help="HEADS:LENGTHS for every row, in place of the rows' own")
    add("--json", metavar="FILE", help="where the figures go, besides the table")
    options = parser.parse_args(argv)
    chosen = options.rows or [""]
    rows = [row for row in ROWS if row.name.startswith(tuple(chosen))]
    if not rows:
        parser.error(f"--rows names none of: {', '.join(dict.fromkeys(row.name for row in ROWS))}")

    import torch
    from peer_timing.timing import copy_rate

    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("PyTorch can use no GPU here (--device cpu times plain calls on the CPU)")
    rate = copy_rate(options.device)
    fla = fla_call() if options.fla == "yes" and on_gpu else None
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{name}, copies at {rate / 1e12:.3g} TB/s, {options.rounds} rounds\n")
    print(
        "| option | lengths | H | without, ms | with, ms | ratio | beyond | at most | floor, ms | FLA, ms |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    results = []
    with torch.inference_mode():
        for row in rows:
            shape = options.shape or row.shape
            t = time_row(row, shape, options.rounds, options.device, fla)
            more = 1e3 * row.more_bytes(shape) / rate
            floor = 1e3 * bytes_once(shape, "fp32") / rate + more
            ratio, beyond = t["option"] / t["base"], (t["option"] - more) / t["base"]
            lengths, heads = label(shape)
            theirs = f"{t['fla']:.4f}" if t["fla"] else ""
            print(
                f"| {row.name} | {lengths} | {heads} | {t['base']:.4f} | {t['option']:.4f} | {ratio:.3f} "
                f"| {beyond:.3f} | {row.bar} | {floor:.4f} | {theirs} |",
                flush=True,
            )
            results.append(
                {"name": row.name, "shape": shape, "bar": row.bar, "ratio": ratio, "beyond": beyond, **t}
            )
            if on_gpu:
                torch.cuda.empty_cache()
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": name, "copy_rate": rate, "rows": results}, file)


if __name__ == "__main__":
    main(sys.argv[1:])
