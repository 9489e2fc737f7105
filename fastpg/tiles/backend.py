"""The choice between the two backends, PyTorch and the Triton kernels, and the functions that both have: `TileOps`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Protocol

import torch

from . import torch_tiles
from .structures import (
    Asked,
    Chunk,
    Head,
    Incoming,
    Keep,
    Partials,
    ReadyLogits,
    RowResults,
    RowStatistics,
    RowSums,
    Target,
    TileShape,
    TokenInputs,
)

BACKENDS = ("torch", "triton")
# FASTPG_BACKEND replaces the default, for debugging; an argument `backend=` takes precedence over it.
_ENVIRONMENT = os.environ.get("FASTPG_BACKEND")
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


class TileOps(Protocol):
    """A backend: a module with these functions. `torch_tiles` documents each of them, and `triton_tiles` has the same.

    A schedule is loops around these functions and knows nothing else of a device. Triton adds `anchored_loss`, which the
    one-pass schedule calls for objectives that have a device function.
    """

    # the sizes of a schedule's loops, and the operands of its products
    def tile_shape(self, head: Head) -> TileShape: ...
    def operand_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype: ...
    def weight_buffer(self, head: Head) -> torch.Tensor | None: ...
    def weight_tile(self, head: Head, start: int, stop: int, buffer: torch.Tensor | None) -> torch.Tensor: ...

    # which tokens count
    def keep(self, given: TokenInputs) -> Keep: ...

    # one pass
    def target_logits(self, chunk: Chunk, head: Head) -> Target: ...
    def anchored_exp(
        self, chunk: Chunk, head: Head, log_anchor: torch.Tensor, target: Target, out: torch.Tensor | None, asked: Asked
    ) -> RowSums: ...

    def gradient_rows(
        self,
        of_rows: torch.Tensor | None,
        chunk: Chunk,
        head: Head,
        factor: torch.Tensor | None,
        residual: torch.Tensor | None,
        out: torch.Tensor | None,
        weighted: torch.Tensor | None,
    ) -> None: ...
    def scale_(self, gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> None: ...

    # two passes
    def online_logsumexp(self, chunk: Chunk, head: Head, asked: Asked, target: torch.Tensor | None = None) -> Partials: ...
    def row_statistics(self, chunk: Chunk, head: Head, asked: Asked) -> RowResults: ...
    def dlogits(
        self,
        chunk: Chunk,
        head: Head,
        w: torch.Tensor,
        start: int,
        statistics: RowStatistics,
        incoming: Incoming,
        unit: torch.Tensor | None,
        out: torch.Tensor,
    ) -> torch.Tensor | None: ...

    # ready logits
    def selective_statistics(self, ready: ReadyLogits, entropy: bool) -> RowStatistics: ...
    def selective_dlogits(self, ready: ReadyLogits, statistics: RowStatistics, incoming: Incoming) -> torch.Tensor: ...

    # rows whose softmax is over few tokens
    def gathered_dots(self, x: torch.Tensor, place: torch.Tensor, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor: ...
    def run_sums(
        self,
        factor: torch.Tensor,
        keys: torch.Tensor,
        source: torch.Tensor,
        index: torch.Tensor,
        out: torch.Tensor,
        add: bool,
    ) -> None: ...


def choose_backend(backend: str | None, hidden: torch.Tensor, name: str = "hidden") -> str:
    """ "torch" or "triton": the argument, else FASTPG_BACKEND, else triton for CUDA and ROCm tensors and torch elsewhere.

    float64 has no kernels: without the argument it takes torch, whatever FASTPG_BACKEND says. Triton raises for float64, where
    it is not installed, and for CPU tensors outside its interpreter.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f'backend must be "torch", "triton" or None; got {backend!r}')
    if backend is None and _ENVIRONMENT not in (None, "", *BACKENDS):
        raise ValueError(f'the environment variable FASTPG_BACKEND must be "torch" or "triton"; got {_ENVIRONMENT!r}')
    is_float64 = hidden.dtype == torch.float64
    default = "triton" if hidden.is_cuda and _TRITON_IS_INSTALLED else "torch"
    chosen = backend or ("torch" if is_float64 else _ENVIRONMENT or default)
    if chosen == "triton":
        if is_float64:
            raise TypeError('backend="triton" has no float64 kernels; use backend="torch", or float32 inputs')
        _check_triton(hidden.device.type, name)
    return chosen


def _check_triton(device: str, name: str) -> None:
    if not _TRITON_IS_INSTALLED:
        raise ModuleNotFoundError('backend="triton" needs triton, which is not installed: pip install triton')
    if device != "cuda" and not tiles_of("triton").INTERPRETED:
        raise ValueError(
            f'backend="triton" runs on CUDA and ROCm tensors; {name} is on {device}. Use backend="torch"; to debug the kernels '
            "on a CPU, start Python with TRITON_INTERPRET=1"
        )


def tiles_of(backend: str) -> TileOps:
    """The tile ops of a backend. Triton is imported when it is first asked for, and not with fastpg."""
    if backend == "torch":
        return torch_tiles
    from . import triton_tiles

    return triton_tiles
