#!/bin/sh
# fatbins.sh LIBRARY FOLDER: NVIDIA's cuobjdump finds in the library the machine code and the PTX of every
# fat binary in FOLDER. Takes cuobjdump from PATH, from NVIDIA's wheels in .venv or from /usr/local/cuda, and
# exits with 77 where there is none.
set -eu
library=$1
folder=$2
venv=${0%/*}/../../.venv
cuobjdump=$(command -v cuobjdump ||
    ls "$venv"/lib/python3*/site-packages/nvidia/cu*/bin/cuobjdump 2>/dev/null ||
    ls /usr/local/cuda/bin/cuobjdump 2>/dev/null) || { echo "there is no cuobjdump"; exit 77; }

# Lines such as "sm_90a cubin" and "sm_80 ptx". cuobjdump fails if there is nothing of a kind.
list() {
    for kind in elf ptx; do "$cuobjdump" --list-$kind "$1" 2>/dev/null || true; done |
        sed -n 's/.*\.\(sm_[0-9a-z]*\)\.\(cubin\|ptx\)$/\1 \2/p'
}
expected=$(for fatbin in "$folder"/*.fatbin; do
    case $fatbin in */probe.fatbin) ;; *) list "$fatbin" ;; esac
done | sort)
found=$(list "$library" | sort)
echo "$found" | uniq -c
[ -n "$expected" ] || { echo "there is no fat binary in $folder"; exit 1; }
[ "$found" = "$expected" ] || { echo "expected:"; echo "$expected" | uniq -c; exit 1; }
