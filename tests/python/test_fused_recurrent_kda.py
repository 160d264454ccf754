"""fused_recurrent_kda: the arguments, defaults and results of flash-linear-attention's function of that
name."""

import inspect

import pytest

import flash_kda
from fla_problems import (
    CALLS,
    WRONG,
    hold,
    hold_refusal,
    hold_to_fla_s_kernel,
    hold_to_fla_s_plain_recurrence,
    make_call,
    truth_of,
)

torch = pytest.importorskip("torch")


@pytest.fixture
def used(monkeypatch):
    """The names of the functions that compute."""
    seen = []
    for name in ("fwd", "decode"):
        function = getattr(flash_kda, name)

        def spy(*args, name=name, function=function, **kwargs):
            seen.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(flash_kda, name, spy)
    return seen


def call_of(case, device="cpu", **options):
    return make_call(CALLS[case], device, **options)


def test_signature(fla):
    """The names, their order, their kinds and their defaults."""
    ours = inspect.signature(flash_kda.fused_recurrent_kda).parameters.values()
    theirs = inspect.signature(inspect.unwrap(fla["fused_recurrent_kda"])).parameters.values()
    if "state_v_first" not in {p.name for p in theirs}:
        pytest.skip("this is an older release")
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


SHAPES = {
    "one token": ({"rows": (1, 1, 1)}, "decode"),
    "16 tokens": ({"rows": (16, 16)}, "decode"),
    "17 tokens": ({"rows": (17, 17)}, "fwd"),
    "short sequences": ({"lengths": (5, 0, 11)}, "decode"),
    "sequences of unknown length": ({"lengths": (5, 0, 12)}, "fwd"),
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(device, used, case, shape):
    options, function = SHAPES[shape]
    call = call_of(case, device, **options, seed=1)
    before = None if call["initial_state"] is None else call["initial_state"].clone()
    with torch.no_grad():
        out, state = flash_kda.fused_recurrent_kda(**call, output_final_state=True)
        again, none = flash_kda.fused_recurrent_kda(**call)
    hold((out, state), truth_of(call), device)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert none is None
    assert torch.equal(again, out)
    assert before is None or torch.equal(call["initial_state"], before), "the initial state was written"
    assert used == [function] * 2


@pytest.mark.parametrize("case", [case for case in CALLS if "V first" not in case])
@pytest.mark.parametrize("T", [3, 40])
def test_against_fla_s_plain_recurrence(fla, case, T):
    call = call_of(case, rows=(T, T), H=1, HV=2, seed=2)
    hold_to_fla_s_plain_recurrence(flash_kda.fused_recurrent_kda, fla, call)


@pytest.mark.parametrize("case", ["everything fused", "softplus", "2 sigmoid"])
@pytest.mark.parametrize("T", [1, 8, 100])
def test_against_fla_s_kernel(cuda, fla, monkeypatch, case, T):
    call = call_of(case, cuda, rows=(T, T), H=2, HV=4, seed=3)
    hold_to_fla_s_kernel("fused_recurrent_kda", fla, monkeypatch, call)


@pytest.mark.parametrize("case", ["everything fused", "without a state", "nothing fused, parameters given"])
@pytest.mark.parametrize("shape", ["one token", "17 tokens", "sequences of unknown length"])
def test_compiled(device, case, shape):
    torch.compiler.reset()
    call = call_of(case, device, **SHAPES[shape][0], seed=4)
    function = torch.compile(flash_kda.fused_recurrent_kda, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        hold(function(**call, output_final_state=True), truth_of(call), device)


def test_lengths_in_cpu_memory(device, used):
    """cu_seqlens_cpu says that every sequence is short."""
    call = call_of("everything fused", device, lengths=(16, 16, 3, 0), seed=5)
    with torch.no_grad():
        got = flash_kda.fused_recurrent_kda(
            **call, output_final_state=True, cu_seqlens_cpu=call["cu_seqlens"].cpu()
        )
    hold(got, truth_of(call), device)
    assert used == ["decode"]


@pytest.mark.parametrize("T", [2, 20])
def test_a_state_in_bf16(T):
    """It is converted to fp32, and so is the final state."""
    call = call_of("everything fused", rows=(T, T), seed=6)
    call["initial_state"] = call["initial_state"].bfloat16()
    with torch.no_grad():
        out, state = flash_kda.fused_recurrent_kda(**call, output_final_state=True)
        assert torch.equal(flash_kda.fused_recurrent_kda(**call)[0], out)
    hold((out, state), truth_of(call))
    assert state.dtype == torch.float32


def test_an_older_name_of_state_v_first():
    call = call_of("everything fused", rows=(2,), seed=7)
    want = flash_kda.fused_recurrent_kda(**call, output_final_state=True, state_v_first=True)
    with pytest.warns(
        DeprecationWarning, match="transpose_state_layout is now called state_v_first"
    ) as warned:
        got = flash_kda.fused_recurrent_kda(**call, output_final_state=True, transpose_state_layout=True)
    assert all(map(torch.equal, got, want))
    assert warned[0].filename == __file__


@pytest.mark.parametrize("T", [2, 20])
def test_a_gradient_is_refused(T):
    for name in ("q", "g", "A_log", "initial_state"):
        call = call_of("everything fused", rows=(T,), seed=8)
        call[name] = call[name].clone().requires_grad_()
        with pytest.raises(RuntimeError, match="computes no gradients"):
            flash_kda.fused_recurrent_kda(**call, output_final_state=True)
        with torch.no_grad():
            flash_kda.fused_recurrent_kda(**call)


@pytest.mark.parametrize(
    ("change", "exception", "sentence"),
    [
        *WRONG,
        ({"q": lambda x: x[0]}, ValueError, "q has 3 dimensions; it must have 4"),
        (
            {"initial_state": lambda x: x.half()},
            TypeError,
            "initial_state is of torch.float16; it must be a tensor",
        ),
        ({"initial_state": 3}, TypeError, "initial_state is of int; it must be a tensor"),
        (
            {"initial_state": lambda x: torch.cat([x, x])},
            ValueError,
            "initial_state has shape [2, 2, 128, 128]; it must be [N, HV, K, V] = [1, 2, 128, 128]",
        ),
    ],
)
@pytest.mark.parametrize("T", [8, 20])
def test_wrong_arguments(change, exception, sentence, T):
    call = call_of("everything fused", rows=(T,), seed=9)
    hold_refusal(flash_kda.fused_recurrent_kda, call, change, exception, sentence)


# As a backend of FLA.


@pytest.mark.parametrize("T", [1, 30])
def test_fla_hands_its_calls_over(device, fla, used, monkeypatch, T):
    for name in ("FLA_FLASH_KDA", "FLA_DISABLE_BACKEND_DISPATCH"):
        monkeypatch.delenv(name, raising=False)
    call = call_of("softplus", device, rows=(T, T), seed=10)
    with torch.inference_mode():
        got = fla["fused_recurrent_kda"](**call, output_final_state=True)
    if not used:
        pytest.skip("this release of FLA has no place for another backend")
    hold(got, truth_of(call), device)
    assert used == ["decode" if T <= 16 else "fwd"]


def test_what_fla_keeps():
    """Pools of states, a state in place, a given output, and what fwd does not take."""
    from flash_kda import _fla

    call = {**call_of("softplus", rows=(2, 2), seed=11), "inplace_final_state": False}
    with torch.no_grad():
        assert _fla.why_not_recurrent(call) == ""
        for change in (
            {"inplace_final_state": True},
            {"ssm_state_indices": torch.zeros(2)},
            {"num_accepted_tokens": torch.zeros(2)},
            {"out": call["v"]},
            {"lower_bound": -6.0},
            {"q": call["q"].half()},
            {"beta": call["beta"][..., None].expand(call["v"].shape)},
        ):
            assert _fla.why_not_recurrent({**call, **change}), change
    call["q"].requires_grad_()
    assert "requires a gradient" in _fla.why_not_recurrent(call)
