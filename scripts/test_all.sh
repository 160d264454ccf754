#!/bin/sh
# test_all.sh: everything that guards the code on a machine without a GPU, one after the other, even if some
# fail: the tests, the C tests under the sanitizers and for aarch64, other versions of Python, and the fuzz
# harnesses. The last lines say which failed, how many cases each has had, and how many seconds each took.
# Needs BUILD, PYTHON, and what scripts/run_tests.py, sanitize.sh and fuzz.sh need.
set -u
logs=$BUILD/test-all
mkdir -p "$logs"
failed=""
took=""

# step NAME COMMAND...
step() {
    name=$1
    shift
    printf '\n== %s\n' "$name"
    began=$(date +%s)
    { "$@" 2>&1 || echo "$name" >"$logs/$name.failed"; } | tee "$logs/$name.log"
    if [ -e "$logs/$name.failed" ]; then failed="$failed $name"; fi
    took="$took${took:+, }$name $(($(date +%s) - began))"
}

# The checks that the C tests of a build folder counted, and the inputs of corpora that they replayed.
checks_in() {
    awk '/^  [a-z0-9-]+ +[0-9]+ checks / { checks += $2 } /^[0-9]+ inputs$/ { inputs += $1 }
         END { printf "%d checks, %d inputs of corpora", checks, inputs }' \
        "$1/Testing/Temporary/LastTest.log" 2>/dev/null || printf 'no checks'
}

# The C tests that ran, as ctest counts them.
programs_in() { sed -n 's/.*tests passed.* out of \([0-9]*\).*/\1/p' "$logs/$1.log" | tail -n 1; }

rm -f "$logs"/*.failed
step tests "$PYTHON" scripts/run_tests.py --all "$BUILD"
step address sh scripts/sanitize.sh address
step thread sh scripts/sanitize.sh thread
step aarch64 sh scripts/test_aarch64.sh
step pythons "$PYTHON" scripts/test_pythons.py "$BUILD"
step fuzz sh scripts/fuzz.sh

printf '\n== cases\n'
echo "tests:    $(tail -n 1 "$logs/tests.log"); $(checks_in "$BUILD")"
echo "address:  $(programs_in address) C tests with $(checks_in build-sanitize)"
echo "thread:   $(programs_in thread) C tests with $(checks_in build-thread)"
grep '^aarch64: ' "$logs/aarch64.log" || echo "aarch64:  $(programs_in aarch64) C tests"
grep '^pythons: ' "$logs/pythons.log" || echo "pythons: nothing ran"
grep '^fuzz: ' "$logs/fuzz.log" || echo "fuzz: nothing ran"
echo "seconds: $took"
if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
echo "all passed"
