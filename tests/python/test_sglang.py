"""SGLang's plug-in: its kernel class with tensors as SGLang's backend builds them, and how SGLang gets it.

Most tests run twice: in front of a class that only notes which calls it gets, and in front of the Triton
class of SGLang 0.5.23, if scripts/fetch_engines.py has fetched it.
"""

import contextlib
import enum
import importlib
import importlib.metadata
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import flash_kda

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from peer_timing import releases  # noqa: E402

from flash_kda import _engines  # noqa: E402
from flash_kda import sglang as plugin  # noqa: E402
from sglang_batches import DIM, OUT, STATE, Batch, error, hold_extend  # noqa: E402

LINEAR = "sglang.srt.layers.attention.linear"
FUNCTIONS = ("extend", "decode", "packed_decode", "target_verify")


def modules(folder, cpu=True, **given):
    """The modules of SGLang that are about KDA. cpu: SGLang is told that it runs on a CPU, and imports no
    Triton kernels then."""
    real = (f"{LINEAR}", "sglang.srt.plugins", "sglang.srt.environ")
    platform = {name: lambda: False for name in ("is_cuda", "is_hip", "is_npu", "is_xpu")}
    utils = {**platform, "is_cpu": lambda: cpu}
    return releases.alone(folder, real, {"sglang.srt.utils": utils, "sglang.srt.utils.common": {}, **given})


class Behind:
    """Stands for SGLang's Triton class, and notes the calls that it gets."""

    def __init__(self):
        self.calls = []

    def _note(self, name):
        self.calls.append(name)
        return name

    def extend(self, q, k, v, g, beta, *, ssm_states, cache_indices, query_start_loc, A_log=None,
               dt_bias=None, lower_bound=None, beta_is_raw=False, return_intermediate_states=False,
               **kwargs):  # fmt: skip
        return self._note("extend")

    def decode(self, q, k, v, a, b, *, A_log, dt_bias, ssm_states, cache_indices, query_start_loc,
               lower_bound=None, **kwargs):  # fmt: skip
        return self._note("decode")

    def packed_decode(self, mixed_qkv, a, b, *, A_log, dt_bias, scale, ssm_states, cache_indices, num_v_heads,
                      head_v_dim, lower_bound=None, **kwargs):  # fmt: skip
        return self._note("packed_decode")

    def target_verify(self, A_log, dt_bias, q, k, v, a, b, *, ssm_states, cache_indices, query_start_loc,
                      intermediate_states_buffer, intermediate_state_indices, cache_steps,
                      retrieve_parent_token, lower_bound=None, cache_ring=False, replayssm_rawv=None,
                      replayssm_rawk=None, replayssm_g=None, replayssm_beta=None, **kwargs):  # fmt: skip
        return self._note("target_verify")


def release():
    folder = releases.find("sglang")
    if folder is None:
        pytest.skip(f"there are no modules of SGLang {releases.VERSIONS['sglang']}: {releases.FETCH} sglang")
    return folder


@pytest.fixture(params=["stand-in", "release"])
def kernel(request, monkeypatch):
    """An object of the class that SGLang gets. Its list `calls` has the calls that went to Triton."""
    if request.param == "stand-in":
        yield plugin.kernel_class(Behind)()
        return
    with modules(release()):
        triton = importlib.import_module(plugin.TRITON).TritonKDAKernel
        made = plugin.kernel_class(triton)()
        made.calls = []
        for name in FUNCTIONS:
            monkeypatch.setattr(triton, name, lambda self, *a, name=name, **k: self.calls.append(name))
        yield made


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has loaded no plug-in yet."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "_steps", plugin._ALL_STEPS)
    monkeypatch.setattr(plugin, "_log", _engines.Log("sglang.flash_kda"))
    monkeypatch.delenv(plugin.VARIABLE, raising=False)


# ---- extend ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["bounded", "softplus"])
@pytest.mark.parametrize("lengths", [[1], [63, 64, 65], [5, 0, 130, 1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extend_in_place_for_every_length_and_gate(kernel, gate, lengths, dtype):
    batch = Batch(lengths, gate=gate, dtype=dtype)
    before, right = batch.pool.clone(), batch.right()
    out = kernel.extend(**batch.prompt())
    assert not kernel.calls
    hold_extend(batch, before, out, right)


def test_extend_beyond_2048_tokens(kernel):
    batch = Batch([2100], heads=1)
    before, right = batch.pool.clone(), batch.right()
    hold_extend(batch, before, kernel.extend(**batch.prompt()), right)
    assert not kernel.calls


def test_extend_without_a_slot(kernel):
    """Padding sequences have index -1: they start from zeros, and no slot is written."""
    batch = Batch([20, 30, 40], slots=[5, -1, 0])
    before, right = batch.pool.clone(), batch.right()
    hold_extend(batch, before, kernel.extend(**batch.prompt()), right)
    assert not kernel.calls


@pytest.mark.parametrize("lengths_known", [True, False])
def test_extend_writes_tracked_states(kernel, lengths_known):
    batch = Batch([130, 70, 64])
    before, right = (
        batch.pool.clone(),
        batch.right(checkpoint_offsets=torch.tensor([128, 64, -64]), checkpoint_rows=3),
    )
    call = batch.prompt()
    track_state = torch.full((3, batch.heads, DIM, DIM), torch.nan)
    call |= {
        "return_intermediate_states": True,
        "track_state": track_state,
        "track_chunk_idx": torch.tensor([2, 1, -1], dtype=torch.int32),
        "track_ssm_h_src": torch.tensor([2, 4]),
        "track_ssm_h_batch_src": torch.tensor([0, 1]),
    }
    if not lengths_known:
        call["extend_seq_lens_cpu"] = None
    out, h = kernel.extend(**call)
    assert h is None
    assert not kernel.calls
    hold_extend(batch, before, out, right)
    for row in (0, 1):
        assert error(track_state[row], right[2][row]) <= STATE
    assert track_state[2].isnan().all(), "a row that is not tracked was written"


def test_extend_tracks_the_end_of_a_sequence_by_its_slot(kernel):
    """Where all tracked lengths are multiples of 64, SGLang reads the pool, and no states before chunks."""
    batch = Batch([128])
    call = batch.prompt()
    call |= {"return_intermediate_states": True, "track_ssm_h_src": torch.empty(0, dtype=torch.int64)}
    out, h = kernel.extend(**call)
    assert h is None
    assert out.shape == batch.v.shape
    assert not kernel.calls


def test_extend_on_the_tables_of_a_graph(kernel):
    """In a prefill CUDA graph the lengths are on the device alone. Padding sequences are empty, with index
    -1, and tokens behind the last sequence are padding."""
    batch = Batch([40, 70, 0, 0], slots=[4, 6, -1, -1], tail=18)
    before, right = batch.pool.clone(), batch.right()
    call = batch.prompt()
    call |= {
        "extend_seq_lens_cpu": None,
        "track_state": torch.full((4, batch.heads, DIM, DIM), torch.nan),
        "track_chunk_idx": torch.tensor([-1, 1, -1, -1], dtype=torch.int32),
        "chunk_indices": torch.zeros(9, 2, dtype=torch.int32),
        "chunk_offsets": torch.zeros(5, dtype=torch.int32),
    }
    out = kernel.extend(**call)
    assert not kernel.calls
    hold_extend(batch, before, out, right)
    tracked = batch_state_after(batch, before, 1, 64)
    assert error(call["track_state"][1], tracked) <= STATE
    assert call["track_state"][[0, 2, 3]].isnan().all()


def batch_state_after(batch, pool, n, tokens):
    """The state of sequence n after some tokens, in fp64."""
    begin = int(batch.query_start_loc[n])
    part = slice(begin, begin + tokens)
    inputs = (x[:, part] for x in (batch.q, batch.k, batch.v, batch.gate, batch.beta))
    slot = int(batch.cache_indices[n])
    _, state = flash_kda.reference(
        *inputs, DIM**-0.5, batch.A_log.detach(), batch.dt_bias.detach(), batch.lower_bound,
        pool[slot : slot + 1].contiguous(),
    )  # fmt: skip
    return state[0]


@pytest.mark.parametrize("asked", [True, False])
def test_determinism_is_sglang_s(monkeypatch, asked):
    execution = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=asked))
    context = SimpleNamespace(get_exec=lambda: execution)
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
    options = []
    monkeypatch.setattr(flash_kda, "fwd", lambda *a, **named: options.append(named))
    plugin.kernel_class(Behind)().extend(**Batch([20]).prompt())
    assert options[0]["batch_invariant"] is asked


def test_extend_with_an_activated_gate_and_beta(kernel):
    batch = Batch([100])
    before = batch.pool.clone()
    g = -torch.rand(batch.gate.shape)
    beta = torch.rand(batch.beta.shape)
    call = batch.prompt()
    call |= {"g": g, "beta": beta, "beta_is_raw": False, "A_log": None, "dt_bias": None, "lower_bound": None}
    want, state = flash_kda.reference(
        batch.q, batch.k, batch.v, g, beta, DIM**-0.5, None, None, None, batch.pool, batch.query_start_loc,
        state_indices=batch.cache_indices, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False,
    )  # fmt: skip
    hold_extend(batch, before, kernel.extend(**call), (want, state))
    assert not kernel.calls


# ---- decode ------------------------------------------------------------------------------------------------


def hold_decode(batch, before, out, right):
    want, states = right
    for n, slot in enumerate(batch.cache_indices.tolist()):
        if slot >= 0:
            assert error(out[0, n], want[n, 0]) <= OUT
            bar = STATE if before.dtype == torch.float32 else 2.2e-3
            assert error(batch.pool[slot], states[n, 0]) <= bar
        else:
            assert not out[0, n].any()
    written = {slot for slot in batch.cache_indices.tolist() if slot >= 0}
    for slot in set(range(len(before))) - written:
        assert torch.equal(batch.pool[slot], before[slot])


@pytest.mark.parametrize("gate", ["bounded", "softplus"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode(kernel, packed, gate, dtype):
    batch = Batch([1] * 5, gate=gate, dtype=dtype, slots=[4, -1, 0, 7, 2])
    before, right = batch.pool.clone(), batch.right_drafts(1)
    if packed:
        out = kernel.packed_decode(
            mixed_qkv=batch.mixed_qkv, a=batch.flat_gate, b=batch.beta, scale=DIM**-0.5,
            ssm_states=batch.pool, cache_indices=batch.cache_indices, num_v_heads=batch.heads, head_v_dim=DIM,
            replayssm_d=None, replayssm_write_pos=None, replayssm_force_flush=None, **batch.of_gate(),
        )  # fmt: skip
    else:
        out = kernel.decode(
            batch.q, batch.k, batch.v, batch.flat_gate, batch.beta, **batch.of_gate(), **batch.states()
        )
    assert not kernel.calls
    assert out.shape == (1, 5, batch.heads, DIM)
    hold_decode(batch, before, out, right)


@pytest.mark.parametrize(
    "shape", [(5, 2 * DIM), (5, 2, DIM), (1, 5, 2 * DIM), (1, 5, 2, DIM), (5, 1, 2 * DIM)]
)
def test_shapes_of_the_gate(kernel, shape):
    batch = Batch([1] * 5)
    right = batch.right_drafts(1)
    before = batch.pool.clone()
    out = kernel.packed_decode(
        batch.mixed_qkv, batch.flat_gate.reshape(shape), batch.beta, scale=DIM**-0.5, ssm_states=batch.pool,
        cache_indices=batch.cache_indices, num_v_heads=2, head_v_dim=DIM, **batch.of_gate(),
    )  # fmt: skip
    hold_decode(batch, before, out, right)


# ---- target_verify -----------------------------------------------------------------------------------------


def verify(kernel, batch, drafts, rows, steps, parents=None, **more):
    """Calls target_verify, and returns out and the buffer, of which NaN says what was not written."""
    buffer = torch.full((rows, steps, batch.heads, DIM, DIM), torch.nan)
    out = kernel.target_verify(
        A_log=batch.A_log, dt_bias=batch.dt_bias, q=batch.q, k=batch.k, v=batch.v, a=batch.flat_gate,
        b=batch.beta, **batch.states(), intermediate_states_buffer=buffer,
        intermediate_state_indices=torch.arange(rows, dtype=torch.int32), cache_steps=drafts,
        retrieve_parent_token=parents, lower_bound=batch.lower_bound, **more,
    )  # fmt: skip
    return out, buffer


@pytest.mark.parametrize("gate", ["bounded", "softplus"])
@pytest.mark.parametrize("tree", [False, True])
def test_verify_of_chains_and_trees(kernel, tree, gate):
    """The pool stays as it is, and each draft token's state goes to the buffer, in which there is room for
    more steps and rows."""
    drafts = 4
    batch = Batch([drafts] * 3, gate=gate, slots=[6, -1, 2])
    before = batch.pool.clone()
    given = right = None
    if tree:
        right = torch.tensor([[-1, 0, 0, 2], [-1, 0, 1, 2], [-1, 0, 0, 0]])
        given = right.clone()
        given[:, 0] = 7  # what SGLang's convolution leaves there means nothing
    want, states = batch.right_drafts(drafts, right)
    out, buffer = verify(kernel, batch, drafts, rows=5, steps=6, parents=given)
    assert not kernel.calls
    assert torch.equal(batch.pool, before), "the pool was written"
    for n in (0, 2):
        assert error(out[0, n * drafts : (n + 1) * drafts], want[n]) <= OUT
        for i in range(drafts):
            assert error(buffer[n, i], states[n, i]) <= STATE
    assert not out[0, drafts : 2 * drafts].any(), "out of a sequence without a state"
    assert buffer[1].isnan().all()
    assert buffer[:, drafts:].isnan().all()
    assert buffer[3:].isnan().all()
    assert given is None or (given[:, 0] == 7).all(), "SGLang's table was written"


def test_verify_of_sequences_of_different_lengths(kernel):
    """A compact batch: fewer drafts for some requests, and tokens behind them that belong to none."""
    batch = Batch([3, 1, 4], tail=4)
    before = batch.pool.clone()
    out, buffer = verify(kernel, batch, 4, rows=3, steps=4)
    assert not kernel.calls
    assert torch.equal(batch.pool, before)
    for n, length in enumerate(batch.lengths):
        begin = int(batch.query_start_loc[n])
        for i in range(length):
            assert error(buffer[n, i], batch_state_after(batch, before, n, i + 1)) <= STATE
        assert buffer[n, length:].isnan().all()
        part = out[0, begin : begin + length]
        assert error(part, reference_out(batch, before, n)) <= OUT


def reference_out(batch, pool, n):
    begin, end = batch.query_start_loc[n : n + 2].tolist()
    slot = int(batch.cache_indices[n])
    inputs = (x[:, begin:end] for x in (batch.q, batch.k, batch.v, batch.gate, batch.beta))
    out, _ = flash_kda.reference(
        *inputs, DIM**-0.5, batch.A_log.detach(), batch.dt_bias.detach(), batch.lower_bound,
        pool[slot : slot + 1].contiguous(),
    )  # fmt: skip
    return out[0]


# ---- What stays with Triton --------------------------------------------------------------------------------


def test_what_stays_with_triton(kernel, caplog):
    caplog.set_level(logging.INFO, "sglang.flash_kda")
    batch = Batch([70])
    before = batch.pool.clone()
    for change in (
        {"is_spec_decode": True},
        {"return_intermediate_states": True},
        {"return_intermediate_states": True, "track_ssm_h_src": torch.tensor([1])},
        {"an_argument_of_a_later_release": 1},
        {"q": batch.q.half()},
        {"lower_bound": -7.0},
    ):
        kernel.calls.clear()
        kernel.extend(**{**batch.prompt(), **change})
        assert kernel.calls == ["extend"], change
    batch = Batch([4])
    for more in ({"cache_ring": True}, {"fused_accept_state_indices": torch.zeros(1)}):
        kernel.calls.clear()
        verify(kernel, batch, 4, rows=1, steps=4, **more)
        assert kernel.calls == ["target_verify"], more
    kernel.calls.clear()
    verify(kernel, Batch([17]), 17, rows=1, steps=17)
    assert kernel.calls == ["target_verify"]
    assert torch.equal(Batch([70]).pool, before)


def test_a_device_without_a_kernel_stays_with_triton(kernel, monkeypatch):
    monkeypatch.setattr(plugin._fla, "why_not_on", lambda kind, index: "there is no kernel")
    kernel.extend(**Batch([70]).prompt())
    assert kernel.calls == ["extend"]


# ---- How SGLang gets the class -----------------------------------------------------------------------------


def test_known_parameters_are_those_of_the_stand_in():
    assert not _engines.differing(Behind, plugin.KNOWN)


def test_it_knows_the_release():
    with modules(release()):
        triton = importlib.import_module(plugin.TRITON).TritonKDAKernel
        assert not _engines.differing(triton, plugin.KNOWN)
        theirs = importlib.import_module(plugin.FLASHKDA).FlashKDAKernel
        assert set(plugin.KNOWN["extend"]) - {"kwargs"} <= {
            *_engines.parameters_of(theirs.extend),
        }, "the class that is replaced takes other arguments"


def test_the_class_is_replaced_in_the_release(fresh, monkeypatch):
    """SGLang's own function loads the plug-in, and SGLang's own registry of hooks replaces the class, once
    SGLang imports the class's module."""
    point = importlib.metadata.EntryPoint("flash_kda", "flash_kda.sglang:register", "sglang.srt.plugins")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point] if group == point.group else []
    )
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    with modules(release()):
        importlib.import_module("sglang.srt.plugins").load_plugins()
        assert plugin._registered
        assert plugin.FLASHKDA not in sys.modules, "the plug-in imports SGLang's kernels by itself"
        module = importlib.import_module(plugin.FLASHKDA)
        base = importlib.import_module(plugin.TRITON).TritonKDAKernel
        made = module.FlashKDAKernel()
        assert isinstance(made, plugin.FlashKDA)
        assert isinstance(made, base)
        batch = Batch([70])
        before, right = batch.pool.clone(), batch.right()
        hold_extend(batch, before, made.extend(**batch.prompt()), right)


class Mode(enum.Enum):
    EXTEND, DECODE, VERIFY = range(3)

    def is_target_verify(self):
        return self is Mode.VERIFY

    def is_draft_extend_v2(self):
        return False


@contextlib.contextmanager
def backend_of(chosen, prefill="FLASHKDA"):
    """SGLang's own backend of KDA layers, with its own dispatcher, on the CPU. The convolutions in front of
    the kernels give back what they get."""
    given = {
        "msgspec": {"Struct": type("Struct", (), {"__init_subclass__": classmethod(lambda cls, **_: None)})},
        "sgl_kernel.mamba": {"causal_conv1d_update_cpu": lambda x, *_, **__: x},
        "sglang.kernels.ops.mamba.causal_conv1d_triton": {
            "causal_conv1d_fn": lambda x, *_, **__: x,
            "CAUSAL_CONV1D_FWD_BLOCK_M": 8,
            "PAD_SLOT_ID": -1,
        },
        "sglang.srt.utils.common": {"rank0_log": lambda *_: None, "is_gfx95_supported": lambda: False},
    }
    with modules(release(), **given):
        plugin.register()
        module = importlib.import_module(plugin.BACKEND)
        kinds = importlib.import_module(f"{LINEAR}.utils").LinearAttnKernelBackend
        dispatcher = module.KDAKernelDispatcher(kinds.TRITON, kinds[prefill], kinds.TRITON)
        backend = object.__new__(module.KDAAttnBackend)
        backend.kernel_dispatcher = dispatcher
        backend.accept_lens_pool = backend._fused_chain_verify_fn = None
        chosen |= {step: getattr(dispatcher, f"{step}_kernel") for step in ("extend", "decode", "verify")}
        yield backend


def layer_of(batch):
    dims = dict.fromkeys(("head_q_dim", "head_k_dim", "head_v_dim"), DIM)
    dims |= dict.fromkeys(("q_dim", "k_dim", "v_dim"), batch.heads * DIM)
    dims |= dict.fromkeys(("num_q_heads", "num_k_heads", "num_v_heads"), batch.heads)
    return SimpleNamespace(
        layer_id=0, A_log=batch.A_log, dt_bias=batch.dt_bias, lower_bound=batch.lower_bound, bias=None,
        conv_weights=torch.zeros(3 * batch.heads * DIM, 4), **dims,
    )  # fmt: skip


def prepare(backend, batch, **metadata):
    """Gives the backend the batch's pool and tables."""
    cache = SimpleNamespace(
        conv=[torch.zeros(len(batch.pool), 3, 3 * batch.heads * DIM, dtype=torch.bfloat16)],
        temporal=batch.pool, replayssm_d=None, replayssm_k=None, replayssm_g=None,
        intermediate_ssm=torch.full((9, 5, batch.heads, DIM, DIM), torch.nan),
        intermediate_conv_window=[torch.zeros(9, 5, 3, 3 * batch.heads * DIM, dtype=torch.bfloat16)],
    )  # fmt: skip
    backend.req_to_token_pool = SimpleNamespace(mamba2_layer_cache=lambda layer: cache, size=8)
    backend.verify_intermediate_state_indices = torch.arange(9, dtype=torch.int32)
    tables = dict.fromkeys(
        ("retrieve_next_token", "retrieve_next_sibling", "retrieve_parent_token", "track_chunk_idx",
         "track_ssm_h_src", "track_ssm_h_batch_src", "state_checkpoint_cu_starts",
         "state_checkpoint_indices", "mamba_track_mask_indices")
    )  # fmt: skip
    tables |= {
        "num_state_checkpoints": 0,
        "state_checkpoint_every_n_tokens": 0,
        "has_mamba_track_mask": False,
    }
    tables |= {"query_start_loc": batch.query_start_loc, "mamba_cache_indices": batch.cache_indices}
    tables |= {"logical_num_tokens": sum(batch.lengths), **metadata}
    backend.forward_metadata = SimpleNamespace(**tables)
    backend._track_mamba_state_decode = lambda *_: None
    return cache


def test_the_release_s_backend_uses_it_for_everything(fresh, monkeypatch):
    """SGLang's forward passes, up to the kernels, through SGLang's own dispatcher."""
    chosen = {}
    with backend_of(chosen) as backend:
        assert all(isinstance(x, plugin.FlashKDA) for x in chosen.values()), chosen
        # extend, with more physical tokens than sequences have, and one tracked state
        batch = Batch([130, 20], tail=6)
        before, right = batch.pool.clone(), batch.right()
        tracked = []
        backend._track_mamba_state_extend = lambda *_, h_track_buf: tracked.append(h_track_buf)
        prepare(
            backend, batch, has_mamba_track_mask=True,
            track_chunk_idx=torch.tensor([2, -1], dtype=torch.int32),
            track_ssm_h_src=torch.tensor([2]), track_ssm_h_batch_src=torch.tensor([0]),
            conv_states_mask_indices=torch.tensor([0]), track_conv_indices=torch.tensor([[0, 1, 2]]),
        )  # fmt: skip
        forward = SimpleNamespace(
            forward_mode=Mode.EXTEND, extend_prefix_lens=torch.zeros(2), extend_seq_lens_cpu=[130, 20]
        )
        out = backend.forward_extend(layer_of(batch), forward, batch.mixed_qkv, batch.gate, batch.beta)
        hold_extend(batch, before, out, right)
        assert not out[:, 150:].any()
        assert error(tracked[0][0], batch_state_after(batch, before, 0, 128)) <= STATE
        # the same without a tracked state: SGLang takes the kernel's result as it is
        batch = Batch([130, 20])
        before, right = batch.pool.clone(), batch.right()
        prepare(backend, batch)
        out = backend.forward_extend(layer_of(batch), forward, batch.mixed_qkv, batch.gate, batch.beta)
        hold_extend(batch, before, out, right)
        # decode
        batch = Batch([1] * 3)
        before, right = batch.pool.clone(), batch.right_drafts(1)
        prepare(backend, batch)
        forward.forward_mode = Mode.DECODE
        out = backend.forward_decode(layer_of(batch), forward, batch.mixed_qkv, batch.flat_gate, batch.beta)
        hold_decode(batch, before, out, right)
        # verify
        batch = Batch([4] * 2)
        before, (want, states) = batch.pool.clone(), batch.right_drafts(4)
        cache = prepare(backend, batch)
        forward.forward_mode = Mode.VERIFY
        forward.req_pool_indices = torch.arange(2)
        forward.spec_info = SimpleNamespace(draft_token_num=4, ragged_verify_layout=None)
        monkeypatch.setattr(backend, "_can_run_dspark_cutedsl_mtp", lambda **_: False)
        select = {"select_verify_intermediate_state_indices": lambda indices, *_: indices}
        monkeypatch.setattr(sys.modules[plugin.BACKEND], *select.popitem())
        out = backend.forward_extend(layer_of(batch), forward, batch.mixed_qkv, batch.flat_gate, batch.beta)
        assert error(out[0], want.flatten(0, 1)) <= OUT
        assert error(cache.intermediate_ssm[:2, :4], states) <= STATE
        assert torch.equal(batch.pool, before)


def test_another_backend_keeps_its_kernels(fresh):
    chosen = {}
    with backend_of(chosen, prefill="TRITON"):
        assert not any(isinstance(x, plugin.FlashKDA) for x in chosen.values())


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        ("prefill", {"extend"}),
        ("prefill, Decode", {"extend", "decode"}),
        ("prefill,verify", {"extend", "verify"}),
        ("1", {"extend"}),
    ],
)
def test_steps_that_stay_with_sglang(fresh, monkeypatch, caplog, value, taken):
    caplog.set_level(logging.INFO, "sglang.flash_kda")
    monkeypatch.setenv(plugin.VARIABLE, value)
    chosen = {}
    with backend_of(chosen):
        assert {step for step, x in chosen.items() if isinstance(x, plugin.FlashKDA)} == taken
    said = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert said == (["flash_kda: does not know '1' in FLASH_KDA_SGLANG"] if value == "1" else [])


def test_it_can_be_turned_off(fresh, monkeypatch):
    monkeypatch.setenv(plugin.VARIABLE, "0")
    before = list(sys.meta_path)
    plugin.register()
    assert sys.meta_path == before
    chosen = {}
    if releases.find("sglang"):
        with backend_of(chosen):
            assert not any(isinstance(x, plugin.FlashKDA) for x in chosen.values())


def test_another_signature_is_left_alone(fresh, caplog):
    class Changed(Behind):
        def decode(self, q, k, v, a, b, *, another):
            return None

    hooks = []
    registry = SimpleNamespace(register=lambda *a: hooks.append(a), apply_hooks=lambda: None)
    given = {
        "sglang.srt.plugins.hook_registry": {
            "HookRegistry": registry,
            "HookType": SimpleNamespace(REPLACE=1),
        },
        plugin.TRITON: {"TritonKDAKernel": Changed},
        plugin.FLASHKDA: {"FlashKDAKernel": Behind},
    }
    with releases.alone(Path(), (), given):
        caplog.set_level(logging.INFO, "sglang.flash_kda")
        plugin._adopt_kernel(importlib.import_module(plugin.FLASHKDA))
        plugin._adopt_kernel(importlib.import_module(plugin.FLASHKDA))
    assert not hooks
    (record,) = caplog.records
    assert "Changed.decode takes other arguments" in record.getMessage()


# ---- Beside SGLang's Triton kernels ------------------------------------------------------------------------


@pytest.mark.slow
def test_decode_and_verify_beside_interpreted_triton():
    """sglang_interpreted.py. SGLang's own kernels, on the CPU."""
    release()
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(flash_kda.__path__[0])}
    script = [sys.executable, Path(__file__).with_name("sglang_interpreted.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ok\n")


def test_the_triton_kernels_can_be_imported_alone():
    """What the tests below run on a GPU, and benchmarks/serving.py too."""
    release()
    pytest.importorskip("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the modules warn where there is no GPU
        with releases.sglang_kernels() as triton:
            assert not _engines.differing(triton, plugin.KNOWN)


def both(batch, call):
    """What the plug-in's class and SGLang's Triton class give for a call, and their pools."""
    pool = batch.pool.clone()
    release()
    with releases.sglang_kernels() as triton, torch.inference_mode():
        theirs, ours = triton(), plugin.kernel_class(Behind)()
        for kernel in (ours, theirs):
            batch.pool = pool.clone()
            yield kernel is ours, call(kernel, batch), batch.pool
        assert not ours.calls


@pytest.mark.parametrize("gate", ["bounded", "softplus"])
@pytest.mark.parametrize("lengths", [[1], [63, 64, 65], [700, 30, 2100]], ids=str)
def test_extend_beside_triton(cuda, gate, lengths):
    """Both against fp64: the plug-in's error is within its bars, and not above Triton's."""
    triton = pytest.importorskip("triton")
    if tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 9):
        pytest.skip("SGLang 0.5.23's kernels for prefill need block pointers, which Triton 3.9 has removed")
    batch = Batch(lengths, heads=4, gate=gate, device=cuda)
    want, states = batch.right()
    errors = {}
    for is_ours, out, pool in both(batch, lambda kernel, batch: kernel.extend(**batch.prompt())):
        slots = batch.cache_indices.long()
        errors[is_ours] = error(out, want), error(pool[slots], states)
    assert errors[True][0] <= 5.6e-3
    assert errors[True][1] <= 4.8e-3
    assert errors[True][0] <= 1.05 * errors[False][0]


@pytest.mark.parametrize("gate", ["bounded", "softplus"])
@pytest.mark.parametrize("packed", [True, False])
def test_decode_beside_triton(cuda, gate, packed):
    batch = Batch([1] * 6, heads=4, gate=gate, device=cuda, slots=[4, -1, 0, 7, 2, 3])
    want, states = batch.right_drafts(1)

    def call(kernel, batch):
        if not packed:
            return kernel.decode(
                batch.q, batch.k, batch.v, batch.flat_gate, batch.beta, **batch.of_gate(), **batch.states()
            )
        return kernel.packed_decode(
            batch.mixed_qkv, batch.flat_gate, batch.beta, scale=DIM**-0.5, ssm_states=batch.pool,
            cache_indices=batch.cache_indices, num_v_heads=4, head_v_dim=DIM, **batch.of_gate(),
        )  # fmt: skip

    real = [n for n, slot in enumerate(batch.cache_indices.tolist()) if slot >= 0]
    for _, out, pool in both(batch, call):
        assert error(out[0, real], want[real, 0]) <= OUT
        assert error(pool[batch.cache_indices[real].long()], states[real, 0]) <= STATE


@pytest.mark.parametrize("tree", [False, True])
def test_verify_beside_triton(cuda, tree):
    batch = Batch([4] * 3, heads=4, device=cuda)
    parents = torch.tensor([[-1, 0, 0, 2], [-1, 0, 1, 2], [-1, 0, 0, 0]]) if tree else None
    want, states = batch.right_drafts(4, parents)
    before = batch.pool.clone()

    def call(kernel, batch):
        buffer = torch.full((3, 4, 4, DIM, DIM), torch.nan, device=cuda)
        out = kernel.target_verify(
            A_log=batch.A_log, dt_bias=batch.dt_bias, q=batch.q, k=batch.k, v=batch.v, a=batch.flat_gate,
            b=batch.beta, **batch.states(), intermediate_states_buffer=buffer, cache_steps=4,
            intermediate_state_indices=torch.arange(3, dtype=torch.int32, device=cuda),
            retrieve_parent_token=None if parents is None else parents.clamp(min=0).to(cuda),
            lower_bound=batch.lower_bound,
        )  # fmt: skip
        return out, buffer

    for _, (out, buffer), pool in both(batch, call):
        assert error(out[0], want.flatten(0, 1)) <= OUT
        assert error(buffer, states) <= STATE
        assert torch.equal(pool, before)


def test_steps_in_a_cuda_graph(cuda):
    """A replay takes what the tables hold then. Nothing is allocated outside of the graph."""
    kernel = plugin.kernel_class(Behind)()
    batch = Batch([4] * 3, heads=2, device=cuda)
    buffer = torch.zeros(3, 4, 2, DIM, DIM, device=cuda)
    rows = torch.arange(3, dtype=torch.int32, device=cuda)

    def call():
        return kernel.target_verify(
            batch.A_log, batch.dt_bias, batch.q, batch.k, batch.v, batch.flat_gate, batch.beta,
            **batch.states(), intermediate_states_buffer=buffer, intermediate_state_indices=rows,
            cache_steps=4, retrieve_parent_token=None, lower_bound=batch.lower_bound,
        )  # fmt: skip

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    batch.cache_indices.copy_(batch.cache_indices.flip(0))
    graph.replay()
    want, states = batch.right_drafts(4)
    assert not kernel.calls
    assert error(out[0], want.flatten(0, 1)) <= OUT
    assert error(buffer, states) <= STATE
