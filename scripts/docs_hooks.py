"""Hooks of MkDocs (mkdocs.yml) that keep one source for everything the site shows.

- A comment `<!-- header include/flash_kda.h -->` on a page becomes the reference of the C header: one section
  for each declaration, or group of declarations, with the comment above it.
- `<!-- section NAME of README.md -->` becomes that section, and `<!-- file PATH -->` a block with that file.
- The pages in ROOT_PAGES, which lie in the project's folder and not in docs/, become pages of the site.
- Links between all of these are made to fit. A link to another file of the project becomes plain text, as the
  site does not have the file. A link to a file that does not exist stays, so that MkDocs reports it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# The path in the project, and the name on the site. MkDocs would take README.md for the front page.
ROOT_PAGES = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "BENCHMARK_H100.md": "benchmark_h100.md",
    "BENCHMARK_H200.md": "benchmark_h200.md",
}
MARKER = re.compile(r"^<!-- (header|section|file) (.*?) -->$", re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
C_NAME = re.compile(r"\b(?:flash_kda_\w+(?:\(\))?|FLASH_KDA_\w+)")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


# ---- links


def link_target(target: str, source: str) -> str | None:
    """Where a link of the project's file `source` points on the site; None if the site lacks that file."""
    path, sharp, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return target
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if path in ROOT_PAGES:
        return ROOT_PAGES[path] + sharp + anchor
    if path.startswith("docs/"):
        return path.removeprefix("docs/") + sharp + anchor
    return None if (ROOT / path).exists() else target


def with_links_of_the_site(text: str, source: str) -> str:
    """The Markdown of the project's file `source` with links that fit the site."""

    def replace(match: re.Match[str]) -> str:
        target = link_target(match[3], source)
        return match[2] if target is None else f"{match[1]}[{match[2]}]({target})"

    parts, end = [], 0
    for fenced in FENCED.finditer(text):  # code has brackets and parentheses of its own
        parts += [LINK.sub(replace, text[end : fenced.start()]), fenced[0]]
        end = fenced.end()
    return "".join([*parts, LINK.sub(replace, text[end:])])


# ---- the C header


def comment_lines(comment: str) -> list[str]:
    """The text of a C comment without its marks."""
    inside = comment.strip().removeprefix("/*").removesuffix("*/").strip("\n")
    return [re.sub(r"^ \* ?", "", line).rstrip() for line in inside.splitlines()]


def prose(text: str, anchors: dict[str, str]) -> str:
    """One paragraph of a comment as Markdown: names of the API are code, and links to their sections."""

    def name(match: re.Match[str]) -> str:
        anchor = anchors.get(match[0].removesuffix("()"))
        return f"[`{match[0]}`](#{anchor})" if anchor else f"`{match[0]}`"

    return C_NAME.sub(name, re.sub(r"([*<>`\[\]])", r"\\\1", text))


def comment_markdown(comment: str, anchors: dict[str, str]) -> str:
    """A comment as Markdown: indented lines stay as they are, the others are paragraphs."""
    blocks: list[tuple[bool, list[str]]] = []
    for line in comment_lines(comment):
        line = line if line.startswith("  ") else line.strip()
        as_it_is = line.startswith("  ") if line else bool(blocks and blocks[-1][0])
        if not line and not as_it_is:
            blocks.append((False, []))
            continue
        if not blocks or blocks[-1][0] != as_it_is:
            blocks.append((as_it_is, []))
        blocks[-1][1].append(line)
    shown = []
    for as_it_is, lines in blocks:
        text = "\n".join(lines).strip("\n")
        if text:
            shown.append(f"```text\n{text}\n```" if as_it_is else prose(text, anchors))
    return "\n\n".join(shown)


def declared_names(declarations: str) -> list[str]:
    code = re.sub(r"/\*.*?\*/", "", declarations, flags=re.DOTALL)
    return re.findall(r"^(?:\} |FLASH_KDA_API [\w ]+?\*?)(\w+)[;(]", code, re.MULTILINE)


def header_items(header: str) -> list[tuple[list[str], str, str]]:
    """The names, the comment and the declarations of each group that no blank line divides. Blank lines
    inside of a struct do not count: what follows them is indented."""
    body = header.partition('extern "C" {\n#endif\n')[2].rpartition("#ifdef __cplusplus")[0]
    items = []
    for block in re.split(r"\n{2,}(?=\S)", body.strip()):
        match = re.match(r"(/\*.*?\*/\n)?(.*)", block, re.DOTALL)
        assert match
        names = declared_names(match[2])
        if not names:
            raise ValueError(f"no declaration was found here in the header:\n{block}")
        items.append((names, match[1] or "", match[2]))
    return items


def header_markdown(header: str) -> str:
    items = header_items(header)
    anchors = {name: names[0] for names, _, _ in items for name in names}
    opening = re.match(r"/\*.*?\*/", header, re.DOTALL)
    shown = [comment_markdown(opening[0] if opening else "", anchors)]
    for names, comment, declarations in items:
        heading = ", ".join(f"`{name}`" for name in names)
        shown.append(f"## {heading} {{#{names[0]}}}")
        if comment:
            shown.append(comment_markdown(comment, anchors))
        shown.append(f"```c\n{declarations}\n```")
    return "\n\n".join(shown)


# ---- what a marker stands for


def section_of(text: str, name: str) -> str:
    match = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if not match:
        raise ValueError(f'there is no section "## {name}"')
    return match[1].strip()


def expanded(text: str) -> str:
    """A page of docs/ as Markdown, with what its markers stand for."""

    def replace(match: re.Match[str]) -> str:
        what, argument = match[1], match[2]
        if what == "header":
            return header_markdown(read(argument))
        if what == "file":
            return f"```{Path(argument).suffix[1:]}\n{read(argument)}```"
        name, _, path = argument.rpartition(" of ")
        return with_links_of_the_site(section_of(read(path), name), path)

    return MARKER.sub(replace, text)


# ---- what MkDocs calls


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for path, name in ROOT_PAGES.items():
        files.append(File.generated(config, name, content=with_links_of_the_site(read(path), path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri in ROOT_PAGES.values():
        return markdown
    return expanded(with_links_of_the_site(markdown, f"docs/{page.file.src_uri}"))
