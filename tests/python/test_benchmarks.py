"""benchmarks/peers.py, the benchmark beside other implementations. All but its graphs runs without a GPU."""

import inspect
import json
import math
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import flash_kda

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import peers  # noqa: E402
from peer_timing import competitors, picture, race, report, shapes, tuning  # noqa: E402


def test_shapes():
    assert shapes.parse("96:8192") == (96, [8192])
    assert shapes.parse("2:5,70x2,1") == (2, [5, 70, 70, 1])
    assert shapes.label("12:2048x4") == ("2048 x 4", "12")
    assert len(shapes.KNOWN) == 26
    for shape in shapes.KNOWN:
        shapes.parse(shape)
    assert (shapes.SERVING[0], shapes.SERVING[-1], len(shapes.SERVING)) == ("12:2048", "16:2048x8", 10)


@pytest.mark.parametrize(
    "shape", ["", "8192", "8192:", ":8192", "0:16", "1:0", "1:16x", "1:16,", "a:16", "1:16x0", "1: 16"]
)
def test_shapes_that_are_none(shape):
    with pytest.raises(ValueError, match=re.escape(f"shape {shape!r}: it must be HEADS:LENGTHS")):
        shapes.parse(shape)


# Milliseconds at 3.0 TB/s, worked out elsewhere.
@pytest.mark.parametrize(
    ("shape", "floor"),
    [("96:8192", 0.340), ("96:1300,547,2048,963,271,3063", 0.361), ("12:16x256", 0.155), ("1:262144", 0.112)],
)
def test_floor(shape, floor):
    assert 1e3 * shapes.bytes_once(shape, "fp32") / 3e12 == pytest.approx(floor, rel=0.01)


@pytest.mark.parametrize("states", ["fp32", "bf16", "none"])
def test_inputs_have_the_bytes_of_the_floor(states):
    torch = pytest.importorskip("torch")
    from peer_timing import inputs

    (x,) = inputs.make_sets("2:5,3", "mixed", states, "cpu")
    (again,) = inputs.make_sets("2:5,3", "mixed", states, "cpu")
    size = {name: t.numel() * t.element_size() for name, t in x.items() if isinstance(t, torch.Tensor)}
    moved = sum(size[name] for name in ("q", "k", "v", "g", "beta")) + size["v"]
    assert moved + 2 * size.get("initial_state", 0) == shapes.bytes_once("2:5,3", states)
    assert all(torch.equal(x[name], again[name]) for name in size)
    assert x["cu_seqlens"].tolist() == [0, 5, 8]


def test_gates_forget_as_they_say():
    torch = pytest.importorskip("torch")
    from peer_timing import inputs

    def nats(gates):
        """Forgotten a token, on average, by the slowest and by the fastest channel of a head."""
        x = inputs.make("2:256", gates, "none", "cpu", 0)
        decay = -x["lower_bound"] * torch.sigmoid(x["A_log"].exp()[:, None] * (x["g"].float() + x["dt_bias"]))
        by_channel = decay.mean(1)
        return by_channel.min(), by_channel.max()

    assert nats("mixed")[0] < 1e-3
    assert nats("mixed")[1] > 3
    assert nats("slow")[1] < 0.05
    assert nats("fast")[0] > 3


def made_up_run(**changes):
    run = {
        "command": "python benchmarks/peers.py",
        "date": "2026-01-02",
        "commit": "abc",
        "device": "NVIDIA H100",
    }
    run |= {"driver": "580.1", "cuda": "13.0", "torch": "2.11.0", "python": "3.12.0", "rounds": 3}
    run |= {"gates": "mixed", "states": "fp32", "copy_bytes_per_second": 3e12}
    return run | {"competitors": {"flash_kda": "0.1.0", "FLA": "0.6.0"}} | changes


def made_up_row(shape="96:8192", floor=0.34, left_out=None, rms=None, **times):
    """times: of each competitor, graph replay in every round."""
    row = {"shape": shape, "gates": "mixed", "states": "fp32", "bytes": 10, "floor_ms": floor}
    figures = {name: {"graph_ms": ms, "plain_ms": [t + 1 for t in ms]} for name, ms in times.items()}
    return row | {"times": figures, "rms": rms or {}, "left_out": left_out or {}}


@pytest.fixture
def result():
    first = made_up_row(flash_kda=[0.50, 0.51, 0.61], FLA=[3.2, 3.1, 3.3])
    second = made_up_row(
        "12:2048", 0.011, {"FLA": "the time limit came first (600 s)"}, flash_kda=[0.06, 0.0604, 0.06]
    )
    return {"runs": [made_up_run()], "rows": [first, second]}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table(result):
    head, rule, first, second = report.table(result).splitlines()
    names = "lengths, H, floor, flash_kda, x floor, spread, at most, FLA, FlashKDA*"
    assert cells(head) == names.split(", ")
    assert cells(rule) == ["---"] * 9
    assert cells(first) == ["8192", "96", "0.340", "0.510", "1.50", "21.6%", "0.550", "3.200", "1.486"]
    assert cells(second) == ["2048", "12", "0.0110", "0.0600", "5.45", "0.7%", "0.0550", "", "0.236"]


def test_table_of_plain_calls(result):
    head, rule, first, second = report.plain_table(result).splitlines()
    assert cells(head) == ["lengths", "H", "flash_kda", "FLA"]
    assert cells(rule) == ["---"] * 4
    assert cells(first) == ["8192", "96", "1.510", "4.200"]
    assert cells(second) == ["2048", "12", "1.060", ""]
    for row in result["rows"]:
        for times in row["times"].values():
            del times["graph_ms"]
    assert report.plain_table(result) == "", "the first table has these times already"


def test_remarks(result):
    said = " ".join(report.remarks(result))
    assert "flash_kda is within `at most` in 1 of 2 rows, over it in: 2048, H 12 (1.09 of it)." in said
    assert "FLA is left out of 2048, H 12: the time limit came first (600 s)." in said
    assert "of any competitor, (slowest - fastest round) / median, is 21.6%" in said
    assert "at the rate of a large copy in the same run: 3.000 TB/s" in said
    assert "flash_kda takes 0.159 of the time of FLA in the geometric mean of 1 rows" in said
    assert "while all other figures" not in said
    assert "Geometric mean" not in said
    assert "do not agree" not in said


def test_another_gpu_is_named_beside_the_figures_of_an_h100(result):
    result["runs"][0]["device"] = "NVIDIA H200"
    said = " ".join(report.remarks(result))
    assert "hold for an H100 SXM and fp32 states, while all other figures are of the NVIDIA H200." in said


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA GeForce RTX 4090", "4090")],
)
def test_short_name(device, name):
    assert report.short_name(device) == name


def test_a_build_beside_an_older_one():
    rows = [
        made_up_row("96:8192", flash_kda=[0.5], before=[0.5]),
        made_up_row("12:2048", flash_kda=[0.06], before=[0.05]),
        made_up_row("8:4096", flash_kda=[0.06]),
    ]
    made_up = {"runs": [made_up_run(competitors={"flash_kda": "1", "before": "1"})], "rows": rows}
    assert (
        "flash_kda takes 1.095 of the time of before in the geometric mean of 2 rows, "
        "from 1.000 (8192, H 96) to 1.200 (2048, H 12)."
    ) in " ".join(report.remarks(made_up))


def test_bars_are_for_fp32_states_on_a_gpu(result):
    for row in result["rows"]:
        row["states"] = "bf16"
    assert "at most" not in report.table(result) + " ".join(report.remarks(result))


def test_geometric_mean():
    rows = [made_up_row(shape, flash_kda=[0.02 if i % 2 else 0.08]) for i, shape in enumerate(shapes.SERVING)]
    said = " ".join(report.remarks({"runs": [made_up_run()], "rows": rows}))
    assert (
        "10 shapes from `2048, H 12` to `2048 x 8, H 16`, mixed gates, fp32 states: flash_kda 0.0400 ms."
        in said
    )


@pytest.mark.parametrize(
    ("other", "agrees"), [([1.0, 2.01], True), ([1.0, 2.1], False), ([math.nan, 2.0], False)]
)
def test_competitors_that_compute_something_else_are_named(other, agrees):
    row = made_up_row(flash_kda=[1.0], FLA=[2.0], rms={"flash_kda": [1.0, 2.0], "FLA": other})
    said = " ".join(report.remarks({"runs": [made_up_run()], "rows": [row]}))
    assert ("FLA and flash_kda do not agree on 8192, H 96" in said) is not agrees


def test_merge(result):
    later = made_up_row("12:2048", 0.0112, FLA=[0.2, 0.2, 0.2])
    other_gates = dict(made_up_row("12:2048", flash_kda=[0.07]), gates="slow")
    merged = report.merge([result, {"runs": [made_up_run(gates="slow")], "rows": [later, other_gates]}])
    assert len(merged["runs"]) == 2
    assert [(row["shape"], row["gates"]) for row in merged["rows"]] == [
        ("96:8192", "mixed"),
        ("12:2048", "mixed"),
        ("12:2048", "slow"),
    ]
    assert merged["rows"][1]["times"].keys() == {"flash_kda", "FLA"}
    assert merged["rows"][1]["left_out"] == {}
    assert result["rows"][1]["left_out"], "the parts stay as they were"
    assert [cells(line)[2] for line in report.table(merged).splitlines()] == [
        "gates",
        "---",
        "mixed",
        "mixed",
        "slow",
    ]
    with pytest.raises(ValueError, match="different devices: NVIDIA H100, NVIDIA H200"):
        report.merge([result, {"runs": [made_up_run(device="NVIDIA H200")], "rows": []}])


def test_from_json(result, tmp_path, capsys):
    one, two, page = (str(tmp_path / name) for name in ("one.json", "two.json", "page.md"))
    report.write(result, one)
    assert report.load([one]) == result
    assert peers.main(["--from-json", one, "--json", two, "--markdown", page]) == 0
    assert json.loads(Path(two).read_text()) == result
    assert report.table(result) in capsys.readouterr().out
    text = Path(page).read_text()
    assert text.startswith("# flash_kda on NVIDIA H100\n")
    assert report.table(result) in text
    assert report.plain_table(result) in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 110
    text = " ".join(text.split("\n"))
    assert "    python benchmarks/peers.py  " in text
    assert (
        "driver 580.1, CUDA 13.0, PyTorch 2.11.0, Python 3.12.0, flash_kda 0.1.0, FLA 0.6.0, commit abc"
        in text
    )
    assert "copy rate 3.000 TB/s" in text
    assert "![" not in text


def test_publish(result, tmp_path):
    pytest.importorskip("matplotlib")
    one = str(tmp_path / "one.json")
    result["runs"][0]["device"] = "NVIDIA H200"
    report.write(result, one)
    (tmp_path / "docs").mkdir()
    assert peers.main(["--from-json", one, "--publish", str(tmp_path)]) == 0
    page = (tmp_path / "BENCHMARK_H200.md").read_text()
    assert page.startswith("# flash_kda on NVIDIA H200\n")
    assert "](docs/benchmark_h200.svg)" in page
    assert "<svg" in (tmp_path / "docs" / "benchmark_h200.svg").read_text()
    assert json.loads((tmp_path / "docs" / "benchmark_h200.json").read_text()) == result


def test_a_long_command_is_continued():
    run = made_up_run(command="python benchmarks/peers.py --shapes " + " ".join(shapes.KNOWN))
    page = report.markdown({"runs": [run], "rows": [made_up_row(flash_kda=[1.0])]}, None, "")
    lines = page[page.index("    python") :].split("\n\n")[0].splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 110
    assert [line.endswith(" \\") for line in lines] == [True] * (len(lines) - 1) + [False]
    assert "".join(lines).replace("\\", "").split() == run["command"].split()


def test_picture(result, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "docs" / "times.svg"
    file.parent.mkdir()
    picture.draw(result, str(file))
    assert "<svg" in file.read_text()
    page = report.markdown(result, str(file), str(tmp_path))
    assert "](docs/times.svg)" in page


def test_curve(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [made_up_row(f"{heads}:{tokens}", flash_kda=[0.1]) for heads in (1, 8) for tokens in (1024, 2048)]
    file = tmp_path / "curve.svg"
    made_up = {"runs": [made_up_run()], "rows": [*rows, made_up_row("8:1024x8", flash_kda=[0.1])]}
    picture.curve(made_up, str(file))
    assert "<svg" in file.read_text()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--kernel", "a", "--kernel", "a"], "argument --kernel: the same one twice"),
        (["--kernel", "hopper:some"], "argument --kernel: 'hopper:some' is not KERNEL or KERNEL:CUT"),
        (["--kernel", ":never"], "argument --kernel: ':never' is not KERNEL or KERNEL:CUT"),
        (["--kernel", "a", "--peer", "a=."], "argument --peer: the name a is a kernel's"),
        (["--publish", "no/such"], "argument --publish: "),
        (["--publish", "--json", "a.json"], "argument --publish: "),
        (["--shapes", "8192"], "argument --shapes: shape '8192': it must be HEADS:LENGTHS"),
        (["--fla-shapes", "some"], "argument --fla-shapes: shape 'some': it must be HEADS:LENGTHS"),
        (["--gates", "none"], "argument --gates: invalid choice"),
        (["--rounds", "0"], "argument --rounds: '0' is not a positive number"),
        (["--peer", "elsewhere"], "argument --peer: 'elsewhere' is not NAME=PATH"),
        (["--peer", "FLA=."], "argument --peer: the name FLA is taken"),
        (["--peer", "a=no/such"], "argument --peer: no/such is neither a folder nor a .py file"),
        (["--peer", "a=.", "--peer", "a=.."], "argument --peer: two peers have the same name"),
        (["--json", "no/such/x.json"], "there is no folder for no/such/x.json"),
        (["--from-json", "no/such.json"], "no/such.json cannot be read: No such file or directory"),
        (["--from-json", __file__], "is not a result of this benchmark"),
    ],
)
def test_wrong_arguments(argv, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        peers.main(argv)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


PEER = """
import os, time, flash_kda
__version__ = "1.2.3"
def fwd(q, k, v, g, beta, scale, out, *rest, **options):
    print("this must not reach the answers")
    tokens = q.shape[1]
    if tokens == 17: raise ValueError("17 tokens\\nare too many")
    if tokens == 18: os._exit(3)
    if tokens == 19: time.sleep(60)
    flash_kda.fwd(q, k, v, g, beta, scale, out, *rest, **options)
"""


@pytest.fixture
def peer_file(tmp_path):
    pytest.importorskip("torch")
    file = tmp_path / "peer.py"
    file.write_text(PEER)
    return str(file)


def run(*argv):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "peers.py"), *argv], capture_output=True, text=True
    )


@pytest.mark.slow
def test_kernels_beside_each_other(tmp_path):
    pytest.importorskip("torch")
    file = str(tmp_path / "result.json")
    kernels = ["--kernel", "cpu", "--kernel", "cpu-portable", "--kernel", "none", "--kernel", "cpu:always"]
    done = run("--device", "cpu", "--shapes", "1:16", *kernels, "--rounds", "2", "--json", file)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(Path(file).read_text())["rows"]
    named = {"flash_kda", "cpu-portable"}
    if "cut" in inspect.signature(flash_kda.fwd).parameters:
        named.add("cpu:always")
    assert row["times"].keys() == named
    assert "none" in row["left_out"]["none"]


def test_kernel_and_cut_reach_the_call(monkeypatch):
    """An argument that was not asked for is not passed, so that a build without it can be timed."""
    pytest.importorskip("torch")
    passed = []
    package = types.SimpleNamespace(fwd=lambda **given: passed.append(given), __version__="1")
    monkeypatch.setattr(competitors, "_load_peer", lambda path: package)
    for asked in ({}, {"kernel": "hopper", "cut": None}, {"kernel": "hopper", "cut": "never"}):
        competitor, _ = competitors.load({"kind": "path", "path": "x", **asked})
        competitor({"v": torch_zeros()})()
    assert [{k: v for k, v in given.items() if k in ("kernel", "cut")} for given in passed] == [
        {},
        {"kernel": "hopper"},
        {"kernel": "hopper", "cut": "never"},
    ]


def torch_zeros():
    import torch

    return torch.zeros(1)


def test_a_run_on_the_cpu(peer_file, tmp_path):
    file = str(tmp_path / "result.json")
    names = ["--shapes", "1:16", "2:5,4", "--peer", f"other={peer_file}", "--rounds", "3"]
    done = run("--device", "cpu", *names, "--states", "bf16", "--commit", "abc", "--json", file)
    assert done.returncode == 0, done.stderr
    result = json.loads(Path(file).read_text())
    (about,) = result["runs"]
    assert about["competitors"]["other"] == "1.2.3"
    assert about["commit"] == "abc"
    assert about["command"].startswith(
        "python benchmarks/peers.py --device cpu --shapes 1:16 2:5,4 --peer other="
    )
    assert [row["shape"] for row in result["rows"]] == ["1:16", "2:5,4"]
    for row in result["rows"]:
        assert row["left_out"] == {}
        assert row["rms"]["other"] == row["rms"]["flash_kda"], "not the same inputs"
        assert (
            row["floor_ms"] == 1e3 * shapes.bytes_once(row["shape"], "bf16") / about["copy_bytes_per_second"]
        )
        for figures in row["times"].values():
            assert figures.keys() == {"plain_ms"}
            assert len(figures["plain_ms"]) == 3
            assert min(figures["plain_ms"]) > 0
    assert report.table(result) in done.stdout


@pytest.mark.slow
def test_who_fails_is_left_out_and_may_come_back(peer_file):
    said = []
    odd = race.Competitor("odd", {"kind": "path", "path": peer_file, "device": "cpu"})
    fine = race.Competitor("fine", {"kind": "flash_kda", "device": "cpu"}, only=["1:16", "1:17", "1:19"])
    contest = race.Race([fine, odd], "mixed", "none", 1, said.append, lambda text: None)
    try:
        contest.start()
        rows = {shape: contest.shape(shape, 1e9) for shape in ("1:17", "1:18", "1:16")}
        odd.limit = time.monotonic() - contest.began + 0.5
        rows["1:19"] = contest.shape("1:19", 1e9)
    finally:
        contest.stop()
    assert rows["1:17"]["left_out"] == {"odd": "ValueError: 17 tokens"}
    assert rows["1:18"]["left_out"] == {"odd": "its process ended with 3"}
    assert rows["1:19"]["left_out"]["odd"].startswith("the time limit came first (")
    assert [row["times"].keys() for row in rows.values()] == [{"fine"}, set(), {"fine", "odd"}, {"fine"}]
    assert len(said) == 3
    assert all(text.startswith("odd is left out of 1:1") for text in said)


@pytest.mark.slow
def test_a_peer_without_fwd(tmp_path):
    (tmp_path / "empty.py").write_text("")
    for path, sentence in (
        (tmp_path / "empty.py", f"x: ImportError: {tmp_path}/empty.py defines no fwd"),
        (tmp_path, f"x: ImportError: {tmp_path} holds no package flash_kda"),
    ):
        pytest.importorskip("torch")  # ours is asked first
        done = run("--device", "cpu", "--peer", f"x={path}")
        assert done.returncode == 2
        assert sentence in done.stderr


def test_no_gpu():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("--fla-shapes", "none")
    assert done.returncode == 2
    assert "PyTorch can use no GPU here" in done.stderr


def test_fla_tunes_once(monkeypatch):
    """After its first run a kernel has the one configuration that was best then."""

    class Autotuner:
        def __init__(self):
            self.configs, self.best_config = ["small", "large"], None

        def run(self, best):
            self.best_config = best if len(self.configs) > 1 else self.configs[0]
            return f"ran {self.best_config}"

    for name in ("triton", "triton.runtime", "triton.runtime.autotuner"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["triton.runtime.autotuner"].Autotuner = Autotuner
    tuning.tune_once()
    kernel, other = Autotuner(), Autotuner()
    assert [kernel.run("large"), kernel.run("small"), other.run("small")] == [
        "ran large",
        "ran large",
        "ran small",
    ]
