"""Products over chosen columns alone, in PyTorch: dot products with gathered rows of the weight, weighted sums of such rows.

An entry is one token of one row's set. Nothing here has the size of the vocabulary. Sums run in the order of the entries.

torch has both products as parts of its embedding bags, which read rows where they are. A bag is a weighted sum of rows. The
gradient of its factors is a dot product for each entry, by the BLAS on a CPU. The bits of that depend on the addresses of its
operands, and on the number of threads where these are long. So they begin at multiples of 64 bytes, and are cut into short
ones: a row then has the same bits wherever it stands in a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .products import accumulation_dtype

_ENTRIES = 8192  # that are taken at a time, about
_LONGEST = 2048  # numbers of a dot product; of 16384 MKL's bits were others on two threads than on one, of 8192 the same
_ALIGNMENT = 64  # bytes

_dots = torch.ops.aten._embedding_bag_per_sample_weights_backward
_SUM = 0  # the mode of a bag


def gathered_dots(x: torch.Tensor, place: torch.Tensor, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[place_m] . table[index_m] for each entry m, (M,) in the accumulation dtype. x (N, H), table (V, H)."""
    dtype, size = accumulation_dtype(table.dtype), table.shape[1]
    out = torch.zeros(len(index), dtype=dtype, device=x.device)
    for start in range(0, len(index), _ENTRIES):
        span = slice(start, start + _ENTRIES)
        left, at = _gathered(x, place[span], dtype)
        right, columns = _gathered(table, index[span], dtype) if _is_moved(table, dtype) else (table.detach(), index[span])
        for first in range(0, size, _LONGEST):
            part = slice(first, first + _LONGEST)
            out[span] += _dots(left[:, part], right[:, part], columns, columns[:0], at, _SUM)
    return out


def _is_moved(table: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether rows of the table are copied before they are multiplied."""
    pitch = table.stride(0) * table.element_size()
    aligned = pitch % _ALIGNMENT == 0 and table.data_ptr() % _ALIGNMENT == 0
    return table.dtype != dtype or table.stride(1) != 1 or not aligned


def _gathered(x: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of x (N, H) that index (M,) names, each once, in dtype and aligned; and where each of the M is among them."""
    rows, place = index.unique(return_inverse=True)
    pitch = _ALIGNMENT // dtype.itemsize
    out = x.new_empty(len(rows), -(-x.shape[1] // pitch) * pitch, dtype=dtype)[:, : x.shape[1]]
    return out.copy_(x.detach()[rows]), place


def run_sums(
    factor: torch.Tensor, keys: torch.Tensor, source: torch.Tensor, index: torch.Tensor, out: torch.Tensor, add: bool
) -> None:
    """out[key] = sum_m factor_m source[index_m] over the run of entries m with this key; added to out[key] with `add`.

    keys (M,) ascend. Rows of out (T, H) whose key does not occur stay as they are. Each sum is formed in the dtype of factor,
    and rounded once.
    """
    present, counts = torch.unique_consecutive(keys, return_counts=True)
    edges = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    step = max(1, _ENTRIES * len(present) // max(len(keys), 1))  # runs
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
        source, index = _gathered(source, index, factor.dtype)
    return F.embedding_bag(index, source.detach(), first, mode="sum", per_sample_weights=factor)
