"""A workspace that the caller gives, and how large it must be."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from problems import copied, hold_any, make_any, run_any, to_numpy, to_torch, truth_of_any

MODES = [("numpy", "eager"), ("torch", "eager"), ("torch", "aot_eager")]


def aligned(size, shift=0):
    """Memory of that size at a multiple of 64 bytes."""
    memory = np.full(size + 128, 255, np.uint8)
    begin = -memory.ctypes.data % 64 + shift
    return memory[begin : begin + size]


@pytest.mark.parametrize(("library", "mode"), MODES)
@pytest.mark.parametrize(
    "options", [{}, {"pool": True, "checkpoints": "columns", "gate": "softplus"}], ids=str
)
def test_workspace(library, mode, options):
    if library == "torch":
        pytest.importorskip("torch")
    a = make_any(**options, seed=1)
    size = flash_kda.get_workspace_size(109, 1, 4, HV=2, device="cpu")
    assert size > 0
    plain = run_any(a)
    a["workspace"] = aligned(size)
    after = run_any(a, library, mode) if library == "torch" else in_place(a)
    hold_any({n: x for n, x in a.items() if n != "workspace"}, after, truth_of_any(a))
    for name in ("out", "final_state"):
        assert after[name].tobytes() == plain[name].tobytes()


def in_place(a):
    """Calls fwd on copies, except of the workspace, which must stay aligned."""
    work = {**copied(a), "workspace": a["workspace"]}
    flash_kda.fwd(**work)
    return work


def test_the_call_uses_it():
    a = make_any(seed=2)
    a["workspace"] = aligned(flash_kda.get_workspace_size(109, 1, 4, HV=2))
    in_place(a)
    assert not (a["workspace"] == 255).all()


def test_it_allocates_nothing_on_a_gpu(cuda):
    import torch

    a = make_any(lengths=(3000, 40, 500), H=2, pool=True, checkpoints="columns", seed=3)
    tensors = to_torch(a, cuda)
    size = flash_kda.get_workspace_size(
        3540, 2, 3, checkpoints=3, with_state_indices=True, largest_batch=True
    )
    tensors["workspace"] = torch.empty(size, dtype=torch.uint8, device=cuda)
    flash_kda.fwd(**tensors)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    flash_kda.fwd(**tensors)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    hold_any(a, to_numpy(tensors), truth_of_any(a), cuda)


def test_it_may_be_larger_and_of_any_shape():
    a = make_any(seed=4)
    size = flash_kda.get_workspace_size(109, 1, 4, HV=2)
    want = run_any(a)
    for workspace in (aligned(2 * size), aligned(size + 64 - size % 64).reshape(-1, 64)):
        a["workspace"] = workspace
        assert in_place(a)["out"].tobytes() == want["out"].tobytes()


@pytest.mark.parametrize("library", ["numpy", "torch", "dlpack"])
@pytest.mark.parametrize(
    ("workspace", "exception", "sentence"),
    [
        (lambda size: aligned(size - 64), ValueError, "workspace has {less} bytes; this call needs {size}"),
        (lambda size: aligned(0), ValueError, "workspace has 0 bytes; this call needs {size}"),
        (lambda size: aligned(size, 16), ValueError, "it must be aligned to 64 bytes"),
        (
            lambda size: aligned(size).view(np.float32),
            TypeError,
            "workspace has dtype float32; it must be uint8",
        ),
        (lambda size: aligned(2 * size)[::2], ValueError, "workspace has strides [2]; it must be contiguous"),
    ],
)
def test_wrong_workspace(library, workspace, exception, sentence):
    a = make_any(seed=5)
    size = flash_kda.get_workspace_size(
        109, 1, 4, HV=2, device="cpu", kernel="cpu", lower_bound=-5.0, checkpoints=0, use_gate_in_kernel=True
    )
    a["workspace"] = workspace(size)
    before = copied(a)
    given = a
    if library == "torch":
        torch = pytest.importorskip("torch")
        given = {
            n: torch.from_numpy(x) if n == "workspace" else to_torch({n: x}, "cpu")[n] for n, x in a.items()
        }
    elif library == "dlpack":
        from test_dlpack import wrap

        given = wrap(a)
    with pytest.raises(exception) as raised:
        flash_kda.fwd(**given)
    assert sentence.format(size=size, less=size - 64) in str(raised.value)
    after = to_numpy(given) if library == "torch" else a
    for name in ("out", "final_state"):
        assert after[name].tobytes() == before[name].tobytes()


def test_workspace_over_another_array():
    a = make_any(seed=6)
    memory = aligned(1 << 20)
    out = memory[: a["out"].nbytes].view(bfloat16).reshape(a["out"].shape)
    out[...] = np.nan
    with pytest.raises(ValueError, match="workspace overlaps out; it must have memory of its own"):
        flash_kda.fwd(**{**a, "out": out, "workspace": memory})
    assert np.isnan(out.astype(np.float32)).all()


def test_read_only_workspace():
    a = make_any(seed=7)
    a["workspace"] = aligned(1 << 20)
    a["workspace"].flags.writeable = False
    with pytest.raises(ValueError, match="workspace is read-only; it must be writable"):
        flash_kda.fwd(**a)


def test_workspace_of_another_device(cuda):
    import torch

    tensors = to_torch(make_any(seed=8), cuda)
    tensors["workspace"] = torch.empty(1 << 20, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match="workspace is on cpu and q on cuda:0; all tensors must be on one device"
    ):
        flash_kda.fwd(**tensors)


def test_a_long_call_uses_it():
    """A call that is long enough for signals to interrupt it."""
    a = make_any(lengths=(5000,), H=4, HV=4, seed=9)
    want = run_any(a)
    a["workspace"] = aligned(flash_kda.get_workspace_size(5000, 4, device="cpu"))
    assert in_place(a)["out"].tobytes() == want["out"].tobytes()


def test_size_for_the_largest_batch():
    most = flash_kda.get_workspace_size(2000, 3, 20, largest_batch=True)
    rng = np.random.default_rng(0)
    for _ in range(200):
        T, N = int(rng.integers(1, 2001)), int(rng.integers(1, 21))
        assert flash_kda.get_workspace_size(T, 3, N) <= most


def test_what_the_size_depends_on():
    size = flash_kda.get_workspace_size
    assert size(1000, 2) == size(1000, 2, 1)
    assert size(1000, 2, kernel="cpu-portable", device="cpu") <= size(1000, 2)
    assert size(1000, 2, 4, HV=8) >= size(1000, 2, 4)
    assert size(1000, 2, max_seqlen=500, batch_invariant=True, checkpoints=2, state_v_first=False) >= 0
    assert size(1000, 2, threads=1, device="cpu") <= size(1000, 2, device="cpu")


@pytest.mark.parametrize(
    ("change", "exception", "sentence"),
    [
        ({"HV": 3}, ValueError, "v has HV = 3 heads and q has H = 2; HV must be a multiple of H"),
        ({"HV": 0}, ValueError, "HV is 0; it must be at least 1"),
        ({"HV": 2.0}, TypeError, "HV is of type float; it must be an int"),
        ({"device": "tpu"}, ValueError, "device is 'tpu'; it must be None or one of cpu"),
        ({"checkpoints": -1}, ValueError, "checkpoints is -1; it must be at least 0"),
        ({"checkpoint_every": 7}, ValueError, "checkpoint_every is 7; it must be a multiple of 16"),
        ({"with_state_indices": 1}, TypeError, "with_state_indices is of type int; it must be True or False"),
        ({"use_gate_in_kernel": 1}, TypeError, "use_gate_in_kernel is of type int; it must be True or False"),
        ({"lower_bound": -9.0}, ValueError, "lower_bound is -9; it must be in [-5, 0]"),
    ],
)
@pytest.mark.parametrize("call", ["get_workspace_size", "explain"])
def test_wrong_shapes(call, change, exception, sentence):
    with pytest.raises(exception) as raised:
        getattr(flash_kda, call)(1000, 2, **change)
    assert sentence in str(raised.value)


def test_explain_of_options():
    text = flash_kda.explain(
        1000,
        2,
        3,
        device="cpu",
        HV=4,
        lower_bound=None,
        with_state_indices=True,
        checkpoints=2,
        fp32_gate=True,
    )
    assert 'Kernel "cpu"' in text
    assert "Workspace" in text
