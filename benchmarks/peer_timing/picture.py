"""Pictures: every competitor's time over the floor, and its time against the length. Need matplotlib."""

from __future__ import annotations

from . import report
from .shapes import parse


def draw(result: report.Result, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    rows, names = result["rows"], report.competitors(result)
    figure, axes = pyplot.subplots(figsize=(9, (0.12 + 0.15 * len(names)) * len(rows) + 1.4))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        timed = [(y, row, report.median(row, name)) for y, row in enumerate(rows)]
        places = [(y + i * height, time / row["floor_ms"], time) for y, row, time in timed if time]
        bars = axes.barh([p[0] for p in places], [p[1] for p in places], height, label=name)
        axes.bar_label(bars, [f"{report.number(p[2])} ms" for p in places], padding=3, fontsize=7)
    marks = [(y, row["floor_ms"], report.known(row).flashkda) for y, row in enumerate(rows)]
    points = [(y, ms / floor) for y, floor, ms in marks if ms]
    if points:
        axes.plot([p[1] for p in points], [p[0] for p in points], "k.", label="FlashKDA, measured earlier")
    varied = report.varied(rows)
    axes.set_yticks(
        [y + 0.4 - height / 2 for y in range(len(rows))],
        [report.title(row) + "".join(f", {row[key]}" for key in varied) for row in rows],
        fontsize=8,
    )
    axes.set(
        xscale="log", xlabel="time over the memory floor (1: every byte crosses memory once at copy speed)"
    )
    axes.set_xlim(left=0.8)
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.margins(y=0.01)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def curve(result: report.Result, path: str) -> None:
    """A line for each competitor and number of heads, and one for the floor.

    Shapes of several sequences are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(9, 6))
    lines: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for row in result["rows"]:
        heads, lengths = parse(row["shape"])
        if len(lengths) > 1:
            continue
        times = {name: report.median(row, name) for name in report.competitors(result)}
        for name, time in (times | {"floor": row["floor_ms"]}).items():
            if time:
                lines.setdefault((heads, name), []).append((lengths[0], time))
    colours = {heads: f"C{i}" for i, heads in enumerate(sorted({heads for heads, _ in lines}))}
    names = [*report.competitors(result), "floor"]
    styles = {name: ("-", "--", "-.")[i % 3] for i, name in enumerate(names)} | {"floor": ":"}
    for (heads, name), points in sorted(lines.items()):
        tokens, times_ms = zip(*sorted(points))
        marker = "" if name == "floor" else "o"
        axes.plot(
            tokens,
            times_ms,
            styles[name],
            color=colours[heads],
            marker=marker,
            ms=3,
            label=f"H {heads}, {name}",
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens of one sequence", ylabel="ms of device time")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
