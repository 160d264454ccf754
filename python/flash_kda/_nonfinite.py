"""Sentences about the values that a call of `fwd` found not to be finite."""

from __future__ import annotations

import math
from typing import Any

# The rows of `nonfinite`, as flash_kda_checked_tensor in include/flash_kda.h has them.
CHECKED_ARRAYS = (
    "q",
    "k",
    "v",
    "g",
    "beta",
    "A_log",
    "dt_bias",
    "initial_state",
    "out",
    "final_state",
)
_DIM = 128


def describe(
    nonfinite: Any, q: Any, cu_seqlens: Any, v: Any, initial_state: Any, final_state: Any
) -> list[str]:
    shape = tuple(nonfinite.shape)
    if shape != (len(CHECKED_ARRAYS), 2):
        raise ValueError(
            f"nonfinite has shape {list(shape)}; it must be [tensors, 2] = [{len(CHECKED_ARRAYS)}, 2]"
        )
    shapes = _shapes(tuple(q.shape), cu_seqlens, v)
    pools = {"initial_state": initial_state, "final_state": final_state}
    pools = {name: tuple(state.shape) for name, state in pools.items() if state is not None}
    shapes |= pools
    sentences = []
    for name, (count, first) in zip(CHECKED_ARRAYS, nonfinite.tolist()):
        values = math.prod(shapes[name])
        # Several sequences may start from one slot of a pool, whose values then count once for each of them.
        fits = (count <= values or name in pools) and -1 <= first < values
        if not (count >= 0 and fits and (count == 0) == (first == -1)):
            raise ValueError(
                f"nonfinite has count {count} and first place {first} for {name}; a call of fwd with such a "
                f"q cannot have counted this in {values} values"
            )
        if count:
            place = ", ".join(map(str, _index(first, shapes[name])))
            verb = "is" if count == 1 else "are"
            sentences.append(
                f"{name}: {count} of {values} values {verb} not finite, the first is {name}[{place}]"
            )
    return sentences


def _shapes(q: tuple[int, ...], cu_seqlens: Any, v: Any) -> dict[str, tuple[int, ...]]:
    if len(q) != 4:
        raise ValueError(f"q has {len(q)} dimensions; it must have 4: [B, T, H, K]")
    B, T, H, _ = q
    HV = H if v is None else v.shape[2]
    states = (B if cu_seqlens is None else cu_seqlens.shape[0] - 1, HV, _DIM, _DIM)
    rows = {"q": q, "k": q, **dict.fromkeys(("v", "g", "out"), (B, T, HV, _DIM))}
    others = {"beta": (B, T, HV), "A_log": (HV,), "dt_bias": (HV, _DIM)}
    return {**rows, **others, "initial_state": states, "final_state": states}


def _index(place: int, shape: tuple[int, ...]) -> list[int]:
    index = []
    for size in reversed(shape):
        place, i = divmod(place, size)
        index.append(i)
    return index[::-1]
