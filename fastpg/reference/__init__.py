"""The oracle: every formula of the library on full logits, written to be compared with its paper.

It is slow and large on purpose: all [N, V] logits exist, masked tokens are deleted rather than weighted, gradients are left to
autograd. It computes in the dtype of its inputs (bf16 and fp16 are widened to fp32 first). The tests feed it float64.

Notation
    z_nv  = softcap(logit_scale * (x_n . (w_v + lora_scale B_v A) + b_v)) / T_n,   softcap(u) = c tanh(u / c)
    p_nv  = exp(z_nv) / sum_w exp(z_nw)
    t_n   = logsumexp_{v != y_n} z_nv - z_n,y                 the log-odds against the sampled token y_n
    logp_n = log p_n,y = -log(1 + exp(t_n)) = logsigmoid(-t_n)
    H_n   = -sum_v p_nv log p_nv

Confident tokens stay exact because the sum leaves the target out: 1 - p_y = sigmoid(t) has full relative accuracy down to the
smallest float. `1 - exp(logp)` and `z_y - logsumexp(z)` are rounding noise beyond p_y = 0.9999 in fp32.

The gradient is the same for all losses. Let L be any function of the log-probabilities and entropies, with g_n = dL/dlogp_n and
h_n = dL/dH_n:

    dlogp_n / dz_nv = [v = y_n] - p_nv                        since d logsumexp / dz_v = p_v
    dH_n / dz_nv    = -p_nv (log p_nv + H_n)                  since dp_w / dz_v = p_w ([v = w] - p_v)
    dL / dz_nv      = g_n ([v = y_n] - p_nv) - h_n p_nv (log p_nv + H_n)

In the target column 1 - p_y is sigmoid(t). There log p_y + H equals -(1 - p_y)(t - Ho), where Ho is the entropy of the
distribution over the other tokens alone: H = p_y softplus(t) + (1 - p_y)(Ho + softplus(-t)). Then, by the chain rule,

    dL / du_nv = dL/dz_nv * (1 - tanh^2(u_nv / c)) / T_n,     u = logit_scale * (x . w + b)
    dX = logit_scale * dL/du @ W,   dW = logit_scale * dL/du^T @ X,   db = logit_scale * sum_n dL/du_n

A row of the gradient is, in essence, one number times a softmax. The whole library is about not storing that softmax.
"""

from .distribution import Statistics, linear_logprobs, logits, softcap, token_distribution, token_statistics
from .losses import kl_penalty, off_policy_sequence_mask, policy_loss, reduce, top_entropy_mask
from .objectives import (
    cispo,
    clip_cov,
    covariances,
    dppo_kl,
    dppo_tv,
    gspo,
    icepop,
    importance_weighted,
    importance_weighted_by,
    kl_cov,
    of_sequences,
    ppo_clip,
    reinforce,
    sapo,
    vespo,
)

__all__ = [
    "Statistics",
    "cispo",
    "clip_cov",
    "covariances",
    "dppo_kl",
    "dppo_tv",
    "gspo",
    "icepop",
    "importance_weighted",
    "importance_weighted_by",
    "kl_cov",
    "kl_penalty",
    "linear_logprobs",
    "logits",
    "of_sequences",
    "off_policy_sequence_mask",
    "policy_loss",
    "ppo_clip",
    "reduce",
    "reinforce",
    "sapo",
    "softcap",
    "token_distribution",
    "token_statistics",
    "top_entropy_mask",
    "vespo",
]
