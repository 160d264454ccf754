"""Problems for tests of gradients: arguments of chunk_kda, and the recurrence of KDA token by token in fp64,
in plain PyTorch, of which autograd knows the gradients."""

import torch

import flash_kda
from problems import make_any, to_torch

INPUTS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
FLAGS = ("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel")
# The largest relative RMS error of a gradient, by its dtype. Rounding to bf16 alone gives 1.7e-3.
BARS = {torch.bfloat16: 3.5e-3, torch.float32: 1e-3}


def make_call(lengths=(20, 0, 43), device="cpu", rows=None, **options):
    """The arguments of chunk_kda, all of them tensors that may get gradients. rows: batch rows of equal
    sequences, without cu_seqlens. options: those of problems.make_any."""
    if rows is not None:
        lengths = (rows * lengths[0],)
    a = to_torch(make_any(lengths=lengths, **options), device)
    call = {name: a.get(name) for name in (*INPUTS, "cu_seqlens", "scale", "lower_bound")}
    call |= {flag: a.get(flag, True) for flag in FLAGS}
    call |= {"allow_neg_eigval": a.get("allow_neg_eigval", False), "output_final_state": True}
    call["state_v_first"] = a.get("state_v_first", True)
    call["scale"] = 0.09375  # near 128 ** -0.5, and in fp32 the same number
    if rows is not None:
        for name in ("q", "k", "v", "g", "beta"):
            call[name] = call[name].reshape(rows, -1, *call[name].shape[2:])
        state = torch.randn(
            rows, *call["initial_state"].shape[1:], generator=torch.Generator().manual_seed(5)
        )
        call |= {"cu_seqlens": None, "initial_state": state.to(device)}
    return call


def log_decay(call):
    g = call["g"]
    if not call["use_gate_in_kernel"]:
        return g
    HV, K = g.shape[2:]
    x = g if call["dt_bias"] is None else g + call["dt_bias"].reshape(HV, K)
    steepness = (
        torch.ones(HV, 1, dtype=g.dtype) if call["A_log"] is None else call["A_log"].reshape(HV, 1).exp()
    )
    if call["lower_bound"] is None:
        return -steepness * torch.nn.functional.softplus(x)
    return call["lower_bound"] * torch.sigmoid(steepness * x)


def recurrence(call):
    """out and the final states, by the formulas at the top of flash_kda.h. Of tensors in fp64."""
    q, k, v, beta = (call[name] for name in ("q", "k", "v", "beta"))
    if call["use_qk_l2norm_in_kernel"]:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if call["use_beta_sigmoid_in_kernel"]:
        beta = beta.sigmoid() * (2 if call["allow_neg_eigval"] else 1)
    decay = log_decay(call).exp()
    B, T, HV, V = v.shape
    q, k = (x.repeat_interleave(HV // q.shape[2], 2) for x in (q, k))
    borders = call["cu_seqlens"]
    places = [(b, 0, T) for b in range(B)]
    if borders is not None:
        places = [(0, first, last) for first, last in zip(borders.tolist(), borders.tolist()[1:])]
    outs, states = [], []
    for n, (b, first, last) in enumerate(places):
        S = torch.zeros(HV, q.shape[-1], V, dtype=v.dtype)
        if call["initial_state"] is not None:
            S = call["initial_state"][n]
            S = S.mT if call["state_v_first"] else S
        for t in range(first, last):
            S = decay[b, t, :, :, None] * S
            u = beta[b, t, :, None] * (v[b, t] - (S * k[b, t, :, :, None]).sum(1))
            S = S + k[b, t, :, :, None] * u[:, None]
            outs.append(call["scale"] * (S * q[b, t, :, :, None]).sum(1))
        states.append(S.mT if call["state_v_first"] else S)
    return torch.stack(outs).reshape(B, T, HV, V), torch.stack(states)


def in_fp64(call):
    return {n: x.detach().double().cpu() if n in INPUTS and x is not None else x for n, x in call.items()}


def gradients(call, dout, dstate):
    """The gradients of sum(out dout) + sum(state dstate), by autograd of the plain recurrence in fp64."""
    wide = in_fp64(call)
    leaves = [wide[name].requires_grad_() for name in INPUTS if wide[name] is not None]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the products of one token are too small for more
    out, state = recurrence(wide)
    loss = (out * dout.double().cpu()).sum() + (state * dstate.double().cpu()).sum()
    found = iter(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    torch.set_num_threads(threads)
    return {name: None if wide[name] is None else next(found) for name in INPUTS}


def by_reference(call, dout, dstate):
    """The same, by bwd_reference, which test_backward.py holds to these gradients. It takes a tenth of the
    time."""
    found = flash_kda.bwd_reference(
        *(call[n] for n in ("q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias", "lower_bound")),
        call["initial_state"], call["cu_seqlens"], dout=dout, dfinal_state=dstate,
        **{n: call[n] for n in (*FLAGS, "allow_neg_eigval", "state_v_first")},
    )  # fmt: skip
    return {name: None if call[name] is None else x for name, x in zip(INPUTS, found)}


def upstream(call, seed=0):
    """Random gradients with respect to out and the final state."""
    B, T, HV, V = call["v"].shape
    N = B if call["cu_seqlens"] is None else len(call["cu_seqlens"]) - 1
    generator = torch.Generator().manual_seed(seed)
    dout = torch.randn(B, T, HV, V, generator=generator).bfloat16()
    dstate = torch.randn(N, HV, 128, 128, generator=generator)
    return dout.to(call["v"].device), dstate.to(call["v"].device)


def error(got, want):
    """The relative RMS error."""
    got = got.detach().double().cpu()
    assert got.shape == want.shape
    assert got.isfinite().all()
    return float((got - want).square().sum().sqrt() / want.square().sum().sqrt().clamp(min=1e-300))


def hold(got, want):
    """Asserts that gradients, by input, are within the bars."""
    for name, x in want.items():
        if x is None:
            assert got.get(name) is None, name
        else:
            assert error(got[name], x.reshape(got[name].shape)) <= BARS[got[name].dtype], name


class Layer(torch.nn.Module):
    """A small layer around chunk_kda. Its forward method takes [B, T, width] and returns as much."""

    def __init__(self, width=32, HV=2, disable_recompute=False):
        super().__init__()
        self.HV, self.disable_recompute = HV, disable_recompute
        self.qk, self.v, self.g = (torch.nn.Linear(width, 128 * n, bias=False) for n in (2, HV, HV))
        self.beta = torch.nn.Linear(width, HV, bias=False)
        self.A_log = torch.nn.Parameter(torch.zeros(HV))
        self.dt_bias = torch.nn.Parameter(torch.linspace(-6.0, 0.0, 128).repeat(HV))
        self.out = torch.nn.Linear(128 * HV, width, bias=False)

    def forward(self, x):
        q, k = self.qk(x).unflatten(-1, (2, 1, 128)).unbind(2)
        v, g = (part(x).unflatten(-1, (self.HV, 128)) for part in (self.v, self.g))
        o, _ = flash_kda.chunk_kda(
            q.bfloat16(), k.bfloat16(), v.bfloat16(), g, self.beta(x), A_log=self.A_log, dt_bias=self.dt_bias,
            lower_bound=-5.0, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, disable_recompute=self.disable_recompute,
        )  # fmt: skip
        return x + self.out(o.flatten(-2).to(x.dtype))


class LanguageModel(torch.nn.Module):
    """A model of bytes with two layers."""

    def __init__(self, width=64, disable_recompute=False):
        super().__init__()
        self.embed = torch.nn.Embedding(256, width)
        self.layers = torch.nn.Sequential(*(Layer(width, 1, disable_recompute) for _ in range(2)))
        self.head = torch.nn.Linear(width, 256, bias=False)

    def forward(self, text):
        """The bits that each byte takes, given those before it."""
        logits = self.head(
            torch.nn.functional.rms_norm(self.layers(self.embed(text)), self.embed.weight.shape[1:])
        )
        return torch.nn.functional.cross_entropy(logits[:, :-1].mT, text[:, 1:]) / 0.6931471805599453
