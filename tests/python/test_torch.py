"""fwd on PyTorch tensors: eager calls, the operator, compilers."""

import contextlib
import functools

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from problems import ARGUMENTS, hold_to, in_threads, make, to_numpy, to_torch, truth
from torch_calls import COMPILERS, call_behind_other_work, captured

torch = pytest.importorskip("torch")


def check(a, device, call=flash_kda.fwd):
    """Calls `call` on the problem's arguments as tensors, and holds what it wrote to the truth."""
    expected = truth(a)
    tensors = to_torch(a, device)
    with torch.no_grad():
        assert call(**tensors) is None
    hold_to(to_numpy(tensors), expected, device)
    return tensors


@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 300])
@pytest.mark.parametrize("H", [1, 3])
def test_lengths(device, T, H):
    check(make(T=T, H=H, B=2, initial=np.float32), device)


@pytest.mark.parametrize("initial", [None, np.float32, bfloat16])
@pytest.mark.parametrize("final", [None, np.float32, bfloat16])
def test_states(device, initial, final):
    if initial and final and initial != final:
        pytest.skip("both states must have one dtype")
    a = make(T=40, B=3, initial=initial, final=final)
    tensors = check(a, device)
    if final is bfloat16:
        wide = {
            **tensors,
            "out": torch.empty_like(tensors["out"]),
            "final_state": tensors["final_state"].float(),
        }
        if initial is not None:
            wide["initial_state"] = tensors["initial_state"].float()
        flash_kda.fwd(**wide)
        assert torch.equal(tensors["final_state"], wide["final_state"].bfloat16())


@pytest.mark.parametrize("cu_dtype", [np.int64, np.int32])
def test_sequences(device, cu_dtype):
    check(make(lengths=[5, 0, 64, 1, 130, 0], initial=np.float32, cu_dtype=cu_dtype), device)


def test_no_tokens(device):
    tensors = to_torch(make(T=0, B=2, initial=np.float32), device)
    flash_kda.fwd(**tensors)
    assert torch.equal(tensors["final_state"], tensors["initial_state"])


def test_state_in_place(device):
    a = make(T=33, initial=np.float32)
    expected = truth(a)
    tensors = to_torch(a, device)
    tensors["final_state"] = tensors["initial_state"]
    flash_kda.fwd(**tensors)
    hold_to(to_numpy(tensors), expected, device)


def test_positions_of_arguments(device):
    check(
        make(lengths=[20, 3], initial=np.float32),
        device,
        lambda **t: flash_kda.fwd(*(t[n] for n in ARGUMENTS)),
    )


def test_reference_of_tensors(device):
    a = make(T=9)
    out, state = truth(a)
    t_out, t_state = truth(to_torch(a, device))
    assert t_out.dtype == t_state.dtype == torch.float64
    np.testing.assert_array_equal(t_out.numpy(), out)
    np.testing.assert_array_equal(t_state.numpy(), state)


def test_inference_mode(device):
    with torch.inference_mode():
        check(make(), device)


def test_parameters_of_a_layer_cast_as_a_whole(device):
    """A_log and dt_bias may have 16 bits: the call converts them to fp32."""
    a = make()
    for name in ("A_log", "dt_bias"):
        a[name] = a[name].astype(bfloat16).astype(np.float32)
    for _ in range(2):
        check(
            a,
            device,
            lambda **t: flash_kda.fwd(
                **{**t, "A_log": t["A_log"].bfloat16(), "dt_bias": t["dt_bias"].bfloat16()}
            ),
        )


def test_parameters_are_tensors(device):
    check(
        make(),
        device,
        lambda **t: flash_kda.fwd(
            **{**t, "A_log": torch.nn.Parameter(t["A_log"]), "dt_bias": torch.nn.Parameter(t["dt_bias"])}
        ),
    )


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"])
def test_gradients_are_refused(device, name):
    tensors = to_torch(make(T=4, initial=np.float32), device)
    tensors[name].requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"computes no gradients.*torch.no_grad\(\) or torch.inference_mode\(\)"
    ):
        flash_kda.fwd(**tensors)
    assert tensors["out"].isnan().all()
    with torch.no_grad():
        flash_kda.fwd(**tensors)
    assert not tensors["out"].isnan().any()


def test_autograd_notices_what_was_written(device):
    """A tensor saved for a backward pass and then written by fwd must not be used unnoticed."""
    tensors = to_torch(make(T=4), device)
    weight = torch.ones((), device=device, requires_grad=True)
    for name in ("out", "final_state"):
        loss = (weight * tensors[name]).sum()
        flash_kda.fwd(**tensors)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.fixture(params=["PyTorch's guards", "guards in Python"])
def prepared(request, device, monkeypatch):
    """Tensors for which a right call has left a prepared call. What the right call wrote is NaN again. Guards
    tell whether a prepared call fits."""
    from flash_kda import _call, _torch

    if request.param == "guards in Python":
        monkeypatch.setattr(_torch, "_Guards", _torch._PythonGuards)
    elif _torch._Guards is _torch._PythonGuards:
        pytest.skip("this PyTorch has no guards that can be used")
    monkeypatch.setattr(_torch, "_calls", _call.PreparedCalls())
    tensors = to_torch(make(T=6, B=2, initial=np.float32), device)
    flash_kda.fwd(**tensors)
    call = _torch._calls.latest
    flash_kda.fwd(**tensors)
    assert call is _torch._calls.latest
    assert call.fits(*(tensors[name] for name in EVERY))
    for name in ("out", "final_state"):
        tensors[name].fill_(float("nan"))
    return tensors


def replaced(x, data):
    """x, still the object that it was, with the memory, shape, strides and dtype of `data`."""
    x.data = data
    return x


EVERY = ("q", "k", "v", "g", "beta", "out", "A_log", "dt_bias", "initial_state", "final_state")
# For each change: the function that makes it, and what the call then raises. Where PyTorch can change a
# tensor in place, the tensor stays the object that it was.
CHANGES = {
    "shape": (lambda x: x.unsqueeze_(0), ValueError, "has . dimensions; it must have"),
    "shape of the same rank": (
        lambda x: replaced(x, x[..., :-1].clone()), ValueError, "has (shape|K|V|H|N) .*must",
    ),
    "dtype": (lambda x: replaced(x, x.double()), TypeError, "has dtype float64; it must be"),
    "device": (lambda x: x.to("meta"), ValueError, "is on meta"),
    "layout": (
        lambda x: x.to_sparse(), ValueError, "has the layout torch.sparse_coo; it must be a dense tensor",
    ),
    "requires_grad": (lambda x: x.requires_grad_(), RuntimeError, "computes no gradients"),
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_slips_past_a_prepared_call(prepared, name, change):
    if change == "shape" and name in ("A_log", "dt_bias"):
        pytest.skip("a dimension of size 1 more is right")
    changed, exception, sentence = CHANGES[change]
    tensors = {**prepared, name: changed(prepared[name])}
    with pytest.raises(exception, match=sentence):
        flash_kda.fwd(**tensors)
    written = [prepared[n] for n in ("out", "final_state") if n != name]
    assert all(x.isnan().all() for x in written)


@pytest.mark.parametrize("name", EVERY)
def test_a_prepared_call_is_for_contiguous_tensors(prepared, name):
    """A tensor that changes its strides in place is copied, and read or written right."""
    expected, device = truth(to_numpy(prepared)), prepared["q"].device.type
    x = prepared[name]
    replaced(x, torch.stack([x, torch.full_like(x, 7)], -1)[..., 0])
    flash_kda.fwd(**prepared)
    hold_to(
        to_numpy({n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in prepared.items()}),
        expected,
        device,
    )


@pytest.mark.parametrize("name", EVERY)
def test_a_prepared_call_follows_pointers(prepared, name):
    """All tensors get other values. The tensor called `name` gets other memory too, and stays the object it
    was."""
    a = make(T=6, B=2, initial=np.float32, seed=5)
    expected, device = truth(a), prepared["q"].device.type
    for n, x in to_torch(a, device).items():
        if isinstance(x, torch.Tensor):
            prepared[n].data = x if n == name else prepared[n].data.copy_(x)
    flash_kda.fwd(**prepared)
    hold_to(to_numpy(prepared), expected, device)


def test_a_prepared_call_is_for_plain_tensors(prepared):
    """Fake tensors look like the tensors they stand for, but have no memory to be read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in prepared.items()}
    for outside in (True, False):
        with torch.no_grad(), contextlib.nullcontext() if outside else mode:
            assert flash_kda.fwd(**fakes) is None
    with mode:
        flash_kda.fwd(**prepared)  # a mode sees plain tensors, too
    assert prepared["out"].isnan().all()


def test_prepared_calls_take_turns(prepared):
    """Shapes, dtypes and modes alternate, and each call finds the prepared call that fits it."""
    device = prepared["q"].device.type
    problems = [
        make(T=6, B=2, initial=np.float32),
        make(T=7),
        make(lengths=[3, 4], initial=bfloat16, final=bfloat16),
    ]
    expected = [truth(a) for a in problems]
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        for a, want in zip(problems, expected):
            tensors = to_torch(a, device)
            with mode():
                for _ in range(2):
                    flash_kda.fwd(**tensors)
            hold_to(to_numpy(tensors), want, device)


def test_devices_must_agree(cuda):
    tensors = to_torch(make(T=4), cuda)
    with pytest.raises(ValueError, match="k is on cpu and q on cuda:0; all tensors must be on one device"):
        flash_kda.fwd(**{**tensors, "k": tensors["k"].cpu()})
    flash_kda.fwd(**tensors)
    with pytest.raises(ValueError, match="k is on cpu and q on cuda:0; all tensors must be on one device"):
        flash_kda.fwd(**{**tensors, "k": tensors["k"].cpu()})


def test_tensors_without_memory():
    tensors = to_torch(make(T=4), "cpu")
    meta = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in tensors.items()}
    with pytest.raises(ValueError, match="q is on meta; tensors must be on the CPU or a CUDA device"):
        flash_kda.fwd(**meta)
    with pytest.raises(ValueError, match=r"A_log has the layout torch.sparse_coo; it must be a dense tensor"):
        flash_kda.fwd(**{**tensors, "A_log": tensors["A_log"].to_sparse()})


def test_current_stream(cuda):
    """The call queues its work on the current stream, behind what is queued there already."""
    a = make(T=64)
    expected = truth(a)
    tensors = call_behind_other_work(flash_kda.fwd, to_torch(a, cuda))
    hold_to(to_numpy(tensors), expected, cuda)


def test_streams_side_by_side(cuda):
    """Calls on several streams do not disturb each other, though each may fill the whole GPU with CTAs that
    wait for one another."""
    shapes = [
        {"T": 2048, "H": 12},
        {"T": 8192, "H": 4},
        {"T": 600, "H": 40},
        {"lengths": [1500, 40, 2000], "H": 8},
    ]
    alone, together = [], []
    for seed, shape in enumerate(shapes):
        tensors = to_torch(make(seed=seed, initial=np.float32, **shape), cuda)
        flash_kda.fwd(**tensors)
        alone.append({name: tensors[name].clone() for name in ("out", "final_state")})
        together.append(tensors)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in shapes]
    for _ in range(20):
        for tensors in together:
            tensors["out"].fill_(float("nan"))
            tensors["final_state"].fill_(float("nan"))
        torch.cuda.synchronize()
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(200_000)  # until all calls are queued
        for _ in range(3):
            for stream, tensors in zip(streams, together):
                with torch.cuda.stream(stream):
                    flash_kda.fwd(**tensors)
        torch.cuda.synchronize()
        for tensors, expected in zip(together, alone):
            for name, x in expected.items():
                assert torch.equal(tensors[name], x), name


def test_cuda_graph(cuda):
    a = make(lengths=[40, 60], initial=np.float32)
    expected = truth(a)
    tensors = to_torch(a, cuda)
    graph = captured(lambda: flash_kda.fwd(**tensors))
    for name in ("out", "final_state"):
        tensors[name].fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    hold_to(to_numpy(tensors), expected, cuda)


def test_second_gpu(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    a = make()
    expected = truth(a)
    tensors = to_torch(a, "cuda:1")  # while cuda:0 is current
    flash_kda.fwd(**tensors)
    hold_to(to_numpy(tensors), expected, cuda)


def test_calls_from_many_threads(device):
    def work(seed):
        a = make(T=50 + seed % 2, seed=seed)
        want, tensors = truth(a), to_torch(a, device)
        stream = torch.cuda.Stream() if device == "cuda" else None
        with torch.cuda.stream(stream):
            for _ in range(20):
                tensors["out"].fill_(float("nan"))
                flash_kda.fwd(**tensors)
            if stream:
                stream.synchronize()
        hold_to(to_numpy(tensors), want, device)

    in_threads(work, range(6))


# The operator and the compilers.


def test_operator(device):
    check(make(lengths=[20, 3], initial=np.float32), device, torch.ops.flash_kda.fwd)
    check(make(final=None), device, torch.ops.flash_kda.fwd)


def test_schema_of_the_operator():
    """The schema follows from flash_kda._options. Exported programs hold its names."""
    assert str(torch.ops.flash_kda.fwd.default._schema) == (
        "flash_kda::fwd(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor(a!) out, "
        "Tensor? A_log, Tensor? dt_bias, float? lower_bound, Tensor? initial_state=None, "
        "Tensor(b!)? final_state=None, Tensor? cu_seqlens=None, Tensor(c!)? nonfinite=None, "
        "str? kernel_name=None, int threads=0, bool batch_invariant=False, "
        'SymInt max_seqlen=0, str cut="auto", '
        "Tensor(d!)? workspace=None, Tensor? state_indices=None, Tensor? has_initial_state=None, "
        "Tensor(e!)? checkpoint_states=None, Tensor? checkpoint_offsets=None, "
        "Tensor? checkpoint_indices=None, Tensor? checkpoint_starts=None, "
        "int first_slot=0, int? checkpoint_every=None, bool use_gate_in_kernel=True, "
        "bool use_qk_l2norm_in_kernel=True, bool use_beta_sigmoid_in_kernel=True, "
        "bool allow_neg_eigval=False, bool state_v_first=True, Tensor(f!)? saved=None) -> ()"
    )


def test_options_of_the_operator(device):
    a = make(lengths=[20, 3])
    options = {
        "kernel_name": device if device == "cpu" else "portable",
        "threads": 1,
        "batch_invariant": True,
    }
    options |= {"max_seqlen": 20, "cut": "never"}
    check(a, device, lambda **t: torch.ops.flash_kda.fwd(**t, **options))
    tensors = to_torch(a, device)
    for wrong, sentence in (
        ({"cut": "often"}, "cut is 'often'; it must be"),
        ({"threads": -1}, "threads is -1; it must be"),
        ({"kernel_name": "fastest"}, 'kernel is "fastest"; it must be None or one of'),
    ):
        with pytest.raises(ValueError, match=sentence):
            torch.ops.flash_kda.fwd(**tensors, **wrong)
    assert tensors["out"].isnan().all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"final": None},
        {"initial": np.float32},
        {"lengths": [3, 9], "initial": np.float32},
        {"final": bfloat16, "initial": bfloat16},
    ],
)
def test_opcheck(device, options):
    tensors = to_torch(make(**{"T": 12, **options}), device)
    torch.library.opcheck(torch.ops.flash_kda.fwd.default, (), tensors)


def test_operator_refuses_gradients(device):
    tensors = to_torch(make(T=4), device)
    tensors["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="computes no gradients"):
        torch.ops.flash_kda.fwd(**tensors)
    assert tensors["out"].isnan().all()


def with_allocation(q, k, v, g, beta, A_log, dt_bias, initial_state=None, cu_seqlens=None):
    """fwd as a model uses it: with buffers allocated for the call, and arithmetic before and after it."""
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = torch.empty_like(v)
    state = torch.empty(N, q.shape[2], v.shape[3], q.shape[3], dtype=torch.float32, device=q.device)
    flash_kda.fwd(
        q, k, v * 2, g, beta, q.shape[-1] ** -0.5, out, A_log, dt_bias, -5.0, initial_state, state, cu_seqlens
    )
    return out + 1, state


INPUTS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens")


@pytest.mark.parametrize("backend", ["eager", *COMPILERS])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compile(device, backend, mode):
    torch.compiler.reset()
    compiled = torch.compile(with_allocation, fullgraph=True, backend=backend)
    with mode():
        for a in (make(T=40, initial=np.float32), make(lengths=[20, 0, 7])):
            tensors = to_torch(a, device)
            inputs = {n: tensors[n] for n in INPUTS if n in tensors}
            got, want = compiled(**inputs), with_allocation(**inputs)
            assert all(torch.equal(x, y) for x, y in zip(got, want))


@pytest.mark.parametrize("backend", COMPILERS)
def test_compile_writes_arguments(device, backend):
    torch.compiler.reset()
    a = make(T=20, initial=np.float32)
    check(a, device, torch.compile(lambda **t: flash_kda.fwd(**t), fullgraph=True, backend=backend))
    with_options = torch.compile(
        lambda **t: flash_kda.fwd(
            **t,
            kernel="cpu" if device == "cpu" else None,
            threads=2,
            batch_invariant=True,
            max_seqlen=1,
            cut="never",
        ),
        fullgraph=True,
        backend=backend,
    )
    check(a, device, with_options)
    # The state is updated in place: one tensor is both states.
    tensors = to_torch(a, device)
    state = tensors["initial_state"].clone()
    step = torch.compile(
        lambda state: flash_kda.fwd(**{**tensors, "initial_state": state, "final_state": state}),
        fullgraph=True,
        backend=backend,
    )
    flash_kda.fwd(**tensors)
    with torch.no_grad():
        step(state)
    assert torch.equal(state, tensors["final_state"])


@pytest.mark.parametrize("longest", [0, 1, 2500])
def test_longest_sequence(device, longest):
    """max_seqlen is a hint, right or wrong, with which a GPU may cut sequences."""
    a = make(lengths=[3, 2500, 0, 40], H=2, initial=np.float32)
    check(a, device, lambda **t: flash_kda.fwd(**t, max_seqlen=longest))


@pytest.mark.parametrize("cut", ["never", "always", "mixed"])
def test_cut(device, cut):
    """However sequences are cut, the result is within the bars."""
    a = make(lengths=[3, 2500, 0, 40], H=2, initial=np.float32)
    check(a, device, lambda **t: flash_kda.fwd(**t, cut=cut))


def test_compile_with_many_longest_sequences(device):
    """Values of max_seqlen share one compilation: torch.compile would give up after eight of them."""
    torch.compiler.reset()
    tensors = to_torch(make(lengths=[3, 20, 0]), device)
    step = torch.compile(
        lambda longest, **t: flash_kda.fwd(**t, max_seqlen=longest), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        for longest in range(2, 20):
            step(longest, **tensors)


def test_compile_dynamic_shapes(device):
    torch.compiler.reset()
    compiled = torch.compile(with_allocation, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for T in (5, 20, 33):
            tensors = to_torch(make(T=T, H=3), device)
            inputs = {n: tensors[n] for n in INPUTS if n in tensors}
            assert all(torch.equal(x, y) for x, y in zip(compiled(**inputs), with_allocation(**inputs)))


@pytest.mark.parametrize("strict", [True, False])
def test_export(device, strict):
    class Layer(torch.nn.Module):
        forward = staticmethod(with_allocation)

    tensors = to_torch(make(T=20, initial=np.float32), device)
    inputs = {n: tensors[n] for n in INPUTS if n in tensors}
    with torch.no_grad():
        program = torch.export.export(Layer(), (), inputs, strict=strict)
        assert "flash_kda.fwd" in program.graph_module.code
        got, want = program.module()(**inputs), with_allocation(**inputs)
    assert all(torch.equal(x, y) for x, y in zip(got, want))


def test_fake_tensors(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = to_torch(make(T=20), device)
    with FakeTensorMode() as mode, torch.no_grad():
        fakes = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in tensors.items()}
        out, _ = with_allocation(**{n: fakes[n] for n in INPUTS if n in fakes})
    assert out.shape == tensors["out"].shape


def test_make_fx_sees_the_operator(device):
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = to_torch(make(T=5), device)
    inputs = [tensors[n] for n in INPUTS if n in tensors]
    with torch.no_grad():
        graph = make_fx(functools.partial(with_allocation))(*inputs)
    assert "flash_kda.fwd" in graph.code
