"""chunk_kda: the arguments, defaults and results of flash-linear-attention's function of that name."""

import inspect

import pytest

import fla_problems
import flash_kda
from fla_problems import (
    ACTIVATED,
    FUSED,
    WRONG,
    hold,
    hold_refusal,
    hold_to_fla_s_kernel,
    hold_to_fla_s_plain_recurrence,
    make_call,
    truth_of,
)
from problems import error

torch = pytest.importorskip("torch")

CALLS = {
    **fla_problems.CALLS,
    "everything fused": {**FUSED, "safe_gate": True},
    "everything fused, V first": {**FUSED, "safe_gate": True, "state_v_first": True},
    "bounded without the flag": FUSED,
    "another scale": {**FUSED, "scale": 0.5},
    "nothing fused": ACTIVATED,
}


def call_of(case, device="cpu", **options):
    return make_call(CALLS[case], device, **options)


def test_signature(fla):
    """The names, their order, their kinds and their defaults."""
    ours = inspect.signature(flash_kda.chunk_kda).parameters.values()
    theirs = inspect.signature(inspect.unwrap(fla["chunk_kda"])).parameters.values()
    if "max_num_seqs" not in {p.name for p in theirs}:
        pytest.skip("this is an older release")
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("compiled", [False, True])
def test_against_the_reference(device, case, compiled):
    call = call_of(case, device, seed=1)
    function = flash_kda.chunk_kda
    if compiled:
        torch.compiler.reset()
        function = torch.compile(flash_kda.chunk_kda, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out, state = function(**call, output_final_state=True)
        hold((out, state), truth_of(call), device)
        assert out.dtype == torch.bfloat16
        assert state.dtype == torch.float32
        assert flash_kda.chunk_kda(**call)[1] is None


@pytest.mark.parametrize("case", [case for case in CALLS if "V first" not in case])
def test_against_fla_s_plain_recurrence(fla, case):
    call = call_of(case, H=1, HV=2, rows=(40,), seed=2)
    hold_to_fla_s_plain_recurrence(flash_kda.chunk_kda, fla, call)


@pytest.mark.parametrize("case", ["everything fused", "softplus", "2 sigmoid", "nothing fused"])
def test_against_fla_s_kernels(cuda, fla, monkeypatch, case):
    call = call_of(case, cuda, lengths=(100, 64, 3), H=2, HV=4, seed=3)
    call |= {n: call[n].bfloat16() for n in ("g", "beta") if case != "nothing fused"}
    ours = hold_to_fla_s_kernel("chunk_kda", fla, monkeypatch, call, return_intermediate_states=True)
    hold(ours, truth_of(call), cuda)


def states_before_chunks(call, chunk, lengths):
    """The states before each chunk of each sequence, by the reference."""
    states, begin = [], 0
    for n, length in enumerate(lengths):
        for tokens in range(0, length, chunk):
            part = {**call, "cu_seqlens": None}
            for name in ("q", "k", "v", "g", "beta"):
                part[name] = call[name][:, begin : begin + tokens]
            if call.get("initial_state") is not None:
                part["initial_state"] = call["initial_state"][n : n + 1]
            states.append(truth_of(part)[1][0])
        begin += length
    return torch.stack(states)


@pytest.mark.parametrize("options", [{}, {"state_v_first": True}, {"initial_state": None}, {"chunk_size": 32},
                                     {"cu_seqlens_cpu": True}, {"use_graph": True}], ids=str)  # fmt: skip
def test_intermediate_states(device, options):
    lengths = (64, 0, 130, 5, 128)
    call = {**call_of("everything fused", device, lengths=lengths, seed=4), **options}
    if "cu_seqlens_cpu" in options:
        call["cu_seqlens_cpu"] = call["cu_seqlens"].cpu()
    chunk = options.get("chunk_size", 64)
    with torch.inference_mode():
        out, state, h = flash_kda.chunk_kda(**call, output_final_state=True, return_intermediate_states=True)
    plain = {n: x for n, x in call.items() if n not in ("chunk_size", "cu_seqlens_cpu", "use_graph")}
    hold((out, state), truth_of(plain), device)
    want = states_before_chunks(plain, chunk, lengths)
    most = -(-sum(lengths) // 64) + len(lengths) - 1
    assert h.shape == (1, most if options.get("use_graph") else len(want), 2, 128, 128)
    assert h.dtype == torch.bfloat16
    for got, right in zip(h[0], want):
        if right.any():
            assert error(got.double().cpu().numpy(), right.numpy()) <= 3e-3  # rounded to bf16
        else:
            assert not got.any()


@pytest.mark.parametrize("T", [5, 64, 100])
def test_intermediate_states_of_batch_rows(T):
    call = call_of("everything fused", rows=(T,) * 3, seed=5)
    with torch.inference_mode():
        out, state, h = flash_kda.chunk_kda(**call, return_intermediate_states=True)
    assert state is None
    assert h.shape == (3, -(-T // 64), 2, 128, 128)
    for b in range(3):
        row = {**call, "initial_state": call["initial_state"][b : b + 1]}
        row |= {n: call[n][b : b + 1] for n in ("q", "k", "v", "g", "beta")}
        want = states_before_chunks(row, 64, (T,))
        assert error(h[b].double().numpy(), want.numpy()) <= 3e-3
    hold((out,), truth_of(call))


def test_an_older_name_of_state_v_first():
    call = call_of("everything fused", seed=6)
    want = flash_kda.chunk_kda(**call, output_final_state=True, state_v_first=True)
    with pytest.warns(DeprecationWarning, match="transpose_state_layout is now called state_v_first"):
        got = flash_kda.chunk_kda(**call, output_final_state=True, transpose_state_layout=True)
    assert all(map(torch.equal, got, want))


def test_tensors_as_a_layer_holds_them():
    """Slices of one buffer, a flat dt_bias, parameters in 16 bits."""
    call = call_of("softplus", lengths=(30,), H=2, HV=2, seed=7)
    buffer = torch.cat([call[n].reshape(1, 30, -1) for n in ("q", "k", "v")], -1)
    for name, part in zip(("q", "k", "v"), buffer.split(256, -1)):
        call[name] = part.unflatten(-1, (2, 128))
    call |= {"A_log": call["A_log"].bfloat16().reshape(1, 1, 2, 1), "dt_bias": call["dt_bias"].reshape(-1)}
    with torch.no_grad():
        got = flash_kda.chunk_kda(**call, output_final_state=True)
    hold(got, truth_of({**call, "A_log": call["A_log"].float().reshape(2)}))


@pytest.mark.parametrize(
    ("change", "exception", "sentence"),
    [
        *WRONG,
        ({"beta": lambda x: x[0]}, ValueError, "beta has 2 dimensions; it must have 3: [B, T, HV]"),
        (
            {"lower_bound": None, "safe_gate": True},
            ValueError,
            "lower_bound is None with safe_gate=True; it must",
        ),
        (
            {"lower_bound": 0.0, "safe_gate": True},
            ValueError,
            "lower_bound is 0.0 with safe_gate=True; it must",
        ),
        (
            {"initial_state": lambda x: x.bfloat16()},
            TypeError,
            "initial_state is of torch.bfloat16; it must be a",
        ),
        (
            {"initial_state": lambda x: x[:0]},
            ValueError,
            "initial_state has shape [0, 2, 128, 128]; it must be",
        ),
        (
            {"cp_context": 1},
            ValueError,
            "cp_context is given; flash_kda computes on one device, so it must be None",
        ),
        ({"chunk_size": 16}, ValueError, "chunk_size is 16; it must be 32 or 64"),
        (
            {"return_intermediate_states": True},
            ValueError,
            "return_intermediate_states is True outside of torch.inf",
        ),
        (
            {"use_graph": True, "max_num_seqs": 3},
            ValueError,
            "cu_seqlens has 2 entries with max_num_seqs=3; it must",
        ),
    ],
)
def test_wrong_arguments(change, exception, sentence):
    call = call_of("everything fused", lengths=(8,), seed=9)
    call["safe_gate"] = False
    hold_refusal(flash_kda.chunk_kda, call, change, exception, sentence)


def test_intermediate_states_without_recompute():
    call = call_of("everything fused", lengths=(8,), seed=9)
    with pytest.raises(ValueError, match="with disable_recompute=True; one of them"), torch.inference_mode():
        flash_kda.chunk_kda(**call, return_intermediate_states=True, disable_recompute=True)
