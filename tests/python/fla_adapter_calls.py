"""What test_fla_releases.py runs in a process of its own: fla_adapter_calls.py HOW FLA_FOLDER

Calls chunk_kda and fused_recurrent_kda of the flash-linear-attention in FLA_FOLDER on the CPU, with
flash_kda.fla installed. HOW says in which way: "before" imports flash_kda.fla before FLA, "after" imports it
after FLA, and "install" calls install(). FLA's own kernels need a GPU, so a stand-in behind all of FLA's
backends takes the calls that FLA would compute by itself, and returns 7s.
"""

import itertools
import os
import sys
import warnings

how, folder = sys.argv[1:]
if folder:
    sys.path.insert(0, folder)
warnings.simplefilter("ignore")  # FLA warns where there is no GPU

import flash_kda  # noqa: E402

if how == "before":
    import flash_kda.fla

    assert "fla" not in sys.modules, "flash_kda.fla waits for the caller's import of FLA"

import contextlib  # noqa: E402
import inspect  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402

# A newer Triton refuses how older releases of FLA ask for tuning. No kernel of Triton runs here.
triton.autotune = lambda *args, **kwargs: lambda kernel: kernel
# FLA 0.5.0 enters the device of its tensors, for which PyTorch has nothing on the CPU.
torch.cpu.device = lambda index: contextlib.nullcontext()
from fla.ops.kda import backends, chunk_kda, fused_recurrent_kda  # noqa: E402

if how == "after":
    import flash_kda.fla
elif how == "install":
    flash_kda.fla.install()
    flash_kda.fla.install()  # a second time changes nothing

IS_NEW = not hasattr(backends, "kda_registry")  # 0.6
if IS_NEW:
    from fla.backends import BaseBackend, register
else:
    from fla.ops.backends import BaseBackend


class StandIn(BaseBackend):
    backend_type = "stand_in"
    priority = 99

    def chunk_kda(self, q, k, v, *args, **kwargs):
        return torch.full_like(v, 7), None

    def fused_recurrent_kda_fwd(self, v, **kwargs):
        return torch.full_like(v, 7), None


if IS_NEW:
    register(chunk_kda)(StandIn)
    register("kda")(StandIn)
else:
    backends.kda_registry.register(StandIn())

K = 128
# Errors that may not be exceeded: of out, in which bf16 alone takes 1.7e-3, and of the state.
BARS = (2.2e-3, 1e-5)
FUNCTIONS = {"chunk_kda": chunk_kda, "fused_recurrent_kda": fused_recurrent_kda}


def knows(function, name):
    """Whether this release's function has the argument."""
    return name in inspect.signature(inspect.unwrap(function)).parameters


def v_first(function, value):
    """state_v_first, whose name is another one in FLA 0.5.0."""
    return {"state_v_first" if knows(function, "state_v_first") else "transpose_state_layout": value}


def inputs(lengths, HV, gate, beta_kind, is_normalised, H=2, B=1):
    """Tensors and flags of a call."""
    T = sum(lengths)
    x = {name: torch.randn(B, T, H, K).bfloat16() for name in "qk"}
    if is_normalised:
        x = {name: torch.nn.functional.normalize(t.float(), dim=-1).bfloat16() for name, t in x.items()}
    x["v"] = torch.randn(B, T, HV, K).bfloat16()
    x["g"], x["beta"] = torch.randn(B, T, HV, K).bfloat16(), torch.randn(B, T, HV).bfloat16()
    x["use_gate_in_kernel"] = gate != "activated"
    if gate == "activated":
        x["g"] = -x["g"].float().abs()
    else:
        x |= {"A_log": torch.rand(HV), "dt_bias": torch.rand(HV * K) - 2}
        x["lower_bound"] = -5.0 if gate == "bounded" else None
    x["use_beta_sigmoid_in_kernel"] = beta_kind != "activated"
    if beta_kind == "activated":
        x["beta"] = x["beta"].float().sigmoid()
    elif beta_kind == "twice":
        x["allow_neg_eigval"] = True
    x["use_qk_l2norm_in_kernel"] = not is_normalised
    if len(lengths) > 1:
        x["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    x["initial_state"] = torch.randn(B if len(lengths) == 1 else len(lengths), HV, K, K)
    return x


def truth_of(x, state_v_first, **more):
    """The results of a call in fp64."""
    options = {name: x[name] for name in x if name.startswith("use_") or name == "allow_neg_eigval"}
    gate = [x.get(name) for name in ("A_log", "dt_bias", "lower_bound")]
    return flash_kda.reference(
        *(x[name] for name in ("q", "k", "v", "g", "beta")), K**-0.5, *gate, x["initial_state"],
        x.get("cu_seqlens"), state_v_first=state_v_first, **options, **more,
    )  # fmt: skip


def distance(got, right):
    return float((got.double() - right).norm() / right.norm())


def check_taken(name, x, state_v_first, **more):
    """The function of this name computes the call with this package, and rightly."""
    function = FUNCTIONS[name]
    call = {**x, "output_final_state": True, **v_first(function, state_v_first), **more}
    with flash_kda.fla.record() as calls, torch.inference_mode():
        results = function(**call)
    assert calls == [(name, "")], calls
    truth = truth_of(x, state_v_first)
    for got, right, bar in zip(results, truth, BARS):
        assert distance(got, right) <= bar, (name, distance(got, right))
    assert results[1].dtype == torch.float32
    return results


torch.manual_seed(0)
every = itertools.product(
    ("bounded", "softplus", "activated"),
    ("sigmoid", "twice", "activated"),
    (False, True),  # q and k are normalised
    (2, 4),  # HV
    (False, True),  # V-first states
    ((21,), (3, 40, 1)),  # lengths
)
for i, (gate, beta_kind, is_normalised, HV, state_v_first, lengths) in enumerate(every):
    x = inputs(lengths, HV, gate, beta_kind, is_normalised)
    for name, function in FUNCTIONS.items():
        # FLA 0.5.0 has no allow_neg_eigval, and its fused_recurrent_kda no sigmoid, which FLA then ignores.
        asked = {"allow_neg_eigval"} if beta_kind == "twice" else set()
        asked |= {"use_beta_sigmoid_in_kernel"} if beta_kind != "activated" else set()
        if i % 7 == 0 and all(knows(function, flag) for flag in asked):
            check_taken(name, x, state_v_first)
for name in FUNCTIONS:
    x = inputs((40,), 2, "bounded", "activated", False, B=3)
    check_taken(name, x, True)
    x = inputs((5, 9), 2, "softplus", "activated", False)
    check_taken(name, {**x, "cu_seqlens": x["cu_seqlens"].int()}, False)

# The longest sequence, which the host knows.
longest, fwd = [], flash_kda.fwd
flash_kda.fwd = lambda *args, **options: longest.append(options.get("max_seqlen")) or fwd(*args, **options)
x = inputs((3, 70, 1), 2, "softplus", "activated", False)
check_taken("chunk_kda", x, True, cu_seqlens_cpu=x["cu_seqlens"].clone())
assert longest == [70], longest
flash_kda.fwd = fwd

# The states before each chunk.
x = inputs((70, 130), 4, "bounded", "activated", False)
with flash_kda.fla.record() as calls, torch.inference_mode():
    *_, states = chunk_kda(**x, return_intermediate_states=True)
assert calls == [("chunk_kda", "")]
assert states.shape == (1, 2 + 3, 4, K, K)
assert states.dtype == torch.bfloat16
ends = truth_of(x, False, checkpoint_every=64)[2]  # after tokens 64 of the first, 64 and 128 of the second
want = torch.cat([x["initial_state"][:1], ends[:1], x["initial_state"][1:], ends[1:3]]).double()
assert distance(states[0], want) <= 2.2e-3

# Calls that stay with FLA, and the reasons.
plain = inputs((20,), 2, "bounded", "activated", False)
declined = {
    "does not take k of torch.float16": {"k": plain["k"].half()},
    "K = V = 128": {
        **{name: plain[name][..., :64] for name in "qkvg"},
        "dt_bias": plain["dt_bias"][:128],
        "initial_state": plain["initial_state"][..., :64, :64],
    },
    "there is no device meta": {n: t.to("meta") for n, t in plain.items() if isinstance(t, torch.Tensor)},
    "lower_bound in [-5, 0]": {"lower_bound": -6.0},
}
for (reason, change), (name, function) in itertools.product(declined.items(), FUNCTIONS.items()):
    with flash_kda.fla.record() as calls, torch.inference_mode():
        out, _ = function(**{**plain, **change})
    ((of, why),) = calls
    assert (of, reason in why) == (name, True), calls
    assert out.is_meta or (out == 7).all()
for name, function in FUNCTIONS.items():
    # A tensor may require a gradient where none is computed.
    with flash_kda.fla.record() as calls, torch.no_grad():
        function(**{**plain, "q": plain["q"].clone().requires_grad_()})
    assert calls == [(name, "")]

with flash_kda.fla.record() as calls:
    fused_recurrent_kda(**{**plain, "k": plain["k"].clone().requires_grad_()})
((of, why),) = calls
assert why == "flash_kda.fused_recurrent_kda has no gradients, and k requires a gradient", calls


# Gradients, which are those of flash_kda.chunk_kda.
def gradients(function, call, **options):
    tensors = {name: x for name, x in call.items() if isinstance(x, torch.Tensor) and name != "cu_seqlens"}
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    out, state = function(**{**call, **leaves}, output_final_state=True, **options)
    (out.float().square().sum() + state.square().sum()).backward()
    return {name: x.grad for name, x in leaves.items()}


for gate, beta_kind, lengths in (("bounded", "sigmoid", (21,)), ("activated", "activated", (3, 40))):
    x = inputs(lengths, 4, gate, beta_kind, False)
    # FLA 0.5.0 leaves out keywords that it does not know.
    may_be_unknown = ("use_beta_sigmoid_in_kernel", "disable_recompute")
    x = {name: t for name, t in x.items() if name not in may_be_unknown or knows(chunk_kda, name)}
    keeps = {"disable_recompute": True} if knows(chunk_kda, "disable_recompute") else {}
    with flash_kda.fla.record() as calls:
        got = gradients(chunk_kda, x, **v_first(chunk_kda, True), **keeps)
    assert calls == [("chunk_kda", "")], calls
    want = gradients(flash_kda.chunk_kda, x, state_v_first=True)
    assert got.keys() == want.keys() >= {"q", "k", "v", "g", "beta", "initial_state"}
    for name, gradient in got.items():
        assert torch.equal(gradient, want[name]), name
        assert gradient.any(), name

# Context parallelism, which install must be asked for, in a group of one rank.
if IS_NEW:
    from fla.ops.cp import build_cp_context

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    x = inputs((3, 40), 4, "bounded", "activated", False)
    del x["initial_state"]
    context = build_cp_context(x.pop("cu_seqlens"), torch.distributed.group.WORLD)
    with flash_kda.fla.record() as calls, torch.inference_mode():
        chunk_kda(**x, cp_context=context)
        flash_kda.fla.install(context_parallel=True)
        out, _ = chunk_kda(**x, cp_context=context)
    want, _ = flash_kda.chunk_kda(**x, cu_seqlens=torch.tensor([0, 3, 43]))
    only = "flash_kda takes cp_context after flash_kda.fla.install(context_parallel=True) alone"
    assert calls == [("chunk_kda", only), ("chunk_kda", "")], calls
    assert torch.equal(out, want)
    torch.distributed.destroy_process_group()
    flash_kda.fla.install()


# Turned off, and on again.
def out_of(name):
    with torch.inference_mode():
        return FUNCTIONS[name](**plain)[0]


right = {name: out_of(name) for name in FUNCTIONS}
flash_kda.fla.uninstall()
for name in FUNCTIONS:
    with flash_kda.fla.record() as calls:
        assert (out_of(name) == 7).all()
    assert calls == [(name, "flash_kda.fla.uninstall() was called")]
flash_kda.fla.install()
os.environ["FLA_FLASH_KDA"] = "0"
with flash_kda.fla.record() as calls:
    assert all((out_of(name) == 7).all() for name in FUNCTIONS)
assert calls == []
del os.environ["FLA_FLASH_KDA"]
with flash_kda.fla.record() as outer:
    with flash_kda.fla.record() as inner:
        assert torch.equal(out_of("chunk_kda"), right["chunk_kda"])
    assert torch.equal(out_of("fused_recurrent_kda"), right["fused_recurrent_kda"])
assert (len(outer), len(inner)) == (2, 1)
print("ok")
