"""The names under which TRL and verl log numbers that `Metrics` has too. (docs/pages/objectives.md has the table.)

A name stands here only if the library computes that very number. Many names that look alike are of other numbers: TRL's
`clip_ratio/region_mean` and verl's `actor/pg_clipfrac` of PPO, for one, count the tokens that the clip silences, which depends
on the sign of the advantage.
"""

from __future__ import annotations

from typing import Literal, get_args

from .batch_objectives import KLCov
from .objectives import CISPO

Library = Literal["trl", "verl"]

_NAMES: dict[str, dict[str, str]] = {
    "trl": {
        "entropy": "entropy",
        "sampling/sampling_logp_difference/mean": "mismatch_abs_mean",
        "sampling/sampling_logp_difference/max": "mismatch_abs_max",
    },
    "verl": {
        "actor/entropy": "entropy",
        "actor/ppo_kl": "kl_k1",
        "actor/pg_clipfrac": "clip_fraction",
        "rollout_corr/kl": "mismatch_kl_k1",
        "rollout_corr/k3_kl": "mismatch_kl_k3",
        "rollout_corr/chi2_token": "mismatch_chi2",
        "rollout_corr/chi2_seq": "mismatch_chi2_seq",
        "rollout_corr/rollout_is_mean": "mismatch_ratio_mean",
        "rollout_corr/rollout_is_max": "mismatch_ratio_max",
    },
}


def names_in(library: str, objective: object, *, known: bool) -> dict[str, str]:
    """The library's name -> the name here, as far as the two are one number under this objective. known: whether it is."""
    if not isinstance(library, str) or library not in get_args(Library):
        raise ValueError(f"library must be one of {', '.join(map(repr, get_args(Library)))}; got {library!r}")
    names = dict(_NAMES[library])
    if not isinstance(objective, CISPO):  # of CISPO verl counts every ratio outside the bounds, as clip_fraction does
        names.pop("actor/pg_clipfrac", None)
    if not known or isinstance(objective, KLCov):  # of kl_cov verl logs mean |d|
        names.pop("actor/ppo_kl", None)
    return names
