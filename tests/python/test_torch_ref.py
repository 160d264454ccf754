"""The portable CUDA kernel against tests/torch_ref.py, bit for bit: the strictest test against wrong indices
and races.

Without a GPU the same algorithm, with PyTorch's own functions for the probed instructions, is held to the
fp64 recurrence, so that what the kernel must equal is itself known to be right.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

import flash_kda
from problems import BARS, REFERENCE_ARGUMENTS, error, make, to_torch, truth

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1]))
import torch_ref  # noqa: E402

RAGGED = [1300, 547, 2048, 963, 271, 3063]


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch can use no CUDA device here")
    return torch_ref.CudaOps(tmp_path_factory.mktemp("probe"))


def inputs(B, T, H, *, lengths=None, initial=None, seed=0):
    """Arguments of fwd on the GPU, with slow and fast channels. The GPU makes them, as a CPU would take
    seconds for the large ones."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    N = B if lengths is None else len(lengths)
    x = {name: normal(B, T, H, 128).bfloat16() for name in ("q", "k", "v", "g")}
    x |= {"beta": normal(B, T, H).bfloat16(), "scale": 128**-0.5, "lower_bound": -5.0}
    x |= {"A_log": 0.3 * normal(H), "dt_bias": 3 * normal(H, 128) - 4}
    if initial is not None:
        x["initial_state"] = normal(N, H, 128, 128).to(initial)
    if lengths is not None:
        x["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda")
    return x


def equals_reference(ops, x, final=torch.float32):
    N = len(x["cu_seqlens"]) - 1 if "cu_seqlens" in x else x["q"].shape[0]
    H = x["v"].shape[2]
    out = torch.full_like(x["v"], torch.nan)
    state = None if final is None else torch.full((N, H, 128, 128), torch.nan, device="cuda", dtype=final)
    flash_kda.fwd(**x, out=out, final_state=state, kernel="portable")
    want, want_state = torch_ref.forward(ops, **x)
    assert torch.equal(out, want)
    assert state is None or torch.equal(state, want_state.to(final))


@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["8192", "ragged"])
def test_96_heads(ops, lengths):
    equals_reference(ops, inputs(1, 8192, 96, lengths=lengths, initial=torch.float32))


STATES = [
    (i, f) for i in (None, torch.float32, torch.bfloat16) for f in (None, torch.float32, torch.bfloat16)
]
STATES = [(i, f) for i, f in STATES if i is None or f is None or i == f]


@pytest.mark.parametrize(("initial", "final"), STATES)
# A head's rows on 4, 2 and 1 CTAs, and more heads than SMs.
@pytest.mark.parametrize("H", [1, 40, 80, 133])
def test_states(ops, H, initial, final):
    equals_reference(ops, inputs(2, 53, H, initial=initial), final)


@pytest.mark.parametrize("T", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65, 127, 500])
def test_lengths(ops, T):
    equals_reference(ops, inputs(1, T, 3, initial=torch.float32, seed=T))


def test_sequences_with_empty_ones(ops):
    lengths = [0, 1, 16, 0, 17, 100, 0]
    equals_reference(ops, inputs(1, sum(lengths), 2, lengths=lengths, initial=torch.float32))


def with_options(x, *, seed=0, group=1, wide=False, nats=None, **kinds):
    """Arguments of fwd with another gate, beta or norm. `nats`: the logarithm of the gate tensor's size."""
    generator = torch.Generator(x["q"].device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device=x["q"].device, generator=generator)

    x = x | kinds
    for name in ("q", "k"):
        x[name] = x[name][:, :, ::group].contiguous()
        if not kinds.get("use_qk_l2norm_in_kernel", True):
            x[name] = (x[name].float() / x[name].float().norm(dim=-1, keepdim=True)).bfloat16()
    if not kinds.get("use_beta_sigmoid_in_kernel", True):
        x["beta"] = x["beta"].float().sigmoid()
    if nats is not None:
        x["g"] = -torch.exp(nats + 3 * normal(*x["g"].shape))
    for name in ("g", "beta"):
        x[name] = x[name].float() if wide else x[name].bfloat16()
    return x


ACTIVATED = {"use_gate_in_kernel": False, "A_log": None, "dt_bias": None, "lower_bound": None}
OPTIONS = [
    {"group": 2},
    {"wide": True, "A_log": None, "dt_bias": None},
    {"lower_bound": None},
    {"lower_bound": None, "allow_neg_eigval": True, "wide": True},
    ACTIVATED | {"nats": -4.0},
    # Decays that leave the range of fp32 in some warps of some chunks, and in all.
    ACTIVATED | {"nats": -2.0, "wide": True, "use_beta_sigmoid_in_kernel": False},
    ACTIVATED | {"nats": 4.0, "use_qk_l2norm_in_kernel": False},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("H", [2, 80, 134])
def test_options(ops, H, options):
    equals_reference(ops, with_options(inputs(2, 150, H, initial=torch.float32), **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_algorithm_with_options(options):
    a = make(T=40, initial=np.float32)
    x = {name: a[name] for name in REFERENCE_ARGUMENTS if name in a}
    x = with_options(to_torch(x, "cpu"), **options)
    out, state = torch_ref.forward(torch_ref.CpuOps(), **x)
    want, want_state = flash_kda.reference(**x)
    assert error(out.double().numpy(), want.numpy()) <= BARS["cuda"][0] / 2
    assert error(state.double().numpy(), want_state.numpy()) <= BARS["cuda"][1] / 2


@pytest.mark.parametrize(
    "options", [{"T": 70}, {"T": 33, "B": 2, "initial": np.float32}, {"lengths": [5, 0, 40]}]
)
def test_algorithm(options):
    a = make(**options)
    x = to_torch({name: a[name] for name in REFERENCE_ARGUMENTS if name in a}, "cpu")
    out, state = torch_ref.forward(torch_ref.CpuOps(), **x)
    want, want_state = truth(a)
    # Products are tf32 as on a GPU, and CpuOps truncates to tf32 as a GPU does.
    assert error(out.double().numpy(), want) <= BARS["cuda"][0] / 2
    assert error(state.double().numpy(), want_state) <= BARS["cuda"][1] / 2
