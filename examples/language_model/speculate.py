"""Speculative decoding with rollback: python examples/language_model/speculate.py "And the king said"

A draft guesses the next bytes: what followed the last time that the text had the same four bytes. One call of
the model verifies all guesses: flash_kda.decode leaves the states alone and keeps a record of each token.
Then flash_kda.apply_records brings the states up to date with the guesses that were right. Needs PyTorch
and safetensors.
"""

from __future__ import annotations

import argparse
import time
from typing import Callable

import torch
from cache import Cache, LayerCache
from model import LOWER_BOUND, TAPS, D, Layer, convolve, gated_norm, load, split_heads, text_of
from torch import Tensor

import flash_kda

KNOWN = 4  # bytes that must be the same for a guess


def guess(text: list[int], count: int) -> list[int]:
    """What followed the last four bytes of the text when they came last; count bytes at most."""
    end = text[-KNOWN:]
    for i in range(len(text) - KNOWN - 1, -1, -1):
        if text[i : i + KNOWN] == end:
            return text[i + KNOWN : i + KNOWN + count]
    return []


class Verifier:
    """Verifies up to 15 guesses for one sequence, whose slot is 0."""

    def __init__(self, cache: LayerCache, heads: int, device: str) -> None:
        self.cache = cache
        self.records = torch.empty(1, 16, heads, 3, D, device=device)
        self.window: Tensor | None = None

    def mix(self, layer: Layer, qkv: Tensor, g: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
        before = self.cache.inputs[:1].transpose(1, 2)
        self.window = torch.cat([before, qkv], 1)
        q, k, v = split_heads(convolve(qkv, layer.taps, before), layer.heads)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        flash_kda.decode(
            q, k, v, g, beta, D**-0.5, out, layer.A_log, layer.dt_bias, LOWER_BOUND, self.cache.state,
            write_states="none", records=self.records,
        )  # fmt: skip
        return gated_norm(out, gate, layer.norm)

    def accept(self, count: int) -> None:
        """The first `count` tokens of the last call become part of the sequence."""
        accepted = torch.tensor([count], dtype=torch.int32, device=self.records.device)
        flash_kda.apply_records(self.records, accepted, self.cache.state)
        assert self.window is not None
        self.cache.inputs[:1] = self.window[:, count : count + TAPS - 1].transpose(1, 2)


def continue_text(text: list[int], count: int, drafts: int, device: str) -> tuple[list[int], int, float]:
    """Always takes the likeliest byte. Returns the text, how often the model was called, and the seconds."""
    model = load(device)
    cache = Cache(model, 1, device)
    verifiers = [Verifier(layer, model.config.heads, device) for layer in cache.layers]
    mixes: list[Callable[..., Tensor]] = [verifier.mix for verifier in verifiers]
    text, end, calls = list(text), len(text) + count, 0
    text.append(int(cache.prefill(model, torch.tensor(text, device=device), slot=0).argmax()))
    start = time.perf_counter()
    while len(text) < end:
        guesses = guess(text, drafts)
        likeliest = model(torch.tensor([[text[-1], *guesses]], device=device), mixes)[0].argmax(-1).tolist()
        calls += 1
        right = 0
        while right < len(guesses) and guesses[right] == likeliest[right]:
            right += 1
        for verifier in verifiers:
            verifier.accept(right + 1)
        text += likeliest[: right + 1]
    return text[:end], calls, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", default="And the king said unto him, ")
    parser.add_argument("--bytes", type=int, default=300, help="that are written; default: 300")
    parser.add_argument("--drafts", type=int, default=7, help="guesses a call, 0 to 15; default: 7")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    prompt = list(options.prompt.encode())
    with torch.inference_mode():
        plain, calls, seconds = continue_text(prompt, options.bytes, 0, options.device)
        fast, fewer, less = continue_text(prompt, options.bytes, options.drafts, options.device)
    print(text_of(fast), end="\n\n")
    print(f"one byte a call:  {calls} calls, {options.bytes / seconds:,.0f} bytes a second")
    print(f"with guesses:     {fewer} calls, {options.bytes / less:,.0f} bytes a second")
    same = "yes" if plain == fast else "no, since products of several rows round differently"
    print(f"the same text: {same}")


if __name__ == "__main__":
    main()
