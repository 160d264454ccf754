"""The kernels against their arithmetic in PyTorch, tests/torch_ref_hopper.py and tests/torch_ref.py.

On the emulator, where sums and special functions are known, they must agree to the bit: the strictest test
against wrong indices, wrong roundings and races. On a GPU the tensor core's sums are not PyTorch's, so most
elements must be equal, all must be close, and both must be equally far from the result without roundings.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flash_kda
from problems import BARS, REFERENCE_ARGUMENTS, error, make, to_torch, truth

torch = pytest.importorskip("torch")
TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
import compare_arithmetic  # noqa: E402
import torch_ref_hopper as hopper  # noqa: E402

EMULATOR = Path(flash_kda.__path__[0]).parents[1] / "tests" / "emulator"  # of the build folder


def compare_on_emulator(gpu, ops, shapes, kernels):
    """The rows of the table, as {column: text}."""
    if not (EMULATOR / "libcuda.so.1").exists():
        pytest.skip("the build has no emulator")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(EMULATOR), "PRETEND_GPU": gpu}
    environment["PYTHONPATH"] = str(EMULATOR.parents[1] / "python")
    command = [sys.executable, str(TESTS / "compare_arithmetic.py"), "--device", "emulated", "--ops", ops]
    run = subprocess.run(
        [*command, "--shapes", *shapes, "--kernels", *kernels],
        env=environment,
        capture_output=True,
        text=True,
    )
    if "Kernels of this build" in run.stderr:
        pytest.skip("the build has no kernel hopper")
    assert run.returncode == 0, run.stderr
    table = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("|")]
    rows = [dict(zip(table[0], row)) for row in table[2:]]
    assert len(rows) == len(shapes) * len(kernels)
    return rows


@pytest.mark.parametrize(
    ("gpu", "shapes", "kernel", "plan"),
    [
        ("90:132", ["2:150", "1:1", "2:33,5,64"], "hopper:never", "32 tokens"),
        pytest.param("90:4", ["4:100", "4:16,7"], "hopper:never", "16 tokens", marks=pytest.mark.slow),
        ("90:4", ["1:400"], "hopper:always", "relay of 3"),  # without spare pairs
        # With a spare pair.
        pytest.param("90:9", ["1:600"], "hopper:always", "relay of 4", marks=pytest.mark.slow),
        pytest.param("90:132", ["1:300,40"], "hopper:always", "passes of 128", marks=pytest.mark.slow),
        # Maps are joined in groups.
        pytest.param("90:132", ["1:3500"], "hopper:always", "passes of 128", marks=pytest.mark.slow),
        ("90:4", ["2:150"], "portable", "16 tokens"),
    ],
)
def test_bits_on_the_emulator(gpu, shapes, kernel, plan):
    for row in compare_on_emulator(gpu, "emulator", shapes, [kernel]):
        assert row["plan"] == plan
        assert (row["out equal"], row["state equal"]) == ("100.000%", "100.00%"), row
        assert (row["ulps"], row["state"]) == ("0", "0.0e+00"), row


@pytest.mark.parametrize(
    ("ops", "out_equal", "state"),
    [("torch", 99.3, 5e-4), pytest.param("one-ulp-off", 97.0, 6e-4, marks=pytest.mark.slow)],
)
def test_other_operations_on_the_emulator(ops, out_equal, state):
    [row] = compare_on_emulator("90:132", ops, ["2:256"], ["hopper:never"])
    hold(row, out_equal, 2, state)


def hold(row, out_equal, ulps, state):
    assert float(row["out equal"].rstrip("%")) >= out_equal, row
    assert float(row["ulps"]) <= ulps, row
    assert float(row["state"]) <= state, row
    assert float(row["kernel"]) == pytest.approx(float(row["ref"]), rel=0.01)


@pytest.mark.parametrize("shape", ["4:2048", "3:1300,547,33", "12:128x8", "64:256"])
def test_on_a_gpu(cuda, shape, capsys):
    """The bounds have room for every shape that was measured on an H200 (docs/measurements.md), where 86.8%
    to 94.9% of the outputs are equal. The part of equal elements falls with the length."""
    kernels = ["portable"]
    if torch.cuda.get_device_capability() == (9, 0):
        kernels += ["hopper:never", "hopper:always"]
    compare_arithmetic.main(["--shapes", shape, "--kernels", *kernels])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    table = [line.strip("| ").split(" | ") for line in lines]
    assert len(table) == 2 + len(kernels)
    for cells in table[2:]:
        hold(dict(zip(table[0], cells)), 85, 4, 2e-3)


PLANS = [
    hopper.Plan(cta=hopper.SOLO),
    hopper.Plan(),
    hopper.Plan(shortest=128),
    hopper.Plan(chunks=(2, 3, 3, 2), spares=True),
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("options", [{"T": 320, "initial": np.float32}, {"T": 290, "B": 2}])
def test_algorithm(options, plan):
    a = make(**options, H=1)
    x = to_torch({name: a[name] for name in REFERENCE_ARGUMENTS if name in a}, "cpu")
    out, state = hopper.forward(hopper.TorchOps(), **x, plan=plan)
    want, want_state = truth(a)
    assert error(out.double().numpy(), want) <= BARS["cuda"][0] / 2
    assert error(state.numpy(), want_state) <= BARS["cuda"][1] / 2


def test_without_roundings():
    """exact_forward, which the table measures errors against, is the recurrence of the library."""
    a = make(lengths=[70, 0, 33, 64], initial=np.float32)
    x = to_torch({name: a[name] for name in REFERENCE_ARGUMENTS if name in a}, "cpu")
    for got, want in zip(compare_arithmetic.exact_forward(x), truth(a)):
        assert error(got.numpy().reshape(want.shape), want) <= 1e-12


@pytest.mark.parametrize("largest", [1e-3, 1.0, 300.0])
def test_sums_of_a_tensor_core(largest):
    """Against integers: 16 products and the accumulator, cut off 25 bits below the largest one's exponent."""
    generator = torch.Generator().manual_seed(0)
    a, b = (hopper.half(largest * torch.randn(3, 4, 16, generator=generator)) for _ in range(2))
    c = torch.randn(3, 4, 4, generator=generator)
    got = hopper.TensorCoreOps().step(a, b, c)
    for i, m, n in np.ndindex(3, 4, 4):
        pairs = [(float(x), float(y)) for x, y in zip(a[i, m], b[i, n])] + [(float(c[i, m, n]), 1.0)]
        exponents = [int(np.floor(np.log2(abs(z)))) for pair in pairs for z in pair]
        most = max(x + y for x, y in zip(exponents[::2], exponents[1::2]))
        total = sum(int(x * y * 2.0 ** (25 - most)) for x, y in pairs)
        bits = max(abs(total).bit_length() - 24, 0)
        cut = (abs(total) >> bits << bits) * (1 if total > 0 else -1)
        assert float(got[i, m, n]) == cut * 2.0 ** (most - 25)
