"""Times flash_kda beside flash-linear-attention and other implementations, in one run on one GPU.

    python benchmarks/peers.py --publish
    python benchmarks/peers.py --fla-shapes none --kernel hopper --kernel hopper:never --json ours.json
    python benchmarks/peers.py --shapes 96:8192 8:4096 --peer before=../flash_kda/build/python
    python benchmarks/peers.py --from-json ours.json fla.json --publish

A shape is HEADS:LENGTHS: 96:8192, 96:1300,547 or 12:2048x4. For each shape the table has the device time of a
call by CUDA-graph replay over rotating inputs, as the median of rounds in which all competitors take turns;
the ratio of this time to the time in which the bytes of the call could be copied; and the time of a plain
call. A competitor that has no time in a row is named below the table, with the reason.

--publish names its files after the GPU: BENCHMARK_H200.md, docs/benchmark_h200.json, docs/benchmark_h200.svg.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from peer_timing import picture, report
from peer_timing.race import Competitor, Race, RaceError
from peer_timing.shapes import KNOWN, STATE_BYTES, parse

OURS, FLA = "flash_kda", "FLA"
CUTS = ("auto", "never", "always", "mixed")
ROOT = Path(__file__).resolve().parents[1]


def shape(text: str) -> str:
    try:
        parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def fla_shape(text: str) -> str:
    return text if text in ("all", "none") else shape(text)


def peer(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not re.fullmatch(r"[\w.+-]+", name) or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    if name in (OURS, FLA):
        raise argparse.ArgumentTypeError(f"the name {name} is taken")
    if not os.path.isdir(path) and not (os.path.isfile(path) and path.endswith(".py")):
        raise argparse.ArgumentTypeError(f"{path} is neither a folder nor a .py file")
    return name, path


def kernel(text: str) -> str:
    name, colon, cut = text.partition(":")
    if not name or (colon and cut not in CUTS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not KERNEL or KERNEL:CUT, where CUT is one of {', '.join(CUTS)}"
        )
    return text


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def arguments(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="peers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--shapes",
        nargs="+",
        type=shape,
        default=list(KNOWN),
        metavar="SHAPE",
        help=f"default: {' '.join(KNOWN)}",
    )
    add(
        "--gates",
        choices=("mixed", "slow", "fast"),
        default="mixed",
        help="default: mixed, as in trained models",
    )
    add("--states", choices=tuple(STATE_BYTES), default="fp32", help="initial and final; default: fp32")
    add(
        "--kernel",
        action="append",
        type=kernel,
        default=[],
        metavar="KERNEL[:CUT]",
        help="a kernel of this library instead of the one that it chooses, and how sequences are cut "
        f"({', '.join(CUTS)}); given again, another kernel beside the first",
    )
    add("--rounds", type=positive, default=15, help="default: 15")
    add(
        "--peer",
        action="append",
        type=peer,
        default=[],
        metavar="NAME=PATH",
        help="another fwd of the same signature: PATH is a folder with a package flash_kda, or a .py file",
    )
    add(
        "--fla-shapes",
        nargs="+",
        type=fla_shape,
        metavar="SHAPE",
        help="the shapes that FLA runs, or all or none; default: all if it is installed. "
        "Its tuning takes minutes",
    )
    add(
        "--fla-tunes-once",
        action="store_true",
        help="FLA's kernels are tuned with the first shape that it runs, and not again with others",
    )
    add(
        "--time-limit",
        type=positive,
        default=1200,
        metavar="SECONDS",
        help="FLA begins and tunes nothing more after this time; default: 1200",
    )
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: plain calls only")
    add("--commit", help="of the library, where there is no git to ask")
    add("--json", metavar="FILE", help="every round's time; written anew after each shape")
    add("--markdown", metavar="FILE")
    add("--picture", metavar="FILE", help="time over the floor, as .svg, .png or what else matplotlib writes")
    add(
        "--publish",
        nargs="?",
        const=str(ROOT),
        metavar="FOLDER",
        help="writes the page, the picture and the JSON under names that say the GPU, below FOLDER; "
        "default: the root of the project",
    )
    add("--curve", metavar="FILE", help="a picture of time against length, for shapes of one sequence")
    add("--from-json", nargs="+", metavar="FILE", help="times nothing; puts earlier results together")
    options = parser.parse_args(argv)
    names = [name for name, _ in options.peer]
    if len(set(names)) < len(names):
        parser.error("argument --peer: two peers have the same name")
    for name in ("picture", "curve", "publish"):
        if getattr(options, name) and importlib.util.find_spec("matplotlib") is None:
            parser.error(f"argument --{name}: matplotlib is not installed")
    if len(set(options.kernel)) < len(options.kernel):
        parser.error("argument --kernel: the same one twice")
    for name in names:
        if name in options.kernel:
            parser.error(f"argument --peer: the name {name} is a kernel's")
    if options.publish and (options.json or options.markdown or options.picture):
        parser.error("argument --publish: it names the files of --json, --markdown and --picture itself")
    if options.publish and not os.path.isdir(os.path.join(options.publish, "docs")):
        parser.error(f"argument --publish: there is no folder {os.path.join(options.publish, 'docs')}")
    for path in filter(None, (options.json, options.markdown, options.picture, options.curve)):
        if not os.path.isdir(os.path.dirname(path) or "."):
            parser.error(f"there is no folder for {path}")
    return parser, options


def name_published(options: argparse.Namespace, device: str) -> None:
    """The files that --publish writes, once the device is known."""
    if options.publish:
        name = report.short_name(device)
        in_docs = os.path.join(options.publish, "docs", f"benchmark_{name.lower()}")
        options.markdown = os.path.join(options.publish, f"BENCHMARK_{name}.md")
        options.json, options.picture = f"{in_docs}.json", f"{in_docs}.svg"


def ours_importable() -> None:
    """Finds the package as the tests do: an installed package first, then what `make` built."""
    if importlib.util.find_spec("flash_kda") is None:
        built = str(ROOT / os.environ.get("BUILD", "build") / "python")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (built, os.environ.get("PYTHONPATH"))))


def competitors(options: argparse.Namespace) -> list[Competitor]:
    """This library comes first, since the table's ratios are its own."""
    ours_importable()
    common = {"device": options.device}
    ours = common | {"kind": "flash_kda"}
    kernels = options.kernel or [""]
    found = []
    for i, text in enumerate(kernels):
        name, _, cut = text.partition(":")
        found.append(Competitor(text if i else OURS, ours | {"kernel": name or None, "cut": cut or None}))
    wanted = options.fla_shapes or ["all"]
    if options.device == "cuda" and "none" not in wanted:
        if importlib.util.find_spec("fla") is not None:
            only = None if "all" in wanted else wanted
            found.append(
                Competitor(
                    FLA,
                    common | {"kind": "fla", "tunes_once": options.fla_tunes_once},
                    only,
                    options.time_limit,
                )
            )
        elif options.fla_shapes:
            raise RaceError("argument --fla-shapes: flash-linear-attention is not installed")
        else:
            note("flash-linear-attention is not installed, and so not timed")
    found += [
        Competitor(name, common | {"kind": "path", "path": os.path.abspath(path)})
        for name, path in options.peer
    ]
    return found


def commit() -> str | None:
    def git(*what: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *what], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            " with changes" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


class Progress:
    """One line that changes on a terminal, or a line every half minute elsewhere."""

    def __init__(self) -> None:
        self.shown, self.last = sys.stderr.isatty(), 0.0

    def __call__(self, text: str) -> None:
        if self.shown:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() > self.last + 30:
            self.last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(options: argparse.Namespace, argv: list[str]) -> report.Result:
    progress = Progress()

    def say(text: str) -> None:
        progress.clear()
        note(text)

    race = Race(competitors(options), options.gates, options.states, options.rounds, say, progress)
    try:
        run: dict[str, Any] = {"command": shlex.join(["python", "benchmarks/peers.py", *argv])}
        run |= {"date": datetime.date.today().isoformat(), "commit": options.commit or commit()}
        run |= {"gates": options.gates, "states": options.states, "rounds": options.rounds, **race.start()}
        result: report.Result = {"runs": [run], "rows": []}
        name_published(options, run["device"])
        say(report.environment(run))
        for name in dict.fromkeys(options.shapes):
            row = race.shape(name, run["copy_bytes_per_second"])
            result["rows"].append(row)
            figures = ", ".join(f"{who} {report.number(report.median(row, who))} ms" for who in row["times"])
            say(f"{name}: floor {report.number(row['floor_ms'])} ms; {figures or 'nobody ran'}")
            if options.json:
                report.write(result, options.json)
    finally:
        race.stop()
    return result


def main(argv: list[str]) -> int:
    parser, options = arguments(argv)
    try:
        result = report.load(options.from_json) if options.from_json else measure(options, argv)
        name_published(options, result["runs"][0]["device"])
    except (RaceError, ValueError) as error:
        parser.error(str(error))
    print(report.text(result))
    if options.from_json and options.json:
        report.write(result, options.json)
    if options.picture:
        picture.draw(result, options.picture)
    if options.curve:
        picture.curve(result, options.curve)
    if options.markdown:
        page = report.markdown(result, options.picture, os.path.dirname(options.markdown))
        Path(options.markdown).write_text(page)
    return 1 if any(OURS in row["left_out"] for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
