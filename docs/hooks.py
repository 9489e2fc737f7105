"""What mkdocs does not do by itself: pages from files that stand elsewhere in the repository, and links between all of them.

A link in a document leads to a file of the repository, so that it works in a clone. Here it becomes the address in the site.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = "docs/pages"
# documents that are pages of the site too
SHOWN = {
    "kernels/README.md": "kernels.md",
    "bench/results/README.md": "results.md",
    "CHANGELOG.md": "changelog.md",
}
# README.md is none: what it has that documents point at stands on these pages
IN_README = {"": "index.md"}
# a heading whose numbers no one searches for, and which would be found for every name of an objective
NOT_SEARCHED = "## Compile report"
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def source_of(page: str) -> str:
    """The file that a page is made of, from the root of the repository."""
    return {shown: source for source, shown in SHOWN.items()}.get(page, f"{PAGES}/{page}")


def place_of(file: str, anchor: str = "") -> str:
    """Where the site has a file of the repository."""
    if file == "README.md":
        if anchor not in IN_README:
            raise ValueError(f"docs/hooks.py: IN_README has no page for README.md#{anchor}")
        return IN_README[anchor]
    if not (ROOT / file).is_file():
        raise ValueError(f"docs/hooks.py: a document links to {file}, which is not there")
    place = SHOWN.get(file) or (os.path.relpath(file, PAGES) if file.startswith(f"{PAGES}/") else file)
    if file.endswith(".md") and place == file:
        raise ValueError(f"docs/hooks.py: a document links to {file}, which is no page of the site")
    return f"{place}#{anchor}" if anchor else place


def outside_code(text: str, change: Any) -> str:
    """`change` of everything between the blocks of code."""
    parts, end = [], 0
    for block in _CODE.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(text[end:])])


def linked_files(page: str, text: str) -> dict[str, str]:
    """The links of a page's text to files: as written, and as they lead from that page in the site."""
    source, found = Path(source_of(page)), {}
    for link in _LINK.findall(_CODE.sub("", text)):
        target, _, anchor = link.partition("#")
        if target and "://" not in target:
            file = os.path.normpath(source.parent / target)
            found[link] = os.path.relpath(place_of(file, anchor), Path(page).parent)
    return found


def with_tables(text: str) -> str:
    """`<!-- table NAME of FILE -->` becomes the table between the marks of that name in the file."""

    def table(found: re.Match) -> str:
        (rows,) = re.findall(rf"<!-- {found[1]} -->\n(.*?)<!-- /{found[1]} -->", (ROOT / found[2]).read_text(), re.DOTALL)
        return rows

    return re.sub(r"^<!-- table (\w+) of (\S+) -->$", table, text, flags=re.MULTILINE)


def for_the_site(page: str, text: str) -> str:
    """A document as mkdocs reads it: links as in the site, and what GitHub's Markdown takes and Python's does not."""
    text = with_tables(text)
    links = linked_files(page, text)

    def change(part: str) -> str:
        part = _LINK.sub(lambda found: f"]({links.get(found[1], found[1])})", part)
        part = re.sub(r"^<!-- /?\w+ -->\n", "", part, flags=re.MULTILINE)
        part = re.sub(rf"^{NOT_SEARCHED}$", f"{NOT_SEARCHED} {{ data-search-exclude }}", part, flags=re.MULTILINE)
        return re.sub(r"^((?!\s|[-*] |\d+\. ).+)\n(?=[-*] |\d+\. )", r"\1\n\n", part, flags=re.MULTILINE)  # lists

    return outside_code(text, change)


# ---- what mkdocs calls

_INSTALLED = tempfile.TemporaryDirectory(prefix="fastpg-docs-")  # until mkdocs ends


def on_config(config: Any) -> Any:
    """The package as it is installed, with kernels/ as fastpg.kernels, for mkdocstrings to read."""
    folder = Path(_INSTALLED.name) / "fastpg"
    folder.mkdir(exist_ok=True)
    for path in [*(ROOT / "fastpg").iterdir(), ROOT / "kernels"]:
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config.handlers.setdefault("python", {})["paths"] = [str(folder.parent)]
    config.watch += [str(ROOT / folder) for folder in ("fastpg", "kernels")]
    return config


on_config.mkdocs_priority = 100  # before mkdocstrings looks for its paths


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for source, page in SHOWN.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for page in [file.src_uri for file in files.documentation_pages()]:
        for link in linked_files(page, (ROOT / source_of(page)).read_text()).values():
            file = os.path.normpath(Path(page).parent / link.partition("#")[0])
            if not files.get_file_from_path(file):  # a picture or a file of numbers
                files.append(File.generated(config, file, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return for_the_site(page.file.src_uri, markdown)
