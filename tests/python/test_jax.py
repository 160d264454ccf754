"""flash_kda.jax: calls inside of programs that XLA compiles. Their results have the bits of the same calls
outside of them, and are held to the fp64 definition."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flash_kda
from decode_problems import WRITES, make_decode
from problems import BARS, BETAS, CHECKPOINTS, GATES, error, make, make_any, truth

jax = pytest.importorskip("jax", reason="JAX is not installed")
pytest.importorskip("flash_kda.jax", reason="this JAX is older than 0.6", exc_type=ImportError)
jnp = jax.numpy

WRITTEN = ("out", "final_state", "checkpoint_states", "records")


@pytest.fixture(autouse=True)
def cpu_by_default():
    """Without an array that is elsewhere, JAX computes on the CPU, also where it could use a GPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture
def jax_device(device):
    """A device of JAX of the kind that is tested."""
    try:
        return jax.devices(device)[0]
    except RuntimeError:
        pytest.skip("this JAX can use no GPU")


def arguments_of(a):
    """The arrays and the other arguments of a call, without what the call writes."""
    given = {n: x for n, x in a.items() if n not in WRITTEN and x is not None}
    arrays = {n: x for n, x in given.items() if isinstance(x, np.ndarray)}
    rest = {n: a.get(n) for n in ("A_log", "dt_bias", "lower_bound") if n not in given}
    if a.get("checkpoint_states") is not None:
        rest["checkpoint_rows"] = len(a["checkpoint_states"])
    return arrays, {**rest, **{n: x for n, x in given.items() if n not in arrays}}


def put(arrays, where):
    return {n: jax.device_put(x, where) for n, x in arrays.items()}


def run_fwd(a, where=None):
    """The results of jax.fwd under jax.jit, in NumPy."""
    arrays, rest = arguments_of(a)
    work = jax.jit(lambda arrays: flash_kda.jax.fwd(**arrays, **rest, output_final_state=True))
    return [np.asarray(x) for x in work(put(arrays, where))]


def compute(a, where):
    """What the same call gives outside of a program, in NumPy."""
    arrays, rest = arguments_of(a)
    return [np.asarray(x) for x in flash_kda.compute(**put(arrays, where), **rest, output_final_state=True)]


def assert_same(got, want):
    assert len(got) == len(want)
    for x, y in zip(got, want):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == np.ascontiguousarray(y).tobytes()


def assert_as_on_cpu(got, want, jax_device):
    """want: results of the CPU backend, whose bits another device does not have."""
    if jax_device.platform == "cpu":
        assert_same([np.asarray(x) for x in got], want)
    else:
        for x, y in zip(got, want):
            assert error(np.asarray(x), y.astype(np.float64)) <= 4e-3


PLAIN = {
    "one sequence": {"T": 130},
    "batch with states": {"T": 70, "B": 3, "initial": np.float32},
    "bf16 states": {"T": 20, "B": 2, "initial": "bfloat16"},
    "sequences": {"lengths": [5, 0, 64], "initial": np.float32},
    "no tokens": {"T": 0, "B": 2, "initial": np.float32},
}


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_fwd(jax_device, device, options):
    a = make(**options)
    got = run_fwd(a, jax_device)
    assert_same(got, compute(a, jax_device))
    for x, right, bar in zip(got, truth(a), BARS[device]):
        assert error(x, right) <= (max(bar, 3e-3) if x.dtype.name == "bfloat16" else bar)


ANY = {
    **{f"gate {gate}": {"gate": gate} for gate in GATES},
    **{f"beta {beta}": {"beta": beta, "wide": beta == "activated"} for beta in BETAS},
    **{f"checkpoints {kind}": {"checkpoints": kind} for kind in CHECKPOINTS},
    "pool": {"pool": True},
    "pool, flags, bf16": {"pool": True, "flags": True, "state": "bfloat16", "integers": np.int32},
    "all": {
        "gate": "softplus", "beta": "twice", "normalised": True, "k_first": True, "wide": True, "pool": True,
        "flags": True, "checkpoints": "indices", "H": 2, "HV": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", ANY.values(), ids=ANY)
def test_every_option(jax_device, options):
    a = make_any(**options)
    assert_same(run_fwd(a, jax_device), compute(a, jax_device))


def test_it_is_a_call_of_the_library():
    """A program has the call itself, not what JAX made of it."""
    arrays, rest = arguments_of(make(T=20))
    lowered = jax.jit(lambda arrays: flash_kda.jax.fwd(**arrays, **rest)).lower(arrays)
    assert "@flash_kda.fwd(" in lowered.as_text()
    assert lowered.compile()(arrays)[1] is None


def test_without_a_final_state():
    a = make(T=20)
    arrays, rest = arguments_of(a)
    out, state = flash_kda.jax.fwd(**arrays, **rest)
    assert state is None
    assert error(np.asarray(out), truth(a)[0]) <= BARS["cpu"][0]


@pytest.mark.parametrize("options", [{}, {"use_gate_in_kernel": False}], ids=["gate", "activated"])
def test_chunk_kda(jax_device, device, options):
    a = make_any(lengths=(5, 40), gate="activated" if options else "softplus", k_first=True)
    flags = {
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": not options,
        "use_beta_sigmoid_in_kernel": True,
        "output_final_state": True,
    }
    names = ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens", "A_log", "dt_bias", "lower_bound")
    arrays, rest = arguments_of({n: a[n] for n in names})
    work = jax.jit(lambda x: flash_kda.jax.chunk_kda(**x, **rest, **flags))
    out, state = work(put(arrays, jax_device))
    given = {n: x for n, x in a.items() if n not in WRITTEN}
    for got, right, bar in zip((out, state), flash_kda.reference(**given), BARS[device]):
        assert error(np.asarray(got), right) <= bar


def test_chunk_kda_refuses():
    a = make(T=4, initial="bfloat16")
    five = [a[n] for n in ("q", "k", "v", "g", "beta")]
    with pytest.raises(ValueError, match=r"lower_bound is None with safe_gate=True; it must be in \[-5, 0\)"):
        flash_kda.jax.chunk_kda(*five, safe_gate=True, use_gate_in_kernel=True)
    with pytest.raises(TypeError, match=r"initial_state is of bfloat16; it must be of float32"):
        flash_kda.jax.chunk_kda(*five, initial_state=a["initial_state"])
    with pytest.raises(ValueError, match=r"A_log is None and lower_bound is None; A_log must be given"):
        flash_kda.jax.chunk_kda(*five, use_gate_in_kernel=True)


# ---- decode ------------------------------------------------------------------------------------------------


DECODE = {
    "one token": {"T": 1},
    "four tokens, no pool": {"pool": False},
    "packed": {"lengths": (3, 1, 5), "gate": "softplus"},
    "grouped, K first, bf16": {"H": 2, "HV": 4, "k_first": True, "state": "bfloat16", "integers": np.int32},
    "activated": {"gate": "activated", "beta": "activated", "wide": True, "normalised": True},
    **{f"write {kind}": {"write": kind} for kind in WRITES},
    "verify": {"write": "each", "accepted": True},
    "a tree": {"write": "none", "tree": True},
    "into a buffer": {"write": "each", "apart": "none"},
    "a tree into a buffer": {"write": "each", "apart": "indices", "tree": True, "state": "bfloat16"},
    "last states into a buffer": {"lengths": (3, 1, 5), "apart": "indices", "integers": np.int32},
}


@pytest.mark.parametrize("options", DECODE.values(), ids=DECODE)
def test_decode(jax_device, options):
    a = make_decode(**options)
    arrays, rest = arguments_of(a)
    pool = "written_states" if "written_states" in a else "state"
    if pool == "written_states":
        a[pool][:] = 7  # stays where nothing is written
    want = {n: x.copy() if n in ("out", "state", pool) else x for n, x in a.items()}
    given = put(arrays, jax_device)
    got = jax.jit(lambda arrays: flash_kda.jax.decode(**arrays, **rest))(given)
    for name in ("state", pool):
        assert np.asarray(given[name]).tobytes() == a[name].tobytes(), "a JAX array was written"
    flash_kda.decode(**want)
    assert_as_on_cpu(got, [want["out"], want[pool]], jax_device)


def test_a_donated_state(jax_device):
    """What XLA may do with the memory of a state changes no result."""
    a = make_decode(N=2, T=1)
    arrays, rest = arguments_of(a)
    step = jax.jit(
        lambda state, arrays: flash_kda.jax.decode(state=state, **arrays, **rest), donate_argnums=0
    )
    state = jax.device_put(arrays.pop("state"), jax_device)
    arrays = put(arrays, jax_device)
    want = {**a, "out": a["out"].copy(), "state": a["state"].copy()}
    for _ in range(3):
        out, state = step(state, arrays)
        flash_kda.decode(**want)
    assert_as_on_cpu((out, state), [want["out"], want["state"]], jax_device)


# ---- Transformations ---------------------------------------------------------------------------------------


def test_scan_carries_the_state(jax_device):
    """A prompt in pieces, and then token by token."""
    a = make(T=96, B=2, initial=np.float32)
    five = ("q", "k", "v", "g", "beta")
    pieces = put({n: np.stack(np.split(a[n], 3, axis=1)) for n in five}, jax_device)
    gate = [a[n] for n in ("A_log", "dt_bias", "lower_bound")]

    @jax.jit
    def in_pieces(state, pieces):
        def step(state, x):
            out, state = flash_kda.jax.fwd(
                *(x[n] for n in five), a["scale"], *gate, state, output_final_state=True
            )
            return state, out

        return jax.lax.scan(step, state, pieces)

    initial_state = jax.device_put(a["initial_state"], jax_device)
    state, out = in_pieces(initial_state, pieces)
    want = a["initial_state"]
    for i in range(3):
        x = [a[n][:, 32 * i : 32 * i + 32] for n in five]
        right, want = flash_kda.compute(*x, a["scale"], *gate, want, output_final_state=True)
        assert_as_on_cpu([out[i]], [right], jax_device)
    assert_as_on_cpu([state], [want], jax_device)

    @jax.jit
    def token_by_token(state, tokens):
        def step(state, x):
            out, state = flash_kda.jax.decode(*(x[n] for n in five), a["scale"], *gate, state)
            return state, out

        return jax.lax.scan(step, state, tokens)

    tokens = put({n: np.moveaxis(a[n], 1, 0)[:, :, None] for n in five}, jax_device)
    state, out = token_by_token(initial_state, tokens)
    pool = a["initial_state"].copy()
    for i in range(96):
        x = [np.ascontiguousarray(a[n][:, i : i + 1]) for n in five]
        right = np.empty_like(x[2])
        flash_kda.decode(*x, a["scale"], right, *gate, pool)
        assert_as_on_cpu([out[i]], [right], jax_device)
    assert_as_on_cpu([state], [pool], jax_device)


@pytest.mark.parametrize("jit", [False, True])
def test_vmap(jax_device, jit):
    """Calls one after the other."""
    a, b = make(T=20, initial=np.float32), make(T=20, initial=np.float32, seed=1)
    arrays, rest = arguments_of(a)
    arrays = put(arrays, jax_device)

    def work(q, state):
        return flash_kda.jax.fwd(
            **{**arrays, "q": q, "initial_state": state}, **rest, output_final_state=True
        )

    both = [jax.device_put(np.stack([a[n], b[n]]), jax_device) for n in ("q", "initial_state")]
    mapped = jax.vmap(work)
    out, state = (jax.jit(mapped) if jit else mapped)(*both)
    for i, x in enumerate((a, b)):
        want = compute({**a, "q": x["q"], "initial_state": x["initial_state"]}, jax_device)
        assert_same([np.asarray(out[i]), np.asarray(state[i])], want)
    (only,) = jax.vmap(lambda q: flash_kda.jax.fwd(**{**arrays, "q": q}, **rest)[:1])(both[0])
    assert_same([np.asarray(only[0])], compute(a, jax_device)[:1])


def test_derivatives_are_refused():
    a = make(T=20)
    arrays, rest = arguments_of(a)
    sentence = r"flash_kda.jax has no derivatives, .* pass its arrays through jax.lax.stop_gradient"

    def total(q):
        return flash_kda.jax.fwd(**{**arrays, "q": q}, **rest)[0].astype(jnp.float32).sum()

    q = jnp.asarray(a["q"])
    for transform in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        with pytest.raises(RuntimeError, match=sentence):
            transform(total)(q)
    with pytest.raises(RuntimeError, match=sentence):
        jax.jvp(total, (q,), (q,))
    assert not jax.grad(lambda q: total(jax.lax.stop_gradient(q)))(q).any()
    # A derivative in the direction of something else passes.
    assert jax.grad(lambda x: x * total(q))(2.0) == total(q)


# ---- Refusals ----------------------------------------------------------------------------------------------

WRONG = {
    "shape": ({"q": np.zeros((1, 21, 2, 128))}, ValueError, r"k has shape \[1, 20, 2, 128\]; it must be \[B"),
    "dtype": ({"q": np.zeros((1, 20, 2, 128), np.float32)}, TypeError, "q has dtype float32; it must be bf"),
    "rank": ({"v": np.zeros((20, 2, 128))}, ValueError, r"v has .*; it must be \[B, T, HV, V\]|v has 3 dim"),
    "heads": ({"v": np.zeros((1, 20, 3, 128))}, ValueError, "multiple"),
    "state": (
        {"initial_state": np.zeros((2, 2, 128, 128), np.float32)},
        ValueError,
        "initial_state has shape",
    ),
    "an array of another type": ({"q": [1.0]}, TypeError, "q is of type list; it must be a JAX array"),
    "scale": ({"scale": float("nan")}, ValueError, "scale is nan; it must be finite"),
    "a scale that is no number": ({"scale": "1"}, TypeError, "scale is of type str; it must be a number"),
    "lower_bound": ({"lower_bound": -6.0}, ValueError, r"lower_bound is -6; it must be in \[-5, 0\]"),
    "A_log": ({"lower_bound": None, "A_log": None}, ValueError, "A_log is None and lower_bound is None"),
    "kernel": ({"kernel": "no such"}, ValueError, "no such"),
    "threads": ({"threads": -1}, ValueError, "threads is -1; it must be"),
    "an unknown option": ({"speed": 1}, TypeError, r"fwd\(\) got an unexpected keyword argument 'speed'"),
    "workspace": ({"workspace": 1}, TypeError, "unexpected keyword argument 'workspace'"),
    "a pool without one": (
        {"state_indices": np.zeros(1, np.int32), "output_final_state": True},
        ValueError,
        "state_indices is given without initial_state",
    ),
    "checkpoint_rows": ({"checkpoint_rows": 1}, ValueError, "checkpoint_rows is given without"),
    "checkpoint_every": (
        {"checkpoint_every": 10},
        ValueError,
        "checkpoint_every is 10; it must be a multiple",
    ),
}


@pytest.mark.parametrize(("change", "kind", "sentence"), WRONG.values(), ids=WRONG)
def test_refused_when_traced(change, kind, sentence):
    arrays, rest = arguments_of(make(T=20))
    bf16 = {
        n: x.astype("bfloat16") if getattr(x, "dtype", "") == np.float64 else x for n, x in change.items()
    }
    call = {**arrays, **rest, **bf16}
    fixed = {n: x for n, x in call.items() if not isinstance(x, np.ndarray)}
    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in call.items() if n not in fixed}
    with pytest.raises(kind, match=sentence):
        jax.eval_shape(lambda arrays: flash_kda.jax.fwd(**arrays, **fixed), shapes)


def test_decode_refuses_when_traced():
    arrays, rest = arguments_of(make_decode(N=2, T=1))
    with pytest.raises(ValueError, match="state has shape"):
        flash_kda.jax.decode(**{**arrays, "state": arrays["state"][:, :1]}, **rest)
    with pytest.raises(ValueError, match="write_states is 'all'; it must be"):
        flash_kda.jax.decode(**arrays, **{**rest, "write_states": "all"})
    buffer = {"written_states": arrays["state"]}
    with pytest.raises(ValueError, match=r"written_states is given with write_states=\"none\""):
        flash_kda.jax.decode(**arrays, **{**rest, "write_states": "none"}, **buffer)
    with pytest.raises(TypeError, match=r"decode\(\) got an unexpected keyword argument 'records'"):
        flash_kda.jax.decode(**arrays, **rest, records=None)


def test_numbers_must_be_static():
    arrays, rest = arguments_of(make(T=4))
    del rest["scale"]
    with pytest.raises(TypeError, match=r"scale is a tracer; it must be a number .* mark it as static"):
        jax.jit(lambda scale: flash_kda.jax.fwd(**arrays, scale=scale, **rest))(1.0)


def test_symbolic_shapes():
    export = pytest.importorskip("jax.export")
    arrays, rest = arguments_of(make(T=20))
    (T,) = export.symbolic_shape("T")
    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in arrays.items()}
    shapes["q"] = jax.ShapeDtypeStruct((1, T, 2, 128), "bfloat16")
    with pytest.raises(TypeError, match=r"q has the symbolic shape \(1, T, 2, 128\)"):
        export.export(jax.jit(lambda arrays: flash_kda.jax.fwd(**arrays, **rest)))(shapes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"cu_seqlens": np.array([0, 30, 20, 69], np.int32)}, r"cu_seqlens\[2\] is 20 after 30"),
        ({"state_indices": np.array([0, 1, 99], np.int32)}, r"state_indices\[2\] is 99"),
    ],
)
def test_refused_when_run(change, sentence):
    """What only the values of arrays say."""
    arrays, rest = arguments_of(make_any(lengths=(5, 0, 64), pool=True))
    work = jax.jit(lambda arrays: flash_kda.jax.fwd(**arrays, **rest))
    with pytest.raises(Exception, match=sentence):
        jax.block_until_ready(work({**arrays, **change}))
    jax.block_until_ready(work(arrays))


# ---- Programs ----------------------------------------------------------------------------------------------


def test_a_program_for_two_platforms(monkeypatch):
    """On a machine with a GPU a call is traced for CPU and GPU, and the program's platform says which it
    is. The CPU stands in for the GPU here."""
    monkeypatch.setattr(flash_kda.jax, "_cuda_devices", lambda: [(flash_kda._lib.CPU, 0)])
    jax.clear_caches()
    a = make(T=130, initial=np.float32)
    arrays, rest = arguments_of(a)
    with jax.default_device(jax.devices("cpu")[0]):
        got = run_fwd(a)
        assert_same(got, flash_kda.compute(**arrays, **rest, output_final_state=True))
        mapped = jax.vmap(lambda q: flash_kda.jax.fwd(**{**arrays, "q": q}, **rest)[0])(a["q"][None])
        assert_same([np.asarray(mapped[0])], got[:1])
    jax.clear_caches()


RUN = """
import sys, numpy, jax, flash_kda.jax
from jax import export
program = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
given = numpy.load(sys.argv[2])
out = program.call({n: jax.numpy.asarray(x).view("bfloat16") if x.dtype == "uint16" else x
                    for n, x in given.items()})[0]
numpy.save(sys.argv[3], numpy.asarray(out).view("uint16"))
"""


@pytest.mark.slow
def test_an_exported_program(tmp_path):
    """It runs in another process, in which other libraries are at other addresses."""
    export = pytest.importorskip("jax.export")
    pytest.importorskip("flatbuffers", reason="jax.export writes files with flatbuffers")
    arrays, rest = arguments_of(make(T=70))
    check = export.DisabledSafetyCheck.custom_call("flash_kda.fwd")
    program = export.export(
        jax.jit(lambda arrays: flash_kda.jax.fwd(**arrays, **rest)[:1]),
        platforms=["cpu"],
        disabled_checks=[check],
    )(arrays)
    files = [tmp_path / name for name in ("program", "given.npz", "out.npy")]
    files[0].write_bytes(program.serialize())
    bits = {n: x.view("uint16") if x.dtype.name == "bfloat16" else x for n, x in arrays.items()}
    np.savez(files[1], **bits)
    command = [sys.executable, "-c", RUN, *files]
    on_cpu = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=on_cpu)
    assert done.returncode == 0, done.stderr
    want = flash_kda.compute(**arrays, **rest)[0]
    assert np.load(files[2]).tobytes() == want.tobytes()


SHARDED = """
import sys; sys.path.insert(0, sys.argv[1])
import numpy as np, jax, flash_kda.jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from problems import make

a = make(T=40, B=2, initial=np.float32)
mesh = Mesh(np.array(jax.devices()), ("rows",))
names = ("q", "k", "v", "g", "beta", "initial_state")
arrays = [jax.device_put(a[n], NamedSharding(mesh, P("rows"))) for n in names]
rest = [a[n] for n in ("scale", "A_log", "dt_bias", "lower_bound")]

def work(*x):
    return flash_kda.jax.fwd(*x[:5], *rest, x[5], output_final_state=True)

try:
    shard_map = jax.shard_map
except AttributeError:
    from jax.experimental.shard_map import shard_map
local = shard_map(work, mesh=mesh, in_specs=(P("rows"),) * 6, out_specs=(P("rows"), P("rows")))
want = flash_kda.compute(*(a[n] for n in names[:5]), *rest, a["initial_state"], output_final_state=True)
for function, is_gathered in ((work, True), (local, False)):
    compiled = jax.jit(function).lower(*arrays).compile()
    assert ("all-gather" in compiled.as_text()) == is_gathered
    for got, right in zip(compiled(*arrays), want):
        assert np.asarray(got).tobytes() == right.tobytes()
print("ok", len(jax.devices()))
"""


@pytest.mark.slow
def test_sharded_arrays():
    """They are gathered, unless shard_map says that each device computes its part."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", SHARDED, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok 2\n"


@pytest.mark.parametrize("fake", ["sys.modules['jax'] = None", "import jax; jax.__version__ = '0.5.3'"])
def test_without_a_jax_that_is_new_enough(fake):
    code = f"import sys; {fake}\nimport flash_kda\ntry: flash_kda.jax\nexcept ImportError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("flash_kda.jax needs JAX 0.6 or newer (")
