"""Draws what `flash-kda check` printed: flash-kda check | python scripts/plot_accuracy.py docs/accuracy.png

Needs matplotlib. One row per case, with the errors of output and state and the most that is allowed.
"""

from __future__ import annotations

import re
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

NUMBER = r"(\d\.\d+e[+-]\d+)"
ROW = re.compile(rf"^\s*(\S.*?)\s+{NUMBER}\s+{NUMBER}\s+{NUMBER}\s+{NUMBER}\s+(ok|FAILED)")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    lines = sys.stdin.read().splitlines()
    rows = [m for m in map(ROW.match, lines) if m]
    if not rows:
        sys.exit("there is no row of `flash-kda check` on the standard input")
    device = next((line for line in lines if "kernel" in line), "").strip()

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 0.32 * len(rows) + 1.6), sharey=True)
    for axis, column, name in ((axes[0], 2, "output"), (axes[1], 4, "fp32 state")):
        for y, row in enumerate(rows):
            error, bar = float(row[column]), float(row[column + 1])
            axis.plot([bar], [y], "|", color="black", markersize=13, label="at most" if y == 0 else None)
            if error > 0:
                axis.plot([error], [y], "o", color="tab:blue", label="measured" if y == 0 else None)
            else:
                axis.annotate("exact", (0.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_xlabel(f"relative RMS error of the {name}")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [row[1] for row in rows])
    axes[0].invert_yaxis()
    axes[0].set_xlim(1e-3, 1e-1)
    axes[1].legend(loc="lower left", fontsize=8)
    figure.suptitle(f"flash_kda against the fp64 recurrence\n{device}", fontsize=10)
    figure.tight_layout()
    figure.savefig(sys.argv[1], dpi=120)


if __name__ == "__main__":
    main()
