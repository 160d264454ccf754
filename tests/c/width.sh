#!/bin/sh
# width.sh FLASH_KDA: no line of the command's help or of `info` is longer than 80 columns, with the
# pretended driver.
set -eu
failed=0

# at_most_80 ARGUMENT...: of the command
at_most_80() {
    if ! text=$("$command" "$@"); then
        echo "flash-kda $* failed"
        failed=1
    fi
    long=$(printf '%s\n' "$text" | awk 'length($0) > 80')
    if [ -z "$text" ] || [ -n "$long" ]; then
        printf 'flash-kda %s prints nothing or these long lines:\n%s\n' "$*" "$long"
        failed=1
    fi
}

command=$1
at_most_80 --help
for subcommand in info check bench run; do at_most_80 $subcommand --help; done
at_most_80 info
while read -r heads lengths options; do
    # The options are words of their own.
    # shellcheck disable=SC2086
    at_most_80 info --device cuda:0 --heads "$heads" --lengths "$lengths" $options
done <<'SHAPES'
96 0
1 1
96 8192
96 8192 --batch-invariant
96 8192 --cut never
24 8192
16 8192
4 1024
12 2048
8 4096 --cut always
1 262144
8 65536
96 1024x8
8 30000,100x50
8 30000,100x50 --longest-unknown
8 30000,100x50 --cut mixed
16 12000,400x11
1 262144,100x5
12 2048x4 --kernel portable
8 8192 --device cpu
SHAPES
exit $failed
