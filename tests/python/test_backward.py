"""The backward pass: the fp64 definition against PyTorch's autograd through a recurrence of its own, and
`bwd` against the definition."""

import math

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda

torch = pytest.importorskip("torch")

D = 128
GATES = ("bounded", "softplus", "activated")
BETAS = ("sigmoid", "twice", "activated")


class Problem:
    """Inputs in the dtypes of a call, as leaves of autograd in fp64, and the loss's gradients."""

    def __init__(self, gate, beta, normalised=False, lengths=(5, 0, 3), H=1, group=1, k_first=False):
        torch.manual_seed(7)
        T, HV, N = sum(lengths), H * group, len(lengths)
        self.lengths, self.group, self.gate, self.beta_kind = lengths, group, gate, beta
        self.normalised, self.k_first = normalised, k_first

        def normal(*shape, size=1.0):
            return (size * torch.randn(shape)).bfloat16()

        size = 0.1 if normalised else 1.0
        self.q, self.k = normal(1, T, H, D, size=size), normal(1, T, H, D, size=size)
        self.v, self.g, self.beta = normal(1, T, HV, D), normal(1, T, HV, D), normal(1, T, HV)
        if gate == "activated":
            self.g = -self.g.abs()
        if beta == "activated":
            self.beta = self.beta.sigmoid()
        self.A_log = None if gate == "activated" else torch.randn(HV) / 2
        self.dt_bias = None if gate == "activated" else torch.randn(HV, D)
        self.initial_state = torch.randn(N, HV, D, D)
        self.dout, self.dfinal_state = normal(1, T, HV, D), torch.randn(N, HV, D, D)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def arguments(self):
        lower_bound = -4.0 if self.gate == "bounded" else None
        first = (self.q, self.k, self.v, self.g, self.beta, 0.25, self.A_log, self.dt_bias, lower_bound)
        return (*first, self.initial_state, self.cu_seqlens)

    def options(self):
        return {
            "dout": self.dout,
            "dfinal_state": self.dfinal_state,
            "use_gate_in_kernel": self.gate != "activated",
            "use_qk_l2norm_in_kernel": not self.normalised,
            "use_beta_sigmoid_in_kernel": self.beta_kind != "activated",
            "allow_neg_eigval": self.beta_kind == "twice",
            "state_v_first": not self.k_first,
        }

    def autograd(self):
        """The gradients by PyTorch, in the order of bwd_reference's results."""
        leaves = [self.q, self.k, self.v, self.g, self.beta, self.A_log, self.dt_bias, self.initial_state]
        leaves = [None if x is None else x.double().requires_grad_() for x in leaves]
        q, k, v, g, beta, A_log, dt_bias, state = leaves
        if not self.normalised:
            q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        q, k = (x.repeat_interleave(self.group, 2) for x in (q, k))
        if self.gate == "bounded":
            g = -4.0 * torch.sigmoid(A_log.exp()[:, None] * (g + dt_bias))
        elif self.gate == "softplus":
            g = -A_log.exp()[:, None] * torch.nn.functional.softplus(g + dt_bias)
        if self.beta_kind != "activated":
            beta = beta.sigmoid() * (2 if self.beta_kind == "twice" else 1)
        loss = torch.zeros((), dtype=torch.float64)
        t = 0
        for n, length in enumerate(self.lengths):
            S = state[n] if self.k_first else state[n].mT  # [HV, K, V]
            for _ in range(length):
                S = g[0, t].exp()[..., None] * S
                missed = v[0, t] - torch.einsum("hkv,hk->hv", S, k[0, t])
                S = S + k[0, t][..., None] * (beta[0, t][:, None] * missed)[:, None]
                out = 0.25 * torch.einsum("hkv,hk->hv", S, q[0, t])
                loss = loss + (out * self.dout[0, t].double()).sum()
                t += 1
            last = S if self.k_first else S.mT
            loss = loss + (last * self.dfinal_state[n].double()).sum()
        loss.backward()
        return [None if x is None else x.grad for x in leaves]


def check_close(got, want, bar):
    for name, a, b in zip(got._fields, got, want):
        if b is None:
            assert not a.any(), name
            continue
        error = (a.double() - b).norm() / b.norm()
        assert error <= bar, (name, float(error))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gate", GATES)
def test_definition_is_what_autograd_says(gate, beta, normalised):
    p = Problem(gate, beta, normalised)
    check_close(flash_kda.bwd_reference(*p.arguments(), **p.options()), p.autograd(), 1e-12)


@pytest.mark.parametrize("k_first", [False, True])
def test_definition_with_grouped_heads_and_states_k_first(k_first):
    p = Problem("bounded", "sigmoid", lengths=(4, 3), H=2, group=3, k_first=k_first)
    check_close(flash_kda.bwd_reference(*p.arguments(), **p.options()), p.autograd(), 1e-12)


def written_like(p):
    """Arrays for all gradients of a problem, full of NaN."""
    like = [p.q, p.k, p.v, p.g, p.beta, p.A_log, p.dt_bias, p.initial_state]
    names = ("dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias", "dinitial_state")
    return {name: torch.full_like(x, math.nan) for name, x in zip(names, like) if x is not None}


@pytest.mark.parametrize("gate", GATES)
def test_bwd_of_tensors(gate):
    p = Problem(gate, "twice", lengths=(40, 0, 17), H=2, group=2)
    right = flash_kda.bwd_reference(*p.arguments(), **p.options())
    to = written_like(p)
    flash_kda.bwd(*p.arguments(), **p.options(), **to)
    for name, x in to.items():
        error = (x.double() - getattr(right, name)).norm() / getattr(right, name).norm()
        assert error <= (3.5e-3 if x.dtype == torch.bfloat16 else 1e-4), (name, float(error))


def test_bwd_of_numpy_arrays_and_of_some_gradients():
    p = Problem("bounded", "sigmoid", lengths=(20,))
    whole = written_like(p)
    flash_kda.bwd(*p.arguments(), **p.options(), **whole)

    def array(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.float().numpy().astype(bfloat16) if x.dtype == torch.bfloat16 else x.numpy()

    dk = np.empty(tuple(p.k.shape), bfloat16)
    options = {name: array(x) for name, x in p.options().items()}
    flash_kda.bwd(*map(array, p.arguments()), **options, dk=dk, threads=1)
    assert np.array_equal(dk.astype(np.float32), whole["dk"].float().numpy())


def test_refusals():
    p = Problem("bounded", "sigmoid", lengths=(5,))
    arguments, options = p.arguments(), p.options()
    with pytest.raises(ValueError, match="are all absent; at least one gradient must be given"):
        flash_kda.bwd(*arguments, **options)
    with pytest.raises(ValueError, match=r"dq has shape .*; it must be \[B, T, H, K\]"):
        flash_kda.bwd(*arguments, **options, dq=torch.empty(1, 4, 1, D).bfloat16())
    with pytest.raises(TypeError, match="dg has dtype float32; it must be bfloat16"):
        flash_kda.bwd(*arguments, **options, dg=torch.empty(1, 5, 1, D))
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'cut'"):
        flash_kda.bwd(*arguments, **options, cut="never", dv=torch.empty_like(p.v))
    with pytest.raises(ValueError, match="dv overlaps v; it must have memory of its own"):
        flash_kda.bwd(*arguments, **options, dv=p.v)
    with pytest.raises(ValueError, match="kernel is"):
        flash_kda.bwd(*arguments, **options, dv=torch.empty_like(p.v), kernel="none")
    frozen = np.zeros((1, 5, 1, D), bfloat16)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="dv is read-only; it must be writable"):
        flash_kda.bwd(*arguments, **options, dv=frozen)
