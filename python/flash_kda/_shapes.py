"""What a call of some shape would do: how it runs, and how much workspace it needs. Nothing is computed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from . import _arrays, _lib
from ._backward_options import BWD, BwdOptions
from ._call_options import KnownOptions, as_int, option_fields
from ._decode_options import APPLY, DECODE, DECODE_LAYER
from ._options import BOTH_PARAMETERS, Options


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
        sizes = {
            "T_total": T_total,
            "H": H,
            "N": N,
            "HV": H if HV is None else HV,
            "checkpoints": checkpoints,
        }
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

    def params(self, device: _lib.Device) -> _lib.FwdParams:
        """The struct of a call of that shape, without the memory of its arrays."""
        params = _lib.FWD.new_params()
        params.device = device
        self.options.apply_to(params)
        f32, bf16 = _lib.F32, _lib.BF16
        gate = f32 if self.fp32_gate else bf16
        T, N = self.T_total, self.N
        shapes = {
            "q": (bf16, (1, T, self.H, 128)),
            "k": (bf16, (1, T, self.H, 128)),
            "v": (bf16, (1, T, self.HV, 128)),
            "g": (gate, (1, T, self.HV, 128)),
            "beta": (gate, (1, T, self.HV)),
            "out": (bf16, (1, T, self.HV, 128)),
        }
        if self.options.has("A_log"):
            shapes |= {"A_log": (f32, (self.HV,)), "dt_bias": (f32, (self.HV, 128))}
        if N > 1:  # one sequence needs none
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


_ROWS = ("q", "k", "v", "g", "beta", "out")


def _resize(params: _lib.FwdParams, T_total: int, N: int, rows: int) -> None:
    """Gives the struct of a call other sizes. rows: 1, with cu_seqlens, or N, without."""
    for name in _ROWS:
        tensor = getattr(params, name)
        tensor.shape[0], tensor.shape[1] = rows, T_total // rows
    params.cu_seqlens.ndim = rows == 1
    params.cu_seqlens.dtype, params.cu_seqlens.shape[0] = _lib.I64, N + 1
    params.state_indices.shape[0] = params.checkpoint_offsets.shape[0] = N


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
    return _lib.explain(shape.params(_device_of(device).device))


class DecodeShape:
    """The sizes of a call of `decode`, `decode_layer` or `apply_records`, and what it asks for."""

    def __init__(
        self,
        N: Any,
        T: Any,
        H: Any,
        *,
        function: str,
        HV: Any,
        write_states: str,
        kernel: str | None,
        state_v_first: bool,
        **flags: bool,
    ):
        if function not in _DECODE_FUNCTIONS:
            names = ", ".join(f'"{name}"' for name in _DECODE_FUNCTIONS)
            raise ValueError(f"function is {function!r}; it must be one of {names}")
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name} is of type {type(value).__name__}; it must be True or False")
        self.N, self.H = _checked("N", N, 1), _checked("H", H, 1)
        self.T, self.HV = _checked("T", T, 0), self.H if HV is None else _checked("HV", HV, 1)
        if function != "decode" and self.HV != self.H:
            raise ValueError(f"HV is {self.HV} and H is {self.H}; they must be equal for {function}")
        self.function, self.flags = function, flags
        self.each = write_states == "each" and not flags["with_written_states"]
        known, self.explain = _DECODE_FUNCTIONS[function]
        for name in ("cu_seqlens", "parents", "records", "written_states", "past_records"):
            takes = (*known.cls.required_arrays, *known.cls.optional_arrays)
            if flags[f"with_{name}"] and (name not in takes or function == "apply_records"):
                raise ValueError(f"with_{name} is True; it must be False for {function}")
        options: dict[str, Any] = {"kernel": kernel, "state_v_first": state_v_first}
        if function != "apply_records":
            options["write_states"] = write_states
        self.arrays = self._arrays(write_states)
        bits = known.cls.bits_of(*(name for name in self.arrays if name in known.cls.optional_arrays))
        self.options = known.cls(bits, **options).checked()

    def _arrays(self, write_states: str) -> dict[str, tuple[int, tuple[int, ...]]]:
        """The dtypes and shapes of the call's arrays."""
        f32, bf16, flags = _lib.F32, _lib.BF16, self.flags
        N, T, H, HV, D = self.N, self.T, self.H, self.HV, 128
        gate, state = f32 if flags["fp32_gate"] else bf16, bf16 if flags["bf16_state"] else f32
        rows = (1, N * T) if flags["with_cu_seqlens"] else (N, T)
        states = N * max(T, 1) if write_states == "each" else N
        pool = (max(states, N), HV, D, D)
        arrays: dict[str, tuple[int, tuple[int, ...]]] = {"state": (state, pool)}
        if self.function == "apply_records":
            arrays |= {"records": (f32, (N, T, HV, 3 * D)), "num_accepted_tokens": (_lib.I64, (N,))}
            return arrays
        arrays |= {
            "g": (gate, (*rows, HV, D)),
            "beta": (gate, (*rows, HV)),
            "out": (bf16, (*rows, HV, D)),
            "A_log": (f32, (HV,)),
            "dt_bias": (f32, (HV, D)),
        }
        if self.function == "decode":
            arrays |= {name: (bf16, (*rows, H, D)) for name in ("q", "k")} | {"v": (bf16, (*rows, HV, D))}
        else:
            arrays |= {
                "x": (bf16, (*rows, 3 * H * D)),
                "weight": (f32, (3 * H * D, 4)),
                "conv_state": (bf16, (pool[0], 3 * H * D, 3)),
                "output_gate": (bf16, (*rows, H, D)),
                "norm_weight": (f32, (D,)),
            }
        if self.each:
            arrays["state_indices"] = (_lib.I64, (N, max(T, 1)))
        if flags["with_past_records"]:
            arrays["num_accepted_tokens"] = (_lib.I64, (N,))
        optional = {
            "with_cu_seqlens": ("cu_seqlens", _lib.I64, (N + 1,)),
            "with_parents": ("parents", _lib.I64, (N, T)),
            "with_records": ("records", f32, (N, T, HV, 3 * D)),
            "with_written_states": ("written_states", state, pool),
            "with_past_records": ("past_records", f32, (N, T, HV, 3 * D)),
        }
        for flag, (name, dtype, shape) in optional.items():
            if flags[flag]:
                arrays[name] = dtype, shape
        return arrays

    def params(self, device: _lib.Device) -> Any:
        params = self.options.function.new_params()
        params.device = device
        self.options.apply_to(params)
        for name, (dtype, shape) in self.arrays.items():
            tensor = getattr(params, name)
            _lib.set_shape(tensor, dtype, shape)
            tensor.data = 64  # is there, and is not read
        if self.function != "apply_records":
            params.lower_bound = -5.0
        return params


_DECODE_FUNCTIONS: dict[str, tuple[KnownOptions, str]] = {
    "decode": (DECODE, "flash_kda_explain_decode"),
    "decode_layer": (DECODE_LAYER, "flash_kda_explain_decode_layer"),
    "apply_records": (APPLY, "flash_kda_explain_apply"),
}


def explain_decode(device: Any, shape: DecodeShape) -> str:
    return _lib.explain(shape.params(_device_of(device).device), shape.explain)


# Ratio of neighbouring sizes among those that _batches_up_to tries, and what is added to the largest
# workspace that they need, in percent, for the sizes between them.
_STEP_OF_TOKENS, _STEP_OF_SEQUENCES, _PERCENT_BETWEEN = 1.08, 2, 25
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


# What a call may ask for that can change its workspace: each of these rows, where the caller does not say it.
_MAY_ASK: tuple[dict[str, Any], ...] = (
    {},
    {"with_state_indices": True, "checkpoints": 1},
    {"with_state_indices": True, "checkpoints": 1, "lower_bound": None, "fp32_gate": True},
    {"with_state_indices": True, "checkpoints": 1, "use_gate_in_kernel": False, "fp32_gate": True},
)


def workspace_size(
    sizes: tuple[Any, ...],
    device: Any,
    batch_invariant: bool | None,
    max_seqlen: int | None,
    largest_batch: bool,
    asked: dict[str, Any],
) -> int:
    """sizes: T_total, H, N and HV. asked: the options that the caller names."""
    most = 0
    for may in _MAY_ASK:
        options = {**may, **asked}
        if options.get("checkpoint_every") is not None:
            options["checkpoints"] = 0
        shape = Shape(*sizes, max_seqlen=max_seqlen or 0, batch_invariant=bool(batch_invariant), **options)
        most = max(most, _largest(shape, device, batch_invariant, max_seqlen, largest_batch))
    return most + most * _PERCENT_BETWEEN // 100 // 64 * 64 if largest_batch else most


def saved_size(sizes: tuple[Any, ...], device: Any, max_seqlen: int | None, asked: dict[str, Any]) -> int:
    """sizes: T_total, H, N and HV. asked: the options that the caller names."""
    shape = Shape(*sizes, max_seqlen=max_seqlen or 0, **asked)
    T_total, N = shape.T_total, shape.N
    found, refused = [], None
    for info in _lib.device_infos() if device is None else [_device_of(device)]:
        for kernel in _lib.kernel_infos():
            is_named = shape.options.kernel in (None, kernel.name.decode())
            if kernel.device_type != info.device.type or not is_named:
                continue
            params = shape.params(info.device)
            params.kernel = kernel.name
            longest = {0, T_total} if max_seqlen is None else {max_seqlen}
            try:
                for length in longest:
                    _resize(params, T_total, N, 1)
                    params.max_seqlen = length
                    found.append(_lib.saved_size(params))
                if T_total % N == 0:  # a batch without cu_seqlens
                    _resize(params, T_total, N, N)
                    params.cu_seqlens.ndim = params.max_seqlen = 0
                    found.append(_lib.saved_size(params))
            except RuntimeError as error:
                refused = error
    if not found:
        raise refused or ValueError(f"kernel is {shape.options.kernel!r}; it must be one of the device's")
    return max(found)


def why_no_gradients(device: tuple[int, int], HV: int, options: tuple[tuple[str, Any], ...]) -> str:
    """Why no kernel of the device computes gradients, or "". HV: value heads for each head of q and k.
    options: of `bwd`, and lower_bound, by name."""
    named = dict(options)
    lower_bound, with_gate = named.pop("lower_bound", -5.0), named.get("use_gate_in_kernel", True)
    arrays = (*(("A_log", "dt_bias") if with_gate else ()), "dout", "dv")
    asked = BWD.known(BwdOptions.bits_of(*arrays), *_values(named), lower_bound is not None)
    params = _lib.BWD.new_params()
    params.device.type, params.device.index = device
    asked.apply_to(params)
    params.lower_bound = 0.0 if lower_bound is None else lower_bound
    rows = (1, 64, HV, 128)
    shapes = {
        "q": (1, 64, 1, 128),
        "k": (1, 64, 1, 128),
        "beta": rows[:3],
        "A_log": (HV,),
        "dt_bias": rows[2:],
    }
    for name in asked.names:
        dtype = _lib.F32 if name in ("A_log", "dt_bias") else _lib.BF16
        _lib.set_shape(getattr(params, name), dtype, shapes.get(name, rows))
    try:
        _lib.bwd_workspace_size(params)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def _values(named: dict[str, Any]) -> Iterator[Any]:
    """The values of the options of `bwd`, in their order."""
    return (named.get(f.name, f.default) for f in option_fields(BwdOptions))


def _largest(
    shape: Shape, device: Any, batch_invariant: bool | None, max_seqlen: int | None, largest_batch: bool
) -> int:
    """The largest workspace of calls of a shape, or of smaller batches too."""
    most = 0
    batches = [(shape.T_total, shape.N)]
    if largest_batch:
        batches = [*_batches_up_to(shape.T_total, shape.N)]
    invariance = (False, True) if batch_invariant is None else (batch_invariant,)
    infos = _lib.device_infos() if device is None else [_device_of(device)]
    for info, kernel in itertools.product(infos, _lib.kernel_infos()):
        is_named = shape.options.kernel in (None, kernel.name.decode())
        if not info.kernel or kernel.device_type != info.device.type or not is_named:
            continue
        params = shape.params(info.device)
        params.kernel = kernel.name
        for T_total, N in batches:
            longest = {0, T_total} if max_seqlen is None else {max_seqlen}
            if largest_batch:
                average = -(-T_total // N)
                longest = {min(length, T_total) for length in (*longest, average, 8 * average)}
            rows = {1, N} if T_total % N == 0 else {1}
            for row, length, invariant in itertools.product(rows, longest, invariance):
                _resize(params, T_total, N, row)
                params.batch_invariant = invariant
                params.max_seqlen = length if row == 1 else 0  # which changes nothing without cu_seqlens
                try:
                    most = max(most, _lib.workspace_size(params))
                except RuntimeError:  # this kernel cannot run on this device, or not with these options
                    break
    return most
