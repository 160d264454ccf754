"""The chunk algorithm of the portable CUDA kernel in plain PyTorch, rounding where the kernel rounds.

On a GPU, `forward(CudaOps(), ...)` gives the kernel's output and state bit for bit. The few instructions
that PyTorch does not offer (approximate ex2, rcp and rsqrt, fused multiply-add, the tensor core's tf32
product) come from tests/probe.cu. Every other operation is PyTorch's own, in the kernel's order. `CpuOps`
replaces tests/probe.cu where there is no GPU; its results agree with the kernel to rounding, not to the bit.

Names and shapes follow kernels/portable: C is 16, the tokens of a chunk; n counts chunks; H is heads; D is
128, the channels.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

CHUNK = 16
DIM = 128
LOG2_E = 1.4426950408889634
HERE = Path(__file__).parent

# The order in which products run through their depth: slots t and t + 4 of each step of eight hold two
# neighbours. kernels/portable/recurrence.cuh orders the state's channels and the tokens of a chunk, and
# kernels/portable/prepare.cuh orders the channels of q and k.
STATE_ORDER = [
    16 * j + 4 * t + 2 * h + e for j in range(8) for h in range(2) for e in range(2) for t in range(4)
]
TOKEN_ORDER = [8 * i + 2 * t + e for i in range(2) for e in range(2) for t in range(4)]
LANE_ORDER = [
    32 * w + 8 * t + 2 * s + e for w in range(4) for s in range(4) for e in range(2) for t in range(4)
]

# Makes up for the truncation of two operands; see kernels/common/elements.cuh.
UNTRUNCATE = 1 + 2 * 0.7213 / 2048


def truncate_tf32(x: torch.Tensor) -> torch.Tensor:
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


class CpuOps:
    """The probed instructions, approximately."""

    ex2 = staticmethod(torch.exp2)
    rcp = staticmethod(torch.reciprocal)
    rsqrt = staticmethod(torch.rsqrt)

    @staticmethod
    def fma(a, b, c):
        return (a.double() * b.double() + c.double()).float()

    @staticmethod
    def multiply(a, b, c):
        return c + truncate_tf32(a) @ truncate_tf32(b).mT


class CudaOps:
    """The probed instructions, exactly, from tests/probe.cu."""

    def __init__(self, folder: Path):
        library = folder / "libprobe.so"
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        major, minor = torch.cuda.get_device_capability()
        arch = f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"
        command = [
            nvcc,
            "-shared",
            "-Xcompiler",
            "-fPIC",
            "-O2",
            arch,
            "-o",
            str(library),
            str(HERE / "probe.cu"),
        ]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(library))

    def _call(self, name, *arguments):
        converted = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        error = getattr(self.library, name)(*converted)
        assert error == 0, f"{name} failed with CUDA error {error}"

    def _unary(self, function, x):
        x = x.contiguous()
        y = torch.empty_like(x)
        self._call("probe_unary", function, x, y, ctypes.c_longlong(x.numel()))
        return y

    def ex2(self, x):
        return self._unary(0, x)

    def rcp(self, x):
        return self._unary(1, x)

    def rsqrt(self, x):
        return self._unary(2, x)

    def fma(self, a, b, c):
        a, b, c = (x.contiguous() for x in torch.broadcast_tensors(a, b, c))
        d = torch.empty_like(c)
        self._call("probe_fma", a, b, c, d, ctypes.c_longlong(c.numel()))
        return d

    def multiply(self, a, b, c):
        a, b, c = a.contiguous(), b.contiguous(), c.contiguous()
        d = torch.empty_like(c)
        m, k, n = a.shape[-2], a.shape[-1], b.shape[-2]
        self._call("probe_multiply", a, b, c, d, ctypes.c_longlong(c.numel() // (m * n)), m, n, k)
        return d


def to_chunks(x: torch.Tensor) -> torch.Tensor:
    """[T, H, ...] to [n, H, C, ...] in fp32, with zeros past the end."""
    length = x.shape[0]
    padded = torch.zeros((-(-length // CHUNK) * CHUNK, *x.shape[1:]), dtype=torch.float32, device=x.device)
    padded[:length] = x
    return padded.view(-1, CHUNK, *x.shape[1:]).transpose(1, 2)


def sum_of_squares(ops, x: torch.Tensor) -> torch.Tensor:
    """Over the channels of [..., D], in the order of lanes and warps."""
    x = x.unflatten(-1, (4, 4, 8))
    lane = x[..., 0] * x[..., 0]
    for c in range(1, 8):
        lane = ops.fma(x[..., c], x[..., c], lane)
    lane = lane[..., 0::2] + lane[..., 1::2]
    warp = lane[..., 0] + lane[..., 1]
    return ((warp[..., 0] + warp[..., 1]) + warp[..., 2]) + warp[..., 3]


def running_sum(g: torch.Tensor) -> torch.Tensor:
    """Over the tokens of [n, H, C, D]: pairs first, then a scan over the eight pairs."""
    even, odd = g[:, :, 0::2], g[:, :, 1::2]
    running = even + odd
    for distance in (1, 2, 4):
        shifted = running.clone()
        shifted[:, :, distance:] += running[:, :, :-distance]
        running = shifted
    first = even.clone()
    first[:, :, 1:] += running[:, :, :-1]
    return torch.stack((first, running), dim=3).flatten(2, 3)


def products_of_warps(ops, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """rows . columns^T of [n, H, C, D] over each warp's 32 channels: [n, H, 4, C, C]."""
    by_warp = lambda x: x[..., LANE_ORDER].unflatten(-1, (4, 32)).transpose(-2, -3)  # noqa: E731
    rows, columns = by_warp(rows), by_warp(columns)
    return ops.multiply(rows, columns, rows.new_zeros(*rows.shape[:-1], CHUNK))


def add_warps(parts: torch.Tensor) -> torch.Tensor:
    """The sum over the warps of [n, H, 4, C, C]."""
    return ((parts[..., 0, :, :] + parts[..., 1, :, :]) + parts[..., 2, :, :]) + parts[..., 3, :, :]


def direct_row(ops, row: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """row . columns^T of [n, H, 1, D] and [n, H, C, D] over each warp's channels, as
    kernels/portable/unbounded.cuh does it: [n, H, 4, C]."""
    row, columns = (x.unflatten(-1, (4, 4, 8)) for x in torch.broadcast_tensors(row, columns))
    lane = torch.zeros_like(row[..., 0])
    for c in range(8):
        lane = ops.fma(row[..., c], columns[..., c], lane)
    lane = lane[..., 0::2] + lane[..., 1::2]
    return (lane[..., 0] + lane[..., 1]).transpose(-1, -2)


def hold(log2_decay: torch.Tensor) -> torch.Tensor:
    """From -128 on a decay is zero in fp32."""
    return torch.where(log2_decay < -128, -128.0, log2_decay)


def softplus(ops, x: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x), from a polynomial for log(1 + y) / y."""
    f32 = lambda x, like: torch.full_like(like, x)  # noqa: E731
    y = ops.ex2(x.abs() * f32(-LOG2_E, x))
    series = f32(-0.0085391989, x)
    for coefficient in (
        0.0440897346,
        -0.1076820865,
        0.1774528623,
        -0.2449548692,
        0.3327548504,
        -0.4999740422,
        0.9999998211,
    ):
        series = ops.fma(series, y, f32(coefficient, x))
    return ops.fma(series, y, x.clamp(min=0))


def solve(ops, strictly_lower: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(I + L)^-1 diag(b) by forward substitution, for L [n, H, C, C] and b [n, H, C]."""
    x = torch.diag_embed(b)
    for m in range(CHUNK - 1):
        x[..., m + 1 :, :] = ops.fma(
            -strictly_lower[..., m + 1 :, m : m + 1], x[..., m : m + 1, :], x[..., m + 1 :, :]
        )
    return x


def ex2_minus_1(ops, x: torch.Tensor) -> torch.Tensor:
    y = x * torch.tensor(0.6931471805599453, dtype=torch.float32, device=x.device)
    series = torch.full_like(x, 1 / 120)
    for coefficient in (1 / 24, 1 / 6, 0.5, 1.0):
        series = ops.fma(y, series, torch.full_like(x, coefficient))
    return torch.where(x > -0.25, series * y, ops.ex2(x) - 1.0)


def log2_decays(ops, g, A_log, dt_bias, lower_bound, use_gate_in_kernel):
    """Of the gates g [n, H, C, D]."""
    f32 = lambda x: torch.tensor(x, dtype=torch.float32, device=g.device)  # noqa: E731
    if not use_gate_in_kernel:
        return hold(g * f32(LOG2_E))
    H = g.shape[1]
    A_log = torch.zeros(H, device=g.device) if A_log is None else A_log
    dt_bias = torch.zeros(H, DIM, device=g.device) if dt_bias is None else dt_bias
    exponent = A_log * f32(LOG2_E)
    factor = (ops.ex2(torch.where(exponent > 100, 100.0, exponent)) * f32(-LOG2_E))[:, None]
    if lower_bound is None:
        return hold(softplus(ops, g + dt_bias[:, None]) * factor[:, None])
    sigmoid = ops.rcp(1.0 + ops.ex2(ops.fma(g, factor[:, None], (dt_bias * factor)[:, None])))
    return sigmoid * (f32(lower_bound) * f32(LOG2_E))


def write_strengths(ops, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval):
    if not use_beta_sigmoid_in_kernel:
        return beta
    minus_log2_e = torch.tensor(-LOG2_E, dtype=torch.float32, device=beta.device)
    strength = ops.rcp(1.0 + ops.ex2(beta * minus_log2_e))
    return 2.0 * strength if allow_neg_eigval else strength


def prepare(
    ops,
    q,
    k,
    g,
    beta,
    A_log,
    dt_bias,
    lower_bound,
    *,
    use_gate_in_kernel=True,
    use_qk_l2norm_in_kernel=True,
    use_beta_sigmoid_in_kernel=True,
    allow_neg_eigval=False,
):
    """The preparation of all chunks of one sequence; q, k, g [T, H, D], beta [T, H]."""
    f32 = lambda x: torch.tensor(x, dtype=torch.float32, device=q.device)  # noqa: E731
    valid = to_chunks(torch.ones_like(beta)).bool()
    q, k, g, beta = to_chunks(q), to_chunks(k), to_chunks(g), to_chunks(beta)

    decay = log2_decays(ops, g, A_log, dt_bias, lower_bound, use_gate_in_kernel)
    decay = torch.where(valid[..., None], decay, 0.0)
    strength = write_strengths(ops, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    b = torch.where(valid, strength * f32(UNTRUNCATE), 0.0)

    total = running_sum(decay)
    last = total[:, :, 15:16]
    up, down, to_last = ops.ex2(total), ops.ex2(-total), ops.ex2(last) * f32(UNTRUNCATE)

    raw_q, raw_k = q, k
    q_factor, k_factor = torch.ones_like(q[..., :1]), torch.ones_like(k[..., :1])
    if use_qk_l2norm_in_kernel:
        q_factor = ops.rsqrt(sum_of_squares(ops, q) + f32(1e-6))[..., None]
        k_factor = ops.rsqrt(sum_of_squares(ops, k) + f32(1e-6))[..., None]
    q, k = q * q_factor, k * k_factor
    q_up, k_up, k_down = q * up, k * up, k * down
    of_k, of_q = products_of_warps(ops, k_up, k_down), products_of_warps(ops, q_up, k_down)
    k_rest = k_down * to_last

    # Each warp's rows from the first token on with which its decays leave the range.
    is_out = (total < -116).unflatten(-1, (4, 32)).any(-1).int().cummax(2).values.bool()
    if is_out.any():
        k_row = raw_k * (k_factor * (1 / f32(UNTRUNCATE)))
        q_row = raw_q * (q_factor * (1 / f32(UNTRUNCATE)))
        for i in range(CHUNK):
            row = slice(i, i + 1)
            columns = k * ops.ex2(total[:, :, row] - total)
            takes = is_out[:, :, i, :, None]
            of_k[..., i, :] = torch.where(takes, direct_row(ops, k_row[:, :, row], columns), of_k[..., i, :])
            of_q[..., i, :] = torch.where(takes, direct_row(ops, q_row[:, :, row], columns), of_q[..., i, :])
        takes = is_out[:, :, -1:].repeat_interleave(32, -1)
        k_rest = torch.where(takes, k * ops.ex2(last - total) * f32(UNTRUNCATE), k_rest)

    tokens = torch.arange(CHUNK, device=q.device)
    lower = tokens[:, None] > tokens
    strictly_lower = torch.where(lower, add_warps(of_k) * b[..., None], 0.0)
    attend = add_warps(of_q) * (f32(UNTRUNCATE) * f32(UNTRUNCATE))
    return {
        "minus_k_decayed": k_up * -f32(UNTRUNCATE),
        "q_decayed": q_up * f32(UNTRUNCATE),
        "k_rest": k_rest,
        "solve": solve(ops, strictly_lower, b),
        "attend": torch.where(lower.mT, 0.0, attend),
        "gamma_minus_1": ex2_minus_1(ops, last.squeeze(2)),
    }


def multiply_lower(ops, u, lower, start):
    """start + u lower^T, for u and start [H, V, C] and lower triangular matrices [H, C, C].

    The product skips the upper right 8 x 8 tile of `lower`, which is zero.
    """
    u, lower = u[..., TOKEN_ORDER], lower[..., TOKEN_ORDER]
    first = ops.multiply(u[..., :8], lower[..., :8, :8], start[..., :8])
    second = ops.multiply(u, lower[..., 8:, :], start[..., 8:])
    return torch.cat((first, second), dim=-1)


def sequence(ops, state, q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, **options):
    """The output [T, H, D] and the final state of one sequence.

    q, k, v and g are [T, H, D]. `state` is transposed, [H, V, K], and in fp32.
    """
    length = q.shape[0]
    if length == 0:
        return v.clone(), state
    prepared = prepare(ops, q, k, g, beta, A_log, dt_bias, lower_bound, **options)
    values = to_chunks(v).mT
    out = torch.empty_like(values)
    for n in range(values.shape[0]):
        tile = {name: x[n] for name, x in prepared.items()}
        ordered = state[..., STATE_ORDER]
        rest = ops.multiply(ordered, tile["minus_k_decayed"][..., STATE_ORDER], values[n])
        u = multiply_lower(ops, rest, tile["solve"], torch.zeros_like(rest))
        read = ops.multiply(ordered, tile["q_decayed"][..., STATE_ORDER], torch.zeros_like(rest))
        out[n] = multiply_lower(ops, u, tile["attend"], read)
        written = tile["k_rest"].mT[..., TOKEN_ORDER]
        state = ops.multiply(
            u[..., TOKEN_ORDER], written, ops.fma(state, tile["gamma_minus_1"][:, None, :], state)
        )
    out = out.permute(0, 3, 1, 2).flatten(0, 1)[:length] * torch.tensor(
        scale, dtype=torch.float32, device=q.device
    )
    return out.bfloat16(), state


def forward(
    ops,
    q,
    k,
    v,
    g,
    beta,
    scale,
    A_log,
    dt_bias,
    lower_bound,
    initial_state=None,
    cu_seqlens=None,
    **options,
):
    """Takes the arguments of flash_kda.fwd without its outputs; as options those of prepare().

    Returns the output [B, T, H, V] in bf16 and the final state [N, H, V, K] in fp32.
    """
    if cu_seqlens is not None:
        borders = cu_seqlens.tolist()
        split = lambda x: [x[0, a:b] for a, b in zip(borders, borders[1:])]  # noqa: E731
    else:
        split = lambda x: list(x)  # noqa: E731
    group = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    outs, states = [], []
    for n, parts in enumerate(zip(*map(split, (q, k, v, g, beta)))):
        if initial_state is None:
            state = torch.zeros(q.shape[2], DIM, DIM, device=q.device)
        else:
            state = initial_state[n].float()
        qn, kn, vn, gn, bn = parts
        out, state = sequence(ops, state, qn, kn, vn, gn, bn, scale, A_log, dt_bias, lower_bound, **options)
        outs.append(out)
        states.append(state)
    out = torch.cat(outs)[None] if cu_seqlens is not None else torch.stack(outs)
    return out, torch.stack(states)
