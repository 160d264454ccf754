"""What test_sglang.py runs in a process of its own: SGLang's Triton kernels for decode and verify beside the
plug-in's class, on the CPU, where Triton's interpreter runs the kernels one line after the other.

The kernels of extend need more of Triton than its interpreter has. Exits with 77 if the installed Triton
cannot interpret the kernels.
"""

import os
import sys
import warnings
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
warnings.simplefilter("ignore")  # SGLang's modules warn where there is no GPU

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from peer_timing import releases  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

from flash_kda.sglang import kernel_class  # noqa: E402
from sglang_batches import DIM, STATE, Batch, error  # noqa: E402

# The interpreter rounds to bf16 towards zero, and this package to the nearest.
OUT = 5e-3


@triton.jit
def exp(x):
    """The interpreter takes no other name for tl.exp, as SGLang has one."""
    return tl.exp(x)


class Nothing:
    def decode(self, *_, **__):
        raise AssertionError("the call was left to SGLang")

    extend = packed_decode = target_verify = decode


def hold(ours, theirs, want, bar, name):
    for kernel, got in (("the plug-in", ours), ("SGLang", theirs)):
        assert error(got, want) <= bar, f"{name}: {kernel}: {error(got, want)}"
    assert error(ours, theirs) <= bar, name


def both(batch, call, ours, theirs):
    """The results of a call and the pools behind it."""
    pool = batch.pool.clone()
    for kernel in (ours, theirs):
        batch.pool = pool.clone()
        yield call(kernel, batch), batch.pool
    batch.pool = pool


def check_decode(ours, theirs, gate, packed):
    batch = Batch([1] * 4, gate=gate, slots=[4, 0, 6, 2])
    want, states = batch.right_drafts(1)

    def call(kernel, batch):
        if not packed:
            return kernel.decode(
                batch.q, batch.k, batch.v, batch.flat_gate, batch.beta, **batch.of_gate(), **batch.states()
            )
        return kernel.packed_decode(
            batch.mixed_qkv, batch.flat_gate, batch.beta, scale=DIM**-0.5, ssm_states=batch.pool,
            cache_indices=batch.cache_indices, num_v_heads=batch.heads, head_v_dim=DIM, **batch.of_gate(),
        )  # fmt: skip

    (out, pool), (its_out, its_pool) = both(batch, call, ours, theirs)
    assert out.shape == its_out.shape
    name = f"decode, {gate}, packed: {packed}"
    hold(out[0], its_out[0], want[:, 0], OUT, name)
    slots = batch.cache_indices.long()
    hold(pool[slots], its_pool[slots], states[:, 0], STATE, name)


def check_verify(ours, theirs, tree):
    batch = Batch([4] * 2, slots=[4, 2])
    parents = torch.tensor([[-1, 0, 0, 2], [-1, 0, 1, 0]]) if tree else None
    want, states = batch.right_drafts(4, parents)

    def call(kernel, batch):
        buffer = torch.full((3, 5, batch.heads, DIM, DIM), torch.nan)
        out = kernel.target_verify(
            A_log=batch.A_log, dt_bias=batch.dt_bias, q=batch.q, k=batch.k, v=batch.v, a=batch.flat_gate,
            b=batch.beta, **batch.states(), intermediate_states_buffer=buffer, cache_steps=4,
            intermediate_state_indices=torch.tensor([2, 0], dtype=torch.int32),
            retrieve_parent_token=None if parents is None else parents.clamp(min=0),
            lower_bound=batch.lower_bound,
        )  # fmt: skip
        return out, buffer

    ((out, buffer), pool), ((its_out, its_buffer), its_pool) = both(batch, call, ours, theirs)
    assert out.shape == its_out.shape
    name = f"verify, tree: {tree}"
    hold(out[0], its_out[0], want.flatten(0, 1), OUT, name)
    hold(buffer[[2, 0], :4], its_buffer[[2, 0], :4], states, STATE, name)
    assert torch.equal(buffer.isnan(), its_buffer.isnan()), name
    assert torch.equal(pool, batch.pool), name
    assert torch.equal(its_pool, batch.pool), name


with releases.sglang_kernels() as kernels, torch.inference_mode():
    recurrent = sys.modules["sglang.kernels.ops.attention.fla.fused_recurrent"]
    recurrent.exp = exp
    theirs, ours = kernels(), kernel_class(Nothing)()
    try:
        for gate in ("bounded", "softplus"):
            for packed in (False, True):
                check_decode(ours, theirs, gate, packed)
        for tree in (False, True):
            check_verify(ours, theirs, tree)
    except InterpreterError as problem:
        print(f"Triton {triton.__version__} cannot interpret the kernels: {problem}")
        sys.exit(77)
print("ok")
