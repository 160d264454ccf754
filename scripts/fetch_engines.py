"""Fetches the releases of vLLM and SGLang that the package has plug-ins for, and keeps what tests and
benchmarks need of them: the modules of layers, kernels and plug-ins, and vLLM's compiled operators.

    python scripts/fetch_engines.py [--into FOLDER] [vllm] [sglang]

Wheels are fetched with pip, without the packages that they need, and are deleted once they are unpacked:
vLLM's has 340 MB, SGLang's 40 MB. FOLDER is build-engines by default, where tests and benchmarks look; they
also look in the folder that FLASH_KDA_ENGINES names.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What is kept of a wheel, by engine.
KEPT = {
    "vllm": re.compile(
        r"vllm/(_custom_ops\.py|_flashkda_C\.abi3\.so|_C_stable_libtorch\.abi3\.so|plugins/.*\.py"
        r"|models/(kimi_k3|glm5next)/.*\.py|model_executor/layers/mamba/.*\.py"
        r"|third_party/flash_linear_attention/.*\.py|triton_utils/.*\.py|v1/worker/workspace\.py"
        r"|utils/math_utils\.py)$"
    ),
    "sglang": re.compile(
        r"sglang/(kernels/.*\.py|srt/layers/attention/.*\.py|srt/plugins/.*\.py|srt/environ\.py)$"
    ),
}


def fetch(engine: str, version: str, into: Path) -> None:
    folder = into / f"{engine}-{version}"
    if (folder / engine).is_dir():
        print(f"{folder} is there already")
        return
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        subprocess.run(
            [
                sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                "--python-version", "3.11", "--platform", "manylinux_2_34_x86_64", "--platform",
                "manylinux_2_28_x86_64", "--dest", scratch, f"{engine}=={version}",
            ],
            check=True,
        )  # fmt: skip
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if KEPT[engine].match(name)]
            archive.extractall(Path(scratch) / "kept", names)
        (Path(scratch) / "kept").rename(folder)
    print(f"{folder}: {len(names)} files")


def main(argv: list[str]) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from peer_timing.releases import VERSIONS

    parser = argparse.ArgumentParser(
        prog="fetch_engines.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help="vllm, sglang; default: both")
    parser.add_argument("--into", type=Path, default=ROOT / "build-engines", metavar="FOLDER")
    options = parser.parse_args(argv)
    unknown = set(options.engines) - set(VERSIONS)
    if unknown:
        parser.error(f"{sorted(unknown)[0]} is no engine that is known here: {', '.join(VERSIONS)}")
    options.into.mkdir(parents=True, exist_ok=True)
    for engine in options.engines or VERSIONS:
        fetch(engine, VERSIONS[engine], options.into)


if __name__ == "__main__":
    main(sys.argv[1:])
