"""Text in, text out: python examples/language_model/generate.py "And the king said" [--sequences 8]

The prompt is computed once, by flash_kda.fwd, into a slot of a pool of states. Then every sequence gets a
copy of it, and all of them are continued, a byte a step, by one flash_kda.decode_layer a layer. On a GPU
the step is a CUDA graph. Needs PyTorch and safetensors.
"""

from __future__ import annotations

import argparse
import time

import torch
from cache import Cache
from model import Model, load, text_of
from torch import Tensor


class Generator:
    """Continues N sequences, which have the slots 0 to N - 1."""

    def __init__(self, model: Model, cache: Cache, sequences: int, length: int, warmth: float) -> None:
        device = model.head.weight.device
        self.model, self.cache, self.warmth = model, cache, warmth
        self.slots = torch.arange(sequences, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(sequences, dtype=torch.long, device=device)
        self.text = torch.zeros(length, sequences, dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)

    def choose(self, logits: Tensor) -> Tensor:
        """Draws the next token of each row. Adding Gumbel noise and taking the largest draws from the
        softmax."""
        noise = -torch.empty_like(logits, dtype=torch.float32).exponential_().log()
        return (logits.float() + self.warmth * noise).argmax(-1)

    def step(self) -> None:
        """Writes down the token of each sequence and makes the next one of it. Touches fixed memory alone, so
        that it can be a graph."""
        self.text.index_copy_(0, self.place, self.tokens[None])
        self.place += 1
        mixes = [layer.step(self.slots) for layer in self.cache.layers]
        self.tokens.copy_(self.choose(self.model(self.tokens[None], mixes)[0]))

    def graph_of_step(self) -> torch.cuda.CUDAGraph:
        """The step as a graph. Running it once, to load all kernels, changes what it reads; that is put
        back."""
        pools = [pool for layer in self.cache.layers for pool in (layer.state, layer.inputs)]
        kept = [x.clone() for x in (*pools, self.tokens, self.place)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        for x, before in zip((*pools, self.tokens, self.place), kept):
            x.copy_(before)
        return graph


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", default="And the king said unto him, ")
    parser.add_argument("--bytes", type=int, default=300, help="that are written; default: 300")
    parser.add_argument("--sequences", type=int, default=1, help="that continue the prompt; default: 1")
    parser.add_argument("--warmth", type=float, default=0.6, help="0: always the likeliest; default: 0.6")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    device, N = options.device, options.sequences
    prompt = torch.tensor(list(options.prompt.encode()), device=device)
    with torch.inference_mode():
        model = load(device)
        cache = Cache(model, N, device)
        start = time.perf_counter()
        logits = cache.prefill(model, prompt, slot=0)
        generator = Generator(model, cache, N, options.bytes, options.warmth)
        for layer in cache.layers:
            layer.state[1:], layer.inputs[1:] = layer.state[:1], layer.inputs[:1]
        generator.tokens.copy_(generator.choose(logits.expand(N, -1)))
        run = generator.graph_of_step().replay if device.startswith("cuda") else generator.step
        ready = time.perf_counter()
        for _ in range(options.bytes):
            run()
        texts = generator.text.T.tolist()
        end = time.perf_counter()
    for text in texts[:4]:
        print(options.prompt + text_of(text), end="\n\n")
    if N > 4:
        print(f"and {N - 4} more")
    print(f"prompt of {len(prompt)} bytes: {1e3 * (ready - start):.1f} ms, graph included")
    seconds = end - ready
    print(f"{N * options.bytes / seconds:,.0f} bytes a second, {1e3 * seconds / options.bytes:.3f} ms a step")


if __name__ == "__main__":
    main()
