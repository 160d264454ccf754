#!/bin/sh
# test_all.sh [beside]: everything that guards the code on a machine without a GPU, even if some of it fails:
# the tests, the C tests under the sanitizers and for aarch64, other versions of Python, and the fuzz
# harnesses. The tests have priority. All else runs beside them, one step after the other, since no step keeps
# all processors busy all the time. A step's output is in BUILD/test-all. The output of a step that failed is
# shown once all have ended. The last lines say which failed, how many cases each has had, and how many
# seconds each took.
#
# With `beside` it runs the other steps alone, which it starts itself in a process group of their own, so
# that Ctrl-C ends them too. Needs BUILD, PYTHON, and what scripts/run_tests.py, sanitize.sh and fuzz.sh need.
set -u
logs=$BUILD/test-all
mkdir -p "$logs"
failed=""
took=""

# step NAME COMMAND...: leaves NAME.log, NAME.seconds, and NAME.failed if the command fails.
step() {
    name=$1
    shift
    began=$(date +%s)
    { "$@" 2>&1 || echo "$name" >"$logs/$name.failed"; } | tee "$logs/$name.log"
    echo $(($(date +%s) - began)) >"$logs/$name.seconds"
}

beside_the_tests() {
    for which in address thread; do step $which nice sh scripts/sanitize.sh $which; done
    step aarch64 nice sh scripts/test_aarch64.sh
    step pythons nice "$PYTHON" scripts/test_pythons.py "$BUILD"
    step fuzz nice sh scripts/fuzz.sh
}

# The checks that the C tests of a build folder counted, and the inputs of corpora that they replayed.
checks_in() {
    awk '/^  [a-z0-9-]+ +[0-9]+ checks / { checks += $2 } /^[0-9]+ inputs$/ { inputs += $1 }
         END { printf "%d checks, %d inputs of corpora", checks, inputs }' \
        "$1/Testing/Temporary/LastTest.log" 2>/dev/null || printf 'no checks'
}

# The C tests that ran, as ctest counts them.
programs_in() { sed -n 's/.*tests passed.* out of \([0-9]*\).*/\1/p' "$logs/$1.log" | tail -n 1; }

if [ "${1-}" = beside ]; then
    beside_the_tests
    exit
fi
rm -f "$logs"/*.failed "$logs"/*.seconds
setsid sh scripts/test_all.sh beside >"$logs/beside.log" 2>&1 &
trap 'kill -- -$!; exit 130' INT TERM
step tests "$PYTHON" scripts/run_tests.py --all "$BUILD"
echo "Waiting for sanitizers, other architectures and fuzz harnesses: $logs/beside.log"
wait
for name in tests address thread aarch64 pythons fuzz; do
    if [ -e "$logs/$name.failed" ]; then
        failed="$failed $name"
        [ $name = tests ] || { printf '\n== %s\n' $name; tail -n 300 "$logs/$name.log"; }
    fi
    took="$took${took:+, }$name $(cat "$logs/$name.seconds")"
done

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
