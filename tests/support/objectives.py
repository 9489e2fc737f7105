"""The objectives by name: each beside the oracle's formula and a derivative written out here."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastpg import CISPO, DPPOKL, DPPOTV, GSPO, SAPO, IcePop, ImportanceWeighted, PPOClip, Reinforce, reference

INF, NAN = math.inf, math.nan
TOKEN, SEQUENCE, TRAJECTORY = "token", "sequence", "trajectory"


class Known(NamedTuple):
    objective: Callable
    oracle: Callable
    level: str  # whose ratio it has
    coefficient: Callable[[float, float], float]  # dl/dlog r as a function of that ratio r and of A
    # whether a token is left out, as a function of logp, old and A; its coefficient is then 0
    left_out: Callable[[float, float, float], bool] = lambda logp, old, a: False


def soft_clipped(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """A user's objective, not linear in anything."""
    return torch.tanh((logprobs - old_logprobs).exp() - 1) * advantages - 0.1 * (logprobs - old_logprobs).square()


def clipped(low: float, high: float, dual: float = INF) -> Callable[[float, float], float]:
    """r A where the unclipped term is chosen, 0 where a bound is."""
    return lambda r, a: 0.0 if (a > 0 and r > high) or (a < 0 and (r < low or r > dual)) else r * a


def gated(tau_pos: float, tau_neg: float) -> Callable[[float, float], float]:
    def coefficient(r: float, a: float) -> float:
        s = 1 / (1 + math.exp(-(tau_pos if a > 0 else tau_neg) * (r - 1)))
        return 4 * s * (1 - s) * r * a

    return coefficient


def beyond(divergence: Callable[[float, float], float], low: float, high: float, two_sided: bool = False) -> Callable:
    """Of the probabilities p and q of a token: above `high` where p > q and A > 0, above `low` where p < q and A < 0."""

    def left_out(logp: float, old: float, a: float) -> bool:
        p, q = math.exp(logp), math.exp(old)
        far = divergence(p, q)
        return (p > q and (a > 0 or two_sided) and far > high) or (p < q and (a < 0 or two_sided) and far > low)

    return left_out


def total_variation(p: float, q: float) -> float:
    return (abs(p - q) + abs((1 - p) - (1 - q))) / 2


def relative_entropy(p: float, q: float) -> float:
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def of_users_function(r: float, a: float) -> float:
    return (1 - math.tanh(r - 1) ** 2) * r * a - 0.2 * math.log(r)


_of_sequence, _of_trajectory = (reference.importance_weighted_by(level) for level in (SEQUENCE, TRAJECTORY))
OBJECTIVES = {
    "reinforce": Known(Reinforce(), reference.reinforce, TOKEN, lambda r, a: a),
    "importance-weighted": Known(ImportanceWeighted(), reference.importance_weighted, TOKEN, lambda r, a: r * a),
    "cispo": Known(CISPO(), reference.cispo(), TOKEN, lambda r, a: min(r, 5.0) * a),
    "cispo-unclipped": Known(CISPO(None), reference.cispo(None), TOKEN, lambda r, a: r * a),
    "cispo-both-bounds": Known(CISPO(1.3, 0.8), reference.cispo(1.3, 0.8), TOKEN, lambda r, a: min(max(r, 0.8), 1.3) * a),
    "cispo-from-below": Known(CISPO(None, 0.5), reference.cispo(None, 0.5), TOKEN, lambda r, a: max(r, 0.5) * a),
    "users-function": Known(soft_clipped, soft_clipped, TOKEN, of_users_function),
    "ppo": Known(PPOClip(), reference.ppo_clip(0.2, 0.2), TOKEN, clipped(0.8, 1.2)),
    "ppo-clip-higher": Known(PPOClip(0.3, 0.45), reference.ppo_clip(0.3, 0.45), TOKEN, clipped(0.7, 1.45)),
    "ppo-dual": Known(PPOClip(0.2, 0.28, 1.6), reference.ppo_clip(0.2, 0.28, 1.6), TOKEN, clipped(0.8, 1.28, 1.6)),
    "sapo": Known(SAPO(), reference.sapo(), TOKEN, gated(1.0, 1.05)),
    "sapo-taus": Known(SAPO(3.0, 0.7), reference.sapo(3.0, 0.7), TOKEN, gated(3.0, 0.7)),
    "dppo-tv": Known(DPPOTV(), reference.dppo_tv(), TOKEN, lambda r, a: r * a, beyond(total_variation, 0.2, 0.2)),
    "dppo-tv-two-sided": Known(
        DPPOTV(0.1, 0.15, two_sided=True),
        reference.dppo_tv(0.1, 0.15, None, True),
        TOKEN,
        lambda r, a: r * a,
        beyond(total_variation, 0.1, 0.15, True),
    ),
    "dppo-tv-weight": Known(
        DPPOTV(0.1, 0.15, 1.3),
        reference.dppo_tv(0.1, 0.15, 1.3),
        TOKEN,
        lambda r, a: min(r, 1.3) * a,
        beyond(total_variation, 0.1, 0.15),
    ),
    "dppo-kl": Known(DPPOKL(), reference.dppo_kl(), TOKEN, lambda r, a: r * a, beyond(relative_entropy, 0.05, 0.05)),
    "dppo-kl-weight": Known(
        DPPOKL(0.02, 0.03, 1.6),
        reference.dppo_kl(0.02, 0.03, 1.6),
        TOKEN,
        lambda r, a: min(r, 1.6) * a,
        beyond(relative_entropy, 0.02, 0.03),
    ),
    "icepop": Known(IcePop(), reference.icepop(), TOKEN, lambda r, a: r * a if 0.5 < r < 5 else 0.0),
    "icepop-narrow": Known(IcePop(1.3, 0.8), reference.icepop(1.3, 0.8), TOKEN, lambda r, a: r * a if 0.8 < r < 1.3 else 0.0),
    "iw-sequence": Known(ImportanceWeighted(SEQUENCE), _of_sequence, SEQUENCE, lambda r, a: r * a),
    "iw-trajectory": Known(ImportanceWeighted(TRAJECTORY), _of_trajectory, TRAJECTORY, lambda r, a: r * a),
    "gspo": Known(GSPO(0.3, 0.45), reference.gspo(0.3, 0.45), SEQUENCE, clipped(0.7, 1.45)),
    "gspo-default": Known(GSPO(), reference.gspo(3e-4, 4e-4), SEQUENCE, clipped(1 - 3e-4, 1 + 4e-4)),
}
OF_SEQUENCES = [name for name, known in OBJECTIVES.items() if known.level != TOKEN]
# whose coefficient does not depend on the last bits of a ratio, however large or small it is
ANY_RATIO = ["reinforce", "importance-weighted", "cispo", "cispo-unclipped", "cispo-both-bounds", "cispo-from-below"]
PLAIN = [*ANY_RATIO, "users-function"]
LEAVE_OUT = ["dppo-tv", "dppo-tv-two-sided", "dppo-tv-weight", "dppo-kl", "dppo-kl-weight"]
WEIGHTS = ["dppo-tv-weight", "dppo-kl-weight", "icepop", "icepop-narrow"]  # the ratio is a weight, held constant
JUMPS = torch.tensor([0.5, 0.7, 0.8, 1.2, 1.28, 1.3, 1.45, 1.6, 5.0])
REDUCTIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"]
