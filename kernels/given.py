"""Kernel 6: log-probabilities of ready logits, for callers who hold them: kernels 4 and 5 with a load in the product's place.

    z_nv = logits_nv scale_n                       read in their dtype, widened in registers; no fp32 copy of them exists

Rows that are masked count as zeros, whatever they hold, and their gradient is exactly 0. A split of a row is a fixed number of
columns, so that a row's bits do not depend on the batch.
"""

import torch
import triton
import triton.language as tl

from .dlogits import row_terms, store_gradient
from .logits import INTERPRETED
from .logsumexp import combine, fold, store_partials

_ROWS = 64 if INTERPRETED else 4
_COLUMNS = 1024
_TILES_PER_SPLIT = 16


@triton.jit
def _load(LOGITS, KEEP, rows, start, C, V, stride_z, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of logits, fp32; zeros where the row is masked or out of range."""
    columns = start + tl.arange(0, COLUMNS)
    inside = rows < C
    keep = tl.load(KEEP + rows, mask=inside, other=0) != 0
    mask = (inside & keep)[:, None] & (columns < V)[None, :]
    return tl.load(LOGITS + rows[:, None] * stride_z + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def given_logsumexp_kernel(
    LOGITS,  # (C, V)
    KEEP,  # (C,) uint8
    TOKENS,  # (C,)
    SCALE,  # (C,)
    M,  # (C, splits) out
    S,  # (C, splits) out
    Q,  # (C, splits) out, or None
    TARGET,  # (C,) out: z_y, NaN for a token outside the vocabulary
    C,
    V,
    stride_z,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    splits = tl.cdiv(V, COLUMNS * TILES)
    rows = (tl.program_id(0) // splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(0) % splits
    in_chunk = rows < C
    token = tl.load(TOKENS + rows, mask=in_chunk, other=-1).to(tl.int32)
    scale = tl.load(SCALE + rows, mask=in_chunk, other=0.0)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    q = tl.zeros((ROWS,), tl.float32)
    if split == 0:
        column = tl.load(TOKENS + rows, mask=in_chunk, other=-1).to(tl.int64)  # 32 bits would make a far one near
        inside = (column >= 0) & (column < V)
        keep = tl.load(KEEP + rows, mask=in_chunk, other=0) != 0
        z_y = tl.load(LOGITS + rows * stride_z + column, mask=in_chunk & keep & inside, other=0.0).to(tl.float32) * scale
        tl.store(TARGET + rows, tl.where(inside, z_y, float("nan")), mask=in_chunk)
    for tile in range(0, tl.minimum(TILES, tl.cdiv(V, COLUMNS) - split * TILES)):
        start = (split * TILES + tile) * COLUMNS
        z = _load(LOGITS, KEEP, rows, start, C, V, stride_z, ROWS, COLUMNS)
        m, s, q = fold(z, start, m, s, q, V, token, scale, None, 1.0, Q is not None, False, 1, COLUMNS, 1)
    store_partials(M, S, Q, rows * splits + split, in_chunk, m, s, q)


@triton.jit
def given_dlogits_kernel(
    LOGITS,  # (C, V)
    KEEP,  # (C,) uint8
    TOKENS,  # (C,)
    SCALE,  # (C,)
    LOGP,  # (C,), as the next five
    T,
    LOGSUMEXP,
    G,
    H_GRAD,  # or None
    ENTROPY,  # or None
    OTHERS,  # or None
    D,  # (C, V) out
    C,
    V,
    stride_z,
    stride_d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tiles = tl.cdiv(V, COLUMNS)
    rows = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = (tl.program_id(0) % tiles) * COLUMNS
    in_chunk = rows < C
    token = tl.load(TOKENS + rows, mask=in_chunk, other=-1).to(tl.int32)
    scale = tl.load(SCALE + rows, mask=in_chunk, other=0.0)
    g, h, entropy, at_target = row_terms(rows, in_chunk, scale, LOGP, T, G, H_GRAD, ENTROPY, OTHERS)
    z = _load(LOGITS, KEEP, rows, start, C, V, stride_z, ROWS, COLUMNS)
    lse = tl.load(LOGSUMEXP + rows, mask=in_chunk, other=0.0)
    store_gradient(
        z, start, rows, C, V, token, scale, lse, g, h, at_target, entropy, None, D, None, 1.0, stride_d,
        H_GRAD is not None, False, 1, COLUMNS, 1, WIDEN,
    )  # fmt: skip


def given_logsumexp(
    logits: torch.Tensor,  # (C, V), rows contiguous
    keep: torch.Tensor,  # (C,) bool
    tokens: torch.Tensor,  # (C,)
    scale: torch.Tensor,  # (C,) fp32
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """m, s, q (None unless `entropy`) of the other columns, as `logsumexp` returns them, and z_y, NaN for a token outside."""
    (count, vocab), splits = logits.shape, triton.cdiv(logits.shape[1], _COLUMNS * _TILES_PER_SPLIT)
    partials = {name: scale.new_empty(count, splits) for name in (("m", "s", "q") if entropy else ("m", "s"))}
    target = torch.empty_like(scale)
    if count:
        given_logsumexp_kernel[(triton.cdiv(count, _ROWS) * splits,)](
            logits, keep.view(torch.uint8), tokens, scale, *(partials.get(name) for name in ("m", "s", "q")), target,
            count, vocab, logits.stride(0), ROWS=_ROWS, COLUMNS=_COLUMNS, TILES=_TILES_PER_SPLIT,
        )  # fmt: skip
    return *combine(partials), target


def given_dlogits(
    logits: torch.Tensor,  # (C, V), rows contiguous
    keep: torch.Tensor,  # (C,) bool
    tokens: torch.Tensor,  # (C,)
    scale: torch.Tensor,  # (C,) fp32, as the next four; incoming gradients are 0 where keep is False
    logprobs: torch.Tensor,
    t: torch.Tensor,
    logsumexp: torch.Tensor,
    grad_logprobs: torch.Tensor,
    for_entropy: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,  # incoming gradient, H, Ho: (C,) each
    out: torch.Tensor,  # (C, V)
) -> None:
    h, entropy, others = (None, None, None) if for_entropy is None else for_entropy
    count, vocab = logits.shape
    if count:
        given_dlogits_kernel[(triton.cdiv(count, _ROWS) * triton.cdiv(vocab, _COLUMNS),)](
            logits, keep.view(torch.uint8), tokens, scale, logprobs, t, logsumexp, grad_logprobs, h, entropy, others, out,
            count, vocab, logits.stride(0), out.stride(0), ROWS=_ROWS, COLUMNS=_COLUMNS, WIDEN=INTERPRETED,
        )  # fmt: skip
