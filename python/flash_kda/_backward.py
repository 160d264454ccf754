"""The backward pass: `bwd`, and `bwd_reference`, its definition in fp64."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _arrays, _interruptible, _lib, _reference
from ._backward_options import BWD, BWD_BIT, GRADIENTS, BwdOptions

if TYPE_CHECKING:
    from typing import SupportsFloat

_READ = ("A_log", "dt_bias", "initial_state", "cu_seqlens", "dout", "dfinal_state")
_DIM = 128


class Gradients(NamedTuple):
    """The gradients of a loss with respect to the inputs of `fwd`. None: there is no such input."""

    dq: Any
    dk: Any
    dv: Any
    dg: Any
    dbeta: Any
    dA_log: Any
    ddt_bias: Any
    dinitial_state: Any


def bwd(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: SupportsFloat,
    A_log: Any,
    dt_bias: Any,
    lower_bound: SupportsFloat | None,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    *,
    dout: Any = None,
    dfinal_state: Any = None,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    dg: Any = None,
    dbeta: Any = None,
    dA_log: Any = None,
    ddt_bias: Any = None,
    dinitial_state: Any = None,
    saved: Any = None,
    workspace: Any = None,
    kernel: str | None = None,
    threads: int = 0,
    max_seqlen: int = 0,
    use_gate_in_kernel: bool = True,
    use_qk_l2norm_in_kernel: bool = True,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    state_v_first: bool = True,
    batch_invariant: bool = False,
    workspace_limit: int = 0,
) -> None:
    """The backward pass: from the gradients of a loss with respect to the results of `fwd`, those with
    respect to its inputs. Writes the gradients that are given, and returns None. A gradient that is None is
    not wanted, and at least one must be wanted.

    The gradients are with respect to the arguments as they are passed, so they go through the norm of q and
    k, the gate, and the sigmoid of beta. PyTorch users need not call this function: `chunk_kda` has
    gradients.

    Args:
        q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens: those of the forward
            pass. There are no gradients through pools and checkpoints.
        dout: bf16 [B, T, HV, V], the gradient with respect to out, or None: zeros.
        dfinal_state: fp32 or bf16 [N, HV, V, K], the gradient with respect to the final state, or None:
            zeros.
        dq, dk: bf16 [B, T, H, K], written, or None. The value heads that share a head of q and k add up.
        dv: bf16 [B, T, HV, V], written, or None.
        dg: [B, T, HV, K] in the dtype of g, written, or None.
        dbeta: [B, T, HV] in the dtype of beta, written, or None.
        dA_log: fp32, HV elements in any shape, written, or None. Only with A_log.
        ddt_bias: fp32, HV * K elements in any shape, written, or None. Only with dt_bias.
        dinitial_state: fp32 [N, HV, V, K], written, or None. Also without initial_state, which is then
            zeros.
        saved: uint8 on the device, contiguous and aligned to 64 bytes: what `fwd` has written to the array
            that it got as `saved`, with the same inputs, options and kernel. None: the call computes again
            what it needs, which takes time. On the CPU gradients have the same bits with and without it. What
            another forward pass has saved gives wrong gradients.
        workspace: as for `fwd`, or None.
        kernel, threads, max_seqlen: as for `fwd`.
        use_gate_in_kernel, use_qk_l2norm_in_kernel: those of the forward pass.
        use_beta_sigmoid_in_kernel, allow_neg_eigval: those of the forward pass.
        state_v_first: that of the forward pass. False: the gradients of states are [.., K, V], too.
        batch_invariant: True: gradients of a sequence do not depend on what else is in the batch, except
            dA_log and ddt_bias, which are sums over all tokens. With few heads on a GPU the call may take
            longer.
        workspace_limit: on a GPU, the most bytes of workspace that the call should need. If everything at
            once would need more, some tokens or some of the heads are computed after the others, which takes
            longer; one head of q and k is the fewest, even if it needs more. 0: half of the bytes of q, k, v
            and g, or 96 MiB if these have less than 128 MiB. Gradients may differ in their last bits between
            limits, unless batch_invariant is True.

    Gradients are written, not added to what the arrays held. Strides are as in `fwd`: those of dout, dq, dk,
    dv and dg are free except in the last dimension, those of dbeta in all dimensions, and those of states in
    the first one. PyTorch tensors whose strides do not fit are copied. What is written shares no elements
    with anything else.

    Raises:
        ValueError: an argument has a wrong shape, value, device or memory.
        TypeError: an argument has a wrong dtype or is of a wrong type.
        RuntimeError: there is no such device or kernel, no kernel of the device computes gradients, the
            driver failed, or gradients of these gradients were asked for, which do not exist.
    In each of these cases nothing was written. The message of a ValueError or TypeError names the argument.
    A signal whose handler raises ends a long call on the CPU, as it does for `fwd`.
    """
    package: Any = sys.modules[__package__]
    torch_layer = package._layer_of_torch()
    arrays, given = [q, k, v, g, beta], 0
    for name, array in (
        ("A_log", A_log), ("dt_bias", dt_bias), ("initial_state", initial_state), ("cu_seqlens", cu_seqlens),
        ("dout", dout), ("dfinal_state", dfinal_state), ("dq", dq), ("dk", dk), ("dv", dv), ("dg", dg),
        ("dbeta", dbeta), ("dA_log", dA_log), ("ddt_bias", ddt_bias), ("dinitial_state", dinitial_state),
        ("saved", saved), ("workspace", workspace),
    ):  # fmt: skip
        if array is not None:
            arrays.append(array)
            given |= BWD_BIT[name]
    is_tensor = torch_layer is not None and isinstance(q, torch_layer.Tensor)
    is_traced = is_tensor and torch_layer.is_compiling()
    # A compiler traces the constructor, since it cannot trace a cache.
    options = (BwdOptions if is_traced else BWD.known)(
        given, kernel, threads, max_seqlen, use_gate_in_kernel, use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, batch_invariant, workspace_limit,
        lower_bound is not None,
    )  # fmt: skip
    if lower_bound is None:
        lower_bound = 0.0  # which C does not look at
    if is_traced:
        torch_layer.call_c_traced(arrays, options, scale, lower_bound)
    elif is_tensor:
        torch_layer.call_c(arrays, options, scale, lower_bound)
    else:
        _arrays.call_c(arrays, options, scale, lower_bound)


def bwd_reference(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: SupportsFloat,
    A_log: Any,
    dt_bias: Any,
    lower_bound: SupportsFloat | None,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    *,
    dout: Any = None,
    dfinal_state: Any = None,
    **options: Any,
) -> Gradients:
    """What `bwd` computes, token by token in fp64 on the CPU: slow, and meant for tests.

    Takes the arguments of `bwd`, as `reference` takes those of `fwd`, and its options by keyword. Options
    that change no result (kernel, threads, max_seqlen, batch_invariant, workspace_limit) are taken and change
    nothing.

    Returns all gradients in fp64 under the names that `bwd` has for them: CPU tensors if q is a tensor, else
    NumPy arrays. dA_log has the shape [HV] and ddt_bias [HV, K]; they are None without A_log and without
    dt_bias. dinitial_state is there also without initial_state. With state_v_first=False it is [.., K, V].

    Raises:
        ValueError, TypeError: as `bwd`.
    """
    given = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    optional = zip(_READ, (A_log, dt_bias, initial_state, cu_seqlens, dout, dfinal_state))
    given |= {name: x for name, x in optional if x is not None}
    asked, params, shapes, _owners = _reference.filled(
        "bwd_reference", BwdOptions, given, (), scale, lower_bound, options
    )
    # C checks that the arrays fit each other before it writes, so results of wrong arrays may have any size.
    borders = shapes["cu_seqlens"] if "cu_seqlens" in shapes else shapes["q"]
    N = max((borders or (0,))[0] - ("cu_seqlens" in shapes), 0)
    heads = shapes["v"][2:3] or (0,)
    wanted = {
        "dq": shapes["q"], "dk": shapes["k"], "dv": shapes["v"], "dg": shapes["g"], "dbeta": shapes["beta"],
        "dA_log": heads, "ddt_bias": (*heads, _DIM), "dinitial_state": (N, *heads, _DIM, _DIM),
    }  # fmt: skip
    for name in ("A_log", "dt_bias"):
        if name not in shapes:
            del wanted["d" + name]
    results = {name: _reference.new64(q, shape) for name, shape in wanted.items()}
    gradients = _lib.Gradients64(struct_size=ctypes.sizeof(_lib.Gradients64))
    for name, x in results.items():
        setattr(gradients, name, _reference.pointer_of(x))
    _interruptible.bwd_reference(params, ctypes.byref(gradients))
    if not asked.state_v_first:
        results["dinitial_state"] = _reference.transposed(results["dinitial_state"])
    return Gradients(*map(results.get, GRADIENTS))
