"""What a server keeps of each sequence between calls, and the two ways in which it uses it: prefill and
decode.

A layer's cache has two pools. A slot of `state` is the KDA state of a sequence, and a slot of `inputs` has
the last three inputs of its convolution. A sequence has the same slot in all layers.
"""

from __future__ import annotations

from typing import Callable

import torch
from model import LOWER_BOUND, TAPS, D, Layer, Model, convolve, gated_norm, split_heads
from torch import Tensor

import flash_kda

EVERY = 64  # tokens between two checkpoints of a prompt


class LayerCache:
    def __init__(self, layer: Layer, slots: int, device: str) -> None:
        inner = layer.heads * D
        self.state = torch.zeros(slots, layer.heads, D, D, device=device)
        self.inputs = torch.zeros(slots, 3 * inner, TAPS - 1, device=device, dtype=torch.bfloat16)
        self.checkpoints: Tensor | None = None  # of the last prompt
        self.weight = layer.taps.float().contiguous()  # [3 H D, 4], oldest first
        self.norm = layer.norm.float()

    def prefill(self, slot: Tensor, first: bool) -> Callable[..., Tensor]:
        """The mix of a prompt, or of its next part. slot is an int32 tensor [1]; first: there is no state
        yet. The state after every 64 tokens is kept in `checkpoints`."""

        def mix(layer: Layer, qkv: Tensor, g: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
            before = None if first else self.inputs[slot.long()].transpose(1, 2)
            q, k, v = split_heads(convolve(qkv, layer.taps, before), layer.heads)
            rows = qkv.shape[1] // EVERY
            kept = {}
            if rows:
                self.checkpoints = self.state.new_empty(rows, *self.state.shape[1:])
                kept = {"checkpoint_states": self.checkpoints, "checkpoint_every": EVERY}
            out = torch.empty_like(v, memory_format=torch.contiguous_format)
            flash_kda.fwd(
                q, k, v, g, beta, D**-0.5, out, layer.A_log, layer.dt_bias, LOWER_BOUND,
                initial_state=self.state, final_state=self.state, state_indices=slot,
                has_initial_state=torch.full((1,), not first, device=qkv.device), **kept,
            )  # fmt: skip
            history = qkv if before is None else torch.cat([before, qkv], 1)
            self.inputs[slot.long()] = history[:, -(TAPS - 1) :].transpose(1, 2)
            return gated_norm(out, gate, layer.norm)

        return mix

    def step(self, slots: Tensor) -> Callable[..., Tensor]:
        """The mix of one token of each of N sequences: [1, N, ..]. One launch for the whole layer."""

        def mix(layer: Layer, qkv: Tensor, g: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
            out = torch.empty_like(g)
            flash_kda.decode_layer(
                qkv[0], self.weight, None, self.inputs, g, beta, layer.A_log, layer.dt_bias, slots,
                self.state, out=out, lower_bound=LOWER_BOUND, output_gate=gate[0], norm_weight=self.norm,
            )  # fmt: skip
            return out

        return mix


class Cache:
    def __init__(self, model: Model, slots: int, device: str) -> None:
        self.layers = [LayerCache(layer, slots, device) for layer in model.layers]

    def prefill(self, model: Model, tokens: Tensor, slot: int, first: bool = True) -> Tensor:
        """Runs a prompt [T] and leaves its state in the slot. Returns the logits of its last token."""
        at = torch.tensor([slot], dtype=torch.int32, device=tokens.device)
        return model(tokens[None], [layer.prefill(at, first) for layer in self.layers])[0, -1]
