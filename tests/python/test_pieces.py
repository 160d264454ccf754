"""affine_map, its reference and join_maps: arrays of all libraries, the operators, errors."""

import numpy as np
import pytest

import flash_kda
from problems import BETAS, GATES, make_any, to_torch

ARGUMENTS = ("k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound", "initial_state", "cu_seqlens")
OPTIONS = (
    "use_gate_in_kernel",
    "use_qk_l2norm_in_kernel",
    "use_beta_sigmoid_in_kernel",
    "allow_neg_eigval",
    "state_v_first",
)


def make_pieces(**options):
    """The arguments of affine_map, as NumPy arrays."""
    a = make_any(**{"lengths": (17, 0, 40), **options})
    return {name: a.get(name) for name in ARGUMENTS} | {name: a[name] for name in OPTIONS if name in a}


def matrices(a, count=2):
    """New arrays for the map and the state."""
    N, HV = len(a["cu_seqlens"]) - 1, a["v"].shape[2]
    return [np.full((N, HV, 128, 128), np.nan, np.float32) for _ in range(count)]


def error(got, want):
    got, want = np.asarray(got).astype(np.float64), np.asarray(want)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float(np.sqrt(((got - want) ** 2).sum() / (want**2).sum()))


def apply(state, affine, constant, v_first=True):
    return (state @ affine if v_first else affine @ state) + constant


@pytest.mark.parametrize(
    "options", [{"gate": gate} for gate in GATES] + [{"beta": b} for b in BETAS], ids=str
)
def test_against_the_reference(options):
    a = make_pieces(seed=1, **options)
    affine, state = matrices(a)
    assert flash_kda.affine_map(**a, map=affine, state=state) is None
    true_map, true_state = flash_kda.affine_map_reference(**a)
    assert error(affine, true_map) <= 5e-6
    assert error(state, true_state) <= 1e-5


@pytest.mark.parametrize("options", [{}, {"k_first": True}, {"H": 1, "HV": 3}, {"normalised": True}], ids=str)
def test_reference_against_the_recurrence(options):
    """The state after a piece is the state before it, times the map, plus the state that zeros become."""
    a = make_pieces(seed=2, **options)
    affine, state = flash_kda.affine_map_reference(**a)
    _, constant = flash_kda.affine_map_reference(**{**a, "initial_state": None})
    q = np.zeros_like(a["k"])
    _, want = flash_kda.reference(q=q, scale=1.0, **a)
    assert error(state, want) == 0.0
    v_first = a.get("state_v_first", True)
    assert error(apply(np.float64(a["initial_state"]), affine, constant, v_first), want) <= 1e-14
    assert (affine[1] == np.eye(128)).all()


def test_pieces_join_to_the_whole():
    whole = make_pieces(lengths=(80,), seed=3)
    a = {**whole, "cu_seqlens": np.array([0, 33, 33, 64, 80]), "initial_state": None}
    affine, state = matrices(a)
    flash_kda.affine_map(**a, map=affine, state=state)
    entering, final = matrices(a, 1)[0], np.full_like(whole["initial_state"], np.nan)
    flash_kda.join_maps(affine, state, whole["initial_state"], entering=entering, final_state=final)
    _, want = flash_kda.affine_map_reference(**whole)
    assert error(final, want) <= 5e-6
    assert (entering[0] == whole["initial_state"][0]).all()
    assert error(entering[2], entering[1].astype(np.float64)) <= 1e-7
    alone = np.full_like(final, np.nan)
    flash_kda.join_maps(affine, state, whole["initial_state"], final_state=alone, threads=1)
    assert (alone == final).all()


def test_join_backwards():
    rng = np.random.default_rng(4)
    maps, states = (rng.standard_normal((3, 2, 128, 128), dtype=np.float32) for _ in range(2))
    maps *= 0.1
    gradient = rng.standard_normal((1, 2, 128, 128), dtype=np.float32)
    for v_first in (True, False):
        want, wide = [gradient[0].astype(np.float64)], maps.astype(np.float64).swapaxes(-1, -2)
        for i in (2, 1, 0):
            want.append(apply(want[-1], wide[i], states[i], v_first))
        entering, final = np.empty_like(maps), np.empty_like(gradient)
        flash_kda.join_maps(
            maps,
            states,
            gradient,
            entering=entering,
            final_state=final,
            backwards=True,
            state_v_first=v_first,
        )
        assert error(final[0], want[3]) <= 1e-6
        assert error(entering, np.stack(want[2::-1])) <= 1e-6


def test_torch_and_numpy_give_equal_bits():
    torch = pytest.importorskip("torch")
    a = make_pieces(seed=5)
    affine, state = matrices(a)
    flash_kda.affine_map(**a, map=affine, state=state)
    t = to_torch(a, "cpu")
    results = [torch.full((3, *affine.shape[1:]), torch.nan) for _ in range(2)]
    flash_kda.affine_map(**t, map=results[0], state=results[1])
    assert (results[0].numpy() == affine).all()
    assert (results[1].numpy() == state).all()
    both = torch.stack([results[0], results[1]], 1)  # maps and states take turns, as ranks send them
    final, again = torch.empty(1, *affine.shape[1:]), np.empty((1, *affine.shape[1:]), np.float32)
    flash_kda.join_maps(both[:, 0], both[:, 1], final_state=final)
    flash_kda.join_maps(affine, state, final_state=again)
    assert (final.numpy() == again).all()
    wide = flash_kda.affine_map_reference(**t)
    assert all(x.dtype == torch.float64 for x in wide)
    assert all((x.numpy() == y).all() for x, y in zip(wide, flash_kda.affine_map_reference(**a)))


def test_tensors_that_are_no_plain_ones_take_the_operators():
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    t = to_torch(make_pieces(seed=6), "cpu")
    affine, state, final = (
        torch.empty(3, 2, 128, 128),
        torch.empty(3, 2, 128, 128),
        torch.empty(1, 2, 128, 128),
    )
    flash_kda.affine_map(**t, map=affine, state=state)
    flash_kda.join_maps(affine, state, final_state=final)
    again, other, last = torch.empty_like(affine), torch.empty_like(state), torch.empty_like(final)
    with Watch():
        flash_kda.affine_map(**t, map=again, state=other)
        flash_kda.join_maps(again, other, final_state=last)
    assert seen == ["flash_kda.affine_map.default", "flash_kda.join_maps.default"]
    assert torch.equal(again, affine)
    assert torch.equal(last, final)


def test_schemas_of_the_operators():
    """Exported programs hold positions, so new arguments come last."""
    torch = pytest.importorskip("torch")
    assert str(torch.ops.flash_kda.affine_map.default._schema) == (
        "flash_kda::affine_map(Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
        "float? lower_bound, Tensor? initial_state=None, Tensor? cu_seqlens=None, Tensor(a!)? map=None, "
        "Tensor(b!)? state=None, Tensor(c!)? workspace=None, str? kernel_name=None, int threads=0, "
        "bool use_gate_in_kernel=True, bool use_qk_l2norm_in_kernel=True, "
        "bool use_beta_sigmoid_in_kernel=True, bool allow_neg_eigval=False, bool state_v_first=True) -> ()"
    )
    assert str(torch.ops.flash_kda.join_maps.default._schema) == (
        "flash_kda::join_maps(Tensor maps, Tensor states, Tensor? initial_state=None, "
        "Tensor(a!)? entering=None, Tensor(b!)? final_state=None, str? kernel_name=None, int threads=0, "
        "bool backwards=False, bool state_v_first=True) -> ()"
    )


def test_traced_calls_are_checked_without_memory():
    torch = pytest.importorskip("torch")
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        t = {name: torch.empty(1, 20, 2, 128, dtype=torch.bfloat16) for name in ("k", "v", "g")}
        t |= {"beta": torch.empty(1, 20, 2), "A_log": None, "dt_bias": None, "lower_bound": -5.0}
        flash_kda.affine_map(**t, map=torch.empty(1, 2, 128, 128))
        with pytest.raises(ValueError, match="map has shape"):
            flash_kda.affine_map(**t, map=torch.empty(1, 1, 128, 128))


def test_no_gradients():
    torch = pytest.importorskip("torch")
    t = to_torch(make_pieces(seed=7), "cpu")
    t["k"].requires_grad_()
    with pytest.raises(RuntimeError, match="computes no gradients"):
        flash_kda.affine_map(**t, map=torch.empty(3, 2, 128, 128))


def refuse_map(kind, sentence, **changes):
    a = make_pieces(seed=8)
    affine, state = matrices(a)
    with pytest.raises(kind) as caught:
        flash_kda.affine_map(**{**a, "map": affine, "state": state, **changes})
    assert sentence in str(caught.value)
    assert np.isnan(affine).all()
    assert np.isnan(state).all()


def test_errors_of_affine_map():
    a = make_pieces(seed=8)
    refuse_map(
        ValueError, "map and state are all None; at least one of them must be given", map=None, state=None
    )
    refuse_map(ValueError, "k has 3 dimensions; it must have 4: [B, T, H, K]", k=a["k"][..., 0].copy())
    refuse_map(ValueError, "g has shape [1, 57, 2, 128]; it must be [B, T, HV, K]", v=a["v"][:, :, :1].copy())
    refuse_map(TypeError, "g has dtype float64", g=a["g"].astype(np.float64))
    refuse_map(ValueError, "lower_bound is -6; it must be in [-5, 0]", lower_bound=-6.0)
    refuse_map(TypeError, "lower_bound is of type str; it must be a number or None", lower_bound="low")
    refuse_map(TypeError, "threads is of type str; it must be an int", threads="all")
    refuse_map(ValueError, 'kernel is "none"; it must be None or one of', kernel="none")
    refuse_map(
        ValueError, "allow_neg_eigval is True", allow_neg_eigval=True, use_beta_sigmoid_in_kernel=False
    )
    refuse_map(ValueError, "cu_seqlens ends with 56; its last", cu_seqlens=np.array([0, 10, 20, 56]))
    read_only = matrices(a, 1)[0]
    read_only.flags.writeable = False
    refuse_map(ValueError, "map is read-only", map=read_only)
    with pytest.raises(TypeError, match="unexpected keyword argument 'maps'"):
        flash_kda.affine_map_reference(**a, maps=None)
    with pytest.raises(ValueError, match="A_log is None and lower_bound is None"):
        flash_kda.affine_map_reference(**{**a, "A_log": None, "lower_bound": None})


def test_errors_of_join_maps():
    maps, states = (np.zeros((2, 1, 128, 128), np.float32) for _ in range(2))
    final = np.full((1, 1, 128, 128), np.nan, np.float32)

    def refuse(kind, sentence, *arrays, **more):
        with pytest.raises(kind) as caught:
            flash_kda.join_maps(*arrays, **{"final_state": final, **more})
        assert sentence in str(caught.value)
        assert np.isnan(final).all()

    refuse(ValueError, "entering and final_state are all None", maps, states, final_state=None)
    refuse(ValueError, "maps has P = 0; there must be at least 1 piece", maps[:0], states[:0])
    refuse(ValueError, "states has shape [1, 1, 128, 128]", maps, states[:1])
    refuse(TypeError, "maps has dtype float64; it must be float32", maps.astype(np.float64), states)
    refuse(TypeError, "backwards is of type int; it must be True or False", maps, states, backwards=1)
    refuse(ValueError, "initial_state has shape [2, 1, 128, 128]", maps, states, states)
    refuse(ValueError, "entering overlaps maps; it must have memory of its own", maps, states, entering=maps)


@pytest.mark.parametrize("k_first", [False, True])
def test_maps_on_a_gpu(cuda, k_first):
    torch = pytest.importorskip("torch")
    a = make_pieces(lengths=(300, 0, 1, 700), seed=9, H=1, HV=2, k_first=k_first)
    t = to_torch(a, cuda)
    affine, state = (torch.full((4, 2, 128, 128), torch.nan, device=cuda) for _ in range(2))
    flash_kda.affine_map(**t, map=affine, state=state)
    true_map, true_state = flash_kda.affine_map_reference(**a)
    assert error(affine.cpu(), true_map) <= 1.2e-3
    assert error(state.cpu(), true_state) <= 1.2e-3
    final = torch.empty(1, 2, 128, 128, device=cuda)
    flash_kda.join_maps(affine, state, state[3:], final_state=final, state_v_first=not k_first)
    want = state[3].double().cpu().numpy()
    for i in range(4):
        want = apply(want, affine[i].double().cpu().numpy(), state[i].double().cpu().numpy(), not k_first)
    assert error(final[0].cpu(), want) <= 1e-6


def test_a_graph_computes_and_joins_maps(cuda):
    """Replays see what is in the tensors then, lengths too."""
    torch = pytest.importorskip("torch")
    a = make_pieces(lengths=(300, 1, 0, 700), seed=10)
    b = make_pieces(lengths=(40, 900, 61, 0), seed=11)
    t, other = to_torch(a, cuda), to_torch(b, cuda)
    affine, state = (torch.empty(4, 2, 128, 128, device=cuda) for _ in range(2))
    final = torch.empty(1, 2, 128, 128, device=cuda)

    def call():
        flash_kda.affine_map(**t, map=affine, state=state)
        flash_kda.join_maps(affine, state, final_state=final)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for name, x in t.items():
        if isinstance(x, torch.Tensor):
            x.copy_(other[name])
    graph.replay()
    replayed = [x.clone() for x in (affine, state, final)]
    call()
    assert all(torch.equal(x, y) for x, y in zip(replayed, (affine, state, final)))
    true_map, true_state = flash_kda.affine_map_reference(**b)
    assert error(affine.cpu(), true_map) <= 1.2e-3
    assert error(state.cpu(), true_state) <= 1.2e-3
