"""Channels that forget almost nothing, over the longest sequence: errors of the decay must not add up."""

import math

import pytest

import flash_kda

torch = pytest.importorskip("torch")

TOKENS = 1 << 20


# A token forgets 2e-7 to 4e-6 nats.
BIASES = [-17.0, pytest.param(-15.5, marks=pytest.mark.slow), pytest.param(-14.0, marks=pytest.mark.slow)]


@pytest.mark.parametrize("bias", BIASES)
def test_a_million_tokens(device, bias):
    hold_decay(device, bias, None)


@pytest.mark.parametrize("bias", BIASES)
def test_a_million_tokens_portable(cuda, bias):
    """The kernel "portable" need not be the device's default, which the other test runs."""
    hold_decay(cuda, bias, "portable")


def hold_decay(device, bias, kernel):
    zeros = torch.zeros(1, TOKENS, 1, 128, dtype=torch.bfloat16, device=device)
    initial = torch.rand(1, 1, 128, 128, device=device) + 0.5
    final = torch.full_like(initial, math.nan)
    flash_kda.fwd(
        zeros,
        zeros,  # no key writes: the state only decays
        zeros,
        zeros,
        torch.zeros(1, TOKENS, 1, dtype=torch.bfloat16, device=device),
        128**-0.5,
        torch.empty_like(zeros),
        torch.zeros(1, device=device),
        torch.full((1, 128), bias, device=device),
        -5.0,
        initial_state=initial,
        final_state=final,
        kernel=kernel,
    )
    truth = -5 * TOKENS / (1 + math.exp(-bias))
    worst = ((final.double() / initial.double()).log() - truth).abs().max().item()
    assert worst <= 1e-3, f"{worst:.1e} off {truth:.3f}"
