#!/bin/sh
# exports.sh NM LIBRARY HEADER: the functions that the library exports are those that the header declares.
set -eu
lists=$(mktemp -d)
trap 'rm -rf "$lists"' EXIT
"$1" -D --defined-only "$2" | awk '$2 == "T" {print $3}' | sort >"$lists/exported"
tr -d '\n' <"$3" | grep -o 'FLASH_KDA_API [^;]*;' | grep -o 'flash_kda_[a-z0-9_]*(' | tr -d '(' | sort >"$lists/declared"
test -s "$lists/declared"
diff "$lists/declared" "$lists/exported"
