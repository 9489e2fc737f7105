"""The tree, the arrows and the table of CONTRIBUTING are what the code is."""

import ast
import re

import pytest
from imports import ROOT, files, imports

DOCUMENT = (ROOT / "CONTRIBUTING.md").read_text()


def block(name: str) -> list[str]:
    (text,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", DOCUMENT, re.DOTALL)
    return [line for line in text.splitlines() if not line.startswith("```")]


def tree() -> list[str]:
    """Modules from top to bottom. A folder's line is that of its __init__.py."""
    names, folders = [], []
    for line in block("tree"):
        entry = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if entry.endswith("/"):
            folders.append(entry.rstrip("/"))
            if depth:  # fastpg/__init__.py has a line of its own; kernels/ has no code
                names.append(".".join(folders))
        else:
            names.append(".".join([*folders, entry.removesuffix(".py")]).removesuffix(".__init__"))
    return ["fastpg." + name if name.split(".")[0] == "kernels" else name for name in names]


def room(module: str) -> str:
    """What the arrows call it: a folder or a file of fastpg/, or kernels/limits."""
    parts = module.split(".")
    return "kernels/limits" if parts[1:] == ["kernels", "limits"] else parts[1]


def test_the_tree_has_a_line_for_every_file():
    lines = tree()
    assert sorted(lines) == sorted(set(files()) - {"fastpg.kernels"})
    for line in block("tree"):
        described = len(line.split()) > 1
        assert described or line.split()[0] in ("fastpg/", "trl.py", "transformers.py", "verl.py"), line


def test_a_file_imports_only_what_stands_below_it():
    """So there is no circle of imports either."""
    place = {name: i for i, name in enumerate(tree())} | {"fastpg.kernels": len(files())}
    for name, path in files().items():
        for other in imports(path):
            assert not other.startswith("fastpg") or place[other] > place[name], f"{name} imports {other}, which is above it"


def test_the_arrows_are_the_imports_between_folders():
    drawn = {}
    for line in block("arrows"):
        name, _, others = line.partition("->")
        drawn[name.strip()] = {other.strip() for other in others.split(",")}
    found = {}
    for name, path in files().items():
        if name in ("fastpg", "fastpg.__main__"):
            continue
        others = {other for other in imports(path) if other.startswith("fastpg.")}
        found.setdefault(room(name), set()).update(room(other) for other in others)
    found.pop("kernels/limits")
    found = {name: others - {name} for name, others in found.items()}
    # an arrow to kernels includes its limits, and one within kernels is none
    found = {name: others - ({"kernels/limits"} if "kernels" in {name, *others} else set()) for name, others in found.items()}
    assert {name: others for name, others in found.items() if others} == drawn


QUESTIONS = [[cell.strip() for cell in row.strip("|").split("|")] for row in block("questions")[2:]]


def definitions(path) -> set[str]:
    """Functions and classes of a file; methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        name = getattr(node, "name", None)
        found.add(name)
        found |= {f"{name}.{inner.name}" for inner in getattr(node, "body", []) if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("question", "file", "functions"), QUESTIONS, ids=[f"{row[1]} {row[2]}" for row in QUESTIONS])
def test_what_people_look_for_is_where_the_table_says(question, file, functions):
    names = re.findall(r"`([^`]+)`", functions)
    assert names
    assert set(names) <= definitions(ROOT / file.strip("`"))
