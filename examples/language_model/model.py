"""A small language model of bytes with KDA layers, in PyTorch. Training and generation share it.

Each layer is what the layers of Kimi Linear and Kimi K3 are, in small: a causal convolution of width 4 with
SiLU over q, k and v, the KDA recurrence with the bounded gate, a gated RMS norm, and a feed-forward part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = 128  # channels of a head
LOWER_BOUND = -5.0  # of the log decay of a token, in nats
TAPS = 4  # of the convolution
WEIGHTS = Path(__file__).parent / "weights.safetensors"


class Config(NamedTuple):
    bytes: int = 256
    width: int = 256
    heads: int = 2
    layers: int = 4
    feed_forward: int = 512


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), 1e-5)


def gated_norm(o: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(o, weight) * torch.sigmoid(gate)


class Layer(nn.Module):
    """The parameters of a layer, and everything of it but the convolution and the recurrence."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.heads = c.heads
        inner = c.heads * D
        self.before = nn.Parameter(torch.ones(c.width))
        self.qkv = nn.Linear(c.width, 3 * inner, bias=False)
        self.taps = nn.Parameter(torch.randn(3 * inner, TAPS) / TAPS)
        self.g = nn.Linear(c.width, inner, bias=False)
        self.beta = nn.Linear(c.width, c.heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(c.heads))
        # The bias of the gate: some channels remember a word, others a page.
        self.dt_bias = nn.Parameter(torch.linspace(-8.0, -1.4, D).repeat(c.heads, 1))
        self.output_gate = nn.Linear(c.width, inner, bias=False)
        self.norm = nn.Parameter(torch.ones(D))
        self.out = nn.Linear(inner, c.width, bias=False)
        self.between = nn.Parameter(torch.ones(c.width))
        self.up = nn.Linear(c.width, 2 * c.feed_forward, bias=False)
        self.down = nn.Linear(c.feed_forward, c.width, bias=False)

    def forward(self, x: Tensor, mix: Callable[..., Tensor]) -> Tensor:
        """x [B, T, width]. mix(layer, qkv, g, beta, gate) is the convolution, the recurrence, and the gated
        norm of what it reads: [B, T, heads, D]."""
        y = rms_norm(x, self.before)
        g, gate = (part(y).unflatten(-1, (self.heads, D)) for part in (self.g, self.output_gate))
        x = x + self.out(mix(self, self.qkv(y), g, self.beta(y), gate).flatten(-2))
        a, b = self.up(rms_norm(x, self.between)).chunk(2, -1)
        return x + self.down(F.silu(a) * b)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = c = Config()
        self.embed = nn.Embedding(c.bytes, c.width)
        self.layers = nn.ModuleList([Layer(c) for _ in range(c.layers)])
        self.last = nn.Parameter(torch.ones(c.width))
        self.head = nn.Linear(c.width, c.bytes, bias=False)

    def forward(self, tokens: Tensor, mixes: list[Callable[..., Tensor]]) -> Tensor:
        """tokens [B, T] of bytes; mixes: one for each layer. Returns logits [B, T, 256]."""
        x = self.embed(tokens)
        for layer, mix in zip(self.layers, mixes):
            x = layer(x, mix)
        return self.head(rms_norm(x, self.last))


def convolve(x: Tensor, taps: Tensor, before: Tensor | None = None) -> Tensor:
    """The causal convolution with SiLU. x [B, T, C], taps [C, 4] with the oldest first, before [B, 3, C]: the
    inputs before x, zeros if absent."""
    x = F.pad(x, (0, 0, TAPS - 1, 0)) if before is None else torch.cat([before, x], 1)
    y = F.conv1d(x.transpose(1, 2), taps[:, None].to(x.dtype), groups=x.shape[2])
    return F.silu(y.transpose(1, 2))


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    return tuple(part.unflatten(-1, (heads, D)) for part in qkv.chunk(3, -1))


def load(device: str, dtype: torch.dtype = torch.bfloat16) -> Model:
    """The trained model that lies beside this file, its matrices in `dtype`."""
    from safetensors.torch import load_file

    model = Model()
    model.load_state_dict({name: x.float() for name, x in load_file(WEIGHTS).items()})
    model = model.to(device, dtype).eval().requires_grad_(False)
    for layer in model.layers:
        layer.A_log.data, layer.dt_bias.data = layer.A_log.data.float(), layer.dt_bias.data.float()
    return model


def save(model: Model) -> None:
    from safetensors.torch import save_file

    save_file({name: x.detach().bfloat16().cpu() for name, x in model.state_dict().items()}, WEIGHTS)


def text_of(tokens: Any) -> str:
    return bytes(int(t) for t in tokens).decode("utf-8", "replace")
