"""Turns results into tables, JSON and Markdown, with the standard library alone.

A result is {"runs": [environment of each run], "rows": [a shape's figures in every round]}.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import textwrap
from typing import Any

from .shapes import KNOWN, SERVING, Known, label

Row = dict[str, Any]
Result = dict[str, Any]
UNKNOWN = Known(None, None)
# The most by which competitors may differ in the RMS of what they wrote, relative to it.
SAME_WORK = 0.02
KNOWN_ON = "H100"  # the GPU on which the figures in KNOWN hold
COLUMNS = 110


def merge(results: list[Result]) -> Result:
    """One result of several. If two results have the same figure, the later result's counts."""
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


def short_name(device: str) -> str:
    """H200 of "NVIDIA H200", H100 of "NVIDIA H100 80GB HBM3": the first word that has a digit."""
    words = [word for word in re.findall(r"[\w.+-]+", device) if re.search(r"\d", word)]
    return words[0] if words else device.replace(" ", "_")


def title(row: Row) -> str:
    """A row as sentences name it: "1024 x 8, H 96"."""
    return ", H ".join(label(row["shape"]))


def varied(rows: list[Row]) -> list[str]:
    return [key for key in ("gates", "states") if len({row[key] for row in rows}) > 1]


def _markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def table(result: Result) -> str:
    """Device times in milliseconds (on a CPU: times of plain calls)."""
    rows, names = result["rows"], competitors(result)
    if not rows or not names:
        return ""
    ours, *others = names
    keys = varied(rows)
    bars = any(known(row).bar for row in rows)
    flashkda = any(known(row).flashkda for row in rows)
    head = ["lengths", "H", *keys, "floor", ours, "x floor", "spread"]
    head += ["at most"] * bars + others + ["FlashKDA*"] * flashkda
    lines = []
    for row in rows:
        time = median(row, ours)
        cells = [*label(row["shape"]), *(row[key] for key in keys), number(row["floor_ms"]), number(time)]
        cells += [f"{time / row['floor_ms']:.2f}", f"{100 * spread(row, ours):.1f}%"] if time else ["", ""]
        cells += [number(known(row).bar)] * bars + [number(median(row, name)) for name in others]
        cells += [number(known(row).flashkda)] * flashkda
        lines.append(cells)
    return _markdown_table(head, lines)


def plain_table(result: Result) -> str:
    """Milliseconds of plain calls, where the other table has device times."""
    rows, names = result["rows"], competitors(result)
    if not any("graph_ms" in times for row in rows for times in row["times"].values()):
        return ""
    keys = varied(rows)
    lines = [
        [
            *label(row["shape"]),
            *(row[key] for key in keys),
            *(number(median(row, name, "plain_ms")) for name in names),
        ]
        for row in rows
    ]
    return _markdown_table(["lengths", "H", *keys, *names], lines)


def remarks(result: Result) -> list[str]:
    """What the table cannot say, one sentence each."""
    rows, names = result["rows"], competitors(result)
    device = result["runs"][0]["device"]
    said = [_floor(result["runs"])]
    if any(known(row).flashkda or known(row).bar for row in rows):
        elsewhere = "" if KNOWN_ON in device else f", while all other figures are of the {device}"
        said.append(
            f"*FlashKDA and the column `at most` hold for an H100 SXM and fp32 states{elsewhere}. FlashKDA "
            "is MoonshotAI's of July 2026, measured earlier and not in this run."
        )
    said += _bars(rows, names) + _ratios(rows, names) + _serving(rows, names)
    spreads = [spread(row, name) for row in rows for name in names if rounds(row, name)]
    if spreads:
        said.append(
            "The largest spread of any competitor, (slowest - fastest round) / median, is "
            f"{100 * max(spreads):.1f}%."
        )
    return said + _left_out(rows) + _disagreements(rows, names)


def _floor(runs: list[dict[str, Any]]) -> str:
    rates = [f"{run['copy_bytes_per_second'] / 1e12:.3f}" for run in runs]
    return (
        "All times are in milliseconds. The floor is the time of a copy of the same bytes at the rate of a "
        f"large copy in the same run: {' and '.join(dict.fromkeys(rates))} TB/s, reads and writes counted."
    )


def _left_out(rows: list[Row]) -> list[str]:
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["left_out"].items():
            where.setdefault((name, reason), []).append(title(row))
    return [f"{name} is left out of {'; '.join(titles)}: {why}." for (name, why), titles in where.items()]


def _disagreements(rows: list[Row], names: list[str]) -> list[str]:
    return [
        f"{name} and {names[0]} do not agree on {title(row)}: the RMS of out and state are "
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
    over = [f"{title(row)} ({time / bar:.2f} of it)" for row, time, bar in judged if time > bar]
    within = f"{names[0]} is within `at most` in {len(judged) - len(over)} of {len(judged)} rows"
    return [f"{within}, over it in: {'; '.join(over)}." if over else f"{within}."]


def _geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _ratios(rows: list[Row], names: list[str]) -> list[str]:
    """How this library's time compares with each other competitor's, over the rows that both have."""
    said = []
    for name in names[1:]:
        both = [(row, median(row, names[0]), median(row, name)) for row in rows]
        found = [(ours / other, title(row)) for row, ours, other in both if ours and other]
        if found:
            (low, best), (high, worst) = min(found), max(found)
            mean = _geometric_mean([ratio for ratio, _ in found])
            said.append(
                f"{names[0]} takes {mean:.3f} of the time of {name} in the geometric mean of {len(found)} "
                f"rows, from {low:.3f} ({best}) to {high:.3f} ({worst})."
            )
    return said


def _serving(rows: list[Row], names: list[str]) -> list[str]:
    said = []
    for gates, states in dict.fromkeys((row["gates"], row["states"]) for row in rows):
        chosen = [r for r in rows if (r["gates"], r["states"]) == (gates, states) and r["shape"] in SERVING]
        means = {}
        for name in names:
            times = [time for time in (median(row, name) for row in chosen) if time]
            if len(times) == len(SERVING):
                means[name] = _geometric_mean(times)
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
    parts += [f"copy rate {run['copy_bytes_per_second'] / 1e12:.3f} TB/s"]
    return ", ".join(parts) + f"; {run['gates']} gates, {run['states']} states, {run['rounds']} rounds"


HOW = """\
The columns with a competitor's name are the device time of one call: the median over rounds in which the
competitors take turns. In a round each competitor replays a CUDA graph that holds a call for each of several
sets of inputs, which together are more than twice as large as the L2 cache; 10 ms of such replays come before
the clock starts. A CPU has no graphs, so its times are of plain calls. `x floor` is the time of flash_kda
over the floor, and `spread` the slowest minus the fastest round over the median.

The floor counts the bytes of q, k, v, g, beta, out and both states once. Every competitor runs in a process
of its own, on the same inputs. Where there are several sequences, FLA is given their lengths on the host, and
flash_kda the longest length.

The gates called `mixed` are like a trained model's: every head has channels that forget next to nothing in
thousands of tokens, and channels that forget within one token. With `slow` all channels remember, and with
`fast` all channels forget. If a command has `--fla-tunes-once`, FLA's kernels were tuned with the first shape
that FLA ran, and kept the configuration of this shape for all others.

A GPU at the limit of its power lowers its clock, and recovers while a slower competitor runs. A call that
draws much power can therefore take some 6% longer when it runs by itself for a second or more.
"""


def _fill(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _command(text: str) -> str:
    """A command line as a block of code, continued over as many lines as it needs."""
    lines = textwrap.wrap(text, COLUMNS - 14, break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(("        " if i else "    ") + line for i, line in enumerate(lines))


def markdown(result: Result, picture: str | None, folder: str) -> str:
    """A page that lies in `folder`."""
    runs, plain = result["runs"], plain_table(result)
    parts = [f"# {competitors(result)[0]} on {runs[0]['device']}", table(result)]
    bullets = (f"- {sentence.replace('*', chr(92) + '*', 1)}" for sentence in remarks(result))
    parts.append("\n".join(_fill(bullet, "  ") for bullet in bullets))
    if picture:
        parts.append(f"![Time over the memory floor, by shape]({os.path.relpath(picture, folder or '.')})")
    parts += ["## What the columns say", *map(_fill, HOW.split("\n\n"))]
    if plain:
        parts += ["## Plain calls", _fill(PLAIN), plain]
    parts += ["## The runs", "Each command, and the machine on which it ran:"]
    parts += [f"{_command(run['command'])}\n\n{_fill(environment(run))}" for run in runs]
    return "\n\n".join(part for part in parts if part) + "\n"


PLAIN = (
    "Calls from Python without a graph, many in a row: milliseconds of one call by the host's clock, from "
    "the first call until all work is done."
)


def text(result: Result) -> str:
    """For a terminal."""
    plain = plain_table(result)
    parts = [environment(run) for run in result["runs"]] + [table(result)] + remarks(result)
    parts += [PLAIN, plain] if plain else []
    return "\n\n".join(part for part in parts if part)
