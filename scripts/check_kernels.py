"""Holds every compiled kernel to scripts/kernel_plan.toml: check_kernels.py [BUILD/kernels]

Reads ptxas' report of each kernel file: registers, spills, stack and static shared memory for each
architecture, and warnings of wgmma that ptxas serialised and of setmaxnreg that it ignored. Reads the machine
code too where cuobjdump and nvdisasm are installed. Exits 1 if any kernel breaks its plan.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PLAN = ROOT / "scripts" / "kernel_plan.toml"


# The mnemonics of each (kernel, architecture).
Code = dict[tuple[str, str], set[str]]


@dataclass
class Usage:
    """What ptxas said about one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int = -1
    stack: int = -1
    spills: int = -1
    static_shared: int = 0


def parse_report(text: str) -> list[Usage]:
    found: list[Usage] = []
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            found.append(Usage(match[1], match[2]))
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            # Functions that were not inlined are reported too. The largest number counts.
            found[-1].stack = max(found[-1].stack, int(match[1]))
            found[-1].spills = max(found[-1].spills, int(match[2]) + int(match[3]))
        elif match := re.search(r"Used (\d+) registers", line):
            found[-1].registers = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                found[-1].static_shared = int(shared[1])
    return found


def parse_losses(text: str) -> list[tuple[str, str]]:
    """What ptxas says that it could not do as written, each with the kernel that it names ("" if none)."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if not re.search(
            r"Potential Performance Loss|\(C75(08|10)\)|wgmma\.mma_async instructions are serialized"
            r"|setmaxnreg\W* ignored",
            line,
        ):
            continue
        named = re.search(r"function '([^']+)'", line)
        said = re.sub(r"^ptxas \w+\s*:\s*|Potential Performance Loss:\s*", "", line.strip())
        entry = (named[1] if named else "", f"ptxas says: {said}")
        if entry not in found:  # each architecture says it again
            found.append(entry)
    return found


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: from the toolkit, PATH, or the wheel in this environment."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    folders += Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/*/bin")
    for folder in folders:
        if (folder / name).exists():
            return str(folder / name)
    return shutil.which(name)


def disassemble(fatbin: Path) -> Code | None:
    """None where there is no disassembler."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    if not cuobjdump or not nvdisasm:
        return None
    path = f"{Path(nvdisasm).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # cuobjdump calls nvdisasm
    run = subprocess.run(
        [cuobjdump, "-sass", str(fatbin)], env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True
    )
    if run.returncode != 0:
        sys.exit(f"check_kernels: cuobjdump failed on {fatbin}")
    return parse_disassembly(run.stdout)


def parse_disassembly(text: str) -> Code:
    code: Code = {}
    arch, mnemonics = "", set()
    for line in text.splitlines():
        if match := re.match(r"\s+code for (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s+Function : (\S+)", line):
            mnemonics = code.setdefault((match[1], arch), set())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", line):
            mnemonics.add(match[1])
    return code


def plan_for(plans: list[dict[str, Any]], kernel: str, arch: str) -> dict[str, Any] | None:
    for plan in plans:
        if fnmatch.fnmatchcase(kernel, plan["name"]):
            return {**plan, **plan.get(arch, {})}
    return None


def occurs(mnemonic: str, mnemonics: set[str]) -> bool:
    """HGMMA finds HGMMA.64x128x16.F32.BF16, but MMA does not."""
    return any(m == mnemonic or m.startswith(mnemonic + ".") for m in mnemonics)


def broken_rules(usage: Usage, plan: dict[str, Any], mnemonics: set[str] | None) -> list[str]:
    broken = []
    if usage.registers < 0 or usage.stack < 0:
        broken.append("the report has no figures for it (are several compilers' lines mixed up?)")
    most = plan.get("spills", 0)
    if usage.spills > most:
        broken.append(f"spills {usage.spills} bytes" + (f", planned {most}" if most else ""))
    if usage.stack > most:
        broken.append(f"has a stack frame of {usage.stack} bytes" + (f", planned {most}" if most else ""))
    if usage.registers > plan["registers"]:
        broken.append(f"uses {usage.registers} registers, planned {plan['registers']}")
    if usage.static_shared > plan["static_shared"]:
        broken.append(
            f"uses {usage.static_shared} bytes of static shared memory, planned {plan['static_shared']}"
        )
    if mnemonics is not None:
        for wanted in plan.get("require", []):
            if not occurs(wanted, mnemonics):
                broken.append(f"has no {wanted}")
        for unwanted in plan.get("forbid", []):
            if occurs(unwanted, mnemonics):
                broken.append(f"has {unwanted}")
    return broken


def judge(text: str, code: Code | None, plans: list[dict[str, Any]]) -> list[tuple[Usage, list[str]]]:
    """Each kernel and architecture of a report, with the rules that it breaks."""
    losses = parse_losses(text)
    verdicts = []
    for usage in sorted(parse_report(text), key=lambda u: (u.kernel, int(re.sub(r"\D", "", u.arch)), u.arch)):
        plan = plan_for(plans, usage.kernel, usage.arch)
        # A loss that names no kernel may be of any kernel of the file, so it fails all of them.
        broken = [said for kernel, said in losses if kernel in ("", usage.kernel)]
        if plan is None:
            broken.append(f"has no plan in {PLAN.name}")
        elif code is not None and (usage.kernel, usage.arch) not in code:
            broken.append("is not in the disassembly")
        else:
            broken += broken_rules(usage, plan, None if code is None else code[usage.kernel, usage.arch])
        verdicts.append((usage, broken))
    return verdicts


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "kernels"
    reports = sorted(folder.glob("*.report"))
    if not reports:
        print(f"check_kernels: no kernels were built in {folder} (no nvcc?), so there is nothing to check")
        return 0
    plans = tomllib.loads(PLAN.read_text())["kernel"]
    checked = failed = 0
    for report in reports:
        code = disassemble(report.with_suffix(".fatbin"))
        if code is None:
            print(f"{report.name}: no cuobjdump and nvdisasm, so the machine code was not looked at")
        verdicts = judge(report.read_text(), code, plans)
        if not verdicts:
            print(f"{report.name}: no kernel in it")
            failed += 1
        for usage, broken in verdicts:
            print(
                f"{usage.kernel:32} {usage.arch:8} {usage.registers:4} registers {usage.spills:5} B spilled "
                f"{usage.stack:5} B stack {usage.static_shared:6} B static shared   "
                f"{'; '.join(broken) or 'ok'}"
            )
            checked += 1
            failed += bool(broken)
    print(f"check_kernels: {checked - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
