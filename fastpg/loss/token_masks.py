"""Which tokens a source leaves out of its policy term, as masks: True where a token stays.

They are constants, and serve every objective. Two uses differ in the denominator D:

    rollout_weights=keep.float()    what is left out adds 0 and counts in D, as in the sources; times other weights where given
    mask=keep                       what is left out is masked, and does not count in D

Made from what scoring returns (`old_logprobs`, and entropies beside them), they serve the one-pass loss too, where tokens of
weight 0 cost nothing (`skip_zero_weight`). The sources make them of the current policy, from `linear_logprobs`: two passes.
"""

from __future__ import annotations

import torch

from ..validation import check_mask, check_plain, check_token_numbers, is_nonnegative_number, kind
from .policy_loss import id_limit, per_token
from .sequences import check_id_values, check_sequence_ids, sequences_of


def off_policy_sequence_mask(
    logprobs: torch.Tensor,  # (...)
    old_logprobs: torch.Tensor,  # (...)
    advantages: torch.Tensor,  # (...), or one per sequence
    threshold: float,
    *,
    mask: torch.Tensor | None = None,  # (...)
    sequence_ids: torch.Tensor | None = None,  # (N,)
    check: bool = True,
) -> torch.Tensor:
    """False where A < 0 and mean_t (old_t - logp_t) of the token's sequence > threshold. (DeepSeek-V3.2, 2512.02556, eq. 9)

    The mean estimates KL(old, pi): bad samples that have become unlikely already teach nothing. TRL calls the threshold
    off_policy_mask_threshold, and slime the mask OPSM. Sequences must be whole: not cut by micro-batches or ranks.

    Args:
        logprobs: (...) floating, (B, T) or packed (N,) with sequence_ids; under the policy.
        old_logprobs: (...) under the policy that sampled: the sampler's own where they are known (as in the paper and TRL).
        advantages: (...) per token, or one per sequence, as in `policy_loss`. A token with A >= 0 stays.
        threshold: >= 0, in nats a token. (TRL gives 0.5 as an example; slime's default is 1e-4.)
        mask, sequence_ids, check: as in `policy_loss`.

    Returns (...) bool, False at masked tokens. A NaN leaves nothing out, so that the loss shows it.
    """
    if not isinstance(logprobs, torch.Tensor) or not logprobs.is_floating_point():
        raise TypeError(f"logprobs must be a floating-point tensor; got {kind(logprobs)}")
    check_mask(mask, "logprobs", logprobs)
    check_sequence_ids(sequence_ids, "logprobs", logprobs)
    if old_logprobs is None:
        raise TypeError("old_logprobs must be a floating-point tensor; got None, the same policy, of which nothing is left out")
    packed = sequence_ids is not None
    check_token_numbers("logprobs", logprobs, {"old_logprobs": old_logprobs}, advantages, packed_sequences=packed)
    if not is_nonnegative_number(threshold):
        raise ValueError(f"threshold must be a number >= 0, in nats a token; got {threshold!r}")
    every = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    if packed and not torch.compiler.is_compiling() and (check or sequence_ids.device.type == "cpu"):
        check_id_values(sequence_ids, every, id_limit(advantages, logprobs))
    sequences = sequences_of(every, sequence_ids)
    if sequences is None:
        raise ValueError(
            "off_policy_sequence_mask needs sequences: logprobs of shape (B, T), or packed (N,) with sequence_ids=; got shape "
            f"{tuple(logprobs.shape)}"
        )
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    divergence = sequences.mean(old_logprobs.detach().to(dtype) - logprobs.detach().to(dtype))
    unwanted = per_token(advantages.detach(), logprobs.shape, sequence_ids) < 0
    return every & ~(unwanted & (divergence > threshold))


def top_entropy_mask(
    entropies: torch.Tensor,  # (...)
    fraction: float,
    *,
    mask: torch.Tensor | None = None,  # (...)
) -> torch.Tensor:
    """True for the `fraction` of the tokens with the largest entropy: forks in the reasoning. (arXiv 2506.01939)

    They are the floor(fraction (N - 1)) + 1 largest of the N tokens with mask, and those equal to the smallest of these: the
    tokens at or above the quantile 1 - fraction, as in TRL (top_entropy_quantile). The paper takes 0.2.

    N are the tokens of this call. TRL ranks over a micro-batch of all ranks; for that, or for a whole batch, concatenate or
    gather the entropies, one number a token, and take the parts of the result.

    Args:
        entropies: (...) floating, such as those of `linear_logprobs(..., entropy=True)`.
        fraction: in [0, 1]; 0 leaves the largest alone.
        mask: (...) bool, True where a token counts.

    Returns (...) bool, False at masked tokens. A NaN is not left out, so that the loss shows it.
    """
    check_plain("entropies", entropies)
    if not isinstance(entropies, torch.Tensor) or not entropies.is_floating_point():
        raise TypeError(f"entropies must be a floating-point tensor; got {kind(entropies)}")
    check_mask(mask, "entropies", entropies)
    if not is_nonnegative_number(fraction) or fraction > 1:
        raise ValueError(f"fraction must be in [0, 1], a share of the tokens that count; got {fraction!r}")
    entropies = entropies.detach()
    every = torch.ones_like(entropies, dtype=torch.bool) if mask is None else mask
    if not entropies.numel():
        return every.clone()
    ascending = torch.where(every, entropies, -torch.inf).flatten().sort().values
    wanted = (fraction * (every.sum() - 1).clamp(min=0).double()).floor().long() + 1
    smallest = ascending.gather(0, (len(ascending) - wanted)[None])  # (an index [wanted] would be a host read)
    return every & ~(entropies < smallest)
