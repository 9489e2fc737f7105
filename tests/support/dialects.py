"""The losses of other frameworks, written out in PyTorch, and a batch that takes each of them apart.

The formulas follow the sources named at each section, not this library. Left out of them, so that float64 can be compared to
1e-10: casts to fp32, the 1e-8 that verl, OpenRLHF and NeMo-RL add to lengths, and clamps of KL terms that nothing here reaches.
"""

import math
from types import SimpleNamespace

import torch
from more_dialects import areal_ppo, nemo, open_instruct, prime

F64 = torch.float64

# Unlike the defaults, so that a call that forgets an option fails.
TRL = {"epsilon": 0.2, "epsilon_high": 0.3, "max_completion_length": 9, "sapo_pos": 1.4, "sapo_neg": 2.3, "beta": 0.07}
TRL |= {"delta": 2.2, "num_items_in_batch": 120, "steps_per_generation": 4, "accumulation": 2, "num_processes": 3}
TRL |= {"k_pos": 1.5, "lambda_pos": 2.5, "k_neg": 2.5, "lambda_neg": 1.5, "entropy_coef": 0.03, "top_entropy_quantile": 0.3}
TRL |= {"off_policy_mask_threshold": 0.3}
TRL |= {"step_tokens": 60}  # of the generation batch of 120 tokens, 2 of 4 micro-batches make a step
LIGER = {"epsilon_low": 0.25, "epsilon_high": 0.35, "beta": 0.04}
VERL = {"low": 0.2, "high": 0.3, "clip_ratio_c": 3.0, "batch_num_tokens": 101, "dp_size": 2, "loss_scale_factor": 13}
VERL |= {"tau_pos": 1.2, "tau_neg": 1.7, "entropy_coeff": 0.02, "dro_beta": 0.6}
VERL |= {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 1.5, "kl_cov_ratio": 0.3, "ppo_kl_coef": 0.6}
OPENRLHF = {"eps_low": 0.15, "eps_high": 0.3, "dual_clip": 2.5}
SKYRL = {"eps_clip_low": 0.2, "eps_clip_high": 0.28, "clip_ratio_c": 2.7, "max_seq_len": 11, "prompts": 4}
SKYRL |= {"cispo_low": 0.7, "cispo_high": 1.5, "tau_pos": 1.3, "tau_neg": 1.6}
SKYRL |= {"clip_ratio": 1.0, "clip_cov_lb": 0.05, "clip_cov_ub": 1.2, "kl_cov_frac": 0.2, "ppo_kl_coef": 0.8}
SKYRL |= {"delta_low": 0.1, "delta_high": 0.15}
NEMO = {"low": 0.2, "high": 0.28, "ratio_clip_c": 2.6, "beta": 0.06, "kl_clamp": 0.7}
NEMO |= {"valid_toks": 44, "valid_seqs": 9}
PRIME = {"mask_low": 0.1, "mask_high": 0.15, "threshold": 0.12, "kl_tau": 0.02, "rl_scale": 70}
SLIME = {"eps_clip": 0.2, "eps_clip_high": 0.28, "eps_clip_c": 2.6, "opsm_delta": 0.2, "entropy_coef": 0.04}
AREAL = {"eps_clip": 0.2, "eps_clip_higher": 0.4, "c_clip": 2.4, "tau_pos": 0.9, "tau_neg": 1.9}
OI = {"clip_lower": 0.2, "clip_higher": 0.272, "beta": 0.05}
OPTIONS = {"trl": TRL, "liger": LIGER, "verl": VERL, "openrlhf": OPENRLHF}
OPTIONS |= {"skyrl": SKYRL, "nemo": NEMO, "prime": PRIME, "slime": SLIME, "areal": AREAL, "oi": OI}
OPTIONS |= {"verl-kl": VERL | {"batch_num_tokens": None, "dp_size": 1}}
# divergences, which are smaller than offsets of the ratio
OPTIONS |= {"verl-dppo-tv": VERL | {"low": 0.1, "high": 0.15, "clip_ratio_c": 1.6}}
OPTIONS |= {"verl-dppo-kl": VERL | {"low": 0.02, "high": 0.05, "clip_ratio_c": 1.6}}
OPTIONS |= {"skyrl-dppo-kl": SKYRL | {"delta_low": 0.02, "delta_high": 0.05}}
# bounds on the ratio itself
OPTIONS |= {"trl-cispo": TRL | {"epsilon_high": 1.7}, "liger-cispo": LIGER | {"epsilon_high": 1.7}}

# Rows whose advantages are one per sequence: (B,) there, or the same number at every token.
PER_SEQUENCE = ("trl", "liger", "verl-gspo", "openrlhf-gspo", "skyrl-gspo", "nemo-gspo", "slime-gspo", "areal-gspo")


def batch(name: str) -> SimpleNamespace:
    """Sequences of 6, 4 (with a hole), 1, 5, 3, 6, 2 and 0 tokens, whose ratios, and their means, leave every bound."""
    mask = torch.arange(6) < torch.tensor([6, 5, 1, 5, 3, 6, 2, 0])[:, None]
    mask[1, 2] = False
    means = torch.tensor([0.9, -0.9, -0.9, 1.5, 0.0, -0.2, 0.9, 0.0], dtype=F64)
    per_sequence = torch.tensor([1.0, 0.7, -0.6, -1.2, 0.4, -0.9, 0.8, 1.1], dtype=F64)
    logprobs = -3 * torch.rand(8, 6, dtype=F64) - 0.01
    noise = torch.where(mask, 0.6 * torch.randn(8, 6, dtype=F64), 0)
    d = means[:, None] + noise - noise.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    advantages = per_sequence[:, None].expand(8, 6)
    if not name.startswith(PER_SEQUENCE):
        advantages = advantages + torch.randn(8, 6, dtype=F64)
    prompt_of = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    prompt_tokens = torch.zeros(4, dtype=torch.long).index_add(0, prompt_of, mask.sum(1))[prompt_of][:, None].expand(8, 6)
    x = SimpleNamespace(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=(logprobs.detach() - d).clamp(max=-0.01 if "dppo" in name else None, min=-torch.inf),
        advantages=advantages,
        mask=mask,
        ref=logprobs.detach() - (6 if name == "openrlhf-kl" else 0.8) * torch.randn(8, 6, dtype=F64),
        w=2 * torch.rand(8, 6, dtype=F64),
        entropies=(1 - logprobs * torch.rand(8, 6, dtype=F64)).sqrt(),
        B=8,
        sequences=7,
        prompt_tokens=prompt_tokens.double(),
    )
    options = OPTIONS.get(name, OPTIONS[name.split("-")[0]])
    return SimpleNamespace(**vars(x), **options)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """torch.sigmoid, which they use, has the derivative s (1 - s): rounding noise where s is close to 1."""
    return 1 / (1 + torch.exp(-x))


# ---- TRL: trl/trainer/grpo_trainer.py, _compute_loss; Liger: src/liger_kernel/chunked_loss/grpo_loss.py, ppo_loss_fn


def trl_phi(x, advantages, log_ratio, mask):
    """get_gamma_weights, without a sampler's ratios."""
    seq_log_ratio = torch.sum(torch.clamp(log_ratio, -20.0, 20.0) * mask, dim=-1, keepdim=True)
    log_w = torch.clamp(seq_log_ratio, math.log(1e-8), 20.0)
    k, decay = (
        torch.where(advantages >= 0, *torch.tensor(pair, dtype=F64))
        for pair in ((x.k_pos, x.k_neg), (x.lambda_pos, x.lambda_neg))
    )
    return torch.exp(decay + k * log_w - decay * torch.exp(log_w)).detach()


def trl_low_kl(x, advantages, mask):
    """get_off_policy_mask"""
    kl = ((x.old_logprobs - x.logprobs.detach()) * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1.0)
    return (advantages >= 0) | (kl <= x.off_policy_mask_threshold)


def trl(loss_type, level="token", *, delta=False, kl=False, unbiased_kl=False, vllm=False, opsm=False, top=False, bonus=False):
    def loss(x):
        advantages, mask = x.advantages[:, :1], x.mask.double()
        log_ratio = x.logprobs - x.old_logprobs
        if level == "sequence":
            log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
        coef_1 = torch.exp(log_ratio)
        per_token_kl = torch.exp(x.ref - x.logprobs) - (x.ref - x.logprobs) - 1
        if unbiased_kl:
            per_token_kl = per_token_kl * coef_1
        if loss_type == "cispo":
            per_token = -torch.clamp(coef_1, max=x.epsilon_high).detach() * advantages * x.logprobs
        elif loss_type == "sapo":
            temperatures = torch.where(advantages > 0, *torch.tensor([x.sapo_pos, x.sapo_neg], dtype=F64))
            per_token = -sigmoid(temperatures * (coef_1 - 1)) * 4 / temperatures * advantages
        elif loss_type == "vespo":
            per_token = -trl_phi(x, advantages, log_ratio, mask) * advantages * x.logprobs
        else:
            coef_2 = torch.clamp(coef_1, 1 - x.epsilon, 1 + x.epsilon_high)
            if delta:
                coef_1 = torch.clamp(coef_1, max=x.delta)
            per_token = -torch.min(coef_1 * advantages, coef_2 * advantages)
        if opsm:
            per_token = per_token * trl_low_kl(x, advantages, mask)
        if top:  # get_high_entropy_mask
            per_token = per_token * (x.entropies >= torch.quantile(x.entropies[x.mask], 1 - x.top_entropy_quantile))
        if vllm:
            per_token = per_token * x.w
        if kl:
            per_token = per_token + x.beta * per_token_kl
        if loss_type == "luspo":
            return (per_token * mask.sum(1, keepdim=True)).mean()
        if loss_type in ("grpo", "sapo"):
            return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
        if loss_type == "bnpo":
            entropy = (x.entropies * mask).sum() / mask.sum().clamp(min=1.0)
            return (per_token * mask).sum() / mask.sum().clamp(min=1.0) - bonus * x.entropy_coef * entropy
        if loss_type == "dr_grpo":
            return (per_token * mask).sum() / (per_token.size(0) * x.max_completion_length)
        normalizer = x.num_items_in_batch / x.num_processes * x.accumulation / x.steps_per_generation
        return (per_token * mask).sum() / normalizer

    return loss


def liger(loss_type, *, kl=False):
    def loss(x):
        advantages, mask = x.advantages[:, :1], x.mask.double()
        coef_1 = torch.exp(x.logprobs - x.old_logprobs)
        if loss_type == "cispo":
            per_token = -torch.clamp(coef_1, None, x.epsilon_high).detach() * advantages * x.logprobs
        else:
            coef_2 = torch.clamp(coef_1, 1 - x.epsilon_low, 1 + x.epsilon_high)
            per_token = -torch.min(coef_1 * advantages, coef_2 * advantages)
        if kl:
            per_token = per_token + x.beta * (torch.exp(x.ref - x.logprobs) - (x.ref - x.logprobs) - 1.0)
        return (per_token * mask).sum() / mask.sum()  # of one process

    return loss


# ---- verl: verl/trainer/ppo/core_algos.py, agg_loss and compute_policy_loss_*; the KL term: verl/workers/utils/losses.py


def verl_agg(values, x, mode):
    if mode == "token-mean":
        return values[x.mask].sum() / (x.batch_num_tokens or x.mask.sum()) * x.dp_size
    if mode == "token-sum":
        return values[x.mask].sum() * x.dp_size
    lengths, sums = x.mask.sum(-1), (values * x.mask).sum(-1)
    present = lengths > 0
    if mode == "seq-mean-token-mean":
        return (sums[present] / lengths[present]).sum() / present.sum()
    loss = sums[present].sum() / present.sum()
    return loss / x.loss_scale_factor if mode == "seq-mean-token-sum-norm" else loss


def verl_vanilla(mode, *, kl=False):
    def loss(x):
        ratio = torch.exp(torch.clamp(x.logprobs - x.old_logprobs, min=-20.0, max=20.0))
        losses1 = -x.advantages * ratio
        losses2 = -x.advantages * torch.clamp(ratio, 1 - x.low, 1 + x.high)
        clipped1 = torch.maximum(losses1, losses2)
        clipped2 = torch.min(-x.advantages * x.clip_ratio_c, clipped1)
        losses = torch.where(x.advantages < 0, clipped2, clipped1)
        if not kl:
            return verl_agg(losses, x, mode)
        low_var_kl = torch.exp(x.ref - x.logprobs) - (x.ref - x.logprobs) - 1
        return verl_agg(losses * x.w, x, mode) + verl_agg(low_var_kl, x, mode) * 0.001

    return loss


def verl_gspo(x):
    d = x.logprobs - x.old_logprobs
    mean = (d * x.mask).sum(-1) / x.mask.sum(-1).clamp(min=1)
    log_ratio = x.logprobs - x.logprobs.detach() + mean.detach().unsqueeze(-1)
    ratio = torch.exp(torch.clamp(log_ratio, max=10.0))
    losses = torch.maximum(-x.advantages * ratio, -x.advantages * torch.clamp(ratio, 1 - x.low, 1 + x.high))
    return verl_agg(losses, x, "seq-mean-token-mean")


def verl_entropy(x):
    """verl/workers/utils/losses.py: the entropies are reduced as the loss is."""
    mode = "seq-mean-token-mean"
    return verl_vanilla(mode)(x) - x.entropy_coeff * verl_agg(x.entropies, x, mode)


def clip_cov(x, ratio, low, high):
    """The same in verl and SkyRL. With a ratio of 1 all candidates are drawn."""
    assert ratio == 1.0
    r = torch.exp(x.logprobs - x.old_logprobs)
    losses1, losses2 = -x.advantages * r, -x.advantages * torch.clamp(r, 1 - low, 1 + high)
    centred = [v - v.detach()[x.mask].sum() / x.mask.sum() for v in (x.advantages, x.logprobs)]
    cov = (centred[0] * centred[1]).detach()
    drawn = (cov < x.clip_cov_ub) & (cov > x.clip_cov_lb) & x.mask & ~(losses2 > losses1)
    assert 0 < drawn.sum() < x.mask.sum()
    return torch.maximum(losses1, losses2) * ~drawn


def kl_cov(x, ratio):
    """The same in verl and SkyRL."""
    d = x.logprobs - x.old_logprobs
    a, logp = x.advantages[x.mask], x.logprobs.detach()[x.mask]
    cov = (a - a.mean()) * (logp - logp.mean())
    places = x.mask.flatten().nonzero()[:, 0][torch.topk(cov, max(1, int(len(cov) * ratio))).indices]
    chosen = torch.zeros(d.numel(), dtype=F64).index_fill(0, places, 1).view(d.shape)
    return -x.advantages * torch.exp(d) + chosen * x.ppo_kl_coef * d.abs()


def verl_dppo(divergence):
    def loss(x):
        ratio = torch.exp(torch.clamp(x.logprobs - x.old_logprobs, min=-20.0, max=20.0))
        truncated = torch.clamp(ratio, max=x.clip_ratio_c).detach()
        prob, old_prob = torch.exp(x.logprobs), torch.exp(x.old_logprobs)
        if divergence == "tv":
            valid_positive, valid_negative = (prob - old_prob) <= x.high, (prob - old_prob) >= -x.low
        else:
            others = torch.log((1.0 - old_prob + 1e-8) / (1.0 - prob + 1e-8))
            binary_kl = old_prob * (x.old_logprobs - x.logprobs) + (1 - old_prob) * others
            valid_positive = (binary_kl <= x.high) | (prob <= old_prob)
            valid_negative = (binary_kl <= x.low) | (prob >= old_prob)
        valid = torch.where(x.advantages > 0, valid_positive, valid_negative).detach().double()
        return verl_agg(-x.advantages * truncated * x.logprobs * valid, x, "token-mean")

    return loss


def verl_dro(x):
    log_ratio = x.logprobs - x.old_logprobs
    return token_mean(-(x.logprobs * x.advantages - 0.5 * x.dro_beta * log_ratio.square()), x)


def sapo_gate(x):
    """The same in verl, SkyRL and AReaL."""
    ratio = torch.exp(torch.clamp(x.logprobs - x.old_logprobs, min=-20.0, max=20.0))
    tau = torch.where(x.advantages > 0, *torch.tensor([x.tau_pos, x.tau_neg], dtype=F64))
    return sigmoid(tau * (ratio - 1.0)) * (4.0 / tau)


def cispo_losses(x, low, high):
    """The same in verl, SkyRL, slime and AReaL: offsets from 1."""
    ratio = torch.exp(torch.clamp(x.logprobs - x.old_logprobs, min=-20.0, max=20.0))
    return -torch.clamp(ratio, 1 - low, 1 + high).detach() * x.advantages * x.logprobs


def token_mean(values, x):
    return values[x.mask].sum() / x.mask.sum()


# ---- OpenRLHF: openrlhf/models/loss.py, PolicyLoss; the KL term: openrlhf/trainer/ray/ppo_actor.py


def openrlhf(mode="token-mean", policy_loss_type="ppo", *, dual_clip=True, kl=False):
    def loss(x):
        mask = x.mask.double()
        log_ratio = x.logprobs - x.old_logprobs
        if policy_loss_type == "gspo":
            ratio = (log_ratio * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)
            ratio = ratio.exp().unsqueeze(-1) * mask
        else:
            ratio = log_ratio.clamp(min=-20.0, max=20.0).exp()
        surr1, surr2 = ratio * x.advantages, ratio.clamp(1 - x.eps_low, 1 + x.eps_high) * x.advantages
        clip1 = torch.min(surr1, surr2)
        losses = -torch.where(x.advantages < 0, torch.max(clip1, x.dual_clip * x.advantages), clip1) if dual_clip else -clip1
        if kl:
            k2 = ((x.logprobs - x.ref) ** 2 / 2.0).clamp(min=-10, max=10)
            return token_mean(losses * x.w, x) + token_mean(k2, x) * 0.01
        if mode == "token-mean":
            return token_mean(losses, x)
        lengths = mask.sum(dim=-1)
        return ((losses * mask).sum(dim=-1)[lengths > 0] / lengths[lengths > 0]).mean()

    return loss


# ---- SkyRL: skyrl/backends/skyrl_train/utils/ppo_utils.py; advantages are scaled first, then per-token losses are summed


def skyrl_scaled(x, reduction):
    rows = x.mask.shape[0]
    if reduction == "token_mean":
        return x.advantages / x.mask.sum().clamp(min=1)
    if reduction == "sequence_mean":
        return x.advantages / (rows * x.mask.sum(dim=-1, keepdim=True).clamp(min=1))
    if reduction == "seq_mean_token_sum_norm":
        return x.advantages / (rows * x.max_seq_len)
    prompts = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]  # prompt_mean
    return torch.cat([x.advantages[p] / (len(prompts) * x.mask[p].sum()) for p in prompts])


def skyrl_ppo(reduction, *, dual_clip=False):
    def loss(x):
        advantages = skyrl_scaled(x, reduction)
        ratio = torch.clamp(x.logprobs - x.old_logprobs, -20.0, 20.0).exp()
        losses = -torch.min(ratio * advantages, ratio.clamp(1 - x.eps_clip_low, 1 + x.eps_clip_high) * advantages)
        if dual_clip:
            losses = torch.where(advantages < 0, torch.min(-advantages * x.clip_ratio_c, losses), losses)
        return (losses * x.mask).sum()

    return loss


def skyrl_gspo(x):
    advantages = skyrl_scaled(x, "sequence_mean")
    d = x.logprobs - x.old_logprobs
    mean = ((d * x.mask).sum(-1) / x.mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    ratio = torch.exp(torch.clamp(x.logprobs - x.logprobs.detach() + mean.detach(), max=10))
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - x.eps_clip_low, 1 + x.eps_clip_high) * advantages)
    return (losses * x.mask).sum()


def skyrl_sapo(x):
    return (-sapo_gate(x) * skyrl_scaled(x, "sequence_mean") * x.mask).sum()


def skyrl_is(x):
    return (-(torch.exp(x.logprobs - x.old_logprobs) * x.advantages) * x.mask).sum()


def skyrl_dppo(dppo_type):
    def loss(x):
        advantages, ratio = skyrl_scaled(x, "token_mean"), torch.clamp(x.logprobs - x.old_logprobs, -20.0, 20.0).exp()
        with torch.no_grad():
            current, mu = torch.exp(x.logprobs), torch.exp(x.old_logprobs)
            difference, mask = current - mu, torch.ones_like(advantages)
            if dppo_type == "binary_tv":
                mask[(advantages > 0) & (difference > x.delta_high)] = 0.0
                mask[(advantages < 0) & (-difference > x.delta_low)] = 0.0
            else:
                others = torch.log((1 - mu + 1e-8) / (1 - current + 1e-8))
                binary_kl = mu * (x.old_logprobs - x.logprobs) + (1 - mu) * others
                mask[(advantages > 0) & (difference > 0) & (binary_kl > x.delta_high)] = 0.0
                mask[(advantages < 0) & (difference < 0) & (binary_kl > x.delta_low)] = 0.0
        return (-(ratio * advantages * mask) * x.mask).sum()

    return loss


def skyrl_rollout_is(x):
    ratio = torch.clamp(x.logprobs - x.old_logprobs, -20.0, 20.0).exp()
    in_range = (ratio > 1 - x.eps_clip_low) & (ratio < 1 + x.eps_clip_high)
    calibrated = torch.where(in_range, ratio, torch.zeros_like(ratio))
    return (-(calibrated.detach() * skyrl_scaled(x, "token_mean") * x.logprobs) * x.mask).sum()


# ---- slime: slime/utils/ppo_utils.py; the reduction: slime/backends/megatron_utils/loss.py and cp_utils.py


def slime_reduced(values, x, per_token=False):
    if per_token:
        return sum((v * m).sum() for v, m in zip(values, x.mask, strict=True)) / sum(m.sum() for m in x.mask)
    samples = sum((v * m).sum() / torch.clamp_min(m.sum(), 1) for v, m in zip(values, x.mask, strict=True))
    return samples / x.mask.shape[0]  # step_global_batch_size


def opsm_mask(x):
    """compute_opsm_mask: a token's own advantage, and its sequence's KL."""
    kl = [
        (k * m).sum() / torch.clamp_min(m.sum(), 1) for k, m in zip(x.old_logprobs - x.logprobs.detach(), x.mask, strict=True)
    ]
    return 1 - ((x.advantages < 0) & (torch.stack(kl)[:, None] > x.opsm_delta)).double()


def slime(estimator="grpo", *, dual_clip=False, per_token=False, kl=False, opsm=False, bonus=False):
    def loss(x):
        ppo_kl = x.old_logprobs - x.logprobs
        if estimator == "gspo":
            per_sequence = [(k * m).sum() / torch.clamp_min(m.sum(), 1) for k, m in zip(ppo_kl, x.mask, strict=True)]
            ppo_kl = torch.stack(per_sequence)[:, None].expand_as(ppo_kl)
        ratio = (-ppo_kl).exp()
        clipped = -ratio.clamp(1 - x.eps_clip, 1 + x.eps_clip_high) * x.advantages
        losses = torch.maximum(-ratio * x.advantages, clipped)
        if dual_clip:
            losses = torch.where(x.advantages < 0, torch.min(-x.eps_clip_c * x.advantages, losses), losses)
        if opsm:
            losses = losses * opsm_mask(x)
        if bonus:
            return slime_reduced(losses, x) - x.entropy_coef * slime_reduced(x.entropies, x)
        if kl:  # use_tis, use_unbiased_kl with kl_loss_type="k1"
            k1 = torch.exp(x.logprobs - x.old_logprobs) * (x.logprobs - x.ref)
            return token_mean(losses * x.w, x) + 0.1 * token_mean(k1, x)
        return slime_reduced(losses, x, per_token)

    return loss


THEIRS = {
    "trl-grpo": trl("grpo"),
    "trl-bnpo": trl("bnpo"),
    "trl-dr_grpo": trl("dr_grpo"),
    "trl-dapo": trl("dapo"),
    "trl-cispo": trl("cispo"),
    "trl-gspo": trl("grpo", "sequence"),
    "trl-sapo": trl("sapo"),
    "trl-luspo": trl("luspo", "sequence"),
    "trl-vespo": trl("vespo"),
    "trl-opsm": trl("bnpo", opsm=True),
    "trl-top-entropy": trl("bnpo", top=True, vllm=True),
    "trl-entropy": trl("bnpo", bonus=True),
    "trl-delta": trl("bnpo", delta=True),
    "trl-beta": trl("bnpo", kl=True, vllm=True),
    "trl-unbiased-kl": trl("bnpo", kl=True, unbiased_kl=True),
    "liger-dapo": liger("dapo", kl=True),
    "liger-cispo": liger("cispo"),
    "verl-vanilla": verl_vanilla("token-mean"),
    "verl-token-sum": verl_vanilla("token-sum"),
    "verl-seq-sum": verl_vanilla("seq-mean-token-sum"),
    "verl-seq-mean": verl_vanilla("seq-mean-token-mean"),
    "verl-seq-norm": verl_vanilla("seq-mean-token-sum-norm"),
    "verl-gspo": verl_gspo,
    "verl-sapo": lambda x: verl_agg(-sapo_gate(x) * x.advantages, x, "seq-mean-token-mean"),
    "verl-cispo": lambda x: token_mean(cispo_losses(x, x.low, x.high), x),
    "verl-clip-cov": lambda x: token_mean(clip_cov(x, x.clip_cov_ratio, x.low, x.high), x),
    "verl-kl-cov": lambda x: token_mean(kl_cov(x, x.kl_cov_ratio) * x.w, x),
    "verl-entropy": verl_entropy,
    "verl-gpg": lambda x: token_mean(-x.logprobs * x.advantages, x),
    "verl-kl": verl_vanilla("token-mean", kl=True),
    "verl-dppo-tv": verl_dppo("tv"),
    "verl-dppo-kl": verl_dppo("kl"),
    "verl-dro": verl_dro,
    "openrlhf-ppo": openrlhf(),
    "openrlhf-seq-mean": openrlhf("seq-mean-token-mean"),
    "openrlhf-gspo": openrlhf("seq-mean-token-mean", "gspo", dual_clip=False),
    "openrlhf-kl": openrlhf(dual_clip=False, kl=True),
    "skyrl-regular": skyrl_ppo("token_mean"),
    "skyrl-dual_clip": skyrl_ppo("token_mean", dual_clip=True),
    "skyrl-seq-norm": skyrl_ppo("seq_mean_token_sum_norm"),
    "skyrl-prompt-mean": skyrl_ppo("prompt_mean"),
    "skyrl-gspo": skyrl_gspo,
    "skyrl-sapo": skyrl_sapo,
    "skyrl-cispo": lambda x: token_mean(cispo_losses(x, x.cispo_low, x.cispo_high), x),
    "skyrl-is": skyrl_is,
    "skyrl-clip-cov": lambda x: token_mean(clip_cov(x, x.clip_ratio, x.eps_clip_low, x.eps_clip_high), x),
    "skyrl-kl-cov": lambda x: token_mean(kl_cov(x, x.kl_cov_frac), x),
    "skyrl-dppo-tv": skyrl_dppo("binary_tv"),
    "skyrl-dppo-kl": skyrl_dppo("binary_kl"),
    "skyrl-rollout-is": skyrl_rollout_is,
    "nemo-clip": nemo(dual_clip=True),
    "nemo-seq": nemo(token_level=False),
    "nemo-gspo": nemo(token_level=False, sequence=True),
    "nemo-cispo": nemo(cispo=True),
    "nemo-reinforce": nemo(ratio=False),
    "nemo-kl": nemo(kl=True),
    "prime-default": prime(),
    "prime-ipo": prime(ipo=True),
    "slime-grpo": slime(dual_clip=True),
    "slime-per-token": slime(dual_clip=True, per_token=True),
    "slime-gspo": slime("gspo"),
    "slime-cispo": lambda x: slime_reduced(cispo_losses(x, x.eps_clip, x.eps_clip_high), x),
    "slime-opsm": slime(opsm=True),
    "slime-entropy": slime(bonus=True),
    "slime-kl": slime(kl=True),
    "areal-ppo": areal_ppo(decoupled=True),
    "areal-gspo": areal_ppo("sequence"),
    "areal-sapo": lambda x: token_mean(-sapo_gate(x) * x.advantages, x),
    "areal-cispo": lambda x: token_mean(cispo_losses(x, x.eps_clip, x.eps_clip_higher), x),
    "oi-dapo": open_instruct(rho=True, kl_estimator=2),
    "oi-constant": open_instruct(denominator=1000),
    "oi-cispo": open_instruct("cispo"),
    "oi-kl-3": open_instruct(kl_estimator=3),
}
