"""vLLM's plug-in: three operators with vLLM's schema, with tensors as vLLM's layers build them.

The operators are defined by the plug-in here, as in a build of vLLM that lacks them. vllm_calls.py has them
in front of vLLM's own, in vLLM's own layer.
"""

import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import flash_kda

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from peer_timing import releases  # noqa: E402

from flash_kda import _engines  # noqa: E402
from flash_kda import vllm as plugin  # noqa: E402

DIM = 128
needs_get_kernel = pytest.mark.skipif(
    not hasattr(torch.library, "get_kernel"), reason="the plug-in leaves vLLM alone with an older PyTorch"
)
OUT, STATE = 2.2e-3, 1e-5  # the largest relative errors of out and of fp32 states on the CPU
OUT_GPU, STATE_GPU = 5.6e-3, 4.8e-3
BF16, F32 = torch.bfloat16, torch.float32


def error(got, want):
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    norm = want.norm()
    return float((got - want).norm() / norm) if norm else float(got.norm())


@pytest.fixture(scope="module", autouse=True)
def operators():
    """The three operators of vLLM, of which this process has none yet."""
    plugin._adopt_prefill()
    plugin._adopt_decode()


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has loaded no plug-in yet."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "_takes_all", False)
    monkeypatch.setattr(plugin, "_log", _engines.Log("vllm.flash_kda"))
    monkeypatch.delenv(plugin.VARIABLE, raising=False)


@pytest.fixture
def calls(monkeypatch):
    """The names of the package's functions that were called, which still run."""
    seen = []
    for name in ("fwd", "decode_layer"):
        function = getattr(flash_kda, name)

        def spy(*arguments, name=name, function=function, **named):
            seen.append(name)
            return function(*arguments, **named)

        monkeypatch.setattr(flash_kda, name, spy)
    return seen


# ---- Prefill -----------------------------------------------------------------------------------------------


def prefill(lengths, heads=2, state=F32, device="cpu", checkpoints=None, before=0):
    """The arguments of _flashkda_C::fwd by name. out, both states, the checkpoints and the workspace are
    views of one buffer, each at a multiple of 256 bytes; beta has the columns of a projection; out begins
    behind `before` tokens of the layer's output, as in a batch with draft tokens."""
    torch.manual_seed(len(lengths) + sum(lengths))
    N, T = len(lengths), sum(lengths)

    def normal(*shape, dtype=BF16):
        return torch.randn(*shape).to(device, dtype)

    a = {name: normal(1, T, heads, DIM) for name in "qkvg"}
    a["beta"] = normal(1, T, heads + 5)[..., 2 : 2 + heads]
    a["scale"] = DIM**-0.5
    sizes = [((1, before + T, heads, DIM), BF16), ((N + 1, heads, DIM, DIM), state)]
    sizes += [((N + 1, heads, DIM, DIM), state)]
    size = torch.ops._flashkda_C.get_workspace_size(max(T, 64), heads, N)
    sizes += [((size,), torch.uint8)]
    bytes_of = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in sizes]
    buffer = torch.zeros(sum(-(-x // 256) * 256 for x in bytes_of), dtype=torch.uint8, device=device)
    views, begin = [], 0
    for (shape, dtype), count in zip(sizes, bytes_of):
        views.append(buffer[begin : begin + count].view(dtype).view(shape))
        begin += -(-count // 256) * 256
    out, final_state, checkpoint_state, workspace = views
    a |= {"out": out[:, before:], "workspace": workspace}
    a["A_log"] = torch.nn.Parameter(torch.rand(heads).to(device))
    a["dt_bias"] = torch.nn.Parameter((torch.randn(heads * DIM) - 2).to(device)).view(-1, DIM)
    a["lower_bound"] = -5.0
    a["initial_state"] = normal(N, heads, DIM, DIM, dtype=state)
    a["final_state"] = final_state[:N].fill_(torch.nan)
    a["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    a |= {"checkpoint_state": None, "checkpoint_offsets": None}
    if checkpoints:
        a["checkpoint_state"] = checkpoint_state[:N].fill_(torch.nan)
        a["checkpoint_offsets"] = torch.tensor(checkpoints, dtype=torch.int32, device=device)
    return a


def right_prefill(a):
    names = ("q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias", "lower_bound", "initial_state")
    x = {name: t.detach().cpu() if isinstance(t, torch.Tensor) else t for name, t in a.items()}
    more = {}
    if a["checkpoint_state"] is not None:
        more = {"checkpoint_offsets": x["checkpoint_offsets"], "checkpoint_rows": len(x["checkpoint_state"])}
    return flash_kda.reference(*(x[name] for name in names), x["cu_seqlens"], **more)


def hold_prefill(a):
    device = a["q"].device.type
    out_bar, state_bar = (OUT, STATE) if device == "cpu" else (OUT_GPU, STATE_GPU)
    if a["initial_state"].dtype == BF16:
        state_bar = max(state_bar, 2.2e-3)
    right = right_prefill(a)
    assert error(a["out"], right[0]) <= out_bar
    assert error(a["final_state"], right[1]) <= state_bar
    if a["checkpoint_state"] is not None:
        for n, offset in enumerate(a["checkpoint_offsets"].tolist()):
            row = a["checkpoint_state"][n]
            if offset > 0:
                assert error(row, right[2][n]) <= state_bar
            else:
                assert row.isnan().all(), "a row without a checkpoint was written"


@pytest.mark.parametrize("state", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "checkpoints"),
    [([1], None), ([300], [256]), ([100, 5, 64], None), ([100, 5, 64], [96, 0, 16])],
    ids=str,
)
def test_prefill(device, calls, lengths, checkpoints, state):
    a = prefill(lengths, state=state, device=device, checkpoints=checkpoints, before=3)
    with torch.inference_mode():
        assert torch.ops._flashkda_C.fwd(*a.values()) is None
    assert calls == ["fwd"]
    hold_prefill(a)


def test_prefill_with_gradients_on(calls):
    """The gate's parameters ask for gradients, and the operator has none."""
    a = prefill([20])
    torch.ops._flashkda_C.fwd(*a.values())
    assert calls == ["fwd"]
    hold_prefill(a)


def test_the_longest_sequence_is_known_on_the_host(monkeypatch):
    """From vLLM's metadata of the batch, if it is as vLLM 0.33 has it. A single sequence needs none."""
    cu_seqlens = torch.tensor([0, 100, 116, 149], dtype=torch.int32)
    assert plugin._longest(None, 50) == 0
    assert plugin._longest(cu_seqlens[:2], 100) == 100
    assert plugin._longest(cu_seqlens, 149) == 0, "there is no vLLM here"
    layer = SimpleNamespace(
        non_spec_query_start_loc=cu_seqlens, nums_dict={8: {"nums": torch.tensor([13, 2, 5])}}
    )
    other = SimpleNamespace(non_spec_query_start_loc=cu_seqlens.clone(), nums_dict=None)
    context = SimpleNamespace(attn_metadata={"attention": object(), "other": other, "layer": layer})
    module = SimpleNamespace(get_forward_context=lambda: context)
    monkeypatch.setitem(sys.modules, "vllm.forward_context", module)
    assert plugin._longest(cu_seqlens, 149) == 104
    assert plugin._longest(cu_seqlens, 101) == 101
    assert plugin._longest(cu_seqlens.clone(), 149) == 0, "this is another batch"
    for broken in (None, {}, {8: {}}, {8: {"nums": [13]}}):
        layer.nums_dict = broken
        assert plugin._longest(cu_seqlens, 149) == 0
    context.attn_metadata = None
    assert plugin._longest(cu_seqlens, 149) == 0


@pytest.mark.parametrize("asked", [True, False])
def test_batch_invariance_is_vllm_s(monkeypatch, asked):
    options = []
    monkeypatch.setattr(flash_kda, "fwd", lambda *a, **named: options.append(named))
    monkeypatch.setitem(sys.modules, "vllm.envs", SimpleNamespace(VLLM_BATCH_INVARIANT=asked))
    plugin._is_batch_invariant.cache_clear()
    torch.ops._flashkda_C.fwd(*prefill([20]).values())
    plugin._is_batch_invariant.cache_clear()
    assert options[0]["batch_invariant"] is asked


def test_a_workspace_at_any_address():
    a = prefill([200, 3])
    a["workspace"] = a["workspace"][1:]
    torch.ops._flashkda_C.fwd(*a.values())
    hold_prefill(a)


def test_prefill_writes_nothing_else():
    a = prefill([70, 30], checkpoints=[64, 0])
    before = {name: x.clone() for name, x in a.items() if isinstance(x, torch.Tensor)}
    torch.ops._flashkda_C.fwd(*a.values())
    for name, x in before.items():
        if name not in ("out", "final_state", "checkpoint_state", "workspace"):
            assert torch.equal(a[name], x), name


def test_a_wrong_call_says_what_is_wrong():
    a = prefill([20])
    with pytest.raises(TypeError, match="q has dtype"):
        torch.ops._flashkda_C.fwd(*{**a, "q": a["q"].half()}.values())
    assert not a["out"].any()


# ---- Decode ------------------------------------------------------------------------------------------------


def decode(slots, heads=3, layout="SD", state=F32, device="cpu", gate="bounded", bias=False, norm=True):
    """The arguments of _C::fused_kda_decode by name. x, beta and the output gate are columns of a projection,
    and a page of the cache has the convolution's inputs and the states of a slot, one behind the other.
    layout: SD is vLLM's default, in which a slot has [3, 3 H D], or DS, with [3 H D, 3]."""
    torch.manual_seed(len(slots) + heads)
    N, width = len(slots), heads * DIM

    def normal(*shape, dtype=BF16):
        return torch.randn(*shape).to(device, dtype)

    projected = normal(N + 2, 4 * width + heads + 8)
    x, output_gate, beta, _ = projected.split([3 * width, width, heads, 8], dim=-1)
    pages = max(slots) + 3
    conv_bytes, state_bytes = 9 * width * 2, width * DIM * state.itemsize
    page = torch.zeros(pages, conv_bytes + state_bytes + 256, dtype=torch.uint8, device=device)
    shape = (3, 3 * width) if layout == "SD" else (3 * width, 3)
    conv_state = page[:, :conv_bytes].view(BF16).unflatten(-1, shape)
    states = page[:, conv_bytes : conv_bytes + state_bytes].view(state).unflatten(-1, (heads, DIM, DIM))
    conv_state.copy_(torch.randn(conv_state.shape))
    states.copy_(torch.randn(states.shape))
    out = torch.full((1, N + 2, heads, DIM), torch.nan, dtype=BF16, device=device)
    return {
        "x": x[:N], "weight": normal(3, 4, width, dtype=F32),
        "bias": normal(3 * width, dtype=F32) if bias else None,
        "conv_state": conv_state.transpose(1, 2) if layout == "SD" else conv_state,
        "raw_g": normal(N + 2, width).unflatten(-1, (heads, DIM)).unsqueeze(0)[:, :N],
        "raw_beta": beta.unsqueeze(0)[:, :N], "A_log": torch.nn.Parameter(torch.rand(heads).to(device)),
        "dt_bias": torch.nn.Parameter((torch.randn(width) - 2).to(device)),
        "state_indices": torch.tensor([*slots, 1], dtype=torch.int32, device=device)[:N], "state": states,
        "out": out[:, :N], "lower_bound": -5.0 if gate == "bounded" else None,
        "output_gate": output_gate.unflatten(-1, (heads, DIM))[:N] if norm else None,
        "norm_weight": normal(DIM, dtype=F32) if norm else None, "norm_eps": 1e-5,
    }  # fmt: skip


def right_decode(a):
    """out [N, H, D], the pool and the convolution's inputs, in fp64."""
    x = {name: t.detach().cpu() if isinstance(t, torch.Tensor) else t for name, t in a.items()}
    out, after = flash_kda.decode_layer_reference(
        x["x"], x["weight"], x["bias"], x["conv_state"], x["raw_g"], x["raw_beta"], x["A_log"], x["dt_bias"],
        x["state_indices"], x["state"].contiguous(), lower_bound=x["lower_bound"],
        output_gate=x["output_gate"], norm_weight=x["norm_weight"], norm_eps=x["norm_eps"], first_slot=1,
    )  # fmt: skip
    heads = a["state"].shape[1]
    states, inputs = x["state"].double(), x["conv_state"].clone()
    for n, slot in enumerate(x["state_indices"].tolist()):
        if slot > 0:
            states[slot] = after.reshape(-1, heads, DIM, DIM)[n]
            inputs[slot] = torch.cat([inputs[slot][:, 1:], x["x"][n, :, None]], 1)
    return out.reshape(-1, heads, DIM), states, inputs


def run_decode(a):
    """Calls the operator, and holds all that it writes to the definition."""
    right, states, inputs = right_decode(a)
    before = a["state"].clone()
    with torch.inference_mode():
        assert torch.ops._C.fused_kda_decode(*a.values()) is None
    assert torch.equal(a["conv_state"].cpu(), inputs)
    slots = a["state_indices"].tolist()
    for n, slot in enumerate(slots):
        if slot > 0:
            assert error(a["out"][0, n], right[n]) <= OUT
            assert error(a["state"][slot], states[slot]) <= (STATE if before.dtype == F32 else 2.2e-3)
        else:
            assert not a["out"][0, n].any(), "out of a sequence without a state"
    for slot in set(range(len(before))) - {slot for slot in slots if slot > 0}:
        assert torch.equal(a["state"][slot], before[slot]), f"slot {slot} was touched"


@pytest.mark.parametrize("layout", ["SD", "DS"])
@pytest.mark.parametrize("gate", ["bounded", "softplus"])
@pytest.mark.parametrize("state", [F32, BF16], ids=str)
def test_decode(device, calls, layout, gate, state):
    """Slot 0 and slots below mean that a sequence has no state, as the padding of CUDA graphs has none."""
    a = decode([3, 0, 6, -1, 2], layout=layout, gate=gate, state=state, device=device)
    run_decode(a)
    assert calls == ["decode_layer"]


@pytest.mark.parametrize("heads", [1, 5, 12])
def test_decode_of_any_number_of_heads(device, heads):
    run_decode(decode([2], heads=heads, device=device))


@pytest.mark.parametrize("options", [{"bias": True}, {"norm": False}], ids=str)
def test_options_of_decode(options):
    run_decode(decode([2, 4], **options))


# ---- As operators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["prefill", "decode"])
def test_pytorch_s_own_checks(which):
    """What is written is what the schema says, and tensors without memory can be traced."""
    if which == "prefill":
        operator, a = torch.ops._flashkda_C.fwd.default, apart(prefill([20, 3], checkpoints=[16, 0]))
        a["checkpoint_state"].zero_()
        a["final_state"].zero_()
        a["workspace"] = torch.zeros(flash_kda.get_workspace_size(23, 2, 2) + 64, dtype=torch.uint8)
    else:
        operator, a = torch.ops._C.fused_kda_decode.default, apart(decode([2, 3]))
        a["out"].zero_()
    torch.library.opcheck(operator, tuple(a.values()), test_utils=("test_schema", "test_faketensor"))


def apart(a):
    """The same arguments in memory of their own: PyTorch's compiler takes no two written tensors of one
    buffer that differ in dtype."""
    return {
        name: x.detach().clone(memory_format=torch.contiguous_format) if isinstance(x, torch.Tensor) else x
        for name, x in a.items()
    }


def test_a_compiler_sees_what_the_operators_write():
    a, b = apart(prefill([40])), apart(decode([2, 3]))
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(a, b):
        torch.ops._flashkda_C.fwd(*a.values())
        torch.ops._C.fused_kda_decode(*b.values())
        return a["out"] * 2, b["out"] * 2

    want, states, _ = right_decode(b)
    with torch.no_grad():
        out, step = both(a, b)
    hold_prefill(a)
    assert torch.equal(out, a["out"] * 2)
    assert torch.equal(step, b["out"] * 2)
    assert error(b["out"][0], want) <= OUT
    assert error(b["state"], states) <= STATE


def test_workspace_size():
    size = torch.ops._flashkda_C.get_workspace_size
    assert size(8192, 4, 16) >= flash_kda.get_workspace_size(8192, 4, 16, largest_batch=True)
    assert size(100, 4) == size(100, 4, 1) > 0


# ---- Which implementation computes -------------------------------------------------------------------------

LIBRARIES = []  # registrations last as long as these


def with_theirs(namespace, compute=plugin._fwd, takes=lambda *a: True, schema=plugin.FWD):
    """The plug-in's operator in front of another implementation, which notes its calls in the list that is
    returned, in a namespace of its own."""
    schema = schema.replace("_flashkda_C", namespace)
    theirs = []
    library = torch.library.Library(namespace, "DEF")
    library.define(schema.partition("::")[2])
    library.impl("fwd", lambda *arguments: theirs.append(len(arguments)), "CPU")
    operator = plugin._TensorOperator(schema, takes, compute)
    operator.adopt()
    LIBRARIES.extend([library, operator])
    return getattr(torch.ops, namespace).fwd, theirs


@needs_get_kernel
def test_it_is_in_front_of_vllm_s(calls):
    fwd, theirs = with_theirs("fkda_in_front")
    a = prefill([20])
    fwd(*a.values())
    assert calls == ["fwd"]
    assert not theirs
    hold_prefill(a)


@needs_get_kernel
def test_calls_that_it_leaves_to_vllm(calls):
    """Arguments at their defaults arrive too."""
    fwd, theirs = with_theirs("fkda_leaves", takes=lambda *a: False)
    fwd(*[*prefill([20]).values()][:11])
    assert theirs == [11] or theirs == [16]
    assert not calls


@needs_get_kernel
def test_a_call_that_it_refuses_goes_back_to_vllm(fresh, caplog):
    caplog.set_level(logging.INFO, "vllm.flash_kda")
    fwd, theirs = with_theirs("fkda_refuses")
    a = prefill([20])
    for _ in range(2):
        fwd(*{**a, "lower_bound": -7.0}.values())
    assert len(theirs) == 2
    assert not a["out"].any()
    said = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert len(said) == 1
    assert "gives a call of fkda_refuses::fwd back to vLLM: lower_bound is -7" in said[0]


def test_another_schema_is_left_alone(fresh, caplog):
    """A later vLLM may have another argument. The plug-in says so in one line."""
    namespace = "fkda_another"
    library = torch.library.Library(namespace, "DEF")
    library.define("fwd(Tensor q, Tensor(a!) out, *, bool more=False) -> ()")

    def fill(q, out, more=False):
        out.fill_(7)

    library.impl("fwd", fill, "CPU")
    operator = plugin._TensorOperator(plugin.FWD.replace("_flashkda_C", namespace), None, None)
    caplog.set_level(logging.INFO, "vllm.flash_kda")
    for _ in range(2):
        operator.adopt()
    (record,) = caplog.records
    assert "its schema is not that of vLLM 0.33" in record.getMessage()
    out = torch.zeros(2)
    torch.ops.fkda_another.fwd(torch.zeros(2), out)
    assert (out == 7).all()


def test_a_pytorch_without_what_it_needs(fresh, monkeypatch, caplog):
    """vLLM keeps its implementation, and no layer is told that this package serves it."""
    namespace, theirs = "fkda_old_pytorch", []
    library = torch.library.Library(namespace, "DEF")
    library.define(plugin.FWD.partition("::")[2])
    library.impl("fwd", lambda *arguments: theirs.append(1), "CPU")
    operator = plugin._TensorOperator(plugin.FWD.replace("_flashkda_C", namespace), None, None)
    monkeypatch.delattr(torch.library, "get_kernel", raising=False)
    caplog.set_level(logging.INFO, "vllm.flash_kda")
    _engines.when_there("json", lambda module: operator.adopt(), plugin._log)
    assert operator.library is None
    assert "leaves json as it is" in caplog.text
    torch.ops.fkda_old_pytorch.fwd(*prefill([20]).values())
    assert theirs == [1]


@pytest.mark.parametrize(
    ("kernel", "capability", "prefill", "decode_12", "decode_32"),
    [
        ("hopper", (9, 0), True, False, True),
        ("portable", (9, 0), False, False, True),  # a build without the Hopper kernel
        ("portable", (8, 0), True, True, True),
        ("portable", (10, 0), False, False, True),
        ("portable", (12, 0), False, False, True),
        ("", (7, 5), False, False, False),
    ],
)
def test_which_calls_it_takes(fresh, monkeypatch, kernel, capability, prefill, decode_12, decode_32):
    monkeypatch.setattr(plugin, "_gpu", lambda index: (kernel, capability))
    gpu = torch.device("cuda", 0)
    assert plugin._takes_prefill(gpu) is prefill
    assert plugin._takes_decode(gpu, 12, F32) is decode_12
    assert plugin._takes_decode(gpu, 32, F32) is decode_32
    assert plugin._takes_decode(gpu, 12, BF16) is (kernel != "")
    monkeypatch.setenv(plugin.VARIABLE, "all")
    plugin.register()
    assert plugin._takes_prefill(gpu) is plugin._takes_decode(gpu, 12, F32) is (kernel != "")


# ---- How vLLM gets it --------------------------------------------------------------------------------------


def kimi_k3(**changes):
    """A module with the functions that vLLM's layer asks, which say no."""

    def is_flashkda_supported(head_dim, input_dtype, recurrent_state_dtype, lower_bound):
        return False

    def is_fused_kda_decode_supported(
        num_heads, head_dim, conv_width, num_spec, input_dtype, conv_state_dtype, recurrent_state_dtype
    ):
        return False

    functions = {f.__name__: f for f in (is_flashkda_supported, is_fused_kda_decode_supported)}
    return SimpleNamespace(__name__="kda", **{**functions, **changes})


def test_layers_that_it_can_serve(fresh, monkeypatch):
    module = kimi_k3()
    plugin._adopt_kimi_k3(module)
    floats = BF16, BF16, F32
    assert not module.is_flashkda_supported(128, BF16, F32, -5.0), "there is no GPU here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(plugin, "_gpu", lambda index: ("portable", (8, 0)))
    monkeypatch.setattr(plugin, "_make_prefill_there", lambda: True)
    assert module.is_flashkda_supported(128, BF16, F32, -5.0)
    for wrong in ((64, BF16, F32, -5.0), (128, F32, F32, -5.0), (128, BF16, F32, None), (128, BF16, F32, -6)):
        assert not module.is_flashkda_supported(*wrong)
    assert module.is_fused_kda_decode_supported(32, 128, 4, 0, *floats)
    for wrong in ((32, 64, 4, 0), (32, 128, 3, 0), (32, 128, 4, 1)):
        assert not module.is_fused_kda_decode_supported(*wrong, *floats)


def test_a_vllm_without_the_module_of_the_operators(monkeypatch):
    """The layers import the module, and find an empty one. A module that cannot be loaded stays as it is."""
    monkeypatch.delitem(sys.modules, "vllm._flashkda_C", raising=False)
    assert plugin._make_prefill_there()
    assert sys.modules["vllm._flashkda_C"].__name__ == "vllm._flashkda_C"
    del sys.modules["vllm._flashkda_C"]

    def broken(name):
        raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(plugin.importlib, "import_module", broken)
    assert not plugin._make_prefill_there()
    assert "vllm._flashkda_C" not in sys.modules


def test_a_layer_with_other_functions_is_left_alone(fresh, caplog):
    def is_flashkda_supported(head_dim, another):
        return False

    caplog.set_level(logging.INFO, "vllm.flash_kda")
    module = kimi_k3(is_flashkda_supported=is_flashkda_supported)
    plugin._adopt_kimi_k3(module)
    assert module.is_flashkda_supported is is_flashkda_supported
    (record,) = caplog.records
    assert "kda.is_flashkda_supported takes other arguments" in record.getMessage()


def test_an_engine_that_cannot_be_changed_goes_on(fresh, caplog):
    """What a plug-in raises becomes a line of the log, not an error in the middle of the engine's import."""

    def adopt(module):
        raise KeyError("nothing is as it was")

    caplog.set_level(logging.INFO, "vllm.flash_kda")
    _engines.when_there("json", adopt, plugin._log)
    (record,) = caplog.records
    assert "leaves json as it is" in record.getMessage()


@pytest.mark.parametrize("value", ["0", "off", "False"])
def test_it_can_be_turned_off(fresh, monkeypatch, value):
    monkeypatch.setenv(plugin.VARIABLE, value)
    before = list(sys.meta_path)
    plugin.register()
    assert sys.meta_path == before


def test_registering_changes_nothing_before_vllm_is_imported(fresh):
    before = set(sys.modules)
    plugin.register()
    plugin.register()
    assert not {name for name in set(sys.modules) - before if name.startswith("vllm")}


def test_entry_points():
    if sys.version_info < (3, 11):
        tomllib = pytest.importorskip("tomli")
    else:
        import tomllib
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = settings["project"]["entry-points"]
    assert groups == {
        "vllm.general_plugins": {"flash_kda": "flash_kda.vllm:register"},
        "sglang.srt.plugins": {"flash_kda": "flash_kda.sglang:register"},
    }


# ---- vLLM 0.33.0 itself ------------------------------------------------------------------------------------


def release():
    folder = releases.find("vllm")
    if folder is None:
        pytest.skip(f"there are no modules of vLLM {releases.VERSIONS['vllm']}: {releases.FETCH} vllm")
    return folder


@pytest.mark.parametrize(
    ("library", "schema"),
    [
        ("_flashkda_C.abi3.so", plugin.FWD),
        ("_flashkda_C.abi3.so", plugin.WORKSPACE_SIZE),
        ("_C_stable_libtorch.abi3.so", plugin.DECODE),
    ],
)
def test_schemas_are_those_of_the_wheel(library, schema):
    """The compiled library has the schema as a string."""
    data = (release() / "vllm" / library).read_bytes()
    namespace, _, text = schema.partition("::")
    name = text.partition("(")[0]
    found = re.findall(rb"\x00(" + name.encode() + rb"\([ -~]*\) -> [ -~]*)\x00", data)
    assert len(found) == 1
    theirs = torch._C.parse_schema(f"{namespace}::{found[0].decode()}")
    assert plugin._looks(theirs) == plugin._looks(torch._C.parse_schema(schema))


def test_the_triton_kernels_can_be_imported_alone():
    """What benchmarks/serving.py times on a GPU."""
    release()
    pytest.importorskip("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the modules warn where there is no GPU
        with releases.vllm_kernels() as found:
            assert {"chunk_kda_with_fused_gate", "fused_recurrent_kda_packed_decode"} <= set(found)


@pytest.mark.slow
def test_in_vllm_s_own_layer(tmp_path):
    """vllm_calls.py. vLLM's extension modules need the driver's library, even where none of it is called."""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(flash_kda.__path__[0])}
    environment.pop(plugin.VARIABLE, None)
    folder = release()
    pytest.importorskip("triton")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        if not shutil.which("cc"):
            pytest.skip("there is neither a driver nor a C compiler")
        (tmp_path / "empty.c").write_text("extern int flash_kda_nothing;\n")
        library = tmp_path / "libcuda.so.1"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, tmp_path / "empty.c"],
            check=True,
        )
        environment["LD_LIBRARY_PATH"] = f"{tmp_path}:{environment.get('LD_LIBRARY_PATH', '')}"
    script = [sys.executable, "-W", "ignore", Path(__file__).with_name("vllm_calls.py"), folder]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    if "cannot open shared object" in done.stderr:
        pytest.skip(f"vLLM's operators cannot be loaded here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("ok\n")
    for name in ("_flashkda_C::fwd", "_C::fused_kda_decode"):
        assert f"flash_kda: computes {name} on cpu" in done.stdout


def captured(call):
    """The graph of a call that allocates nothing."""

    def allocations():
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    with torch.inference_mode():
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            before = allocations()
            call()
            assert allocations() == before
    return graph


def test_in_a_cuda_graph(cuda):
    """A replay takes the slots that the tensor holds then, and nothing is allocated."""
    a = decode([3, 0, 6, -1, 2], device=cuda)
    operator = torch.ops._C.fused_kda_decode
    graph = captured(lambda: operator(*a.values()))
    a["state_indices"].copy_(torch.tensor([0, 2, 3, 6, 5], dtype=torch.int32))
    want, states, inputs = right_decode(a)
    graph.replay()
    assert error(a["out"][0], want) <= OUT
    assert error(a["state"], states) <= STATE
    assert torch.equal(a["conv_state"].cpu(), inputs)


def test_prefill_in_a_cuda_graph(cuda):
    a = prefill([100, 60, 40], device=cuda)
    graph = captured(lambda: torch.ops._flashkda_C.fwd(*a.values()))
    a["cu_seqlens"].copy_(torch.tensor([0, 10, 150, 200], dtype=torch.int32))
    graph.replay()
    hold_prefill(a)
