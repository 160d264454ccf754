"""Times the steps of KDA layers that vLLM 0.33 and SGLang 0.5.23 compute, as they compute them today and
through this package's plug-ins.

    python benchmarks/serving.py
    python benchmarks/serving.py --engines sglang --heads 12 --rounds 5 --json serving.json

A row is an engine, a step, its size and a number of heads: prefill of one prompt of so many tokens, decode of
one token of so many sequences, or for SGLang verify of draft tokens of so many sequences, 4 in a chain or 8
in a tree. A step begins behind the projections, ends with the states in the engine's pool, and has the
tensors as the engine has them: slices of one tensor, columns of a projection, a pool with slots. Gates are
bounded by -5. A time is the median of rounds of CUDA-graph replays over rotating inputs; on the CPU, where
engines have no kernels, that of plain calls through the plug-ins.

Engines tune their Triton kernels anew for other numbers of heads, which takes minutes each. With --tunes-once
a kernel keeps for all rows what is fastest in the largest row, and its configurations are compiled in as many
processes as there are CPUs.

What an engine does today:

- vLLM, prefill: states gathered, `_flashkda_C::fwd`, states scattered. Where that operator cannot be loaded
  or does not serve the GPU: the Triton kernels.
- vLLM, decode: `_C::fused_kda_decode`, or convolution, recurrence, norm and output gate in Triton where that
  operator cannot be loaded or does not serve the GPU or the number of heads.
- SGLang, prefill and decode: the Triton class. (SGLang has another kernel for decode with the softplus gate,
  and one for Kimi K3, which are compiled by an installed SGLang and are left out here.)

The engines' modules are those that `python scripts/fetch_engines.py` has fetched. An engine without its
modules has no times of today.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
from typing import Any, Callable, NamedTuple

from peer_timing import releases, tuning
from peer_timing.shapes import DIM

PREFILL, DECODE, VERIFY = (64, 1024, 8192), (1, 32, 256), (32,)
DRAFTS = {"chain": 4, "tree": 8}  # tokens of a sequence
PARENTS = (-1, 0, 0, 1, 1, 2, 2, 3)  # of the tree's tokens
HEADS = (12, 32, 64, 96)
LOWER_BOUND = -5.0
L2_BYTES = 50 << 20
MOST_SETS = 32
THEIR_MAJORS, THEIR_HEADS = (9, 10, 12), (12, 24, 48, 96)  # that vLLM's operators serve

Call = Callable[[], tuple]
Make = Callable[["Shared", "Inputs"], Call]


class Case(NamedTuple):
    """One line of the table."""

    engine: str
    step: str
    size: int  # tokens of a prompt, or sequences
    heads: int

    @property
    def tokens(self) -> int:
        return self.size * DRAFTS.get(self.step, 1)

    @property
    def sequences(self) -> int:
        return 1 if self.step == "prefill" else self.size

    @property
    def bytes_of_states(self) -> int:
        """Of all states that a call reads, and of the buffer for draft tokens."""
        return (self.sequences + self.drafts) * self.heads * DIM * DIM * 4

    @property
    def drafts(self) -> int:
        return self.tokens if self.step in DRAFTS else 0


# ---- Tensors as engines have them --------------------------------------------------------------------------


class Inputs:
    """The tokens and the slots of one call. All calls of a case share the pools and the parameters."""

    def __init__(self, case: Case, shared: Shared, number: int, device: str) -> None:
        import torch

        H, T = case.heads, case.tokens

        def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.randn(*size, dtype=dtype, device=device)

        projected = normal(T, 4 * H * DIM + H + 8)
        self.mixed_qkv, self.output_gate, beta, _ = projected.split([3 * H * DIM, H * DIM, H, 8], dim=-1)
        self.beta = beta.unsqueeze(0)
        self.flat_gate = normal(T, H * DIM)
        self.gate = self.flat_gate.unflatten(-1, (H, DIM)).unsqueeze(0)
        convolved = normal(T, 3 * H * DIM)
        self.convolved = convolved
        self.q, self.k, self.v = (
            x.unflatten(-1, (H, DIM)).unsqueeze(0) for x in convolved.split(H * DIM, dim=-1)
        )
        first = number * case.sequences
        self.indices = shared.order[first : first + case.sequences]
        self.out = torch.empty(1, T, H, DIM, dtype=torch.bfloat16, device=device)


class Shared:
    """Pools and parameters of a layer, and the tables of a batch."""

    def __init__(self, case: Case, device: str) -> None:
        import torch

        H, N, T = case.heads, case.sequences, case.tokens
        size = case.bytes_of_states + T * H * DIM * 2 * 12
        # Between two uses of a set, at least twice the cache is moved.
        self.sets = 1 if device == "cpu" else max(1, min(MOST_SETS, 1 + 2 * L2_BYTES // size))
        slots = 1 + self.sets * N
        self.pool = torch.empty(slots, H, DIM, DIM, device=device).normal_(std=0.1)
        self.conv_state = torch.zeros(slots, 3, 3 * H * DIM, dtype=torch.bfloat16, device=device)
        self.order = 1 + torch.randperm(slots - 1, device=device).to(torch.int32)
        self.A_log = torch.zeros(H, device=device)
        self.dt_bias = torch.linspace(-10.0, 2.0, DIM, device=device).repeat(H)
        self.weight = torch.randn(3, 4, H * DIM, device=device) / 2
        self.norm_weight = torch.ones(DIM, device=device)
        ends = [0, T] if case.step == "prefill" else range(0, T + 1, T // N)
        self.query_start_loc = torch.tensor(ends, dtype=torch.int32, device=device)
        self.has_initial_state = torch.ones(N, dtype=torch.bool, device=device)
        chunks = -(-T // 64)
        self.chunk_indices = torch.tensor([[0, i] for i in range(chunks)], dtype=torch.int32, device=device)
        self.chunk_offsets = torch.tensor([0, chunks], dtype=torch.int32, device=device)
        self.final_state = torch.empty(N, H, DIM, DIM, device=device)
        self.buffer = torch.empty(N, case.drafts // N, H, DIM, DIM, device=device)
        self.rows = torch.arange(N, dtype=torch.int32, device=device)
        self.parents = None
        if case.step == "tree":
            self.parents = torch.tensor([PARENTS] * N, dtype=torch.int64, device=device)


# ---- SGLang ------------------------------------------------------------------------------------------------


def sglang_step(kernel: Any, case: Case, shared: Shared, x: Inputs, packed: bool) -> Call:
    """A step of one of SGLang's kernel classes."""
    gate = {"A_log": shared.A_log, "dt_bias": shared.dt_bias, "lower_bound": LOWER_BOUND}
    states = {
        "ssm_states": shared.pool, "cache_indices": x.indices, "query_start_loc": shared.query_start_loc,
    }  # fmt: skip

    def prefill() -> tuple:
        # The tables are those of SGLang's prefill graphs, as the kernels would otherwise ask the GPU.
        out = kernel.extend(
            x.q, x.k, x.v, x.gate, x.beta, **states, **gate, beta_is_raw=True,
            extend_seq_lens_cpu=[case.tokens], chunk_indices=shared.chunk_indices,
            chunk_offsets=shared.chunk_offsets,
        )  # fmt: skip
        return out, None

    def packed_decode() -> tuple:
        out = kernel.packed_decode(
            x.convolved, x.flat_gate, x.beta, scale=DIM**-0.5, ssm_states=shared.pool,
            cache_indices=x.indices, num_v_heads=case.heads, head_v_dim=DIM, **gate,
        )  # fmt: skip
        return out, None

    def decode() -> tuple:
        return kernel.decode(x.q, x.k, x.v, x.flat_gate, x.beta, **states, **gate), None

    def verify() -> tuple:
        out = kernel.target_verify(
            q=x.q, k=x.k, v=x.v, a=x.flat_gate, b=x.beta, **states, **gate,
            intermediate_states_buffer=shared.buffer, intermediate_state_indices=shared.rows,
            cache_steps=DRAFTS[case.step], retrieve_parent_token=shared.parents,
        )  # fmt: skip
        return out, None

    if case.step in DRAFTS:
        return verify
    if case.step == "prefill":
        return prefill
    return packed_decode if packed else decode


def sglang(case: Case, device: str, theirs: Any) -> tuple[Make | None, str, Make]:
    """What makes calls of today, words about it, and what makes calls through this package. theirs: SGLang's
    Triton class, or None."""
    from flash_kda.sglang import kernel_class

    class Nothing:
        def extend(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("the plug-in left the call to SGLang")

        decode = packed_decode = target_verify = extend

    ours = kernel_class(Nothing)()

    def own(shared: Shared, x: Inputs) -> Call:
        return sglang_step(ours, case, shared, x, packed=True)

    def today(shared: Shared, x: Inputs) -> Call:
        # With a bounded gate, SGLang does not decode through packed_decode.
        return sglang_step(theirs, case, shared, x, packed=False)

    return (None if theirs is None else today), "Triton", own


# ---- vLLM --------------------------------------------------------------------------------------------------


def vllm_prefill(fwd: Any, gather: Any, workspace: Any, shared: Shared, x: Inputs) -> Call:
    """States gathered, the operator, states scattered: what vLLM's layer does around the operator."""
    bias = shared.dt_bias.view(-1, DIM)
    initial = shared.final_state.clone()

    def call() -> tuple:
        states = gather(shared.pool, x.indices, shared.has_initial_state) if gather else initial
        fwd(
            x.q.contiguous(), x.k.contiguous(), x.v.contiguous(), x.gate.contiguous(), x.beta, DIM**-0.5,
            x.out, workspace, shared.A_log, bias, LOWER_BOUND, states, shared.final_state,
            shared.query_start_loc, None, None,
        )  # fmt: skip
        shared.pool[x.indices.long()] = shared.final_state
        return x.out, None

    return call


def vllm_decode(decode: Any, shared: Shared, x: Inputs) -> Call:
    gate = x.output_gate.unflatten(-1, (-1, DIM))

    def call() -> tuple:
        decode(
            x.mixed_qkv, shared.weight, None, shared.conv_state.transpose(1, 2), x.gate, x.beta, shared.A_log,
            shared.dt_bias, x.indices, shared.pool, x.out, LOWER_BOUND, gate, shared.norm_weight, 1e-5,
        )  # fmt: skip
        return x.out, None

    return call


def vllm_triton(found: dict[str, Any], case: Case, shared: Shared, x: Inputs) -> Call:
    """vLLM's layer without the operators."""
    weight = shared.weight.permute(0, 2, 1).reshape(-1, 4).contiguous()
    gate = x.output_gate.unflatten(-1, (-1, DIM))

    def prefill() -> tuple:
        states = found["gather_initial_states"](shared.pool, x.indices, shared.has_initial_state)
        out, last = found["chunk_kda_with_fused_gate"](
            q=x.q, k=x.k, v=x.v, raw_g=x.gate, raw_beta=x.beta, A_log=shared.A_log, g_bias=shared.dt_bias,
            lower_bound=LOWER_BOUND, initial_state=states, output_final_state=True,
            use_qk_l2norm_in_kernel=True, cu_seqlens=shared.query_start_loc, out=None,
        )  # fmt: skip
        shared.pool[x.indices.long()] = last
        return out, None

    def decode() -> tuple:
        mixed = found["causal_conv1d_update"](
            x.mixed_qkv, shared.conv_state.transpose(1, 2), weight, None, activation="silu",
            conv_state_indices=x.indices, out=torch_empty_like(x.mixed_qkv),
        )  # fmt: skip
        out, _ = found["fused_recurrent_kda_packed_decode"](
            mixed_qkv=mixed, raw_g=x.gate, raw_beta=x.beta, A_log=shared.A_log, dt_bias=shared.dt_bias,
            lower_bound=LOWER_BOUND, initial_state=shared.pool, state_indices=x.indices, out=None,
        )  # fmt: skip
        return found["rms_norm_gated"](out[0], gate, shared.norm_weight, None, "sigmoid", eps=1e-5), None

    return prefill if case.step == "prefill" else decode


def torch_empty_like(x: Any) -> Any:
    import torch

    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def vllm_operator(name: str, case: Case) -> Any:
    """One of vLLM's operators as vLLM has it, if it is loaded and serves the GPU and the case, or None."""
    import torch

    namespace, _, function = name.partition("::")
    operator = getattr(getattr(torch.ops, namespace), function, None)
    major = torch.cuda.get_device_capability()[0]
    if operator is None or major not in THEIR_MAJORS:
        return None
    return operator if case.step == "prefill" or case.heads in THEIR_HEADS else None


def vllm(case: Case, device: str, found: Any) -> tuple[Make | None, str, Make]:
    """As `sglang`. found: vLLM's functions, or None. What the plug-in puts behind the operators is called
    directly, so that this process keeps vLLM's own."""
    import torch

    import flash_kda
    import flash_kda.vllm as plugin

    gather = found and found["gather_initial_states"]
    name = "_flashkda_C::fwd" if case.step == "prefill" else "_C::fused_kda_decode"
    operator = vllm_operator(name, case) if found else None

    def scratch(size: int) -> Any:
        return torch.empty(size, dtype=torch.uint8, device=device)

    def own(shared: Shared, x: Inputs) -> Call:
        if case.step == "decode":
            return vllm_decode(plugin._decode, shared, x)
        size = flash_kda.get_workspace_size(case.tokens, case.heads, 1, max_seqlen=case.tokens)
        return vllm_prefill(plugin._fwd, gather, scratch(size + 63), shared, x)

    def today(shared: Shared, x: Inputs) -> Call:
        if operator is None:
            return vllm_triton(found, case, shared, x)
        if case.step == "decode":
            return vllm_decode(operator, shared, x)
        size = torch.ops._flashkda_C.get_workspace_size(case.tokens, case.heads, 1)
        return vllm_prefill(operator, gather, scratch(size), shared, x)

    return (today if found else None), (name if operator else "Triton"), own


ENGINES = {"vllm": vllm, "sglang": sglang}


def kernels_of(engine: str, device: str, stack: contextlib.ExitStack) -> Any:
    """What the engine computes with today, or None."""
    if device == "cpu":
        return None
    try:
        if engine == "sglang":
            return stack.enter_context(releases.sglang_kernels())()
        return stack.enter_context(releases.vllm_kernels())
    except ImportError as error:
        print(f"{engine}: {error}", file=sys.stderr)
        return None


# ---- Timing ------------------------------------------------------------------------------------------------


def time_case(case: Case, rounds: int, device: str, kernels: Any) -> dict[str, Any]:
    """Milliseconds of a step, today's and this package's, which take turns, and words about today's.
    kernels: of the engine."""
    from peer_timing.timing import Timed

    shared = Shared(case, device)
    inputs = [Inputs(case, shared, number, device) for number in range(shared.sets)]
    kind = "plain_ms" if device == "cpu" else "graph_ms"
    timed: dict[str, Any] = {}
    today, words, own = ENGINES[case.engine](case, device, kernels)
    for name, make in (("today", today), ("ours", own)):
        if make is None:
            continue
        try:
            timed[name] = Timed([make(shared, x) for x in inputs], device)
        except Exception as error:  # whatever another library raises
            if name == "ours":
                raise
            print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr)
    turns = [{name: calls.round()[kind] for name, calls in timed.items()} for _ in range(rounds)]
    times = {name: statistics.median(turn[name] for turn in turns) for name in timed}
    return {"today": None, **times, "words": words if "today" in times else ""}


def call_today(cases: list[Case], kernels: dict[str, Any], device: str) -> None:
    """Makes the engines' calls of the largest case of each step once."""
    largest: dict[tuple[str, str], Case] = {}
    for case in cases:
        key = case.engine, case.step
        largest[key] = max(case, largest.get(key, case), key=lambda c: (c.tokens * c.heads, c.heads))
    for case in largest.values():
        shared = Shared(case, device)
        today, _, _ = ENGINES[case.engine](case, device, kernels[case.engine])
        if today is not None:
            today(shared, Inputs(case, shared, 0, device))()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="serving.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--engines", nargs="+", choices=tuple(ENGINES), default=tuple(ENGINES), metavar="ENGINE")
    add("--heads", nargs="+", type=int, default=HEADS, metavar="H", help="default: 12 32 64 96")
    add("--prefill", nargs="*", type=int, default=PREFILL, metavar="TOKENS", help="default: 64 1024 8192")
    add("--decode", nargs="*", type=int, default=DECODE, metavar="SEQUENCES", help="default: 1 32 256")
    add("--verify", nargs="*", type=int, default=VERIFY, metavar="SEQUENCES", help="default: 32")
    add("--rounds", type=int, default=3, help="rounds in which both take turns; default: 3")
    add("--tunes-once", action="store_true", help="engines tune their kernels for the largest rows alone")
    add("--only-compile", metavar="I/N", help=argparse.SUPPRESS)  # peer_timing/tuning.py starts itself so
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    add("--json", metavar="FILE", help="where the figures go, besides the table")
    options = parser.parse_args(argv)

    import torch

    import flash_kda

    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("PyTorch can use no GPU here (--device cpu times the plug-ins on the CPU)")
    if not on_gpu and options.tunes_once:
        parser.error("--tunes-once is for GPUs, and --device is cpu")
    results = []
    cases = [
        Case(engine, step, size, heads)
        for engine in options.engines
        for step, sizes in (
            ("prefill", options.prefill), ("decode", options.decode), *((x, options.verify) for x in DRAFTS)
        )
        for heads in options.heads
        for size in sizes
        if engine == "sglang" or step not in DRAFTS
    ]  # fmt: skip
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        if options.tunes_once and not options.only_compile:
            tuning.compile_ahead([__file__, *argv], len(os.sched_getaffinity(0)))
        kernels = {engine: kernels_of(engine, options.device, stack) for engine in options.engines}
        if options.only_compile:
            tuning.only_compile(options.only_compile)
            return call_today(cases, kernels, options.device)
        if options.tunes_once:
            tuning.tune_once()
            call_today(cases, kernels, options.device)
        name = torch.cuda.get_device_name() if on_gpu else "CPU"
        print(f"{name}, flash_kda {flash_kda.__version__}, {options.rounds} rounds\n")
        print("| engine | step | size | H | today | today, ms | flash_kda, ms | ratio |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for case in cases:
            t = time_case(case, options.rounds, options.device, kernels[case.engine])
            if on_gpu:
                torch.cuda.empty_cache()
            today, ratio = (f"{t['today']:.4f}", f"{t['ours'] / t['today']:.3f}") if t["today"] else ("", "")
            print(
                f"| {case.engine} | {case.step} | {case.size} | {case.heads} | {t['words']} | {today} "
                f"| {t['ours']:.4f} | {ratio} |",
                flush=True,
            )
            results.append({**case._asdict(), **t})
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": name, "rows": results}, file)


if __name__ == "__main__":
    main(sys.argv[1:])
