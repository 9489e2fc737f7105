"""Products over chosen columns alone, in PyTorch: dot products with gathered rows of the weight, weighted sums of such rows.

An entry is one token of one row's set. Nothing here has the size of the vocabulary. Sums run in the order of the entries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .products import accumulation_dtype

# Entries that are taken at a time: gathered rows of a common hidden size stay in a CPU's cache. For sums it is about that many.
_ENTRIES, _SUMMED = 512, 8192


def gathered_dots(x: torch.Tensor, place: torch.Tensor, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[place_m] . table[index_m] for each entry m, (M,) in the accumulation dtype. x (N, H), table (V, H)."""
    dtype = accumulation_dtype(table.dtype)
    out = torch.empty(len(index), dtype=dtype, device=x.device)
    step = _ENTRIES if x.device.type == "cpu" else _SUMMED
    for start in range(0, len(index), step):
        span = slice(start, start + step)
        torch.sum(x[place[span]].to(dtype) * table[index[span]].to(dtype), 1, out=out[span])
    return out


def run_sums(
    factor: torch.Tensor, keys: torch.Tensor, source: torch.Tensor, index: torch.Tensor, out: torch.Tensor, add: bool
) -> None:
    """out[key] = sum_m factor_m source[index_m] over the run of entries m with this key; added to out[key] with `add`.

    keys (M,) ascend. Rows of out (T, H) whose key does not occur stay as they are. Each sum is formed in the dtype of factor,
    and rounded once.
    """
    present, counts = torch.unique_consecutive(keys, return_counts=True)
    edges = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    step = max(1, _SUMMED * len(present) // max(len(keys), 1))  # runs
    firsts = edges[::step].tolist()
    for number, start in enumerate(range(0, len(present), step)):
        rows, first = present[start : start + step], firsts[number]
        entries = slice(first, firsts[number + 1] if number + 1 < len(firsts) else None)
        sums = _bags(factor[entries], edges[start : start + len(rows)] - first, source, index[entries])
        out.index_copy_(0, rows, (sums + out[rows] if add else sums).to(out.dtype))


def _bags(factor: torch.Tensor, first: torch.Tensor, source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """sum_m factor_m source[index_m] of each run, which begins at entry `first`; (runs, H) in the dtype of factor."""
    # a bag would round the factors to the dtype of the source; and of columns in memory it would add in another order
    if source.dtype != factor.dtype or source.stride(1) != 1:
        rows, index = index.unique(return_inverse=True)
        source = source[rows].to(factor.dtype)
    return F.embedding_bag(index, source, first, mode="sum", per_sample_weights=factor)
