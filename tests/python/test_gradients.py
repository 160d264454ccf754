"""Gradients of chunk_kda in PyTorch: against autograd of a plain recurrence in fp64, in all the ways in which
models train."""

import argparse
import shutil
from pathlib import Path

import pytest

import flash_kda
from problems import BETAS, GATES

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

from training_problems import (  # noqa: E402
    INPUTS,
    LanguageModel,
    Layer,
    by_reference,
    error,
    gradients,
    hold,
    make_call,
    upstream,
)

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="inductor needs a C++ compiler on the CPU"
)


@pytest.fixture
def device():
    """Gradients are for the CPU until a GPU has kernels for them."""
    return "cpu"


def with_leaves(call, names=INPUTS):
    """The call with new tensors that require gradients."""
    leaves = {n: call[n].detach().clone().requires_grad_() for n in names if call[n] is not None}
    return {**call, **leaves}, leaves


def found(call, dout, dstate, function=flash_kda.chunk_kda, names=INPUTS, **more):
    """The gradients of a call, by input."""
    call, leaves = with_leaves(call, names)
    out, state = function(**call, **more)
    torch.autograd.backward((out, state), (dout, dstate))
    return {name: leaf.grad for name, leaf in leaves.items()}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


CALLS = {
    **{gate: {"gate": gate} for gate in GATES},
    **{f"{beta} beta": {"beta": beta} for beta in BETAS},
    "normalised": {"normalised": True},
    "K first": {"k_first": True},
    "fp32 g and beta": {"wide": True},
    "one head": {"HV": 1},
    "three value heads": {"HV": 3},
    "batch rows": {"H": 2, "HV": 2, "lengths": (25,), "rows": 3},
    "several chunks": {"lengths": (150,), "HV": 1},
}


@pytest.mark.parametrize("case", CALLS)
def test_against_autograd(device, case):
    call = make_call(**{"seed": 1, **CALLS[case]}, device=device)
    dout, dstate = upstream(call)
    want = gradients(call, dout, dstate)
    got = found(call, dout, dstate)
    assert all(got[name].dtype == call[name].dtype for name in got)
    hold(got, want)
    same(got, found(call, dout, dstate, disable_recompute=True))


def test_saved_states(device):
    """Long enough that states are saved inside of sequences."""
    call = make_call((350, 0, 100), HV=1, seed=2, device=device)
    dout, dstate = upstream(call)
    got = found(call, dout, dstate, disable_recompute=True)
    same(got, found(call, dout, dstate))
    hold(got, by_reference(call, dout, dstate))


def bytes_kept(call, **more):
    """What autograd keeps between both passes, of each tensor that is not an argument."""
    given = {x.untyped_storage().data_ptr() for x in call.values() if isinstance(x, torch.Tensor)}
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in given:
            kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        results = flash_kda.chunk_kda(**call, **more)
    del results
    return sum(kept.values())


def test_what_is_kept(device):
    """By default nothing but the arguments. With disable_recompute at most a fifth of q, k, v and g."""
    call, _ = with_leaves(make_call((700,), HV=2, seed=2, device=device))
    assert bytes_kept(call) == 0
    most = 2 * sum(call[name].numel() for name in ("q", "k", "v", "g")) / 5
    kept = bytes_kept(call, disable_recompute=True)
    assert most / 2 < kept <= most
    assert kept == flash_kda.get_saved_size(700, 1, HV=2, device=device)


@pytest.mark.parametrize("name", INPUTS)
def test_one_gradient(device, name):
    """The others are None, and the one has the bits that it has among all of them."""
    call = make_call(seed=3, device=device)
    dout, dstate = upstream(call)
    every = found(call, dout, dstate)
    call, leaves = with_leaves(call, (name,))
    out, state = flash_kda.chunk_kda(**call)
    torch.autograd.backward((out, state), (dout, dstate))
    assert torch.equal(leaves[name].grad, every[name])
    assert all(call[n].grad is None for n in INPUTS if n != name)


def test_one_result(device):
    """The loss needs out alone, or the final state alone, or neither."""
    call = make_call(seed=4, device=device)
    dout, dstate = upstream(call)
    for i in range(2):
        upstreams = [dout if i == 0 else torch.zeros_like(dout), dstate if i else torch.zeros_like(dstate)]
        work, leaves = with_leaves(call)
        flash_kda.chunk_kda(**work)[i].backward(upstreams[i])
        hold({name: leaf.grad for name, leaf in leaves.items()}, by_reference(call, *upstreams))
    work, leaves = with_leaves(call)
    work["output_final_state"] = False
    out, state = flash_kda.chunk_kda(**work)
    assert state is None
    out.backward(dout)
    hold(
        {name: leaf.grad for name, leaf in leaves.items()}, by_reference(call, dout, torch.zeros_like(dstate))
    )


def test_results_are_those_without_gradients(device):
    call = make_call((400,), seed=5, device=device)
    with torch.no_grad():
        want = flash_kda.chunk_kda(**call)
    for more in ({}, {"disable_recompute": True}):
        got = flash_kda.chunk_kda(**with_leaves(call)[0], **more)
        assert all(map(torch.equal, got, want))
        assert all(x.requires_grad for x in got)


def test_one_tensor_in_two_places(device):
    call = make_call((40,), H=1, HV=1, seed=6, device=device)
    dout, dstate = upstream(call)
    want = found({**call, "k": call["q"]}, dout, dstate)
    call, leaves = with_leaves(call)
    call["k"] = call["q"]
    torch.autograd.backward(flash_kda.chunk_kda(**call), (dout, dstate))
    assert torch.equal(leaves["q"].grad, want["q"] + want["k"])


def test_a_layer_s_tensors(device):
    """Slices of one buffer, a flat dt_bias and an A_log of four dimensions in 16 bits, and gradients from
    above that are expanded and transposed."""
    call = make_call((45,), H=2, HV=2, seed=7, k_first=True, device=device)
    buffer = torch.cat([call[n].reshape(1, 45, -1) for n in ("q", "k", "v")], -1).requires_grad_()
    A_log = call["A_log"].bfloat16().reshape(1, 1, 2, 1).requires_grad_()
    dt_bias = call["dt_bias"].half().reshape(-1).requires_grad_()
    for name, part in zip(("q", "k", "v"), buffer.split(256, -1)):
        call[name] = part.unflatten(-1, (2, 128))
    call |= {"A_log": A_log, "dt_bias": dt_bias}
    _, dstate = upstream(call)
    dout = torch.randn(1, 45, 2).bfloat16()[..., None].expand(1, 45, 2, 128)
    out, state = flash_kda.chunk_kda(**call)
    torch.autograd.backward((out, state.mT), (dout, dstate))
    want = gradients(call, dout, dstate.mT)
    assert A_log.grad.dtype == torch.bfloat16
    assert dt_bias.grad.dtype == torch.half
    assert error(A_log.grad, want["A_log"]) <= 4e-3
    assert error(dt_bias.grad, want["dt_bias"]) <= 3.5e-3
    together = torch.cat([want[n].reshape(1, 45, -1) for n in ("q", "k", "v")], -1)
    assert error(buffer.grad, together) <= 3.5e-3


def test_gradients_add_up(device):
    call = make_call(seed=8, device=device)
    dout, dstate = upstream(call)
    once = found(call, dout, dstate)
    call, leaves = with_leaves(call)
    for _ in range(2):
        torch.autograd.backward(flash_kda.chunk_kda(**call), (dout, dstate))
    same({n: leaf.grad for n, leaf in leaves.items()}, {n: x + x for n, x in once.items()})


def test_no_tokens(device):
    for lengths in ((0, 0), (0, 20, 0)):
        call = make_call(lengths, seed=9, device=device)
        dout, dstate = upstream(call)
        got = found(call, dout, dstate)
        assert torch.equal(got["initial_state"][0], dstate[0])
        assert all(x.isfinite().all() for x in got.values())
        if sum(lengths) == 0:
            assert not got["A_log"].any()
            assert not got["dt_bias"].any()


def test_a_frozen_layer_computes_no_gradients(device):
    """A_log means nothing without use_gate_in_kernel, so that its gradient is not asked for."""
    call = make_call((10,), gate="activated", seed=9, device=device)
    call["A_log"] = torch.zeros(2, requires_grad=True)
    assert not flash_kda.chunk_kda(**call)[0].requires_grad


def test_second_derivatives_are_refused(device):
    call, leaves = with_leaves(make_call((10,), seed=10, device=device))
    for function in (
        flash_kda.chunk_kda,
        torch.compile(flash_kda.chunk_kda, backend="eager", fullgraph=True),
    ):
        out, _ = function(**call)
        (dq,) = torch.autograd.grad(out.float().sum(), leaves["q"], create_graph=True)
        assert dq.isfinite().all()
        with pytest.raises(RuntimeError, match=r"chunk_kda has no second derivative.*create_graph=True"):
            dq.float().sum().backward()


def test_a_change_between_both_passes_is_noticed(device):
    call, _ = with_leaves(make_call((10,), seed=11, device=device))
    call["v"] = call["v"] * 1
    out, _ = flash_kda.chunk_kda(**call)
    call["v"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.float().sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=needs_compiler)])
@pytest.mark.parametrize("disable_recompute", [False, True])
def test_compile(device, backend, disable_recompute):
    call = make_call((330, 20), seed=12, device=device)
    dout, dstate = upstream(call)
    torch.compiler.reset()
    compiled = torch.compile(flash_kda.chunk_kda, fullgraph=True, backend=backend)
    more = {"disable_recompute": disable_recompute}
    same(found(call, dout, dstate, compiled, **more), found(call, dout, dstate, **more))
    names = ("g", "A_log")
    same(found(call, dout, dstate, compiled, names, **more), found(call, dout, dstate, names=names, **more))


@pytest.mark.parametrize("disable_recompute", [False, True])
def test_compile_with_open_sizes(device, disable_recompute):
    torch.compiler.reset()
    compiled = torch.compile(flash_kda.chunk_kda, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (20, 340, 33):
        call = make_call((T,), rows=2, HV=1, seed=13, device=device)
        dout, dstate = upstream(call)
        more = {"disable_recompute": disable_recompute}
        same(found(call, dout, dstate, compiled, **more), found(call, dout, dstate, **more))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("disable_recompute", [False, True])
def test_activation_checkpointing(device, reentrant, disable_recompute):
    call = make_call((400,), HV=1, seed=14, device=device)
    dout, dstate = upstream(call)

    def again(**given):
        def run(*tensors):
            return flash_kda.chunk_kda(**{**given, **dict(zip(INPUTS, tensors))})

        return checkpoint(run, *(given[n] for n in INPUTS), use_reentrant=reentrant)

    more = {"disable_recompute": disable_recompute}
    same(found(call, dout, dstate, again, **more), found(call, dout, dstate, **more))


@pytest.mark.parametrize("keeps", [False, True])
def test_selective_checkpointing(device, keeps, monkeypatch):
    """A policy may name the operator, whose results are then kept instead of computed again."""
    if not hasattr(torch.utils.checkpoint, "CheckpointPolicy"):
        pytest.skip("PyTorch before 2.5 has no CheckpointPolicy")
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    from flash_kda import _autograd

    call = make_call((40,), seed=15, device=device)
    dout, dstate = upstream(call)
    want = found(call, dout, dstate)
    runs = []
    check = _autograd._check_goes_back
    monkeypatch.setattr(_autograd, "_check_goes_back", lambda *x: runs.append(1) or check(*x))

    def policy(ctx, op, *args, **kwargs):
        if keeps and op is torch.ops.flash_kda.chunk_kda.default:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def selective(**given):
        return checkpoint(
            lambda: flash_kda.chunk_kda(**given), use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )  # fmt: skip

    same(found(call, dout, dstate, selective), want)
    assert len(runs) == (1 if keeps else 2)


def test_autocast(device):
    """q, k and v in fp32 become bf16 under autocast, and their gradients are in fp32."""
    call = make_call((40,), seed=16, device=device)
    dout, dstate = upstream(call)
    want = found(call, dout, dstate)
    wide = {**call, **{n: call[n].float() for n in ("q", "k", "v")}}
    with pytest.raises(TypeError, match="q has dtype float32; it must be bfloat16"):
        flash_kda.chunk_kda(**wide)
    for function in (
        flash_kda.chunk_kda,
        torch.compile(flash_kda.chunk_kda, backend="aot_eager", fullgraph=True),
    ):
        torch.compiler.reset()
        with torch.autocast(device, torch.bfloat16):
            got = found(wide, dout, dstate, function)
        assert all(got[n].dtype == torch.float32 for n in ("q", "k", "v"))
        same({n: x.to(want[n].dtype) for n, x in got.items()}, want)
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        assert flash_kda.chunk_kda(**wide)[0].dtype == torch.bfloat16


def test_opcheck(device):
    call, _ = with_leaves(make_call((12, 3), seed=17, device=device))
    names = (*INPUTS, "cu_seqlens", "scale", "lower_bound")
    flags = (0, True, True, True, False, True, True)  # max_seqlen, ..., output_final_state
    for save in (False, True):
        torch.library.opcheck(
            torch.ops.flash_kda.chunk_kda.default, (*(call[n] for n in names), *flags, save)
        )


def test_schemas_of_the_operators():
    """Programs that were exported hold names and positions."""
    tensors = (
        "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
        "Tensor? initial_state, Tensor? cu_seqlens, "
    )
    options = (
        "float scale, float? lower_bound, SymInt max_seqlen, bool use_gate_in_kernel, "
        "bool use_qk_l2norm_in_kernel, bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, "
        "bool state_v_first, "
    )
    last = "str? kernel_name=None, bool batch_invariant=False, int workspace_limit=0"
    assert str(torch.ops.flash_kda.chunk_kda.default._schema) == (
        f"flash_kda::chunk_kda({tensors}{options}bool output_final_state, bool save, {last}) -> "
        "(Tensor, Tensor, Tensor)"
    )
    assert str(torch.ops.flash_kda.chunk_kda_bwd.default._schema) == (
        f"flash_kda::chunk_kda_bwd({tensors}Tensor? saved, Tensor? dout, Tensor? dfinal_state, {options}"
        f"int wanted, {last}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )


def test_options_that_fla_does_not_have(device):
    """The kernel computes both passes, and the other two change no bits on the CPU."""
    call = make_call(seed=31, device=device)
    dout, dstate = upstream(call)
    want = found(call, dout, dstate)
    same(want, found(call, dout, dstate, batch_invariant=True, workspace_limit=1))
    same(want, found(call, dout, dstate, kernel="cpu"))
    own = found(call, dout, dstate, kernel="cpu-portable")
    hold(own, gradients(call, dout, dstate))
    with torch.no_grad():
        plain = flash_kda.chunk_kda(**call)[0]
        assert torch.equal(plain, flash_kda.chunk_kda(**call, kernel="cpu", batch_invariant=True)[0])
    arguments, leaves = with_leaves(call)
    tensors = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens")
    options = (
        "lower_bound", "use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel",
        "allow_neg_eigval", "state_v_first",
    )  # fmt: skip
    bound, *flags = (arguments.get(name, False) for name in options)
    results = torch.ops.flash_kda.chunk_kda(
        *map(arguments.get, tensors), call["scale"], bound, 0, *flags, True, False, "cpu-portable", True, 1
    )
    torch.autograd.backward(results[:2], (dout, dstate))
    same(own, {name: leaf.grad for name, leaf in leaves.items()})


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compile_with_options_that_fla_does_not_have(device, backend):
    call = make_call(seed=31, device=device)
    dout, dstate = upstream(call)
    options = {"kernel": "cpu-portable", "batch_invariant": True, "workspace_limit": 1 << 20}
    compiled = torch.compile(
        lambda **call: flash_kda.chunk_kda(**call, **options), fullgraph=True, backend=backend
    )
    torch.compiler.reset()
    same(found(call, dout, dstate, **options), found(call, dout, dstate, compiled))


def strange(kind, call):
    q = call["q"].detach()

    def work(q):
        return flash_kda.chunk_kda(**{**call, "q": q})[0].float().sum()

    if kind == "vmap":
        torch.func.vmap(work)(torch.stack([q, q]))
    elif kind == "grad":
        torch.func.grad(work)(q)
    elif kind == "jvp":
        torch.func.jvp(work, (q,), (q,))
    elif kind == "dual":
        with torch.autograd.forward_ad.dual_level():
            work(torch.autograd.forward_ad.make_dual(q, q))
    elif kind == "negated":
        work(torch._neg_view(q))


@pytest.mark.parametrize(
    ("kind", "exception", "sentence"),
    [
        ("vmap", TypeError, "q is a batched tensor of torch.vmap"),
        ("grad", TypeError, "q is a tensor of a function transform"),
        ("jvp", TypeError, "q is a tensor of a function transform"),
        ("dual", RuntimeError, "no forward-mode derivative"),
        ("negated", TypeError, "q is a view that is negated lazily"),
    ],
)
def test_strange_tensors(device, kind, exception, sentence):
    call, _ = with_leaves(make_call((5,), seed=18, device=device))
    with pytest.raises(exception, match=sentence):
        strange(kind, call)


@pytest.mark.parametrize(
    ("change", "exception", "sentence"),
    [
        ({"q": lambda x: x.float()}, TypeError, "q has dtype float32; it must be bfloat16"),
        ({"k": lambda x: x[:, :3]}, ValueError, "k has shape [1, 3, 1, 128]; it must be"),
        ({"v": lambda x: x[0]}, ValueError, "v has 3 dimensions; it must have 4"),
        ({"A_log": lambda x: x.double()}, TypeError, "A_log has dtype float64; it must be float32"),
        ({"lower_bound": -6.0}, ValueError, "lower_bound is -6; it must be in [-5, 0]"),
        ({"A_log": 1.0}, TypeError, "A_log is of type float; it must be a PyTorch tensor"),
        ({"allow_neg_eigval": True, "use_beta_sigmoid_in_kernel": False}, ValueError, "allow_neg_eigval"),
        ({"initial_state": lambda x: x.bfloat16()}, TypeError, "initial_state is of torch.bfloat16; it must"),
        ({"initial_state": lambda x: x[:0]}, ValueError, "initial_state has shape [0, 2, 128, 128]; it"),
        ({"cu_seqlens": lambda x: x + 1}, ValueError, "cu_seqlens"),
        ({"disable_recompute": "yes"}, TypeError, "disable_recompute is of type str; it must be"),
        ({"kernel": "no such"}, ValueError, "no such"),
        ({"batch_invariant": 1}, TypeError, "batch_invariant is of type int; it must be True or False"),
        ({"workspace_limit": -1}, ValueError, "workspace_limit is -1; it must be 0 (half of the bytes of"),
    ],
)  # fmt: skip
def test_wrong_arguments(device, change, exception, sentence):
    call, _ = with_leaves(make_call((8,), seed=19, device=device))
    for name, x in change.items():
        call[name] = x(call[name]) if callable(x) else x
    with pytest.raises(exception) as raised:
        flash_kda.chunk_kda(**call)
    assert sentence in str(raised.value)


def test_why_there_are_no_gradients():
    """What an adapter asks before it takes a call that needs gradients."""
    from flash_kda import _lib, _shapes

    softplus = (("lower_bound", None), ("state_v_first", False), ("allow_neg_eigval", True))
    activated = (("use_gate_in_kernel", False), ("use_qk_l2norm_in_kernel", False))
    for options in ((), softplus, activated):
        assert _shapes.why_no_gradients((_lib.CPU, 0), 2, options) == ""
    assert "kernel" in _shapes.why_no_gradients((_lib.CPU, 0), 2, (("kernel", "no such"),))
    if len(flash_kda.devices()) == 1:
        assert _shapes.why_no_gradients((_lib.CUDA, 0), 2, ()) != ""


GPU_CALLS = {
    "sequences": ({"lengths": (5, 33, 0, 17)}, {}),
    "saved states of sequences": ({"lengths": (5, 33, 0, 17)}, {"disable_recompute": True}),
    "stretches": ({"lengths": (1300,), "rows": 2, "HV": 1}, {"workspace_limit": 2**22}),
    "saved states": (
        {"lengths": (1300,), "rows": 2, "HV": 1},
        {"workspace_limit": 2**22, "disable_recompute": True},
    ),
}


@pytest.mark.parametrize(("problem", "more"), GPU_CALLS.values(), ids=GPU_CALLS)
def test_on_a_gpu(cuda, problem, more):
    call = make_call(**problem, seed=20, device=cuda)
    dout, dstate = upstream(call)
    got = found(call, dout, dstate, **more)
    on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    want = by_reference(on_cpu, dout.cpu(), dstate.cpu())
    del want["A_log"]  # its terms cancel: test_backward.c holds it to their sizes
    hold(got, want)
    same(got, found(call, dout, dstate, **more))


def test_what_is_kept_on_a_gpu(cuda):
    call, _ = with_leaves(make_call((1300,), HV=2, seed=21, device=cuda, rows=2))
    assert bytes_kept(call) == 0
    kept = bytes_kept(call, disable_recompute=True)
    assert kept == flash_kda.get_saved_size(2600, 1, 2, HV=2, device=cuda)
    saves = flash_kda.devices()[1].kernel == "hopper"
    assert kept == (2 * 2 * 2 * 65536 if saves else 0)  # two states of two heads in two rows


def learn(text, steps, rows=4, length=64, **options):
    """The loss of each step, in bits a byte."""
    torch.manual_seed(0)
    model = LanguageModel(**options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    starts = torch.randint(len(text) - length, (steps, rows), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(steps):
        batch = torch.stack([text[i : i + length] for i in starts[step].tolist()])
        loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_language_model_learns(device):
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    losses = learn(text, 20)
    assert losses[0] > 7.5  # of 8, as nothing is known
    assert sum(losses[-4:]) / 4 < 4.5
    assert losses == learn(text, 20, disable_recompute=True)


# Several processes.


def batch_of(rank, T=24, width=32):
    return torch.randn(2, T, width, generator=torch.Generator().manual_seed(rank))


def loss_of(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x).float().square().mean()


def model_of(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(Layer(), Layer(disable_recompute=True))


def train_in_a_process(rank, kind, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = model_of()
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        loss_of(wrapped, batch_of(rank)).backward()
        found = {n: p.grad for n, p in model.named_parameters()}
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss_of(model, batch_of(rank)).backward()
        found = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    if rank == 0:
        torch.save(found, f"{folder}/{kind}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes(kind, tmp_path):
    """The gradients are the mean of those of both processes' batches."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    if kind == "fsdp":
        pytest.importorskip("torch.distributed.fsdp", reason="this PyTorch has no FSDP")
        if not hasattr(torch.distributed.fsdp, "fully_shard"):
            pytest.skip("this PyTorch has no fully_shard there")
    torch.multiprocessing.spawn(train_in_a_process, (kind, str(tmp_path)), nprocs=2)
    got = torch.load(tmp_path / f"{kind}.pt")
    model = model_of()
    for rank in range(2):
        (loss_of(model, batch_of(rank)) / 2).backward()
    for name, p in model.named_parameters():
        assert p.grad.any(), name
        assert error(got[name], p.grad.double()) <= 1e-5, name
