#!/bin/sh
# Runs every linter over every source that git knows. All of them run, even if some fail. Needs BUILD.
set -u
failed=0

step() {
    name=$1
    shift
    if "$@"; then echo "ok      $name"; else echo "FAILED  $name"; failed=1; fi
}

c_and_cuda() { git ls-files -co --exclude-standard '*.c' '*.h' '*.cu' '*.cuh' '*.cpp'; }

# C files that the build compiles: clang-tidy needs their flags.
compiled_c() {
    git ls-files -co --exclude-standard '*.c' | while read -r file; do
        if grep -q "\"file\": \"$PWD/$file\"" "$BUILD/compile_commands.json"; then echo "$file"; fi
    done
}

format_c() { c_and_cuda | xargs clang-format --dry-run -Werror; }

tidy() {
    compiled_c | xargs -n 1 -P "$(nproc)" sh -c '
        out=$(clang-tidy -p "$0" --quiet "$1" 2>/dev/null) || { printf "%s\n" "$out"; exit 1; }' "$BUILD"
}

step "clang-format (C, CUDA C, C++)" format_c
step "clang-tidy (C)" tidy
step "lines of at most 110 columns" python3 scripts/check_lines.py
step "ruff check (Python)" ruff check --quiet .
step "ruff format (Python)" ruff format --quiet --check .
step "mypy (Python)" mypy
exit $failed
