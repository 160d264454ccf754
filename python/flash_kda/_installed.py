"""What is wrong with how the package was built or installed: warned of once, when it is imported."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings

from . import _lib

MEND = "`pip install .` in the source folder builds the kernels, and fetches nvcc from PyPI if there is none"


def _has_nvidia_driver() -> bool:
    """Whether the NVIDIA driver can be loaded, and the environment does not hide the GPUs. The driver is not
    initialized, since processes that fork later could not use it any more."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def left_out_kernels() -> str:
    """A sentence if the library has no kernels for the GPUs that this machine may have, or ""."""
    if any(info.device_type == _lib.CUDA for info in _lib.kernel_infos()) or not _has_nvidia_driver():
        return ""
    return (
        "flash_kda was built without CUDA kernels, and this machine has an NVIDIA driver: calls on a GPU "
        f"will fail. {MEND}."
    )


def other_package(paths: list[str]) -> str:
    """A sentence if a folder of `paths` has another package of the same name, or "". Another copy of this
    package is none."""
    for path in paths:
        folder = os.path.join(path or os.curdir, "flash_kda")
        if os.path.exists(os.path.join(folder, "__init__.py")) and not os.path.exists(
            os.path.join(folder, "_lib.py")
        ):
            return (
                f"there are two packages called flash_kda: this one, in {os.path.dirname(__file__)}, and "
                f"another, MoonshotAI's it seems, in {os.path.abspath(folder)}. This one is meant to replace "
                "the other, and the order of sys.path decides which is imported: remove the other."
            )
    return ""


def warn() -> None:
    for sentence in (left_out_kernels(), other_package(sys.path)):
        if sentence:
            warnings.warn(sentence, RuntimeWarning, stacklevel=3)
