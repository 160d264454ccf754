#!/bin/sh
# host_time.sh PROGRAM: the benchmark of host time runs every shape and prints a line for each. Times are not
# judged.
set -eu
out=$(mktemp)
trap 'rm -f "$out"' EXIT
"$1" 3 >"$out"
time=' +[0-9]+\.[0-9]{2} (within|above|-) *'
line="^[0-9][0-9x,]* +[0-9]+ (cu_seqlens|-) *$time$time [1-9][0-9]* +[1-9][0-9]*\$"
shapes=$(sed '1,/^lengths /d' "$out" | wc -l)
good=$(grep -cE "$line" "$out") || true
if [ "$shapes" -ne 25 ] || [ "$good" -ne "$shapes" ]; then
    cat "$out"
    echo "$good of $shapes lines are a shape's; there must be 25"
    exit 1
fi
# Without the pretended driver it must refuse, since it would launch kernels on made-up addresses.
if LD_LIBRARY_PATH='' "$1" 3 >"$out" 2>&1; then
    echo "it ran without the pretended driver"
    exit 1
fi
grep -q 'LD_LIBRARY_PATH must name' "$out"
