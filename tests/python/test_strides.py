"""Tensors as layers and engines hold them, which C takes without a copy, and those that are copied."""

import numpy as np
import pytest

import flash_kda
from problems import (
    copied,
    hold_any,
    hold_to,
    make,
    make_any,
    run_any,
    to_numpy,
    to_torch,
    truth,
    truth_of_any,
)

torch = pytest.importorskip("torch")
ROWS = ("q", "k", "v", "g", "out")


def fused(tensors):
    """q, k and v as slices of one projection [T, 3 H D], g of another one, beta as columns of a third, out as
    part of the layer's buffer, and states that share pages with other states."""
    B, T, H, D = tensors["q"].shape
    HV = tensors["v"].shape[2]
    buffer = torch.cat([tensors[n].reshape(B, T, -1) for n in ("q", "k", "v")], -1)
    new = dict(tensors)
    widths = (H * D, H * D, HV * D)
    for name, part in zip(("q", "k", "v"), buffer.split(widths, -1)):
        new[name] = part.unflatten(-1, (-1, D))
    g = tensors["g"]
    new["g"] = torch.cat([g.reshape(B, T, -1), g.new_zeros(B, T, 64)], -1)[..., : HV * D].unflatten(
        -1, (HV, D)
    )
    new["beta"] = torch.cat([tensors["beta"].new_zeros(B, T, 3), tensors["beta"]], -1)[..., 3:]
    whole = tensors["out"].new_full((B, T, HV * D + 128), 5.0)
    new["out"] = whole[..., 64:-64].unflatten(-1, (HV, D))
    for name in ("initial_state", "final_state", "checkpoint_states"):
        if tensors.get(name) is not None:
            pages = tensors[name].new_full((len(tensors[name]), HV * D * D + 32), 5.0)
            new[name] = torch.as_strided(pages, tensors[name].shape, (pages.shape[1], D * D, D, 1), 16)
            new[name].copy_(tensors[name])
    assert not any(new[n].is_contiguous() for n in (*ROWS, "beta") if T > 1)
    return new, whole


@pytest.fixture
def copies(monkeypatch):
    """Whether a call copied a tensor: the names of the functions of PyTorch that ran in _layout."""
    from flash_kda import _layout

    seen = []
    for function in ("readable", "for_c"):
        plain = getattr(_layout, function)

        def spy(*args, plain=plain, function=function):
            result = plain(*args)
            if function == "for_c":
                seen.extend(name for name, old, new in zip(args[0], args[1], result[0]) if new is not old)
            return result

        monkeypatch.setattr(_layout, function, spy)
    return seen


OPTIONS = {
    "plain": {},
    "grouped heads": {"H": 2, "HV": 4},
    "fp32": {"wide": True, "gate": "softplus"},
    "pool and checkpoints": {"pool": True, "checkpoints": "every", "k_first": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_slices_are_taken_as_they_are(device, options, mode, copies):
    a = make_any(**{"H": 2, "HV": 2, **OPTIONS[options]}, seed=1)
    plain = run_any(a, "torch", device=device)
    tensors, whole = fused(to_torch(a, device))
    call = flash_kda.fwd
    if mode != "eager":
        torch.compiler.reset()
        call = torch.compile(lambda **t: flash_kda.fwd(**t), fullgraph=True, backend=mode)
    copies.clear()
    with torch.no_grad():
        for _ in range(2):
            if a.get("state_indices") is not None:
                tensors["final_state"].copy_(torch.from_numpy(a["final_state"]))
            call(**tensors)
    assert not copies, "C takes these tensors"
    after = to_numpy({n: x.contiguous() if isinstance(x, torch.Tensor) else x for n, x in tensors.items()})
    hold_any(a, after, truth_of_any(a), device)
    for name in ("out", "final_state", "checkpoint_states"):
        if name in plain:
            assert after[name].tobytes() == plain[name].tobytes(), (
                f"{name} has other bits than contiguous tensors"
            )
    assert (whole[..., :64] == 5).all()
    assert (whole[..., -64:] == 5).all()


def test_strides_of_numpy_arrays():
    a = make_any(H=2, HV=2, checkpoints="every", seed=2)
    plain = run_any(a)
    b = copied(a)
    T = a["v"].shape[1]
    buffer = np.concatenate([a[n].reshape(1, T, -1) for n in ("q", "k", "v", "out")], -1)
    for i, name in enumerate(("q", "k", "v", "out")):
        b[name] = buffer[..., 256 * i : 256 * (i + 1)].reshape(1, T, 2, 128)
        assert np.shares_memory(b[name], buffer)
    b["beta"] = np.stack([a["beta"]] * 3, -1)[..., 1]
    b["g"] = np.ascontiguousarray(a["g"].swapaxes(1, 2)).swapaxes(1, 2)
    for _ in range(2):
        b["out"][...] = np.nan
        flash_kda.fwd(**b)
        for name in ("out", "final_state", "checkpoint_states"):
            assert np.ascontiguousarray(b[name]).tobytes() == plain[name].tobytes()


def test_heads_first_and_tokens_backwards():
    """Strides may be any, negative ones of NumPy too."""
    a = make(T=20, H=3, B=2, initial=np.float32)
    expected = truth(a)
    for name in ("q", "k", "v", "g", "out"):
        a[name] = np.ascontiguousarray(a[name].transpose(2, 1, 0, 3)[::-1]).transpose(2, 1, 0, 3)[:, :, ::-1]
    flash_kda.fwd(**a)
    hold_to(
        {n: np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x for n, x in a.items()},
        expected,
        "cpu",
    )


@pytest.mark.parametrize("name", ["q", "g", "out", "initial_state", "final_state", "dt_bias", "A_log"])
def test_what_is_copied(device, name, copies):
    """Channels with gaps, states with gaps, parameters with gaps."""
    plain = to_torch(make(T=20, initial=np.float32), device)
    tensors = dict(plain)
    x = plain[name]
    tensors[name] = torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]
    expected = truth(to_numpy(plain))
    flash_kda.fwd(**tensors)
    assert copies == [name]
    hold_to(
        to_numpy({n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in tensors.items()}),
        expected,
        device,
    )


@pytest.mark.parametrize("name", ["q", "out", "final_state", "dt_bias"])
@pytest.mark.parametrize("guards", ["PyTorch's guards", "guards in Python"])
def test_an_address_that_is_not_aligned_is_copied(device, name, guards, monkeypatch):
    """Also where a prepared call fits the tensors: guards do not compare addresses."""
    from flash_kda import _call, _torch

    if guards == "guards in Python":
        monkeypatch.setattr(_torch, "_Guards", _torch._PythonGuards)
    monkeypatch.setattr(_torch, "_calls", _call.PreparedCalls())
    plain = to_torch(make(T=20, initial=np.float32), device)
    expected = truth(to_numpy(plain))
    flash_kda.fwd(**plain)
    x = plain[name]
    memory = torch.cat([x.new_zeros(1), x.reshape(-1), x.new_full((1,), 3.0)])
    tensors = {**plain, name: memory[1:-1].view(x.shape)}
    assert tensors[name].data_ptr() % 16
    for other in ("out", "final_state"):
        tensors[other].fill_(float("nan"))
    for _ in range(2):
        flash_kda.fwd(**tensors)
        hold_to(to_numpy(tensors), expected, device)
    assert memory[0] == 0
    assert memory[-1] == 3


# Strides of [1, 20, 2, 128], of [1, 20, 2] for beta, of [3, 2, 128, 128] for states, and whether they are
# copied: on the CPU, on a GPU.
STRIDES = [
    ("q", torch.bfloat16, (15360, 768, 128, 1), False, False),
    ("q", torch.bfloat16, (5280, 264, 132, 1), False, True),
    ("q", torch.bfloat16, (1, 136, 2720, 1), False, False),  # the stride of one batch row means nothing
    ("q", torch.bfloat16, (10240, 512, 256, 2), True, True),
    ("q", torch.bfloat16, (1 << 40, 1 << 32, 128, 1), False, True),
    ("k", torch.bfloat16, (0, 0, 0, 1), False, False),
    ("g", torch.float32, (5280, 264, 132, 1), False, False),
    ("g", torch.float32, (5240, 262, 130, 1), False, True),
    ("out", torch.bfloat16, (5280, 264, 132, 1), False, True),
    ("beta", torch.bfloat16, (101, 5, 2), False, False),
    ("beta", torch.float32, (0, 7, 3), False, False),
    ("initial_state", torch.float32, (32772, 16384, 128, 1), False, False),
    ("initial_state", torch.float32, (32770, 16384, 128, 1), False, True),
    ("initial_state", torch.float32, (1 << 40, 16384, 128, 1), False, False),
    ("final_state", torch.bfloat16, (32776, 16384, 128, 1), False, False),
    ("final_state", torch.bfloat16, (32768, 16384, 1, 128), True, True),
]


@pytest.mark.parametrize(("name", "dtype", "strides", "on_cpu", "on_gpu"), STRIDES)
def test_which_strides_are_copied(name, dtype, strides, on_cpu, on_gpu):
    """Without the memory, so that a GPU's rules are tested on every machine."""
    from flash_kda import _layout

    shape = (1, 20, 2) if name == "beta" else (3, 2, 128, 128) if "state" in name else (1, 20, 2, 128)
    t = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    assert _layout.must_copy((name,), [t], False) == on_cpu
    assert _layout.must_copy((name,), [t], True) == on_gpu
    if "state" in name:
        indices = torch.empty(3, dtype=torch.int32)
        assert not _layout.must_copy((name, "state_indices"), [t, indices], True), "a pool is never copied"


def test_strides_that_a_gpu_does_not_take(cuda, copies):
    """A multiple of 16 bytes is taken, any other stride is copied."""
    plain = to_torch(make(T=20, H=1), cuda)
    expected = truth(to_numpy(plain))
    for gap, copied_names in ((8, []), (4, ["q"])):
        copies.clear()
        wide = torch.cat([plain["q"], plain["q"].new_zeros(1, 20, 1, gap)], -1)
        flash_kda.fwd(**{**plain, "q": wide[..., :128]})
        assert copies == copied_names
        hold_to(to_numpy(plain), expected, cuda)


def test_other_strides_find_other_prepared_calls():
    """Two layouts of one shape take turns."""
    a = make_any(H=2, HV=2, seed=3)
    want = run_any(a)
    layouts = [to_torch(a, "cpu"), fused(to_torch(a, "cpu"))[0]]
    with torch.no_grad():
        for _ in range(3):
            for tensors in layouts:
                tensors["out"].fill_(float("nan"))
                flash_kda.fwd(**tensors)
                assert torch.equal(tensors["out"], to_torch(want, "cpu")["out"])


def test_wrong_layouts_get_their_sentence():
    a = make_any(pool=True, checkpoints="every", seed=4)
    for name, sentence in (
        ("final_state", "final_state has strides"),
        ("initial_state", "initial_state has strides"),
        ("checkpoint_states", "checkpoint_states has strides"),
    ):
        tensors = to_torch(a, "cpu")
        tensors[name] = tensors[name].transpose(1, 2)
        with pytest.raises(ValueError, match=r"has shape|has strides"):
            flash_kda.fwd(**tensors)
        tensors[name] = to_torch(a, "cpu")[name].mT
        with pytest.raises(ValueError, match=sentence):
            flash_kda.fwd(**tensors)
        assert tensors["out"].isnan().all()
    tensors = to_torch(a, "cpu")
    tensors["out"] = tensors["v"]
    with pytest.raises(ValueError, match="out overlaps v; it must have memory of its own"):
        flash_kda.fwd(**tensors)
