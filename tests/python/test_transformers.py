"""Language models of transformers and of flash-linear-attention (FLA) on this package, through FLA.

The models have the trained weights of examples/language_model. One run lets a model write with this package.
Another run computes the same steps without it, and must prefer the same byte at each step, unless two bytes
are as likely as bf16 can tell: generate_text.py.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import flash_kda

torch = pytest.importorskip("torch")
for module in ("transformers", "fla.models", "safetensors"):
    pytest.importorskip(module, exc_type=ImportError)
PROGRAM = Path(__file__).with_name("generate_text.py")
PLACES = ("long", "short", "padded")
# The relative RMS by which logits may differ, and a lead so small that two bytes may change places then, in
# standard deviations of the logits.
LOGITS_BAR = 0.02
NEAR_TIE = 4 * LOGITS_BAR


def run(*words):
    environment = {n: x for n, x in os.environ.items() if not n.startswith("FLA_")}
    environment["PYTHONPATH"] = os.path.dirname(flash_kda.__path__[0])
    done = subprocess.run([sys.executable, PROGRAM, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(words[4])


def text_of(row):
    return bytes(row.tolist()).decode(errors="replace")


def check(model, others, device, count, tmp_path):
    if model == "kimi_linear":
        pytest.importorskip("transformers.models.kimi_linear", exc_type=ImportError)
    written = tmp_path / "flash_kda.pt"
    ours = run(model, "flash_kda", device, str(count), written)
    layers = 4
    for place in PLACES:
        calls = Counter(ours[place]["calls"])
        prompt = "chunk_kda" if place != "short" or model == "kimi_linear" else "fused_recurrent_kda"
        want = Counter({(prompt, ""): layers})
        want["fused_recurrent_kda", ""] += layers * (count - 1)
        assert calls == want, place
        assert ours[place]["bytes"].shape[1] == count
    for other in others:
        theirs = run(model, other, device, str(count), tmp_path / f"{other}.pt", written)
        for place in PLACES:
            assert torch.equal(theirs[place]["bytes"], ours[place]["bytes"])
            compare(ours[place], theirs[place], f"{model} with {other}, {place}")
    return ours


def compare(ours, theirs, where):
    mine, its = ours["logits"], theirs["logits"]
    error = ((mine - its).norm() / (its - its.mean(-1, keepdim=True)).norm()).item()
    best = its.topk(2).values
    leads = (best[..., 0] - best[..., 1]) / its.std(-1)
    differs = its.argmax(-1) != ours["bytes"]
    ties = int(differs.sum())
    print(f"{where}: logits differ by {error:.2e}, {ties} near ties; {text_of(ours['bytes'][-1])!r}")
    if "rate" in ours and "rate" in theirs:
        print(f"{where}: {theirs['rate']:.0f} bytes a second, with flash_kda {ours['rate']:.0f}")
    assert error <= LOGITS_BAR, where
    assert not (differs & (leads > NEAR_TIE)).any(), where


@pytest.mark.slow
def test_kimi_linear_of_transformers(tmp_path):
    ours = check("kimi_linear", ["torch"], "cpu", 8, tmp_path)
    # The text of a trained model, not just any bytes.
    assert text_of(ours["long"]["bytes"][0]).isascii()
    assert text_of(ours["padded"]["bytes"][0]) == text_of(ours["long"]["bytes"][0])


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("FLASH_KDA_TEST_INTERPRETER") != "1",
    reason="Triton's interpreter takes minutes: FLASH_KDA_TEST_INTERPRETER=1",
)
@pytest.mark.parametrize("gate", ["softplus", "bounded"])
def test_models_of_fla_in_the_interpreter(gate, tmp_path):
    check(gate, ["fla"], "cpu", 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["kimi_linear", "softplus", "bounded"])
def test_two_hundred_bytes(cuda, model, tmp_path):
    check(model, ["fla", "torch"] if model == "kimi_linear" else ["fla"], cuda, 200, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["softplus", "bounded"])
def test_gpu_against_cpu(cuda, model, tmp_path):
    """What the GPU writes is what the CPU backend would write, with all else of the model in Triton's
    interpreter."""
    written = tmp_path / "gpu.pt"
    gpu = run(model, "flash_kda", cuda, "8", written)
    cpu = run(model, "flash_kda", "cpu", "8", tmp_path / "cpu.pt", written)
    for place in PLACES:
        compare(gpu[place], cpu[place], f"{model} on the CPU, {place}")
