"""fastpg: policy-gradient losses for language models that never build the logits."""

from importlib.util import find_spec

if find_spec("fastpg.kernels") is None:
    raise ModuleNotFoundError(
        "fastpg was imported from its source checkout, where kernels/ sits outside the package. "
        "Run `pip install -e .` in the checkout, or start Python elsewhere.",
        name="fastpg.kernels",
    )

from . import advantages, rollout
from .linear.kept import Kept, kept
from .linear.linear_cross_entropy import linear_cross_entropy
from .linear.linear_logprobs import TokenLogprobs, linear_logprobs
from .linear.linear_policy_loss import LinearPolicyLoss, linear_cispo_loss, linear_policy_loss
from .linear.options import PolicyLossStatistics
from .linear.outputs import TokenStatistics
from .linear.selective_logprobs import selective_logprobs
from .linear.support import Support
from .lm_head import LMHead
from .loss.batch_objectives import VESPO, ClipCov, KLCov
from .loss.objectives import CISPO, GSPO, SAPO, ImportanceWeighted, KLPenalty, Objective, PPOClip, Reinforce
from .loss.policy_loss import PolicyLossOutput, policy_loss
from .loss.reductions import masked_mean
from .loss.token_masks import off_policy_sequence_mask, top_entropy_mask
from .loss.trust_regions import DPPOKL, DPPOTV, IcePop

__version__ = "0.1.0"

__all__ = [
    "CISPO",
    "DPPOKL",
    "DPPOTV",
    "GSPO",
    "SAPO",
    "VESPO",
    "ClipCov",
    "IcePop",
    "ImportanceWeighted",
    "KLCov",
    "KLPenalty",
    "Kept",
    "LMHead",
    "LinearPolicyLoss",
    "Objective",
    "PPOClip",
    "PolicyLossOutput",
    "PolicyLossStatistics",
    "Reinforce",
    "Support",
    "TokenLogprobs",
    "TokenStatistics",
    "advantages",
    "kept",
    "linear_cispo_loss",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_policy_loss",
    "masked_mean",
    "off_policy_sequence_mask",
    "policy_loss",
    "rollout",
    "selective_logprobs",
    "top_entropy_mask",
]
