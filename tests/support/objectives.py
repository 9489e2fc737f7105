"""The objectives by name: each beside the oracle's formula and a derivative written out here."""

import math

from fastpg import CISPO, GSPO, SAPO, ImportanceWeighted, PPOClip, Reinforce, reference

INF, NAN = math.inf, math.nan


def ppo_slope(low, high, dual=INF):
    """dl/dr: A where the unclipped term is chosen, 0 where a bound is."""
    return lambda r, a: 0.0 if (a > 0 and r > high) or (a < 0 and (r < low or r > dual)) else a


def sapo_slope(tau_pos, tau_neg):
    def slope(r, a):
        s = 1 / (1 + math.exp(-(tau_pos if a > 0 else tau_neg) * (r - 1)))
        return 4 * s * (1 - s) * a

    return slope


# name: (objective, the oracle's, whose ratio it has, dl/dr of that ratio as a function of r and A)
TOKEN, SEQUENCE, TRAJECTORY = "token", "sequence", "trajectory"
OBJECTIVES = {
    "reinforce": (Reinforce(), reference.reinforce, TOKEN, lambda r, a: a / r),
    "iw-token": (ImportanceWeighted(), reference.importance_weighted, TOKEN, lambda r, a: a),
    "cispo": (CISPO(1.3, 0.8), reference.cispo(1.3, 0.8), TOKEN, lambda r, a: min(max(r, 0.8), 1.3) * a / r),
    "ppo": (PPOClip(), reference.ppo_clip(0.2, 0.2), TOKEN, ppo_slope(0.8, 1.2)),
    "ppo-clip-higher": (PPOClip(0.3, 0.45), reference.ppo_clip(0.3, 0.45), TOKEN, ppo_slope(0.7, 1.45)),
    "ppo-dual": (PPOClip(0.2, 0.28, 1.6), reference.ppo_clip(0.2, 0.28, 1.6), TOKEN, ppo_slope(0.8, 1.28, 1.6)),
    "sapo": (SAPO(), reference.sapo(), TOKEN, sapo_slope(1.0, 1.05)),
    "sapo-taus": (SAPO(3.0, 0.7), reference.sapo(3.0, 0.7), TOKEN, sapo_slope(3.0, 0.7)),
    "iw-sequence": (ImportanceWeighted("sequence"), reference.importance_weighted_by("sequence"), SEQUENCE, lambda r, a: a),
    "iw-trajectory": (
        ImportanceWeighted("trajectory"),
        reference.importance_weighted_by("trajectory"),
        TRAJECTORY,
        lambda r, a: a,
    ),
    "gspo": (GSPO(0.3, 0.45), reference.gspo(0.3, 0.45), SEQUENCE, ppo_slope(0.7, 1.45)),
    "gspo-default": (GSPO(), reference.gspo(3e-4, 4e-4), SEQUENCE, ppo_slope(1 - 3e-4, 1 + 4e-4)),
}
OF_SEQUENCES = [name for name, (_, _, level, _) in OBJECTIVES.items() if level != TOKEN]
