"""The arguments of launchers and kernels: structures that are built once and passed whole.

A launcher takes `Operands`: the tensors of a chunk and of a head. A kernel gets `Rows`, `Head` and a `Tile`, and hands them on
to its device functions. A field of None is a constant to the compiler, so `if head.BIAS is not None` costs nothing. Tensor
descriptors (X, W) cannot be inside a structure: Triton looks for them among a kernel's own parameters.

Names in capitals are pointers or constants.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .blocks import Blocks
from .tile import INTERPRETED


class Operands(NamedTuple):
    """The first argument of every launcher that computes logits: C rows of hidden states, and a head of V rows."""

    hidden: torch.Tensor  # (C, H) with contiguous rows
    weight: torch.Tensor  # (V, H)
    lora: tuple[torch.Tensor, torch.Tensor] | None  # l (C, rank) fp32 with contiguous rows, B (V, rank)
    bias: torch.Tensor | None  # (V,)
    tokens: torch.Tensor  # (C,); anything outside [0, V) has no column here
    scale: torch.Tensor | float  # scale_n in `tile`: (C,) fp32, or one number for all rows
    inner: float | None  # as in `tile`; None without a softcap
    sets: torch.Tensor | None = None  # (C, ceil(V / 8)) uint8: bit v % 8 of byte v // 8 says whether column v counts; None: all

    def vector(self) -> torch.Tensor:
        """An empty (C,) fp32."""
        return self.hidden.new_empty(self.tokens.shape[0], dtype=torch.float32)

    def partials(self, tiles: int) -> torch.Tensor:
        """An empty (C, tiles) fp32."""
        return self.hidden.new_empty(self.tokens.shape[0], tiles, dtype=torch.float32)


class Rows(NamedTuple):
    TOKENS: Any  # (C,)
    SCALE: Any  # (C,), or None where `scale` serves all rows
    scale: Any
    L: Any  # l of LoRA, (C, rank), or None
    stride_x: Any
    stride_l: Any
    C: Any
    SETS: Any = None  # bytes (C, ceil(V / 8)), or None
    stride_s: Any = None


class Head(NamedTuple):
    B: Any  # B of LoRA, (V, rank), or None
    BIAS: Any  # (V,) or None
    inner: Any  # None without a softcap
    stride_w: Any
    stride_h: Any  # of W along H; 1 unless W is a transposed view
    stride_b: Any
    V: Any
    H: Any
    rank: Any


class Tile(NamedTuple):
    """A program's tile as compile-time constants; see `blocks.Blocks`."""

    ROWS: int
    COLUMNS: int
    DEPTH: int
    PARTS: int
    WARP_GROUPS: int
    EVEN_H: bool  # DEPTH divides H
    EVEN_V: bool  # COLUMNS divides V
    DESCRIPTORS: bool
    WIDEN: bool
    RANK: int
    PERSISTENT: bool  # programs take one tile after the other
    STORES: bool  # E is stored through a descriptor


def is_aligned(x: torch.Tensor) -> bool:
    """Whether a descriptor can stand for x (rows, columns)."""
    return x.data_ptr() % 16 == 0 and x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0


def tile_arguments(p: Operands, blocks: Blocks, stores: bool = False) -> tuple[Any, Any, Rows, Head, Tile]:
    """The first arguments of every kernel that multiplies matrices, and the tile, its last argument."""
    x, w, depth = p.hidden, p.weight, p.hidden.shape[1]
    assert x.stride(1) == 1 or depth == 1, "rows of hidden must be contiguous"
    descriptors = blocks.descriptors and is_aligned(x) and is_aligned(w)
    low_rank, b = (None, None) if p.lora is None else _lora_operands(*p.lora, x.dtype)
    rank_step = 16 if b is None or x.dtype == torch.float32 else min(32, max(16, triton.next_power_of_2(b.shape[1])))
    even_h, even_v = depth % blocks.depth == 0, w.shape[0] % blocks.columns == 0
    tile = Tile(
        blocks.rows, blocks.columns, blocks.depth, blocks.parts, blocks.warp_groups, even_h, even_v, descriptors,
        INTERPRETED, rank_step, blocks.persistent, stores,
    )  # fmt: skip
    rows, head = rows_of(p, low_rank), head_of(p, b)
    if descriptors:
        x = TensorDescriptor.from_tensor(x, [blocks.rows, blocks.depth])
        w = TensorDescriptor.from_tensor(w, [blocks.columns, blocks.depth])
    return x, w, rows, head, tile


def rows_of(p: Operands, low_rank: torch.Tensor | None) -> Rows:
    vector, number = (p.scale, None) if isinstance(p.scale, torch.Tensor) else (None, float(p.scale))
    stride_l = None if low_rank is None else low_rank.stride(0)
    stride_s = None if p.sets is None else p.sets.stride(0)
    return Rows(p.tokens, vector, number, low_rank, p.hidden.stride(0), stride_l, p.tokens.shape[0], p.sets, stride_s)


def head_of(p: Operands, b: torch.Tensor | None) -> Head:
    stride_b, rank = (None, None) if b is None else (b.stride(0), b.shape[1])
    inner = None if p.inner is None else float(p.inner)
    return Head(b, p.bias, inner, *p.weight.stride(), stride_b, *p.weight.shape, rank)


def _lora_operands(low_rank: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (low_rank, b.to(dtype).contiguous()) if dtype == torch.float32 else _bf16_operands(low_rank, b)


def _bf16_operands(low_rank: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """l (C, rank) fp32 and B (V, rank) as bf16 operands (C, n rank), (V, n rank) of the same product, exact to fp32.

    An fp32 operand becomes a sum of three bf16 terms. Six of the nine products of terms matter in fp32, or three where B is
    bf16 itself. Zeros pad the operands to a multiple of 16 columns, so that their rows are aligned for any rank.
    """
    x1, x2, x3 = _bf16_terms(low_rank)
    if b.dtype == torch.bfloat16:
        return _side_by_side(x1, x2, x3), _side_by_side(b, b, b)
    b1, b2, b3 = _bf16_terms(b.float())
    return _side_by_side(x1, x2, x3, x1, x2, x1), _side_by_side(b1, b1, b1, b2, b2, b3)


def _side_by_side(*terms: torch.Tensor) -> torch.Tensor:
    missing = -sum(term.shape[1] for term in terms) % 16
    zeros = [terms[0].new_zeros(len(terms[0]), missing)] if missing else []
    return torch.cat([*terms, *zeros], 1)


def _bf16_terms(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    high = x.bfloat16()
    middle = (x - high.float()).bfloat16()
    return high, middle, (x - high.float() - middle.float()).bfloat16()
