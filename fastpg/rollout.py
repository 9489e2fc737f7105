"""Corrections for a sampler that is not the trainer: weights and masks from two log-probabilities of every sampled token.

An inference engine samples with probabilities q, and the trainer computes p for the same tokens: other kernels, another
precision, other experts, older weights. Gradients from samples of q are then not those of the policy p. With rho = p / q:

| function          | of a token                                                 | source                                    |
|-------------------|------------------------------------------------------------|-------------------------------------------|
| truncated_weights | clip(rho, low, high)                                       | TIS: Yao et al. 2025 [1]                  |
| masked_weights    | rho where low <= rho <= high, else 0                       | MIS: Liu et al. 2025 [2]                  |
| icepop            | the same of single tokens, alpha <= rho <= beta            | Ring-1T, arXiv 2510.18855                 |
| within_band       | True where low <= rho <= high; or k2, k3, p - q for rho    | rejection: Liu et al. 2025 [2]            |
| token_veto        | False in every sequence with a token outside the band      | slime, SkyRL                              |
| mismatch_metrics  | how far p and q are apart                                  | Schulman, "Approximating KL divergence"   |

[1] "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", https://fengyao.notion.site/off-policy-rl
[2] "When Speed Kills Stability", https://richardli.xyz/rl-collapse

Weights go into `rollout_weights=` of a loss. A mask goes there too, as a factor (`weights * keep`), or into `mask=`: the loss
is then divided by the number of tokens that are left.

    level         rho
    "token"       p_t / q_t
    "sequence"    prod_t p_t / q_t, the ratio of the whole sequence
    "geometric"   (prod_t p_t / q_t)^(1/T), its geometric mean over the T tokens (the ratio of GSPO, arXiv 2507.18071)

Only the ratio of sequences without bounds gives the expected gradient of samples from p. That of a token lacks the ratios of
the tokens beside it, and bounds trade variance for bias.

Rules of all functions:
logprobs: of the policy at which the gradient is taken, or the old_logprobs of a loss that has a ratio of its own to these. Of
    the same tokens as rollout_logprobs, with the same temperature and support.
layout: (B, T), or packed (N,) with sequence_ids, numbered from 0. Functions of single tokens take any shape.
mask: bool, True where a token counts. What stands at masked positions, NaN included, reaches nothing: weights are 0 there and
    masks False.
results: constants without a gradient. Weights are float64 if an input is, else float32. Empty in, empty out.
overflow: a log-ratio is clamped to [-20, 20] before exp, as in verl, SkyRL and slime; that of a sequence after its sum or mean.
    So no bound beyond exp(20), 4.9e8, is ever reached.
unscored: a token that counts and has NaN or an infinity in rollout_logprobs: the engine did not score it. With "raise" it is
    an error. With "zero" it gets the weight 0 (False in a mask) and counts in no sequence's ratio; then the host waits for no
    value (except of sequence_ids). `mismatch_metrics` counts such tokens. NaN in logprobs is never hidden: weights are NaN, and
    masks keep the token.
errors: arguments that do not fit raise a TypeError or ValueError with the argument's name, before any work.
"""

from __future__ import annotations

import math
import numbers
from typing import Literal, get_args

import torch

from .loss.metrics import Metrics
from .loss.mismatch import (
    Level,
    LogRatios,
    clamped,
    log_ratios,
    mismatch_metric,
    mismatch_names,
    outside,
    require_scored,
)
from .loss.sequences import check_id_values, check_sequence_ids
from .validation import check_mask, check_plain, kind

Measure = Literal["ratio", "k2", "k3", "probability"]
Unscored = Literal["raise", "zero"]


# ---- weights


def truncated_weights(
    logprobs: torch.Tensor,  # (B, T), or (N,) with sequence_ids; single tokens: any shape
    rollout_logprobs: torch.Tensor,  # like logprobs
    mask: torch.Tensor | None = None,  # like logprobs
    *,
    high: float | None,
    low: float | None = None,
    level: Level = "token",
    sequence_ids: torch.Tensor | None = None,  # (N,)
    unscored: Unscored = "raise",
) -> torch.Tensor:
    """w = clip(rho, low, high): truncated importance weights, TIS. (Yao et al. 2025; of sequences: Liu et al. 2025)

    high: 2 is usual for tokens, 2 to 10 for sequences. None, without low: the plain importance weight rho.
    """
    _check_options(level, unscored)
    _check_band(low, high)
    tokens = _tokens(logprobs, rollout_logprobs, mask, sequence_ids, level, unscored)
    rho = tokens.ratio(level)
    if low is not None or high is not None:
        rho = rho.clamp(low, high)
    return torch.where(tokens.scored, rho, 0)


def masked_weights(
    logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    low: float | None,
    high: float | None,
    level: Level = "token",
    sequence_ids: torch.Tensor | None = None,
    unscored: Unscored = "raise",
) -> torch.Tensor:
    """w = rho where low <= rho <= high, else 0: masked importance weights, MIS. (Liu et al. 2025)

    Truncation keeps a ratio far off with the largest weight. This drops it, as the sign of a token that is broken in one of the
    two engines. For a band at another level than the weight's: truncated_weights(..., high=None) * within_band(...).
    """
    _check_options(level, unscored)
    _check_band(low, high, needed=True)
    tokens = _tokens(logprobs, rollout_logprobs, mask, sequence_ids, level, unscored)
    rho = tokens.ratio(level)
    return torch.where(tokens.scored & ~outside(rho, low, high), rho, 0)


def icepop(
    logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    alpha: float | None = 0.5,
    beta: float | None = 5.0,
    sequence_ids: torch.Tensor | None = None,
    unscored: Unscored = "raise",
) -> torch.Tensor:
    """w = rho where alpha <= rho <= beta, else 0, of single tokens. (IcePop; Ring-1T, arXiv 2510.18855)

    It is masked_weights(level="token"). Made for mixtures of experts, whose two engines may choose other experts for a token.
    0.5 and 5 are the bounds that OpenRLHF and NeMo-RL name.
    """
    _check_options("token", unscored)
    _check_band(alpha, beta, needed=True, names=("alpha", "beta"))
    return masked_weights(logprobs, rollout_logprobs, mask, low=alpha, high=beta, sequence_ids=sequence_ids, unscored=unscored)


# ---- masks


def within_band(
    logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    low: float | None = None,
    high: float | None = None,
    measure: Measure = "ratio",
    level: Level = "token",
    sequence_ids: torch.Tensor | None = None,
    unscored: Unscored = "raise",
) -> torch.Tensor:
    """A bool mask: True where low <= measure <= high. (Rejection: Liu et al. 2025; measures: verl, AReaL, prime-rl)

        measure         of a token, d = log p - log q       of a sequence: "sequence", "geometric"
        "ratio"         rho = exp(d)                        exp(sum d), exp(mean d)
        "k2"            d^2 / 2                             sum, mean
        "k3"            exp(d) - 1 - d                      sum, mean
        "probability"   p - q                               (none)

    k1 = -d within [a, b] is the ratio within [exp(-b), exp(-a)]; |p - q| <= b is "probability" within [-b, b].
    """
    _check_options(level, unscored, measure)
    _check_band(low, high, needed=True, least=-1.0 if measure == "probability" else 0.0)
    tokens = _tokens(logprobs, rollout_logprobs, mask, sequence_ids, level, unscored)
    return tokens.scored & ~outside(_measured(tokens, measure, level), low, high)


def token_veto(
    logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    low: float | None = 1e-4,
    high: float | None = None,
    measure: Measure = "ratio",
    sequence_ids: torch.Tensor | None = None,
    unscored: Unscored = "raise",
) -> torch.Tensor:
    """A bool mask: False in every sequence that has a token outside low <= measure <= high. (slime: rs_veto_threshold)

    A token that the trainer takes for 10 000 times less probable than the engine did casts doubt on its whole sequence. That
    bound, 1e-4, is the one that slime and SkyRL name. measure: as in within_band, of single tokens.
    """
    _check_options("token", unscored, measure)
    _check_band(low, high, needed=True, least=-1.0 if measure == "probability" else 0.0)
    tokens = _tokens(logprobs, rollout_logprobs, mask, sequence_ids, "token", unscored, function="token_veto")
    vetoes = outside(_measured(tokens, measure, "token"), low, high).to(tokens.logprobs.dtype)
    return tokens.scored & (tokens.sequences.total(vetoes) == 0)


# ---- diagnostics


def mismatch_metrics(
    logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    low: float | None = None,
    high: float | None = None,
    level: Level = "token",
    sequence_ids: torch.Tensor | None = None,
) -> Metrics:
    """How far trainer and engine are apart, as 0-d tensors by name; `.to_dict()` reads all of them at once.

    With d = log p - log q, over the tokens that count and are scored (the token was sampled from q):

        mismatch_kl_k1         mean(-d), and
        mismatch_kl_k3         mean(exp(d) - 1 - d): estimates of KL(q, p). k1 may be negative, k3 has less variance
        mismatch_abs_mean      mean |d|
        mismatch_abs_max       max |d|; 0 without tokens
        mismatch_ratio_mean    mean rho, at `level`; that of tokens is 1 in expectation
        mismatch_ratio_max     max rho; 0 without tokens
        mismatch_ess           (sum rho)^2 / (n sum rho^2), the effective sample size as a share of n; 1 without tokens
        mismatch_outside_band  with low or high: the share of tokens whose rho is outside [low, high]
        mismatch_chi2          mean(rho^2) - 1 of tokens: the chi^2 divergence of p from q, the variance of the weights
        mismatch_chi2_seq      the same of sequences, if there are any: mean over sequences of rho^2 - 1
        scored_tokens          the number of tokens
        unscored_tokens        the number of those that count and were not scored

    `out.metrics | mismatch_metrics(...)` adds them to a loss's, and `.named("verl")` shows those that verl logs, under its
    names. They make the host wait for nothing (sequence_ids apart).
    """
    _check_options(level)
    _check_band(low, high)
    tokens = _tokens(logprobs, rollout_logprobs, mask, sequence_ids, level, "zero")
    names = mismatch_names(tokens.sequences is not None, low is not None or high is not None)
    return Metrics({name: mismatch_metric(name, tokens, level, low, high) for name in names})


# ---- one token's numbers, and a sequence's


def _tokens(
    logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor | None,
    sequence_ids: torch.Tensor | None,
    level: Level,
    unscored: Unscored,
    *,
    function: str | None = None,
) -> LogRatios:
    """Checks the tensors of a call. function: its name, if it needs sequences at any level."""
    _check_logprobs("logprobs", logprobs)
    _check_logprobs("rollout_logprobs", rollout_logprobs, logprobs)
    check_mask(mask, "logprobs", logprobs)
    check_sequence_ids(sequence_ids, "logprobs", logprobs)
    if (function or level != "token") and logprobs.dim() != 2 and sequence_ids is None:
        raise ValueError(
            f"{function or f'level={level!r}'} needs sequences: logprobs of shape (B, T), or packed (N,) with sequence_ids=; "
            f"got shape {tuple(logprobs.shape)}"
        )
    keep = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    if sequence_ids is not None:
        check_id_values(sequence_ids, keep, len(logprobs))
    if unscored == "raise":
        require_scored(rollout_logprobs, keep, 'take unscored="zero"')
    return log_ratios(logprobs, rollout_logprobs, keep, sequence_ids)


def _measured(tokens: LogRatios, measure: Measure, level: Level) -> torch.Tensor:
    if measure == "ratio":
        return tokens.ratio(level)
    if measure == "probability":
        return tokens.logprobs.exp() - tokens.rollout_logprobs.exp()
    d = clamped(tokens.log_ratio)
    return tokens.at_level(d.square() / 2 if measure == "k2" else d.expm1() - d, level)


# ---- checks


def _check_logprobs(name: str, value: torch.Tensor, like: torch.Tensor | None = None) -> None:
    check_plain(name, value)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, a log-probability for each sampled token; got {kind(value)}")
    if like is None:
        return
    if value.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of logprobs, {tuple(like.shape)}: one for each token, padded where mask is False; "
            f"got {tuple(value.shape)}"
        )
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but logprobs is on {like.device}")


def _check_options(level: Level, unscored: Unscored = "raise", measure: Measure = "ratio") -> None:
    given = {"level": (level, Level), "unscored": (unscored, Unscored), "measure": (measure, Measure)}
    for name, (value, choices) in given.items():
        if not isinstance(value, str) or value not in get_args(choices):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}; got {value!r}")
    if measure == "probability" and level != "token":
        raise ValueError(f"level must be 'token' with measure='probability', which is of single tokens; got {level!r}")


def _check_band(
    low: float | None,
    high: float | None,
    *,
    needed: bool = False,
    least: float = 0.0,
    names: tuple[str, str] = ("low", "high"),
) -> None:
    for name, value in zip(names, (low, high), strict=True):
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if value is not None and not (is_number and least <= value < math.inf):
            raise ValueError(f"{name} must be a finite number >= {least:g}, or None for no bound; got {value!r}")
    if low is not None and high is not None and low > high:
        raise ValueError(f"{names[0]} must not be above {names[1]}, {high!r}; got {low!r}")
    if needed and low is None and high is None:
        raise ValueError(f"{names[0]} and {names[1]} must not both be None: the band would hold every token")
