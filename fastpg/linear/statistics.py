"""The two-pass forward over every column of the vocabulary, those on other ranks included."""

from __future__ import annotations

from ..distributed import vocab_parallel
from ..tiles.row_statistics import finish_rows
from ..tiles.structures import Head, RowStatistics
from . import operators
from .rows import Rows


def row_statistics(
    rows: Rows, head: Head, entropy: bool, chunk_rows: int, backend: str, group: vocab_parallel.Group
) -> RowStatistics:
    """The statistics of the rows, (K,) each.

    group: the ranks that hold the other rows of the weight; None where this process has all of them.
    """
    if group is None:
        return operators.two_pass_statistics(rows, head, entropy, chunk_rows, backend)
    partials = operators.two_pass_partials(rows, head, entropy, chunk_rows, backend)
    return finish_rows(vocab_parallel.combine(partials, rows.tokens, head.weight.shape[0], group), entropy)
