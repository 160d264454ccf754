"""The flash-kda command: its JSON, what it says of devices that it leaves out, NaN in inputs, wrong names."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from problems import make

ROOT = Path(__file__).resolve().parents[2]
COMMAND = next((p for p in (Path(f) / "flash-kda" for f in flash_kda.__path__) if p.exists()), None)
DRIVERS = Path(flash_kda.__path__[0]).parents[1] / "tests"  # of the build folder
KEYS = set(re.findall(r"`(\w+)`", (ROOT / "docs/command.md").read_text(encoding="utf-8")))

pytestmark = pytest.mark.skipif(COMMAND is None, reason="the flash-kda command was not built")


def run(*arguments, gpu=None, status=0):
    """What the command prints, on standard output and standard error. gpu: of the pretended driver."""
    environment = {**os.environ}
    if gpu:
        if not (DRIVERS / "pretend_driver/libcuda.so.1").exists():
            pytest.skip("the build has no pretended driver")
        environment |= {"LD_LIBRARY_PATH": str(DRIVERS / "pretend_driver"), "PRETEND_GPU": gpu}
    done = subprocess.run([COMMAND, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    if "--json" not in arguments:
        # The path of a file is as long as it is.
        assert [line for line in done.stdout.splitlines() if len(line) > 80 and "/" not in line] == []
    return done.stderr if status == 2 else done.stdout


def keys_of(value):
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


def as_json(*arguments, **more):
    found = json.loads(run(*arguments, "--json", **more))
    assert keys_of(found) <= KEYS, "docs/command.md has every key"
    return found


@pytest.fixture
def activations(tmp_path):
    """A function that writes activations with changes to a file, and returns its path."""
    safetensors = pytest.importorskip("safetensors.numpy")

    def write(**changes):
        a = {n: x for n, x in make(T=70).items() if n not in ("out", "final_state")} | changes
        path = tmp_path / "activations.safetensors"
        safetensors.save_file({n: x for n, x in a.items() if isinstance(x, np.ndarray)}, path)
        return path

    return write


def test_json_of_info():
    found = as_json("info")
    assert found["version"] == flash_kda.__version__
    assert [k["name"] for k in found["kernels"]] == flash_kda.kernels()
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["kernel"] == flash_kda.devices()[0].kernel
    shape = as_json("info", "--lengths", "100,20x3", "--heads", 2, "--device", "cpu")
    assert (shape["sequences"], shape["tokens"], shape["heads"]) == (4, 160, 2)
    assert f"Workspace: {shape['workspace_bytes']} bytes" in shape["explanation"]


def test_json_of_check_and_its_digits():
    found = as_json("check", "--device", "cpu")
    (device,) = found["devices"]
    assert found["checked"] == len(device["cases"]) > 10
    assert found["failed"] == sum(not case["passed"] for case in device["cases"]) == 0
    assert all(0 <= case["output_error"] <= case["output_at_most"] for case in device["cases"])
    rows = re.findall(
        r"^  (\S.*?) +(\d\.\d{3}e-?\S+) +(\S+) +(\S+) +(\S+)  ok$", run("check", "--device", "cpu"), re.M
    )
    assert len(rows) == found["checked"]
    for case, (name, *numbers) in zip(device["cases"], rows):
        assert name == case["name"]
        wanted = (case[k] for k in ("output_error", "output_at_most", "state_error", "state_at_most"))
        assert numbers == [f"{x:.3e}" for x in wanted]


def test_json_of_run_and_bench(activations):
    path = activations()
    found = as_json("run", path, "--device", "cpu", "--kernel", "cpu-portable")
    assert (found["batch"], found["tokens"], found["heads"]) == (1, 70, 2)
    assert found["passed"]
    assert found["kernel"] == "cpu-portable"
    assert found["file"] == str(path)
    assert found["non_finite"] == []
    found = as_json("bench", "--device", "cpu", "--lengths", "40,0,7x3", "--heads", 1)
    assert [(s["lengths"], s["heads"]) for s in found["shapes"]] == [("40,0,7x3", 1)]
    assert found["shapes"][0]["bytes"] == 61 * (5 * 256 + 2) + 2 * 5 * 128 * 128 * 4
    run("bench", "--device", "cpu", "--lengths", ",".join(["3"] * 40), "--heads", 1)


@pytest.mark.parametrize("how", ["text", "json"])
def test_nan_is_named(activations, how):
    a = make(T=70)
    a["g"][0, 17, 1, 5] = np.nan
    a["g"][0, 18, 0, 5] = np.inf
    path = activations(g=a["g"])
    if how == "json":
        found = as_json("run", path, "--device", "cpu", status=1)
        assert found["non_finite"] == [{"tensor": "g", "count": 2, "first": "[0, 17, 1, 5]"}]
        assert found["output_error"] is None
        assert not found["passed"]
    else:
        text = run("run", path, "--device", "cpu", status=1)
        assert "g has 2 NaN or infinite numbers, the first at [0, 17, 1, 5]" in " ".join(text.split())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"q": np.zeros((1, 70, 2, 64), bfloat16)}, "q has shape [1, 70, 2, 64]; it must be [B, T, H, 128]"),
        ({"g": np.zeros((1, 70, 2, 128), np.float32)}, "g has dtype F32; it must be BF16"),
        (
            {"k": np.zeros((1, 7, 2, 128), bfloat16)},
            "k has shape [1, 7, 2, 128], 1792 numbers; beside q it must",
        ),
        ({"beta": None, "bta": np.zeros(3)}, "beta is missing in the file, did you mean bta?"),
    ],
)
def test_wrong_files(activations, changes, sentence):
    assert f"error: {sentence}" in run("run", activations(**changes), "--device", "cpu", status=2)


# A GPU that nothing runs on, one that could be used, and one among the devices that were asked for.
@pytest.mark.parametrize("command", ["check", "run", "bench"])
@pytest.mark.parametrize(
    ("gpu", "asked", "reason"),
    [
        ("75:40", [], "the library needs at least 8.0"),
        ("75:40", ["--device", "cpu"], "the library needs at least 8.0"),
        ("90:132", ["--device", "cpu"], "--device asks for another device"),
        ("nonsense", [], "cuInit"),
        ("nonsense", ["--device", "cpu"], None),
    ],
)
@pytest.mark.parametrize("how", ["text", "json"])
def test_a_gpu_that_is_left_out(activations, command, gpu, asked, reason, how):
    if command != "run" and (how == "json" or asked or gpu == "nonsense"):
        pytest.skip("once is enough, since check and bench take seconds")
    arguments = [command, *asked]
    arguments += {"run": [activations()], "bench": ["--lengths", "40", "--heads", "1"], "check": []}[command]
    if how == "json":
        left_out = as_json(*arguments, gpu=gpu)["left_out"]
        assert [x["device"] for x in left_out] == (
            [] if reason is None else ["cuda" if gpu == "nonsense" else "cuda:0"]
        )
        assert reason is None or reason in left_out[0]["reason"]
        return
    text = " ".join(run(*arguments, gpu=gpu).split())
    if reason is None:
        assert "was left out" not in text
        assert "No CUDA device" not in text
    elif gpu == "nonsense":
        assert re.search(rf"No CUDA device was used: .*{reason}", text)
    else:
        assert re.search(rf"cuda:0 \(Pretended GPU\) was left out: .*{reason}", text)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["chekc"], "'chekc' is not a command; .*, did you mean check"),
        (["bench", "--lenghts", "3"], "'--lenghts' is not an option here, did you mean --lengths"),
        (["check", "--kernle=cpu"], "'--kernle=cpu' is not an option here, did you mean --kernel"),
        (["run", "--device"], "--device needs a value; flash-kda run --help explains it"),
        (["run", "--nonsense"], "'--nonsense' is not an option here; flash-kda run --help"),
        (
            ["check", "--kernel", "cpu-avx51"],
            "--kernel is 'cpu-avx51'; it must be one of cpu, .* mean cpu-avx512",
        ),
        (["run", "nowhere"], "nowhere can't be opened: No such file or directory"),
        (["run", "/"], "/ can't be read: Is a directory"),
    ],
)
def test_wrong_names(arguments, sentence):
    if "avx" in sentence and "cpu-avx512" not in flash_kda.kernels():
        pytest.skip("another architecture has no such kernel")
    assert re.match(f"error: {sentence}", run(*arguments, status=2))


def test_info_of_decode():
    call = ("info", "--lengths", "1x256", "--heads", "32", "--device")
    words = run(*call, "cuda:0", "--decode", gpu="90:132")
    assert 'Kernel "hopper" is the first in the table' in words
    flat = " ".join(words.split())
    assert "One launch of fkda_decode_one_f32: one token of each sequence" in flat
    assert "32768 CTAs of 64 threads" in flat
    words = run(*call, "cuda:0", "--decode-layer", "--bf16-state", "--kernel", "portable", gpu="90:132")
    assert 'Kernel "portable" was asked for.' in words
    assert "One launch of fkda_layer_one_bf16" in " ".join(words.split())
    said = json.loads(run(*call, "cpu", "--decode", "--writes", "none", "--json"))
    assert (said["sequences"], said["tokens"], said["heads"]) == (256, 256, 32)
    assert " 0 of states written" in said["explanation"]
    said = json.loads(
        run("info", "--lengths", "3,1", "--heads", "2", "--decode", "--device", "cpu", "--json")
    )
    assert "4 heads of sequences" in said["explanation"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--decode"], "--decode needs --lengths"),
        (["--lengths", "4", "--writes", "each"], "--writes needs --decode or --decode-layer"),
        (["--lengths", "4", "--bf16-state"], "--bf16-state needs --decode or --decode-layer"),
        (["--lengths", "4", "--decode", "--cut", "never"], "--cut is of the forward pass"),
        (["--lengths", "4", "--decode", "--decode-layer"], "--decode and --decode-layer are two calls"),
        (
            ["--lengths", "4", "--decode", "--writes", "all"],
            "--writes is 'all'; it must be last, none or each",
        ),
        (["--lengths", "17", "--decode", "--device", "cpu"], "q has T = 17; there must be at most 16 tokens"),
    ],
)
def test_wrong_use_of_info_of_decode(arguments, sentence):
    assert sentence in run("info", *arguments, status=2)
