"""The structs of _lib.py lie in memory as include/flash_kda.h declares them."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flash_kda import _lib

HEADER = Path(__file__).resolve().parents[2] / "include" / "flash_kda.h"
STRUCTS = {
    "flash_kda_device": _lib.Device,
    "flash_kda_tensor": _lib.Tensor,
    "flash_kda_fwd_params": _lib.FwdParams,
    "flash_kda_bwd_params": _lib.BwdParams,
    "flash_kda_gradients64": _lib.Gradients64,
    "flash_kda_map_params": _lib.MapParams,
    "flash_kda_join_params": _lib.JoinParams,
    "flash_kda_decode_params": _lib.DecodeParams,
    "flash_kda_decode_layer_params": _lib.DecodeLayerParams,
    "flash_kda_apply_params": _lib.ApplyParams,
    "flash_kda_interpreter": _lib.Interpreter,
    "flash_kda_device_info": _lib.DeviceInfo,
    "flash_kda_kernel_info": _lib.KernelInfo,
}


def test_every_struct_is_here():
    mine = [x for x in vars(_lib).values() if isinstance(x, type) and issubclass(x, ctypes.Structure)]
    assert set(mine) == set(STRUCTS.values())


@pytest.mark.parametrize("name", STRUCTS)
def test_fields(name, tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    struct = STRUCTS[name]
    lines = [f'_Static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "size");']
    for field, *_ in struct._fields_:
        place = getattr(struct, field)
        lines.append(f'_Static_assert(offsetof({name}, {field}) == {place.offset}, "offset of {field}");')
        lines.append(f'_Static_assert(sizeof((({name} *)0)->{field}) == {place.size}, "size of {field}");')
    source = tmp_path / "fields.c"
    source.write_text("\n".join(["#include <stddef.h>", f'#include "{HEADER}"', *lines, ""]))
    command = [compiler, "-std=c11", "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wrong = tmp_path / "wrong.c"
    wrong.write_text(re.sub(r"== (\d+)", lambda m: f"== {int(m[1]) + 1}", source.read_text(), count=1))
    done = subprocess.run([*command[:-1], str(wrong)], capture_output=True, text=True)
    assert done.returncode != 0, "the comparison can fail"
