"""What test_transformers.py runs in a process of its own:

    generate_text.py MODEL WITH DEVICE BYTES OUT [BEFORE]

Gives the trained weights of examples/language_model to a model of another library, and lets it continue
prompts by so many bytes, each alone and both in a padded batch. OUT gets what was written, the logits of each
step, the calls that this package took or left to FLA, and on a GPU the bytes a second of a second turn.
Without BEFORE each byte is the likeliest one.
BEFORE is the OUT of another run, whose bytes this run then writes too, so that both have logits of the same
steps.

MODEL: "kimi_linear", transformers' own Kimi Linear; "softplus" or "bounded", the KDA model of
flash-linear-attention (FLA) with one of the two gates.
WITH: "flash_kda", this package through FLA; "fla", FLA by itself; "torch", what transformers has in PyTorch.

With FLASH_KDA_TEST_TUNES=0 FLA's kernels run in their first configurations, since tuning them takes minutes.
On the CPU, FLA's own kernels run in Triton's interpreter. The interpreter cannot run FLA's kernel for chunks,
so FLA by itself computes prompts token by token there.
"""

import os
import sys
import warnings
from pathlib import Path

MODEL, WITH, DEVICE, BYTES, OUT, *BEFORE = sys.argv[1:]
warnings.simplefilter("ignore")
IS_FLA_S = MODEL != "kimi_linear"
IN_INTERPRETER = DEVICE == "cpu" and IS_FLA_S
os.environ["FLA_FLASH_KDA"] = "1" if WITH == "flash_kda" else "0"
if IN_INTERPRETER:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda self, *args, config, **kwargs: [0.0, 0.0, 0.0]  # which needs a GPU
if os.environ.get("FLASH_KDA_TEST_TUNES") == "0":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from peer_timing.tuning import tune_nothing

    tune_nothing()
if WITH == "torch":
    sys.modules["fla"] = None

import math  # noqa: E402
import time  # noqa: E402

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.set_verbosity_error()
WEIGHTS = Path(__file__).resolve().parents[2] / "examples" / "language_model" / "weights.safetensors"
LAYERS, WIDTH, HEADS, LOWER_BOUND, PAD = 4, 256, 2, 5.0, 0
PROMPTS = (
    "And it came to pass in those days, that the king of Israel sent messengers unto the people, ",
    "In the beginning ",
)


def make():
    sizes = {"vocab_size": 256, "hidden_size": WIDTH, "intermediate_size": 512}
    tokens = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
    if IS_FLA_S:
        from fla.models import KDAConfig, KDAForCausalLM

        gate = {"safe_gate": True, "lower_bound": -LOWER_BOUND} if MODEL == "bounded" else {}
        mode = "fused_recurrent" if IN_INTERPRETER and WITH == "fla" else "chunk"
        config = KDAConfig(
            **sizes,
            **tokens,
            **gate,
            num_hidden_layers=LAYERS,
            num_heads=HEADS,
            attn_mode=mode,
            norm_eps=1e-5,
        )
        return KDAForCausalLM(config)
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    # transformers wants one layer of full attention, which add_nothing() takes out again.
    kinds = {"layer_types": ["linear_attention"] * LAYERS + ["full_attention"]}
    kinds |= {"mlp_layer_types": ["dense"] * (LAYERS + 1), "num_hidden_layers": LAYERS + 1}
    heads = {
        "linear_num_heads": HEADS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 64,
    }
    return KimiLinearForCausalLM(KimiLinearConfig(**sizes, **tokens, **kinds, **heads, rms_norm_eps=1e-5))


def add_nothing(layer):
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()


def linear(weight):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data.copy_(weight)
    return module


def set_layer(layer, w):
    """w: the weights of a layer of examples/language_model by name."""
    attention = layer.attn if IS_FLA_S else layer.self_attn
    norms = (
        (layer.attn_norm, layer.mlp_norm)
        if IS_FLA_S
        else (layer.input_layernorm, layer.post_attention_layernorm)
    )
    for norm, name in zip((*norms, attention.o_norm), ("before", "between", "norm")):
        norm.weight.copy_(w[name])
    parts = w["qkv.weight"].chunk(3)
    for module, weight in zip((attention.q_proj, attention.k_proj, attention.v_proj), parts):
        module.weight.copy_(weight)
    attention.b_proj.weight.copy_(w["beta.weight"])
    attention.o_proj.weight.copy_(w["out.weight"])
    a, b = w["up.weight"].chunk(2)
    for module, weight in zip(
        (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj), (a, b, w["down.weight"])
    ):
        module.weight.copy_(weight)

    # The gates of these models are products of two matrices, and here they are one matrix.
    gate, bias, A_log = w["g.weight"], w["dt_bias"], w["A_log"]
    if MODEL != "bounded":
        # Where the channel forgets slowly, 5 softplus(x) is nearly 5 sigmoid(x).
        factor = A_log.exp()[:, None]
        gate = (gate.unflatten(0, (HEADS, -1)) * factor[..., None]).flatten(0, 1)
        bias, A_log = bias * factor, torch.full_like(A_log, math.log(LOWER_BOUND))
    owner = attention if IS_FLA_S else attention.forget_gate
    owner.A_log.copy_(A_log.view_as(owner.A_log))
    owner.dt_bias.copy_(bias.flatten())
    if IS_FLA_S:
        attention.f_proj, attention.g_proj = linear(gate), linear(w["output_gate.weight"])
        taps = w["taps"].chunk(3)
        for module, weight in zip((attention.q_conv1d, attention.k_conv1d, attention.v_conv1d), taps):
            module.weight.copy_(weight[:, None])
    else:
        owner.f_a_proj, owner.f_b_proj = nn.Identity(), linear(gate)
        attention.g_a_proj, attention.g_b_proj = nn.Identity(), linear(w["output_gate.weight"])
        attention.conv1d.weight.copy_(w["taps"][:, None])


@torch.no_grad()
def with_weights(model):
    weights = {name: x.float() for name, x in load_file(WEIGHTS).items()}
    inner = model.model
    (inner.embeddings if IS_FLA_S else inner.embed_tokens).weight.copy_(weights["embed.weight"])
    for i in range(LAYERS):
        start = f"layers.{i}."
        set_layer(
            inner.layers[i], {n.removeprefix(start): x for n, x in weights.items() if n.startswith(start)}
        )
    if not IS_FLA_S:
        add_nothing(inner.layers[LAYERS])
    inner.norm.weight.copy_(weights["last"])
    model.lm_head.weight.copy_(weights["head.weight"])
    model = model.to(DEVICE, torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            parameter.data = parameter.data.float()
    return model


def generate(model, prompts, written):
    """The new bytes of prompts of any lengths, which are padded in front, and the logits of each step.
    written: what to write, or None."""
    longest = max(map(len, prompts))
    rows = [[PAD] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]

    def write(tokens, scores):
        if written is None:
            return scores
        now = written[:, tokens.shape[1] - longest, None].to(scores.device)
        return torch.full_like(scores, -math.inf).scatter(1, now, 0.0)

    done = model.generate(
        torch.tensor(rows, device=DEVICE),
        attention_mask=torch.tensor(mask, device=DEVICE),
        max_new_tokens=int(BYTES),
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=[write],
    )
    return done.sequences[:, longest:].cpu(), torch.stack(done.logits, 1).float().cpu()


def main():
    if WITH == "flash_kda":
        import flash_kda.fla

        flash_kda.fla.install()
    model = with_weights(make())
    prompts = [list(text.encode()) for text in PROMPTS]
    before = torch.load(BEFORE[0]) if BEFORE else {}
    results = {}
    for name, some in (("long", prompts[:1]), ("short", prompts[1:]), ("padded", prompts)):
        written = before[name]["bytes"] if before else None
        calls = []
        if WITH == "flash_kda":
            with flash_kda.fla.record() as calls:
                new, logits = generate(model, some, written)
        else:
            new, logits = generate(model, some, written)
        results[name] = {"bytes": new, "logits": logits, "calls": [tuple(call) for call in calls]}
        if DEVICE != "cpu":
            start = time.monotonic()  # kernels are loaded and tuned now
            generate(model, some, new)
            results[name]["rate"] = new.numel() / (time.monotonic() - start)
    torch.save(results, OUT)


main()
