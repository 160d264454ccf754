"""What explain_decode says: the kernel, the CTAs and the bytes of a call, here and on pretended GPUs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flash_kda

PRETENDED = Path(flash_kda.__path__[0]).parents[1] / "tests" / "pretend_driver"
STATE = 128 * 128


def on_gpu(gpu, *calls):
    """What explain_decode says of calls on the pretended GPU, in a process of its own."""
    if not (PRETENDED / "libcuda.so.1").exists():
        pytest.skip("the build has no pretended driver")
    program = (
        "import json, sys, flash_kda\n"
        "calls = json.loads(sys.argv[1])\n"
        "print(json.dumps([flash_kda.explain_decode(**call) for call in calls]))"
    )
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(PRETENDED),
        "PRETEND_GPU": gpu,
        "PYTHONPATH": str(Path(flash_kda.__path__[0]).parent),
    }
    calls = [{"device": "cuda", **call} for call in calls]
    command = [sys.executable, "-c", program, json.dumps(calls)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def launch_of(text):
    """The kernel of a launch, CTAs of a head, all CTAs, and threads."""
    found = re.search(
        r"One launch of (\w+): .* with (\d+) CTAs? each, (\d+) CTAs of (\d+) threads and \d+ bytes", text
    )
    return found[1], int(found[2]), int(found[3]), int(found[4])


def bytes_of(text):
    """Bytes of states read, of states written, of tokens, of records and of all."""
    pattern = (
        r"Bytes moved: (\d+) of states read, (\d+) of states written, (\d+) of tokens, (\d+) of records"
        r"(?:, \d+ of the convolution)?; (\d+) in all, if every sequence has a state\.\n"
    )
    return tuple(map(int, re.search(pattern, text).groups()))


# The choices of src/cuda/decode.c on 132 SMs: what runs, the CTAs of a head and all CTAs.
LAUNCHES = [
    ({"N": 256, "T": 1, "H": 32}, "fkda_decode_one_f32", 4, 32768),
    ({"N": 1, "T": 1, "H": 12}, "fkda_decode_one_f32", 8, 96),
    ({"N": 256, "T": 1, "H": 32, "bf16_state": True}, "fkda_decode_one_bf16", 1, 8192),
    ({"N": 256, "T": 1, "H": 32, "state_v_first": False}, "fkda_decode_one_k_first_f32", 4, 32768),
    ({"N": 256, "T": 2, "H": 32}, "fkda_decode_steps_f32", 4, 32768),
    ({"N": 256, "T": 4, "H": 32}, "fkda_decode_steps_f32", 2, 16384),
    ({"N": 8, "T": 4, "H": 12}, "fkda_decode_steps_f32", 2, 192),
    ({"N": 256, "T": 4, "H": 32, "write_states": "none"}, "fkda_decode_chunk_f32", 1, 8192),
    ({"N": 256, "T": 5, "H": 32}, "fkda_decode_chunk_f32", 1, 8192),
    ({"N": 256, "T": 16, "H": 32, "write_states": "each"}, "fkda_decode_steps_f32", 1, 8192),
    ({"N": 256, "T": 1, "H": 32, "with_cu_seqlens": True}, "fkda_decode_chunk_f32", 1, 8192),
    (
        {"N": 256, "T": 2, "H": 32, "write_states": "none", "with_parents": True},
        "fkda_decode_chunk_f32", 1, 8192,
    ),
    (
        {"N": 256, "T": 2, "H": 32, "write_states": "each", "with_parents": True},
        "fkda_decode_each_f32", 2, 16384,
    ),
    (
        {"N": 256, "T": 1, "H": 32, "write_states": "none", "with_past_records": True},
        "fkda_decode_past_f32", 1, 8192,
    ),
    ({"N": 256, "T": 1, "H": 32, "function": "decode_layer"}, "fkda_layer_one_f32", 1, 8192),
    ({"N": 256, "T": 3, "H": 32, "function": "decode_layer"}, "fkda_layer_steps_f32", 1, 8192),
    ({"N": 256, "T": 4, "H": 32, "function": "apply_records"}, "fkda_decode_apply_f32", 2, 16384),
]  # fmt: skip


def test_launches():
    texts = on_gpu("90:132", *(call for call, *_ in LAUNCHES))
    for text, (call, *want) in zip(texts, LAUNCHES):
        assert [*launch_of(text)[:3]] == want, call
        assert text.startswith(
            'Kernel "hopper" is the first in the table that CUDA device 0 (compute capability 9.0) can run.\n'
        )


def test_another_gpu_and_kernel():
    few = {"N": 4, "T": 8, "H": 12, "write_states": "each"}
    (text,) = on_gpu("80:16", {**few, "kernel": "portable"})
    assert text.startswith('Kernel "portable" was asked for.\n')
    assert launch_of(text) == ("fkda_decode_steps_f32", 1, 48, 256)
    (text,) = on_gpu("80:108", few)
    assert launch_of(text) == ("fkda_decode_steps_f32", 2, 96, 128)


def test_bytes():
    tokens = 256 * (5 * 32 * 128 * 2 + 32 * 2)  # q, k, v, g and out in bf16, and beta
    states = 256 * 32 * STATE
    say = flash_kda.explain_decode
    on_cpu = {"N": 256, "T": 1, "H": 32, "device": "cpu"}
    assert bytes_of(say(**on_cpu)) == (4 * states, 4 * states, tokens, 0, 8 * states + tokens)
    assert bytes_of(say(**on_cpu, bf16_state=True))[:3] == (2 * states, 2 * states, tokens)
    assert bytes_of(say(**on_cpu, write_states="none"))[1] == 0
    assert bytes_of(say(**on_cpu, with_records=True))[3] == 256 * 32 * 3 * 128 * 4
    several = {**on_cpu, "T": 4}
    assert bytes_of(say(**several))[:3] == (4 * states, 4 * states, 4 * tokens)
    for options in ({}, {"with_cu_seqlens": True}, {"with_written_states": True}):
        assert bytes_of(say(**several, write_states="each", **options))[1] == 4 * 4 * states
    grouped = bytes_of(say(256, 1, 8, "cpu", HV=32, fp32_gate=True))
    assert grouped[2] == 256 * (2 * 8 * 128 * 2 + 2 * 32 * 128 * 2 + 32 * 128 * 4 + 32 * 4)
    assert bytes_of(say(**several, function="apply_records")) == (
        4 * states, 4 * states, 0, 4 * 256 * 32 * 3 * 128 * 4, 8 * states + 4 * 256 * 32 * 3 * 128 * 4,
    )  # fmt: skip
    past = bytes_of(say(**several, write_states="none", with_records=True, with_past_records=True))
    assert past[:4] == (4 * states, 4 * states, 4 * tokens, 2 * 4 * 256 * 32 * 3 * 128 * 4)
    layer = bytes_of(say(**on_cpu, function="decode_layer"))
    assert layer[2] == tokens - 256 * 32 * 128 * 2 * 3 + 256 * 3 * 32 * 128 * 2 + 256 * 32 * 128 * 2
    convolution = 2 * 256 * 3 * 32 * 128 * 3 * 2 + 3 * 32 * 128 * 4 * 4  # windows twice, and weights
    assert layer[4] == sum(layer[:4]) + convolution


def test_the_cpu():
    text = flash_kda.explain_decode(1, 1, 1, "cpu", "cpu-portable")
    assert text.startswith('Kernel "cpu-portable" was asked for.\n')
    assert "1 heads of sequences, in 1 pieces of 128 rows of V, on 1 thread of " in text
    assert "none divided, on 1 thread" in flash_kda.explain_decode(1, 1, 1, "cpu", function="decode_layer")


def test_refusals():
    say = flash_kda.explain_decode
    with pytest.raises(ValueError, match="q has T = 17; there must be at most 16 tokens"):
        say(1, 17, 1, "cpu")
    with pytest.raises(ValueError, match="N is 0; it must be at least 1"):
        say(0, 1, 1, "cpu")
    with pytest.raises(
        ValueError, match=r'function is "fwd"|function is \'fwd\'; it must be one of "decode", '
    ):
        say(1, 1, 1, "cpu", function="fwd")
    with pytest.raises(ValueError, match="with_parents is True; it must be False for decode_layer"):
        say(1, 1, 1, "cpu", function="decode_layer", with_parents=True)
    with pytest.raises(ValueError, match="HV is 4 and H is 2; they must be equal for decode_layer"):
        say(1, 1, 2, "cpu", function="decode_layer", HV=4)
    with pytest.raises(TypeError, match="bf16_state is of type int; it must be True or False"):
        say(1, 1, 1, "cpu", bf16_state=1)
    with pytest.raises(ValueError, match="write_states is 'all'; it must be"):
        say(1, 1, 1, "cpu", write_states="all")
    with pytest.raises(ValueError, match="parents is given"):
        say(1, 2, 1, "cpu", with_parents=True)
    with pytest.raises(ValueError, match='kernel is "none"'):
        say(1, 1, 1, "cpu", "none")
