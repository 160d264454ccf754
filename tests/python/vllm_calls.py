"""What test_vllm.py runs in a process of its own: vllm_calls.py FOLDER

The plug-in in vLLM 0.33.0, of which FOLDER has the modules that are about KDA layers and the compiled
operators. vLLM's own loader loads the plug-in, vLLM's own extension modules register the operators, and
vLLM's own layers for Kimi K3 and GLM-5.3-Flash call them, on the CPU. All other modules of vLLM are
stand-ins: convolutions give back what they get, and states are gathered by PyTorch.
"""

import ast
import importlib
import importlib.metadata
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

FOLDER = Path(sys.argv[1])
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.setdlopenflags(os.RTLD_LAZY)  # a stand-in for the driver's library has no functions
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")

from peer_timing import releases  # noqa: E402

import flash_kda  # noqa: E402

K3, GLM = "vllm.models.kimi_k3.nvidia.kda", "vllm.models.glm5next.common.kda"
H, DIM = 3, 128
OUT, STATE = 2.2e-3, 1e-5
BF16, F32 = torch.bfloat16, torch.float32


def error(got, want):
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())


class Metadata(SimpleNamespace):
    """Stands for KimiK3KDAMetadata."""


class Platform:
    """A GPU for which vLLM has none of the three operators."""

    simple_compile_backend = "inductor"

    def is_cuda(self):
        return True

    def is_rocm(self):
        return False

    def get_device_capability(self):
        return SimpleNamespace(major=8, minor=0)

    def is_device_capability(self, *_):
        return False

    is_device_capability_family = is_device_capability


def function_of(path, name):
    """One function of a module of which nothing else is wanted."""
    tree = ast.parse((FOLDER / path).read_text(encoding="utf-8"))
    (wanted,) = [node for node in tree.body if getattr(node, "name", None) == name]
    scope = {"torch": torch}
    exec(compile(ast.Module([wanted], []), path, "exec"), scope)
    return scope[name]


def gather(state, indices, has_initial_state):
    return torch.where(has_initial_state[:, None, None, None], state[indices.long()], 0)


class Workspaces:
    """As vLLM's WorkspaceManager has them: views of one buffer, each at a multiple of 256 bytes, which the
    layer asks for in every call."""

    def get_simultaneous(self, *specs):
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs]
        buffer = torch.zeros(sum(-(-size // 256) * 256 for size in sizes), dtype=torch.uint8)
        views, begin = [], 0
        for (shape, dtype), size in zip(specs, sizes):
            views.append(buffer[begin : begin + size].view(dtype).view(shape))
            begin += -(-size // 256) * 256
        return views


exported = []
context = SimpleNamespace(attn_metadata=None)
quiet = SimpleNamespace(info_once=lambda *_: None, info=lambda *_: None)
given = {
    "vllm.envs": {"VLLM_PLUGINS": None},
    "vllm._custom_ops": {"fused_kda_decode": function_of("vllm/_custom_ops.py", "fused_kda_decode")},
    "vllm.compilation.breakable_cudagraph": {"eager_break_during_capture": lambda function: function},
    "vllm.forward_context": {"get_forward_context": lambda: context},
    "vllm.logger": {"init_logger": lambda name: quiet},
    "vllm.platforms": {"current_platform": Platform()},
    "vllm.utils.flashinfer": {
        "has_flashinfer_fused_kda_decode": lambda: False,
        "has_flashinfer_packed_fused_kda_decode": lambda: False,
        "has_flashinfer_recurrent_kda": lambda: False,
    },
    "vllm.model_executor.layers.mamba.mamba_utils": {"is_conv_state_dim_first": lambda: False},
    "vllm.model_executor.layers.mamba.ops.causal_conv1d": {
        "causal_conv1d_fn": lambda x, *_, **__: x.transpose(0, 1).contiguous().transpose(0, 1)
    },
    "vllm.model_executor.layers.mamba.ops.gather_initial_states": {"gather_initial_states": gather},
    "vllm.v1.worker.workspace": {"current_workspace_manager": Workspaces},
    "vllm.models.kimi_k3.nvidia.kda_metadata": {"KimiK3KDAMetadata": Metadata},
    "transformers": {},
    "vllm.model_executor.utils": {"maybe_disable_graph_partition": lambda backend: {}},
}
real = ("vllm.plugins", "vllm._flashkda_C", "vllm._C_stable_libtorch", K3, GLM)


def load_plugin():
    """By vLLM's own function, which finds the entry point of the package."""
    point = importlib.metadata.EntryPoint("flash_kda", "flash_kda.vllm:register", "vllm.general_plugins")
    installed = importlib.metadata.entry_points
    importlib.metadata.entry_points = lambda group: [point] if group == point.group else []
    importlib.import_module("vllm.plugins").load_general_plugins()
    importlib.metadata.entry_points = installed


def layer(**more):
    """What the forward pass of the layer reads of it."""
    size = torch.ops._flashkda_C.get_workspace_size(300, H, 5)
    states = ((5, H, DIM, DIM), F32)
    exporter = SimpleNamespace(export=lambda checkpoint, **named: exported.append(named))
    return SimpleNamespace(
        prefix="layer", head_dim=DIM, local_num_heads=H, local_projection_size=H * DIM,
        conv1d=SimpleNamespace(weight=torch.randn(3 * H * DIM, 1, 4), bias=None),
        A_log=torch.nn.Parameter(torch.rand(H)), dt_bias=torch.nn.Parameter(torch.randn(H * DIM) - 2),
        gate_lower_bound=-5.0, use_recoverssm=False, kda_prefill_backend="flashkda",
        kda_decode_backend="native", kda_spec_decode_backend="native",
        _flashkda_buffer_specs=(((1, 300, H, DIM), BF16), states, states, ((size,), torch.uint8)),
        _checkpoint_exporter=exporter, o_norm=lambda x, gate: x, decode_norm_weight=torch.rand(DIM) + 0.5,
        decode_conv1d_weight=torch.randn(3, 4, H * DIM), **more,
    )  # fmt: skip


def inputs(tokens, padding=4):
    """What the layer's projections give, with rows behind the tokens of the batch."""
    rows = tokens + padding
    projected = torch.randn(rows, 4 * H * DIM + DIM + H + 5).bfloat16()
    mixed_qkv, g2, _, beta, _ = projected.split([3 * H * DIM, H * DIM, DIM, H, 5], dim=-1)
    g1 = torch.randn(rows, H * DIM).bfloat16().unflatten(-1, (H, DIM)).unsqueeze(0)
    out = torch.full((1, rows, H, DIM), torch.nan, dtype=BF16)
    return {
        "mixed_qkv": mixed_qkv, "g1": g1, "g2": g2.unflatten(-1, (H, DIM)), "beta": beta.unsqueeze(0),
        "core_attn_out": out,
    }  # fmt: skip


def metadata(**more):
    names = ("spec_token_indx", "non_spec_token_indx", "spec_token_start", "non_spec_token_start",
             "spec_state_indices_tensor", "spec_query_start_loc", "num_accepted_tokens", "checkpoint",
             "has_initial_state", "non_spec_query_start_loc")  # fmt: skip
    zeros = ("num_spec_decodes", "num_prefills", "num_prefill_tokens", "num_decodes", "num_decode_tokens")
    return Metadata(**{**dict.fromkeys(names), **dict.fromkeys(zeros, 0), **more})


def pools(slots=9):
    """Convolution inputs and states of a slot share a page."""
    conv, state = 3 * 3 * H * DIM, H * DIM * DIM
    pages = torch.zeros(slots, conv * 2 + state * 4, dtype=torch.uint8)
    conv_state = pages[:, : 2 * conv].view(BF16).unflatten(-1, (3, 3 * H * DIM))
    states = pages[:, 2 * conv :].view(F32).unflatten(-1, (H, DIM, DIM))
    conv_state.copy_(torch.randn(conv_state.shape))
    states.copy_(torch.randn(states.shape))
    return conv_state, states


def check_prefill(module, with_checkpoint):
    lengths, slots = [100, 16, 33], [4, 7, 2]
    batch, kda, (conv_state, states) = inputs(sum(lengths)), layer(), pools()
    kda.kv_cache = conv_state, states
    before, start = states.clone(), torch.tensor([True, False, True])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    checkpoint = None
    if with_checkpoint:
        checkpoint = SimpleNamespace(checkpoint_offsets=torch.tensor([48, 0, 32], dtype=torch.int32))
    context.attn_metadata = {
        "layer": metadata(
            num_actual_tokens=sum(lengths), num_prefills=3, num_prefill_tokens=sum(lengths),
            has_initial_state=start, non_spec_query_start_loc=cu_seqlens, checkpoint=checkpoint,
            non_spec_state_indices_tensor=torch.tensor(slots, dtype=torch.int32),
            nums_dict={8: {"nums": torch.tensor([13, 2, 5])}},
        )
    }  # fmt: skip
    q, k, v = (
        x[: sum(lengths)].unflatten(-1, (H, DIM)).unsqueeze(0)
        for x in batch["mixed_qkv"].split(H * DIM, dim=-1)
    )
    tokens = slice(None), slice(sum(lengths))
    want = flash_kda.reference(
        q, k, v, batch["g1"][tokens], batch["beta"][tokens], DIM**-0.5, kda.A_log.detach(),
        kda.dt_bias.detach(), -5.0, before.contiguous(), cu_seqlens,
        state_indices=torch.tensor(slots), has_initial_state=start,
        checkpoint_offsets=torch.tensor([48, 0, 32]),
    )  # fmt: skip
    with torch.inference_mode():
        module.KimiK3DeltaAttention._forward(kda, **batch)
    assert error(batch["core_attn_out"][tokens], want[0]) <= OUT
    for n, slot in enumerate(slots):
        assert error(states[slot], want[1][n]) <= STATE
    for slot in set(range(9)) - set(slots):
        assert torch.equal(states[slot], before[slot])
    if with_checkpoint:
        rows = exported.pop()["recurrent_checkpoint"]
        assert error(rows[0], want[2][0]) <= STATE
        assert error(rows[2], want[2][2]) <= STATE
        assert not rows[1].any(), "a row without a checkpoint was written"


def check_decode(module):
    slots = [4, 0, 7, -1, 2]
    batch, kda, (conv_state, states) = inputs(5, padding=3), layer(), pools()
    kda.kv_cache = conv_state, states
    indices = torch.tensor([*slots, 1, 1], dtype=torch.int32)
    context.attn_metadata = {
        "layer": metadata(
            num_actual_tokens=5, num_decodes=5, num_decode_tokens=5, non_spec_state_indices_tensor=indices
        )
    }
    before = conv_state.clone(), states.clone()
    want, want_states = flash_kda.decode_layer_reference(
        batch["mixed_qkv"][:5], kda.decode_conv1d_weight, None, before[0].transpose(1, 2), batch["g1"][:, :5],
        batch["beta"][:, :5], kda.A_log.detach(), kda.dt_bias.detach(), indices[:5], before[1].contiguous(),
        lower_bound=-5.0, output_gate=batch["g2"][:5], norm_weight=kda.decode_norm_weight, norm_eps=1e-5,
        first_slot=1,
    )  # fmt: skip
    kda.o_norm = SimpleNamespace(eps=1e-5)
    with torch.inference_mode():
        module.KimiK3DeltaAttention._forward(kda, **batch)
    out = batch["core_attn_out"][0]
    for n, slot in enumerate(slots):
        if slot <= 0:
            assert not out[n].any()
            continue
        assert error(out[n], want.reshape(-1, H, DIM)[n]) <= OUT
        assert error(states[slot], want_states.reshape(-1, H, DIM, DIM)[n]) <= STATE
        x = batch["mixed_qkv"][n]
        assert torch.equal(conv_state[slot], torch.stack([*before[0][slot][1:], x]))
    assert out[5:].isnan().all()
    for slot in set(range(9)) - set(slots):
        assert torch.equal(states[slot], before[1][slot])
        assert torch.equal(conv_state[slot], before[0][slot])


def check_glm(glm):
    """The call of the operator in vLLM's layer for GLM-5.3-Flash, into a buffer of the workspace."""
    lengths, kda = [64, 3], layer()
    size = torch.ops._flashkda_C.get_workspace_size(300, H, 5)
    states = ((5, H, DIM, DIM), F32)
    kda._flashkda_buffer_specs = (states, states, ((size,), torch.uint8), ((1, 300, H, DIM), BF16))
    kda.A_log = torch.nn.Parameter(torch.rand(1, 1, H, 1))
    kda.kda_lower_bound = -5.0
    x = inputs(sum(lengths), padding=0)
    q, k, v = (part.unflatten(-1, (H, DIM)).unsqueeze(0) for part in x["mixed_qkv"].split(H * DIM, dim=-1))
    initial_state, cu_seqlens = torch.randn(2, H, DIM, DIM), torch.tensor([0, 64, 67], dtype=torch.int32)
    context.attn_metadata = None
    with torch.inference_mode():
        out, state = glm.Glm5NextLinearAttention._flashkda_prefill(
            kda, q=q, k=k, v=v, g=x["g1"], beta=x["beta"], initial_state=initial_state,
            cu_seqlens=cu_seqlens, out=None,
        )  # fmt: skip
    want = flash_kda.reference(
        q, k, v, x["g1"], x["beta"], DIM**-0.5, kda.A_log.detach(), kda.dt_bias.detach(), -5.0,
        initial_state, cu_seqlens,
    )  # fmt: skip
    assert error(out, want[0]) <= OUT
    assert error(state, want[1]) <= STATE


def check_choice(module, plugin):
    """vLLM's own functions choose the operators on a GPU for which only this package has kernels."""
    floats = BF16, BF16, F32
    asked = {
        "prefill": lambda: module.resolve_kda_prefill_backend("auto", 128, BF16, F32, -5.0),
        "prefill in K first": lambda: module.resolve_kda_prefill_backend("auto", 64, BF16, F32, -5.0),
        "prefill with softplus": lambda: module.resolve_kda_prefill_backend("auto", 128, BF16, F32, None),
        "decode": lambda: module.resolve_kda_decode_backend("auto", 32, 128, 4, 0, *floats),
        "decode with drafts": lambda: module.resolve_kda_decode_backend("auto", 32, 128, 4, 2, *floats),
        "GLM": lambda: glm._resolve_kda_prefill_backend("auto", 128, BF16, -5.0),
        "GLM by name": lambda: glm._resolve_kda_prefill_backend("flashkda", 128, BF16, -5.0),
        "GLM, triton": lambda: glm._resolve_kda_prefill_backend("triton", 128, BF16, -5.0),
    }
    glm = importlib.import_module(GLM)
    without = {name: ask() for name, ask in asked.items() if name != "GLM by name"}
    if not torch.cuda.is_available():
        assert set(without.values()) == {"triton"}, without
    real_cuda = torch.cuda.is_available, torch.cuda.current_device, plugin._gpu
    torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
    plugin._gpu = lambda index: ("portable", (8, 0))
    chosen = {name: ask() for name, ask in asked.items()}
    torch.cuda.is_available, torch.cuda.current_device, plugin._gpu = real_cuda
    assert chosen == {
        **without, "prefill": "flashkda", "decode": "native", "GLM": "flashkda", "GLM by name": "flashkda",
    }, chosen  # fmt: skip


def check_on_a_gpu(plugin):
    """This package and vLLM's own operators for the same calls, both held to fp64."""
    import test_vllm as cases

    errors = {}
    for lengths, checkpoints in (([300], None), ([100, 5, 64], [96, 0, 16])):
        for takes in (True, False):
            plugin._takes_prefill = lambda *_, takes=takes: takes
            a = cases.prefill(lengths, heads=12, device="cuda", checkpoints=checkpoints)
            with torch.inference_mode():
                torch.ops._flashkda_C.fwd(*a.values())
            right = cases.right_prefill(a)
            errors[takes] = cases.error(a["out"], right[0]), cases.error(a["final_state"], right[1])
        print(f"prefill of {lengths}: errors of this package and of vLLM: {errors[True]}, {errors[False]}")
        assert errors[True][0] <= 1.05 * errors[False][0]
        assert errors[True][1] <= 1.05 * errors[False][1]
    for takes in (True, False):
        plugin._takes_decode = lambda *_, takes=takes: takes
        cases.run_decode(cases.decode([3, 0, 6, -1, 2], heads=12, device="cuda"))


def has_theirs():
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10, 12)


with releases.alone(FOLDER, real, given):
    load_plugin()
    plugin = sys.modules["flash_kda.vllm"]
    torch.manual_seed(0)
    importlib.import_module("vllm._C_stable_libtorch")
    importlib.import_module("vllm._flashkda_C")
    for operator, namespace in ((plugin.FWD, "_flashkda_C"), (plugin.DECODE, "_C")):
        name = operator.partition("(")[0].partition("::")[2]
        schema = getattr(getattr(torch.ops, namespace), name).default._schema
        assert plugin._looks(schema) == plugin._looks(torch._C.parse_schema(operator)), schema
    # The package's own need, and vLLM's, which is larger.
    ours = flash_kda.get_workspace_size(300, H, 5, largest_batch=True)
    assert torch.ops._flashkda_C.get_workspace_size(300, H, 5) > ours
    module = importlib.import_module(K3)
    computed = []
    for name in ("fwd", "decode_layer"):
        function = getattr(flash_kda, name)

        def spy(*arguments, name=name, function=function, **named):
            computed.append((name, named.get("max_seqlen")))
            return function(*arguments, **named)

        setattr(flash_kda, name, spy)
    check_prefill(module, with_checkpoint=False)
    check_prefill(module, with_checkpoint=True)
    check_decode(module)
    check_glm(importlib.import_module(GLM))
    assert computed == [("fwd", 104), ("fwd", 104), ("decode_layer", None), ("fwd", 0)]
    check_choice(module, plugin)
    if has_theirs():
        check_on_a_gpu(plugin)
print("ok")
