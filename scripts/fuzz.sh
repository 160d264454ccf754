#!/bin/sh
# fuzz.sh [HARNESS...]: runs the harnesses of tests/fuzz (all without arguments) under libFuzzer with
# AddressSanitizer and UndefinedBehaviorSanitizer, FUZZ_SECONDS each (60 by default), from the corpus in the
# tree. New inputs are kept in build-fuzz/corpus. An input that fails is kept in build-fuzz/found and fails
# the script. Takes clang from CLANG or PATH.
set -eu
clang=${CLANG:-clang}
seconds=${FUZZ_SECONDS:-60}
folder=build-fuzz

probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
echo 'int LLVMFuzzerTestOneInput(const char *d, long n) { return d == 0 && n; }' >"$probe/probe.c"
if ! "$clang" -fsanitize=fuzzer,address,undefined "$probe/probe.c" -o "$probe/probe" >/dev/null 2>&1; then
    echo "fuzz: skipped, since $clang cannot link libFuzzer (Debian: apt-get install clang libclang-rt-dev)"
    exit 0
fi

names=${*:-call bwd decode file command plan}
targets=$(for name in $names; do echo "fuzz_$name"; done)
TARGETS=$targets sh scripts/build.sh $folder -DFLASH_KDA_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    "-DCMAKE_C_COMPILER=$clang" -DFLASH_KDA_SANITIZE=fuzzer-no-link,address,undefined \
    -DFLASH_KDA_FUZZ=-fsanitize=fuzzer
# An allocation that no memory has must fail, as it does without a sanitizer.
export ASAN_OPTIONS=allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
mkdir -p $folder/found

# fuzz HARNESS: a file tells that it has failed.
fuzz() {
    rm -f "$folder/fuzz_$1.failed"
    mkdir -p "$folder/corpus/$1"
    "$folder/tests/fuzz/fuzz_$1" "-max_total_time=$seconds" -print_final_stats=1 -timeout=20 \
        -max_len=4096 "-artifact_prefix=$folder/found/$1-" \
        "$folder/corpus/$1" "tests/fuzz/corpus/$1" >"$folder/fuzz_$1.log" 2>&1 ||
        touch "$folder/fuzz_$1.failed"
}

# Each harness has one thread, so there are as many at a time as there are processors.
started=0
for name in $names; do
    fuzz "$name" &
    started=$((started + 1))
    if [ $((started % $(nproc))) = 0 ]; then wait; fi
done
wait

failed=0
for name in $names; do
    log=$folder/fuzz_$name.log
    found=""
    if [ -e "$folder/fuzz_$name.failed" ]; then
        found=", FAILED: see $log and $folder/found"
        failed=1
        tail -n 40 "$log"
    fi
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    coverage=$(sed -n 's/.*cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
    echo "fuzz: $name: ${executions:-0} inputs, coverage ${coverage:-0}$found"
done
exit $failed
