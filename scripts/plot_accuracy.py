"""Draws the errors that `flash-kda check` finds, and prints the table of the README.

    python scripts/plot_accuracy.py docs/accuracy.png
    python scripts/plot_accuracy.py docs/accuracy.png --device cuda:0 --kernel portable
    build/flash-kda check > check.txt; python scripts/plot_accuracy.py docs/accuracy.png --from check.txt

Runs build/flash-kda check on every device, and draws the first GPU (or the CPU, if there is none) with the
kernel that runs there by default. The picture has a row for each case, with the errors of output and state
and the most that is allowed. The table has a pair of columns for each kind of device. Drawing needs
matplotlib; --from reads what was printed on another machine.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBER = r"(\d\.\d+e[+-]\d+)"
ROW = re.compile(rf"\s*(\S.*?)\s+{NUMBER}\s+{NUMBER}\s+{NUMBER}\s+{NUMBER}\s+(?:ok|FAILED)")
DEVICE = re.compile(r"((?:cpu|cuda:\d+)): .*, kernel \S+")

# The cases in the README's table, by the name that `check` prints. Where a name stands for several cases, the
# table has the larger error.
README_ROWS = {
    "random": ["random"],
    "slow gates": ["slow gates"],
    "channels from fast to slow": ["channels from fast to slow"],
    "identical keys": ["identical keys"],
    "nearly identical keys": ["nearly identical keys"],
    "recorded activations (worse of two layers)": ["recorded, first layer", "recorded, last layer"],
}


@dataclass
class Errors:
    """Of one case: relative RMS errors, and the most that is allowed."""

    out: float
    most_out: float
    state: float
    most_state: float


@dataclass
class Device:
    line: str  # as `check` prints it, with the kernel
    cases: dict[str, Errors] = field(default_factory=dict)

    def is_gpu(self) -> bool:
        return self.line.startswith("cuda")

    def short_name(self) -> str:
        """H200 of "cuda:0: NVIDIA H200, sm_90, ...": the first word of the name that has a digit."""
        name = self.line.split(": ")[1].split(",")[0]
        return next((word for word in name.split() if re.search(r"\d", word)), name)


def parse(text: str) -> list[Device]:
    devices: list[Device] = []
    for line in re.sub(r"\n {4}(?=\S)", " ", text).splitlines():  # a long line was broken
        if DEVICE.match(line):
            devices.append(Device(line))
        elif (row := ROW.match(line)) and devices:
            devices[-1].cases[row[1]] = Errors(*(float(row[i]) for i in range(2, 6)))
    return [device for device in devices if device.cases]


def check(command: str, device: str | None, kernel: str | None) -> str:
    asked = ["--device", device] if device else []
    asked += ["--kernel", kernel] if kernel else []
    done = subprocess.run([command, "check", *asked], stdout=subprocess.PIPE, text=True)
    # Status 1 means that an error is above its bar, which the picture should show.
    if done.returncode not in (0, 1):
        sys.exit(f"{command} check failed with status {done.returncode}")
    return done.stdout


def short(error: float) -> str:
    """2.2e-3 of 2.200e-03, 5.145e-3 of 5.145e-03: all digits that `check` has printed, as rounding once more
    could round the wrong way."""
    mantissa, exponent = f"{error:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if error else "0"


def table(devices: list[Device]) -> str:
    """Output / state for each device and, beside it, the most that is allowed."""
    head = ["inputs"]
    for device in devices:
        head += [device.short_name(), "at most on a GPU"] if device.is_gpu() else ["CPU", "at most on a CPU"]
    lines = [head, ["---"] * len(head)]
    for title, names in README_ROWS.items():
        cells = [title]
        for device in devices:
            found = [device.cases[name] for name in names if name in device.cases]
            for pair in (("out", "state"), ("most_out", "most_state")):
                worst = [max((getattr(errors, name) for errors in found), default=None) for name in pair]
                cells.append(" / ".join("" if error is None else short(error) for error in worst))
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def draw(device: Device, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    names, cases = list(device.cases), list(device.cases.values())
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 0.32 * len(names) + 1.6), sharey=True)
    outs = [(errors.out, errors.most_out) for errors in cases]
    states = [(errors.state, errors.most_state) for errors in cases]
    for axis, pairs, what in ((axes[0], outs, "output"), (axes[1], states, "fp32 state")):
        for y, (error, most) in enumerate(pairs):
            axis.plot([most], [y], "|", color="black", markersize=13, label=None if y else "at most")
            if error > 0:
                axis.plot([error], [y], "o", color="tab:blue", label=None if y else "measured")
            else:
                axis.annotate("exact", (0.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_xlabel(f"relative RMS error of the {what}")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set_xlim(1e-3, 1e-1)
    axes[1].legend(loc="lower left", fontsize=8)
    figure.suptitle(f"flash_kda against the fp64 recurrence\n{device.line}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="plot_accuracy.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", help=".png, .svg or what else matplotlib writes")
    parser.add_argument("--device", metavar="cpu|cuda:N", help="the device to check and draw; default: all")
    parser.add_argument("--kernel", help="a kernel instead of the device's default; needs --device")
    parser.add_argument(
        "--command", default=str(ROOT / "build" / "flash-kda"), help="default: build/flash-kda"
    )
    parser.add_argument("--from", dest="printed", metavar="FILE", help="what `check` printed; - reads stdin")
    options = parser.parse_args(argv)
    if options.kernel and not options.device:
        parser.error("argument --kernel: it needs --device")
    if options.printed == "-":
        text = sys.stdin.read()
    elif options.printed:
        text = Path(options.printed).read_text(encoding="utf-8")
    else:
        text = check(options.command, options.device, options.kernel)
    devices = [d for d in parse(text) if not options.device or d.line.startswith(f"{options.device}:")]
    if not devices:
        sys.exit("there is no row of `flash-kda check` for the device")
    devices.sort(key=Device.is_gpu, reverse=True)
    print(table(devices))
    draw(devices[0], options.picture)


if __name__ == "__main__":
    main(sys.argv[1:])
