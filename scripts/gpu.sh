#!/bin/sh
# gpu.sh [STEP...]: everything that needs a GPU. Without arguments the steps build, check, tests, sanitizers
# and bench run; the step pictures, which overwrites figures of the documents, runs on request. Each step runs
# even if an earlier one failed, and the end says which steps failed. Needs nvcc, compute-sanitizer, and a
# python3 with PyTorch (and matplotlib for the pictures).
set -u
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build-gpu}
PYTHON=${PYTHON:-python3}
export BUILD

# build_into FOLDER [CMAKE OPTION...]: builds for the architecture of GPU 0 alone, which is quicker.
build_into() {
    folder=$1
    shift
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader -i 0 | tr -d .)
    if ! sh scripts/build.sh "$folder" "-DFLASH_KDA_CUDA_ARCHS=$arch" "$@" >"$folder.log" 2>&1; then
        cat "$folder.log"
        return 1
    fi
}

build() { build_into "$BUILD"; }

check() { "$BUILD/flash-kda" info && "$BUILD/flash-kda" check --device cuda:0; }

tests() {
    PYTHONPATH="$BUILD/python${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONPATH
    ctest --test-dir "$BUILD" -j 8 --output-on-failure --no-tests=error -R 'cuda:0' &&
        "$PYTHON" -m pytest tests/python -q -rs
}

# sanitize_with TOOL FOLDER: runs small problems under a tool of compute-sanitizer, which makes kernels a
# hundred times slower.
sanitize_with() {
    check="compute-sanitizer --tool $1 --error-exitcode 1"
    bench="$2/flash-kda bench --device cuda:0 --kernel hopper"
    $check "$2/tests/test_forward" --device cuda:0 --quick batches ragged many empty recorded &&
        $check "$2/tests/test_forward" --device cuda:0 --quick --kernel hopper --cut always ragged many &&
        $check "$2/tests/test_forward" --device cuda:0 --quick --kernel hopper --cut mixed ragged many &&
        $check "$2/tests/test_segments" --device cuda:0 --quick --kernel hopper --cut always join-groups &&
        $check $bench --cut always --heads 24 --lengths 1111 &&
        $check $bench --cut mixed --heads 4 --lengths 1111,30x40
}

# The four tools run side by side, since a tool keeps neither the GPU nor a core busy. racecheck does not see
# every order that mbarriers guarantee, so its kernels are compiled with FKDA_FOR_RACECHECK (kernels/hopper),
# which orders accesses by means that it does see.
sanitizers() {
    status=0
    build_into "$BUILD-racecheck" -DFLASH_KDA_NVCC_FLAGS=-DFKDA_FOR_RACECHECK || return 1
    for tool in memcheck racecheck synccheck initcheck; do
        folder=$BUILD
        [ $tool = racecheck ] && folder=$BUILD-racecheck
        sanitize_with $tool "$folder" >"$BUILD/$tool.log" 2>&1 &
        eval "$tool=$!"
    done
    for tool in memcheck racecheck synccheck initcheck; do
        eval "wait \$$tool" || status=1
        echo "$tool: $(grep -E '(ERROR|RACECHECK) SUMMARY' "$BUILD/$tool.log" | tr '\n' ' ')"
    done
    return $status
}

bench() {
    PYTHONPATH="$BUILD/python${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONPATH
    "$BUILD/flash-kda" bench --device cuda:0 &&
        "$PYTHON" benchmarks/python_overhead.py &&
        "$PYTHON" benchmarks/peers.py --fla-shapes none --json "$BUILD/peers.json" \
            --kernel hopper --kernel hopper:never --kernel portable
}

# The picture of accuracy, and the README's table of it on standard output.
pictures() { "$PYTHON" scripts/plot_accuracy.py docs/accuracy.png --command "$BUILD/flash-kda"; }

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
