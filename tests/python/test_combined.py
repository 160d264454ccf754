"""Options together: calls with options, shapes and layouts drawn at random are held to the reference."""

import shutil

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from problems import (
    BETAS,
    CHECKPOINTS,
    GATES,
    copied,
    hold_any,
    make_any,
    run_any,
    to_numpy,
    to_torch,
    truth_of_any,
)


def drawn(seed):
    """Arguments with options drawn at random, and the options in words."""
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[rng.integers(len(values))]

    H = one_of(1, 2, 3)
    options = {
        "lengths": tuple(one_of(0, 1, 15, 16, 17, 40, 64, 70) for _ in range(one_of(1, 2, 4))),
        "H": H,
        "HV": H * one_of(1, 1, 2, 3),
        "gate": one_of(*GATES),
        "beta": one_of(*BETAS),
        "normalised": one_of(False, True),
        "k_first": one_of(False, True),
        "wide": one_of(False, True),
        "pool": one_of(False, True),
        "flags": one_of(False, True),
        "checkpoints": one_of(None, *CHECKPOINTS),
        "state": one_of(np.float32, bfloat16),
        "checkpoint_dtype": one_of(np.float32, bfloat16),
        "integers": one_of(np.int32, np.int64),
        "seed": seed,
    }
    a = make_any(**options)
    a |= {"threads": one_of(0, 1, 2), "batch_invariant": one_of(False, True)}
    if options["pool"] and one_of(False, True):
        a["initial_state"] = a["final_state"]
    return a, options


def hold(a, after, device="cpu"):
    expected = truth_of_any(a)
    before = dict(a)
    if a["initial_state"] is a["final_state"]:
        before.pop("initial_state")
    hold_any(before, after, expected, device)


@pytest.mark.parametrize("seed", range(40))
def test_numpy(seed):
    a, _ = drawn(seed)
    hold(a, run_any(a))


@pytest.mark.parametrize("seed", range(40))
def test_torch(device, seed):
    """Contiguous tensors, then slices of fused projections, which must give the same bits."""
    pytest.importorskip("torch")
    from test_strides import fused

    a, _ = drawn(seed)
    after = run_any(a, "torch", device=device)
    hold(a, after, device)
    if a["v"].shape[1] < 2:
        return
    tensors, _ = fused(to_torch(a, device))
    if a["initial_state"] is a["final_state"]:
        tensors["initial_state"] = tensors["final_state"]
    flash_kda.fwd(**tensors)
    strided = to_numpy({n: x.contiguous() if hasattr(x, "detach") else x for n, x in tensors.items()})
    for name in ("out", "final_state", "checkpoint_states"):
        if name in after:
            assert strided[name].tobytes() == after[name].tobytes()


@pytest.mark.parametrize("seed", range(100, 108))
def test_compiled(device, seed):
    pytest.importorskip("torch")
    a, _ = drawn(seed)
    hold(a, run_any(a, "torch", "aot_eager", device), device)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler on the CPU")
def test_inductor(device):
    """Slices, a pool and checkpoints among other operations, which inductor may fuse and whose buffers it may
    reuse."""
    torch = pytest.importorskip("torch")
    from test_strides import fused

    a = make_any(H=2, HV=2, pool=True, checkpoints="columns", gate="softplus", wide=True, seed=306)
    want = run_any(a, "torch", device=device)
    tensors, _ = fused(to_torch(a, device))
    size = flash_kda.get_workspace_size(a["v"].shape[1], 2, 4)
    tensors["workspace"] = torch.empty(size, dtype=torch.uint8, device=device)

    def step(x, **tensors):
        flash_kda.fwd(**{**tensors, "v": tensors["v"] * 1})
        return tensors["out"] + x

    torch.compiler.reset()
    with torch.no_grad():
        result = torch.compile(step, fullgraph=True, backend="inductor")(1.0, **tensors)
    assert torch.equal(result, tensors["out"] + 1)
    after = to_numpy({n: x.contiguous() for n, x in tensors.items() if n in want and hasattr(x, "detach")})
    for name in ("out", "final_state", "checkpoint_states"):
        assert after[name].tobytes() == want[name].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1300))
def test_many(seed):
    a, _ = drawn(seed)
    hold(a, run_any(a))


@pytest.mark.parametrize("seed", range(200, 206))
def test_the_operator(device, seed):
    """Its schema says what it writes, which PyTorch checks, and its fake implementation agrees."""
    torch = pytest.importorskip("torch")
    a, options = drawn(seed)
    if a["initial_state"] is a["final_state"]:
        a = copied({**a, "initial_state": a["initial_state"].copy()})
    tensors = to_torch(a, device)
    size = flash_kda.get_workspace_size(
        sum(options["lengths"]), options["H"], len(options["lengths"]), HV=options["HV"]
    )
    tensors["workspace"] = torch.empty(size, dtype=torch.uint8, device=device)
    # A workspace holds anything afterwards.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.flash_kda.fwd.default, (), tensors, test_utils=tests)


def test_export_of_options():
    """An exported program has the options, and computes with other contents."""
    torch = pytest.importorskip("torch")
    a = make_any(pool=True, flags=True, checkpoints="columns", gate="softplus", k_first=True, seed=300)
    options = {n: x for n, x in a.items() if not isinstance(x, np.ndarray)}

    class Layer(torch.nn.Module):
        def forward(self, arrays):
            out = torch.empty_like(arrays["v"])
            checkpoints = torch.zeros(14, 2, 128, 128)
            flash_kda.fwd(**{**options, **arrays, "out": out, "checkpoint_states": checkpoints})
            return out, checkpoints

    def inputs_of(a):
        tensors = to_torch(a, "cpu")
        return {
            n: x for n, x in tensors.items() if hasattr(x, "detach") and n not in ("out", "checkpoint_states")
        }

    with torch.no_grad():
        program = torch.export.export(Layer(), (inputs_of(a),))
        b = make_any(pool=True, flags=True, checkpoints="columns", gate="softplus", k_first=True, seed=301)
        got, want = program.module()(inputs_of(b)), Layer()(inputs_of(b))
    assert all(map(torch.equal, got, want))
    assert "flash_kda.fwd" in program.graph_module.code


@pytest.mark.parametrize("name", ["checkpoint_states", "has_initial_state", "state_indices"])
def test_batched_tensors_are_refused(name):
    torch = pytest.importorskip("torch")
    tensors = to_torch(make_any(pool=True, flags=True, checkpoints="offsets", seed=302), "cpu")
    many = torch.stack([tensors[name]] * 3)
    for call in (flash_kda.fwd, torch.ops.flash_kda.fwd):
        with pytest.raises(TypeError, match=r"is a batched tensor of torch.vmap"):
            torch.vmap(lambda x, call=call: call(**{**tensors, name: x}))(many)
    assert tensors["out"].isnan().all()


@pytest.mark.parametrize("name", ["checkpoint_states", "initial_state"])
def test_gradients_are_refused(name):
    torch = pytest.importorskip("torch")
    tensors = to_torch(make_any(pool=True, checkpoints="offsets", seed=303), "cpu")
    tensors[name].requires_grad_()
    for call in (flash_kda.fwd, torch.ops.flash_kda.fwd):
        with pytest.raises(RuntimeError, match="computes no gradients"):
            call(**tensors)
    assert tensors["out"].isnan().all()


def test_autograd_notices_what_was_written():
    torch = pytest.importorskip("torch")
    tensors = to_torch(make_any(checkpoints="offsets", seed=304), "cpu")
    loss = (torch.ones((), requires_grad=True) * tensors["checkpoint_states"]).sum()
    flash_kda.fwd(**tensors)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nonfinite_of_a_pool_and_of_grouped_heads():
    a = make_any(pool=True, HV=3, seed=305)
    a["nonfinite"] = np.zeros((10, 2), np.int64)
    a["v"][0, 7, 2, 5] = np.nan
    slot = a["state_indices"][1]
    a["initial_state"][slot, 2, 3, 4] = np.inf
    flash_kda.fwd(**a)
    said = flash_kda.describe_nonfinite(
        a["nonfinite"], a["q"], a["cu_seqlens"], v=a["v"], initial_state=a["initial_state"],
        final_state=a["final_state"],
    )  # fmt: skip
    assert any(line.endswith("the first is v[0, 7, 2, 5]") for line in said), said
    assert any(line.endswith(f"the first is initial_state[{slot}, 2, 3, 4]") for line in said), said
