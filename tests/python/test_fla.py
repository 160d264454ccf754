"""As a backend of flash-linear-attention, which finds the package by its name."""

import warnings

import numpy as np
import pytest

import flash_kda
from problems import BARS, error, make, to_numpy, to_torch, truth

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # FLA warns where there is no GPU
    pytest.importorskip("fla", reason="flash-linear-attention is not installed", exc_type=ImportError)
    chunk = pytest.importorskip(
        "fla.ops.kda", reason="this flash-linear-attention has no KDA", exc_type=ImportError
    )
chunk_kda = chunk.chunk_kda

FLAGS = {
    "use_gate_in_kernel": True,
    "use_qk_l2norm_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "safe_gate": True,
    "state_v_first": True,
}


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of flash_kda.fwd, which still runs. FLA's settings are its
    defaults."""
    for name in ("FLA_FLASH_KDA", "FLA_DISABLE_BACKEND_DISPATCH"):
        monkeypatch.delenv(name, raising=False)
    seen, fwd = [], flash_kda.fwd

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return fwd(*args, **kwargs)

    monkeypatch.setattr(flash_kda, "fwd", spy)
    return seen


def through_fla(tensors, **options):
    """Calls chunk_kda with the arguments of fwd. dt_bias is flat, as FLA's layers hold it."""
    names = ("q", "k", "v", "g", "beta", "scale", "lower_bound", "A_log", "initial_state", "cu_seqlens")
    arguments = {n: tensors[n] for n in names if n in tensors}
    return chunk_kda(
        **arguments, dt_bias=tensors["dt_bias"].reshape(-1), output_final_state=True, **FLAGS, **options
    )


PROBLEMS = {
    "one sequence": {"T": 130},
    "batch with states": {"T": 70, "B": 3, "initial": np.float32},
    "sequences": {"lengths": [5, 64, 100], "initial": np.float32},
    "sequences in int32": {"lengths": [5, 64], "cu_dtype": np.int32},
}


@pytest.mark.parametrize("options", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_dispatch(device, calls, options, mode):
    a = make(**options)
    expected = truth(a)
    tensors = to_torch(a, device)
    with mode():
        out, state = through_fla(tensors)
    assert len(calls) == 1, "FLA did not take this package"
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    got = to_numpy({"out": out, "state": state})
    assert error(got["out"], expected[0]) <= BARS[device][0]
    assert error(got["state"], expected[1]) <= BARS[device][1]


def test_agrees_with_fla_s_plain_recurrence(device, calls):
    """FLA has an implementation of its own, which computes token by token in PyTorch, in fp32."""
    from fla.ops.kda.gate import naive_kda_lowerbound_gate
    from fla.ops.kda.naive import naive_recurrent_kda

    t = to_torch(make(T=90, H=3, B=2, initial=np.float32), device)
    with torch.inference_mode():
        out, state = through_fla(t)
        gate = naive_kda_lowerbound_gate(t["g"], t["A_log"], t["dt_bias"].reshape(-1), t["lower_bound"])
        q, k = (
            x.float() * torch.rsqrt((x.float() ** 2).sum(-1, keepdim=True) + 1e-6) for x in (t["q"], t["k"])
        )
        want, want_state = naive_recurrent_kda(
            q, k, t["v"].float(), gate, t["beta"].float().sigmoid(), t["scale"], t["initial_state"].mT, True
        )
    assert len(calls) == 1
    assert relative(out, want) <= BARS[device][0] + 1e-4  # fp32's own error
    assert relative(state, want_state.mT) <= BARS[device][1] + 1e-5


def relative(got, want):
    return error(got.double().cpu().numpy(), want.double().cpu().numpy())


@pytest.mark.parametrize("options", PROBLEMS.values(), ids=PROBLEMS)
def test_against_fla_s_triton_path(cuda, calls, monkeypatch, options):
    a = make(**{"H": 4, **options})
    expected = truth(a)
    tensors = to_torch(a, cuda)
    with torch.inference_mode():
        ours = through_fla(tensors)
        assert len(calls) == 1
        monkeypatch.setenv("FLA_FLASH_KDA", "0")
        theirs = through_fla(tensors)
        assert len(calls) == 1, "this call was FLA's own"
    for bar, got, other, want in zip(BARS[cuda], ours, theirs, expected):
        mine, its = (error(x.float().cpu().numpy(), want) for x in (got, other))
        assert mine <= bar
        assert mine <= 1.05 * its
        assert relative(got, other) <= mine + its + 1e-6


def test_training_stays_with_fla(cuda, calls):
    tensors = to_torch(make(T=70), cuda)
    tensors["q"].requires_grad_()
    out, _ = through_fla(tensors)
    out.float().sum().backward()
    assert not calls
    assert tensors["q"].grad is not None


def layer_of(device, **options):
    layers = pytest.importorskip("fla.layers.kda", reason="FLA's layers need einops", exc_type=ImportError)
    torch.manual_seed(0)
    layer = layers.KimiDeltaAttention(
        hidden_size=256, head_dim=128, num_heads=2, safe_gate=True, lower_bound=-5.0, layer_idx=0, **options
    )
    return layer.to(device, torch.bfloat16).eval()


def keep_in_fp32(layer):
    """Converts the gate's parameters to fp32, as checkpoints hold them."""
    layer.A_log.data, layer.dt_bias.data = layer.A_log.data.float(), layer.dt_bias.data.float()
    return layer


@pytest.mark.parametrize("gate", ["fp32", "cast with the layer"])
def test_layer(cuda, calls, monkeypatch, gate):
    """An unmodified layer: plain input, a mask with padding, and a cache that carries the state on."""
    layer = layer_of(cuda)
    if gate == "fp32":
        keep_in_fp32(layer)
    x = torch.randn(2, 200, 256, device=cuda, dtype=torch.bfloat16)
    mask = torch.ones(2, 200, device=cuda, dtype=torch.long)
    mask[1, :77] = 0

    def run():
        from fla.models.utils import Cache

        cache = Cache()
        with torch.inference_mode():
            plain = layer(x)[0]
            masked = layer(x, attention_mask=mask)[0]
            first = layer(x[:, :120], past_key_values=cache, use_cache=True)[0]
            second = layer(x[:, 120:], past_key_values=cache, use_cache=True)[0]
        return plain, masked, torch.cat([first, second], dim=1)

    ours = run()
    assert len(calls) == 4
    assert calls[1]["cu_seqlens"] is not None
    assert calls[3]["initial_state"] is not None
    monkeypatch.setenv("FLA_FLASH_KDA", "0")
    theirs = run()
    assert len(calls) == 4
    for got, want in zip(ours, theirs):
        # Both results were rounded many times, as a projection of 256, a norm and a gate follow the
        # attention.
        assert relative(got, want) <= 1.5e-2
    assert relative(ours[2], ours[0]) <= 1.5e-2  # two calls with a cache equal one call


@pytest.mark.parametrize("gate", ["fp32", "cast with the layer"])
def test_layer_without_its_triton_parts(calls, gate):
    """On the CPU the layer's convolution and norm cannot run. All else of the layer is unmodified."""
    layer = layer_of("cpu", use_short_conv=False)
    if gate == "fp32":
        keep_in_fp32(layer)
    seen = []

    class Norm(torch.nn.Module):
        def forward(self, o, gate):
            seen.append(o)
            return o * gate.sigmoid()

    layer.o_norm = Norm()
    x = torch.randn(2, 100, 256, dtype=torch.bfloat16)
    with torch.inference_mode():
        layer(x)
    assert len(calls) == 1
    (call,) = calls
    a = to_numpy({"A_log": call["A_log"].float(), "dt_bias": call["dt_bias"].float()})
    with torch.inference_mode():
        q, k, v = (
            torch.nn.functional.silu(p(x)).unflatten(-1, (2, 128))
            for p in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        g, beta = layer.f_proj(x).unflatten(-1, (2, 128)), layer.b_proj(x)
    a |= to_numpy({"q": q, "k": k, "v": v, "g": g, "beta": beta})
    expected = truth({**a, "scale": 128**-0.5, "lower_bound": -5.0})
    assert error(to_numpy({"o": seen[0]})["o"], expected[0]) <= BARS["cpu"][0]
