"""Log-probabilities and entropies written out on full logits, in float64, and a comparison of gradients with theirs."""

from __future__ import annotations

import torch

from fastpg.crosscheck.accuracy import ROW_TOLERANCE, WEIGHT_TOLERANCE, logprob_tolerance


def distribution(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float]:  # fmt: skip
    """(log-probabilities, entropies, the largest |logit|) of hidden (..., H) and tokens (...). float64 leaves get gradients."""
    logits = torch.einsum("...h,vh->...v", hidden.double(), weight.double())
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[..., None].double() if isinstance(temperature, torch.Tensor) else temperature)
    log_p = logits.log_softmax(-1)
    logprobs = log_p.gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
    return logprobs, -(log_p.exp() * log_p).sum(-1), logits.abs().max().item()


def assert_values(got: torch.Tensor, want: torch.Tensor, largest: float, dtype: torch.dtype, hidden_size: int) -> None:
    """got: log-probabilities or entropies of inputs in this dtype; within the promise of `fastpg check`."""
    assert got.shape == want.shape
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (got.double() - want).abs().max() <= logprob_tolerance(largest, dtype, hidden_size, got.device)


def assert_gradient(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Of hidden states or of a weight in this dtype."""
    assert (got.shape, got.dtype) == (want.shape, dtype)
    assert want.any()
    error = (got.double() - want).norm() / want.norm()
    assert error <= max(ROW_TOLERANCE.get(dtype, 0.0), WEIGHT_TOLERANCE[dtype]), error


def wide(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as a float64 leaf."""
    return x.detach().double().requires_grad_()
