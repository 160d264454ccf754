#!/bin/sh
# host_time.sh PROGRAM: the benchmark of host time runs every shape and prints a line for each. Times are not
# judged.
set -eu
out=$(mktemp)
trap 'rm -f "$out"' EXIT
"$1" 3 >"$out"
time=' +[0-9]+\.[0-9]{2} (within|above|-) *'
line="^[0-9][0-9x,]* +[0-9]+ (cu_seqlens|-) *$time$time [1-9][0-9]* +[1-9][0-9]*\$"
# expect COUNT GOOD WANTED: of COUNT lines GOOD are as they must be, and WANTED is how many there must be.
expect()
{
    [ "$1" -eq "$3" ] && [ "$2" -eq "$3" ] && return
    cat "$out"
    echo "$2 of $1 lines are a shape's; there must be $3"
    exit 1
}
expect "$(sed '1,/^lengths /d; /^$/,$d' "$out" | wc -l)" "$(grep -cE "$line" "$out" || true)" 25
line="^(decode|decode_layer|apply)[a-z, ]* +[0-9]+ +[0-9]+ +[0-9]+$time 1 +[1-9][0-9]*\$"
expect "$(sed '1,/^call /d' "$out" | wc -l)" "$(grep -cE "$line" "$out" || true)" 9
# Without the pretended driver it must refuse, since it would launch kernels on made-up addresses.
if LD_LIBRARY_PATH='' "$1" 3 >"$out" 2>&1; then
    echo "it ran without the pretended driver"
    exit 1
fi
grep -q 'LD_LIBRARY_PATH must name' "$out"
