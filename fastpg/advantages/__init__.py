"""Returns and advantages: from rewards to the number A that multiplies the log-probability of a token (or sequence).

| function            | A                                                           | use it                                   |
|---------------------|-------------------------------------------------------------|------------------------------------------|
| reward_to_go        | G_t = sum_{k>=t} gamma^(k-t) r_k                            | with dense rewards, or under a baseline  |
| value_baseline, gae | G_t - V(s_t), and its lambda-weighted form                  | with a value model                       |
| grpo, rloo          | (R - mean) / std, or R - mean, over the samples of a prompt | with several samples per prompt          |
| grpo, std="batch"   | (R - mean of the prompt) / (std of the batch)               | the same, without small stds' weight     |
| reinforce_plus_plus | (R - mean) / std over the batch                             | with one sample a prompt, similar tasks  |
| gigpo               | grpo of episodes + w (grpo of steps from equal states)      | in environments whose states recur       |
| vineppo             | r_i + V(s_{i+1}) - V(s_i) per step, V from fresh rollouts   | where credit is worth K rollouts a step  |

Why a baseline may contain the sample's own reward: the mean over B samples contains R_i / B, and its other terms do not depend
on sample i's actions. So R_i - mean has the expected gradient of (1 - 1/B) R_i: the exact one times (B - 1) / B, without bias.
`rloo` leaves R_i out and needs no factor. Dividing by the std does bias: the std depends on the action, and it multiplies.

Rules of all functions:
ids: integers in any order. Groups may have any size and need not be contiguous.
layout: sequences are (B, T) with a mask, or packed (N,) with sequence_ids. The tokens of a sequence are in order; tokens of
    others may stand between them.
mask: masked values never reach the arithmetic and get 0. Masking equals deleting.
results: constants, float64 if an input is, else float32; integers and bools are converted. Empty in, empty out.
statistics: two-pass, in float64. Equal rewards give exactly 0, whatever the rounding of their mean.
singleton: a group of one has no baseline. It gets 0, or is an error with "raise". (Some frameworks return the raw reward.)
nan: with "propagate" (and in functions without this keyword) all that depends on a NaN reward is NaN. With "raise" it is an
    error. With "ignore" it counts in no statistic and gets 0 (as in TRL). Rewards that are all NaN are always an error.
errors: arguments that do not fit raise a TypeError or ValueError with the argument's name, before any work.
"""

from .checks import OnNaN, OnSingleton
from .groups import gigpo, grpo, reinforce_plus_plus, rloo
from .returns import discount_weights, gae, monte_carlo_values, reward_to_go, spread, value_baseline, vineppo

__all__ = [
    "OnNaN",
    "OnSingleton",
    "discount_weights",
    "gae",
    "gigpo",
    "grpo",
    "monte_carlo_values",
    "reinforce_plus_plus",
    "reward_to_go",
    "rloo",
    "spread",
    "value_baseline",
    "vineppo",
]
