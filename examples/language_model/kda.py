"""The KDA layer in training: by flash_kda.chunk_kda, by the kernels of flash-linear-attention (FLA), which
need a GPU, and by the same recurrence in differentiable PyTorch, chunk by chunk, which runs anywhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from model import LOWER_BOUND, Layer, convolve, gated_norm, split_heads
from torch import Tensor

import flash_kda

CHUNK = 16  # tokens; decays within a chunk reach exp(-80), and their inverses exp(80), which fp32 holds


def kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """q, k, v, g [B, T, H, D], beta [B, T, H]. T is a multiple of 16. Returns [B, T, H, D], from zeros on.

    docs/overview.md has the formulas of the chunk form.
    """
    B, T, H, D = q.shape

    def chunks(x: Tensor) -> Tensor:  # [B, H, T / 16, 16, ..]
        return x.float().transpose(1, 2).unflatten(2, (T // CHUNK, CHUNK))

    gate = LOWER_BOUND * torch.sigmoid(A_log.exp()[:, None] * (g.float() + dt_bias))
    G = chunks(gate).cumsum(3)
    last = G[..., -1:, :]
    b = torch.sigmoid(chunks(beta))[..., None]
    q, k = (chunks(x) * torch.rsqrt(chunks(x).square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    v = chunks(v)
    k_in, k_out = k * G.exp(), k * (-G).exp()
    q_in = q * G.exp() * D**-0.5
    L = torch.tril(b * (k_in @ k_out.mT), -1)
    A = torch.tril(q_in @ k_out.mT)
    eye = torch.eye(CHUNK, device=q.device)
    right = b * torch.cat([k_in, v], -1)
    W, U0 = torch.linalg.solve_triangular(eye + L, right, upper=False, unitriangular=True).split(D, -1)
    rest = (k * (last - G).exp()).mT
    gamma = last.exp().mT

    S = q.new_zeros(B, H, D, D, dtype=torch.float32)
    out = []
    for c in range(T // CHUNK):
        U = U0[:, :, c] - W[:, :, c] @ S
        out.append(q_in[:, :, c] @ S + A[:, :, c] @ U)
        S = gamma[:, :, c] * S + rest[:, :, c] @ U
    return torch.stack(out, 2).flatten(2, 3).transpose(1, 2)


def mix_by_flash_kda(layer: Layer, qkv: Tensor, g: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
    # On a GPU there is nothing to keep from the forward pass.
    return mix_by(flash_kda.chunk_kda, layer, qkv, g, beta, gate, disable_recompute=not qkv.is_cuda)


def mix_by_fla(layer: Layer, qkv: Tensor, g: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
    """The environment variable FLA_FLASH_KDA must be 0, or FLA hands the call to flash_kda."""
    from fla.ops.kda import chunk_kda

    return mix_by(chunk_kda, layer, qkv, g, beta, gate, safe_gate=True)


def mix_by(
    chunk_kda: Any, layer: Layer, qkv: Tensor, g: Tensor, beta: Tensor, gate: Tensor, **options: bool
) -> Tensor:
    q, k, v = (x.to(qkv.dtype) for x in split_heads(convolve(qkv, layer.taps), layer.heads))
    o, _ = chunk_kda(
        q, k, v, g, beta, A_log=layer.A_log, dt_bias=layer.dt_bias.flatten(), lower_bound=LOWER_BOUND,
        use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True, **options,
    )  # fmt: skip
    return gated_norm(o, gate, layer.norm)


def mix_in_pytorch(layer: Layer, qkv: Tensor, g: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
    q, k, v = split_heads(convolve(qkv, layer.taps), layer.heads)
    o = kda(q, k, v, g, beta, layer.A_log, layer.dt_bias).to(qkv.dtype)
    return gated_norm(o, gate, layer.norm)


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of each byte from those before it, in bits."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()) / 0.6931471805599453
