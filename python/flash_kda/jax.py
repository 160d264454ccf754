"""JAX: the forward pass and decode under `jax.jit`, `jax.lax.scan` and `jax.vmap`, on CPU and GPU.

The functions return new arrays, and are called inside of compiled programs or outside of them:

    import flash_kda.jax

    @jax.jit
    def layer(q, k, v, g, beta, A_log, dt_bias, state):
        return flash_kda.jax.fwd(
            q, k, v, g, beta, 128**-0.5, A_log, dt_bias, -5.0, state, output_final_state=True
        )

A call becomes a custom call of XLA's foreign function interface, whose handlers are in the library
(src/xla.c). Shapes, dtypes and options are checked when the call is traced, with the sentences that
`flash_kda.fwd` has. On a GPU the call runs on the program's stream, and XLA allocates its workspace.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from typing import Any, NamedTuple

from . import _arrays, _functional, _lib
from ._call import PreparedCall, View, check_numbers
from ._call_options import CallOptions, KnownOptions, option_fields
from ._decode_options import DECODE
from ._options import FWD

_NEEDED = "flash_kda.jax needs JAX 0.6 or newer ({}); `pip install --upgrade jax` installs it"
try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import ffi
except ImportError as error:
    raise ImportError(_NEEDED.format(error)) from error
if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 6):
    raise ImportError(_NEEDED.format(f"this one is {jax.__version__}"))

__all__ = ["chunk_kda", "decode", "fwd"]

_DIM = 128
_TARGETS = {"fwd": "flash_kda.fwd", "decode": "flash_kda.decode"}
_WORKSPACE_ALIGNMENT = 64  # of which XLA may know nothing, so the workspace is larger by as much


def _register() -> None:
    for operator, target in _TARGETS.items():
        handler = ffi.pycapsule(getattr(_lib.lib, f"flash_kda_xla_{operator}"))
        for platform in ("cpu", "CUDA"):
            ffi.register_ffi_target(target, handler, platform=platform)


_register()


class _Call(NamedTuple):
    """What a call asks for, without its arrays: compiled programs are cached by it."""

    options: CallOptions
    scale: float
    lower_bound: float
    arguments: tuple[str, ...]  # the names of the arrays
    #: results that are the memory of an argument, by name: result and argument
    in_place: tuple[tuple[str, str], ...]
    state_shape: tuple[int, ...]  # of the new final state of fwd; () without one


# ---- Tracing -----------------------------------------------------------------------------------------------


def _cuda_devices() -> list[tuple[int, int]]:
    devices = [info.device for info in _lib.device_infos() if info.kernel]
    return [(device.type, device.index) for device in devices if device.type == _lib.CUDA]


def _results(call: _Call, looks: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The results by name. looks: the arguments by name."""
    v = looks["v"]
    results = {"out": jax.ShapeDtypeStruct(v.shape, v.dtype)}
    if call.state_shape:
        given = looks.get("initial_state")
        dtype = jnp.float32 if given is None else given.dtype
        results["final_state"] = jax.ShapeDtypeStruct(call.state_shape, dtype)
    for result, argument in call.in_place:
        results[result] = jax.ShapeDtypeStruct(looks[argument].shape, looks[argument].dtype)
    return results


def _prepare(call: _Call, device: tuple[int, int], looks: dict[str, Any]) -> tuple[Any, int]:
    """C's struct for the call, and the bytes of workspace that it needs. Raises what the call would raise for
    its shapes, dtypes and options."""
    views = []
    for name in call.options.names:
        x = looks[name]
        dtype = _arrays._NUMPY_DTYPES.get(str(x.dtype), _lib.OTHER)
        views.append(View(_WORKSPACE_ALIGNMENT, dtype, tuple(x.shape), None))
    params = PreparedCall(call.options, device, views).params
    params.scale, params.lower_bound = call.scale, call.lower_bound
    workspace_bytes = call.options.function.workspace_size(params)  # which checks both numbers
    for name in call.options.names:
        getattr(params, name).data = None
    params.kernel = None
    return params, workspace_bytes


def _on(call: _Call, platform: str, *arrays: Any) -> tuple[Any, ...]:
    """The custom call for one platform."""
    looks = dict(zip(call.arguments, arrays))
    results = _results(call, looks)
    devices = [(_lib.CPU, 0)] if platform == "cpu" else _cuda_devices()
    prepared = [_prepare(call, device, {**looks, **results}) for device in devices]
    params, workspace_bytes = max(prepared, key=lambda each: each[1])
    offsets = [getattr(type(params), name).offset for name in (*call.arguments, *results)]
    made = list(results.values())
    if workspace_bytes:
        params.workspace_size = workspace_bytes
        offsets.append(type(params).workspace.offset)
        made.append(jax.ShapeDtypeStruct((workspace_bytes + _WORKSPACE_ALIGNMENT,), jnp.uint8))
    names = list(results)
    function = ffi.ffi_call(
        _TARGETS[call.options.operator],
        made,
        vmap_method="sequential",
        input_output_aliases={call.arguments.index(arg): names.index(to) for to, arg in call.in_place},
    )
    kernel = getattr(call.options, "kernel", None)
    done = function(
        *arrays,
        params=np.frombuffer(ctypes.string_at(ctypes.addressof(params), ctypes.sizeof(params)), np.int64),
        places=np.array(offsets, np.int64),
        kernel=kernel or "",
    )
    return tuple(done[: len(results)])


@functools.partial(jax.jit, static_argnums=0)
def _compute(call: _Call, *arrays: Any) -> tuple[Any, ...]:
    if not _cuda_devices():
        return _on(call, "cpu", *arrays)
    branches = {name: functools.partial(_on, call, name) for name in ("cpu", "cuda")}
    return jax.lax.platform_dependent(*arrays, **branches)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(call: _Call, *arrays: Any) -> tuple[Any, ...]:
    return _compute(call, *arrays)


@_differentiable.defjvp
def _refuse_derivatives(call: _Call, primals: Any, tangents: Any) -> Any:
    raise RuntimeError(
        "flash_kda.jax has no derivatives, and one was asked for (jax.grad, jax.jvp, ...); pass "
        "its arrays through jax.lax.stop_gradient, or call it outside of the function that is differentiated"
    )


# ---- Arguments ---------------------------------------------------------------------------------------------


def _array(name: str, x: Any) -> Any:
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} is of type {type(x).__name__}; it must be a JAX array or a NumPy array")
    if not all(isinstance(size, int) for size in x.shape):
        raise TypeError(f"{name} has the symbolic shape {x.shape}; all of its sizes must be known numbers")
    return jnp.asarray(x)


def _number(name: str, x: Any) -> float:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"{name} is a tracer; it must be a number that is known when the call is traced, so mark it as "
            "static (static_argnames of jax.jit)"
        )
    check_numbers(*((x, 0.0) if name == "scale" else (0.0, x)))
    return float(x)


def _run(
    known: KnownOptions,
    given: dict[str, Any],
    scale: Any,
    lower_bound: Any,
    values: dict[str, Any],
    in_place: list[tuple[str, str]],
    state_shape: tuple[int, ...] = (),
) -> tuple[Any, ...]:
    """given: the arguments by name, None where there is none. values: of the options. The others as in
    _Call."""
    cls = known.cls
    arrays = {name: _array(name, x) for name, x in given.items() if x is not None}
    for name in ("A_log", "dt_bias"):  # C takes them in fp32 alone
        if name in arrays and arrays[name].dtype in (jnp.bfloat16, jnp.float16):
            arrays[name] = arrays[name].astype(jnp.float32)
    results = {name for name, _ in in_place} | ({"final_state"} if state_shape else set())
    present = [n for n in cls.optional_arrays if n in arrays or n in results]
    values = {**values, "given": cls.bits_of(*present), "has_lower_bound": lower_bound is not None}
    call = _Call(
        known.known(*(values.get(f.name, f.default) for f in dataclasses.fields(cls))),
        _number("scale", scale),
        0.0 if lower_bound is None else _number("lower_bound", lower_bound),
        tuple(arrays),
        tuple(in_place),
        state_shape,
    )
    return _differentiable(call, *arrays.values())


def fwd(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: Any,
    A_log: Any,
    dt_bias: Any,
    lower_bound: Any,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    *,
    output_final_state: bool = False,
    state_indices: Any = None,
    has_initial_state: Any = None,
    checkpoint_offsets: Any = None,
    checkpoint_indices: Any = None,
    checkpoint_starts: Any = None,
    checkpoint_every: int | None = None,
    checkpoint_rows: int | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """`flash_kda.compute` for JAX arrays, with the same arguments and results, also inside of `jax.jit`.

    Args:
        scale, lower_bound: numbers that are known when the call is traced.
        output_final_state: whether the final state is wanted, too.
        state_indices: as for `flash_kda.fwd`. With output_final_state the final state is then initial_state
            with the slots changed. XLA copies initial_state first, unless nothing reads it afterwards, as
            when it is carried through `jax.lax.scan` or donated.
        checkpoint_offsets, checkpoint_indices, checkpoint_starts, checkpoint_every, checkpoint_rows: as for
            `flash_kda.compute`.
        options: kernel, threads, batch_invariant, max_seqlen, cut, first_slot, use_gate_in_kernel,
            use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval and state_v_first, as for
            `flash_kda.fwd`.
    All other arguments are as for `flash_kda.fwd`. A_log and dt_bias may be in 16 bits.

    Returns:
        out [B, T, HV, V] in bf16, and the final state or None. With checkpoint_offsets or checkpoint_every
        also the checkpoints in fp32, with zeros in rows without one.

    Raises:
        ValueError, TypeError, RuntimeError: as `flash_kda.fwd`, when the call is traced. What depends on the
            values of arrays, as cu_seqlens on the CPU does, is refused when the program runs, by JAX's own
            exception with the sentence of flash_kda.
    """
    arrays = {
        "q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias,
        "initial_state": initial_state, "cu_seqlens": cu_seqlens, "state_indices": state_indices,
        "has_initial_state": has_initial_state, "checkpoint_offsets": checkpoint_offsets,
        "checkpoint_indices": checkpoint_indices, "checkpoint_starts": checkpoint_starts,
    }  # fmt: skip
    _check_options("fwd", FWD, options)
    v_shape = _array("v", v).shape
    in_place: list[tuple[str, str]] = []
    state_shape: tuple[int, ...] = ()
    if output_final_state and state_indices is None:
        state_shape = _functional._state_shape(None, q, _array("v", v), cu_seqlens)
    elif output_final_state and initial_state is None:
        raise ValueError(
            "state_indices is given without initial_state; initial_state must be the pool of which fwd "
            "returns a changed copy"
        )
    elif output_final_state:
        in_place.append(("final_state", "initial_state"))
    asked = {
        "checkpoint_offsets": checkpoint_offsets, "checkpoint_indices": checkpoint_indices,
        "checkpoint_starts": checkpoint_starts, "checkpoint_every": checkpoint_every,
        "checkpoint_rows": checkpoint_rows,
    }  # fmt: skip
    rows = _functional.checkpoint_rows(None, v_shape, asked)
    if rows is not None:
        arrays["checkpoint_states"] = jnp.zeros((rows, *v_shape[2:3], _DIM, _DIM), jnp.float32)
        in_place.append(("checkpoint_states", "checkpoint_states"))
    options["checkpoint_every"] = checkpoint_every
    done = _run(FWD, arrays, scale, lower_bound, options, in_place, state_shape)
    out, *others = done
    state = others.pop(0) if output_final_state else None
    return (out, state, *others)


def chunk_kda(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: Any = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: Any = None,
    state_v_first: bool = False,
    cu_seqlens: Any = None,
    *,
    A_log: Any = None,
    dt_bias: Any = None,
    max_seqlen: int = 0,
) -> tuple[Any, Any]:
    """`flash_kda.chunk_kda` for JAX arrays: the names, defaults and results of flash-linear-attention's
    function, except that intermediate states come from `fwd` with checkpoint_every.

    Args:
        max_seqlen: number of tokens of the longest sequence, as for `flash_kda.fwd`.
    All other arguments are as for `flash_kda.chunk_kda`.

    Returns:
        out bf16 [B, T, HV, V], and the final state fp32 [N, HV, K, V] or None.
    """
    if safe_gate and use_gate_in_kernel and (lower_bound is None or not -5 <= lower_bound < 0):
        raise ValueError(f"lower_bound is {lower_bound} with safe_gate=True; it must be in [-5, 0)")
    if initial_state is not None and _array("initial_state", initial_state).dtype != jnp.float32:
        raise TypeError(f"initial_state is of {initial_state.dtype}; it must be of float32")
    out, state = fwd(
        q, k, v, g, beta, _DIM**-0.5 if scale is None else scale,
        A_log if use_gate_in_kernel else None,
        dt_bias if use_gate_in_kernel else None,
        lower_bound if use_gate_in_kernel else None,
        initial_state, cu_seqlens, output_final_state=output_final_state, max_seqlen=max_seqlen,
        use_gate_in_kernel=use_gate_in_kernel, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
    )  # fmt: skip
    return out, state


def decode(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: Any,
    A_log: Any,
    dt_bias: Any,
    lower_bound: Any,
    state: Any,
    *,
    state_indices: Any = None,
    num_accepted_tokens: Any = None,
    cu_seqlens: Any = None,
    parents: Any = None,
    rounding: Any = None,
    write_states: str = "last",
    written_states: Any = None,
    written_indices: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    """`flash_kda.decode` for JAX arrays: one to sixteen tokens of each of many sequences.

    Args:
        scale, lower_bound: numbers that are known when the call is traced.
        state: the pool [slots, HV, V, K] in fp32 or bf16. XLA copies it first, unless nothing reads it
            afterwards, as when it is carried through `jax.lax.scan` or donated.
        written_states: a second pool that the call writes instead, which XLA copies likewise. state is then
            read alone, and not copied.
        options: first_slot, kernel, threads, use_gate_in_kernel, use_qk_l2norm_in_kernel,
            use_beta_sigmoid_in_kernel, allow_neg_eigval and state_v_first.
    All other arguments are as for `flash_kda.decode`.

    Returns:
        out bf16, in the shape of v, and the pool with the slots that write_states says changed:
        written_states if that is given, else state.

    Raises:
        ValueError, TypeError, RuntimeError: as `fwd`.
    """
    arrays = {
        "q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state, "A_log": A_log, "dt_bias": dt_bias,
        "state_indices": state_indices, "num_accepted_tokens": num_accepted_tokens,
        "cu_seqlens": cu_seqlens, "parents": parents, "rounding": rounding,
        "written_states": written_states, "written_indices": written_indices,
    }  # fmt: skip
    _check_options("decode", DECODE, options)
    options["write_states"] = write_states
    written = "state" if written_states is None else "written_states"
    in_place = [] if write_states == "none" else [(written, written)]
    out, *states = _run(DECODE, arrays, scale, lower_bound, options, in_place)
    return out, states[0] if states else jnp.asarray(state)


def _check_options(function: str, known: KnownOptions, options: dict[str, Any]) -> None:
    takes = {f.name for f in option_fields(known.cls)}
    for name in options:
        if name not in takes:
            raise TypeError(f"flash_kda.jax.{function}() got an unexpected keyword argument {name!r}")
