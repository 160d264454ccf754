"""Kimi Delta Attention (KDA), forward pass, on CPUs and NVIDIA GPUs.

`fwd` is the forward pass, for PyTorch tensors, NumPy arrays and all arrays with DLPack's two methods. Its
docstring has the formula. `fwd` writes into arrays that it is given; `compute` returns new ones, and so
serves JAX. `describe_nonfinite` says where a call has found NaN and infinities. `reference` is the slow fp64
definition. `devices` and `kernels` list what a call can run on, and `explain` says how it would run.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _arrays, _fla, _installed, _later, _lib, _nonfinite, _reference
from ._options import Options, as_int, known_options

if TYPE_CHECKING:
    from typing import Protocol, SupportsFloat

    class Array(Protocol):
        """A PyTorch tensor, a NumPy array, or anything else with DLPack's two methods."""

        def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

        def __dlpack_device__(self) -> tuple[Any, Any]: ...


__all__ = [
    "Device",
    "compute",
    "describe_nonfinite",
    "devices",
    "explain",
    "fwd",
    "get_workspace_size",
    "kernels",
    "reference",
]
__version__ = _lib.version()


def __dir__() -> list[str]:
    """What the package offers, without the modules that it is made of."""
    return sorted([*__all__, "__version__"])


_torch_layer: Any = None  # flash_kda._torch, once PyTorch is imported


def fwd(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    scale: SupportsFloat,
    out: Array,
    A_log: Array,
    dt_bias: Array,
    lower_bound: SupportsFloat,
    initial_state: Array | None = None,
    final_state: Array | None = None,
    cu_seqlens: Array | None = None,
    *,
    kernel: str | None = None,
    threads: int = 0,
    batch_invariant: bool = False,
    max_seqlen: int = 0,
    cut: str = "auto",
    nonfinite: Array | None = None,
) -> None:
    """The forward pass of Kimi Delta Attention. Writes `out`, and `final_state` if given; returns None.

    Each head of each sequence keeps a state S of K x V numbers. For every token t, in order:

        g_t      = lower_bound * sigmoid(exp(A_log) * (g + dt_bias))      log decay (nats), one per channel
        q_t, k_t = q / sqrt(sum(q^2) + 1e-6), k / sqrt(sum(k^2) + 1e-6)   over the K channels
        b_t      = sigmoid(beta)
        S        = diag(exp(g_t)) S                                       forget
        u_t      = b_t (v_t - S^T k_t)                                    what the state did not predict
        S        = S + k_t u_t^T                                          write
        o_t      = scale S^T q_t                                          read

    (Kimi Linear, arXiv:2510.26692, with the gate bounded from below: the "safe gate" of
    flash-linear-attention.) B batch rows, T tokens a row, H heads, N sequences, K = V = 128 channels.

    Args:
        q, k: bf16 [B, T, H, K], query and key, before their L2 norm.
        v: bf16 [B, T, H, V], value.
        g: bf16 [B, T, H, K], gate before its activation.
        beta: bf16 [B, T, H], logits of the write strength.
        scale: finite; multiplies the output, usually K ** -0.5.
        out: bf16 [B, T, H, V], written.
        A_log: fp32 [H].
        dt_bias: fp32 [H, K].
        lower_bound: lower bound of one token's log decay, in nats, in [-5, 0].
        initial_state: bf16 or fp32 [N, H, V, K] (V first), or None: zeros.
        final_state: the same, written, or None. It has the dtype of initial_state if both are given; it may
            be the same array, which is then updated in place.
        cu_seqlens: int64 or int32 [N + 1] on the device, or None. Sequence n is tokens cu_seqlens[n] to
            cu_seqlens[n + 1] - 1 of the one batch row (B must be 1); the first value is 0, the last one is T,
            and values never decrease. None: each batch row is a sequence, N = B. The values are checked on
            the CPU. On a GPU they are clamped into [0, T] instead, as the call does not wait to look at them.
        kernel: the name of one of `kernels()`; None picks the best for the device.
        threads: number of CPU threads; 0 means as many as the process may run on. The result does not depend
            on it.
        batch_invariant: True promises that a sequence's output and final state have the same bits whatever
            else is in the batch, and wherever the sequence is in the batch. The promise can cost time with
            the kernel "hopper", which then computes batches differently. All other kernels always keep it.
        max_seqlen: number of tokens of the longest sequence, in [0, T], if the caller knows it; 0: not known.
            With cu_seqlens on a GPU the number decides whether a long sequence is worth cutting, which can be
            several times as fast. A wrong number costs time, not correctness. Without cu_seqlens it changes
            nothing.
        cut: how the kernel "hopper" may cut sequences into segments that are computed in parallel: "auto"
            where it pays, "never", "always" whether it pays or not, "mixed" only by the schedule for
            sequences of different lengths. With "always" segments are so long that each CTA pair has about
            one segment of one head, and have at least 128 tokens on average; a sequence without room for two
            stays whole. Meant for tests and benchmarks. Results differ within the error budget. Other kernels
            take every value and cut nothing.
        nonfinite: int64 [10, 2] on the device, written, or None. For debugging a model: the call also counts
            the values that are NaN or an infinity, in the inputs as they are before it and in what it has
            written. Row i is for the i-th of q, k, v, g, beta, A_log, dt_bias, initial_state, out and
            final_state. It has the number of such values, and the place of the first one in the flattened
            array, or -1; `describe_nonfinite` puts the rows into sentences. Every element counts, whatever
            cu_seqlens says, and so does an infinity in g or beta, which is a number to the sigmoid. A_log and
            dt_bias count as they are in fp32.

    All arrays are contiguous, on one device, and aligned to 16 bytes (A_log, beta, cu_seqlens and nonfinite:
    to an element); what is written shares memory with nothing else, and is no array of a library whose arrays
    are immutable, as JAX's are (see `compute`). T may be 0, and so may a sequence's length. Integers may be
    of any type that has `__index__`.

    PyTorch tensors may also be as layers and engines hold them. The call then makes the tensor that it needs,
    which takes time and memory in every call:

    - A tensor that is not contiguous, a slice of one that holds q, k and v, say, is copied. `out` and
      `final_state` are computed beside the tensor and then copied into it.
    - g and beta in fp32 are rounded to bf16.
    - A_log and dt_bias in 16 bits are converted to fp32. A_log may have further dimensions of size 1, as
      [1, 1, H, 1]; so may dt_bias, which may also be flat, [H K].

    On a GPU the call returns once the work is queued: on PyTorch's current stream for tensors, on CuPy's for
    CuPy arrays. Arrays of other libraries (JAX, say) know nothing of the work that is queued, so for them the
    call uses the legacy default stream and waits until the result is there.

    A signal whose handler raises, as Ctrl-C's does, ends a long call on the CPU that was made in the main
    thread, within 100 ms. What `out` and `final_state` hold then is unspecified.

    Raises:
        ValueError: an argument has a wrong shape, value, device or memory.
        TypeError: an argument has a wrong dtype or is of a wrong type.
        RuntimeError: there is no such device or kernel, the driver failed, or gradients or tangents were
            asked for, as there is no derivative yet.
    In each of these cases nothing was written. The message of a ValueError or TypeError names the argument.
    """
    if _torch_layer is None and "torch" in sys.modules:
        _find_torch()
    arrays = [q, k, v, g, beta, out, A_log, dt_bias]
    if initial_state is not None:
        arrays.append(initial_state)
    if final_state is not None:
        arrays.append(final_state)
    if cu_seqlens is not None:
        arrays.append(cu_seqlens)
    if nonfinite is not None:
        arrays.append(nonfinite)
    given = (
        initial_state is not None,
        final_state is not None,
        cu_seqlens is not None,
        nonfinite is not None,
    )
    is_tensor = _torch_layer is not None and isinstance(q, _torch_layer.Tensor)
    is_traced = is_tensor and _torch_layer.is_compiling()
    # A compiler traces the constructor, since it cannot trace a cache.
    options = (Options if is_traced else known_options)(
        given, kernel, threads, batch_invariant, max_seqlen, cut
    )
    if is_traced:
        _torch_layer.fwd_traced(arrays, options, scale, lower_bound)
    elif is_tensor:
        _torch_layer.fwd(arrays, options, scale, lower_bound)
    else:
        _arrays.fwd(arrays, options, scale, lower_bound)


def describe_nonfinite(nonfinite: Any, q: Any, cu_seqlens: Any = None) -> list[str]:
    """What a call of `fwd` has counted, as sentences: one for each array that has NaN or infinities, such as
    "q: 3 of 4096 values are not finite, the first is q[0, 17, 2, 5]". An empty list if all values are finite.

    On a GPU this waits for the call, since it reads `nonfinite`.

    Args:
        nonfinite: what the call of `fwd` has filled in.
        q, cu_seqlens: the arguments of that call, of which only the shapes are read.

    Raises:
        ValueError: `nonfinite` has another shape, or counts that a call with such a q cannot have found.
    """
    return _nonfinite.describe(nonfinite, q, cu_seqlens)


def compute(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    scale: SupportsFloat,
    A_log: Array,
    dt_bias: Array,
    lower_bound: SupportsFloat,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    *,
    output_final_state: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """The forward pass into new arrays: `fwd` for libraries whose arrays are immutable, as JAX's are, and
    for all who do not keep output arrays of their own.

    Args:
        output_final_state: whether the final state is wanted, too.
        options: `kernel`, `threads` and all other arguments that `fwd` takes by keyword alone.
    The other arguments are as for `fwd`.

    Returns:
        out [B, T, H, V] in bf16, and the final state [N, H, V, K] or None. The state has the dtype of
        initial_state, or fp32 without one. Both are of v's library and on v's device: PyTorch tensors, NumPy
        arrays, JAX arrays, or arrays of a library that follows the Python array API standard.

    Inside of `jax.jit`, `jax.grad` and `jax.vmap` arrays are tracers, which have no memory and are refused.
    Under `jax.jit` the call can go through `jax.pure_callback`, which copies arrays to the CPU and back.

    Raises:
        ValueError, TypeError, RuntimeError: as `fwd`.
    """
    out, written_out, state, written_state = _new_results(q, v, initial_state, cu_seqlens, output_final_state)
    fwd(
        q, k, v, g, beta, scale, written_out, A_log, dt_bias, lower_bound, initial_state, written_state,
        cu_seqlens, **options,
    )  # fmt: skip
    return out, state


def _new_results(q: Any, v: Any, initial_state: Any, cu_seqlens: Any, with_state: bool) -> tuple[Any, ...]:
    """A new output and a new final state or None, and after each of them what fwd takes to write it."""
    is_tensor = _torch_layer is not None and isinstance(v, _torch_layer.Tensor)
    if not is_tensor:
        _arrays.check_makes_arrays(v)
    empty_like = (_torch_layer if is_tensor else _arrays).empty_like
    out = empty_like(v, v.shape, False)
    if not with_state:
        return (*out, None, None)
    is_fp32 = getattr(initial_state, "dtype", None) != v.dtype
    return (*out, *empty_like(v, _state_shape(q, v, cu_seqlens), is_fp32))


def _state_shape(q: Any, v: Any, cu_seqlens: Any) -> tuple[int, ...]:
    """The shape of the final state. Where the arrays have wrong shapes, which fwd refuses, it is any."""
    rows, channels = v.shape, getattr(q, "shape", v.shape)[-1:]
    borders: Any = rows[:1] if cu_seqlens is None else getattr(cu_seqlens, "shape", ())
    if len(rows) != 4 or len(borders) != 1 or len(channels) != 1:
        return (0, 0, 0, 0)
    N = borders[0] if cu_seqlens is None else max(borders[0] - 1, 0)
    return (N, rows[2], rows[3], channels[0])


def get_workspace_size(T_total: int, H: int, N: int = 1) -> int:
    """The bytes of workspace that a call with T_total tokens in all, H heads and N sequences may need.

    It is the largest over the devices of this machine, their kernels, and the values of batch_invariant and
    max_seqlen. It is for cut="auto": the other values of cut, which are meant for tests and benchmarks, may
    need more, and `explain` says how much. `fwd` allocates its workspace by itself.

    Raises:
        TypeError: an argument is no int.
        ValueError: a size is out of range.
    """
    T_total, H, N = _checked_sizes(T_total, H, N)
    asked = [Options(), Options(max_seqlen=T_total), Options(batch_invariant=True)]
    sizes = [0]
    for info in _lib.device_infos():
        for kernel in _lib.kernel_infos():
            if kernel.device_type != info.device.type or not info.kernel:
                continue
            for options in asked:
                params = _shape_params(T_total, H, N, True, info.device, options)
                params.kernel = kernel.name
                with contextlib.suppress(RuntimeError):  # this kernel cannot run on this device
                    sizes.append(_lib.workspace_size(params))
    return max(sizes)


def explain(
    T_total: int,
    H: int,
    N: int = 1,
    device: Any = None,
    kernel: str | None = None,
    batch_invariant: bool = False,
    max_seqlen: int = 0,
    cut: str = "auto",
) -> str:
    """Which kernel `fwd` would run for T_total tokens in all, H heads and N sequences, why, how it would lay
    the work out, and how much workspace it would use: a few lines to be read, whose wording may change.

    Args:
        device: "cpu", "cuda" (CUDA device 0), "cuda:1", or a torch.device; None is CUDA device 0 if it can be
            used, else the CPU.
        kernel, batch_invariant, max_seqlen, cut: as for `fwd`.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range, or there is no such device or kernel.
        RuntimeError: the kernel does not run on the device.
    """
    T_total, H, N = _checked_sizes(T_total, H, N)
    options = Options(
        kernel=kernel, batch_invariant=batch_invariant, max_seqlen=max_seqlen, cut=cut
    ).checked()
    infos = _lib.device_infos()
    if device is None:
        chosen = infos[1 if len(infos) > 1 and infos[1].kernel else 0]
    else:
        named = {_device_name(info): info for info in infos}
        name = str(device) if isinstance(device, str) or _arrays.library_of(device) == "torch" else ""
        name = {"cuda": "cuda:0", "cpu:0": "cpu"}.get(name, name)
        if name not in named:
            raise ValueError(f"device is {device!r}; it must be None or one of {', '.join(named)}")
        chosen = named[name]
    return _lib.explain(_shape_params(T_total, H, N, N > 1, chosen.device, options))


def _device_name(info: _lib.DeviceInfo) -> str:
    return f"cuda:{info.device.index}" if info.device.type == _lib.CUDA else "cpu"


def _checked_sizes(T_total: Any, H: Any, N: Any) -> tuple[int, int, int]:
    T_total, H, N = as_int(T_total), as_int(H), as_int(N)
    for name, value, least in (("T_total", T_total, 0), ("H", H, 1), ("N", N, 1)):
        if not isinstance(value, int):
            raise TypeError(f"{name} is of type {type(value).__name__}; it must be an int")
        if not least <= value < 2**31:
            raise ValueError(f"{name} is {value}; it must be at least {least} and fit 32 bits")
    return T_total, H, N


def _shape_params(
    T: int, H: int, N: int, with_seqlens: bool, device: _lib.Device, options: Options
) -> _lib.FwdParams:
    """The struct of a call of that shape, without the memory of its arrays."""
    params = _lib.new_params()
    params.device = device
    options.apply_to(params)
    for name in ("q", "k", "v", "g", "out"):
        _lib.set_shape(getattr(params, name), _lib.BF16, (1, T, H, 128))
    _lib.set_shape(params.beta, _lib.BF16, (1, T, H))
    _lib.set_shape(params.A_log, _lib.F32, (H,))
    _lib.set_shape(params.dt_bias, _lib.F32, (H, 128))
    if with_seqlens:
        _lib.set_shape(params.cu_seqlens, _lib.I64, (N + 1,))
    return params


@dataclass(frozen=True)
class Device:
    """One device of this machine.

    Attributes:
        type: "cpu" or "cuda".
        index: the CUDA ordinal; 0 for the CPU.
        name: "NVIDIA H100 80GB HBM3".
        arch: "sm_90", "x86-64 avx512".
        kernel: what runs there by default; "" if nothing can.
        reason: why nothing can run there, else "".
        units: SMs of a GPU, threads of the CPU.
        memory: bytes.
    """

    type: str
    index: int
    name: str
    arch: str
    kernel: str
    reason: str
    units: int
    memory: int


def devices() -> list[Device]:
    """The devices of this machine: the CPU first, then the GPUs, if CUDA can be used."""
    return [_describe(info) for info in _lib.device_infos()]


def _describe(info: _lib.DeviceInfo) -> Device:
    def text(field: bytes) -> str:
        return field.decode(errors="replace")

    return Device(
        "cuda" if info.device.type == _lib.CUDA else "cpu",
        info.device.index,
        text(info.name),
        text(info.arch),
        text(info.kernel),
        text(info.reason),
        info.units,
        info.memory,
    )


def kernels() -> list[str]:
    """The names that `fwd` takes as `kernel`."""
    return [info.name.decode() for info in _lib.kernel_infos()]


def reference(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: SupportsFloat,
    A_log: Any,
    dt_bias: Any,
    lower_bound: SupportsFloat,
    initial_state: Any = None,
    cu_seqlens: Any = None,
) -> tuple[Any, Any]:
    """The recurrence in the docstring of `fwd`, token by token in fp64 on the CPU: slow, and meant for tests.

    Takes the arguments of `fwd` as PyTorch tensors or JAX arrays (of any device), NumPy arrays, or arrays in
    CPU memory that have DLPack's two methods. Returns the output [B, T, H, V] and the final state
    [N, H, V, K] in fp64: CPU tensors if q is a tensor, else NumPy arrays.

    Raises:
        ValueError, TypeError: as `fwd`.
    """
    return _reference.reference(
        q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens
    )


_loading = threading.Lock()


def _load_torch_layer() -> None:
    """Imports flash_kda._torch, which also registers the operator. May run in several threads."""
    global _torch_layer
    with _loading:
        if _torch_layer is None:
            _torch_layer = importlib.import_module("._torch", __name__)


def _find_torch() -> None:
    """PyTorch is used only if the caller imported it, and only once the import is complete."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if spec is not None and not getattr(spec, "_initializing", False):
        _load_torch_layer()


_find_torch()
if _torch_layer is None:
    _later.when_imported("torch", _load_torch_layer)
_fla.serve()
_installed.warn()
