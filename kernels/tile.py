"""The code that all kernels share which multiply matrices: one tile of logits, from operands to z, and rounding of results.

    score = x . w_v + l . B_v + b_v                           fp32 accumulators, operands in their own dtype
    z     = score * scale_n                                   scale_n = logit_scale / T_n
    z     = tanh(score * inner) * scale_n                     with a softcap c: inner = logit_scale / c, scale_n = c / T_n

l . B_v is the update of a LoRA adapter, with l = scale A x in fp32: a second loop over a few columns, after that over x and w.

In both cases d z / d score = scale_n * (1, or inner * slope with a softcap), with slope = 1 - tanh^2.

Everything after `product_tile` is elementwise on fp32 registers; logits are never rounded to 16 bits.
"""

import triton
import triton.language as tl

from . import limits

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EXP_IS_ZERO = tl.constexpr(limits.EXP_IS_ZERO)
LOWEST_ANCHOR = tl.constexpr(limits.LOWEST_ANCHOR)

# Under TRITON_INTERPRET=1 kernels run on CPU tensors in numpy, which has no bf16: there tl.dot would multiply bit patterns and
# casts to bf16 would truncate. So bf16 operands are widened (exactly) before they are multiplied; `round_to` rounds results.
INTERPRETED = triton.knobs.runtime.interpret
# Rows per program of the kernels that work row by row. The interpreter's time depends on the number of programs.
ROWS_PER_PROGRAM = 128 if INTERPRETED else 4
# row tiles that run side by side and so share their columns of W in the L2 cache
_ROW_TILES_SIDE_BY_SIDE = tl.constexpr(8)


@triton.jit
def tile_position(pid, row_tiles, column_tiles):
    """(row tile, column tile) of a program of a 1-D grid. Neighbours share operands, which they then read from the cache."""
    width = _ROW_TILES_SIDE_BY_SIDE * column_tiles
    first = (pid // width) * _ROW_TILES_SIDE_BY_SIDE
    rows = tl.minimum(row_tiles - first, _ROW_TILES_SIDE_BY_SIDE)
    return first + (pid % width) % rows, (pid % width) // rows


@triton.jit
def product_tile(X, W, row_start, column_start, rows, head, TILE: tl.constexpr):
    """x @ w^T of one tile, (ROWS, COLUMNS) fp32, with LoRA's update. X (C, H) and W (V, H) are pointers or descriptors.

    Rows and columns beyond the edge hold arbitrary numbers, which the caller masks.
    """
    ROWS: tl.constexpr = TILE.ROWS
    COLUMNS: tl.constexpr = TILE.COLUMNS
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    depth = tl.arange(0, TILE.DEPTH)
    if not TILE.DESCRIPTORS:
        # indices beyond the edge wrap around, so that the loop needs no masks
        r = (row_start + tl.arange(0, TILE.ROWS)) % rows.C
        v = (column_start + tl.arange(0, TILE.COLUMNS)) % head.V
        x_pointers = X + r.to(tl.int64)[:, None] * rows.stride_x + depth[None, :]
        w_pointers = W + v.to(tl.int64)[:, None] * head.stride_w + depth.to(tl.int64)[None, :] * head.stride_h
    for k in range(0, tl.cdiv(head.H, TILE.DEPTH)):
        if TILE.DESCRIPTORS:
            x = X.load([row_start, k * TILE.DEPTH])
            w = W.load([column_start, k * TILE.DEPTH])
        elif TILE.EVEN_H:
            x = tl.load(x_pointers)
            w = tl.load(w_pointers)
        else:
            inside = depth[None, :] < head.H - k * TILE.DEPTH
            x = tl.load(x_pointers, mask=inside, other=0.0)
            w = tl.load(w_pointers, mask=inside, other=0.0)
        if TILE.WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
        if not TILE.DESCRIPTORS:
            x_pointers += TILE.DEPTH
            w_pointers += TILE.DEPTH * head.stride_h
    if head.B is not None:
        acc = add_lora(acc, row_start, column_start, rows, head, TILE)
    return acc


@triton.jit
def tile_of(place, X, W, rows, head, TILE: tl.constexpr):
    """The tile at a place among all tiles.

    Returns x @ w^T, the rows, whether each is in the chunk, the index of the column tile, and the number of column tiles.
    """
    column_tiles = tl.cdiv(head.V, TILE.COLUMNS)
    row_tile, column_tile = tile_position(place, tl.cdiv(rows.C, TILE.ROWS), column_tiles)
    score = product_tile(X, W, row_tile * TILE.ROWS, column_tile * TILE.COLUMNS, rows, head, TILE)
    r = row_tile * TILE.ROWS + tl.arange(0, TILE.ROWS)
    return score, r, r < rows.C, column_tile, column_tiles


@triton.jit
def add_lora(score, row_start, column_start, rows, head, TILE: tl.constexpr):
    """score + l @ B^T, as one more loop over a few columns."""
    place = tl.arange(0, TILE.RANK)
    r = (row_start + tl.arange(0, TILE.ROWS)) % rows.C
    v = (column_start + tl.arange(0, TILE.COLUMNS)) % head.V
    l_pointers = rows.L + r.to(tl.int64)[:, None] * rows.stride_l + place[None, :]
    b_pointers = head.B + v.to(tl.int64)[:, None] * head.stride_b + place[None, :]
    for start in range(0, head.rank, TILE.RANK):
        inside = (place < head.rank - start)[None, :]
        low_rank = tl.load(l_pointers + start, mask=inside, other=0.0)
        b = tl.load(b_pointers + start, mask=inside, other=0.0)
        if TILE.WIDEN:
            low_rank, b = low_rank.to(tl.float32), b.to(tl.float32)
        score = tl.dot(low_rank, b.T, score, input_precision="ieee")
    return score


@triton.jit
def row_scale(rows, r, inside):
    """scale_n of the rows r, (ROWS,)."""
    if rows.SCALE is not None:
        scale = tl.load(rows.SCALE + r, mask=inside, other=0.0)
    else:
        scale = tl.where(inside, rows.scale, 0.0)
    return scale


@triton.jit
def log_anchor(old):
    """clamp(old, -60, 0); NaN stays."""
    a = tl.maximum(old, LOWEST_ANCHOR, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_token(rows, r, inside):
    """The tokens of the rows r, -1 for a row beyond the edge."""
    return tl.load(rows.TOKENS + r, mask=inside, other=-1)


@triton.jit
def load_fp32(P, r, keep):
    """P[r] in fp32, 0 where not `keep`."""
    return tl.load(P + r, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def halves(tile, WARP_GROUPS: tl.constexpr):
    """Splits a tile (ROWS, COLUMNS) into two parts. Its columns are WARP_GROUPS runs, and each part has one half of every run.

    Epilogues work through a tile part by part, so that their temporaries are as small as a part: a thread holds 128
    accumulators of a 128 x 256 tile, and has 255 registers. WARP_GROUPS is the number of warp groups that share a row; each of
    them gets its share of each part.
    """
    half: tl.constexpr = tile.shape[1] // (2 * WARP_GROUPS)
    left, right = tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], WARP_GROUPS, 2, half)), (0, 1, 3, 2)))
    shape: tl.constexpr = (tile.shape[0], WARP_GROUPS * half)
    return tl.reshape(left, shape), tl.reshape(right, shape)


@triton.jit
def part_columns(start, WIDTH: tl.constexpr, RUN: tl.constexpr, WARP_GROUPS: tl.constexpr):
    """The columns (WIDTH,) of a part that begins at `start`: a WARP_GROUPS-th from each of WARP_GROUPS runs of RUN columns."""
    lane = tl.arange(0, WIDTH)
    share: tl.constexpr = WIDTH // WARP_GROUPS
    return start + (lane // share) * RUN + lane % share


@triton.jit
def others_only(z, columns, token, V):
    """z with -inf in the target's column and beyond the vocabulary."""
    return tl.where((columns[None, :] == token[:, None]) | (columns >= V)[None, :], float("-inf"), z)


@triton.jit
def in_sets(rows, r, columns, V):
    """(ROWS, COLUMNS) bool: whether a column belongs to the softmax of a row; False beyond the edges. rows: with SETS.

    columns: in runs of 8 that begin at multiples of 8, so that one load serves a run.
    """
    runs: tl.constexpr = columns.shape[0] // 8
    first = tl.min(tl.reshape(columns, (runs, 8)), 1)
    inside = (r < rows.C)[:, None] & (first < V)[None, :]
    places = rows.SETS + r.to(tl.int64)[:, None] * rows.stride_s + (first // 8)[None, :]
    byte = tl.load(places, mask=inside, other=0).to(tl.int32)
    bits = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return (tl.reshape(bits, (r.shape[0], runs * 8)) != 0) & (columns < V)[None, :]


@triton.jit
def logits(score, scale, inner):
    """score -> (z, slope of the softcap). Without a softcap, inner None, the slope is 1."""
    if inner is not None:
        tanh, slope = softcap_tanh(score * inner)
        z = tanh * scale
    else:
        z = score * scale
        slope = 1.0
    return z, slope


@triton.jit
def softcap_tanh(x):
    """tanh x and 1 - tanh^2 x without cancellation: with q = exp(-2 |x|),

        tanh = sign(x) (1 - q) / (1 + q)        1 - tanh^2 = 4 q / (1 + q)^2

    1 - q cancels at small |x|; there tanh is its Taylor polynomial, whose first neglected term is below 5e-8 of it.
    """
    size = tl.abs(x)
    q = tl.exp2(size * (-2.0 * LOG2E))
    slope = 4.0 * q / ((1.0 + q) * (1.0 + q))
    ratio = (1.0 - q) / (1.0 + q)
    s = x * x
    series = size * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    tanh = tl.where(size < 0.3, series, ratio)
    return tl.where(x < 0, -tanh, tanh), slope


@triton.jit
def add_bias(score, head, columns):
    """score (ROWS, COLUMNS) + b."""
    if head.BIAS is not None:
        score += tl.load(head.BIAS + columns, mask=columns < head.V, other=0.0).to(tl.float32)[None, :]
    return score


@triton.jit
def log_sigmoid(x):
    """log(1 / (1 + exp(-x))) = min(x, 0) - log1p(exp(-|x|)), exact to a few ulp for every x; NaN for NaN."""
    y = tl.exp(-tl.abs(x))
    # log1p by Kahan's correction: the rounding of 1 + y changes the numerator and the denominator alike
    u = 1.0 + y
    rounded = u - 1.0
    log1p = tl.where(rounded == 0, y, tl.log(u) * (y / tl.where(rounded == 0, 1.0, rounded)))
    return tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - log1p


@triton.jit
def entropy_from_log_odds(t, others):
    """H = p softplus(t) + (1 - p) (Ho + softplus(-t)), p = sigmoid(-t). At an infinite t the share of probability 0 is 0."""
    log_p = tl.where(t == float("inf"), 0.0, log_sigmoid(-t))
    log_1mp = tl.where(t == float("-inf"), 0.0, log_sigmoid(t))
    target_share = tl.where(t == float("inf"), 0.0, tl.exp(log_p) * -log_p)
    others_share = tl.where(t == float("-inf"), 0.0, tl.exp(log_1mp) * (others - log_1mp))
    return target_share + others_share


@triton.jit
def row_sums(P, rows, inside, count, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of P (rows, count) along its rows, (ROWS,), in an order that depends on nothing but `count`."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, count, BLOCK):
        mask = inside[:, None] & (start + offsets < count)[None, :]
        total += tl.load(P + rows[:, None] * count + (start + offsets)[None, :], mask=mask, other=0.0)
    return tl.sum(total, 1)


@triton.jit
def round_to(x, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """fp32 -> dtype, to nearest even. EMULATE: by integers, for bf16 in the interpreter; NaN stays NaN, and inf stays inf."""
    if EMULATE and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        special = (bits & 0x7F800000) == 0x7F800000
        quiet = (bits >> 16) | tl.where((bits & 0x7FFFFF) != 0, 0x40, 0)
        return tl.where(special, quiet, nearest).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
