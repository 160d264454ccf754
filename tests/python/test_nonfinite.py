"""The option nonfinite of fwd, and the sentences of describe_nonfinite."""

import re
import shutil

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from flash_kda import _nonfinite
from problems import make, to_numpy, to_torch

INPUTS = _nonfinite.CHECKED_ARRAYS[:8]
OUTPUTS = _nonfinite.CHECKED_ARRAYS[8:]
UNWRITTEN = np.full((10, 2), 77, np.int64)


def counted(arguments):
    """What a call must find: rows of counts and first places, by NumPy."""
    rows = []
    for name in _nonfinite.CHECKED_ARRAYS:
        x = arguments.get(name)
        places = [] if x is None else np.flatnonzero(~np.isfinite(np.asarray(x).astype(np.float64)))
        rows.append([len(places), places[0] if len(places) else -1])
    return np.array(rows)


def with_faults(seed, **shape):
    """A problem with NaN and infinities in some of its inputs."""
    a = make(**shape)
    rng = np.random.default_rng(seed)
    for name in INPUTS:
        if name in a:
            flat = a[name].reshape(-1)
            for _ in range(int(rng.integers(0, 4)) if flat.size else 0):
                flat[rng.integers(flat.size)] = rng.choice([np.nan, np.inf, -np.inf])
    return a


SHAPES = [
    {"T": 70, "H": 3, "B": 2, "initial": np.float32},
    {"lengths": [5, 0, 61], "H": 1, "initial": bfloat16, "final": bfloat16},
    {"T": 9, "final": None},
    {"T": 0, "B": 2, "initial": np.float32},
    {"T": 900, "H": 5},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_numpy(shape):
    for seed in range(4):
        a = with_faults(seed, **shape)
        nonfinite = UNWRITTEN.copy()
        inputs = counted({name: a[name] for name in INPUTS if name in a})
        flash_kda.fwd(**a, nonfinite=nonfinite)
        expected = counted(a)
        np.testing.assert_array_equal(nonfinite, expected)
        np.testing.assert_array_equal(nonfinite[:8], inputs[:8])


@pytest.mark.parametrize("shape", SHAPES)
def test_torch(device, shape):
    torch = pytest.importorskip("torch")
    for seed in range(4):
        a = with_faults(seed, **shape)
        tensors, plain = to_torch(a, device), to_torch(a, device)
        nonfinite = torch.from_numpy(UNWRITTEN.copy()).to(device)
        flash_kda.fwd(**plain)
        for _ in range(2):  # the second call finds the prepared call of the first one
            version = nonfinite._version
            flash_kda.fwd(**tensors, nonfinite=nonfinite)
            assert nonfinite._version > version
            np.testing.assert_array_equal(nonfinite.cpu().numpy(), counted(to_numpy(tensors)))
        for name in OUTPUTS:
            if name in plain:
                assert torch.equal(plain[name].isnan(), tensors[name].isnan())
                assert torch.equal(plain[name].nan_to_num(), tensors[name].nan_to_num())


def test_state_in_place(device):
    """The initial state counts as it was, and the final one as it is."""
    torch = pytest.importorskip("torch")
    tensors = to_torch(make(T=3, H=2, initial=np.float32), device)
    state = tensors["initial_state"]
    state[0, 1, 2, 3] = torch.inf
    tensors["final_state"] = state
    nonfinite = torch.zeros(10, 2, dtype=torch.int64, device=device)
    flash_kda.fwd(**tensors, nonfinite=nonfinite)
    assert nonfinite[7].tolist() == [1, ((0 * 2 + 1) * 128 + 2) * 128 + 3]
    assert nonfinite[9].tolist() == counted(to_numpy(tensors))[9].tolist()
    assert nonfinite[9, 0] > 0


def test_sentences(device):
    torch = pytest.importorskip("torch")
    tensors = to_torch(make(lengths=[6, 2], H=2, initial=np.float32), device)
    nonfinite = torch.zeros(10, 2, dtype=torch.int64, device=device)

    def described():
        flash_kda.fwd(**tensors, nonfinite=nonfinite)
        return flash_kda.describe_nonfinite(nonfinite, tensors["q"], tensors["cu_seqlens"])

    assert described() == []
    tensors["q"][0, 6, 1, 5] = torch.nan
    tensors["q"][0, 7, :, 5:7] = torch.inf
    tensors["beta"][0, 7, 1] = -torch.inf
    tensors["initial_state"][1, 0, 2, 127] = torch.nan
    tensors["A_log"][1] = torch.nan
    tensors["dt_bias"][1, 3] = torch.inf
    sentences = described()
    assert sentences[:5] == [
        "q: 5 of 2048 values are not finite, the first is q[0, 6, 1, 5]",
        "beta: 1 of 16 values is not finite, the first is beta[0, 7, 1]",
        "A_log: 1 of 2 values is not finite, the first is A_log[1]",
        "dt_bias: 1 of 256 values is not finite, the first is dt_bias[1, 3]",
        "initial_state: 1 of 65536 values is not finite, the first is initial_state[1, 0, 2, 127]",
    ]
    assert sentences[5].startswith("out: ")
    assert sentences[5].endswith("the first is out[0, 0, 1, 0]")
    assert sentences[6].startswith("final_state: ")
    assert len(sentences) == 7


def test_sentences_of_numpy_and_rows():
    """Each batch row is a sequence."""
    a = make(T=4, B=3, H=2, initial=np.float32)
    nonfinite = np.zeros((10, 2), np.int64)
    a["v"][2, 3, 1, 127] = np.nan
    a["initial_state"][2, 1, 127, 127] = np.nan
    flash_kda.fwd(**a, nonfinite=nonfinite)
    sentences = flash_kda.describe_nonfinite(nonfinite, a["q"])
    assert sentences[:2] == [
        "v: 1 of 3072 values is not finite, the first is v[2, 3, 1, 127]",
        "initial_state: 1 of 98304 values is not finite, the first is initial_state[2, 1, 127, 127]",
    ]


def rows(**changes):
    x = np.zeros((10, 2), np.int64)
    x[:, 1] = -1
    for name, row in changes.items():
        x[_nonfinite.CHECKED_ARRAYS.index(name)] = row
    return x


@pytest.mark.parametrize(
    ("nonfinite", "sentence"),
    [
        (np.zeros((8, 2), np.int64), "nonfinite has shape [8, 2]; it must be [tensors, 2] = [10, 2]"),
        (rows(beta=(9, 0)), "nonfinite has count 9 and first place 0 for beta; a call of fwd"),
        (rows(A_log=(1, 2)), "nonfinite has count 1 and first place 2 for A_log; a call of fwd"),
        (rows(k=(0, 0)), "nonfinite has count 0 and first place 0 for k; a call of fwd"),
        (rows(k=(1, -1)), "nonfinite has count 1 and first place -1 for k; a call of fwd"),
    ],
)
def test_sentences_of_what_no_call_wrote(nonfinite, sentence):
    q = np.zeros((1, 4, 2, 128), bfloat16)
    assert flash_kda.describe_nonfinite(rows(), q) == []
    with pytest.raises(ValueError, match=re.escape(sentence)):
        flash_kda.describe_nonfinite(nonfinite, q)


def test_read_only():
    a = make(T=4)
    nonfinite = UNWRITTEN.copy()
    nonfinite.flags.writeable = False
    with pytest.raises(ValueError, match="nonfinite is read-only; it must be writable"):
        flash_kda.fwd(**a, nonfinite=nonfinite)
    assert np.isnan(a["out"].astype(np.float32)).all()


def test_cuda_graph(cuda):
    """A replay counts what the tensors hold then, and forgets what an earlier one has found."""
    import torch

    from torch_calls import captured

    tensors = to_torch(make(lengths=[40, 60], initial=np.float32), cuda)
    nonfinite = torch.zeros(10, 2, dtype=torch.int64, device=cuda)
    graph = captured(lambda: flash_kda.fwd(**tensors, nonfinite=nonfinite))
    for value in (torch.nan, 0.0, -torch.inf):
        tensors["k"][0, 70, 1, 9] = value
        nonfinite.fill_(5)
        graph.replay()
        torch.cuda.synchronize()
        np.testing.assert_array_equal(nonfinite.cpu().numpy(), counted(to_numpy(tensors)))
        assert nonfinite[1, 0] == (0 if value == 0.0 else 1)


def test_current_stream(cuda):
    """The counting is queued on the current stream behind what is queued there, and nothing waits for it."""
    import torch

    from torch_calls import call_behind_other_work

    nonfinite = torch.zeros(10, 2, dtype=torch.int64, device=cuda)
    tensors = call_behind_other_work(
        lambda **t: flash_kda.fwd(**t, nonfinite=nonfinite), to_torch(with_faults(3, T=64), cuda)
    )
    np.testing.assert_array_equal(nonfinite.cpu().numpy(), counted(to_numpy(tensors)))


def test_operator(device):
    torch = pytest.importorskip("torch")
    tensors = to_torch(with_faults(1, T=12, initial=np.float32), device)
    nonfinite = torch.zeros(10, 2, dtype=torch.int64, device=device)
    torch.ops.flash_kda.fwd(**tensors, nonfinite=nonfinite)
    np.testing.assert_array_equal(nonfinite.cpu().numpy(), counted(to_numpy(tensors)))
    good = to_torch(make(T=12), device)
    torch.library.opcheck(torch.ops.flash_kda.fwd.default, (), {**good, "nonfinite": nonfinite})


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(device, backend):
    """The tensor may be an argument of what is compiled, or made there."""
    torch = pytest.importorskip("torch")
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler on the CPU")
    torch.compiler.reset()

    def step(nonfinite, **tensors):
        made = torch.empty(10, 2, dtype=torch.int64, device=nonfinite.device)
        flash_kda.fwd(**tensors, nonfinite=made)
        flash_kda.fwd(**{**tensors, "v": tensors["v"] * 2}, nonfinite=nonfinite)
        return made.sum(1)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    tensors = to_torch(with_faults(2, T=20, initial=np.float32), device)
    for value in (1.0, torch.nan):
        tensors["v"][0, 0, 0, 0] = value
        nonfinite = torch.zeros(10, 2, dtype=torch.int64, device=device)
        with torch.no_grad():
            sums = compiled(nonfinite, **tensors)
        expected = counted(to_numpy({**tensors, "v": tensors["v"] * 2}))
        np.testing.assert_array_equal(nonfinite.cpu().numpy(), expected)
        assert sums.tolist()[:2] == expected.sum(1)[:2].tolist()


def test_fake_tensors(device):
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = to_torch(make(T=20), device)
    with FakeTensorMode() as mode, torch.no_grad():
        fakes = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in tensors.items()}
        nonfinite = torch.empty(10, 2, dtype=torch.int64, device=device)
        assert flash_kda.fwd(**fakes, nonfinite=nonfinite) is None
