"""The two-pass forward over every column of the vocabulary, those on other ranks included."""

from __future__ import annotations

from ..distributed import vocab_parallel
from ..tiles.row_statistics import finish_further, finish_rows
from ..tiles.structures import Asked, Entries, Head, RowResults, largest_kept
from . import operators
from .rows import Rows


def row_results(
    rows: Rows, head: Head, asked: Asked, chunk_rows: int, backend: str, group: vocab_parallel.Group, first_column: int = 0
) -> RowResults:
    """What is asked of the rows, (K, ...) each.

    group: the ranks that hold the other rows of the weight; None where this process has all of them. first_column: the token id
    of this rank's first column; ids count all columns.
    """
    if group is None:
        return operators.two_pass_statistics(rows, head, asked, chunk_rows, backend)
    target, vocab_size, kept = None, head.weight.shape[0], largest_kept(asked)
    if asked.rank:  # every rank counts the logits above that of the token, which one of them has
        target = operators.two_pass_targets(rows, head, chunk_rows, backend)
        target = vocab_parallel.on_the_owner(target, rows.tokens, vocab_size, group)
    local = Asked(*asked[:-1], min(asked.top_k, vocab_size))
    partials = operators.two_pass_partials(rows, head, local, chunk_rows, backend, target)
    partials, columns = vocab_parallel.combine(partials, rows.tokens, vocab_size, group, kept, first_column)
    statistics = finish_rows(partials, asked.entropy)
    return RowResults(statistics, finish_further(partials.further, statistics, rows.tokens + first_column, columns, asked))


def set_results(
    rows: Rows, head: Head, entries: Entries, asked: Asked, backend: str, group: vocab_parallel.Group, first_column: int = 0
) -> tuple[RowResults, Entries]:
    """What is asked of rows whose softmax is over small sets, and the entries of these with their logits."""
    target, tokens = None, rows.tokens
    if group is not None and asked.rank:
        target = operators.two_pass_targets(rows, head, max(len(tokens), 1), backend)
        target = vocab_parallel.on_the_owner(target, tokens, head.weight.shape[0], group)
    partials, z, slope = operators.gathered_partials(rows, head, entries, asked, backend, target)
    entries = entries._replace(z=z, slope=slope)
    if group is not None:
        kept = largest_kept(asked)
        partials, _ = vocab_parallel.combine(partials, tokens, head.weight.shape[0], group, kept, first_column)
    statistics = finish_rows(partials, asked.entropy)
    columns = entries.sizes.to(statistics.t.dtype)
    return RowResults(statistics, finish_further(partials.further, statistics, tokens + first_column, columns, asked)), entries
