#!/bin/sh
# Runs the C tests under AddressSanitizer and UndefinedBehaviorSanitizer. Kernels are left out: the tests run
# on the host.
set -eu
sh scripts/build.sh build-sanitize -DFLASH_KDA_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DFLASH_KDA_SANITIZE=address,undefined
FLASH_KDA_TEST_QUICK=1 ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 \
    ctest --test-dir build-sanitize --output-on-failure --no-tests=error
