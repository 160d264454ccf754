"""Inputs of one shape, the same in every process. Needs PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from .shapes import DIM, bytes_once, parse

L2_BYTES = 50 << 20
MOST_SETS = 32
# Bias of the gate from a head's first channel to its last. With g ~ N(0, 1) and the bound at -5 nats a token:
GATES = {
    # 3e-4 to 4.2 nats a token, with a median of 0.02 to 0.2: the span within every head of a trained model.
    "mixed": (-10.0, 2.0),
    # Every channel remembers at least hundreds of tokens.
    "slow": (-12.0, -6.0),
    # Every channel forgets within a few tokens. No trained model is like this.
    "fast": (1.0, 3.0),
}


def make_sets(shape: str, gates: str, states: str, device: str) -> list[dict[str, Any]]:
    """As many sets of arguments as it takes for none to be in the L2 cache when its turn comes again."""
    size = bytes_once(shape, states)
    # Between two uses of a set, twice the cache is read. A set that is far larger pushes itself out.
    count = 1 if size > 40 * L2_BYTES or device == "cpu" else min(MOST_SETS, 2 + 2 * L2_BYTES // size)
    _, lengths = parse(shape)
    shared = {}
    if len(lengths) > 1:  # one tensor for all sets, since FLA caches what it derives by identity
        shared["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    return [make(shape, gates, states, device, seed) | shared for seed in range(count)]


def make(shape: str, gates: str, states: str, device: str, seed: int) -> dict[str, Any]:
    heads, lengths = parse(shape)
    tokens = sum(lengths)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*size, dtype=dtype, device=device, generator=generator)

    x: dict[str, Any] = {name: normal(1, tokens, heads, DIM) for name in ("q", "k", "v", "g")}
    x |= {"beta": normal(1, tokens, heads), "scale": DIM**-0.5, "lower_bound": -5.0}
    x["A_log"] = torch.zeros(heads, device=device)
    x["dt_bias"] = torch.linspace(*GATES[gates], DIM, device=device).expand(heads, DIM).contiguous()
    if states != "none":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[states]
        x["initial_state"] = 0.1 * normal(len(lengths), heads, DIM, DIM, dtype=dtype)
    return x
