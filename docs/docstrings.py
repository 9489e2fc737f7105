"""Docstrings as Markdown. They are written to be read in an editor and by `help()`; this says how each of their forms is shown.

A griffe extension, for mkdocstrings. Sections like "Args:" stay, for griffe's own parser of Google's style.
"""

from __future__ import annotations

import ast
import re
from typing import Any

try:
    from griffe import Extension
except ModuleNotFoundError:  # where `readable` alone is wanted
    Extension = object

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Examples?):$")
_ENTRY = re.compile(r"((?:\"?[A-Za-z_][\w.=\"]*)(?:, [\w.=\"]+)*): +(?=\S)")
_COLUMNS = re.compile(r"\S {2,}\S")


def _fenced(lines: list[str]) -> str:
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join(["```text", *(line[indent:] for line in lines), "```"])


def _paragraph(text: str) -> str:
    """A paragraph that does not begin with a space: prose, with entries `name: text` as a list, and columns as code."""
    lines = text.split("\n")
    if text.startswith(("|", "- ", "* ")) or re.match(r"\d+\. ", text):
        return text
    if len(lines) > 1 and all(_COLUMNS.search(line) and not line.startswith(" ") for line in lines):
        return _fenced(lines)
    parts, entries, code = [""], False, []
    for i, line in enumerate(lines):
        entry = _ENTRY.match(line)
        if entry and (i == 0 or entries or lines[i - 1].endswith(":")):
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            parts.append(f"- {names}: {line[entry.end() :]}" if entries else f"\n- {names}: {line[entry.end() :]}")
            entries = True
        elif line.startswith(" ") and not entries:  # an equation below its sentence
            code.append(line)
        elif re.match(r"\[\d+\] ", line):  # a source, each on a line of its own
            parts.append(("- " if parts[-1].lstrip().startswith("- [") else "\n- ") + line)
        else:
            entries = entries and line.startswith(" ")
            parts.append(line.strip() if not entries else f"    {line.strip()}")
    return "\n".join([*parts, *(["", _fenced(code)] if code else [])]).strip("\n")


def readable(text: str) -> str:
    """A docstring as Markdown."""
    found, section, entries = [], False, False
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", text):
        if paragraph.startswith(" ") and (section or entries):  # goes on
            found.append(paragraph)
        elif paragraph.startswith(" "):
            found += [_fenced(paragraph.split("\n"))]
        else:
            section = _SECTION.match(paragraph.split("\n")[0]) is not None
            found.append(paragraph if section else _paragraph(paragraph))
            entries = "\n- `" in "\n" + found[-1]
    return "\n\n".join(found)


def _header(node: Any, lines: list[str]) -> list[str]:
    """The lines of a definition above its docstring, and for a class those of its fields, which say shapes in comments."""
    first = node.body[0]
    header = lines[node.lineno - 1 : max(first.lineno - 1, node.lineno)]
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            field = isinstance(inner, ast.AnnAssign) and "ClassVar" not in ast.unparse(inner.annotation)
            if field and not ast.unparse(inner.target).startswith("_"):
                header = [*header, *lines[inner.lineno - 1 : inner.end_lineno]]
            elif isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                header = [*header, *lines[inner.lineno - 1 : inner.body[0].lineno - 1]]
    return header


class Readable(Extension):
    """Puts each definition above its text and makes Markdown of the text. griffe calls it with every object that it reads."""

    def _change(self, node: Any, obj: Any) -> None:
        if obj.docstring is None:
            return
        text = readable(obj.docstring.value)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and "property" not in obj.labels:
            lines = _header(node, obj.lines_collection[obj.filepath])
            indent = len(lines[0]) - len(lines[0].lstrip())
            text = "\n".join(["```python", *(line[indent:].rstrip() for line in lines), "```", "", text])
        obj.docstring.value = text

    def on_function_instance(self, *, node: Any, func: Any, **kwargs: Any) -> None:
        self._change(node, func)

    def on_class_members(self, *, node: Any, cls: Any, **kwargs: Any) -> None:
        self._change(node, cls)

    def on_attribute_instance(self, *, node: Any, attr: Any, **kwargs: Any) -> None:
        self._change(node, attr)

    def on_module_members(self, *, node: Any, mod: Any, **kwargs: Any) -> None:
        self._change(None, mod)
