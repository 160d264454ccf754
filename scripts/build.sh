#!/bin/sh
# build.sh FOLDER [CMAKE OPTION...]: configures and builds. Takes cmake and ninja from PATH. With TARGETS
# only the targets are built that it names.
set -eu
folder=$1
shift
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! cmake -S . -B "$folder" -G Ninja -DCMAKE_MAKE_PROGRAM="$(command -v ninja)" "$@" >"$log" 2>&1; then
    cat "$log"
    exit 1
fi
grep '^-- flash_kda' "$log" || true
# shellcheck disable=SC2086
cmake --build "$folder" ${TARGETS:+--target $TARGETS}
