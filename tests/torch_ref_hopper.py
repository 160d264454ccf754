"""The chunk algorithm of the Hopper kernels in plain PyTorch, rounding where the kernels round.

This file is the description of the Hopper kernels' numbers. Each step is a function with the name that it has
in kernels/hopper, and every rounding to fp16, bf16 or tf32 is written out. Nothing here is built: `TorchOps`
uses PyTorch alone, on a CPU or on a GPU. Heads and sequences are batched, so a GPU runs 8192 tokens of a few
heads in a second.

What PyTorch cannot do as the kernels do it is gathered in one class of operations: the order and the rounding
of the tensor core's sums, and the approximate ex2, rcp and rsqrt. `TorchOps` replaces these operations by the
nearest of PyTorch; `TensorCoreOps` and `EmulatorOps` sum as a tensor core and as tests/emulator do.
docs/measurements.md says how much of the results that leaves equal to the bit.

Names and shapes: D is 128, the channels and the rows of V; C is the tokens of a chunk, S its subchunks of 16
tokens. R counts heads of work items: R = items * heads. n counts chunks. The state is transposed, [V, K].

Three things are left out. The inputs must be finite. Tokens that a value 2^13 times larger dwarfs within
their chunk are not finished by themselves (block/early_outputs.cuh). Work items are not divided between CTAs:
a division hands the state over in fp32, and only the times change at which scales are chosen.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch_ref import LOG2_E, UNTRUNCATE, ex2_minus_1, truncate_tf32

DIM = 128
SUBCHUNK = 16
CUT_CHUNK = 32  # tokens: segments begin where chunks of a CTA pair begin
MAPS_CHAINED, GROUP_MAPS = 24, 8  # see segments.h
NEAREST_TO_ZERO = -1e-30

# The order in which a tf32 product takes the eight channels of a step.
STEP_ORDER = [8 * s + 2 * t + e for s in range(DIM // 8) for e in range(2) for t in range(4)]


class Cta(NamedTuple):
    """The constants of block/cta.cuh that change bits."""

    chunk: int  # tokens
    team_warps: int  # of the preparation: each has an equal share of the channels
    partials: int  # sums over channels that the team leaves; the solver adds them up
    outputs: bool


SOLO = Cta(16, 2, 2, True)
PAIR = Cta(32, 4, 2, True)
MAP = Cta(32, 2, 1, False)


# ---- Operations --------------------------------------------------------------------------------------------


def half(x: torch.Tensor) -> torch.Tensor:
    """x rounded to fp16."""
    return x.half().float()


def bf16(x: torch.Tensor) -> torch.Tensor:
    """x rounded to bf16."""
    return x.bfloat16().float()


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a b + c with one rounding. The product is exact in fp64; the sum is rounded to fp64 and then to fp32,
    which differs from one rounding in about one of 2^29 sums."""
    return (a.double() * b.double() + c.double()).float()


class TorchOps:
    """PyTorch's own functions. On a GPU its exp2 and rsqrt are the instructions ex2.approx and rsqrt.approx
    for all numbers that occur here; its reciprocal is rounded correctly, and rcp.approx is not always."""

    ex2 = staticmethod(torch.exp2)
    rcp = staticmethod(torch.reciprocal)
    rsqrt = staticmethod(torch.rsqrt)
    fma = staticmethod(fma)

    def multiply(self, a, b, c=None, step=16):
        """c + a b^T for a [..., m, k] and b [..., n, k], whose elements are fp16, bf16 or tf32 numbers in
        fp32, `step` depths after the other."""
        for i in range(0, a.shape[-1], step):
            c = self.step(a[..., i : i + step], b[..., i : i + step], c)
        return c

    def step(self, a, b, c):
        """One instruction. All products are exact in fp32; PyTorch sums them in fp32 in an order of its own,
        and the sum is added to c."""
        product = self._products(a, b)
        return product if c is None else c + product

    @staticmethod
    def _products(a, b):
        """a b^T. Products of one row with one row are sums, and cuBLAS gets at most 2^15 products at once."""
        if a.shape[-2] == b.shape[-2] == 1:
            return (a * b).sum(-1, keepdim=True)
        shape = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        if shape.numel() <= 1 << 15:
            return a @ b.mT
        a, b = (x.expand(*shape, *x.shape[-2:]).flatten(0, -3).split(1 << 15) for x in (a, b))
        return torch.cat([x @ y.mT for x, y in zip(a, b)]).unflatten(0, shape)


class EmulatorOps(TorchOps):
    """What tests/emulator/instructions.h does: special functions of the C library and sums from depth to
    depth, each rounded to nearest."""

    def __init__(self):
        self.exp2f = ctypes.CDLL("libm.so.6").exp2f
        self.exp2f.argtypes, self.exp2f.restype = [ctypes.c_float], ctypes.c_float

    def ex2(self, x):
        return torch.tensor([self.exp2f(y) for y in x.flatten().tolist()]).view(x.shape)

    @staticmethod
    def rsqrt(x):
        return 1.0 / torch.sqrt(x.double()).float()

    def step(self, a, b, c):
        total = torch.zeros((), device=a.device)
        for k in range(a.shape[-1]):
            total = total + a[..., :, None, k] * b[..., None, :, k]
        return total if c is None else c + total


class OneUlpOffOps(TorchOps):
    """Moves every second result of ex2, rcp and rsqrt by one unit in the last place, which is as far as the
    approximate instructions are off. It shows how much the results depend on them."""

    def ex2(self, x):
        return self._off(x, torch.exp2(x))

    def rcp(self, x):
        return self._off(x, torch.reciprocal(x))

    def rsqrt(self, x):
        return self._off(x, torch.rsqrt(x))

    @staticmethod
    def _off(x, y):
        off = (y.contiguous().view(torch.int32) + (x.contiguous().view(torch.int32) >> 8 & 1)).view(
            torch.float32
        )
        return torch.where(torch.isfinite(y) & (y != 0) & (y != 1), off, y)


class TensorCoreOps(TorchOps):
    """A tensor core of Hopper, as arXiv:2511.10909 and arXiv:2512.07004 describe it from outside: the exact
    products of a step and the accumulator are aligned to the largest exponent among them, each is truncated
    to 25 fractional bits, and their exact sum is truncated to fp32."""

    FRACTION = 25
    BYTES = 1 << 28  # of a temporary tensor

    def step(self, a, b, c):
        shape = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a = a.expand(*shape, *a.shape[-2:]).flatten(0, -3) if shape else a[None]
        b = b.expand(*shape, *b.shape[-2:]).flatten(0, -3) if shape else b[None]
        m, n, k = a.shape[-2], b.shape[-2], a.shape[-1]
        c = torch.zeros(len(a), m, n, device=a.device) if c is None else c.reshape(-1, m, n)
        c = c.expand(len(a), m, n)
        at_once = max(1, self.BYTES // (8 * m * n * k))
        parts = [self._fused(*x) for x in zip(*(x.split(at_once) for x in (a, b, c)))]
        return torch.cat(parts).reshape(*shape, m, n)

    def _fused(self, a, b, c):
        products = a.double()[:, :, None, :] * b.double()[:, None, :, :]
        exponents = self._exponent(a)[:, :, None, :] + self._exponent(b)[:, None, :, :]
        exponents = torch.where(products == 0, -126, exponents)
        largest = torch.maximum(exponents.amax(-1), self._exponent(c))
        unit = self._power(largest - self.FRACTION)
        total = torch.trunc(products / unit[..., None]).sum(-1) + torch.trunc(c.double() / unit)
        exact = total * unit
        nearest = exact.float()
        return torch.where(
            nearest.double().abs() > exact.abs(),
            torch.nextafter(nearest, torch.zeros_like(nearest)),
            nearest,
        )

    @staticmethod
    def _exponent(x):
        return torch.where(x == 0, -126, torch.frexp(x).exponent - 1)

    @staticmethod
    def _power(exponent):
        return ((exponent.long() + 1023) << 52).view(torch.float64)


def power_above(x: torch.Tensor) -> torch.Tensor:
    """A power of two above x >= 0."""
    return ((x.contiguous().view(torch.int32) & 0x7F800000) + 0x00800000).view(torch.float32)


def inverse_power(x: torch.Tensor) -> torch.Tensor:
    """1 / x for a power of two."""
    return (0x7F000000 - x.contiguous().view(torch.int32)).view(torch.float32)


# ---- Preparation: block/norms.cuh, prepare.cuh, prepare_slice.cuh ------------------------------------------


def inverse_norms(ops, x: torch.Tensor) -> torch.Tensor:
    """1 / |x| of [..., D]. The tensor core squares bf16: two sums, each of every other 16 channels."""
    x = x.unflatten(-1, (4, 2, 16))
    even, odd = (x[..., i, :].flatten(-2)[..., None, :] for i in range(2))
    squares = ops.multiply(even, even) + ops.multiply(odd, odd)
    return ops.rsqrt(squares[..., 0] + 1e-6)


def log2_decay(ops, g, A_log, dt_bias, lower_bound):
    """The log2 decay of raw gates g [n, R, S, 16, D]; A_log [R], dt_bias [R, D] (common/gate.cuh)."""
    f32 = lambda x: torch.tensor(x, dtype=torch.float32, device=g.device)  # noqa: E731
    slope = ops.ex2((A_log * f32(LOG2_E)).clamp(max=100.0)) * f32(-LOG2_E)
    slope = slope.clamp(max=NEAREST_TO_ZERO)[:, None]
    offset = (dt_bias * slope).clamp(min=-3.4e38)
    inverse_bound = 1.0 / (f32(min(lower_bound, NEAREST_TO_ZERO)) * f32(LOG2_E))
    e = ops.ex2(fma(g, slope[:, None, None], offset[:, None, None]))
    return ops.rcp(fma(e, inverse_bound, inverse_bound))


def accumulate_gates(ops, x: torch.Tensor) -> torch.Tensor:
    """Running sums over the tokens of [..., 16, D]: a triangle of ones times the gates, each of which enters
    the tensor core as the sum of two bf16, the small one first."""
    triangle = torch.ones(SUBCHUNK, SUBCHUNK, device=x.device).tril()
    high = bf16(x)
    low = bf16(x - high)
    return ops.multiply(triangle, high.mT, ops.multiply(triangle, low.mT))


def sum_over_channels(cta: Cta, multiply, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """rows . columns^T of [..., D]: a sum over each warp's channels, then over the warps."""
    share = DIM // cta.team_warps
    warps = [multiply(rows[..., i : i + share], columns[..., i : i + share]) for i in range(0, DIM, share)]
    if cta.team_warps > cta.partials:
        warps = [x + y for x, y in zip(warps[cta.partials :], warps[: cta.partials])]
    return warps[0] if len(warps) == 1 else warps[0] + warps[1]


class Products(NamedTuple):
    """Products over channels: of each subchunk with itself [n, R, S, 16, 16], and of the second subchunk with
    the first one [n, R, 16, 16]."""

    within: torch.Tensor
    across: torch.Tensor | None


def prepare(ops, cta: Cta, q, k, g, A_log, dt_bias, lower_bound):
    """The prepared tiles of all chunks, [n, R, C, D] in fp16 numbers, the products over channels of K~ and
    Q~, and gamma - 1 [n, R, D]. q, k and g are [n, R, S, 16, D]."""
    total = accumulate_gates(ops, log2_decay(ops, g, A_log, dt_bias, lower_bound))
    up, down = ops.ex2(total), ops.ex2(-total)
    over = up[..., -1:, :]  # the decay over a subchunk
    k = k * inverse_norms(ops, k)
    k_down = k * down
    decayed = [k * up]
    if cta.outputs:
        decayed.append(q * inverse_norms(ops, q) * up)
    rest = half(k_down * over)

    # A subchunk with itself, in tf32.
    ordered = truncate_tf32(k_down[..., STEP_ORDER])
    tf32 = lambda a, b: ops.multiply(a, b, step=8)  # noqa: E731
    within = [sum_over_channels(cta, tf32, truncate_tf32(x[..., STEP_ORDER]), ordered) for x in decayed]
    decayed = [half(x) for x in decayed]
    across = [None] * len(decayed)
    gamma = total[:, :, 0, -1]

    # The second subchunk with the first one, in fp16, with decays counted from the border between them.
    if cta.chunk == 2 * SUBCHUNK:
        across = [sum_over_channels(cta, ops.multiply, x[:, :, 1], rest[:, :, 0]) for x in decayed]
        over_first, over_second = half(over[:, :, 0]), half(over[:, :, 1])
        rest = torch.stack((half(rest[:, :, 0] * over_second), rest[:, :, 1]), dim=2)
        decayed = [torch.stack((x[:, :, 0], half(x[:, :, 1] * over_first)), dim=2) for x in decayed]
        gamma = total[:, :, 1, -1] + gamma
    tiles = {"k_rest": rest.flatten(2, 3), "decayed": torch.cat([x.flatten(2, 3) for x in decayed], dim=2)}
    return tiles, [Products(*x) for x in zip(within, across)], ex2_minus_1(ops, gamma)


# ---- Solver: block/solve.cuh -------------------------------------------------------------------------------


def write_strengths(ops, beta: torch.Tensor) -> torch.Tensor:
    return ops.rcp(1.0 + ops.ex2(beta * torch.tensor(-LOG2_E, dtype=torch.float32, device=beta.device)))


def divisor_above(b: torch.Tensor) -> torch.Tensor:
    """What T is divided by, for b [n, R, C]."""
    above = power_above(b.amax(-1))
    return torch.where(above > 2.0**-6, 1.0, above.clamp(min=2.0**-100))


def attend(ops, products: Products) -> torch.Tensor:
    """P [n, R, C, C] in fp16 numbers."""
    units = torch.tensor(UNTRUNCATE, dtype=torch.float32, device=products.within.device)
    within = half(products.within * units).tril()
    return _assemble(within, None if products.across is None else half(products.across))


def _assemble(within: torch.Tensor, across: torch.Tensor | None) -> torch.Tensor:
    if across is None:
        return within[:, :, 0]
    top = torch.cat((within[:, :, 0], torch.zeros_like(across)), dim=-1)
    return torch.cat((top, torch.cat((across, within[:, :, 1]), dim=-1)), dim=-2)


def solve_chunk(ops, products: Products, b: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """T / divisor = (I + L)^-1 diag(b) / divisor, [n, R, C, C] in fp16 numbers, for b [n, R, C]."""
    units = torch.tensor(UNTRUNCATE, dtype=torch.float32, device=b.device)
    b = b.unflatten(-1, (-1, SUBCHUNK))
    own_b = b * inverse_power(divisor)[..., None, None]
    factor = (units * b)[..., None]  # of the rows of L

    # Tiles of 8 x 8 on the diagonal: forward substitution in fp32.
    first, second = slice(0, 8), slice(8, 16)
    inverses = []
    for tile in (first, second):
        lower = (products.within[..., tile, tile] * factor[..., tile, :]).tril(-1)
        x = torch.eye(8, device=b.device).expand(lower.shape).clone()
        for m in range(7):
            x[..., m + 1 :, :] = fma(
                -lower[..., m + 1 :, m : m + 1], x[..., m : m + 1, :], x[..., m + 1 :, :]
            )
        inverses.append(x)
    top, low = (half(x * own_b[..., None, tile]) for x, tile in zip(inverses, (first, second)))

    # Below them inside a subchunk: - C^-1 lower A^-1 diag(b). Products are of transposes.
    lower = half(products.within[..., second, first] * factor[..., second, :])
    product = half(-ops.multiply(top.mT, lower))
    below = half(ops.multiply(product, half(inverses[1])).mT)
    zeros = torch.zeros_like(below)
    solved = torch.cat((torch.cat((top, zeros), -1), torch.cat((below, low), -1)), -2)
    if products.across is None:
        return solved[:, :, 0]

    # The second subchunk with the first one: - T_1 across T_0.
    product = ops.multiply(solved[:, :, 0].mT, half(products.across))
    across = ops.multiply(half(product * -divisor[..., None, None]), solved[:, :, 1])
    return _assemble(solved, half(across.mT))


# ---- Recurrence: block/recurrence.cuh, scaled_rows.cuh -----------------------------------------------------


def largest_of_lanes(v: torch.Tensor) -> torch.Tensor:
    """The largest |v| of each of the four lanes that share a row of [R, V, C]: [R, V, 4]."""
    return v.abs().unflatten(-1, (-1, 4, 2)).amax((-3, -1))


def any_in_warp(x: torch.Tensor) -> torch.Tensor:
    """Whether any of the 16 rows of a warp has it, for [R, V]."""
    return largest_in_warp(x)


def largest_in_warp(x: torch.Tensor) -> torch.Tensor:
    """The largest of the 16 rows of a warp, for [R, V]."""
    warps = x.unflatten(-1, (-1, 16)).amax(-1, keepdim=True)
    return warps.expand(*warps.shape[:-1], 16).flatten(-2)


class Rows(NamedTuple):
    """The rows of a state [R, V, K], divided by their scales [R, V], and what a warp remembers of them."""

    state: torch.Tensor
    scale: torch.Tensor
    look_again: torch.Tensor
    choose: torch.Tensor
    faint: torch.Tensor
    grows: torch.Tensor


def fitting_scale(rows: Rows, largest_value: torch.Tensor) -> torch.Tensor:
    most = torch.maximum(rows.state.abs().amax(-1) * rows.scale, largest_value)
    above = power_above(most.clamp(max=2.0**126))
    least = (rows.scale * 2.0**-100).clamp(min=2.0**-126)
    return torch.maximum(above, least).clamp(max=2.0**126)


def rescale(rows: Rows, following: torch.Tensor, where: torch.Tensor, read: torch.Tensor):
    """Gives the rows `where` new scales, which divide the state and what was read from it."""
    factor = torch.where(where, rows.scale * inverse_power(following), 1.0)
    state, read = rows.state * factor[..., None], read * factor[..., None]
    leapt = any_in_warp((factor >= 16.0) | (factor <= 0.0625))
    scale = torch.where(where, following, rows.scale)
    kept = (rows.choose & ~where, rows.faint & ~where, rows.grows & ~where)
    return Rows(state, scale, leapt & where, *kept), read


def fit_first_token(rows: Rows, v: torch.Tensor, with_others: torch.Tensor | bool) -> torch.Tensor:
    """Scales for the state and a chunk's first token, whose values are v [R, V]."""
    first = torch.where(v.abs() < torch.inf, v.abs(), 0.0)
    least = 0.25 * largest_in_warp(first) * torch.as_tensor(with_others, device=v.device)
    return fitting_scale(rows, torch.maximum(first, least))


def choose_first_scales(cta: Cta, rows: Rows, v, divisor, left) -> Rows:
    """Before a work item's first chunk v [R, V, C]; `left` [R, 1] is the work item's tokens."""
    if cta.outputs:
        following = fit_first_token(rows, v[..., 0] * divisor[:, None], True)
    else:
        most = torch.where(left < cta.chunk, 0.0, v.abs().amax(-1))
        following = fitting_scale(rows, most * divisor[:, None])
    return rescale(rows, following, torch.ones_like(rows.faint), torch.zeros_like(rows.state))[0]


def adapt(cta: Cta, rows: Rows, v, read, divisor, look):
    """Chooses new scales where values do not fit: at once if there are no outputs, and otherwise in the next
    chunk, unless values are far too large. A chunk that does not need it is left as it is."""
    divisor = divisor[:, None, None]
    v = v * divisor
    read = torch.cat((read[..., : cta.chunk] * divisor, read[..., cta.chunk :]), dim=-1)
    lanes = largest_of_lanes(v)
    look_here = look | rows.look_again
    too_large = lambda rows: (lanes > 16.0 * rows.scale[..., None]).any(-1)  # noqa: E731
    too_small = lambda rows: look_here & (lanes < 2.0**-9 * rows.scale[..., None]).any(-1)  # noqa: E731
    if cta.outputs:
        late = rows.choose | (look & rows.faint)
        following = fit_first_token(rows, v[..., 0], rows.grows)
        following = torch.where(rows.grows, torch.maximum(following, rows.scale), following)
        following = torch.where(late, following, rows.scale)
        room = torch.where(divisor < 1.0, 16.0, 2.0**11)
        at_once = any_in_warp((lanes > room * following[..., None]).any(-1))
        following = torch.where(at_once, fitting_scale(rows, lanes.amax(-1)), following)
        rows, read = rescale(rows, following, at_once | late, read)
        grows = any_in_warp(too_large(rows))
        choose = grows | (~late & any_in_warp(too_small(rows)))
        rows = rows._replace(choose=choose, grows=rows.grows | grows, look_again=rows.look_again & ~choose)
    else:
        act = any_in_warp(too_large(rows) | too_small(rows)) | (look & rows.faint)
        rows, read = rescale(rows, fitting_scale(rows, lanes.amax(-1)), act, read)
    return rows._replace(faint=rows.faint | (divisor[..., 0] < 1.0)), v, read


def step(ops, cta: Cta, rows: Rows, chunk: dict[str, torch.Tensor], v, look):
    """One chunk: rows after it, and (Q~ S + U P)^T without the scale, or None."""
    C = cta.chunk
    read = ops.multiply(half(rows.state), chunk["decayed"])  # (K~ S)^T and (Q~ S)^T
    rows, v, read = adapt(cta, rows, v, read, chunk["divisor"], look)
    r = half(fma(v, inverse_power(rows.scale)[..., None], -read[..., :C]))
    u = half(ops.multiply(r, chunk["solve"]))
    own = ops.multiply(u, chunk["attend"]) + read[..., C:] if cta.outputs else None
    state = fma(rows.state, chunk["gamma_minus_1"][:, None, :], rows.state)
    state = ops.multiply(u, chunk["k_rest"].mT, state)
    return rows._replace(state=state), own


# ---- Work items --------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """A sequence or a segment: its tokens, counted over the whole tensor."""

    begin: int
    length: int


def to_chunks(cta: Cta, x: torch.Tensor, index: torch.Tensor, valid: torch.Tensor, past_end: float):
    """x [tokens, H, ...] as [n, R, C, ...] in fp32, for the tokens index [items, n C]."""
    picked = x[index].float()
    picked = torch.where(valid.view(*valid.shape, *[1] * (x.ndim - 1)), picked, past_end)
    picked = picked.unflatten(1, (-1, cta.chunk)).movedim(1, 0).transpose(2, 3)  # n, items, H, C
    return picked.flatten(1, 2)


def chunks_of_items(ops, cta: Cta, x: dict, items: Sequence[Item]):
    """All that items of equally many chunks need of their tokens: the chunks' tensors, and v [n, R, V, C]."""
    device, count = x["q"].device, -(-items[0].length // cta.chunk)
    offset = torch.arange(count * cta.chunk, device=device)
    begin, length = (torch.tensor(y, device=device)[:, None] for y in zip(*items))
    valid = offset < length
    index = torch.where(valid, begin + offset, begin)
    take = lambda name, past_end=0.0: to_chunks(cta, x[name], index, valid, past_end)  # noqa: E731
    subchunks = lambda y: y.unflatten(2, (-1, SUBCHUNK))  # noqa: E731
    by_item = lambda y: y.float().repeat(len(items), *[1] * (y.ndim - 1))  # noqa: E731

    q, k, g = subchunks(take("q")), subchunks(take("k")), subchunks(take("g", -torch.inf))
    gate = by_item(x["A_log"]), by_item(x["dt_bias"]), x["lower_bound"]
    tiles, products, gamma_minus_1 = prepare(ops, cta, q, k, g, *gate)
    b = write_strengths(ops, take("beta", -torch.inf))
    divisor = divisor_above(b)
    tiles["solve"] = solve_chunk(ops, products[0], b, divisor)
    if cta.outputs:
        tiles["attend"] = attend(ops, products[1])
    return tiles | {"gamma_minus_1": gamma_minus_1, "divisor": divisor}, take("v").mT


def compute_items(ops, cta: Cta, x: dict, items: Sequence[Item], state, out=None, is_map=False):
    """Carries the state [items, H, V, K] through each item, and writes the items' tokens of out. Returns the
    states after the items. is_map: values count as zeros, and rows keep the scale one."""
    after = state.clone()
    by_chunks: dict[int, list[int]] = {}
    for i, item in enumerate(items):
        by_chunks.setdefault(-(-item.length // cta.chunk), []).append(i)
    for count, group in by_chunks.items():
        if count:
            some = [items[i] for i in group]
            after[group] = _compute_group(ops, cta, x, some, state[group], out, is_map)
    return after


def _compute_group(ops, cta: Cta, x: dict, items: Sequence[Item], state, out, is_map):
    """compute_items for items of equally many chunks."""
    H, device = x["q"].shape[1], x["q"].device
    tiles, values = chunks_of_items(ops, cta, x, items)
    lengths = torch.tensor([i.length for i in items], device=device).repeat_interleave(H)[:, None]
    flags = torch.zeros(len(items) * H, DIM, dtype=torch.bool, device=device)
    rows = Rows(state.flatten(0, 1), torch.ones(flags.shape, device=device), flags, flags, flags, flags)
    if is_map:
        values = torch.zeros_like(values[:1]).expand(values.shape)
    else:
        rows = choose_first_scales(cta, rows, values[0], tiles["divisor"][0], lengths)
    scale = torch.tensor(x["scale"], dtype=torch.float32, device=device)
    outputs = []
    for n in range(len(values)):
        look = torch.full_like(lengths, (n * cta.chunk) % 128 == 0 and not is_map, dtype=torch.bool)
        rows, own = step(ops, cta, rows, {name: y[n] for name, y in tiles.items()}, values[n], look)
        if own is not None:
            outputs.append((own * (scale * rows.scale)[..., None]).bfloat16())
    if outputs:
        found = torch.stack(outputs).unflatten(1, (len(items), H)).permute(1, 0, 4, 2, 3).flatten(1, 2)
        for item, tokens in zip(items, found):
            out[item.begin : item.begin + item.length] = tokens[: item.length]
    return (rows.state * rows.scale[..., None]).unflatten(0, (len(items), H))


# ---- Join: join/carry.cuh, join.cuh ------------------------------------------------------------------------


def split(x: torch.Tensor):
    """What fp16 keeps of x, and what fp16 keeps of the rest."""
    high = half(x)
    return high, half(x - high)


def carry(ops, x: torch.Tensor, matrix: torch.Tensor, add=None) -> torch.Tensor:
    """x M + add, for rows x [H, V, K] and a map M [H, K, K]."""
    scale = power_above(x.abs().amax(-1).clamp(max=2.0**126)).clamp(min=2.0**-100)
    high, low = split(x * inverse_power(scale)[..., None])
    map_high, map_low = (y.mT for y in split(matrix))
    product = ops.multiply(high, map_low) + ops.multiply(low, map_high) + ops.multiply(high, map_high)
    return fma(product, scale[..., None], torch.zeros_like(x) if add is None else add)


def join(ops, state: torch.Tensor, maps: torch.Tensor, states: torch.Tensor) -> list[torch.Tensor]:
    """The states before segments 1, 2, ..., from the state before segment 1 and from M and B of the inner
    segments, [inner, H, 128, 128]. Many maps are composed in groups first."""
    groups = [list(range(len(maps)))]
    if len(maps) > MAPS_CHAINED:
        groups = [groups[0][i : i + GROUP_MAPS] for i in range(0, len(maps), GROUP_MAPS)]
    before = [state]
    for group in groups:
        start = before[-1]
        if len(groups) > 1:
            high, low = split(maps[group[0]])
            composed, offset = high + low, states[group[0]]
            for i in group[1:]:
                composed, offset = carry(ops, composed, maps[i]), carry(ops, offset, maps[i], states[i])
            for i in group[:-1]:
                before.append(carry(ops, before[-1], maps[i], states[i]))
            before.append(carry(ops, start, composed, offset))
        else:
            for i in group:
                before.append(carry(ops, before[-1], maps[i], states[i]))
    return before


# ---- Calls -------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a call runs, as far as bits depend on it."""

    cta: Cta = PAIR  # of whole sequences, and of all outputs of cut ones
    shortest: int = 0  # passes: a sequence of n tokens has n // shortest segments; 0: stays whole
    chunks: tuple[int, ...] = ()  # relay: of each segment
    spares: bool = False  # relay: the state after a first segment comes from a map CTA
    exact: bool = True  # False: the mixed schedule, whose cuts are left out here

    def segments(self, length: int) -> list[int]:
        """The borders of a sequence's segments, in tokens."""
        if self.chunks:
            borders = [sum(self.chunks[:i]) for i in range(len(self.chunks) + 1)]
        elif self.shortest and length >= 2 * self.shortest:
            n, chunks = length // self.shortest, -(-length // CUT_CHUNK)
            borders = [chunks // n * i + min(chunks % n, i) for i in range(n + 1)]
        else:
            return [0, length]
        return [min(CUT_CHUNK * border, length) for border in borders]


def read_plan(text: str) -> Plan:
    """The plan in what flash_kda.explain() says about a call of the kernel "hopper"."""
    if found := re.search(r"Relay: .* segments have ([\d, ]+) and (\d+) chunks", text):
        chunks = (*map(int, found[1].split(", ")), int(found[2]))
        return Plan(chunks=chunks, spares="first segments." in text)
    if found := re.search(r"Passes: .* into segments of about (\d+)", text):
        return Plan(shortest=int(found[1]))
    if "Mixed:" in text:
        return Plan(exact=False)
    return Plan(cta=SOLO if "solo CTA" in text else PAIR)


def forward(
    ops,
    q,
    k,
    v,
    g,
    beta,
    scale,
    A_log,
    dt_bias,
    lower_bound,
    initial_state=None,
    cu_seqlens=None,
    plan=Plan(),  # noqa: B008
):
    """Takes the arguments of flash_kda.fwd without its outputs, and a plan.

    Returns the output [B, T, H, V] in bf16 and the final state [N, H, V, K] in fp32.
    """
    B, T, H = q.shape[:3]
    borders = [T * i for i in range(B + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    x = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    x = {name: y.flatten(0, 1) for name, y in x.items()}
    x |= {"A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound, "scale": scale}
    out = torch.zeros_like(x["v"])
    if initial_state is None:
        state = torch.zeros(len(borders) - 1, H, DIM, DIM, device=q.device)
    else:
        state = initial_state.float()

    whole, final = [], state.clone()
    for n, (begin, end) in enumerate(zip(borders, borders[1:])):
        cuts = [begin + border for border in plan.segments(end - begin)]
        items = [Item(a, b - a) for a, b in zip(cuts, cuts[1:])]
        if len(items) == 1:
            whole.append((n, items[0]))
        else:
            final[n] = cut_sequence(ops, plan, x, items, state[n], out)
    if whole:
        which, items = zip(*whole)
        which = list(which)
        final[which] = compute_items(ops, plan.cta, x, items, state[which], out)
    return out.view(B, T, H, DIM), final


def cut_sequence(ops, plan: Plan, x: dict, items: Sequence[Item], state: torch.Tensor, out):
    """The outputs of a cut sequence and the state after it, from the state [H, V, K] before it."""
    inner = items[1:-1]
    first = compute_items(ops, PAIR, x, items[:1], state[None], out)[0]
    if plan.spares:
        first = compute_items(ops, MAP, x, items[:1], state[None])[0]
    before = [first]
    if inner:
        zeros = torch.zeros(len(inner), *state.shape, device=state.device)
        identity = torch.eye(DIM, device=state.device).expand(zeros.shape)
        maps = compute_items(ops, MAP, x, inner, identity, is_map=True)
        before = join(ops, first, maps, compute_items(ops, MAP, x, inner, zeros))
    return compute_items(ops, PAIR, x, items[1:], torch.stack(before), out)[-1]
