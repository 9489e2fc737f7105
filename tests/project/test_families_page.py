"""The page of families is what its results give, and the results are of every family that their transformers has."""

import json
import re
from pathlib import Path

import pytest
import transformers
from family_page import page
from tiny_models import families

ROOT = Path(__file__).resolve().parents[2]
RESULTS = json.loads((ROOT / "bench" / "results" / "families.json").read_text())
PAGE = (ROOT / "docs" / "pages" / "families.md").read_text()
ROWS = {row["class"]: row for row in RESULTS["families"]}


def test_the_page_is_made_of_the_results():
    assert page(RESULTS) == PAGE


def test_the_counts():
    """Counted from the table that a reader sees."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    results = [line.split(" | ")[2] for line in lines]
    assert len(lines) == len(ROWS) == len(RESULTS["families"])
    said = re.search(r"^(\d+) of (\d+) model families agree", PAGE, re.MULTILINE)
    assert (int(said[1]), int(said[2])) == (results.count("ok"), len(lines))
    for name in set(results):
        assert f"| {name} | {results.count(name)} |" in PAGE


def test_no_family_is_wrong():
    wrong = [name for name, row in ROWS.items() if row["result"] == "wrong"]
    assert not wrong


def test_what_is_not_ok_says_why():
    assert all(row["reason"] for row in RESULTS["families"] if row["result"] != "ok")
    assert all(row["checks"] for row in RESULTS["families"] if row["result"] == "ok")


def test_every_family_of_the_mappings_is_there():
    """Of the version that the results are of; another may have other families."""
    if transformers.__version__ != RESULTS["versions"]["transformers"]:
        newer = sorted({name for _, name in families()} - set(ROWS))
        pytest.skip(
            f"the results are of transformers {RESULTS['versions']['transformers']}; {len(newer)} families are not in them"
        )
    assert {name for _, name in families()} == set(ROWS)
