#!/bin/sh
# test_aarch64.sh: builds the CPU backend and its tests for aarch64, as scripts/wheel.sh does, and runs them
# under qemu. Skipped with a sentence where qemu or the C library for aarch64 is missing and cannot be
# installed. PYTHON has what scripts/wheel-requirements.txt names.
set -eu
python=${PYTHON:-python3}
folder=build-aarch64
root=/usr/aarch64-linux-gnu

if ! command -v qemu-aarch64 >/dev/null || [ ! -e $root/lib/ld-linux-aarch64.so.1 ]; then
    install="apt-get install -y -q --no-install-recommends qemu-user libc6-arm64-cross"
    if [ "$(id -u)" != 0 ] ||
        ! { $install || { apt-get update -q && $install; }; } >/dev/null 2>&1; then
        echo "aarch64: skipped, since qemu is missing (Debian: apt-get install qemu-user libc6-arm64-cross)"
        exit 0
    fi
fi
zig="$("$python" -c 'import os, ziglang; print(os.path.dirname(ziglang.__file__))' 2>/dev/null || true)/zig"
if [ "$zig" = /zig ]; then
    echo "aarch64: skipped, since ziglang is missing (python3 scripts/environment.py wheel)"
    exit 0
fi
export ZIG_GLOBAL_CACHE_DIR="$PWD/build-wheel/zig-cache"
# Tests that are scripts would start programs without qemu. Problems are small and tests few, because qemu is
# slow: all C tests of the CPU backend take ten minutes of processor time there.
programs="test_arguments test_reference test_segments test_support test_threads"
export TARGETS="$programs test_plan example_forward"
sh scripts/build.sh $folder "--toolchain=cmake/manylinux.cmake" "-DFLASH_KDA_ZIG=$zig" \
    -DFLASH_KDA_ARCH=aarch64 -DFLASH_KDA_CUDA=OFF "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;$root"
FLASH_KDA_TEST_QUICK=1 ctest --test-dir $folder -j 2 --output-on-failure --no-tests=error \
    -R "^(($(echo "$programs" | tr ' ' '|'))\.cpu|plan|example_forward)$"
