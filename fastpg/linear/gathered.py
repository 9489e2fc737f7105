"""The schedule of small sets: log-probabilities over a few tokens of the vocabulary, by gathered rows of the weight.

A row n has a set S_n of tokens, its own token y among them. An entry m is one pair (n, v) with v in S_n. For each entry

    z_m  = softcap(logit_scale (x_n . w_v + b_v)) / T_n         one dot product
    c_m  = dL/dscore_nv                                         as in `torch_tiles.dlogits`, from z_m and the row's statistics

and sums over the vocabulary are sums over the entries of a row:

    dx_n = sum_{m of n} c_m w_v        dw_v = sum_{m of v} c_m x_n        db_v = sum_{m of v} c_m

The first sum takes the entries row by row, the others token by token, after one sort. All have a fixed order, so results have
the same bits every time. Nothing is rounded before it is summed. The cost is three times the reading of the gathered rows, and
the writing of what is not zero of dW; nothing of the size [K, V] exists.

`tiles` is the backend to run on: `torch_tiles` or `triton_tiles`.
"""

from __future__ import annotations

import torch

from ..tiles.backend import TileOps
from ..tiles.logits import to_logits_
from ..tiles.row_statistics import target_gradient
from ..tiles.structures import (
    Asked,
    Entries,
    FurtherPartials,
    Gradients,
    Head,
    Incoming,
    Partials,
    RowStatistics,
    SetPartials,
    Wanted,
    largest_kept,
)
from .rows import Rows


def gathered_partials(
    tiles: TileOps, rows: Rows, head: Head, entries: Entries, asked: Asked, target: torch.Tensor | None
) -> SetPartials:
    """The partial statistics of every row over its entries, and the logits of the entries.

    target: z_y (K,), which a rank needs to count the logits above it, since its columns may not have the token.
    """
    place, column = _places(rows, entries), entries.column
    z = tiles.gathered_dots(rows.hidden, place, head.weight, column)
    if head.lora_weight is not None:
        z += tiles.gathered_dots(rows.lora_hidden, place, head.lora_weight, column)
    if head.bias is not None:
        z += head.bias[column]
    slope = to_logits_(z, head, None if rows.temperature is None else rows.temperature[entries.row], want_slope=True)
    return SetPartials(_partials(rows, entries._replace(z=z), asked, target), z, slope)


def _places(rows: Rows, entries: Entries) -> torch.Tensor:
    """Where the hidden states of the entries are, (M,)."""
    return entries.row if rows.indices is None else rows.indices[entries.row]


def _edges(entries: Entries, count: int) -> torch.Tensor:
    """(K + 1,): the first entry of each row, and their number."""
    return torch.searchsorted(entries.row, torch.arange(count + 1, device=entries.row.device))


def _partials(rows: Rows, entries: Entries, asked: Asked, target: torch.Tensor | None) -> Partials:
    z, row, count = entries.z, entries.row, len(rows.tokens)
    edges = _edges(entries, count)

    def over_rows(values: torch.Tensor, reduce: str = "sum", initial: float = 0) -> torch.Tensor:
        return torch.segment_reduce(values, reduce, offsets=edges, axis=0, initial=initial)

    is_target = entries.column == rows.tokens[row]
    # the last place takes the logits of all other tokens: to leave them out, the host would have to wait
    own = z.new_full((count + 1,), torch.nan)
    own[torch.where(is_target, row, count)] = z
    own = own[:count].clone()  # results of an operator share no memory
    others = torch.where(is_target, -torch.inf, z)
    maximum = over_rows(others, "max", -torch.inf)
    pivot = torch.where(maximum == -torch.inf, 0, maximum)
    shifted = others - pivot[row]
    e = shifted.exp()
    total = over_rows(e)
    squares = above = None
    if asked.squares:
        squares = torch.where(total == 0, 0, over_rows(e * e).log() - 2 * total.log())
    if asked.rank:
        known = own if target is None else target
        above = over_rows((others > known[row]).to(z.dtype)).long()
    weighted = over_rows(torch.where(e == 0, 0, shifted * e)) if asked.entropy else None
    values, ids = _largest(entries, edges, largest_kept(asked))
    further = FurtherPartials(values, ids, over_rows(z) if asked.mean else None, squares, above)
    # (a maximum over a row of entries may drop a NaN, which reaches the sum)
    return Partials(maximum, total, weighted, own, further)


def _largest(entries: Entries, edges: torch.Tensor, count: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The `count` largest logits of each row (K, count) in descending order, and their columns; -inf where there are fewer.

    Of equal logits the smallest column comes first.
    """
    if not count:
        return None, None
    z, row, column, rows = entries.z, entries.row, entries.column, len(edges) - 1
    order = column.argsort(stable=True)
    order = order[z[order].argsort(descending=True, stable=True)]
    order = order[row[order].argsort(stable=True)]
    place = torch.arange(len(z), device=z.device) - edges[row[order]]
    at = torch.where(place < count, row[order] * count + place, rows * count)  # the last place takes all others, as in `own`
    values, ids = z.new_full((rows * count + 1,), -torch.inf), column.new_zeros(rows * count + 1)
    values[at], ids[at] = z[order], column[order]
    return values[:-1].clone().view(rows, count), ids[:-1].clone().view(rows, count)


def gathered_backward(
    tiles: TileOps,
    rows: Rows,
    head: Head,
    entries: Entries,
    statistics: RowStatistics,
    incoming: Incoming,
    wanted: Wanted,
    partial: bool,
    *,
    weight_grad: torch.Tensor | None,
) -> Gradients:
    """Gradients for incoming gradients (K,) of the rows' results; `sum_logits` is that of the sum over the set.

    partial: other ranks hold other columns, so that dX is that of the K rows alone and unrounded, to be summed over ranks.
    weight_grad (V, H) in the accumulation dtype: dW is added to it, and not returned.
    """
    factor, place = _factors(rows, head, entries, statistics, incoming), _places(rows, entries)

    def of_rows(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        like = factor.new_zeros(len(rows.tokens), x.shape[1]) if partial else x
        out = torch.zeros_like(like, memory_format=torch.contiguous_format)
        tiles.run_sums(factor, entries.row if partial else place, table, entries.column, out, False)
        return out

    columns = entries.column.sort(stable=True)
    sorted_factor, sorted_place = factor[columns.indices], place[columns.indices]

    def of_columns(x: torch.Tensor, places: torch.Tensor, out: torch.Tensor, add: bool = False) -> torch.Tensor:
        tiles.run_sums(sorted_factor, columns.values, x, places, out, add)
        return out

    def zeros(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)

    dweight = dbias = None
    if wanted.weight:
        out = zeros(head.weight) if weight_grad is None else weight_grad
        dweight = of_columns(rows.hidden, sorted_place, out, add=weight_grad is not None)
    if wanted.bias:  # sums of the factors times 1
        sums = of_columns(factor.new_ones(1, 1), torch.zeros_like(columns.values), factor.new_zeros(len(head.bias), 1))
        dbias = sums[:, 0].to(head.bias.dtype)
    return Gradients(
        of_rows(rows.hidden, head.weight) if wanted.hidden else None,
        of_rows(rows.lora_hidden, head.lora_weight) if wanted.lora_hidden else None,
        None if weight_grad is not None else dweight,
        of_columns(rows.lora_hidden, sorted_place, zeros(head.lora_weight)) if wanted.lora_weight else None,
        dbias,
    )


def _factors(rows: Rows, head: Head, entries: Entries, statistics: RowStatistics, incoming: Incoming) -> torch.Tensor:
    """c (M,); the formulas are those of `torch_tiles.dlogits`."""
    row, (g, h, ell, of_sum) = entries.row, incoming
    log_p = entries.z - statistics.logsumexp[row]
    p = log_p.exp()
    d = -(g if ell is None else g - ell)[row] * p
    if h is not None:
        d = d - h[row] * torch.where(p == 0, 0, p * (log_p + statistics.entropy[row]))
    d = torch.where(entries.column == rows.tokens[row], target_gradient(statistics, g, h, ell)[row], d)
    if of_sum is not None:
        d = d + of_sum[row]
    d = d * (head.logit_scale if rows.temperature is None else head.logit_scale / rows.temperature[row])
    return d if entries.slope is None else d * entries.slope
