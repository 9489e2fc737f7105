"""The two-pass schedule: any loss of the log-probabilities, four products, almost no memory.

    forward    per token chunk: one online pass over the vocabulary                          product 1
    backward   per vocabulary tile, per token chunk:
                   D = dL/dlogits of the tile, from recomputed logits                        product 1 again
                   dX[chunk] += D @ W[tile]                                                  product 2
                   dW[tile]  += D^T @ X[chunk],  db[tile] += sum of D                        product 3

The vocabulary is the outer loop of the backward, so that dW is summed in one fp32 tile and rounded once, with no [V, H] copy;
dX is summed in fp32 [K, H] and rounded once. Every sum has a fixed order.
"""

from __future__ import annotations

import torch

from . import tile_ops
from .lm_head import LMHead
from .products import accumulation_dtype, operand_dtype, product
from .rows import Gradients, Rows, Wanted
from .tile_ops import RowStatistics

# Chunks longer than this many tiles gain nothing: the products are at full speed and the chunk has left the cache.
_LONGEST_CHUNK = 8


def chunk_rows(head: LMHead, workspace: int, entropy: bool) -> int:
    """How many tokens a chunk may have so that everything the two passes allocate fits `workspace` bytes.

    Raises ValueError where not even one tile fits.
    """
    rows, columns = tile_ops.tile_shape(head)
    columns = min(columns, head.vocab_size)
    dtype, device = head.weight.dtype, head.weight.device
    wide, narrow = accumulation_dtype(dtype).itemsize, operand_dtype(dtype, device).itemsize
    # a tile of weights and of its gradient; of logits, with the temporaries of the entropy and of the softcap's slope
    tiles = 1 + 2 * entropy + (3 if head.softcap is not None else 0)
    fixed = columns * head.hidden_size * (wide + narrow) + tiles * rows * columns * wide
    # hidden states (gathered, widened), a row of dlogits, and a score of per-row numbers
    per_row = 2 * head.hidden_size * narrow + columns * narrow + 20 * wide
    fitting = (workspace - fixed) // per_row // rows
    if fitting < 1:
        raise ValueError(
            f"workspace={workspace} bytes is too small: one tile of a ({head.vocab_size}, {head.hidden_size}) {dtype} head "
            f"on {device.type} needs {fixed + rows * per_row}"
        )
    return min(fitting, _LONGEST_CHUNK) * rows


def two_pass_forward(rows: Rows, head: LMHead, entropy: bool, workspace: int) -> RowStatistics:
    """The statistics of every row: RowStatistics of (K,) vectors."""
    count, longest, block = len(rows.tokens), chunk_rows(head, workspace, entropy), tile_ops.tile_shape(head).rows
    parts = []
    for start in range(0, count, longest):
        stop = min(start + longest, count)
        chunk = rows.chunk(start, stop, multiple=block)
        statistics = tile_ops.online_logsumexp(chunk, head, entropy)
        parts.append(RowStatistics(*(s[: stop - start] for s in statistics)))
    if not parts:
        dtype = accumulation_dtype(head.weight.dtype)
        return RowStatistics(*(head.weight.new_empty(0, dtype=dtype) for _ in RowStatistics._fields))
    return RowStatistics(*(torch.cat(s) for s in zip(*parts, strict=True)))


def two_pass_backward(
    rows: Rows,
    head: LMHead,
    statistics: RowStatistics,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    wanted: Wanted,
    workspace: int,
) -> Gradients:
    """Gradients for incoming gradients (K,) of the log-probabilities and entropies."""
    count, weight = len(rows.tokens), head.weight
    longest = chunk_rows(head, workspace, grad_entropy is not None)
    columns = min(tile_ops.tile_shape(head).columns, head.vocab_size)
    wide, narrow = accumulation_dtype(weight.dtype), operand_dtype(weight.dtype, weight.device)
    as_bf16 = weight.dtype == torch.bfloat16
    device = weight.device

    dhidden = torch.zeros(count if wanted.hidden else 0, head.hidden_size, dtype=wide, device=device)
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if wanted.weight else weight.new_empty(0)
    dbias = torch.zeros(head.vocab_size if wanted.bias else 0, dtype=wide, device=device)
    buffer = tile_ops.weight_buffer(head)
    dlogits = torch.empty(min(longest, count) * columns, dtype=narrow, device=device)
    for v in range(0, head.vocab_size if count else 0, columns):
        width = min(columns, head.vocab_size - v)
        w = tile_ops.weight_tile(head, v, v + width, buffer)
        dw = dweight[v : v + width] if wanted.weight else None
        if dw is not None and dw.dtype != wide:
            dw = torch.empty(width, head.hidden_size, dtype=wide, device=device)
        for start in range(0, count, longest):
            part = slice(start, min(start + longest, count))
            chunk = rows.chunk(part.start, part.stop)
            d = dlogits[: len(chunk.tokens) * width].view(-1, width)
            part_statistics = RowStatistics(*(s[part] for s in statistics))
            h = None if grad_entropy is None else grad_entropy[part]
            tile_ops.dlogits(chunk, head, w, v, part_statistics, grad_logprobs[part], h, d)
            if wanted.hidden:
                product(dhidden[part], d, w, v > 0, as_bf16)
            if dw is not None:
                product(dw, d.T, chunk.hidden, start > 0, as_bf16)
            if wanted.bias:
                dbias[v : v + width] += d.sum(0, dtype=wide)
        if dw is not None and dw.dtype != weight.dtype:
            dweight[v : v + width] = dw
    return Gradients(_place(dhidden, rows, longest, wanted.hidden), dweight, dbias.to(weight.dtype))


def _place(dhidden: torch.Tensor, rows: Rows, longest: int, wanted: bool) -> torch.Tensor:
    """Rounds dX (K, H) once, into (N, H) with zeros where rows were not computed; chunk by chunk, to need no third copy."""
    hidden = rows.hidden
    if not wanted:
        return hidden.new_empty(0)
    if rows.indices is None and dhidden.dtype == hidden.dtype:
        return dhidden
    out = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    for start in range(0, len(dhidden), longest):
        part = slice(start, start + longest)
        rounded = dhidden[part].to(hidden.dtype)
        if rows.indices is None:
            out[part] = rounded
        else:
            out.index_copy_(0, rows.indices[part], rounded)
    return out
