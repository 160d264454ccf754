"""scripts/check_kernels.py, on reports and disassemblies as the compiler writes them."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_kernels.py"
PLAN = {
    "name": "fkda_wide_*",
    "registers": 168,
    "static_shared": 0,
    "require": ["HGMMA"],
    "forbid": ["LDL", "STL"],
}

SERIAL = (
    "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the wgmma pipeline in the function 'fkda_wide_a'"
)
IGNORED = (
    "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register "
    "count at entry."
)
HARMLESS = (
    "ptxas info    : (C7519) warpgroup.arrive is injected in around line 63 by compiler in function "
    "'fkda_wide_a'"
)


@pytest.fixture(scope="module")
def script():
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    spec = importlib.util.spec_from_file_location("check_kernels", SCRIPT)
    module = sys.modules["check_kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(*kernels, said=(), registers=168, stack=0, stores=0):
    lines = [*said, "ptxas info    : 0 bytes gmem"]
    for kernel in kernels:
        lines += [
            f"ptxas info    : Compiling entry function '{kernel}' for 'sm_90a'",
            f"ptxas info    : Function properties for {kernel}",
            f"    {stack} bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads",
            f"ptxas info    : Used {registers} registers, used 1 barriers",
        ]
    return "\n".join(lines)


def disassembly(kernel, *instructions):
    body = "".join(
        f"        /*{16 * i:04x}*/                   {line} ;\n" for i, line in enumerate(instructions)
    )
    return f"\tcode for sm_90a\n\t\tFunction : {kernel}\n{body}"


GOOD = ("@P0 LDS.128 R4, [R2]", "HGMMA.64x128x8.F32.TF32 R24, gdesc[UR4], R24", "@!UP0 UMOV UR4, 0x1", "EXIT")


def verdicts(script, text, *instructions):
    code = script.parse_disassembly(disassembly("fkda_wide_a", *(instructions or GOOD)))
    return {usage.kernel: broken for usage, broken in script.judge(text, code, [PLAN])}


def test_a_good_kernel(script):
    text = report("fkda_wide_a", said=[HARMLESS])
    [usage] = script.parse_report(text)
    assert (usage.arch, usage.registers, usage.stack, usage.spills) == ("sm_90a", 168, 0, 0)
    assert verdicts(script, text) == {"fkda_wide_a": []}


def test_mnemonics(script):
    code = script.parse_disassembly(disassembly("fkda_wide_a", *GOOD))
    assert code == {("fkda_wide_a", "sm_90a"): {"LDS.128", "HGMMA.64x128x8.F32.TF32", "UMOV", "EXIT"}}
    assert script.occurs("HGMMA", {"HGMMA.64x128x8.F32.TF32"})
    assert script.occurs("HGMMA.64x128x8", {"HGMMA.64x128x8.F32.TF32"})
    assert not script.occurs("HMMA", {"HGMMA.64x128x8.F32.TF32"})
    assert not script.occurs("LD", {"LDL.64"})


@pytest.mark.parametrize(
    ("instructions", "broken"),
    [
        (("HMMA.16816.F32.BF16 R4, R4, R5, R6",), "has no HGMMA"),
        ((*GOOD, "@!P1 LDL.64 R4, [R1+0x8]"), "has LDL"),
        ((*GOOD, "STL [R1], R3"), "has STL"),
    ],
)
def test_machine_code(script, instructions, broken):
    assert verdicts(script, report("fkda_wide_a"), *instructions) == {"fkda_wide_a": [broken]}


@pytest.mark.parametrize(
    ("figures", "broken"),
    [
        ({"registers": 169}, "uses 169 registers, planned 168"),
        ({"stores": 4}, "spills 4 bytes"),
        ({"stack": 8}, "has a stack frame of 8 bytes"),
    ],
)
def test_figures(script, figures, broken):
    assert verdicts(script, report("fkda_wide_a", **figures)) == {"fkda_wide_a": [broken]}


@pytest.mark.parametrize(
    ("figures", "broken"),
    [
        ({"stores": 64}, []),
        ({"stores": 68}, ["spills 68 bytes, planned 64"]),
        ({"stores": 64, "registers": 169}, ["uses 169 registers, planned 168"]),
    ],
)
def test_planned_spills(script, figures, broken):
    plan = {"name": "fkda_wide_*", "registers": 168, "static_shared": 0, "spills": 64}
    [(_, found)] = script.judge(report("fkda_wide_a", **figures), None, [plan])
    assert found == broken


def test_serialised_products_fail_the_kernel_that_has_them(script):
    plans = [PLAN]
    text = report("fkda_wide_a", "fkda_wide_b", said=[SERIAL, SERIAL])
    a, b = script.judge(text, None, plans)
    assert len(a[1]) == 1
    assert "wgmma.mma_async instructions are serialized due to insufficient register resources" in a[1][0]
    assert b[1] == []


def test_ignored_setmaxnreg_fails_the_file(script):
    for said in (IGNORED, "ptxas info : 'setmaxnreg' ignored to maintain minimum register requirements."):
        for _usage, broken in script.judge(report("fkda_wide_a", "fkda_wide_b", said=[said]), None, [PLAN]):
            assert len(broken) == 1
            assert "'setmaxnreg' ignored" in broken[0]


def test_a_kernel_without_plan(script):
    [(_usage, broken)] = script.judge(report("fkda_unheard_of"), None, [PLAN])
    assert broken == ["has no plan in kernel_plan.toml"]


def test_a_kernel_missing_in_the_machine_code(script):
    assert verdicts(script, report("fkda_wide_b")) == {"fkda_wide_b": ["is not in the disassembly"]}
