"""How the tests are kept: folders, helpers, sizes, and which combinations of parameters run."""

import ast
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from pairs import SUITES, cover, pairs, values

TESTS = Path(__file__).resolve().parents[1]
FOLDERS = {"loss", "linear", "kernels", "advantages", "rollout", "distributed", "integrations", "project"}
FILES = sorted(TESTS.rglob("*.py"))


def test_every_test_module_is_in_a_folder_of_its_theme_and_its_name_is_its_own():
    modules = [path for path in FILES if path.name.startswith("test_")]
    assert {path.parent.relative_to(TESTS).as_posix() for path in modules} == FOLDERS
    helpers = {path.stem for path in FILES} - {"conftest", "__main__"}
    assert len({path.name for path in modules}) == len(modules)
    assert len(helpers) == len([path for path in FILES if path.stem not in ("conftest", "__main__")])
    assert set(SUITES) <= helpers


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_a_file_is_short_and_imports_no_test_module(path):
    """What tests share is in support/. An __init__.py would put the root on sys.path."""
    assert path.name != "__init__.py"
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [name for name in names if name.rpartition(".")[2].startswith(("test_", "conftest"))]


class Item:
    def __init__(self, params):
        self.callspec = SimpleNamespace(params=params)


def items(*counts):
    """Of a function whose parameters have so many values."""
    return [Item(dict(zip("xyzw", indices, strict=False))) for indices in product(*map(range, counts))]


def test_every_value_once():
    every = items(3, 2)
    kept = cover(every, values)
    assert len(kept) == 3
    assert {i.callspec.params["x"] for i in kept} == {0, 1, 2}
    assert {i.callspec.params["y"] for i in kept} == {0, 1}


def test_every_pair_once():
    every = items(4, 3, 2, 2)
    kept = [i.callspec.params for i in cover(every, pairs)]
    assert len(kept) <= 14 < len(every) == 48
    for a, b in ("xy", "xz", "xw", "yz", "yw", "zw"):
        assert len({(i[a], i[b]) for i in kept}) == len({(i.callspec.params[a], i.callspec.params[b]) for i in every})
    assert len(cover(items(4, 3), pairs)) == 12  # two parameters have no other pairs than their combinations
    assert len(cover(items(5), pairs)) == 5
