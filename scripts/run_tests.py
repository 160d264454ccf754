"""Runs the C tests and the Python tests side by side, and ends with one line of counts.

    python scripts/run_tests.py [--all] FOLDER

FOLDER is where the project was built. Without --all the tests that are labelled or marked slow are left out,
and the C programs run small problems (FLASH_KDA_TEST_QUICK=1). With --all the C tests that are labelled
`part` are left out, since a slow test does the same and more.

Every few seconds a line says how far the tests are. The output of a test that fails is shown as soon as the
test's runner gives it; all other output is in FOLDER/Testing. CTest runs as many programs at a time as there
are processors, and pytest as many workers, up to WORKERS. pytest has priority: whatever it leaves goes to the
C programs.

No test is ended because a clock on the wall has moved on, since a busy machine is slow but not wrong. Tests
are ended if they have had next to no processor time for minutes and none of them has ended (they wait for
what never comes), or if one process has had hours of processor time (it runs for ever).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Callable
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
REPORT_SECONDS = 10  # between two lines of progress
STANDSTILL_SECONDS = 300  # on the wall, in which tests that wait for nothing have far more than:
STANDSTILL_PROCESSOR_SECONDS = 2
PROCESSORS = len(os.sched_getaffinity(0))
MOST_PROCESSOR_SECONDS = 3600 * PROCESSORS  # of one process
MOST_PROGRAMS = 16  # at a time, since each takes memory of its own, also on a GPU
# Of pytest. Each imports PyTorch, and on a machine with a GPU tests would share the GPU's memory.
WORKERS = 1 if Path("/dev/nvidiactl").exists() else min(PROCESSORS, 4)
NO_LIMIT_SECONDS = 10**7  # for CTest, which would otherwise end a test after 1500 seconds on the wall
GPU = re.compile("cuda|gpu", re.IGNORECASE)  # in the reason of a skip


class Suite:
    """A runner of tests with its own process. Subclasses read its lines."""

    name = ""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str], niceness: int) -> None:
        self.done = self.total = 0
        self.failed: list[str] = []
        self.xml = folder / f"{self.name}.xml"
        self.log = folder / f"{self.name}.log"
        self.xml.unlink(missing_ok=True)
        self._moved_at, self._had_then, self._done_then = time.monotonic(), 0.0, 0
        self.stuck = False

        def prepare() -> None:
            os.nice(niceness)
            hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
            if hard == resource.RLIM_INFINITY or hard > MOST_PROCESSOR_SECONDS:
                resource.setrlimit(resource.RLIMIT_CPU, (MOST_PROCESSOR_SECONDS, hard))

        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            preexec_fn=prepare,
            text=True,
            errors="replace",
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def line(self, text: str) -> None:
        raise NotImplementedError

    def _read(self) -> None:
        assert self.process.stdout
        with self.log.open("w") as log:
            for text in self.process.stdout:
                log.write(text)
                log.flush()
                self.line(text.rstrip("\n"))

    @property
    def running(self) -> bool:
        return self._thread.is_alive() or self.process.poll() is None

    def end_if_stuck(self) -> None:
        """Ends tests that wait for what never comes."""
        had, now = sum(map(processor_seconds, family(self.process.pid))), time.monotonic()
        # A process that ends takes its time along, so less time than before is a movement, too.
        moved = abs(had - self._had_then) > STANDSTILL_PROCESSOR_SECONDS or self.done != self._done_then
        if moved:
            self._moved_at, self._had_then, self._done_then = now, had, self.done
        elif now - self._moved_at > STANDSTILL_SECONDS:
            show(f"{self.name} tests: nothing has moved for {STANDSTILL_SECONDS} s. They are ended.")
            self.stuck = True
            self._moved_at = now
            self.end()

    def end(self) -> None:
        self.process.kill()

    def result(self) -> Result:
        return Result(self)


class CTests(Suite):
    name = "C"
    RESULT = re.compile(r"^ *(\d+)/(\d+) Test +#\d+: (\S+) \.*(?: *\*\*\*| +)(.*?) +[\d.]+ sec")

    def __init__(self, build: str, everything: bool, folder: Path) -> None:
        self._showing = False
        command = [
            "ctest",
            "--test-dir",
            build,
            "-j",
            str(min(PROCESSORS, MOST_PROGRAMS)),
            "--output-on-failure",
        ]
        command += ["--no-tests=error", "--timeout", str(NO_LIMIT_SECONDS)]
        command += ["--output-junit", str(folder / f"{self.name}.xml")]
        quick = {} if everything else {"FLASH_KDA_TEST_QUICK": "1"}
        command += ["-LE", "^part$" if everything else "^slow$"]
        super().__init__(command, folder, quick, niceness=5)

    def line(self, text: str) -> None:
        found = self.RESULT.match(text)
        if found:
            self.done, self.total = int(found[1]), int(found[2])
            self._showing = found[4] not in ("Passed", "Skipped")
            if self._showing:
                self.failed.append(found[3])
        elif re.match(r" +Start +\d+: |\d+% tests passed", text):
            self._showing = False
        if self._showing:
            show(text)

    def end(self) -> None:
        """CTest counts the programs as failed and goes on with the others."""
        for process in family(self.process.pid)[1:]:
            kill(process, signal.SIGABRT)


class PythonTests(Suite):
    name = "Python"
    VERDICT = "(?P<verdict>PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)"
    COUNT = r"\[ *(?P<done>\d+)/(?P<total>\d+)\]"
    RESULTS = (
        re.compile(rf"(?:(?P<test>\S.*?) +)?{VERDICT}\b.*{COUNT}$"),
        re.compile(rf"\[gw\d+\] {COUNT} {VERDICT} (?P<test>\S.*?) *$"),  # of a worker
    )

    def __init__(self, build: str, everything: bool, folder: Path) -> None:
        self._showing = False
        command = [sys.executable, "-m", "pytest", "tests/python", "-v", "-o", "console_output_style=count"]
        command += ["--junitxml", str(folder / f"{self.name}.xml")]
        if WORKERS > 1:
            command += ["-n", str(WORKERS), "--dist", "worksteal"]
        # The package is tested as built, from the build folder, without being installed.
        path = os.pathsep.join(filter(None, [str(Path(build, "python").resolve()), os.getenv("PYTHONPATH")]))
        # PyTorch and NumPy compute small references in the tests. Threads that wait for each other would take
        # most of the processor time. The library under test counts its own threads.
        threads = os.getenv("OMP_NUM_THREADS", "1")
        variables = {"PYTHONPATH": path, "BUILD": build, "OMP_NUM_THREADS": threads}
        super().__init__(
            [*command, *([] if everything else ["-m", "not slow"])], folder, variables, niceness=0
        )

    def line(self, text: str) -> None:
        found = self.RESULTS[0].match(text) or self.RESULTS[1].match(text)
        if found:
            self.done, self.total = int(found["done"]), int(found["total"])
            if found["verdict"] in ("FAILED", "ERROR"):
                self.failed.append(found["test"] or "")
                show(f"{found['test']} {found['verdict']}")
        if re.match("=+ (FAILURES|ERRORS) =+$", text):
            self._showing = True
        if self._showing:
            show(text)

    def end(self) -> None:
        """pytest's handler of faults says where every thread is. A test whose worker ends has failed, and
        another worker goes on."""
        for process in family(self.process.pid)[1 if WORKERS > 1 else 0 :]:
            kill(process, signal.SIGABRT)


class Result:
    """What a suite's report in JUnit's XML says, once the suite has ended."""

    def __init__(self, suite: Suite) -> None:
        self.passed = self.failed = self.need_gpu = 0
        self.reasons: collections.Counter[str] = collections.Counter()  # of the other skips
        cases = ElementTree.parse(suite.xml).iter("testcase") if suite.xml.exists() else []
        for case in cases:
            skipped = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                self.failed += 1
            elif skipped is not None:
                said = re.search("^skipped: (.*)$", case.findtext("system-out") or "", re.MULTILINE)
                reason = said[1] if said else skipped.get("message") or "no reason given"
                if GPU.search(reason):
                    self.need_gpu += 1
                else:
                    self.reasons[reason] += 1
            else:
                self.passed += 1
        # A runner that has failed without a test that has, for example since a test ended its process.
        self.broke = suite.stuck or (suite.process.returncode != 0 and not self.failed)

    def text(self, name: str) -> str:
        parts = [f"{self.passed} passed", f"{self.failed} failed"]
        if self.need_gpu:
            parts.append(f"{self.need_gpu} need a GPU")
        if self.reasons:
            parts.append(f"{sum(self.reasons.values())} skipped")
        return f"{name}: {', '.join(parts)}"


printing = threading.Lock()


def show(text: str) -> None:
    with printing:
        print(text, flush=True)


def kill(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def stat(process: int) -> list[str]:
    """The fields of /proc/PROCESS/stat from the state on; none if the process is over."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def family(process: int) -> list[int]:
    """The process and all its descendants."""
    children = collections.defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        fields = stat(int(folder.name))
        if fields:
            children[int(fields[1])].append(int(folder.name))
    found = [process]
    for member in found:
        found += children[member]
    return found


def processor_seconds(process: int) -> float:
    fields = stat(process)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def progress(suite: Suite) -> str:
    text = f"{suite.name} {suite.done} of {suite.total or '?'}"
    return f"{text}, {len(suite.failed)} failed" if suite.failed else text


def wait(suites: list[Suite], began: float) -> None:
    """Until both have ended, says how far they are."""
    reported = began
    while any(suite.running for suite in suites):
        time.sleep(0.2)
        if time.monotonic() - reported >= REPORT_SECONDS:
            reported = time.monotonic()
            show(f"  {duration(reported - began):>12}: {'; '.join(map(progress, suites))}")
            for suite in suites:
                if suite.running:
                    suite.end_if_stuck()


def report(suites: list[Suite], began: float) -> bool:
    """Prints what skipped and what broke, then the line of counts. Returns whether all is well."""
    well, texts = True, []
    for suite in suites:
        result = suite.result()
        for reason, count in result.reasons.most_common():
            show(f"{count} {suite.name} test{'s' * (count > 1)} skipped: {reason}")
        if result.broke:
            show("".join(suite.log.read_text().splitlines(keepends=True)[-100:]))
            show(f"The runner of the {suite.name} tests ended with {suite.process.returncode}: {suite.log}")
        if result.failed:
            show(f"All output of the {suite.name} tests: {suite.log}")
        well = well and not result.broke and not result.failed
        texts.append(result.text(suite.name) + (", and its runner failed" if result.broke else ""))
    show(f"{'; '.join(texts)}; {duration(time.monotonic() - began)}")
    return well


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Runs the C tests and the Python tests.")
    parser.add_argument("--all", action="store_true", help="slow tests, and large problems in the C tests")
    parser.add_argument("folder", help="where the project was built")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    for number in (signal.SIGINT, signal.SIGTERM):  # raise KeyboardInterrupt, also in a shell's background
        signal.signal(number, signal.default_int_handler)
    folder = Path(options.folder, "Testing").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    kinds: list[Callable[[str, bool, Path], Suite]] = [CTests, PythonTests]
    suites = [kind(options.folder, options.all, folder) for kind in kinds]
    try:
        wait(suites, began)
    except KeyboardInterrupt:
        for suite in suites:
            for process in family(suite.process.pid):
                kill(process, signal.SIGTERM)
        return 130
    return 0 if report(suites, began) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
