"""PyTorch tensors that are no plain memory, and calls under transforms: each is refused with a sentence, or
computed right, and never misread."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flash_kda
from problems import hold_to, make, to_numpy, to_torch, truth

torch = pytest.importorskip("torch")
forward_ad = torch.autograd.forward_ad


@pytest.fixture(params=["no call before", "after a right call", "after a right call, guards in Python"])
def tensors(request, monkeypatch):
    """Right arguments, and for some tests a prepared call that fits them."""
    from flash_kda import _call, _torch

    monkeypatch.setattr(_torch, "_calls", _call.PreparedCalls())
    if "guards in Python" in request.param:
        monkeypatch.setattr(_torch, "_Guards", _torch._PythonGuards)
    tensors = to_torch(make(T=6, initial=np.float32), "cpu")
    if "after" in request.param:
        flash_kda.fwd(**tensors)
        for name in ("out", "final_state"):
            tensors[name].fill_(float("nan"))
    return tensors


@pytest.fixture(params=["fwd", "the operator"])
def call(request):
    return flash_kda.fwd if request.param == "fwd" else torch.ops.flash_kda.fwd


def untouched(tensors):
    return all(bool(tensors[name].isnan().all()) for name in ("out", "final_state"))


@pytest.mark.parametrize("name", ["q", "A_log", "initial_state", "out"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode(tensors, call, name, mode):
    with forward_ad.dual_level(), mode():
        dual = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        with pytest.raises(
            RuntimeError, match=r"no forward-mode derivative.* pass its primal, which unpack_dual"
        ):
            call(**{**tensors, name: dual})
        assert untouched(tensors)
        call(**{**tensors, name: forward_ad.unpack_dual(dual).primal})
    assert not untouched(tensors)


@pytest.mark.parametrize("name", ["A_log", "q", "out", "final_state"])
def test_lazy_negation(tensors, name):
    sentence = rf"{name} is a view that is negated lazily .* its resolve_neg\(\)"
    with pytest.raises(TypeError, match=sentence):
        flash_kda.fwd(**{**tensors, name: torch._neg_view(tensors[name])})
    assert untouched(tensors)


def test_lazy_negation_through_the_operator():
    """PyTorch resolves the view before the operator sees it, so the result is that of the negated values."""
    a = make(T=6)
    tensors = to_torch(a, "cpu")
    a["v"] = -a["v"]
    torch.ops.flash_kda.fwd(**{**tensors, "v": torch._neg_view(tensors["v"])})
    hold_to(to_numpy(tensors), truth(a), "cpu")


def test_lazy_conjugation(tensors):
    numbers = torch.zeros(2, 128, dtype=torch.complex64)
    with pytest.raises(TypeError, match="dt_bias is a view that is conjugated lazily"):
        flash_kda.fwd(**{**tensors, "dt_bias": numbers.conj()})
    imaginary = numbers.conj().imag.unsqueeze(0)[0]
    assert imaginary.is_neg()
    with pytest.raises(TypeError, match="dt_bias is a view that is negated lazily"):
        flash_kda.fwd(**{**tensors, "dt_bias": imaginary})
    assert untouched(tensors)


def test_vmap(tensors, call):
    many = tensors["q"][None].repeat(3, 1, 1, 1, 1)
    with pytest.raises(TypeError, match=r"is a batched tensor of torch.vmap.* call it outside of torch.vmap"):
        torch.vmap(lambda q: call(**{**tensors, "q": q}))(many)
    assert untouched(tensors)


@pytest.mark.parametrize("transform", ["grad", "jvp", "functionalize"])
def test_function_transforms(tensors, transform):
    def work(q):
        flash_kda.fwd(**{**tensors, "q": q})
        return q.float().sum()

    if transform == "jvp":
        run, sentence = lambda q: torch.func.jvp(work, (q,), (q,)), "q is a tensor of a function transform"
    elif transform == "grad":
        run, sentence = torch.func.grad(work), "computes no gradients"
    else:
        run, sentence = torch.func.functionalize(work), "q is a tensor of a function transform"
    with pytest.raises((RuntimeError, TypeError), match=sentence):
        run(tensors["q"])
    assert untouched(tensors)


# torch.jit.trace warns that it is deprecated.
@pytest.mark.filterwarnings("ignore")
def test_jit_trace(tensors, call):
    """The trace records the operator, and computes with other values."""

    def work(q):
        out = torch.empty_like(q)
        call(**{**tensors, "q": q, "out": out})
        return out

    traced = torch.jit.trace(work, (tensors["q"],))
    assert "flash_kda::fwd" in str(traced.graph)
    other = torch.randn(tensors["q"].shape).bfloat16()
    assert torch.equal(traced(other), work(other))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_distributed_tensors(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    tensor_module = pytest.importorskip("torch.distributed.tensor")
    if not hasattr(tensor_module, "distribute_tensor"):  # PyTorch 2.4
        tensor_module = pytest.importorskip("torch.distributed._tensor")
    tensors = to_torch(make(T=4), "cpu")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shared = {
            n: tensor_module.distribute_tensor(x, mesh, [tensor_module.Replicate()])
            if isinstance(x, torch.Tensor)
            else x
            for n, x in tensors.items()
        }
        for wrong, name in ((shared, "q"), ({**tensors, "k": shared["k"]}, "k")):
            with pytest.raises(TypeError, match=rf"{name} is a DTensor, .* tensors that to_local\(\) gives"):
                flash_kda.fwd(**wrong)
        assert untouched(tensors)
        flash_kda.fwd(**{n: x.to_local() if isinstance(x, torch.Tensor) else x for n, x in shared.items()})
    finally:
        distributed.destroy_process_group()


def first_tokens(x):
    return x[:, :3]


# What to change, and what the call then raises in eager mode.
WRONG = {
    "shape": ("k", first_tokens, ValueError, r"k has shape \[1, 3, 2, 128\]; it must be"),
    "rank": ("beta", lambda x: x[0], ValueError, "beta has 2 dimensions; it must have 3"),
    "dtype": ("v", lambda x: x.float(), TypeError, "v has dtype float32; it must be bfloat16"),
    "state": ("final_state", lambda x: x[:, :1], ValueError, "final_state has shape .* it must be"),
    "state dtype": ("initial_state", lambda x: x.bfloat16(), TypeError, "final_state has dtype float32 and"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kind", ["eager", "fake", "meta"])
def test_wrong_shapes_without_memory(tensors, case, kind):
    """Fake tensors, and meta tensors that the operator gets, are refused with the sentence of eager mode."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    name, change, exception, sentence = WRONG[case]
    call = torch.ops.flash_kda.fwd if kind == "meta" else flash_kda.fwd
    mode = FakeTensorMode()
    convert = {"eager": lambda x: x, "fake": mode.from_tensor, "meta": lambda x: x.to("meta")}[kind]
    strange = {n: convert(x) if isinstance(x, torch.Tensor) else x for n, x in tensors.items()}
    if kind != "eager":
        call(**strange)
        assert untouched(tensors)
    with pytest.raises(exception, match=sentence):
        call(**{**strange, name: change(strange[name])})


def test_fake_tensors_of_two_devices():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fakes = {
            n: torch.empty(x.shape, dtype=x.dtype, device="cpu" if n == "k" else "cuda")
            if isinstance(x, torch.Tensor)
            else x
            for n, x in to_torch(make(T=4), "cpu").items()
        }
        with pytest.raises(
            ValueError, match="k is on cpu and q on cuda:0; all tensors must be on one device"
        ):
            flash_kda.fwd(**fakes)


@pytest.mark.parametrize("dynamic", [False, True])
def test_wrong_shapes_under_compile(dynamic):
    torch.compiler.reset()
    tensors = to_torch(make(T=6), "cpu")
    compiled = torch.compile(
        lambda **t: flash_kda.fwd(**t), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    with torch.no_grad(), pytest.raises(Exception, match=r"k has shape \[1, 3, 2, 128\]; it must be"):
        compiled(**{**tensors, "k": tensors["k"][:, :3]})
    assert tensors["out"].isnan().all()
    with torch.no_grad():
        compiled(**tensors)
    assert not tensors["out"].isnan().any()


def python(code):
    folders = [str(Path(flash_kda.__path__[0]).parent), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


USE = """
import sys, torch
def use(fwd):
    from problems import make, to_torch
    tensors = to_torch(make(T=4), "cpu")
    fwd(**tensors)
    assert not tensors["out"].isnan().any()
def operator(package):
    return getattr(torch.ops.flash_kda, package._torch_layer.OPERATORS["fwd"])
"""


@pytest.mark.slow
def test_a_second_import():
    """The modules are dropped and imported again, as a notebook may do."""
    program = """
import flash_kda
use(flash_kda.fwd)
for name in [n for n in sys.modules if n.partition(".")[0] == "flash_kda"]:
    del sys.modules[name]
import flash_kda as second
assert second is not flash_kda
use(flash_kda.fwd), use(second.fwd), use(operator(second))
print(second._torch_layer.OPERATORS["fwd"])
"""
    assert python(USE + program) == "fwd"


def test_another_library_has_the_operator():
    """The operator then has a number in its name."""
    program = """
torch.library.define("flash_kda::fwd", "(Tensor q, Tensor k) -> Tensor")
import flash_kda
use(flash_kda.fwd), use(operator(flash_kda))
print(flash_kda._torch_layer.OPERATORS["fwd"])
"""
    assert python(USE + program) == "fwd_2"
