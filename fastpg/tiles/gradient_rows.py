"""Rows of finished gradients in PyTorch: factors, rounding, and the places that they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .products import WIDENED_ROWS, add_residual, store_rows
from .structures import Chunk, Head


def gradient_rows(
    of_rows: torch.Tensor | None,
    chunk: Chunk,
    head: Head,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    weighted: torch.Tensor | None,
) -> None:
    """Rows of dX from their product with W, and the operand u x of product 3. None where hidden, or the weight, is frozen.

        out = u (of_rows + R w_y)      of_rows: E @ W (C, H) in the accumulation dtype, which is overwritten
        weighted = u x                 (C, H)

    factor: u (C,); None where it is 1. residual: R (C,), or None. out: in its places, see `Sums`; it may be of_rows.
    """
    for start in range(0, 0 if out is None else len(of_rows), WIDENED_ROWS):  # a few rows at a time, for small temporaries
        span = slice(start, min(start + WIDENED_ROWS, len(of_rows)))
        values = of_rows[span]
        add_residual(values, None if residual is None else residual[span], chunk.tokens[span], head.weight)
        into, places = (out[span], None) if chunk.places is None else (out, chunk.places[span])
        store_rows(into, places, values, None if factor is None else factor[span])
    if weighted is not None:
        torch.mul(chunk.hidden[: len(weighted)], factor[:, None], out=weighted)


def scale_(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """gradients times factor () in the accumulation dtype, in place. On a CPU they are left alone where the factor is 1."""
    if factor.device.type == "cpu" and factor == 1:  # on other devices the host would have to wait for it
        return
    for gradient in gradients:
        times(gradient, factor, gradient)


def times(gradient: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = gradient * factor (), formed in the dtype of the factor and rounded once."""
    if gradient.device.type != "cpu":
        # On a GPU, torch casts a 0-d factor to the gradient's dtype first; a factor with a dimension counts in type promotion.
        # On a CPU it takes a 0-d factor as it is, and would widen the whole gradient for one with a dimension.
        factor = factor.reshape((1,) * gradient.dim())
    return torch.mul(gradient, factor, out=out)
