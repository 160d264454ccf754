"""What test_fla_releases.py runs in a process of its own: fla_calls.py FIRST FLA_FOLDER

Calls chunk_kda of the flash-linear-attention in FLA_FOLDER on the CPU. FLA's own kernels need a GPU, so a
stand-in behind all of FLA's backends takes the calls that FLA would compute by itself, and returns 7s. FIRST
says what comes first: "flash_kda" is its import; with "allow_neg_eigval" or "device" FLA imports flash_kda by
itself, in the middle of a call that the package cannot serve.
"""

import sys
import warnings

first, folder = sys.argv[1:]
if folder:
    sys.path.insert(0, folder)
warnings.simplefilter("ignore")  # FLA warns where there is no GPU

if first == "flash_kda":
    import flash_kda

import inspect  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402

# A newer Triton refuses how older releases of FLA ask for tuning. No kernel of Triton runs here.
triton.autotune = lambda *args, **kwargs: lambda kernel: kernel
from fla.ops.kda import (  # noqa: E402
    backends,
    chunk_kda,
)

IS_NEW = not hasattr(backends, "kda_registry")  # 0.6, which looks at allow_neg_eigval itself
if IS_NEW:
    from fla.backends import BaseBackend, register

    registry = register(chunk_kda)
else:
    from fla.ops.backends import BaseBackend

    registry = lambda backend: backends.kda_registry.register(backend())  # noqa: E731

by_fla = []  # the calls that FLA computed by itself


class StandIn(BaseBackend):
    backend_type = "stand_in"
    priority = 99

    def chunk_kda(self, *args, **kwargs):
        by_fla.append(kwargs)
        v = args[2] if len(args) > 2 else kwargs["v"]
        return torch.full_like(v, 7), v.new_full((v.shape[0], v.shape[2], 128, 128), 7.0, dtype=torch.float32)


registry(StandIn)
torch.manual_seed(0)
B, T, H, K = 2, 40, 3, 128
buffer = torch.randn(B, T, 3 * H * K).bfloat16()
q, k, v = (x.reshape(B, T, H, K) for x in buffer.split(H * K, -1))
contiguous = {
    **{name: x.contiguous() for name, x in (("q", q), ("k", k), ("v", v))},
    "g": torch.randn(B, T, H, K).bfloat16(),
    "beta": torch.randn(B, T, H).bfloat16(),
    "A_log": torch.rand(H),
    "dt_bias": torch.rand(H * K) - 2,
    "lower_bound": -5.0,
}
calls = {
    "plain": {},
    "q, k, v of one buffer": {"q": q, "k": k, "v": v},
    "a slice of beta": {"beta": torch.cat([contiguous["beta"]] * 2, -1)[..., :H]},
    "v with its heads first": {"v": v.transpose(1, 2).contiguous().transpose(1, 2)},
    "beta and g in fp32": {"beta": contiguous["beta"].float(), "g": contiguous["g"].float()},
    "A_log of a layer": {"A_log": contiguous["A_log"].reshape(1, 1, H, 1)},
    "dt_bias in two dimensions": {"dt_bias": contiguous["dt_bias"].reshape(H, K)},
}
served = {
    "allow_neg_eigval": {"allow_neg_eigval": True},
    "no dt_bias": {"dt_bias": None},
    "softplus": {"lower_bound": None, "safe_gate": False},
    "an activated gate": {"g": -contiguous["g"].float().abs(), "use_gate_in_kernel": False},
    "an activated beta": {"beta": contiguous["beta"].float().sigmoid(), "use_beta_sigmoid_in_kernel": False},
    "q and k that are normalised": {
        **{n: torch.nn.functional.normalize(contiguous[n], dim=-1) for n in ("q", "k")},
        "use_qk_l2norm_in_kernel": False,
    },
    "states with K first": {"state_v_first": False},
}
refused = {
    "device": {n: x.to("meta") for n, x in contiguous.items() if isinstance(x, torch.Tensor)},
    "A_log on another device": {"A_log": contiguous["A_log"].to("meta")},
    "k in fp16": {"k": contiguous["k"].half()},
    "g in fp64": {"g": contiguous["g"].double()},
    "lower_bound": {"lower_bound": -6.0},
    "a short dt_bias": {"dt_bias": contiguous["dt_bias"][1:]},
}
flags = {
    "use_gate_in_kernel": True,
    "use_qk_l2norm_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "safe_gate": True,
    "output_final_state": True,
}
version_0_5_0 = "state_v_first" not in inspect.signature(chunk_kda).parameters
flags["state_v_first"] = True


def call(change):
    given = {**contiguous, **flags, **change}
    if version_0_5_0:
        given["transpose_state_layout"] = given.pop("state_v_first")
    with torch.inference_mode():
        return chunk_kda(**given)


def reference_of(change):
    """What a call returns, in fp64."""
    given = {**contiguous, **flags, **change}
    options = {
        n: given[n] for n in given if n.startswith("use_") or n in ("allow_neg_eigval", "state_v_first")
    }
    with_gate = given["use_gate_in_kernel"]
    A_log, dt_bias = (given[n] if with_gate else None for n in ("A_log", "dt_bias"))
    return flash_kda.reference(
        *(given[n] for n in ("q", "k", "v", "g", "beta")), K**-0.5, A_log, dt_bias, given["lower_bound"],
        **options,
    )  # fmt: skip


def check_served(name, change):
    before = len(by_fla)
    for got, right, bar in zip(call(change), reference_of(change), (2.2e-3, 1e-5)):
        assert (got - right).norm() <= bar * right.norm(), name
    assert len(by_fla) == before, f"{name}: this package did not compute it"


def check_refused(name):
    before = len(by_fla)
    out, state = call(refused[name])
    assert len(by_fla) == before + 1, f"{name}: FLA did not compute it"
    assert out.is_meta or ((out == 7).all() and (state == 7).all()), name


assert first == "flash_kda" or "flash_kda" not in sys.modules
if first in refused:
    check_refused(first)
elif first in served:
    import_of_fla = call(served[first])
    assert IS_NEW or not by_fla
assert (IS_NEW and first in served) or "flash_kda" in sys.modules, "FLA handed the first call over"
taken_by_fla = len(by_fla)
import flash_kda  # noqa: E402

assert flash_kda.fwd.__name__ == "fwd"
if first in served and not IS_NEW:
    for got, right in zip(import_of_fla, reference_of(served[first])):
        assert (got - right).norm() <= 2.2e-3 * right.norm(), (
            "the call in whose middle FLA imported flash_kda"
        )
for name, change in {**calls, **served}.items():
    check_served(name, change)
assert len(by_fla) == taken_by_fla
for name in refused:
    check_refused(name)
want = reference_of({})

# A device that the library has no kernel for.
flash_kda._fla.why_not_on.cache_clear()
infos = flash_kda._lib.device_infos
flash_kda._lib.device_infos = lambda: []
before = len(by_fla)
call({})
assert len(by_fla) == before + 1, "FLA computes on devices that the library cannot use"
flash_kda._lib.device_infos = infos
flash_kda._fla.why_not_on.cache_clear()
call({})
assert len(by_fla) == before + 1

# By position, in chunk_kda's own order, which is not the order of FLA's backend.
names = list(inspect.signature(inspect.unwrap(chunk_kda)).parameters)
given = {"scale": None, **contiguous, **flags}
if version_0_5_0:
    given["transpose_state_layout"] = given.pop("state_v_first")
position = [given.get(n) for n in names[: names.index("use_gate_in_kernel") + 1]]
rest = {n: x for n, x in given.items() if n not in names[: len(position)]}
with torch.inference_mode():
    out, _ = chunk_kda(*position, **rest)
assert (out - want[0]).norm() <= 2.2e-3 * want[0].norm()
assert len(by_fla) == before + 1
print("ok")
