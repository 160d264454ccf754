"""compute, which returns new arrays, on NumPy, PyTorch and JAX; and what JAX's arrays may not be used for."""

import inspect

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from problems import BARS, REFERENCE_ARGUMENTS, error, hold_to, make, to_numpy, to_torch, truth

LIBRARIES = ["numpy", "torch", "jax"]


def convert(arguments, library, device="cpu"):
    """The arguments of compute as arrays of a library."""
    arguments = {n: arguments[n] for n in REFERENCE_ARGUMENTS if n in arguments}
    if library == "torch":
        pytest.importorskip("torch")
        return to_torch(arguments, device)
    if library == "jax":
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        cpu = jax.devices("cpu")[0]
        # JAX has no 64-bit integers by default.
        return {
            n: jax.device_put(x.astype(np.int32) if x.dtype == np.int64 else x, cpu)
            if isinstance(x, np.ndarray)
            else x
            for n, x in arguments.items()
        }
    return arguments


def kind_of(x):
    return (type(x), str(x.dtype).rpartition(".")[2])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("options", [{}, {"threads": 2, "cut": "never"}], ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        {"T": 40, "B": 2},
        {"T": 40, "B": 2, "initial": np.float32},
        {"lengths": [3, 0, 30], "initial": bfloat16},
        {"T": 0, "initial": np.float32},
    ],
    ids=str,
)
def test_compute(library, problem, options):
    a = make(**problem)
    given = convert(a, library)
    out, state = flash_kda.compute(**given, output_final_state=True, **options)
    if "T" not in problem or problem["T"]:
        expected = truth(a)
        hold_to({"out": to_numpy({"x": out})["x"]}, (expected[0],), "cpu")
        bar = 1e-5 if problem.get("initial") is not bfloat16 else 3e-3  # a bf16 state is rounded
        assert error(to_numpy({"x": state})["x"], expected[1]) <= bar
    assert kind_of(out) == kind_of(given["v"])
    assert out.shape == given["v"].shape
    if "initial" in problem:
        assert kind_of(state) == kind_of(given["initial_state"])
    else:
        assert kind_of(state) == (type(given["v"]), "float32")
    again, nothing = flash_kda.compute(**given, **options)
    assert nothing is None
    assert (
        np.asarray(to_numpy({"x": again})["x"]).tobytes() == np.asarray(to_numpy({"x": out})["x"]).tobytes()
    )


def test_on_a_gpu(cuda):
    a = make(lengths=[3, 0, 70], initial=np.float32)
    expected = truth(a)
    out, state = flash_kda.compute(**convert(a, "torch", cuda), output_final_state=True)
    assert out.is_cuda
    assert state.is_cuda
    hold_to(to_numpy({"out": out, "final_state": state}), expected, "cuda")


def test_under_compile():
    torch = pytest.importorskip("torch")
    torch.compiler.reset()
    compiled = torch.compile(
        lambda **t: flash_kda.compute(**t, output_final_state=True), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        given = convert(make(lengths=[3, 0, 30], initial=np.float32), "torch")
        want = flash_kda.compute(**given, output_final_state=True)
        assert all(torch.equal(x, y) for x, y in zip(compiled(**given), want))


def test_its_arguments_are_those_of_reference():
    parameters = inspect.signature(flash_kda.compute).parameters
    assert list(parameters)[:-2] == list(REFERENCE_ARGUMENTS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'out_of_place'"):
        flash_kda.compute(**convert(make(T=4), "numpy"), out_of_place=True)


@pytest.mark.parametrize("library", LIBRARIES)
def test_wrong_arguments(library):
    a = convert(make(lengths=[3, 5]), library)
    for change, exception, sentence in (
        ({"k": a["k"][:, :7]}, ValueError, "k has shape [1, 7, 2, 128]; it must be"),
        ({"q": a["q"][0]}, ValueError, "q has 3 dimensions; it must have 4"),
        ({"v": a["v"][0]}, ValueError, "v has 3 dimensions; it must have 4"),
        ({"cu_seqlens": a["cu_seqlens"][:0]}, ValueError, "cu_seqlens has 0 entries; it must have N + 1"),
        ({"cu_seqlens": a["cu_seqlens"][None]}, ValueError, "cu_seqlens has 2 dimensions; it must have 1"),
        ({"cu_seqlens": [0, 3, 8]}, TypeError, "cu_seqlens is of type builtins.list; it must be"),
        ({"q": None}, TypeError, "q is of type builtins.NoneType; it must be"),
        ({"v": 3}, TypeError, "v is of type builtins.int; it must be"),
        ({"threads": 2.0}, TypeError, "threads is of type float; it must be an int"),
    ):
        with pytest.raises(exception) as raised:
            flash_kda.compute(**{**a, **change}, output_final_state=True)
        assert sentence in str(raised.value)


def test_a_library_that_makes_no_arrays():
    from test_dlpack import Foreign

    a = convert(make(T=4), "numpy")
    with pytest.raises(
        TypeError, match=r"v is of type test_dlpack\.Foreign, of which flash_kda cannot make new"
    ):
        flash_kda.compute(**{**a, "v": Foreign(a["v"])})
    # Of all other arrays only the memory is asked for.
    others = {n: Foreign(x) if isinstance(x, np.ndarray) and n != "v" else x for n, x in a.items()}
    out, state = flash_kda.compute(**others, output_final_state=True)
    hold_to({"out": out, "final_state": state}, truth(a), "cpu")


@pytest.mark.parametrize("name", ["out", "final_state"])
def test_jax_arrays_are_not_written(name):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    a = make(T=4)
    wrong = jax.numpy.asarray(a[name])
    with pytest.raises(
        ValueError, match=rf"{name} is an array of jax, .* immutable.* flash_kda.compute returns"
    ):
        flash_kda.fwd(**{**a, name: wrong})
    assert bool(jax.numpy.isnan(wrong).all())
    assert np.isnan(a["out"].astype(np.float32)).all()


def test_results_in_jax_are_apart():
    """No two results share memory, and later calls change no earlier result."""
    a = convert(make(T=30, initial=np.float32), "jax")
    first = flash_kda.compute(**a, output_final_state=True)
    kept = [np.array(x) for x in first]
    second = flash_kda.compute(
        **{**a, "v": -a["v"], "initial_state": -a["initial_state"]}, output_final_state=True
    )
    assert len({x.unsafe_buffer_pointer() for x in (*first, *second)}) == 4
    for x, y, z in zip(first, kept, second):
        np.testing.assert_array_equal(np.asarray(x), y)
        np.testing.assert_array_equal(np.asarray(z), -y)


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap"])
@pytest.mark.parametrize("call", ["fwd", "compute", "reference"])
def test_jax_tracers(transform, call):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    a = make(T=4)
    arguments = a if call == "fwd" else convert(a, "numpy")

    def work(q):
        getattr(flash_kda, call)(**{**arguments, "q": q})
        return q.astype("float32").sum()

    q = jax.numpy.asarray(a["q"])
    with pytest.raises(
        TypeError, match=r"q is a tracer of jax.jit, .* call flash_kda.jax.fwd there, or flash_kda.compute"
    ):
        getattr(jax, transform)(work)(q[None] if transform == "vmap" else q)


def test_pure_callback():
    """The way through the CPU, for devices that flash_kda.jax does not know."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    a = make(T=30)
    given = convert(a, "jax")
    arrays = {n: x for n, x in given.items() if isinstance(x, jax.Array)}
    numbers = {n: x for n, x in given.items() if n not in arrays}

    @jax.jit
    def work(arrays):
        shape = jax.ShapeDtypeStruct(a["v"].shape, "bfloat16")
        return jax.pure_callback(lambda t: flash_kda.compute(**t, **numbers)[0], shape, arrays)

    assert error(work(arrays), truth(a)[0]) <= BARS["cpu"][0]


def test_reference_of_jax_arrays():
    a = make(lengths=[3, 0, 6], initial=np.float32)
    for got, want in zip(flash_kda.reference(**convert(a, "jax")), truth(a)):
        assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(got, want)
