"""Modules of released inference engines alone, for tests and benchmarks on machines without the engines.

vLLM and SGLang need a hundred packages, and of each of them few modules are wanted here: layers, kernels and
plug-ins. `python scripts/fetch_engines.py` puts these modules into build-engines/, or FLASH_KDA_ENGINES names
another folder. `alone` makes them importable: everything else that they import is a stand-in, a module whose
attributes are empty classes, unless its attributes are given.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23"}
FETCH = "python scripts/fetch_engines.py"


def find(engine: str) -> Path | None:
    """The folder with the modules of the release of vllm or sglang that is known here, or None."""
    root = os.environ.get("FLASH_KDA_ENGINES") or Path(__file__).resolve().parents[2] / "build-engines"
    folder = Path(root) / f"{engine}-{VERSIONS[engine]}"
    return folder if (folder / engine).is_dir() else None


class _StandIn(ModuleType):
    """A module whose attributes are what was given, its modules, or empty classes."""

    def __init__(self, name: str, finder: _Finder):
        super().__init__(name)
        self.__path__: list[str] = []
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        if self._finder.knows(full):
            return importlib.import_module(full)
        made = type(name, (), {"__init__": lambda self, *arguments, **named: None})
        setattr(self, name, made)
        return made


class _Finder:
    """Finds real modules in a folder, and stands in for all others of some packages."""

    def __init__(self, folder: Path, real: tuple[str, ...], given: dict[str, dict[str, Any]]):
        self.folder, self.real, self.given = folder, real, given
        self.packages = {name.partition(".")[0] for name in (*real, *given)}

    def is_real(self, name: str) -> bool:
        return name not in self.given and any(name == r or name.startswith(r + ".") for r in self.real)

    def knows(self, name: str) -> bool:
        return any(x == name or x.startswith(name + ".") for x in (*self.real, *self.given)) or (
            self.is_real(name) and self._spec_of(name) is not None
        )

    def _spec_of(self, name: str) -> Any:
        return importlib.machinery.PathFinder.find_spec(
            name, [str(self.folder.joinpath(*name.split(".")[:-1]))]
        )

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in self.packages:
            return None
        if self.is_real(name):
            return self._spec_of(name)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> ModuleType:
        return _StandIn(spec.name, self)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.given.get(module.__name__, {}))


@contextlib.contextmanager
def alone(folder: Path, real: tuple[str, ...], given: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Makes the modules named `real`, and the modules in them, importable from the folder. given: attributes
    of stand-ins by the stand-in's name. Modules of their packages are forgotten behind the context."""
    finder = _Finder(folder, real, given)

    def take_out() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] in finder.packages]
        return {name: sys.modules.pop(name) for name in names}

    before = take_out()
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        take_out()
        sys.modules.update(before)


# ---- Triton kernels of the engines -------------------------------------------------------------------------


def _capability() -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


@contextlib.contextmanager
def sglang_kernels() -> Iterator[Any]:
    """SGLang's Triton class for KDA layers. Its CUDA kernel for decode, which SGLang compiles at the first
    call, is left out."""
    folder = find("sglang")
    if folder is None:
        raise ImportError(f"there are no modules of SGLang {VERSIONS['sglang']}: {FETCH} sglang")
    import torch

    major, minor = _capability()
    no = lambda: False  # noqa: E731
    names = ("is_cpu", "is_hip", "is_npu", "is_xpu", "is_gfx95_supported")
    platform: dict[str, Any] = dict.fromkeys(names, no)
    platform |= {"is_cuda": lambda: True, "is_sm90_supported": lambda: major == 9}
    platform |= {"get_device_sm": lambda: 10 * major + minor}
    numbers = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
    given: dict[str, dict[str, Any]] = {
        "sglang.srt.utils": platform,
        "sglang.srt.utils.common": {"torch_release": numbers},
        "sglang.kernels.jit.utils": {"is_arch_support_pdl": no},
        "sglang.kernels.ops.attention.kda_packed_decode": {"covered": lambda *_: False},
    }
    linear = "sglang.srt.layers.attention.linear"
    real = (linear, "sglang.kernels.ops.attention.fla", "sglang.kernels.ops.attention.linear")
    with alone(folder, real, given):
        yield importlib.import_module(f"{linear}.kernels.kda_triton").TritonKDAKernel


class _Platform:
    """vLLM's platform, as its Triton kernels ask for it."""

    def is_cuda(self) -> bool:
        return True

    is_cuda_alike = is_cuda

    def is_rocm(self) -> bool:
        return False

    is_cpu = is_arch_support_pdl = is_rocm

    def is_device_capability_family(self, family: int, **_: Any) -> bool:
        return _capability()[0] * 10 == family

    def has_device_capability(self, least: int) -> bool:
        major, minor = _capability()
        return 10 * major + minor >= least


@contextlib.contextmanager
def vllm_kernels() -> Iterator[dict[str, Any]]:
    """vLLM's Triton functions for KDA layers and, where they can be loaded, its compiled operators."""
    folder = find("vllm")
    if folder is None:
        raise ImportError(f"there are no modules of vLLM {VERSIONS['vllm']}: {FETCH} vllm")
    import torch
    import triton
    import triton.language as tl
    import triton.language.extra.libdevice as tldevice

    fla, kda = "vllm.third_party.flash_linear_attention.ops", "vllm.models.kimi_k3.nvidia.ops.third_party.kda"
    mamba = "vllm.model_executor.layers.mamba.ops"
    custom_op = type("CustomOp", (torch.nn.Module,), {"register": lambda name: lambda cls: cls})
    given = {
        "vllm.platforms": {"current_platform": _Platform()},
        "vllm.triton_utils": {"triton": triton, "tl": tl, "tldevice": tldevice},
        "vllm.model_executor.custom_op": {"CustomOp": custom_op},
        "vllm.utils.gpu_sync_debug": {"gpu_sync_allowed": contextlib.nullcontext},
        "vllm.utils.torch_utils": {
            "async_tensor_h2d": lambda x, dtype, device: torch.tensor(x, dtype=dtype, device=device)
        },
        "vllm.v1.attention.backends.utils": {"NULL_BLOCK_ID": 0, "PAD_SLOT_ID": -1},
        f"{fla}.layernorm_guard": {},
    }
    extensions = ("vllm._flashkda_C", "vllm._C_stable_libtorch")
    modules = tuple(f"{mamba}.{name}" for name in ("causal_conv1d", "gather_initial_states"))
    with alone(folder, (fla, kda, *modules, "vllm.utils.math_utils", *extensions), given):
        found: dict[str, Any] = {}
        for name in extensions:
            try:
                importlib.import_module(name)
            except ImportError as error:
                print(f"vLLM's operators of {name} are left out: {error}", file=sys.stderr)
        for module, name in (
            (kda, "chunk_kda_with_fused_gate"), (kda, "fused_recurrent_kda_packed_decode"),
            (modules[0], "causal_conv1d_update"), (modules[1], "gather_initial_states"),
            (f"{fla}.kda", "rms_norm_gated"),
        ):  # fmt: skip
            found[name] = getattr(importlib.import_module(module), name)
        yield found
