#!/bin/sh
# sanitize.sh address|thread: runs C tests under sanitizers.
#
#   address  All tests of the CPU backend and the host, under AddressSanitizer and UndefinedBehaviorSanitizer.
#   thread   The tests that use several threads, under ThreadSanitizer. The host code of the GPU kernels runs
#            on the pretended driver.
#
# Kernels are left out: the tests run on the host.
set -eu
which=$1
folder=build-sanitize
[ "$which" = thread ] && folder=build-thread

# ThreadSanitizer needs addresses that some kernels give only to programs whose memory is not laid out at
# random.
fixed_layout=""
if [ "$which" = thread ] && setarch -R true 2>/dev/null; then fixed_layout="setarch -R"; fi

# test OPTION...: ctest in the folder.
test_with() {
    # shellcheck disable=SC2086
    FLASH_KDA_TEST_QUICK=1 $fixed_layout ctest --test-dir "$folder" -j "$(nproc)" --output-on-failure \
        --no-tests=error "$@"
}

case $which in
address)
    sh scripts/build.sh $folder -DFLASH_KDA_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo \
        -DFLASH_KDA_SANITIZE=address,undefined
    export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1
    test_with
    ;;
thread)
    export TARGETS="test_threads test_surroundings test_exhausted test_plan test_driver test_host_threads
        test_launches test_segments test_map_arguments pretend_driver"
    sh scripts/build.sh $folder "-DNVCC=$PWD/tests/pretend_nvcc/nvcc" "-DFLASH_KDA_CUDA_ARCHS=80;90" \
        -DFLASH_KDA_EMULATOR=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFLASH_KDA_SANITIZE=thread
    export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
    test_with -R 'threads|surroundings|exhausted|^plan$|pretended'
    ;;
*)
    echo "sanitize.sh address|thread" >&2
    exit 2
    ;;
esac
