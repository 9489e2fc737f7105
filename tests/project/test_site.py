"""The documentation site, without building it: `make docs` does that, and stops at a link or a name that leads nowhere."""

import ast
import importlib.util
import os
import re
from pathlib import Path

import pytest
import yaml
from pages import DOCS, PAGES

import fastpg

ROOT = DOCS.parent


def program(name: str):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks, docstrings = program("hooks"), program("docstrings")
SETTINGS = yaml.safe_load((DOCS / "mkdocs.yml").read_text())
ON_DISK = sorted(path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md"))


def in_navigation(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in in_navigation(inner)]


def test_the_navigation_has_every_page_once():
    assert sorted(in_navigation(SETTINGS["nav"])) == sorted([*ON_DISK, *hooks.SHOWN.values()])


def test_nothing_is_fetched_by_a_reader():
    assert SETTINGS["theme"]["font"] is False
    assert not {"extra_javascript", "repo_url"} & SETTINGS.keys()
    assert not re.search(r"url\(|@import|https?:", (PAGES / "site.css").read_text())


@pytest.mark.parametrize("page", [*ON_DISK, *hooks.SHOWN.values()])
def test_links_lead_to_pages_of_the_site_or_to_files_beside_them(page):
    text = hooks.for_the_site(page, (ROOT / hooks.source_of(page)).read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for link in links:
        file = link.partition("#")[0]
        if file and not file.startswith("https://"):
            place = os.path.normpath(Path(page).parent / file)
            assert place in {*ON_DISK, *hooks.SHOWN.values()} or (ROOT / place).is_file(), link
            assert not place.endswith("README.md"), link


def test_a_link_that_leads_nowhere_or_to_no_page_is_an_error():
    for link in ("nowhere.md", "../../CONTRIBUTING.md", "../../README.md#no-such-heading"):
        with pytest.raises(ValueError, match=r"docs/hooks\.py"):
            hooks.for_the_site("guides.md", f"[x]({link})")


def test_documents_that_stand_elsewhere_link_to_the_site():
    text = "[a](../README.md) [b](../docs/pages/guides.md#trl) [c](../bench/results/README.md) [d](https://x.org)"
    wanted = "[a](index.md) [b](guides.md#trl) [c](results.md) [d](https://x.org)"
    assert hooks.for_the_site("kernels.md", text) == wanted
    assert hooks.for_the_site("api/head.md", "[a](../guides.md#trl)") == "[a](../guides.md#trl)"
    assert hooks.for_the_site("results.md", "![a](over_tokens.png)") == "![a](bench/results/over_tokens.png)"


def test_the_compile_report_is_not_searched():
    shown = hooks.for_the_site("kernels.md", (ROOT / "kernels/README.md").read_text())
    assert "\n## Compile report { data-search-exclude }\n" in shown


def test_markdown_of_github_becomes_that_of_python():
    """A list after a sentence needs an empty line; code is left alone; the marks of tables go."""
    text = "Traps:\n- one\n  more\n- two\n\n<!-- trl -->\n| a |\n\n```\nx:\n- [a](b.md)\n```\n"
    wanted = "Traps:\n\n- one\n  more\n- two\n\n| a |\n\n```\nx:\n- [a](b.md)\n```\n"
    assert hooks.for_the_site("guides.md", text) == wanted


def test_the_page_of_performance_has_the_tables_of_the_results():
    """Which `test_readme` holds to the files of results. The page has no ratio of its own."""
    page, results = (PAGES / "performance.md").read_text(), (ROOT / "bench/results/README.md").read_text()
    shown = hooks.for_the_site("performance.md", page)
    for name in ("bench", "h100"):
        rows = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", results, re.DOTALL)[1]
        assert rows in shown
    assert not re.search(r"\d+\.\d+ x\b", page)


def test_the_reference_has_every_public_name():
    """Kernels apart, of which it has the launchers."""
    text = "\n".join(path.read_text() for path in (PAGES / "api").glob("*.md"))
    listed = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(set(listed)) == len(listed)
    tree = ast.parse((ROOT / "tests/project/test_public_paths.py").read_text())
    (paths,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "PATHS"]
    names = {f"fastpg.{name}" for name in fastpg.__all__}
    for module, value in zip(paths.keys, paths.values, strict=True):
        if isinstance(value, ast.Constant) and not module.value.startswith("fastpg.kernels"):
            names |= {f"{module.value}.{name}" for name in value.value.split()}
    missing = names - set(listed) - {"fastpg.__main__.main", "fastpg.advantages.OnNaN", "fastpg.advantages.OnSingleton"}
    assert not missing


READABLE = {
    "an equation in a block of its own": ("A.\n\n    z = x\n\nB.", "A.\n\n```text\nz = x\n```\n\nB."),
    "an equation below its sentence": ("Notation\n    z = x\n    y = z", "Notation\n\n```text\nz = x\ny = z\n```"),
    "fields": (
        "A.\n\nweight: (V, H)\n    more of it.\nbias: (V,)\n\nB.",
        "A.\n\n- `weight`: (V, H)\n    more of it.\n- `bias`: (V,)\n\nB.",
    ),
    "rules": ("Rules of all:\nids, mask: any\nlayout: (B, T)", "Rules of all:\n\n- `ids`, `mask`: any\n- `layout`: (B, T)"),
    "columns": ("A.\n\na=1   l = x\nb=2   l = y", "A.\n\n```text\na=1   l = x\nb=2   l = y\n```"),
    "sources": ("[1] one\n[2] two", "- [1] one\n- [2] two"),
    "a section": ("A.\n\nArgs:\n    x: one\n        more\n\n    y: two", "A.\n\nArgs:\n    x: one\n        more\n\n    y: two"),
    "a sentence with a colon": ("It is\nso: said", "It is\nso: said"),
}


@pytest.mark.parametrize("name", READABLE)
def test_forms_of_docstrings(name):
    given, wanted = READABLE[name]
    assert docstrings.readable(given) == wanted


def test_a_definition_shows_the_shapes_beside_its_arguments():
    lines = [
        "class Head:", '    """A head."""', "", "    weight: int  # (V, H)", "    _hidden: int", "    bias: int = 0  # (V,)",
        "    def f(", "        self, x: int,  # (N,)", "    ) -> int:", '        """F."""',
    ]  # fmt: skip
    (node,) = ast.parse("\n".join(lines)).body
    assert docstrings._header(node, lines) == ["class Head:", "    weight: int  # (V, H)", "    bias: int = 0  # (V,)"]
    assert docstrings._header(node.body[-1], lines) == lines[6:9]


def test_what_renders_the_site_is_pinned_and_is_what_make_docs_installs():
    (listed,) = re.findall(r"^docs = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)  # the Makefile reads it so
    pins = (ROOT / ".ci/constraints.txt").read_text()
    names = re.findall(r'"([\w-]+)>=', listed)
    assert names == ["mkdocs-material", "mkdocstrings-python"]
    for name in [*names, "mkdocs", "mkdocstrings", "griffelib", "Markdown", "pymdown-extensions"]:
        assert re.search(rf"^{name}==[\d.]+$", pins, re.MULTILINE), name
