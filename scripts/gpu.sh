#!/bin/sh
# gpu.sh [STEP...]: what needs a GPU, from a clean tree, with nvcc and a python3 that has PyTorch: build, check, tests,
# sanitizers, bench. Without arguments all of them; each runs whatever the others do, and the end says which failed.
set -u
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build-gpu}
PYTHON=${PYTHON:-python3}
export BUILD

# build_into FOLDER [CMAKE OPTION...]
build_into() {
    folder=$1
    shift
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader -i 0 | tr -d .)
    sh scripts/build.sh "$folder" "-DFLASH_KDA_CUDA_ARCHS=$arch" "$@" >"$folder.log" 2>&1 || { cat "$folder.log"; return 1; }
}

build() { build_into "$BUILD"; }

check() { "$BUILD/flash-kda" info && "$BUILD/flash-kda" check --device cuda:0; }

tests() {
    ctest --test-dir "$BUILD" -j 8 --output-on-failure --no-tests=error -R 'cuda:0' &&
        "$PYTHON" -m pytest tests/python -q -rs
}

# Small problems: these tools slow a kernel down a hundredfold. Four at a time, since they wait for each other little.
# racecheck does not see all of the order that there is: kernels are compiled for it with what it sees (kernels/hopper/sm90.cuh).
sanitizers() {
    status=0
    build_into "$BUILD-racecheck" -DFLASH_KDA_NVCC_FLAGS=-DFKDA_FOR_RACECHECK || return 1
    for tool in memcheck racecheck synccheck initcheck; do
        where=$BUILD
        [ $tool = racecheck ] && where=$BUILD-racecheck
        (
            check="compute-sanitizer --tool $tool --error-exitcode 1"
            $check "$where/tests/test_forward" --device cuda:0 --quick batches ragged many empty recorded &&
                $check "$where/tests/test_segments" --device cuda:0 --quick --kernel hopper --cut always levels &&
                $check "$where/flash-kda" bench --device cuda:0 --kernel hopper --cut always --heads 24 --lengths 1111 &&
                $check "$where/flash-kda" bench --device cuda:0 --kernel hopper --cut mixed --heads 4 --lengths 1111,30x40
        ) >"$BUILD/$tool.log" 2>&1 &
        eval "$tool=$!"
    done
    for tool in memcheck racecheck synccheck initcheck; do
        eval "wait \$$tool" || status=1
        echo "$tool: $(grep -E '(ERROR|RACECHECK) SUMMARY' "$BUILD/$tool.log" | tr '\n' ' ')"
    done
    return $status
}

bench() {
    "$BUILD/flash-kda" bench --device cuda:0 && PYTHONPATH="$BUILD/python" "$PYTHON" benchmarks/python_overhead.py &&
        PYTHONPATH="$BUILD/python" "$PYTHON" benchmarks/peers.py --fla-shapes none --json "$BUILD/peers.json" \
            --kernel hopper --kernel hopper --cut never --kernel portable
}

failed=""
for step in ${@:-build check tests sanitizers bench}; do
    printf '\n== %s\n' "$step"
    "$step" || failed="$failed $step"
done
if [ -n "$failed" ]; then
    printf '\nfailed:%s\n' "$failed"
    exit 1
fi
printf '\nall passed\n'
