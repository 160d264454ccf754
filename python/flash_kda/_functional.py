"""The forms of the forward pass that return new arrays: `compute`, and what it shares with `chunk_kda`."""

from __future__ import annotations

from typing import Any

from . import _arrays
from ._call_options import as_int


def new_results(
    torch_layer: Any, q: Any, v: Any, initial_state: Any, cu_seqlens: Any, with_state: bool, options: dict
) -> tuple[Any, ...]:
    """A new output, a new final state or None, and new checkpoints or None, and after each of them what fwd
    takes to write it. Takes checkpoint_rows out of the options."""
    is_tensor = torch_layer is not None and isinstance(v, torch_layer.Tensor)
    if not is_tensor:
        _arrays.check_makes_arrays(v)
    makes = torch_layer if is_tensor else _arrays
    out = makes.empty_like(v, v.shape, False)
    state: tuple[Any, Any] = (None, None)
    if with_state and options.get("state_indices") is not None:
        if initial_state is None:
            raise ValueError(
                "state_indices is given without initial_state; initial_state must be the pool of which "
                "compute returns a changed copy"
            )
        state = makes.copy_of("initial_state", initial_state)
    elif with_state:
        is_fp32 = initial_state is None or initial_state.dtype != v.dtype
        state = makes.empty_like(v, _state_shape(torch_layer, q, v, cu_seqlens), is_fp32)
    rows = checkpoint_rows(torch_layer, v.shape, options)
    checkpoints: tuple[Any, Any] = (None, None)
    if options.get("checkpoint_states") is not None:
        checkpoints = (options["checkpoint_states"], options["checkpoint_states"])
    elif rows is not None:
        checkpoints = makes.empty_like(v, (rows, *v.shape[2:3], 128, 128), True, True)
    return (*out, *state, *checkpoints)


def _shape_of(torch_layer: Any, x: Any) -> tuple[int, ...]:
    """() for what has no shape. torch.compile of PyTorch 2.4 traces no getattr of a tensor with a default."""
    if torch_layer is not None and isinstance(x, torch_layer.Tensor):
        return x.shape
    return getattr(x, "shape", ())


def checkpoint_rows(torch_layer: Any, v_shape: Any, options: dict) -> int | None:
    """How many rows checkpoints need, or None if none are asked for. Takes checkpoint_rows out of the
    options.

    Raises:
        ValueError: the number depends on numbers in arrays, and the caller does not say it.
    """
    asked = as_int(options.pop("checkpoint_rows", None))
    offsets, every = options.get("checkpoint_offsets"), as_int(options.get("checkpoint_every"))
    if asked is not None and not isinstance(asked, int):
        raise TypeError(f"checkpoint_rows is of type {type(asked).__name__}; it must be an int or None")
    if asked is not None and asked < 0:
        raise ValueError(f"checkpoint_rows is {asked}; it must be 0 or more, or None")
    if offsets is None and every is None:
        if asked is not None:
            raise ValueError(
                "checkpoint_rows is given without checkpoint_offsets and checkpoint_every; it must be None"
            )
        return None
    if asked is not None:
        return asked
    for name in ("checkpoint_indices", "checkpoint_starts"):
        if options.get(name) is not None and options.get("checkpoint_states") is None:
            raise ValueError(
                f"{name} is given without checkpoint_rows; checkpoint_rows must say how many rows there are"
            )
    if offsets is not None:
        rows = 1
        for size in _shape_of(torch_layer, offsets):
            rows *= size
        return rows
    if not isinstance(every, int) or every < 1 or len(v_shape) != 4:
        return 0  # fwd refuses it
    # All sequences of one row of the batch have together at most as many as the row by itself.
    return v_shape[0] * (v_shape[1] // every)


def _state_shape(torch_layer: Any, q: Any, v: Any, cu_seqlens: Any) -> tuple[int, ...]:
    """The shape of the final state. Where the arrays have wrong shapes, which fwd refuses, it is any."""
    rows, channels = v.shape, (_shape_of(torch_layer, q) or v.shape)[-1:]
    borders: Any = rows[:1] if cu_seqlens is None else _shape_of(torch_layer, cu_seqlens)
    if len(rows) != 4 or len(borders) != 1 or len(channels) != 1:
        return (0, 0, 0, 0)
    N = borders[0] if cu_seqlens is None else max(borders[0] - 1, 0)
    return (N, rows[2], rows[3], channels[0])
