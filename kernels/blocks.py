"""Tile sizes of the kernels that multiply matrices: one small table, read off the compile report.

The size depends on the target (the GPU's architecture), the kernel, the operands' dtype, H, and the head's bias and softcap. It
depends neither on the number of rows nor on whether an entropy is asked for, so a token's log-probability has the same bits in
every call. Only further statistics need narrower parts of a tile on a GPU, whose sums may differ in their last bits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton


class Blocks(NamedTuple):
    """A program's tile: `rows` tokens x `columns` vocabulary entries, `depth` of the hidden size at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    parts: int = 1  # the number of parts into which an epilogue divides the tile's columns
    warp_groups: int = 1  # the number of warp groups that share a row of the tile
    descriptors: bool = False  # tensor descriptors (TMA) where alignment allows, pointers elsewhere
    persistent: bool = False  # as many programs as multiprocessors, of which each takes one tile after the other
    stores: bool = False  # E through a descriptor too, where alignment allows

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# 16-bit operands.
#
# 128 x 256 is the largest tile whose accumulators leave room for an epilogue, and it needs a quarter less L2 traffic than
# 128 x 128. Taken as one piece, its anchored exponential spills registers: 104 bytes with an entropy on sm_90, 0.7 to 1.9 KB
# with a softcap on sm_90 and sm_100. Taken in parts, it does not. Only a softcap with an entropy still spills on sm_90 (24
# bytes in 16 parts), so the tile of a softcap is half as large there.
#
# sm_80    serves every other NVIDIA architecture too: its 64 KiB of shared memory fit the 99 KiB of consumer cards
# sm_90    descriptors use 181 registers where pointers use all 255
# sm_100   accumulators are in tensor memory, whose columns its two warp groups share
# gfx942   has 64 KiB of shared memory
#
# Each entry holds the tile of a plain head, of one with a bias, and of one with a softcap (and perhaps a bias).
_SIXTEEN_BIT = {
    "cuda:80": (
        Blocks(128, 128, 64, 8, 3, parts=2),
        Blocks(128, 128, 64, 8, 3, parts=2),
        Blocks(128, 128, 64, 8, 3, parts=4),
    ),
    "cuda:90": (
        Blocks(128, 256, 64, 8, 3, parts=8, descriptors=True),
        Blocks(128, 256, 64, 8, 3, parts=16, descriptors=True),
        Blocks(128, 128, 64, 8, 4, parts=2, descriptors=True),
    ),
    "cuda:100": (
        Blocks(128, 256, 64, 8, 3, parts=4, warp_groups=2, descriptors=True),
        Blocks(128, 256, 64, 8, 3, parts=8, warp_groups=2, descriptors=True),
        Blocks(128, 256, 64, 8, 3, parts=8, warp_groups=2, descriptors=True),
    ),
    "hip:gfx942": (Blocks(128, 128, 64, 8, 2),) * 3,
}
# Plain heads on sm_90, as measured on an H100 (`bench/results/h100-measurements.json`, TFLOP/s, N = 8192):
#
#                   H, V            3 stages, 8 parts    4 stages       4 stages, 4 parts    persistent, stores by descriptor
# anchored_exp      576, 49152      424                  425            -                    472
#                   1024, 151936    557 - 563            540 - 560      -                    541 - 576
#                   2048, 128256    588 - 602            584 - 597      -                    623 - 663 (in a step: slower)
#                   4096, 151936    705 - 725            757            -                    767
#                   8192, 128256    700                  701            -                    701 - 716
# logsumexp         4096, 151936    695                  729            763                  -
# dlogits           4096, 151936    718                  733            -                    -
_SM_90 = {
    "anchored_exp": Blocks(128, 256, 64, 8, 4, parts=8, descriptors=True),
    "logsumexp": Blocks(128, 256, 64, 8, 4, parts=4, descriptors=True),
    "dlogits": Blocks(128, 256, 64, 8, 4, parts=8, descriptors=True),
}
_PERSISTENT = Blocks(128, 256, 64, 8, 4, parts=4, descriptors=True, persistent=True, stores=True)
_LONGEST_SHORT, _SHORTEST_LONG = 640, 4096  # H between which it did not gain in a whole step
# fp32 operands are multiplied in fp32 (no TF32), by ordinary multiply-adds on NVIDIA. Taken as one piece, the tile of product 1
# with every option spills 8 bytes on sm_80.
_SINGLE = Blocks(64, 64, 16, 4, 2, parts=2)
# The interpreter's time depends on the number of operations, not on their size: a wide tile.
_INTERPRETED = Blocks(128, 1024, 64, 4, 1, parts=2)


# Columns of a part with further statistics, whose keys take two registers a logit, for 16-bit operands.
_NARROW = 16


def narrow_parts(blocks: Blocks, single: int) -> Blocks:
    """The tile in parts so narrow that the sweep has registers for further statistics (`row_statistics`).

    single: the columns of a part for fp32 operands, a multiple of 8: the bits of a set are read eight at a time.
    """
    if triton.knobs.runtime.interpret:
        return blocks
    width = single if blocks == _SINGLE else _NARROW
    return blocks._replace(parts=max(blocks.parts, blocks.columns // width))


def cdiv(a: int, b: int) -> int:
    """ceil(a / b). (`triton.cdiv`, which also has to work in kernels, takes the host several times as long.)"""
    return -(-a // b)


def blocks_for(target: str, dtype: torch.dtype, bias: bool, softcap: bool, kernel: str, size: int) -> Blocks:
    """The tile of a kernel for a target, as `target_of` names it. size: H."""
    if target == "interpreter":
        return _INTERPRETED
    if dtype == torch.float32:
        return _SINGLE
    if target == "cuda:90" and not (bias or softcap):
        if kernel == "anchored_exp" and not _LONGEST_SHORT < size < _SHORTEST_LONG:
            return _PERSISTENT
        return _SM_90[kernel]
    return _SIXTEEN_BIT[target][2 if softcap else int(bias)]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of programs of a persistent grid."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def fewest_columns(dtype: torch.dtype) -> int:
    """The columns of the narrowest tile in the table for `dtype`: a bound on the number of tiles that holds on every device."""
    return 64 if dtype == torch.float32 else 128


def target_of(device: torch.device) -> str:
    """The entry of the table that serves a device. NVIDIA GPUs without an entry of their own take sm_80's."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    if torch.version.hip:
        return "hip:gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return f"cuda:{major}0" if major in (9, 10) else "cuda:80"
