"""What the documents point at is there: files, headings, functions named in them, commands. Their code runs elsewhere
(`test_readme`, `test_guides`, `test_dialects`)."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from pages import PAGES

import fastpg

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for folder in (".", "docs/pages", "docs/pages/api", "kernels", "bench/results")
    for path in (ROOT / folder).glob("*.md")
    if path.name != "LICENSE.md"
)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """As GitHub makes them from headings: lower case, without punctuation, dashes for spaces."""
    titles = re.findall(r"^#+ (.*)$", without_code(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text())):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file) if file else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_are_named_exist(document):
    """`fastpg/linear/call.py`, from the root of the project or from the document's folder."""
    if document.name == "CHANGELOG.md":  # tells of files that have moved since
        return
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|json|csv|txt|png))`", document.read_text()):
        made = name.startswith("demo-out/") or name == "tests/__init__.py"  # by a command; which must not be
        assert made or any(folder.joinpath(name).exists() for folder in (ROOT, document.parent)), name


def resolved(dotted: str) -> object:
    """A module, or what an attribute of one leads to. Of a module whose framework is not installed, its text."""
    try:
        return importlib.import_module(dotted)
    except ImportError:
        file = ROOT / f"{dotted.replace('.', '/')}.py"
        if file.is_file():
            return file.read_text()
    parent, _, name = dotted.rpartition(".")
    found = resolved(parent)
    return re.search(rf"^(class|def) {name}\b", found, re.MULTILINE)[0] if isinstance(found, str) else getattr(found, name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_public_names_that_are_named_exist(document):
    if document.name == "CHANGELOG.md":
        return
    for dotted in set(re.findall(r"\bfastpg(?:\.\w+)+(?!\.)", document.read_text())) - {"fastpg.md"}:
        resolved(dotted)


def test_the_blocks_of_the_pages_of_objectives_and_advantages():
    names = {
        "fastpg": fastpg, "hidden": torch.randn(2, 3, 8), "head": torch.randn(20, 8), "tokens": torch.randint(0, 20, (2, 3)),
        "old_logprobs": -torch.rand(2, 3), "advantages": torch.randn(2, 3), "mask": torch.rand(2, 3) > 0.3,
        "rewards": torch.tensor([0.0, 1.0]), "group_ids": torch.zeros(2, dtype=torch.int64),
    }  # fmt: skip
    pages = "\n".join((PAGES / name).read_text() for name in ("objectives.md", "advantages.md"))
    blocks = re.findall(r"```python\n(.*?)```", pages, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
        assert names.pop("loss").isfinite()
