"""Problems for tests: arguments of fwd, the right results for them, and error measures, in NumPy alone."""

import numpy as np
from ml_dtypes import bfloat16

import flash_kda

# The largest relative RMS error of out and of an fp32 state that is allowed, against the fp64 recurrence:
# the bars CPU and OTHER of support/cases.c.
BARS = {"cpu": (2.2e-3, 1e-5), "cuda": (5.6e-3, 4.8e-3)}
# The arguments of fwd, in the order that callers know.
ARGUMENTS = (
    "q",
    "k",
    "v",
    "g",
    "beta",
    "scale",
    "out",
    "A_log",
    "dt_bias",
    "lower_bound",
    "initial_state",
    "final_state",
    "cu_seqlens",
)
REFERENCE_ARGUMENTS = tuple(name for name in ARGUMENTS if name not in ("out", "final_state"))


def make(T=70, H=2, B=1, lengths=None, initial=None, final=np.float32, cu_dtype=np.int64, seed=0):
    """The arguments of fwd. lengths: tokens of each sequence, with B = 1 and T as their sum; None: each batch
    row is a sequence. initial and final: dtypes of the states, or None. What fwd will write holds NaN."""
    rng = np.random.default_rng(seed)
    N = B
    if lengths is not None:
        T, N = sum(lengths), len(lengths)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(bfloat16)

    arguments = {name: normal(B, T, H, 128) for name in ("q", "k", "v", "g")}
    arguments["beta"] = normal(B, T, H)
    arguments["scale"] = 128**-0.5
    arguments["out"] = np.full((B, T, H, 128), np.nan, bfloat16)
    arguments["A_log"] = rng.uniform(-1, 1, H).astype(np.float32)
    arguments["dt_bias"] = rng.uniform(-6, 1, (H, 128)).astype(np.float32)
    arguments["lower_bound"] = -5.0
    if initial is not None:
        arguments["initial_state"] = rng.standard_normal((N, H, 128, 128), dtype=np.float32).astype(initial)
    if final is not None:
        arguments["final_state"] = np.full((N, H, 128, 128), np.nan, final)
    if lengths is not None:
        arguments["cu_seqlens"] = np.cumsum([0, *lengths]).astype(cu_dtype)
    return arguments


def truth(arguments):
    """The right out and final state, in fp64."""
    return flash_kda.reference(**{n: arguments[n] for n in REFERENCE_ARGUMENTS if n in arguments})


def error(got, want):
    """The relative RMS error."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float(np.sqrt(((got - want) ** 2).sum() / max((want**2).sum(), 1e-300)))


def hold_to(arguments, expected, device):
    """Asserts that out, and final_state if it is fp32, are within the bars."""
    out_bar, state_bar = BARS[device]
    assert error(arguments["out"], expected[0]) <= out_bar
    if arguments.get("final_state") is not None and arguments["final_state"].dtype == np.float32:
        assert error(arguments["final_state"], expected[1]) <= state_bar


def to_torch(arguments, device):
    """The arguments as tensors with memory of their own."""
    import torch

    def convert(x):
        if not isinstance(x, np.ndarray):
            return x
        if x.dtype == bfloat16:
            return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16).to(device)
        return torch.from_numpy(x.copy()).to(device)

    return {name: convert(x) for name, x in arguments.items()}


def to_numpy(arguments):
    """The arguments as NumPy arrays."""

    def convert(x):
        if not hasattr(x, "detach"):
            return x
        x = x.detach().cpu()
        return (
            x.view(dtype=_torch().uint16).numpy().view(bfloat16)
            if x.dtype == _torch().bfloat16
            else x.numpy()
        )

    return {name: convert(x) for name, x in arguments.items()}


def _torch():
    import torch

    return torch
