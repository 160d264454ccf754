"""What a call of some shape would do: how it runs, and how much workspace it needs. Nothing is computed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from . import _arrays, _lib
from ._options import BIT, BOTH_PARAMETERS, Options, as_int


class Shape:
    """The sizes of a call, checked, and what it asks for."""

    def __init__(
        self,
        T_total: Any,
        H: Any,
        N: Any,
        HV: Any = None,
        *,
        lower_bound: Any = -5.0,
        with_state_indices: bool = False,
        checkpoints: Any = 0,
        fp32_gate: bool = False,
        use_gate_in_kernel: bool = True,
        **options: Any,
    ):
        sizes = {"T_total": T_total, "H": H, "N": N, "HV": H if HV is None else HV, "checkpoints": checkpoints}
        self.T_total, self.H, self.N, self.HV, self.checkpoints = (
            _checked(name, value, 1 if name in ("H", "N", "HV") else 0) for name, value in sizes.items()
        )
        for name, value in (("with_state_indices", with_state_indices), ("fp32_gate", fp32_gate)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} is of type {type(value).__name__}; it must be True or False")
        self.with_state_indices, self.fp32_gate = with_state_indices, fp32_gate
        self.options = Options(
            BOTH_PARAMETERS if use_gate_in_kernel is True else 0,
            use_gate_in_kernel=use_gate_in_kernel,
            has_lower_bound=lower_bound is not None,
            **options,
        ).checked()
        self.lower_bound = 0.0 if lower_bound is None else lower_bound

    def params(self, device: _lib.Device, rows: int, T_total: int, N: int) -> _lib.FwdParams:
        """The struct of a call with that many tokens and sequences, without the memory of its arrays. rows:
        1, with cu_seqlens, or N, without."""
        T = T_total // rows
        params = _lib.new_params()
        params.device = device
        self.options.apply_to(params)
        f32, bf16 = _lib.F32, _lib.BF16
        gate = f32 if self.fp32_gate else bf16
        shapes = {
            "q": (bf16, (rows, T, self.H, 128)),
            "k": (bf16, (rows, T, self.H, 128)),
            "v": (bf16, (rows, T, self.HV, 128)),
            "g": (gate, (rows, T, self.HV, 128)),
            "beta": (gate, (rows, T, self.HV)),
            "out": (bf16, (rows, T, self.HV, 128)),
        }
        if self.options.given & BIT["A_log"]:
            shapes |= {"A_log": (f32, (self.HV,)), "dt_bias": (f32, (self.HV, 128))}
        if rows == 1:
            shapes["cu_seqlens"] = (_lib.I64, (N + 1,))
        if self.with_state_indices:
            shapes["state_indices"] = (_lib.I64, (N,))
        if self.checkpoints:
            shapes["checkpoint_offsets"] = (_lib.I64, (N, self.checkpoints))
        if self.checkpoints or self.options.checkpoint_every:
            shapes["checkpoint_states"] = (f32, (1, self.HV, 128, 128))
        for name, (dtype, shape) in shapes.items():
            _lib.set_shape(getattr(params, name), dtype, shape)
        params.lower_bound = self.lower_bound
        return params


def _checked(name: str, value: Any, least: int) -> int:
    value = as_int(value)
    if not isinstance(value, int):
        raise TypeError(f"{name} is of type {type(value).__name__}; it must be an int")
    if not least <= value < 2**31:
        raise ValueError(f"{name} is {value}; it must be at least {least} and fit 32 bits")
    return value


def _device_name(info: _lib.DeviceInfo) -> str:
    return f"cuda:{info.device.index}" if info.device.type == _lib.CUDA else "cpu"


def _device_of(device: Any) -> _lib.DeviceInfo:
    """The device that a caller names; None is CUDA device 0 if it can be used, else the CPU."""
    infos = _lib.device_infos()
    if device is None:
        return infos[1 if len(infos) > 1 and infos[1].kernel else 0]
    named = {_device_name(info): info for info in infos}
    name = str(device) if isinstance(device, str) or _arrays.library_of(device) == "torch" else ""
    name = {"cuda": "cuda:0", "cpu:0": "cpu"}.get(name, name)
    if name not in named:
        raise ValueError(f"device is {device!r}; it must be None or one of {', '.join(named)}")
    return named[name]


def explain(device: Any, shape: Shape) -> str:
    params = shape.params(_device_of(device).device, 1, shape.T_total, shape.N)
    if shape.N == 1:
        params.cu_seqlens.ndim = 0  # one sequence needs none
    return _lib.explain(params)


# Ratio of neighbouring sizes among those that _batches_up_to tries, and what is added to the largest workspace
# that they need, in percent, for the sizes between them.
_STEP_OF_TOKENS, _STEP_OF_SEQUENCES, _PERCENT_BETWEEN = 1.04, 1.5, 25
_FEWEST_TOKENS = 128  # fewer are never cut into segments, on any device


def _geometric(most: int, least: int, ratio: float) -> list[int]:
    sizes, size = [most], float(most)
    while size / ratio >= least:
        size /= ratio
        sizes.append(int(size))
    return sizes


def _batches_up_to(T_total: int, N: int) -> Iterator[tuple[int, int]]:
    tokens = _geometric(T_total, _FEWEST_TOKENS, _STEP_OF_TOKENS)
    return itertools.product(tokens, [*_geometric(N, 2, _STEP_OF_SEQUENCES), 1])


def workspace_size(
    shape: Shape, device: Any, batch_invariant: bool | None, max_seqlen: int | None, largest_batch: bool
) -> int:
    infos = _lib.device_infos() if device is None else [_device_of(device)]
    kernels = [
        (info.device, kernel)
        for info in infos
        for kernel in _lib.kernel_infos()
        if info.kernel
        and kernel.device_type == info.device.type
        and shape.options.kernel in (None, kernel.name.decode())
    ]
    batches = _batches_up_to(shape.T_total, shape.N) if largest_batch else [(shape.T_total, shape.N)]
    sizes = [0]
    for T_total, N in batches:
        longest = {0, T_total} if max_seqlen is None else {max_seqlen}
        if largest_batch:
            average = -(-T_total // N)
            longest = {min(length, T_total) for length in (*longest, average, 8 * average)}
        rows = {1, N} if T_total % N == 0 else {1}
        invariance = (False, True) if batch_invariant is None else (batch_invariant,)
        for (where, kernel), row, length, invariant in itertools.product(kernels, rows, longest, invariance):
            params = shape.params(where, row, T_total=T_total, N=N)
            params.kernel, params.batch_invariant = kernel.name, invariant
            params.max_seqlen = length if row == 1 else 0  # which changes nothing without cu_seqlens
            with contextlib.suppress(RuntimeError):  # this kernel cannot run on this device
                sizes.append(_lib.workspace_size(params))
    most = max(sizes)
    return most + most * _PERCENT_BETWEEN // 100 // 64 * 64 if largest_batch else most
