"""Which rows a call computes, decided before the model runs: `kept`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import validation


class Kept(NamedTuple):
    """What `kept` returns, to be passed as `mask=`. Whoever makes one differently has its values checked as well."""

    mask: torch.Tensor  # (...) bool: tokens that count
    indices: torch.Tensor  # (K,) int64, ascending: the places of the computed ones in the flattened mask
    skips: bool  # whether tokens that count are left out, because they add exactly 0 to a loss


def kept(
    mask: torch.Tensor,  # (...) bool
    advantages: torch.Tensor | None = None,  # (...), or one per sequence (B,)
    rollout_weights: torch.Tensor | None = None,  # (...)
) -> Kept:
    """The rows that a call will compute, to be passed as its `mask=`: the call then need not wait for the device to count them.

        rows = fastpg.kept(mask, advantages)          # before the model runs
        hidden = model(...)
        out = fastpg.linear_cispo_loss(hidden, head, tokens, old_logprobs, advantages, mask=rows)

    The host waits here instead, for what comes before the model. With `check=False`, and so in a CUDA graph, the call gathers
    these rows, where it would compute every row without them; rows that do not fit its other arguments make the loss NaN.

    Args:
        mask: (...) bool, True where a token counts. Tokens with the id -100 do not: mask & (tokens != -100).
        advantages: tokens whose advantage, times rollout weight, is exactly 0 are left out. They count in denominators, and
            metrics["skipped_tokens"] counts them. Give them for losses that are 0 there (named objectives without a KL
            penalty), and not for `linear_logprobs`. (B,) is one per row of a (B, T) mask.
        rollout_weights: (...) as in `linear_policy_loss`, or those that its rollout_correction makes. Without them a loss with
            rollout_logprobs computes the tokens of weight 0 too.

    Raises TypeError or ValueError, naming the argument, for dtypes, shapes and devices that do not fit.
    """
    validation.check_plain("mask", mask)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where a token counts; got {validation.kind(mask)}")
    if rollout_weights is not None and advantages is None:
        raise ValueError("rollout_weights were given without advantages, which they multiply")
    computed = mask
    if advantages is not None:
        factor = _per_token(advantages, mask)
        if rollout_weights is not None:
            factor = factor * _per_token(rollout_weights, mask, "rollout_weights")
        computed = mask & (factor != 0)
    return Kept(mask, computed.reshape(-1).nonzero()[:, 0], advantages is not None)


def _per_token(values: torch.Tensor, mask: torch.Tensor, name: str = "advantages") -> torch.Tensor:
    """Values (...) in fp32, in which a product of 16-bit ones does not underflow; float64 stays."""
    shape = tuple(mask.shape)
    validation.check_plain(name, values)
    if not isinstance(values, torch.Tensor) or values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{name} must be a real tensor; got {validation.kind(values)}")
    of_rows = name == "advantages" and mask.dim() == 2 and values.shape == mask.shape[:1]
    if values.shape != mask.shape and not of_rows:
        per_row = f" or per row ({shape[0]},)" if name == "advantages" and mask.dim() == 2 else ""
        raise ValueError(f"{name} must have the shape of mask, {shape}{per_row}; got {tuple(values.shape)}")
    if values.device != mask.device:
        raise ValueError(f"{name} is on {values.device} but mask is on {mask.device}")
    values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    return values[:, None].expand(shape) if of_rows else values


def check_kept(given: Kept, tokens: torch.Tensor) -> None:
    """The shapes, dtypes and devices of a `Kept` for tokens (...). Its values are checked with theirs."""
    validation.check_mask(given.mask, "tokens", tokens)
    indices = given.indices
    if not isinstance(indices, torch.Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
        raise TypeError(f"mask.indices must be an int64 tensor (K,), as fastpg.kept makes it; got {validation.kind(indices)}")
    if len(indices) > tokens.numel():
        raise ValueError(f"mask.indices has {len(indices)} rows, more than the {tokens.numel()} tokens")
    if indices.device != tokens.device:
        raise ValueError(f"mask.indices is on {indices.device} but tokens is on {tokens.device}")


def raise_for_rows(given: Kept, tokens: torch.Tensor, misplaced: int, missing: int) -> None:
    """Raises ValueError for the two numbers that `keep` counts of the indices, unless both are 0."""
    if misplaced:
        indices, flat = given.indices, tokens.reshape(-1)
        inside = (indices >= 0) & (indices < len(flat))
        if not bool(inside.all()):
            raise ValueError(
                f"mask.indices must be in [0, {len(flat)}), places of the tokens; got {indices[~inside][0].item()}: a Kept is "
                "of one batch"
            )
        if not bool((indices[1:] > indices[:-1]).all()):
            raise ValueError("mask.indices must be ascending, as fastpg.kept makes them")
        ignored = flat[indices] == validation.IGNORED_TOKEN
        if bool(ignored.any()):
            raise ValueError(
                f"mask keeps the token at position {indices[ignored][0].item()}, whose id is {validation.IGNORED_TOKEN}: make "
                f"it of mask & (tokens != {validation.IGNORED_TOKEN})"
            )
        raise ValueError("mask.indices has rows where mask.mask is False: a Kept is made by fastpg.kept")
    if missing:
        raise ValueError(
            f"mask leaves out {missing} rows that the loss needs: make it by fastpg.kept of the same mask, advantages and "
            "rollout_weights (a token that is left out must have a finite old_logprobs)"
        )
