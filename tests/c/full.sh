#!/bin/sh
# full.sh FLASH_KDA: output that cannot be written is an error with a sentence, on a full disk and where
# standard output is closed.
set -u
[ -c /dev/full ] || exit 77
failed=0

# refused NAME STATUS REASON: the command's status, and in the file `said` its sentence with the reason.
refused() {
    if [ "$2" -ne 2 ] || ! grep -q "^error: the output can't be written: $3" "$said"; then
        echo "$1: status $2, and it said: $(cat "$said")"
        failed=1
    fi
}

said=$(mktemp)
trap 'rm -f "$said"' EXIT
bench="bench --device cpu --lengths 40 --heads 1"
for arguments in info --help "info --help" "info --device cpu --lengths 8192x3" --version "info --json" \
    "run --device cpu" "run --device cpu --json" "$bench" "$bench --json"; do
    # shellcheck disable=SC2086
    "$1" $arguments >/dev/full 2>"$said"
    refused "$arguments, full" $? "No space left on device"
    "$1" $arguments >&- 2>"$said"
    refused "$arguments, closed" $? "Bad file descriptor"
done
exit $failed
