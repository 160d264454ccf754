"""What is made of the figures: a table, JSON, Markdown. Standard library alone.

A result is {"runs": [environment of each run], "rows": [a shape's figures in every round]}.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from typing import Any

from .shapes import KNOWN, SERVING, Known, label

Row = dict[str, Any]
Result = dict[str, Any]
UNKNOWN = Known(None, None)
SAME_WORK = 0.02  # relative difference in the RMS of what competitors wrote, beyond any rounding


def merge(results: list[Result]) -> Result:
    """One result of several. Where two have the same figure, the later one's counts."""
    devices = sorted({run["device"] for result in results for run in result["runs"]})
    if len(devices) > 1:
        raise ValueError(f"the figures are of different devices: {', '.join(devices)}")
    rows: dict[tuple, Row] = {}
    for new in (row for result in results for row in result["rows"]):
        row = rows.setdefault(
            (new["shape"], new["gates"], new["states"]), dict(new, times={}, rms={}, left_out={})
        )
        row["times"] = row["times"] | new["times"]
        row["rms"] = row["rms"] | new["rms"]
        left_out = row["left_out"] | new["left_out"]
        row["left_out"] = {name: why for name, why in left_out.items() if name not in row["times"]}
    return {"runs": [run for result in results for run in result["runs"]], "rows": list(rows.values())}


def load(paths: list[str]) -> Result:
    results = []
    for path in paths:
        try:
            with open(path) as file:
                results.append(json.load(file))
            if not results[-1]["runs"] or not isinstance(results[-1]["rows"], list):
                raise KeyError
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path} is not a result of this benchmark") from None
    return merge(results)


def write(result: Result, path: str) -> None:
    """A row of the table is a line of the file."""
    parts = (f'"{key}": [\n' + ",\n".join(map(json.dumps, result[key])) + "\n]" for key in ("runs", "rows"))
    with open(path, "w") as file:
        file.write("{" + ",\n".join(parts) + "}\n")


def competitors(result: Result) -> list[str]:
    return list(dict.fromkeys(name for run in result["runs"] for name in run["competitors"]))


def rounds(row: Row, name: str, kind: str | None = None) -> list[float]:
    """Milliseconds in every round: device time where it was measured, else of plain calls."""
    times = row["times"].get(name, {})
    found: list[float] = times.get(kind or "graph_ms", []) or ([] if kind else times.get("plain_ms", []))
    return found


def median(row: Row, name: str, kind: str | None = None) -> float | None:
    values = rounds(row, name, kind)
    return statistics.median(values) if values else None


def spread(row: Row, name: str) -> float:
    values = rounds(row, name)
    return (max(values) - min(values)) / statistics.median(values)


def known(row: Row) -> Known:
    """Only states in fp32 have figures to compare with, and only device time."""
    on_gpu = any("graph_ms" in times for times in row["times"].values())
    return KNOWN.get(row["shape"], UNKNOWN) if on_gpu and row["states"] == "fp32" else UNKNOWN


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value >= 9.995 else f"{value:.3f}" if value >= 0.0995 else f"{value:.4f}"


def table(result: Result) -> str:
    rows, names = result["rows"], competitors(result)
    if not rows or not names:
        return ""
    ours, *others = names
    varied = [key for key in ("gates", "states") if len({row[key] for row in rows}) > 1]
    head = ["lengths", "H", *varied, "floor ms", f"{ours} ms", "x floor", "spread"]
    bars = any(known(row).bar for row in rows)
    flashkda = any(known(row).flashkda for row in rows)
    plain = any("graph_ms" in times for row in rows for times in row["times"].values())
    head += ["at most ms"] * bars + [f"{name} ms" for name in others] + ["FlashKDA ms*"] * flashkda
    head += [f"{name} plain ms" for name in names] * plain
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        time = median(row, ours)
        cells = [*label(row["shape"]), *(row[key] for key in varied), number(row["floor_ms"]), number(time)]
        cells += [f"{time / row['floor_ms']:.2f}", f"{100 * spread(row, ours):.1f}%"] if time else ["", ""]
        cells += [number(known(row).bar)] * bars + [number(median(row, name)) for name in others]
        cells += [number(known(row).flashkda)] * flashkda
        cells += [number(median(row, name, "plain_ms")) for name in names] * plain
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def remarks(result: Result) -> list[str]:
    """What the table cannot say, one sentence each."""
    rows, names = result["rows"], competitors(result)
    said = []
    if any(known(row).flashkda for row in rows):
        said.append(
            "*FlashKDA and the column `at most`: H100 SXM, fp32 states. FlashKDA is MoonshotAI's of July 2026, "
            "measured earlier and not in this run."
        )
    said += _bars(rows, names) + _serving(rows, names)
    spreads = [spread(row, name) for row in rows for name in names if rounds(row, name)]
    if spreads:
        said.append(
            f"Largest spread, (slowest - fastest round) / median, of all competitors: {100 * max(spreads):.1f}%."
        )
    return said + _left_out(rows) + _disagreements(rows, names)


def _left_out(rows: list[Row]) -> list[str]:
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["left_out"].items():
            where.setdefault((name, reason), []).append(", H ".join(label(row["shape"])))
    return [f"{name} is left out of {'; '.join(those)}: {reason}." for (name, reason), those in where.items()]


def _disagreements(rows: list[Row], names: list[str]) -> list[str]:
    return [
        f"{name} and {names[0]} do not agree on {', H '.join(label(row['shape']))}: the RMS of out and state are "
        f"{row['rms'][name]} and {row['rms'][names[0]]}."
        for row in rows
        for name in names[1:]
        if _differ(row["rms"].get(names[0]), row["rms"].get(name))
    ]


def _differ(one: list[float] | None, other: list[float] | None) -> bool:
    if one is None or other is None:
        return False
    return not all(abs(a - b) <= SAME_WORK * abs(a) for a, b in zip(one, other))  # NaN differs


def _bars(rows: list[Row], names: list[str]) -> list[str]:
    timed = [(row, median(row, names[0]), known(row).bar) for row in rows]
    judged = [(row, time, bar) for row, time, bar in timed if time and bar]
    if not judged:
        return []
    over = [
        f"{', H '.join(label(row['shape']))} ({time / bar:.2f} of it)"
        for row, time, bar in judged
        if time > bar
    ]
    within = f"{names[0]} is within `at most` in {len(judged) - len(over)} of {len(judged)} rows"
    return [f"{within}, over it in: {'; '.join(over)}." if over else f"{within}."]


def _serving(rows: list[Row], names: list[str]) -> list[str]:
    said = []
    for gates, states in dict.fromkeys((row["gates"], row["states"]) for row in rows):
        chosen = [r for r in rows if (r["gates"], r["states"]) == (gates, states) and r["shape"] in SERVING]
        means = {}
        for name in names:
            times = [time for time in (median(row, name) for row in chosen) if time]
            if len(times) == len(SERVING):
                means[name] = math.exp(statistics.fmean(map(math.log, times)))
        if means:
            figures = ", ".join(f"{name} {number(mean)} ms" for name, mean in means.items())
            first, last = (", H ".join(label(SERVING[i])) for i in (0, -1))
            said.append(
                f"Geometric mean over the {len(SERVING)} shapes from `{first}` to `{last}`, "
                f"{gates} gates, {states} states: {figures}."
            )
    return said


def environment(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["competitors"].items())
    parts = [run["device"]]
    parts += [f"driver {run['driver']}"] if run["driver"] else []
    parts += [f"CUDA {run['cuda']}"] if run["cuda"] else []
    parts += [f"PyTorch {run['torch']}", f"Python {run['python']}", versions]
    parts += [f"commit {run['commit'] or 'unknown'}", run["date"]]
    parts += [f"copy {run['copy_bytes_per_second'] / 1e12:.3f} TB/s"]
    return ", ".join(parts) + f"; {run['gates']} gates, {run['states']} states, {run['rounds']} rounds"


HOW = """\
`ms` is device time of one call: the median over rounds in which the competitors take turns. In a round each replays
a CUDA graph that holds a call for each of several sets of inputs, together more than twice the L2 cache, after
10 ms of the same as warm-up. `plain ms` is a call from Python without a graph, many in a row, by the host's clock;
on a CPU, which has no graphs, `ms` is that. `floor ms` is the bytes of q, k, v, g, beta, out and both states over
the speed of a large copy in the same run; `x floor` the ratio to it; `spread` the slowest minus the fastest round,
over the median. Every competitor runs in a process of its own, on the same inputs. Gates: `mixed`, as in trained
models, spans in every head channels that forget next to nothing in thousands of tokens and channels that forget
within one; `slow` has only channels that remember, `fast` only channels that forget. With `--fla-tunes-once`
in the command, FLA's kernels were tuned with the first shape that it ran, and used as they then were for the others.
Where there are several sequences, FLA is given their lengths on the host, and flash_kda the longest one.
A GPU at the limit of its power lowers its clock, and slower competitors let it cool between: what draws most can take
some 6% longer by itself, for a second or more, than it does here."""


def markdown(result: Result, picture: str | None, folder: str) -> str:
    """A page that lies in `folder`."""
    runs = result["runs"]
    parts = [f"# {competitors(result)[0]} on {runs[0]['device']}", table(result)]
    parts.append("\n".join(f"- {sentence.replace('*', chr(92) + '*', 1)}" for sentence in remarks(result)))
    if picture:
        parts.append(f"![Time over the memory floor, by shape]({os.path.relpath(picture, folder or '.')})")
    parts += ["## What the columns say", HOW, "## The runs", "Each command, and what it ran on:"]
    parts += [f"    {run['command']}\n\n{environment(run)}" for run in runs]
    return "\n\n".join(part for part in parts if part) + "\n"


def text(result: Result) -> str:
    """For a terminal."""
    parts = [environment(run) for run in result["runs"]] + [table(result)] + remarks(result)
    return "\n\n".join(part for part in parts if part)
