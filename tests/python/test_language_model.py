"""examples/language_model: text in, text out, by prefill and decode, with its trained weights."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "language_model"


def run(program, *words):
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    done = subprocess.run([sys.executable, FOLDER / program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_text_in_text_out(device):
    prompt = "And it came to pass in those days, that "
    words = ("--device", device, "--bytes", "60", "--sequences", "2", "--warmth", "0")
    text = run("generate.py", prompt, *words)
    first, second = [line for line in text.splitlines() if line.startswith(prompt)]
    assert first == second  # both take the likeliest byte of the same state
    written = first[len(prompt) :]
    assert re.fullmatch(r"[A-Za-z ,.;:'?!]{40,60}", written), written
    assert len(set(written.split())) >= 5, written
    assert "bytes a second" in text


@pytest.mark.slow
def test_guesses_change_no_text(device):
    text = run("speculate.py", "And the LORD spake unto Moses, saying, ", "--device", device, "--bytes", "80")
    calls = [int(n) for n in re.findall(r"(\d+) calls", text)]
    assert calls[1] < calls[0]
    if device == "cpu":  # on a GPU products of one row and of several rows may round differently
        assert "the same text: yes" in text


def losses_of_training(folder, *words):
    """The loss of each step, in bits a byte, on a text that every Python has."""
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    for name in ("kda.py", "model.py", "train.py"):
        (folder / name).write_bytes((FOLDER / name).read_bytes())
    (folder / "text").write_bytes(Path(argparse.__file__).read_bytes())
    words = ("text", "--rows", "1", "--tokens", "64", "--every", "1", *words)
    # The products are small, and threads that wait for each other would take most of the processor time.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "weights.safetensors").stat().st_size > 1e6
    return [float(bits) for bits in re.findall(r"^step .* ([0-9.]+) bits a byte", done.stdout, re.MULTILINE)]


@pytest.mark.slow
def test_the_loss_falls(tmp_path):
    losses = losses_of_training(tmp_path, "--steps", "20", "--kda", "flash_kda")
    assert len(losses) >= 20
    assert losses[0] > 7.5  # of 8, as nothing is known
    assert sum(losses[-3:]) / 3 < 6
    assert sum(losses[10:]) < sum(losses[:10])


@pytest.mark.slow
def test_training_is_that_of_the_recurrence_in_pytorch(tmp_path):
    ours, theirs = (
        losses_of_training(tmp_path, "--steps", "4", "--kda", kda) for kda in ("flash_kda", "pytorch")
    )
    assert max(abs(a - b) for a, b in zip(ours, theirs)) < 0.05
    assert ours[-1] < ours[0]
