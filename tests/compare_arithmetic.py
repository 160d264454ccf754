"""Compares the kernels with the chunk arithmetic of torch_ref.py and torch_ref_hopper.py, and prints a table.

    PYTHONPATH=build/python python tests/compare_arithmetic.py
    PYTHONPATH=build/python python tests/compare_arithmetic.py --ops tensor-core --shapes 96:8192 16:8192
    LD_LIBRARY_PATH=build/tests/emulator PRETEND_GPU=90:132 PYTHONPATH=build/python \\
        python tests/compare_arithmetic.py --device emulated --shapes 2:100 --kernels hopper:always

A shape is HEADS:LENGTHS; without --shapes all shapes of the benchmark are compared, on the GPU. The kernel
computes all heads. Of these, --heads heads are compared: heads do not depend on each other, so this is a fair
sample. Columns of the table:

  out equal    the part of the output's elements (bf16) that are equal to the bit
  ulps         the largest difference of an output element, in units in the last place of the element or, if
               the element is smaller, of a sixteenth of the largest element of its token and head
  state equal  the part of the final state's elements (fp32) that are equal to the bit
  state        the largest difference of a state element, over the largest element of its row of V
  kernel, ref  the relative RMS error of the output of the kernel and of the arithmetic in PyTorch, against
               the same algorithm in fp64 without roundings

Needs PyTorch and the package; --device emulated needs what tests/python needs, too.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "benchmarks"), str(TESTS / "python")]

import torch_ref  # noqa: E402
import torch_ref_hopper as hopper  # noqa: E402
from peer_timing.inputs import make  # noqa: E402
from peer_timing.shapes import KNOWN, parse  # noqa: E402

import flash_kda  # noqa: E402

OPS = {
    "torch": (hopper.TorchOps, "PyTorch's own"),
    "tensor-core": (hopper.TensorCoreOps, "PyTorch's own, with the sums of a tensor core"),
    "emulator": (hopper.EmulatorOps, "the emulator's"),
    "one-ulp-off": (hopper.OneUlpOffOps, "PyTorch's own, with special functions one unit off"),
}
PER_HEAD = {"A_log": 0, "dt_bias": 0, "initial_state": 1}  # the dimension of heads; of other tensors it is 2


# ---- What is compared --------------------------------------------------------------------------------------


def run_kernel(x: dict, kernel: str, cut: str, emulated: bool):
    """out and the final state of fwd."""
    N = len(x["cu_seqlens"]) - 1 if "cu_seqlens" in x else x["q"].shape[0]
    H = x["q"].shape[2]
    out = torch.full_like(x["v"], torch.nan)
    state = torch.full((N, H, 128, 128), torch.nan, device=out.device)
    more = {"kernel": kernel, "cut": cut, "max_seqlen": longest(x)}
    if not emulated:
        flash_kda.fwd(**x, out=out, final_state=state, **more)
        return out, state
    from problems import to_numpy, to_torch
    from test_dlpack import wrap

    arrays = to_numpy(x | {"out": out, "final_state": state})
    flash_kda.fwd(**wrap(arrays, device=(2, 0)), **more)
    results = to_torch({name: arrays[name] for name in ("out", "final_state")}, "cpu")
    return results["out"], results["final_state"]


def portable_ops(ops: type[hopper.TorchOps]):
    """The operations as torch_ref.py asks for them: all of its products are in tf32."""

    class PortableOps(ops):
        def multiply(self, a, b, c):
            a, b = torch_ref.truncate_tf32(a), torch_ref.truncate_tf32(b)
            return super().multiply(a, b, c, step=8)

    return PortableOps()


def longest(x: dict) -> int:
    """The longest sequence, which a server knows, or 0: all sequences have one length."""
    return int(x["cu_seqlens"].diff().max()) if "cu_seqlens" in x else 0


def find_plan(x: dict, cut: str) -> hopper.Plan:
    """How the kernel "hopper" runs a call."""
    N = len(x["cu_seqlens"]) - 1 if "cu_seqlens" in x else x["q"].shape[0]
    tokens, H = x["q"].shape[0] * x["q"].shape[1], x["q"].shape[2]
    index = x["q"].device.index or 0
    text = flash_kda.explain(
        tokens, H, N, device=f"cuda:{index}", kernel="hopper", cut=cut, max_seqlen=longest(x)
    )
    return hopper.read_plan(text)


def pick_heads(x: dict, count: int) -> list[int]:
    """Heads from the first to the last."""
    H = x["q"].shape[2]
    return sorted({round(i * (H - 1) / max(count - 1, 1)) for i in range(min(count, H))})


def of_heads(x: dict, heads: list[int]) -> dict:
    """The arguments of these heads alone."""
    index = torch.tensor(heads, device=x["q"].device)
    tensors = {n: y for n, y in x.items() if isinstance(y, torch.Tensor) and n != "cu_seqlens"}
    return x | {n: y.index_select(PER_HEAD.get(n, 2), index) for n, y in tensors.items()}


def exact_forward(x: dict):
    """The output [T, H, V] and the final state [N, H, V, K] in fp64, by the chunk form without roundings."""
    borders = x["cu_seqlens"].tolist() if "cu_seqlens" in x else [0, x["q"].shape[1]]
    flat = {name: x[name].flatten(0, 1) for name in ("q", "k", "v", "g", "beta")}
    H, device = x["q"].shape[2], x["q"].device
    out = torch.zeros(flat["v"].shape, dtype=torch.float64, device=device)
    final = torch.zeros(len(borders) - 1, H, 128, 128, dtype=torch.float64, device=device)
    if "initial_state" in x:
        final += x["initial_state"]
    groups: dict[int, list[int]] = {}
    for n, (begin, end) in enumerate(zip(borders, borders[1:])):
        groups.setdefault(-(-(end - begin) // 32), []).append(n)
    groups.pop(0, None)
    for group in groups.values():
        _exact_group(x, flat, [(borders[n], borders[n + 1]) for n in group], group, out, final)
    return out, final


def _exact_group(x: dict, flat: dict, spans, group, out, final):
    """exact_forward for sequences of equally many chunks."""
    device, H = out.device, out.shape[1]
    chunks = -(-(spans[0][1] - spans[0][0]) // 32)
    offset = torch.arange(32 * chunks, device=device)
    begin, end = (torch.tensor(y, device=device)[:, None] for y in zip(*spans))
    valid = begin + offset < end
    index = torch.where(valid, begin + offset, begin)

    def take(name, past_end=0.0):
        return hopper.to_chunks(hopper.PAIR, flat[name], index, valid, past_end).double()

    def repeat(y):
        return y.double().repeat(len(spans), *[1] * (y.ndim - 1))

    q, k, v, g = take("q"), take("k"), take("v"), take("g", -torch.inf)
    b = torch.sigmoid(take("beta", -torch.inf))
    slope, bias = repeat(x["A_log"]).exp()[:, None, None], repeat(x["dt_bias"])[:, None]
    total = (x["lower_bound"] * torch.sigmoid(slope * (g + bias))).cumsum(2)
    q, k = (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
    up, last = total.exp(), total[:, :, -1:]
    k_up, q_up, k_down = k * up, q * up, k * (-total).exp()
    lower = (b[..., None] * (k_up @ k_down.mT)).tril(-1)
    solve = torch.linalg.solve_triangular(
        lower + torch.eye(32, dtype=torch.float64, device=device), torch.diag_embed(b), upper=False
    )
    attend = (q_up @ k_down.mT).tril()
    k_rest, gamma = (k * (last - total).exp()).mT, last.exp().mT
    state = final[group].flatten(0, 1).mT.contiguous()
    scale = torch.tensor(x["scale"], dtype=torch.float32).item()  # as the kernels get it
    outs = []
    for n in range(chunks):
        u = solve[n] @ (v[n] - k_up[n] @ state)
        outs.append((q_up[n] @ state + attend[n] @ u) * scale)
        state = gamma[n] * state + k_rest[n] @ u
    final[group] = state.mT.unflatten(0, (len(spans), H))
    tokens = torch.stack(outs).unflatten(1, (len(spans), H)).permute(1, 0, 3, 2, 4).flatten(1, 2)
    for (first, behind), y in zip(spans, tokens):
        out[first:behind] = y[: behind - first]


# ---- Figures -----------------------------------------------------------------------------------------------


class Figures(NamedTuple):
    out_equal: float
    ulps: float
    state_equal: float
    state: float


def ulp_bf16(x: torch.Tensor) -> torch.Tensor:
    """The unit in the last place of numbers x > 0 as bf16."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 8)


def compare(got, want) -> Figures:
    """got and want: out [..., H, 128] in bf16 and the state [..., V, K] in fp32."""
    (out, state), (want_out, want_state) = got, want
    assert torch.isfinite(out).all()
    assert torch.isfinite(state).all()
    a, b = out.float(), want_out.float()
    size = torch.maximum(b.abs(), b.abs().amax(-1, keepdim=True) / 16).clamp(min=2.0**-100)
    rows = want_state.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    return Figures(
        (out == want_out).double().mean().item(),
        ((a - b).abs() / ulp_bf16(size)).max().item(),
        (state == want_state).double().mean().item(),
        ((state - want_state).abs() / rows).max().item(),
    )


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The relative RMS error."""
    return ((got.double() - exact).square().sum() / exact.square().sum().clamp(min=1e-300)).sqrt().item()


class Row(NamedTuple):
    shape: str
    kernel: str
    plan: str
    figures: Figures
    kernel_error: float
    ref_error: float


def compare_shape(shape: str, kernels: list[str], ops: str, heads: int, emulated: bool) -> list[Row]:
    x = make(shape, "mixed", "fp32", "cpu" if emulated else "cuda", 0)
    lengths = parse(shape)[1]
    if len(lengths) > 1:
        x["cu_seqlens"] = torch.tensor([0, *lengths], device=x["q"].device).cumsum(0)
    picked = pick_heads(x, heads)
    part = of_heads(x, picked)
    exact, _ = exact_forward(part)
    rows = []
    for spec in kernels:
        kernel, _, cut = spec.partition(":")
        out, state = run_kernel(x, kernel, cut or "auto", emulated)
        got = out[:, :, picked], state[:, picked]
        if kernel == "portable":
            plan, want = "16 tokens", torch_ref.forward(portable_ops(OPS[ops][0]), **part)
        else:
            found = find_plan(x, cut or "auto")
            plan, want = describe(found), hopper.forward(OPS[ops][0](), **part, plan=found)
        errors = [error(y.flatten(0, 1), exact) for y in (got[0], want[0])]
        rows.append(Row(shape, spec, plan, compare(got, want), *errors))
    return rows


def describe(plan: hopper.Plan) -> str:
    if not plan.exact:
        return "mixed (*)"
    if plan.chunks:
        return f"relay of {len(plan.chunks)}"
    return f"passes of {plan.shortest}" if plan.shortest else f"{plan.cta.chunk} tokens"


# ---- The command -------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs="+", default=list(KNOWN), metavar="SHAPE", help="default: those of the benchmark")
    add("--kernels", nargs="+", default=["hopper:never", "hopper", "portable"], metavar="KERNEL[:CUT]")
    add("--heads", type=int, default=4, help="heads that are compared; default: 4")
    add("--ops", choices=OPS, default="torch", help="how the arithmetic computes; see torch_ref_hopper.py")
    add("--device", choices=("cuda", "emulated"), default="cuda")
    options = parser.parse_args(argv)
    emulated = options.device == "emulated"
    if options.ops == "emulator" and not emulated:
        parser.error("--ops emulator is for --device emulated")
    torch.set_float32_matmul_precision("highest")
    name = next((d.name for d in flash_kda.devices() if d.type == "cuda"), None)
    if name is None:
        sys.exit("flash_kda finds no CUDA device; the driver's library must be on LD_LIBRARY_PATH")
    print(f"{name}, PyTorch {torch.__version__}, operations of the arithmetic: {OPS[options.ops][1]},")
    print(f"{options.heads} heads of each shape, gates mixed, states fp32\n")
    columns = ("shape", "kernel", "plan", "out equal", "ulps", "state equal", "state", "kernel", "ref")
    print("| " + " | ".join(columns) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    start = time.monotonic()
    for shape in options.shapes:
        for row in compare_shape(shape, options.kernels, options.ops, options.heads, emulated):
            f = row.figures
            print(
                f"| {row.shape} | {row.kernel} | {row.plan} | {f.out_equal:.3%} | {f.ulps:g} "
                f"| {f.state_equal:.2%} | {f.state:.1e} | {row.kernel_error:.3e} | {row.ref_error:.3e} |",
                flush=True,
            )
    print("\n(*) compared with whole sequences in CTA pairs, since the GPU decides what is cut")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
