"""Problems for tests: arguments of fwd, the right results for them, and error measures, in NumPy alone."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from ml_dtypes import bfloat16

import flash_kda

# The largest relative RMS error of out and of an fp32 state that is allowed, against the fp64 recurrence:
# the bars CPU and OTHER of support/cases.c.
BARS = {"cpu": (2.2e-3, 1e-5), "cuda": (5.6e-3, 4.8e-3)}
# The arguments of fwd, in the order that callers know.
ARGUMENTS = (
    "q",
    "k",
    "v",
    "g",
    "beta",
    "scale",
    "out",
    "A_log",
    "dt_bias",
    "lower_bound",
    "initial_state",
    "final_state",
    "cu_seqlens",
)
REFERENCE_ARGUMENTS = tuple(name for name in ARGUMENTS if name not in ("out", "final_state"))


def make(T=70, H=2, B=1, lengths=None, initial=None, final=np.float32, cu_dtype=np.int64, seed=0):
    """The arguments of fwd. lengths: tokens of each sequence, with B = 1 and T as their sum; None: each batch
    row is a sequence. initial and final: dtypes of the states, or None. What fwd will write holds NaN."""
    rng = np.random.default_rng(seed)
    N = B
    if lengths is not None:
        T, N = sum(lengths), len(lengths)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(bfloat16)

    arguments = {name: normal(B, T, H, 128) for name in ("q", "k", "v", "g")}
    arguments["beta"] = normal(B, T, H)
    arguments["scale"] = 128**-0.5
    arguments["out"] = np.full((B, T, H, 128), np.nan, bfloat16)
    arguments["A_log"] = rng.uniform(-1, 1, H).astype(np.float32)
    arguments["dt_bias"] = rng.uniform(-6, 1, (H, 128)).astype(np.float32)
    arguments["lower_bound"] = -5.0
    if initial is not None:
        arguments["initial_state"] = rng.standard_normal((N, H, 128, 128), dtype=np.float32).astype(initial)
    if final is not None:
        arguments["final_state"] = np.full((N, H, 128, 128), np.nan, final)
    if lengths is not None:
        arguments["cu_seqlens"] = np.cumsum([0, *lengths]).astype(cu_dtype)
    return arguments


def truth(arguments):
    """The right out and final state, in fp64."""
    return flash_kda.reference(**{n: arguments[n] for n in REFERENCE_ARGUMENTS if n in arguments})


def error(got, want):
    """The relative RMS error."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float(np.sqrt(((got - want) ** 2).sum() / max((want**2).sum(), 1e-300)))


def hold_to(arguments, expected, device):
    """Asserts that out, and final_state if it is fp32, are within the bars."""
    out_bar, state_bar = BARS[device]
    assert error(arguments["out"], expected[0]) <= out_bar
    if arguments.get("final_state") is not None and arguments["final_state"].dtype == np.float32:
        assert error(arguments["final_state"], expected[1]) <= state_bar


def in_threads(work, values):
    """Calls work(value) in a thread for each value, and raises what the first call has raised that failed."""
    with ThreadPoolExecutor(len(values)) as threads:
        for done in [threads.submit(work, value) for value in values]:
            done.result()


def to_torch(arguments, device):
    """The arguments as tensors with memory of their own."""
    import torch

    def convert(x):
        if not isinstance(x, np.ndarray):
            return x
        if x.dtype == bfloat16:
            return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16).to(device)
        return torch.from_numpy(x.copy()).to(device)

    tensors = {name: convert(x) for name, x in arguments.items()}
    if arguments.get("workspace") is not None:  # which PyTorch's allocator aligns
        tensors["workspace"] = torch.empty(arguments["workspace"].shape, dtype=torch.uint8, device=device)
    return tensors


def to_numpy(arguments):
    """The arguments as NumPy arrays."""

    def convert(x):
        if not hasattr(x, "detach"):
            return x
        x = x.detach().cpu()
        return (
            x.view(dtype=_torch().uint16).numpy().view(bfloat16)
            if x.dtype == _torch().bfloat16
            else x.numpy()
        )

    return {name: convert(x) for name, x in arguments.items()}


def _torch():
    import torch

    return torch


# Problems with any options: pools, checkpoints, gates, betas, grouped heads, K-first states.

GATES = ("bounded", "bounded without A_log", "softplus", "softplus without dt_bias", "activated")
BETAS = ("sigmoid", "twice", "activated")
CHECKPOINTS = ("offsets", "columns", "indices", "every", "starts")
NOT_FOR_THE_REFERENCE = ("out", "final_state", "nonfinite", "workspace", "kernel_name")


def make_inputs(rng, rows, tokens, H, HV, gate, beta, normalised, wide):
    """The arguments that fwd and decode have in common, with what the names ask for. wide: g and beta in
    fp32."""

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    a = {name: normal(rows, tokens, H, 128).astype(bfloat16) for name in ("q", "k")}
    a["v"] = normal(rows, tokens, HV, 128).astype(bfloat16)
    a["g"], a["beta"] = normal(rows, tokens, HV, 128), normal(rows, tokens, HV)
    a["scale"], a["lower_bound"] = 128**-0.5, -5.0
    a["A_log"] = rng.uniform(-1, 1, HV).astype(np.float32)
    a["dt_bias"] = rng.uniform(-6, 1, (HV, 128)).astype(np.float32)
    a["out"] = np.full(a["v"].shape, np.nan, bfloat16)
    if gate.startswith("softplus"):
        a["lower_bound"] = None
    if gate == "activated":
        a["g"] = -np.exp(2 * a["g"] - 3)
        a |= {"A_log": None, "dt_bias": None, "lower_bound": None, "use_gate_in_kernel": False}
    if gate.endswith("without A_log"):
        a["A_log"] = None
    if gate.endswith("without dt_bias"):
        a["dt_bias"] = None
    if beta == "twice":
        a["allow_neg_eigval"] = True
    elif beta == "activated":
        a["beta"] = 2 / (1 + np.exp(-a["beta"]))
        a["use_beta_sigmoid_in_kernel"] = False
    if not wide:
        a["g"], a["beta"] = a["g"].astype(bfloat16), a["beta"].astype(bfloat16)
    if normalised:
        for name in ("q", "k"):
            x = a[name].astype(np.float32)
            a[name] = (x / np.sqrt((x * x).sum(-1, keepdims=True))).astype(bfloat16)
        a["use_qk_l2norm_in_kernel"] = False
    return a


def make_any(
    lengths=(5, 64, 0, 40),
    H=1,
    HV=2,
    gate="bounded",
    beta="sigmoid",
    normalised=False,
    k_first=False,
    wide=False,
    pool=False,
    flags=False,
    checkpoints=None,
    state=np.float32,
    checkpoint_dtype=np.float32,
    integers=np.int64,
    seed=0,
):
    """The arguments of fwd with the options that the names ask for. wide: g and beta in fp32. What fwd writes
    holds NaN, or in a pool that is both states its initial states."""
    rng = np.random.default_rng(seed)
    N, T = len(lengths), sum(lengths)
    a = make_inputs(rng, 1, T, H, HV, gate, beta, normalised, wide)
    a["cu_seqlens"] = np.cumsum([0, *lengths]).astype(integers)
    if k_first:
        a["state_v_first"] = False
    slots = N + 3 if pool else N
    a["initial_state"] = rng.standard_normal((slots, HV, 128, 128), dtype=np.float32).astype(state)
    a["final_state"] = a["initial_state"].copy() if pool else np.full((N, HV, 128, 128), np.nan, state)
    if pool:
        indices = 1 + rng.permutation(slots - 1)[:N]
        indices[0] = rng.integers(-1, 1)  # below first_slot
        a |= {"state_indices": indices.astype(integers), "first_slot": 1}
    if flags:
        a["has_initial_state"] = rng.integers(0, 2, N).astype(bool)
    if checkpoints is not None:
        add_checkpoints(a, checkpoints, lengths, checkpoint_dtype, integers, rng)
    return a


def add_checkpoints(a, kind, lengths, dtype, integers, rng):
    N, HV = len(lengths), a["v"].shape[2]
    if kind in ("every", "starts"):
        e = 16 * int(rng.integers(1, 3))
        rows = [length // e for length in lengths]
        a["checkpoint_every"] = e
        starts = np.cumsum([0, *rows[:-1]])
        if kind == "starts":
            starts = sum(rows) + 2 - starts - rows
            a["checkpoint_starts"] = starts.astype(integers)
        count = sum(rows) + 3
    else:
        columns = 1 if kind == "offsets" else 3
        offsets = np.array(
            [[16 * rng.integers(-1, length // 16 + 1) for _ in range(columns)] for length in lengths]
        )
        offsets[0, 0] = lengths[0] // 16 * 16
        a["checkpoint_offsets"] = (offsets[:, 0] if columns == 1 else offsets).astype(integers)
        count = N * columns + 2
        if kind == "indices":
            a["checkpoint_indices"] = (
                rng.permutation(count)[: N * columns].reshape(N, columns).astype(integers)
            )
    a["checkpoint_states"] = np.full((count, HV, 128, 128), np.nan, dtype)


def checkpoints_of(a):
    """Every checkpoint of a call: the sequence, the number of tokens, the row."""
    lengths = np.diff(a["cu_seqlens"])
    if a.get("checkpoint_every") is not None:
        e, row = a["checkpoint_every"], 0
        for n, length in enumerate(lengths):
            first = row if a.get("checkpoint_starts") is None else a["checkpoint_starts"][n]
            yield from ((n, (i + 1) * e, first + i) for i in range(length // e))
            row += length // e
    elif a.get("checkpoint_offsets") is not None:
        offsets = a["checkpoint_offsets"].reshape(len(lengths), -1)
        rows = np.arange(offsets.size).reshape(offsets.shape)
        if a.get("checkpoint_indices") is not None:
            rows = a["checkpoint_indices"].reshape(offsets.shape)
        for n, c in np.ndindex(offsets.shape):
            if offsets[n, c] > 0:
                yield n, offsets[n, c], rows[n, c]


def truth_of_any(a):
    """What fwd must leave in out, final_state and checkpoint_states, in fp64. What it must not touch is as in
    the arguments."""
    given = {name: x for name, x in a.items() if name not in NOT_FOR_THE_REFERENCE}
    out, states, *checkpoints = flash_kda.reference(**given)
    final = np.array(a["final_state"], np.float64)
    for n, state in enumerate(states):
        slot = n if a.get("state_indices") is None else a["state_indices"][n]
        if slot >= a.get("first_slot", 0):
            final[slot] = state
    truth = {"out": out, "final_state": final}
    if checkpoints:
        rows = np.array(a["checkpoint_states"], np.float64)
        for _, _, row in checkpoints_of(a):
            rows[row] = checkpoints[0][row]
        truth["checkpoint_states"] = rows
    return truth


def hold_slots(old, got, want, bar, name):
    """Asserts that states are right, and that one that must stay as it is was not touched."""
    for slot in range(len(want)):
        if np.array_equal(want[slot], old[slot].astype(np.float64), equal_nan=True):
            assert got[slot].tobytes() == old[slot].tobytes(), f"{name}[{slot}] was touched"
        else:
            assert error(got[slot], want[slot]) <= bar, f"{name}[{slot}]"


def hold_any(before, after, expected, device="cpu"):
    """Asserts that what fwd wrote is within the bars, and that it touched nothing else. before and after:
    arguments in NumPy."""
    for name, x in before.items():
        if isinstance(x, np.ndarray) and name not in expected and name not in ("nonfinite", "workspace"):
            assert after[name].tobytes() == x.tobytes(), f"{name} was written"
    out_bar, state_bar = BARS[device]
    assert error(after["out"], expected["out"]) <= out_bar
    for name in ("final_state", "checkpoint_states"):
        if name not in expected:
            continue
        bar = state_bar if before[name].dtype == np.float32 else max(state_bar, 3e-3)
        hold_slots(before[name], after[name], expected[name], bar, name)


def _keep_in_place(a, work):
    """A pool that is both states of `a` becomes one array of `work`, too."""
    if a.get("final_state") is not None and a["final_state"] is a.get("initial_state"):
        work["final_state"] = work["initial_state"]
    return work


def copied(a):
    """The arguments with arrays of their own."""
    return _keep_in_place(a, {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in a.items()})


def run_any(a, library="numpy", mode="eager", device="cpu", call=None, name="fwd"):
    """Calls `call`, or the package's function of that name, on copies of the arguments, as a library and a
    mode have it. Returns them in NumPy."""
    call = call or getattr(flash_kda, name)
    if library == "numpy":
        work = copied(a)
        assert call(**work) is None
        return work
    torch = _torch()
    work = _keep_in_place(a, to_torch(a, device))
    if mode != "eager":
        torch.compiler.reset()
        inner = call
        call = torch.compile(lambda **t: inner(**t), fullgraph=True, backend=mode)
    with torch.no_grad():
        assert call(**work) is None
    return to_numpy(work)
