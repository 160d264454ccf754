"""Problems for tests of decode and apply_records: arguments, and what the call must write."""

import functools

import numpy as np

import flash_kda
from problems import BARS, error, hold_slots, make_inputs, run_any

NOT_OF_THE_REFERENCE = ("out", "kernel", "threads")
WRITES = ("last", "none", "each")


def make_decode(
    N=3,
    T=4,
    lengths=None,
    H=1,
    HV=2,
    gate="bounded",
    beta="sigmoid",
    normalised=False,
    k_first=False,
    wide=False,
    state=np.float32,
    write="last",
    pool=True,
    accepted=False,
    tree=False,
    records=False,
    past=False,
    apart=None,
    integers=np.int64,
    seed=0,
):
    """The arguments of decode with what the names ask for. lengths: of packed sequences, in place of N and T.
    With a pool, sequence 1 has a slot below first_slot. apart: "indices" or "none", of written_states. What
    decode writes holds NaN, except the pool."""
    rng = np.random.default_rng(seed)
    rows, tokens = (N, T) if lengths is None else (1, sum(lengths))
    if lengths is not None:
        N, T = len(lengths), max(lengths)
    a = make_inputs(rng, rows, tokens, H, HV, gate, beta, normalised, wide)
    if lengths is not None:
        a["cu_seqlens"] = np.cumsum([0, *lengths]).astype(integers)
    if k_first:
        a["state_v_first"] = False
    each = write == "each" and not apart  # a slot of the pool for each token
    columns = T if each else 1
    slots = (N * columns if pool or each else N) + 3 * pool
    a["state"] = rng.standard_normal((slots, HV, 128, 128), dtype=np.float32).astype(state)
    a["write_states"] = write
    if pool or each:
        indices = rng.permutation(slots - pool)[: N * columns].reshape(N, columns) + pool
        if pool and N > 1:
            indices[1] = rng.integers(-1, 1)
        a |= {"state_indices": indices.astype(integers), "first_slot": int(pool)}
        if not each:
            a["state_indices"] = np.ascontiguousarray(a["state_indices"][:, 0])
    if accepted:
        a["num_accepted_tokens"] = rng.integers(1, columns + 1, N).astype(integers)
    if tree:
        a["parents"] = np.array([[rng.integers(-1, i) if i else -1 for i in range(T)] for _ in range(N)])
        a["parents"] = a["parents"].astype(integers)
    if records:
        a["records"] = np.full((N, T + 1, HV, 3, 128), np.nan, np.float32)
    if past:  # records that keep states in their range
        a["past_records"] = rng.standard_normal((N, T, HV, 3, 128), dtype=np.float32) / 8
        a["past_records"][..., 0, :] = rng.uniform(0.8, 1.0, (N, T, HV, 128))
        a["num_accepted_tokens"] = rng.integers(1, T + 1, N).astype(integers)
    if apart:
        columns = T + 1 if write == "each" else 1
        states = N * columns if apart == "indices" else rows * tokens if write == "each" else N
        a["written_states"] = np.full((states + 2, HV, 128, 128), np.nan, state)
    if apart == "indices":
        indices = rng.permutation(states + 2)[: N * columns].reshape(N, columns)
        indices[-1, -1] = -1
        a["written_indices"] = indices.astype(integers)
        if write != "each":
            a["written_indices"] = np.ascontiguousarray(a["written_indices"][:, 0])
    return a


def lengths_of(a):
    if a.get("cu_seqlens") is not None:
        return np.diff(a["cu_seqlens"])
    return np.full(*a["q"].shape[:2])


def slot_of_start(a, n):
    """The slot that sequence n starts from."""
    if a.get("state_indices") is None:
        return n
    if a["write_states"] != "each" or a.get("written_states") is not None:
        return a["state_indices"][n]
    first = 1 if a.get("num_accepted_tokens") is None else a["num_accepted_tokens"][n]
    return a["state_indices"][n, first - 1]


def has_state(a, slot):
    return a.get("first_slot", 0) <= slot < a["state"].shape[0]


def truth_of_decode(a):
    """The right out and pool, in fp64, and the state after each token of each sequence."""
    given = {n: x for n, x in a.items() if n not in NOT_OF_THE_REFERENCE}
    out, states = flash_kda.decode_reference(**given)
    after, begin = [], 0
    pool = a["state"].astype(np.float64)
    written = None if a.get("written_states") is None else a["written_states"].astype(np.float64)
    flat = states if a.get("cu_seqlens") is not None else states.reshape(-1, *states.shape[2:])
    for n, length in enumerate(lengths_of(a)):
        after.append(flat[begin : begin + length])
        begin += length
        start = slot_of_start(a, n)
        if not has_state(a, start) or not length:
            continue
        if written is not None:
            each = a["write_states"] == "each"
            for i in range(length if each else 1):
                slot = begin - length + i if each else n
                if a.get("written_indices") is not None:
                    slot = a["written_indices"][n, i] if each else a["written_indices"][n]
                if slot >= 0:
                    written[slot] = after[n][i if each else -1]
        elif a["write_states"] == "last":
            pool[start] = after[n][-1]
        elif a["write_states"] == "each":
            for i in range(length):
                if has_state(a, a["state_indices"][n, i]):
                    pool[a["state_indices"][n, i]] = after[n][i]
    return {"out": out, "state": pool, "states": after, "written_states": written}


# Calls decode, or the function of another name, as run_any does.
run_decode = functools.partial(run_any, name="decode")


def bar_of(state, device="cpu"):
    """A bf16 state is rounded once."""
    return max(BARS[device][1], 2.2e-3) if state.dtype != np.float32 else 1e-5


def hold_decode(before, after, expected):
    """Asserts that what decode wrote is within the bars, and that it touched nothing else."""
    for name, x in before.items():
        if isinstance(x, np.ndarray) and name not in ("out", "state", "records", "written_states"):
            assert after[name].tobytes() == x.tobytes(), f"{name} was written"
    if after["out"].size:
        assert error(after["out"], expected["out"]) <= BARS["cpu"][0]
    hold_slots(before["state"], after["state"], expected["state"], bar_of(before["state"]), "state")
    if before.get("written_states") is not None:
        pools = (x["written_states"] for x in (before, after, expected))
        hold_slots(*pools, bar_of(before["state"]), "written_states")
    for n, length in enumerate(lengths_of(before)):
        if not has_state(before, slot_of_start(before, n)):
            begin = before["cu_seqlens"][n] if "cu_seqlens" in before else 0
            row = after["out"][0, begin : begin + length] if "cu_seqlens" in before else after["out"][n]
            assert not row.astype(np.float32).any(), "out of a sequence without a state"
