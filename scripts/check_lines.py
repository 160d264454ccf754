"""Holds lines to 110 columns: check_lines.py [FILE...]

Without arguments it reads every file that git knows (and does not ignore) and that people write: code,
comments and documents. Data, pictures and JSON are not read. Prints FILE:LINE: COLUMNS for each longer line,
and exits 1 if there is one. .clang-format and ruff wrap code to the same width, but leave comments, strings
and documents alone.
"""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 110
TAB = 8

WRITTEN = (
    *("*.c", "*.h", "*.cu", "*.cuh", "*.cpp"),  # C, CUDA C, C++
    *("*.py", "*.pyi", "*.sh", ".ci/run", "*.cmake", "CMakeLists.txt", "*/CMakeLists.txt", "Makefile"),
    *("*.md", "*.toml", "*.ini", "*.cff", "*.txt", ".clang*", "*/.clang*", ".editorconfig", ".gitignore"),
)

# A line that has nothing but one URL, behind a mark of a comment, a list or a key, has no place to break.
URL_ALONE = re.compile(r"\W*(\w+:)?\s*\W?https?://\S+\s*")

# The tables of these pages are generated, one row a shape, and Markdown cannot break a row.
GENERATED_TABLES = ("BENCHMARK_*.md", "docs/benchmark_*.md")


def is_written(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in WRITTEN)


def may_be_long(path: str, line: str) -> bool:
    if URL_ALONE.fullmatch(line):
        return True
    return line.startswith("|") and any(fnmatch.fnmatchcase(path, page) for page in GENERATED_TABLES)


def long_lines(path: str, text: str) -> list[tuple[int, int]]:
    """The number and the columns of each line that is too long."""
    lines = [line.expandtabs(TAB) for line in text.splitlines()]
    return [
        (number, len(line))
        for number, line in enumerate(lines, 1)
        if len(line) > COLUMNS and not may_be_long(path, line)
    ]


def files_of_git() -> list[str]:
    list_files = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(list_files, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return [path for path in listed if is_written(path) and (ROOT / path).is_file()]


def main(paths: list[str]) -> int:
    failed = 0
    for path in paths or files_of_git():
        for number, columns in long_lines(path, (ROOT / path).read_text(encoding="utf-8")):
            print(f"{path}:{number}: {columns} columns, at most {COLUMNS}")
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
