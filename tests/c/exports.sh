#!/bin/sh
# exports.sh NM LIBRARY HEADER: the functions that the library exports are those that the header declares.
set -eu
nm=$1
library=$2
header=$3
lists=$(mktemp -d)
trap 'rm -rf "$lists"' EXIT
"$nm" -D --defined-only "$library" | awk '$2 == "T" {print $3}' | sort >"$lists/exported"
tr -d '\n' <"$header" | grep -o 'FLASH_KDA_API [^;]*;' | grep -o 'flash_kda_[a-z0-9_]*(' |
    tr -d '(' | sort >"$lists/declared"
test -s "$lists/declared"
diff "$lists/declared" "$lists/exported"
