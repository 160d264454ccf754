"""Trains the model of this folder on a text: python examples/language_model/train.py TEXT [--minutes 2]

The weights in this folder come from the King James Bible of 1611, which is in the public domain. Debian's
package bible-kjv prints it (bible -f 'gen1:1-rev22:21'); the verses' numbers were cut off.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from kda import cross_entropy, mix_by_fla, mix_by_flash_kda, mix_in_pytorch
from model import Model, save

MIXES = {"flash_kda": mix_by_flash_kda, "fla": mix_by_fla, "pytorch": mix_in_pytorch}
FIRST_STEPS = 10  # in which kernels are loaded and tuned


def batches(text: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(text) - length, (rows,), generator=generator)
    return torch.stack([text[i : i + length] for i in starts.tolist()])


def now(device: str) -> float:
    """Seconds, once the device has done all that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, help="in place of --minutes")
    parser.add_argument("--tokens", type=int, default=512, help="of a row; a multiple of 16")
    parser.add_argument("--every", type=int, default=100, help="steps between two lines of output")
    parser.add_argument("--kda", choices=MIXES, default="flash_kda", help="what computes the layers")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the order of the text")
    options = parser.parse_args()

    if options.kda == "fla":
        os.environ["FLA_FLASH_KDA"] = "0"  # FLA's own kernels
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    generator = torch.Generator().manual_seed(options.seed + 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = torch.frombuffer(bytearray(options.text.read_bytes()), dtype=torch.uint8).long()
    held = min(200_000, len(text) // 10)
    held_out, text = text[-held:], text[:-held]
    model = Model().to(device)
    mixes = [MIXES[options.kda]] * len(model.layers)
    warm = min(100, options.steps // 4 or 1) if options.steps else 100  # steps until the rate is full
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    start, share, step = time.monotonic(), 0.0, 0
    tuned = start  # when kernels are loaded and tuned, which is after the first steps
    while share < 1:
        share = step / options.steps if options.steps else (time.monotonic() - start) / (60 * options.minutes)
        rate = 2e-3 * min(1.0, (step + 1) / warm) * max(0.02, 1 - share)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = batches(text, options.rows, options.tokens, generator).to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = cross_entropy(model(tokens, mixes), tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % options.every == 0:
            print(f"step {step}, {time.monotonic() - start:.0f} s, {loss.item():.3f} bits a byte", flush=True)
        step += 1
        if step == FIRST_STEPS:
            tuned = now(device)
    if step > FIRST_STEPS:
        rate = (step - FIRST_STEPS) * options.rows * options.tokens / (now(device) - tuned)
        print(f"{rate:.0f} tokens a second after the first {FIRST_STEPS} steps")
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        rows = held_out[: held // options.tokens * options.tokens].view(-1, options.tokens)
        rows = rows[: 2 * options.rows].to(device)
        bits = torch.stack([cross_entropy(model(part, mixes), part) for part in rows.split(32)]).mean()
    print(f"{step} steps, {time.monotonic() - start:.0f} s, held-out text {bits.item():.3f} bits a byte")
    save(model)


if __name__ == "__main__":
    main()
