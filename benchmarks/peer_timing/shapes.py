"""The shapes, and the figures that are known and asked for them.

A shape is HEADS:LENGTHS, as in `flash-kda bench`: 96:8192, 96:1300,547 or 12:2048x4 (four sequences of 2048
tokens).
"""

from __future__ import annotations

import re
from typing import NamedTuple

DIM = 128
STATE_BYTES = {"fp32": 4, "bf16": 2, "none": 0}


class Known(NamedTuple):
    """Milliseconds of device time on an H100 SXM, states in fp32."""

    bar: float | None  # what this library must not exceed
    flashkda: float | None  # MoonshotAI's FlashKDA of July 2026, measured before


KNOWN = {
    "96:8192": Known(0.55, 1.486),
    "96:1300,547,2048,963,271,3063": Known(0.58, 1.567),
    "96:1024x8": Known(0.52, 1.370),
    "64:8192": Known(0.48, 1.247),
    "64:1300,547,2048,963,271,3063": Known(0.40, 1.101),
    "64:1024x8": Known(0.36, 0.925),
    "12:2048": Known(0.055, 0.236),
    "16:2048": Known(0.060, 0.244),
    "8:4096": Known(0.070, 0.423),
    "12:4096": Known(0.080, 0.430),
    "12:2048x4": Known(0.110, 0.321),
    "16:8192": Known(0.150, 0.881),
    "4:1024": Known(0.035, 0.118),
    "10:3072": Known(0.065, 0.328),
    "24:8192": Known(0.200, 0.932),
    "16:2048x8": Known(0.19, 0.482),
    "32:8192": Known(0.26, None),
    "8:65536": Known(0.60, 6.22),
    "4:131072": Known(0.60, 11.8),
    "1:262144": Known(0.60, 22.5),
    "12:128x64": Known(0.12, 0.246),
    "16:256x64": Known(0.24, 0.527),
    "12:16x256": Known(0.22, 0.371),
    "32:512x32": Known(0.40, 0.956),
    "8:30000,100x50": Known(None, None),
    "16:12000,400x11": Known(None, None),
}
# Shapes of few heads, as one of eight GPUs has them that serve a model. Other implementations publish the
# geometric mean over these shapes.
SERVING = list(KNOWN)[6:16]

_SHAPE = re.compile(r"([1-9]\d*):([1-9]\d*(?:x[1-9]\d*)?(?:,[1-9]\d*(?:x[1-9]\d*)?)*)")


def parse(shape: str) -> tuple[int, list[int]]:
    """Heads and the sequences' lengths."""
    match = _SHAPE.fullmatch(shape)
    if not match:
        raise ValueError(f"shape {shape!r}: it must be HEADS:LENGTHS, like 96:8192, 96:1300,547 or 12:2048x4")
    parts = [part.partition("x") for part in match[2].split(",")]
    return int(match[1]), [int(tokens) for tokens, _, times in parts for _ in range(int(times or 1))]


def label(shape: str) -> tuple[str, str]:
    """Lengths and heads for a reader: "1024 x 8", "96"."""
    heads, _, lengths = shape.partition(":")
    return lengths.replace("x", " x "), heads


def bytes_once(shape: str, states: str) -> int:
    """What must cross memory at least once: q, k, v, g, beta and out in bf16, and both states."""
    heads, lengths = parse(shape)
    rows = sum(lengths) * heads
    return rows * (5 * DIM + 1) * 2 + 2 * len(lengths) * heads * DIM * DIM * STATE_BYTES[states]
