"""Starts every script, so that none can break unseen. Tools that need a GPU, a network or minutes are stubs.

A stub is a program on PATH that notes its name and arguments and succeeds, or fails if its name is in
STUBS_THAT_FAIL.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Every script and program of scripts/, benchmarks/, examples/ and .ci/, with the test that starts it: a
# function of tests/python, or a test of CTest.
STARTED_BY = {
    ".ci/run": "test_ci_runs_every_section",
    "benchmarks/cpu_sgemm.c": "cpu_sgemm",
    "benchmarks/decode.py": "test_decode_runs_on_the_cpu",
    "benchmarks/engines.py": "test_rows",
    "benchmarks/host_time.c": "host_time",
    "benchmarks/host_time_decode.c": "host_time",
    "benchmarks/options.py": "test_every_option_runs",
    "benchmarks/peers.py": "test_a_run_on_the_cpu",
    "benchmarks/python_overhead.py": "test_it_runs",
    "benchmarks/serving.py": "test_serving_runs_on_the_cpu",
    "benchmarks/training.py": "test_training_runs_on_the_cpu",
    "examples/forward.c": "example_forward",
    "examples/language_model/cache.py": "test_text_in_text_out",
    "examples/language_model/generate.py": "test_text_in_text_out",
    "examples/language_model/kda.py": "test_the_loss_falls",
    "examples/language_model/model.py": "test_text_in_text_out",
    "examples/language_model/speculate.py": "test_guesses_change_no_text",
    "examples/language_model/train.py": "test_the_loss_falls",
    "examples/quickstart.py": "test_quickstart_runs_as_it_stands",
    "scripts/build.sh": "test_build",
    "scripts/check_kernels.py": "test_check_kernels_of_a_folder",
    "scripts/check_lines.py": "test_long_lines_are_found",
    "scripts/docs_hooks.py": "test_header_becomes_sections",
    "scripts/environment.py": "test_environment",
    "scripts/fetch_engines.py": "test_fetch_engines",
    "scripts/fetch_nvcc.py": "test_fetch",
    "scripts/fuzz.sh": "test_fuzz",
    "scripts/gpu.sh": "test_gpu",
    "scripts/lint.sh": "test_lint",
    "scripts/plot_accuracy.py": "test_plot_accuracy",
    "scripts/run_tests.py": "test_run_tests",
    "scripts/sanitize.sh": "test_sanitize",
    "scripts/test_aarch64.sh": "test_aarch64",
    "scripts/test_all.sh": "test_all_the_tests",
    "scripts/test_pythons.py": "test_every_python",
    "scripts/wheel.sh": "test_wheel",
}


def test_every_script_is_started():
    found = {
        str(path.relative_to(ROOT))
        for folder in ("scripts", "benchmarks", "examples", ".ci")
        for path in [*(ROOT / folder).iterdir(), *(ROOT / folder / "language_model").glob("*")]
        if path.suffix in (".py", ".sh", ".c") or path.name == "run"
    }
    assert found == set(STARTED_BY), "STARTED_BY in test_scripts.py must name every script and its test"
    python = "".join(path.read_text() for path in (ROOT / "tests" / "python").glob("test_*.py"))
    cmake = "".join((ROOT / path).read_text() for path in ("tests/CMakeLists.txt", "examples/CMakeLists.txt"))
    for script, test in STARTED_BY.items():
        if test.startswith("test_"):
            assert f"def {test}(" in python, f"{script}: no Python test is called {test}"
        else:
            assert f"add_test(NAME {test} " in cmake, f"{script}: CTest has no test called {test}"


STUB = """\
#!/bin/sh
echo "$(basename "$0") $*" >>"$STUB_LOG"
case " $STUBS_THAT_FAIL " in *" $(basename "$0") "*) exit 1 ;; esac
[ "$(basename "$0")" = nvidia-smi ] && echo 9.0
exit 0
"""


class Sandbox:
    """A folder that looks like the project, and a PATH that begins with stubs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.stubs = folder, folder / "calls.log", folder / "stubs"
        for name in ("scripts", ".ci"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.stubs.mkdir()

    def stub(self, *names: str, into: Path | None = None) -> None:
        for name in names:
            path = (into or self.stubs) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(STUB)
            path.chmod(0o755)

    def run(self, *command: str, fail: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        # What `make test` says to the tests must not reach the scripts that are tested.
        said = ("BUILD", "PYTHON", "OMP_NUM_THREADS")
        outside = {name: value for name, value in os.environ.items() if name not in said}
        environment = outside | variables | {"STUB_LOG": str(self.log), "STUBS_THAT_FAIL": fail}
        environment["PATH"] = f"{self.stubs}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def load(path: str):
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build(sandbox):
    sandbox.stub("cmake", "ninja")
    done = sandbox.run("sh", "scripts/build.sh", "build", "-DSOME=ON")
    assert done.returncode == 0, done.stderr
    ninja = sandbox.stubs / "ninja"
    assert sandbox.calls() == [
        f"cmake -S . -B build -G Ninja -DCMAKE_MAKE_PROGRAM={ninja} -DSOME=ON",
        "cmake --build build",
    ]
    assert sandbox.run("sh", "scripts/build.sh", "build", fail="cmake").returncode == 1


C_TESTS = """\
add_test(good sh -c "exit 0")
add_test(bad sh -c "echo what a C test said; exit 1")
add_test(elsewhere sh -c "echo skipped: cuda:0 can not be used; exit 77")
add_test(long sh -c "test -z $FLASH_KDA_TEST_QUICK")
set_tests_properties(elsewhere PROPERTIES SKIP_RETURN_CODE 77)
set_tests_properties(long PROPERTIES LABELS slow)
"""
PYTHON_TESTS = """\
import os, pytest

def test_good(): assert os.environ["OMP_NUM_THREADS"] == "1"
def test_bad():
    print("what a Python test said")
    assert not "reason"
def test_elsewhere(): pytest.skip("there is no CUDA device")
def test_bare(): pytest.skip("could not import 'that'")
@pytest.mark.slow
def test_long(): pass
"""


@pytest.fixture
def run_tests(sandbox):
    """Runs scripts/run_tests.py on the tests that it is given. Returns its status and its lines."""
    if not shutil.which("ctest"):
        pytest.skip("ctest is not on PATH")

    def run(c_tests: str, python_tests: str, *options: str, **changes: float) -> tuple[int, list[str]]:
        script = sandbox.folder / "scripts" / "run_tests.py"
        text = (ROOT / "scripts" / "run_tests.py").read_text()
        for name, value in changes.items():
            text, count = re.subn(f"(?m)^{name} = .*$", f"{name} = {value}", text)
            assert count == 1, name
        script.write_text(text)
        for path, text in (("build", c_tests), ("tests/python", python_tests)):
            (sandbox.folder / path).mkdir(parents=True, exist_ok=True)
            name = "CTestTestfile.cmake" if path == "build" else "test_it.py"
            (sandbox.folder / path / name).write_text(text)
        done = sandbox.run(sys.executable, "scripts/run_tests.py", *options, "build")
        assert not done.stderr
        return done.returncode, done.stdout.splitlines()

    return run


def test_run_tests(run_tests):
    status, lines = run_tests(C_TESTS, PYTHON_TESTS)
    assert status == 1
    counts = "C: 1 passed, 1 failed, 1 need a GPU; Python: 1 passed, 1 failed, 1 need a GPU, 1 skipped; "
    assert re.fullmatch(counts + r"(\d+ min )?\d+ s", lines[-1])
    assert "1 Python test skipped: could not import 'that'" in lines
    assert "what a C test said" in lines, "the output of a test that fails is shown"
    assert "what a Python test said" in lines
    assert "tests/python/test_it.py::test_bad FAILED" in lines
    assert not any("good" in line or "elsewhere" in line for line in lines), "no line for any other test"


def test_run_all_tests(run_tests):
    c_tests, python_tests = C_TESTS.replace("exit 1", "exit 0"), PYTHON_TESTS.replace("not ", "")
    status, lines = run_tests(c_tests, python_tests, "--all")
    assert status == 0
    assert lines[-1].startswith("C: 3 passed, 0 failed, 1 need a GPU; Python: 3 passed, 0 failed, 1 need")


def test_run_tests_says_how_far_they_are(run_tests):
    c_tests = "".join(f'add_test(test{i} sh -c "sleep 0.1")\n' for i in range(20))
    lines = run_tests(c_tests, "def test(): pass", REPORT_SECONDS=0.1)[1]
    assert any(re.match(r" +\d+ s: C \d+ of 20; Python [01] of [1?]$", line) for line in lines)


def test_run_tests_when_a_runner_breaks(run_tests):
    ends = "import os\ndef test(): os._exit(3)"
    status, lines = run_tests('add_test(good sh -c "exit 0")', ends, WORKERS=1)
    assert status == 1
    assert lines[-1].startswith("C: 1 passed, 0 failed; Python: 0 passed, 0 failed, and its runner failed; ")
    status, lines = run_tests('add_test(good sh -c "exit 0")', ends + "\ndef test_good(): pass", WORKERS=2)
    assert status == 1
    assert lines[-1].startswith("C: 1 passed, 0 failed; Python: 1 passed, 1 failed; ")
    status, lines = run_tests("", "def test(): pass")
    assert status == 1
    assert lines[-1].startswith("C: 0 passed, 0 failed, and its runner failed; Python: 1 passed, 0 failed; ")


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_run_tests_ends_what_waits_for_ever(run_tests, workers):
    c_tests = 'add_test(stuck sleep 1000)\nadd_test(good sh -c "exit 0")\n'
    python_tests = "import time\ndef test_stuck(): time.sleep(1000)\n"
    limits = {"STANDSTILL_SECONDS": 5, "STANDSTILL_PROCESSOR_SECONDS": 0.02}
    status, lines = run_tests(c_tests, python_tests, REPORT_SECONDS=0.1, WORKERS=workers, **limits)
    assert status == 1
    assert "C tests: nothing has moved for 5 s. They are ended." in lines
    assert "Python tests: nothing has moved for 5 s. They are ended." in lines
    assert any("test_it.py" in line and "in test_stuck" in line for line in lines), "where pytest was"
    failed = 0 if workers == 1 else 1  # a worker that ends fails its test
    counts = f"Python: 0 passed, {failed} failed, and its runner failed; "
    assert lines[-1].startswith(f"C: 1 passed, 1 failed, and its runner failed; {counts}")


def test_run_tests_leaves_a_runner_alone_that_has_ended(monkeypatch):
    """A runner that has ended and takes no processor time is not ended as one that stands still."""
    module = load("scripts/run_tests.py")
    now = iter(range(100, 10_000, 100))
    monkeypatch.setattr(module, "time", mock.Mock(monotonic=lambda: next(now), sleep=lambda seconds: None))
    monkeypatch.setattr(module, "show", lambda text: None)
    ended = mock.Mock(running=False, done=1, total=1, failed=[])
    ended.name = "Python"
    computing = mock.Mock(done=0, total=1, failed=[])
    computing.name = "C"
    # It is asked twice a round: whether any suite runs, and whether to look for a standstill.
    type(computing).running = mock.PropertyMock(side_effect=[True] * 20 + [False])
    module.wait([ended, computing], began=0)
    assert computing.end_if_stuck.call_count == 10
    assert not ended.end_if_stuck.called


@pytest.mark.parametrize(
    ("processor_seconds", "done", "ended"),
    [([9, 9, 9], [1, 1, 1], True), ([9, 12, 12], [1, 1, 1], False), ([9, 9, 9], [1, 2, 2], False)],
    ids=["nothing moves", "processor time moves", "a test ends"],
)
def test_what_counts_as_a_standstill(monkeypatch, processor_seconds, done, ended):
    """The suite is looked at after 0, 200 and 400 seconds. It may stand still for 300."""
    module = load("scripts/run_tests.py")
    suite = module.Suite.__new__(module.Suite)
    suite.process, suite.stuck, suite.end = mock.Mock(pid=1), False, mock.Mock()
    suite._moved_at, suite._had_then, suite._done_then = 0, 0.0, 0
    monkeypatch.setattr(module, "family", lambda process: [process])
    monkeypatch.setattr(module, "processor_seconds", lambda process: processor_seconds.pop(0))
    times = [0, 200, 400]
    monkeypatch.setattr(module, "time", mock.Mock(monotonic=lambda: times.pop(0)))
    for count in done:
        suite.done = count
        suite.end_if_stuck()
    assert suite.end.called == suite.stuck == ended


def test_sanitize(sandbox):
    sandbox.stub("cmake", "ninja", "ctest")
    done = sandbox.run("sh", "scripts/sanitize.sh", "address")
    assert done.returncode == 0, done.stderr
    configure, build, test = sandbox.calls()
    processors = sandbox.run("nproc").stdout.strip()
    assert "-B build-sanitize" in configure
    assert configure.endswith(
        "-DFLASH_KDA_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFLASH_KDA_SANITIZE=address,undefined"
    )
    assert build == "cmake --build build-sanitize"
    assert test == f"ctest --test-dir build-sanitize -j {processors} --output-on-failure --no-tests=error"
    assert sandbox.run("sh", "scripts/sanitize.sh", "address", fail="ctest").returncode == 1
    done = sandbox.run("sh", "scripts/sanitize.sh", "thread")
    assert done.returncode == 0, done.stderr
    configure, _, test = sandbox.calls()
    assert configure.endswith("-DFLASH_KDA_SANITIZE=thread")
    assert f"-DNVCC={sandbox.folder}/tests/pretend_nvcc/nvcc" in configure
    assert (ROOT / "tests" / "pretend_nvcc" / "nvcc").exists()
    assert test.startswith("ctest --test-dir build-thread ")
    assert sandbox.run("sh", "scripts/sanitize.sh", "nonsense").returncode == 2


def test_aarch64(sandbox):
    """The script builds and tests if qemu and the C library are there, and else says why not."""
    sandbox.stub("cmake", "ninja", "ctest", "apt-get", "qemu-aarch64")
    python = sandbox.stubs / "pretended-python"
    python.write_text('#!/bin/sh\n[ "$STUBS_THAT_FAIL" != pretended-python ] && echo /somewhere\n')
    python.chmod(0o755)
    done = sandbox.run("sh", "scripts/test_aarch64.sh", PYTHON="pretended-python")
    assert done.returncode == 0, done.stdout + done.stderr
    if done.stdout.startswith("aarch64: skipped, since qemu is missing"):
        return
    configure, build, test = (c for c in sandbox.calls() if c.startswith(("cmake", "ctest")))
    assert "--toolchain=cmake/manylinux.cmake -DFLASH_KDA_ZIG=/somewhere/zig" in configure
    assert "-DFLASH_KDA_ARCH=aarch64" in configure
    assert build.startswith("cmake --build build-aarch64 --target test_arguments ")
    assert test.startswith("ctest --test-dir build-aarch64 ")
    done = sandbox.run("sh", "scripts/test_aarch64.sh", PYTHON="pretended-python", fail="ctest")
    assert done.returncode == 1
    done = sandbox.run("sh", "scripts/test_aarch64.sh", PYTHON="pretended-python", fail="pretended-python")
    assert done.returncode == 0
    assert (
        done.stdout == "aarch64: skipped, since ziglang is missing (python3 scripts/environment.py wheel)\n"
    )


WHEEL_PYTHON = """\
#!/bin/sh
echo "$*" >>"$STUB_LOG"
case "$*" in
*"-m pip wheel"*) mkdir -p build-wheel/$WANTED-raw && echo 1 >build-wheel/$WANTED-raw/raw.whl ;;
*"auditwheel repair"*)
    mkdir -p build-wheel/$WANTED-raw/repaired
    head -c "$BYTES" /dev/zero >build-wheel/$WANTED-raw/repaired/it-manylinux_2_$NEEDS"_$WANTED.whl" ;;
*) echo /nowhere/zig ;;
esac
"""


def test_wheel(sandbox):
    python = sandbox.stubs / "pretended-python"
    python.write_text(WHEEL_PYTHON)
    python.chmod(0o755)
    run = ["sh", "scripts/wheel.sh"]
    settings = {"PYTHON": "pretended-python", "WANTED": "x86_64", "NEEDS": "28", "BYTES": "1000"}
    done = sandbox.run(*run, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("dist/it-manylinux_2_28_x86_64.whl: 1000 bytes\n")
    build, tags, repair = (call for call in sandbox.calls() if call.startswith("-m"))
    assert f"cmake.args=--toolchain={sandbox.folder}/cmake/manylinux.cmake" in build
    assert (ROOT / "cmake" / "manylinux.cmake").exists()
    assert tags.startswith("-m wheel tags --remove --platform-tag linux_x86_64 ")
    assert "repair --plat auto" in repair
    done = sandbox.run(*run, "aarch64", **{**settings, "WANTED": "aarch64"})
    assert done.returncode == 0, done.stderr
    assert "FLASH_KDA_ARCH=aarch64" in sandbox.log.read_text()
    done = sandbox.run(*run, **{**settings, "BYTES": "20000001"})
    assert done.returncode == 1, "a wheel that is too large"
    assert "has 20000001 bytes, at most 20000000" in done.stdout
    done = sandbox.run(*run, **{**settings, "NEEDS": "34"})
    assert done.returncode == 1, "a wheel that needs a newer C library"
    assert "is not for every Linux with glibc 2.28" in done.stdout


FUZZER = """\
#!/bin/sh
echo "#7 DONE cov: 31 ft: 50"
echo "stat::number_of_executed_units: 1234"
case " $STUBS_THAT_FAIL " in *" $(basename "$0") "*) exit 1 ;; esac
"""


def fuzzers(sandbox):
    sandbox.stub("cmake", "ninja", "clang")
    for name in ("call", "bwd", "decode", "file", "command", "plan"):
        assert (ROOT / "tests" / "fuzz" / f"fuzz_{name}.c").exists()
        program = sandbox.folder / "build-fuzz" / "tests" / "fuzz" / f"fuzz_{name}"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(FUZZER)
        program.chmod(0o755)


def test_fuzz(sandbox):
    fuzzers(sandbox)
    done = sandbox.run("sh", "scripts/fuzz.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("fuzz: ")]
    names = ("call", "bwd", "decode", "file", "command", "plan")
    assert said == [f"fuzz: {name}: 1234 inputs, coverage 31" for name in names]
    done = sandbox.run("sh", "scripts/fuzz.sh", "plan", fail="fuzz_plan")
    assert done.returncode == 1
    assert "fuzz: plan: 1234 inputs, coverage 31, FAILED" in done.stdout
    done = sandbox.run("sh", "scripts/fuzz.sh", fail="clang")
    assert done.returncode == 0
    assert done.stdout.startswith("fuzz: skipped, since clang cannot link libFuzzer")


def test_all_the_tests(sandbox):
    fuzzers(sandbox)
    sandbox.stub("ctest")
    python = sandbox.stubs / "pretended-python"
    python.write_text(STUB.replace("exit 0", "echo 'C: 2 passed; Python: 12 passed; 3 s'"))
    python.chmod(0o755)
    counts = sandbox.folder / "build" / "Testing" / "Temporary" / "LastTest.log"
    counts.parent.mkdir(parents=True)
    counts.write_text("  alignment   120 checks   0.1 s\n  sizes      3 checks   0.1 s\n45 inputs\n")
    settings = {"BUILD": "build", "PYTHON": "pretended-python"}
    done = sandbox.run("sh", "scripts/test_all.sh", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout[done.stdout.index("== cases") :].splitlines()
    assert last[1].endswith(" C: 2 passed; Python: 12 passed; 3 s; 123 checks, 45 inputs of corpora")
    assert last[-1] == "all passed"
    steps = ("tests", "address", "thread", "aarch64", "pythons", "fuzz")
    assert re.fullmatch(f"seconds: {', '.join(f'{step} [0-9]+' for step in steps)}", last[-2])
    assert sum(line.startswith("fuzz: ") for line in last) == 6
    done = sandbox.run("sh", "scripts/test_all.sh", fail="ctest pretended-python", **settings)
    assert done.returncode == 1
    failed = done.stdout.splitlines()[-1].replace(" aarch64", "")  # which may be skipped
    assert failed == "failed: tests address thread pythons"


def test_every_python(sandbox):
    """The environments are there already, so nothing is installed. The machine may have more versions."""
    sandbox.stub("python3.9", "python3.12")
    for minor in range(9, 15):
        sandbox.stub("python", into=sandbox.folder / "build" / "pythons" / f"3.{minor}" / "bin")
    command = [sys.executable, "scripts/test_pythons.py", "build", "--all"]
    home = str(sandbox.folder)
    done = sandbox.run(*command, HOME=home)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("pythons: passed 3.9 ")
    assert " 3.12" in last
    assert "failed none" in last
    done = sandbox.run(*command, HOME=home, fail="python")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("pythons: passed none; failed 3.9 ")


def test_lint(sandbox):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    sandbox.stub("clang-format", "clang-tidy", "ruff", "mypy")
    (sandbox.folder / "a.c").write_text("int a;\n")
    (sandbox.folder / "b.cu").write_text("int b;\n")
    (sandbox.folder / "build").mkdir()
    (sandbox.folder / "build" / "compile_commands.json").write_text(f'"file": "{sandbox.folder}/a.c"\n')
    (sandbox.folder / ".gitignore").write_text("/build/\n/stubs/\n/scripts/\n/.ci/\n*.log\n")
    subprocess.run(["git", "init", "-q"], cwd=sandbox.folder, check=True)
    done = sandbox.run("sh", "scripts/lint.sh", BUILD="build")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * 6
    assert sandbox.calls() == [
        "clang-format --dry-run -Werror a.c b.cu",
        "clang-tidy -p build --quiet a.c",
        "ruff check --quiet .",
        "ruff format --quiet --check .",
        "mypy ",
    ]
    for tool in ("clang-format", "clang-tidy", "ruff", "mypy"):
        done = sandbox.run("sh", "scripts/lint.sh", fail=tool, BUILD="build")
        assert done.returncode == 1
        assert "FAILED" in done.stdout
        said = [line.split()[0] for line in done.stdout.splitlines() if line]
        failures = 2 if tool == "ruff" else 1  # ruff checks and formats
        assert sorted(said) == ["FAILED"] * failures + ["ok"] * (6 - failures), "the other linters run too"
    (sandbox.folder / "a.c").write_text(f"/* {'long ' * 30} */\n")
    done = sandbox.run("sh", "scripts/lint.sh", BUILD="build")
    assert done.returncode == 1
    assert "a.c:1: 156 columns, at most 110" in done.stdout


def test_gpu(sandbox):
    sandbox.stub("nvidia-smi", "cmake", "ninja", "ctest", "compute-sanitizer", "pretended-python")
    sandbox.stub("flash-kda", into=sandbox.folder / "build-gpu")
    done = sandbox.run("sh", "scripts/gpu.sh", PYTHON="pretended-python")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall("^== (.*)$", done.stdout, re.MULTILINE) == [
        "build",
        "check",
        "tests",
        "sanitizers",
        "bench",
    ]
    assert done.stdout.endswith("\nall passed\n")
    calls = sandbox.calls()
    configured = [call for call in calls if call.startswith("cmake -S")]
    assert ["-DFLASH_KDA_CUDA_ARCHS=90" in call for call in configured] == [True, True]
    assert "-DFKDA_FOR_RACECHECK" in configured[1]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        folder = "build-gpu-racecheck" if tool == "racecheck" else "build-gpu"
        mine = [call for call in calls if call.startswith(f"compute-sanitizer --tool {tool} ")]
        assert [call.split()[5] for call in mine] == [
            *[f"{folder}/tests/test_forward"] * 3,  # cut auto, always, mixed
            f"{folder}/tests/test_segments",
            f"{folder}/flash-kda",
            f"{folder}/flash-kda",
        ]


def test_gpu_names_what_there_is(sandbox):
    """The groups, scripts and options that gpu.sh gives to other programs are theirs."""
    sandbox.stub("nvidia-smi", "cmake", "ninja", "ctest", "compute-sanitizer", "pretended-python")
    sandbox.stub("flash-kda", into=sandbox.folder / "build-gpu")
    done = sandbox.run("sh", "scripts/gpu.sh", "sanitizers", "bench", "pictures", PYTHON="pretended-python")
    assert done.returncode == 0, done.stdout + done.stderr
    for call in sandbox.calls():
        words = call.split()
        for program in ("test_forward", "test_segments"):
            if any(word.endswith(f"tests/{program}") for word in words):
                source = (ROOT / "tests" / "c" / f"{program}.c").read_text()
                names = words[words.index("--quick") + 1 :]
                values = [i + 1 for i, word in enumerate(names) if word in ("--kernel", "--cut")]
                groups = [n for i, n in enumerate(names) if not n.startswith("--") and i not in values]
                assert groups
                assert all(f'{{"{group}", ' in source for group in groups)
        if words[0] == "pretended-python":
            assert (ROOT / words[1]).exists()
        if words[1].endswith("peers.py"):
            sys.path.insert(0, str(ROOT / "benchmarks"))
            with mock.patch("os.path.isdir", return_value=True):
                load("benchmarks/peers.py").arguments(words[2:])


def test_gpu_says_which_step_failed(sandbox):
    sandbox.stub("ctest", "pretended-python")
    done = sandbox.run("sh", "scripts/gpu.sh", "check", "tests", PYTHON="pretended-python")
    assert done.returncode == 1
    assert done.stdout.endswith("\nfailed: check\n"), "there is no flash-kda, but the tests run"
    assert sandbox.calls()[-1] == "pretended-python -m pytest tests/python -q -rs"
    done = sandbox.run("sh", "scripts/gpu.sh", "tests", fail="ctest", PYTHON="pretended-python")
    assert done.stdout.endswith("\nfailed: tests\n")


def test_ci_runs_every_section(sandbox):
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    sandbox.stub("make")
    sandbox.stub("python", into=sandbox.folder / ".venv" / "bin")
    sandbox.stub("python", "flash-kda", into=sandbox.folder / "build-wheel-test" / "bin")
    # The section of the wheel removes its folder and makes it anew, which the stub of venv does not do.
    done = sandbox.run("bash", ".ci/run")
    assert done.returncode == 1
    assert "sections: 5 passed, 1 failed" in done.stdout
    makes = [call.split()[1] for call in sandbox.calls() if call.startswith("make ")]
    assert makes == ["run", "test-all", "kernels", "lint", "docs", "wheel"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in makes)
    assert "sections: 0 passed, 6 failed" in sandbox.run("bash", ".ci/run", fail="make").stdout


def test_make_knows_its_targets():
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)
        assert target == "help" or f"make {target} " in listed


def test_environment(sandbox):
    if not shutil.which(os.environ.get("CC", "cc")):
        pytest.skip("there is no C compiler")
    sandbox.stub("python", into=sandbox.folder / ".venv" / "bin")
    script = [sys.executable, "scripts/environment.py"]
    assert "usage: " in sandbox.run(*script).stderr
    assert "usage: " in sandbox.run(*script, "nonsense").stderr
    done = sandbox.run(*script, "build")
    assert done.returncode == 0, done.stdout + done.stderr
    assert any("pip install" in call and "--no-index" in call for call in sandbox.calls())
    assert (sandbox.folder / ".venv" / "installed-build").exists()
    assert sandbox.run(*script, "build").returncode == 0
    assert sandbox.calls() == ["python -m pip --version"], "a satisfied group costs nothing"
    groups = load("scripts/environment.py").GROUPS
    assert all((ROOT / path).exists() for path in groups.values())


def test_environment_without_a_network(sandbox):
    """pip fails: the machine's own cmake and ninja serve if they are new enough."""
    if not shutil.which(os.environ.get("CC", "cc")):
        pytest.skip("there is no C compiler")
    sandbox.stub("ninja")
    python = sandbox.folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$3" = --version ]\n')
    python.chmod(0o755)
    cmake = sandbox.stubs / "cmake"
    script = [sys.executable, "scripts/environment.py", "build"]
    for version, status in (("3.20.9", 1), ("3.21.0", 0)):
        cmake.write_text(f"#!/bin/sh\necho cmake version {version}\n")
        cmake.chmod(0o755)
        done = sandbox.run(*script)
        assert done.returncode == status, done.stdout + done.stderr
    assert (sandbox.folder / ".venv" / "bin" / "cmake").resolve() == cmake.resolve()


def test_long_lines_are_found(tmp_path):
    script = load("scripts/check_lines.py")
    url = f"https://example.org/{'x' * 120}"
    fits, long = "x" * 110, "x " * 56
    assert script.long_lines("a.c", f"{fits}\n{long}\n\t{'x' * 103}\n") == [(2, 112), (3, 111)]
    for line in (url, f" * {url}", f"# {url}", f"- <{url}>", f"url: {url}"):
        assert script.long_lines("a.md", line) == [], "a URL has no place to break"
    assert script.long_lines("a.md", f"long words before {url}") != []
    row = f"| {long} |"
    assert script.long_lines("README.md", row) != []
    assert script.long_lines("BENCHMARK_H200.md", row) == []
    assert script.long_lines("BENCHMARK_H200.md", long) != []
    for path in ("a.c", "kernels/x.cuh", "CMakeLists.txt", "tests/CMakeLists.txt", "docs/a.md", ".ci/run"):
        assert script.is_written(path)
    for path in ("data/x.safetensors", "docs/a.svg", "docs/a.json", "docs/a.png"):
        assert not script.is_written(path)
    file = tmp_path / "a.c"
    file.write_text(f"{long}\n")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_lines.py", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == f"{file}:1: 112 columns, at most 110\n"


CHECKED = """\
cpu: Some CPU with a name that leaves no room, x86-64 avx512, 2 threads, 25 GB,
    kernel cpu
  relative RMS error               output   at most      state   at most
  random                        1.670e-03 2.200e-03  1.900e-08 1.000e-05  ok
  zero queries                  0.000e+00 2.200e-03  1.170e-07 1.000e-05  ok
  recorded, first layer         1.700e-03 2.200e-03  2.110e-07 1.000e-05  ok
  recorded, last layer          1.680e-03 2.200e-03  5.660e-07 1.000e-05  ok

cuda:0: NVIDIA H200, sm_90, 132 SMs, 150 GB, kernel hopper
  relative RMS error               output   at most      state   at most
  random                        9.674e-03 5.145e-03  8.600e-05 3.000e-03  FAILED
  zero queries                  0.000e+00 5.600e-03  1.170e-05 4.800e-03  ok

1 of 6 checks failed.
"""


@pytest.fixture
def pyplot(monkeypatch):
    """Matplotlib where it is installed, else a stand-in that takes every call."""
    if importlib.util.find_spec("matplotlib"):
        return
    package = mock.MagicMock()
    package.pyplot.subplots.return_value = (mock.MagicMock(), [mock.MagicMock(), mock.MagicMock()])
    package.pyplot.subplots.return_value[0].savefig = lambda path, dpi: Path(path).write_text("drawn")
    for name in ("matplotlib", "matplotlib.pyplot", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, name, package if name == "matplotlib" else mock.MagicMock())


def test_plot_accuracy(pyplot, tmp_path, capsys):
    script = load("scripts/plot_accuracy.py")
    printed, picture = tmp_path / "check.txt", tmp_path / "accuracy.png"
    printed.write_text(CHECKED)
    script.main([str(picture), "--from", str(printed)])
    assert picture.stat().st_size > 0
    head, _, random, *_, recorded = capsys.readouterr().out.splitlines()
    assert head == "| inputs | H200 | at most on a GPU | CPU | at most on a CPU |"
    assert random == "| random | 9.674e-3 / 8.6e-5 | 5.145e-3 / 3e-3 | 1.67e-3 / 1.9e-8 | 2.2e-3 / 1e-5 |"
    assert recorded.endswith("two layers) |  /  |  /  | 1.7e-3 / 5.66e-7 | 2.2e-3 / 1e-5 |")
    assert [d.line.split(":")[0] for d in script.parse(CHECKED)] == ["cpu", "cuda"]
    assert script.parse(CHECKED)[0].line.endswith("25 GB, kernel cpu")
    script.main([str(picture), "--from", str(printed), "--device", "cpu"])
    assert "H200" not in capsys.readouterr().out
    for argv in (
        ["--from", str(printed), "--device", "cuda:1"],
        ["--from", str(ROOT / "README.md")],
        ["--kernel", "cpu"],
    ):
        with pytest.raises(SystemExit):
            script.main([str(picture), *argv])


def test_plot_accuracy_asks_the_command(pyplot, tmp_path):
    script = load("scripts/plot_accuracy.py")
    command, printed = tmp_path / "flash-kda", tmp_path / "check.txt"
    printed.write_text(CHECKED)
    command.write_text(f'#!/bin/sh\necho "$*" >{tmp_path}/asked\ncat {printed}\nexit 1\n')
    command.chmod(0o755)
    picture = [str(tmp_path / "a.png"), "--command", str(command)]
    script.main([*picture, "--device", "cuda:0", "--kernel", "portable"])
    assert (tmp_path / "asked").read_text() == "check --device cuda:0 --kernel portable\n"
    script.main(picture)
    assert (tmp_path / "asked").read_text() == "check\n"
    command.write_text("#!/bin/sh\nexit 2\n")
    with pytest.raises(SystemExit, match="failed with status 2"):
        script.main(picture)


def test_check_kernels_of_a_folder(tmp_path):
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    script = [sys.executable, ROOT / "scripts" / "check_kernels.py", tmp_path]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0
    assert "there is nothing to check" in done.stdout
    (tmp_path / "a.report").write_text("no kernel\n")
    # Without a disassembler on PATH, the report alone is judged.
    environment = os.environ | {"PATH": "/nonexistent", "CUDA_HOME": "/nonexistent"}
    code = "import sys; sys.prefix = '/nonexistent'; sys.argv = sys.argv[1:]; import runpy; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, *script[1:]], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "the machine code was not looked at" in done.stdout
    assert "a.report: no kernel in it" in done.stdout
