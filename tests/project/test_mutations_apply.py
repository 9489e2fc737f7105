"""The list in `tests/mutations` does not rot: every old text is in its file exactly once. `python tests/mutations` runs it."""

import ast

import pytest
from all_mutations import MUTATIONS
from mutation import ROOT, file_of


def test_there_are_enough_and_their_names_differ():
    assert len(MUTATIONS) >= 20
    assert sum(m.file.startswith("kernels/") for m in MUTATIONS) >= 6
    assert len({m.name for m in MUTATIONS}) == len({(m.file, m.old, m.new) for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_applies(mutation):
    text = (ROOT / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old
    ast.parse(text.replace(mutation.old, mutation.new))
    for name in mutation.tests.split():
        assert (ROOT / file_of(name)).is_file()
