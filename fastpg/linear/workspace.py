"""From a workspace in bytes to the rows of a chunk, with every formula of the memory that a call allocates on the way.

    bytes = bytes of the call + rows of a chunk * bytes of a row

The more rows a chunk has, the less often the weight is read. Results, and one fp32 copy of dX or dW, come on top (see the
public functions). Tests hold the formulas to the real allocations: on CPU tensors and, for GPUs, on tensors without memory.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..tiles.backend import tiles_of
from ..tiles.products import WIDENED_ROWS, accumulation_dtype, tile_columns, widened_entries
from ..tiles.structures import Asked, Head, Wanted, is_further, largest_kept, lora_rank
from ..validation import is_positive_number

_DEFAULT = {"cpu": 256 * 2**20}
_MOST_PLANS = 256  # kept, of the batch sizes that a training run has
_ONE_CHUNK = 1.1  # the memory that one chunk may take, over that of several
_DEFAULT_OF_ACCELERATORS = 2**30


class Plan(NamedTuple):
    """The schedule of a call and the rows of its chunks. float16 takes two passes: the E of one pass would underflow in it."""

    sweeps: bool  # True: one pass; False: two
    sweep_rows: int  # of a chunk of one pass
    two_pass_rows: int  # of a chunk of two passes; one pass takes these for rows that it recomputes


def _once(plan: Callable) -> Callable:
    """plan(head, ...), computed once for each size and kind of head. The other arguments are numbers, and tuples of them."""
    found: dict[tuple, object] = {}

    @functools.wraps(plan)
    def planned(head: Head, *arguments, workspace: int | None, **named):
        # a workspace of another type may equal one that was planned for, and still be refused
        if torch.compiler.is_compiling() or type(workspace) not in (int, type(None)):
            return plan(head, *arguments, workspace=workspace, **named)
        weight = head.weight
        kind = weight.shape, weight.dtype, weight.device.type, lora_rank(head), head.bias is None, head.softcap is None
        key = kind, arguments, workspace, *named.values()
        if key not in found:
            if len(found) == _MOST_PLANS:
                found.clear()
            found[key] = plan(head, *arguments, workspace=workspace, **named)
        return found[key]

    return planned


@_once
def plan_logprobs(head: Head, *, asked: Asked, workspace: int | None, backend: str) -> int:
    """Rows of a chunk of two passes. Raises ValueError where the workspace is too small for a tile."""
    return two_pass_rows(head, asked, workspace_bytes(workspace, head.weight.device), backend)


@_once
def plan_policy_loss(
    head: Head, count: int, *, asked: Asked, wanted: Wanted, wide_weight: bool, workspace: int | None, backend: str
) -> Plan:
    """The plan for `count` rows. Raises ValueError where the workspace is too small for one tile, in one pass or in two.

    Without a workspace, one chunk holds all rows where that takes hardly more memory. Then dW is written once, in its own
    dtype. Several chunks are summed in an fp32 copy of dW, beside which it is rounded at the end.
    """
    sweeps, given = head.weight.dtype != torch.float16, workspace
    workspace, gradient = workspace_bytes(workspace, head.weight.device), any(wanted)
    if given is None and sweeps:  # a default must not refuse a large vocabulary: it grows
        fixed, per_row = one_pass_bytes(head, asked, gradient, backend)
        workspace = max(workspace, fixed + tiles_of(backend).tile_shape(head).rows * per_row)
    two_pass = two_pass_rows(head, asked, workspace, backend)
    if not sweeps:
        return Plan(sweeps, two_pass, two_pass)
    rows = sweep_rows(head, count, asked, gradient, workspace, backend)
    if given is None and rows < count:
        one, several = (
            one_pass_peak(head, count, x, asked=asked, wanted=wanted, wide_weight=wide_weight, backend=backend)
            for x in (count, rows)
        )
        step = tiles_of(backend).tile_shape(head).rows
        rows = -(-count // step) * step if one <= _ONE_CHUNK * several else rows
    return Plan(sweeps, rows, two_pass)


def workspace_bytes(workspace: int | None, device: torch.device) -> int:
    """`workspace` in bytes, or the device's default: 256 MiB on a CPU, 1 GiB on accelerators."""
    if workspace is None:
        return _DEFAULT.get(device.type, _DEFAULT_OF_ACCELERATORS)
    if not isinstance(workspace, numbers.Integral) or not is_positive_number(workspace):
        raise ValueError(f"workspace must be a positive number of bytes; got {workspace!r}")
    return int(workspace)


# ---- one pass


def sweep_rows(head: Head, count: int, asked: Asked, gradient: bool, workspace: int, backend: str) -> int:
    """Rows per chunk of one pass, a multiple of the tile's: the fewest chunks that fit the workspace, of equal length.

    Raises ValueError where not even one tile of rows fits.
    """
    rows = tiles_of(backend).tile_shape(head).rows
    fixed, per_row = one_pass_bytes(head, asked, gradient, backend)
    fitting = max(0, workspace - fixed) // per_row // rows
    if fitting < 1:
        raise ValueError(
            f"workspace={workspace} bytes is too small: {rows} rows of a ({head.weight.shape[0]}, {head.weight.shape[1]}) "
            f"{head.weight.dtype} head on {head.weight.device.type} need {fixed + rows * per_row}"
        )
    padded = -(-count // rows)
    chunks = max(1, -(-padded // fitting))
    return max(1, -(-padded // chunks)) * rows


def one_pass_peak(head: Head, count: int, rows: int, *, asked: Asked, wanted: Wanted, wide_weight: bool, backend: str) -> int:
    """Bytes that a call of `count` rows allocates in chunks of `rows` rows, with dX and dW. wide_weight: dW stays in fp32."""
    weight, dtype = head.weight, accumulation_dtype(head.weight.dtype)
    fixed, per_row = one_pass_bytes(head, asked, any(wanted), backend)
    is_sum = rows < count or wide_weight
    dweight = wanted.weight * weight.numel()
    sums = dweight * (dtype if is_sum else weight.dtype).itemsize
    rounded = dweight * weight.itemsize if is_sum and not wide_weight and weight.dtype != dtype else 0  # when E is free
    dhidden = wanted.hidden * count * weight.shape[1] * weight.itemsize
    return dhidden + sums + max(fixed + min(rows, count) * per_row, rounded)


def one_pass_bytes(head: Head, asked: Asked, gradient: bool, backend: str) -> tuple[int, int]:
    """(bytes of the call, bytes of each row of a chunk). gradient: whether E is stored."""
    weight = head.weight
    wide = accumulation_dtype(weight.dtype).itemsize
    fixed, per_row = _triton_sweep(head, asked) if backend == "triton" else _torch_sweep(head, asked)
    per_row += (4 * lora_rank(head) + 20) * wide  # z, its product with E and dz; twenty numbers
    per_row += _merging(asked)
    fixed += 3 * weight.shape[0] * lora_rank(head) * wide  # dB of a chunk, as two terms and their sum
    if gradient:
        per_row += row_stride(head) * exps_dtype(weight.dtype).itemsize
        fixed += _widened(head)
    return fixed, per_row


def exps_dtype(dtype: torch.dtype) -> torch.dtype:
    """E is stored in the dtype of the inputs, so that products 2 and 3 run at its speed; fp16 has too little range."""
    return dtype if dtype == torch.bfloat16 else accumulation_dtype(dtype)


def row_stride(head: Head) -> int:
    """Entries from one row of E to the next."""
    vocab = head.weight.shape[0]
    if head.weight.device.type != "cpu":  # rows begin at multiples of 128 bytes, the unit in which a GPU reads and writes
        unit = 128 // exps_dtype(head.weight.dtype).itemsize
        return -(-vocab // unit) * unit
    # An odd multiple of 32: rows are aligned to 32 entries and never lie a large power of two apart. At V = 49152 = 3 * 2^14,
    # rows V entries apart share their place in the cache, which cost products 2 and 3 15 % on a CPU.
    return (vocab + 63) // 64 * 64 + 32


def _torch_sweep(head: Head, asked: Asked) -> tuple[int, int]:
    """(bytes of the call, of a row) of `torch_tiles.anchored_exp` and of the products, without E."""
    rows, columns, wide, narrow = _tile(head)
    # one tile of weights; one of logits, with the temporaries of the entropy (1) and of the softcap and its slope (4), and of
    # what else is asked for: squares or a copy from which the largest are taken, or comparisons and these as integers
    further = 1.25 if asked.rank else int(asked.squares or asked.top_k > 1)
    tiles = 1 + asked.entropy + (4 if head.softcap is not None else 0) + further
    # a row: hidden states with the temporaries of the target's logit, or of products 2 and 3
    return columns * head.weight.shape[1] * narrow + int(tiles * rows * columns * wide), 4 * head.weight.shape[1] * wide


def _triton_sweep(head: Head, asked: Asked) -> tuple[int, int]:
    weight, narrow = head.weight, head.weight.itemsize
    # partial sums per row and column tile: S, Q for an entropy, R where E is rounded, and what else is asked for
    sums = 1 + asked.entropy + (weight.dtype != torch.float32) + _further_sums(asked)
    partials = 4 * sums * tiles_of("triton").most_column_tiles(weight.shape[0], weight.dtype)
    # gathered hidden states; then the partial sums, or once these are gone E @ W in fp32 and u x
    return _lora_operands(head), narrow * weight.shape[1] + max(partials, (4 + narrow) * weight.shape[1])


def _widened(head: Head) -> int:
    """Bytes of the tiles of E that products 2 and 3 widen on a CPU, where E is not in the accumulation dtype."""
    dtype = accumulation_dtype(head.weight.dtype)
    if head.weight.dtype == dtype or head.weight.device.type != "cpu":
        return 0
    vocab, hidden_size = head.weight.shape
    columns = min(tile_columns(hidden_size if head.bias is None else 1), vocab)
    return (WIDENED_ROWS * columns + (widened_entries(vocab) if lora_rank(head) else 0)) * dtype.itemsize


# ---- two passes


def two_pass_rows(head: Head, asked: Asked, workspace: int, backend: str) -> int:
    """Rows per chunk of two passes. Raises ValueError where not even one tile fits."""
    rows, columns, _, longest = tiles_of(backend).tile_shape(head)
    weight, columns = head.weight, min(columns, head.weight.shape[0])
    dtype, device = weight.dtype, weight.device
    wide, narrow = accumulation_dtype(dtype).itemsize, tiles_of(backend).operand_dtype(dtype, device).itemsize
    fixed, per_row = _triton_two_passes(head, asked) if backend == "triton" else _torch_two_passes(head, asked)
    fixed += columns * weight.shape[1] * wide  # a tile of dW
    # hidden states (gathered, widened or scaled), a row of dlogits, and twenty numbers per row
    per_row += 2 * (weight.shape[1] + 3 * lora_rank(head)) * wide + columns * narrow + 20 * wide
    per_row += _merging(asked)
    fixed += 4 * columns * lora_rank(head) * wide
    if dtype == torch.bfloat16 and device.type == "cpu":  # the operands of a slice of dW, and that slice, in bf16
        per_row += 2 * (columns + weight.shape[1])
        fixed += 2 * columns * weight.shape[1]
    fitting = (workspace - fixed) // per_row // rows
    if fitting < 1:
        raise ValueError(
            f"workspace={workspace} bytes is too small: one tile of a {tuple(weight.shape)} {dtype} head "
            f"on {device.type} needs {fixed + rows * per_row}"
        )
    return min(fitting * rows, longest)


def _torch_two_passes(head: Head, asked: Asked) -> tuple[int, int]:
    """(bytes of the call, of a row) of `torch_tiles.online_logsumexp` or `dlogits`, without the slice of dL/dlogits and the
    chunk's hidden states."""
    rows, columns, wide, narrow = _tile(head)
    # with the entropy two temporaries, with the softcap three; a copy from which the largest are taken, and a mask
    tiles = 1 + 2 * asked.entropy + (3 if head.softcap is not None else 0) + (asked.top_k > 1) + asked.rank
    # before the tiles exist: the targets' rows of the weight, widened, and their products
    of_targets = 3 * rows * head.weight.shape[1] * wide
    return max(of_targets, columns * head.weight.shape[1] * narrow + tiles * rows * columns * wide), 0


def _triton_two_passes(head: Head, asked: Asked) -> tuple[int, int]:
    tiles, vocab, dtype = tiles_of("triton"), head.weight.shape[0], head.weight.dtype
    slice_tiles = tiles.most_column_tiles(min(tiles.tile_shape(head).columns, vocab), dtype)
    sums = 2 + asked.entropy + _further_sums(asked)  # of each split m, s and q; and what else is asked for
    return _lora_operands(head), 4 * max(sums * tiles.most_splits(vocab, dtype), slice_tiles)


# ---- both


def _tile(head: Head) -> tuple[int, int, int, int]:
    """Rows and columns of a tile in PyTorch, bytes of an accumulator and of an operand."""
    tiles, weight = tiles_of("torch"), head.weight
    rows, columns, *_ = tiles.tile_shape(head)
    narrow = tiles.operand_dtype(weight.dtype, weight.device).itemsize
    return rows, min(columns, weight.shape[0]), accumulation_dtype(weight.dtype).itemsize, narrow


def _further_sums(asked: Asked) -> int:
    """Numbers of 4 bytes of a split or tile on Triton; keys have 8, and are there twice while the largest are taken."""
    keys = tiles_of("triton").keys_of_a_split(largest_kept(asked))
    return asked.mean + asked.squares + asked.rank + 4 * keys


def _merging(asked: Asked) -> int:
    """Bytes of a row: further results and partials, and their merging."""
    return is_further(asked) * (12 + 8 * largest_kept(asked)) * 8


def _lora_operands(head: Head) -> int:
    """Bytes of LoRA's B on Triton: its bf16 operands (`kernels.operands`), and the terms that they are put together from."""
    rank = lora_rank(head)
    if head.weight.dtype == torch.float32 or rank == 0:
        return 4 * head.weight.shape[0] * rank
    return 2 * head.weight.shape[0] * (-(-6 * rank // 16) * 16 + 6 * rank)
