"""Calls that share a GPU with other work: streams, priorities, threads, processes, CUDA graphs, MPS, green
contexts, limits of SMs. Every result must have the bits of the same call alone, and nothing may hang.

SHARING_CALLS in the environment says how many calls a case makes, if not 2600. What ran is listed at the end
of pytest's output. docs/sharing.md is the guide that these tests stand behind.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

import flash_kda

PROGRAM = Path(__file__).with_name("sharing.py")
PROBE = "import torch; torch.zeros(1, device='cuda').item()"  # a program that uses the GPU
CANNOT = 77  # exit status of PROGRAM
CALLS = int(os.environ.get("SHARING_CALLS", "2600"))
# After this time a process counts as hung. Kernels that wait in vain give up by themselves after 20 s.
SECONDS = 240 + CALLS // 100


class Child:
    """A process of sharing.py, which is ended when it counts as hung."""

    def __init__(self, case, sms, environment=()):
        self.case, self.lines, self.hung = case, [], False
        command = [sys.executable, "-u", "-X", "faulthandler", str(PROGRAM), case, str(CALLS), str(sms)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, **pipes, text=True, env={**os.environ, **dict(environment)})
        self.timers = [
            threading.Timer(SECONDS, self._end, [signal.SIGABRT]),  # faulthandler says where it hangs
            threading.Timer(SECONDS + 20, self._end, [signal.SIGKILL]),
        ]
        for timer in self.timers:
            timer.daemon = True
            timer.start()

    def _end(self, how):
        self.hung = True
        self.process.send_signal(how)

    def wait_until_ready(self):
        for line in self.process.stdout:
            if line == "ready\n":
                return
            self.lines.append(line)
        self.finish()
        pytest.fail(f"sharing.py {self.case} ended before it was ready:\n{''.join(self.lines)}")

    def go(self):
        with contextlib.suppress(BrokenPipeError):  # a process that has ended: finish() says why
            self.process.stdin.write("go\n")
            self.process.stdin.flush()

    def finish(self):
        """What the process printed after it was ready."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        output = self.process.stdout.read()
        status = self.process.wait()
        text = "".join(self.lines) + output
        if self.hung:
            pytest.fail(f"sharing.py {self.case} hung: it had not ended after {SECONDS} s.\n{text}")
        if status == CANNOT:
            pytest.skip(text.splitlines()[-1])
        assert status == 0, f"sharing.py {self.case} ended with status {status}:\n{text}"
        return text

    def stop(self):
        for timer in self.timers:
            timer.cancel()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


@pytest.fixture
def start(cuda):
    """A function that starts processes of sharing.py. All have ended when the test is over."""
    sms = next(d.units for d in flash_kda.devices() if d.type == "cuda")
    children = []

    def start(case, **environment):
        children.append(Child(case, sms, environment))
        return children[-1]

    yield start
    for child in children:
        child.stop()


@pytest.fixture
def run(start, record_report):
    """A function that lets processes of sharing.py, once all are ready, go at the same time."""

    def run(*children):
        for child in children:
            child.wait_until_ready()
        for child in children:
            child.go()
        outputs = [child.finish() for child in children]
        for output in outputs:
            record_report(output)
        return outputs

    return run


def assert_at_once(outputs):
    """That all processes computed at one time, by the clock that they share."""
    times = [re.search(r"computed from ([\d.]+) to ([\d.]+) s", output) for output in outputs]
    assert max(float(t[1]) for t in times) < min(float(t[2]) for t in times), "not at the same time"


def test_streams_of_two_priorities(start, run):
    """Calls of every schedule, enqueued without waiting on four streams of two priorities beside matrix
    products on a fifth stream, have the bits of the same call alone."""
    run(start("streams"))


def test_host_threads(start, run):
    """Six host threads, each with a stream of its own, get the bits of the same call alone."""
    run(start("threads"))


def test_two_processes(start, run):
    """Two processes that compute at the same time, in time slices, do not change each other's results."""
    assert_at_once(run(start("streams"), start("streams")))


def test_graphs_beside_another_process(start, run, record_report):
    """CUDA graphs that are captured while another process computes are right when they are replayed, beside
    calls on other streams and beside the other process."""
    other = start("busy")
    other.wait_until_ready()
    other.go()
    run(start("graphs"))
    record_report(other.finish())


def test_green_contexts(start, run):
    """On streams of green contexts of 16, 32 and 64 SMs calls have the same bits as on all SMs, unless the
    driver refuses their cooperative launch: then they are within the error bars, and have the same bits in
    every call."""
    run(start("green"))


def test_green_context_that_is_current(start, run):
    """A call on a stream of a green context is in order also while the green context is current."""
    run(start("green_current"))


def test_capture_in_a_green_context(start, run):
    """A call that is captured on a stream of a green context too small for its cooperative launch is right,
    and so are calls after it."""
    run(start("green_capture"))


def test_stream_of_another_context(start, run):
    """A call on a stream of a context that is not the primary one gives a sentence and writes nothing, or is
    right."""
    run(start("other_context"))


def ask_mps(environment, command):
    """What the MPS daemon answers to a command."""
    options = {"capture_output": True, "text": True, "timeout": 60, "env": environment}
    return subprocess.run(["nvidia-cuda-mps-control"], input=command + "\n", **options).stdout


def reason_against_mps(environment, daemon, folder):
    """Why no process can compute under the MPS daemon, or None. Starts the MPS server."""
    options = {"capture_output": True, "text": True, "timeout": 120, "env": environment}
    tried = subprocess.run([sys.executable, "-c", PROBE], **options)
    if tried.returncode == 0 and daemon.poll() is None and ask_mps(environment, "get_server_list").split():
        return None
    said = tried.stderr.splitlines()[-1:]
    for path in sorted(Path(folder).glob("*.log")):
        said += [f"{path.name}: {line}" for line in path.read_text(errors="replace").splitlines()[-2:]]
    return "; ".join(said) or "it gives no reason"


@pytest.fixture(scope="module")
def mps():
    """The environment of processes that compute under an MPS daemon of these tests alone."""
    if shutil.which("nvidia-cuda-mps-control") is None:
        pytest.skip("there is no nvidia-cuda-mps-control")
    # pytest's own folders have paths too long for the daemon's sockets.
    with (
        tempfile.TemporaryDirectory(prefix="mps", dir="/tmp") as folder,
        open(f"{folder}/daemon.log", "w") as log,
    ):
        places = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        environment = {**os.environ, **places}
        daemon = subprocess.Popen(["nvidia-cuda-mps-control", "-f"], env=environment, stdout=log, stderr=log)
        try:
            reason = reason_against_mps(environment, daemon, folder)
            if reason:
                pytest.skip(f"MPS does not start here: {reason}")
            yield places
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                ask_mps(environment, "quit -t 5")
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(30)
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()


def test_two_clients_of_mps(mps, start, run):
    """Two clients of MPS whose kernels run side by side do not change each other's results."""
    assert_at_once(run(start("streams", **mps), start("streams", **mps)))


def test_limits_of_sms_under_mps(mps, start, run):
    """Three clients of MPS that may use 10, 20 and 50% of the SMs get results within the error bars, and the
    bits of the same call alone in the same process. The driver refuses cooperative launches that are larger
    than the limit."""
    shares = ("10", "20", "50")
    assert_at_once(run(*[start("limited", CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=s, **mps) for s in shares]))


def test_execution_affinity_under_mps(mps, start, run):
    """A call on a stream of a context with an execution affinity gives a sentence and writes nothing, or is
    right."""
    run(start("other_context", CUDA_MPS_ENABLE_PER_CTX_DEVICE_MULTIPROCESSOR_PARTITIONING="1", **mps))
