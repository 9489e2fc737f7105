"""Losses of other frameworks with their corrections for the sampler, written out in PyTorch, and a batch that takes each apart.

The formulas follow the sources named at each section, not this library. Left out of them, so that float64 can be compared to
1e-10: casts to fp32, the 1e-8 that verl and NeMo-RL add to counts, and replacements of NaN and infinities, of which there are
none. All of them multiply PPO's clipped loss of log-probabilities `logprobs` against `old`, unless a row says otherwise.
"""

from types import SimpleNamespace

import torch

F64 = torch.float64

# Unlike the defaults, so that a call that forgets an option fails.
TRL = {"clip_min": 0.7, "clip_max": 1.5, "off_policy_mask_threshold": 0.12}
VERL = {"threshold": 1.3, "lower": 0.75, "upper": 1.6, "limit": 0.06}
SKYRL = {"token_tis_ratio_clip_high": 1.4, "sequence_tis_ratio_clip_high": 1.7, "geo_mask_low": 0.8, "geo_mask_high": 1.2}
SKYRL |= {"product_mask_low": 0.5, "product_mask_high": 2.5, "outlier_low": 0.02, "outlier_high": 3.0}
SKYRL |= {"token_mask_low": 0.6, "token_mask_high": 1.8}
OPENRLHF = {"low": 0.8, "high": 1.3}
NEMO = {"ratio_min": 0.75, "ratio": 1.4}
SLIME = {"tis_clip_low": 0.6, "tis_clip": 1.5, "tis_lower_bound": 0.7, "tis_upper_bound": 1.45}
SLIME |= {"rs_lower_bound": 0.8, "rs_upper_bound": 1.25, "rs_veto_threshold": 0.02}
PRIME = {"dppo_mask_low": 0.04, "dppo_mask_high": 0.03, "ipo_threshold": 0.05, "kl_tau": 0.3, "rl_scale": 57}
AREAL = {"lower": 0.7, "upper": 1.5, "limit": 0.06}
OPTIONS = {"trl": TRL, "verl": VERL, "skyrl": SKYRL, "openrlhf": OPENRLHF, "nemo": NEMO}
OPTIONS |= {"slime": SLIME, "prime": PRIME, "areal": AREAL}
OPTIONS |= {"verl-sum-k3": VERL | {"limit": 0.4}}


def batch(name: str) -> SimpleNamespace:
    """Sequences of 6, 4 (with a hole), 1, 5, 3, 6, 2 and 0 tokens. `rollout` are the log-probabilities of the engine.

    Ratios of tokens, sequences and geometric means leave every bound on both sides; one token has the ratio 0.01.
    """
    mask = torch.arange(6) < torch.tensor([6, 5, 1, 5, 3, 6, 2, 0])[:, None]
    mask[1, 2] = False
    means = torch.tensor([0.3, -0.4, -0.1, 0.02, 0.5, -0.02, 0.1, 0.0], dtype=F64)
    old = -2 * torch.rand(8, 6, dtype=F64) - 0.05
    noise = torch.where(mask, 0.35 * torch.randn(8, 6, dtype=F64), 0)
    d = means[:, None] + noise - noise.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    d[3, 1] = -4.6
    advantages = torch.tensor([1.0, 0.7, -0.6, -1.2, 0.4, -0.9, 0.8, 1.1], dtype=F64)
    logprobs = old + 0.2 * torch.randn(8, 6, dtype=F64)
    x = SimpleNamespace(
        logprobs=logprobs.requires_grad_(),
        old=old,
        rollout=old - d,
        advantages=advantages,
        A=advantages[:, None],
        mask=mask,
        B=8,
    )
    return SimpleNamespace(**vars(x), **OPTIONS[name.split("-")[0]], eps=0.2)


def ppo(x):
    ratio = torch.exp(x.logprobs - x.old)
    return -torch.min(ratio * x.A, ratio.clamp(1 - x.eps, 1 + x.eps) * x.A)


def token_mean(values, x):
    """Over all tokens, those of weight 0 included."""
    return (values * x.mask).sum() / x.mask.sum()


def kept_mean(values, keep):
    """Over the tokens that are left."""
    return values[keep].sum() / keep.sum()


def lengths(x):
    return x.mask.sum(-1, keepdim=True).clamp(min=1)


# ---- TRL: trl/trainer/grpo_trainer.py, _generate_and_score_completions and _compute_loss, loss_type="bnpo"


def trl(mode):
    def loss(x):
        difference = (x.old - x.rollout) * x.mask
        if mode.startswith("sequence"):
            difference = difference.sum(dim=-1, keepdim=True)
        ratio = torch.exp(difference)
        if mode.endswith("truncate"):
            ratio = torch.clamp(ratio, min=x.clip_min, max=x.clip_max)
        else:
            ratio = ratio.masked_fill((ratio < x.clip_min) | (ratio > x.clip_max), 0.0)
        return token_mean(ppo(x) * ratio, x)

    return loss


def trl_decoupled(x):
    """mode "sequence_mask", the default, with clip_max = 3.0 alone: the weight of a sequence beside PPO's ratio to old."""
    ratio = torch.exp(((x.old - x.rollout) * x.mask).sum(dim=-1, keepdim=True))
    return token_mean(ppo(x) * ratio.masked_fill(ratio > x.clip_max, 0.0), x)


def trl_off_policy_mask(x):
    """get_off_policy_mask: of the current log-probabilities."""
    divergence = ((x.rollout - x.logprobs.detach()) * x.mask).sum(dim=1, keepdim=True) / lengths(x)
    return token_mean(ppo(x) * ((x.A >= 0) | (divergence <= x.off_policy_mask_threshold)), x)


# ---- verl: verl/trainer/ppo/rollout_corr_helper.py; the rejected tokens leave response_mask, and so the denominator


def verl_weights(x, level, numerator="old"):
    log_ratio = getattr(x, numerator).detach() - x.rollout
    if level == "sequence":
        log_ratio = (log_ratio * x.mask).sum(-1, keepdim=True).expand(8, 6)
    return (torch.exp(torch.clamp(log_ratio, min=-20.0, max=20.0)) * x.mask).clamp(max=x.threshold)


def verl_kept(x, option):
    level, _, estimator = option.rpartition("_")
    log_ratio = torch.clamp(x.old - x.rollout, min=-20.0, max=20.0)
    statistic = {"k1": -log_ratio, "k2": 0.5 * log_ratio**2, "k3": torch.exp(log_ratio) - 1.0 - log_ratio}[estimator]
    if level == "seq_max":
        statistic = statistic.masked_fill(~x.mask, -torch.inf).max(-1, keepdim=True).values
    elif level != "token":
        statistic = (statistic * x.mask).sum(-1, keepdim=True)
        statistic = statistic / lengths(x) if level == "seq_mean" else statistic
    if estimator == "k1":
        low, high = torch.tensor([x.lower, x.upper], dtype=F64).log()
        return x.mask & (statistic >= low) & (statistic <= high)
    return x.mask & (statistic <= x.limit)


def verl(level=None, option=None, *, normalised=False):
    def loss(x):
        weights = 1.0 if level is None else verl_weights(x, level)
        if normalised:
            weights = weights / (weights.sum() / x.mask.sum())
        return kept_mean(ppo(x) * weights, x.mask if option is None else verl_kept(x, option))

    return loss


def verl_bypass(x):
    """bypass_mode with loss_type="reinforce": weights of the current policy, without a gradient."""
    return kept_mean(-x.A * x.logprobs * verl_weights(x, "sequence", "logprobs"), x.mask)


# ---- SkyRL: skyrl/backends/skyrl_train/utils/off_policy_correction_utils.py; advantages were divided by all tokens before


def skyrl(option):
    def loss(x):
        losses, mask = ppo(x) / x.mask.sum(), x.mask.double()
        log_ratio = x.old - x.rollout
        ratio = torch.clamp(log_ratio, -20.0, 20.0).exp()
        total = (log_ratio * mask).sum(-1, keepdim=True)
        product, geometric = torch.clamp(total, -20, 20).exp(), torch.clamp(total / lengths(x), -20, 20).exp()
        if option == "token":
            losses = losses * torch.clamp(ratio, max=x.token_tis_ratio_clip_high)
        elif option == "sequence":
            losses = losses * torch.clamp(product, max=x.sequence_tis_ratio_clip_high)
        elif option == "geometric":
            mask = mask * (~(geometric > x.geo_mask_high) & ~(geometric < x.geo_mask_low))
        elif option == "product":
            mask = mask * (~(product > x.product_mask_high) & ~(product < x.product_mask_low))
        elif option == "outlier":
            in_bounds = ~(ratio > x.outlier_high) & ~(ratio < x.outlier_low)
            mask = mask * (in_bounds | (mask == 0)).all(dim=-1, keepdim=True)
        else:
            mask = mask * ((ratio >= x.token_mask_low) & (ratio <= x.token_mask_high))
        return (losses * mask).sum()

    return loss


# ---- OpenRLHF: openrlhf/models/loss.py, PolicyLoss


def openrlhf(kind):
    def loss(x):
        log_ratio = x.old - x.rollout
        weights = torch.exp(log_ratio)
        if kind == "icepop":
            weights = weights * ((weights >= x.low) & (weights <= x.high))
        elif kind == "seq-mask-tis":
            mean = torch.exp((log_ratio * x.mask).sum(-1, keepdim=True) / lengths(x))
            weights = ((mean >= x.low) & (mean <= x.high)) * weights
        else:
            weights = weights.clamp(min=x.low, max=x.high)
        return token_mean(weights * ppo(x), x)

    return loss


# ---- NeMo-RL: nemo_rl/algorithms/loss/loss_functions.py, ClippedPGLossFn


def nemo(kind):
    def loss(x):
        weights = torch.exp(x.old - x.rollout)
        if kind == "tis":
            weights = torch.clamp(weights, min=x.ratio_min, max=x.ratio)
        elif kind == "icepop":
            weights = torch.where((weights >= x.ratio_min) & (weights <= x.ratio), weights, 0.0)
        else:
            mean = torch.exp(((x.old - x.rollout) * x.mask).sum(-1) / lengths(x)[:, 0])
            weights = weights * ((mean >= x.ratio_min) & (mean <= x.ratio)).unsqueeze(-1)
        return token_mean(weights * ppo(x), x)

    return loss


def nemo_sequence(x):
    """sequence_level_importance_ratios: both ratios are of sequences, the policy's a geometric mean."""
    mask = x.mask.double()
    weights = torch.exp(((x.old - x.rollout) * mask).sum(-1)).unsqueeze(-1).clamp(min=0.0, max=x.ratio)
    ratio = (((x.logprobs - x.old) * mask).sum(-1, keepdim=True) / lengths(x)).exp().repeat(1, 6)
    losses = torch.max(-x.A * ratio, -x.A * ratio.clamp(1.0 - x.eps, 1.0 + x.eps))
    return ((weights * losses * mask).sum(-1) / lengths(x)[:, 0]).sum() / x.B


# ---- slime: slime/backends/megatron_utils/loss.py, examples/train_infer_mismatch_helper/mis.py; denominators are of all tokens


def slime(tis_mode, level="token", *, rs_level=None, veto=False, normalised=False):
    def loss(x):
        def aggregated(log_ratio, mask, level):
            if level == "token":
                return log_ratio
            total = (log_ratio * mask).sum()
            return (total if level == "sequence" else total / mask.sum().clamp(min=1)).expand_as(log_ratio)

        samples, all_weights = [], []
        for old, rollout, counts in zip(x.old, x.rollout, x.mask.double(), strict=True):
            log_ratio, mask = old - rollout, counts
            weights = torch.exp(torch.clamp(aggregated(log_ratio, counts, level), min=-20.0, max=20.0))
            if tis_mode == "vanilla":
                weights = torch.clamp(weights, min=x.tis_clip_low, max=x.tis_clip)
            elif tis_mode == "icepop":
                weights = torch.where((weights >= x.tis_clip_low) & (weights <= x.tis_clip), weights, 0.0)
            elif tis_mode == "truncate":
                weights = weights.clamp(0, x.tis_upper_bound) * counts
            elif tis_mode == "clip":
                weights = weights.clamp(x.tis_lower_bound, x.tis_upper_bound) * counts
            else:
                mask = mask * ((weights >= x.tis_lower_bound) & (weights <= x.tis_upper_bound))
            if rs_level is not None:
                ratio = torch.exp(aggregated(log_ratio, counts, rs_level))
                mask = mask * ((ratio >= x.rs_lower_bound) & (ratio <= x.rs_upper_bound))
            if veto:
                catastrophic = (log_ratio < torch.tensor(x.rs_veto_threshold, dtype=F64).log()) & counts.bool()
                mask = mask * (~catastrophic.any())
            samples.append(mask)
            all_weights.append(weights)
        weights, kept = torch.stack(all_weights), torch.stack(samples)
        if normalised:
            weights = weights / ((weights * x.mask).sum() / x.mask.sum())
        return ((ppo(x) * weights * kept).sum(-1) / lengths(x)[:, 0]).sum() / x.B

    return loss


# ---- prime-rl: src/prime_rl/trainer/rl/loss.py; the ratio is of the current policy to the engine, and there is no clip


def prime(masked):
    def loss(x):
        log_ratio = x.logprobs - x.rollout
        change = (torch.exp(x.logprobs) - torch.exp(x.rollout)).detach()
        keep = x.mask & ~masked(x, change)
        return (-(keep * x.A * torch.exp(log_ratio)) + x.kl_tau * log_ratio**2 * x.mask).sum() / x.rl_scale

    return loss


def dppo_masked(x, change):
    return torch.where(x.A > 0, change > x.dppo_mask_high, change < -x.dppo_mask_low)


# ---- AReaL: areal/utils/functional/functional.py, apply_rejection_sampling; the denominator counts rejected tokens


def areal(level, action, *, metric="ratio", agg="mean"):
    def loss(x):
        log_ratio = x.old - x.rollout
        weights = torch.exp(log_ratio)
        if metric == "ratio":
            values = log_ratio
        else:
            values = torch.exp(-log_ratio) - 1 + log_ratio  # its k3 has the ratio of the engine to the trainer
        if level == "sequence":
            if metric == "ratio":
                weights = torch.exp((log_ratio * x.mask).sum(-1, keepdim=True) / lengths(x)).expand(8, 6)
            if agg == "max":
                values = values.masked_fill(~x.mask, -torch.inf).max(dim=-1, keepdim=True)[0]
                values = torch.where(x.mask.any(-1, keepdim=True), values, 0.0)
            else:
                values = (values * x.mask).sum(-1, keepdim=True) / lengths(x)
        if metric == "ratio":
            values = torch.exp(values)
        if metric != "ratio":
            in_bounds = values <= x.limit
        elif agg == "max":
            in_bounds = values <= x.upper  # lower=None
        else:
            in_bounds = (values >= x.lower) & (values <= x.upper)
        if action == "mask":
            weights = torch.where(in_bounds, weights, 0.0)
        else:
            weights = torch.where(~in_bounds, weights.clamp(min=x.lower, max=x.upper), weights)
        return token_mean(ppo(x) * weights, x)

    return loss


def areal_decoupled(x):
    """ppo_actor_loss_fn with use_decoupled_loss and rejection_sampling's upper alone: old there is the engine's."""
    weights = torch.exp(x.old - x.rollout)
    keep = x.mask & (weights <= x.upper)
    ratio = torch.where(keep, torch.exp(x.logprobs - x.old), 0)
    losses = torch.max(-x.A * ratio, -x.A * ratio.clamp(1 - x.eps, 1 + x.eps)) * torch.where(keep, weights, 0.0)
    return torch.where(keep, losses, 0).sum() / x.mask.sum()  # loss_mask_count: before the rejection


THEIRS = {
    "trl-token-truncate": trl("token_truncate"),
    "trl-token-mask": trl("token_mask"),
    "trl-sequence-truncate": trl("sequence_truncate"),
    "trl-sequence-mask": trl("sequence_mask"),
    "trl-off-policy-mask": trl_off_policy_mask,
    "verl-token": verl("token"),
    "verl-sequence": verl("sequence"),
    "verl-normalised": verl("token", normalised=True),
    "verl-bypass": verl_bypass,
    "verl-token-k1": verl(option="token_k1"),
    "verl-token-k2": verl(option="token_k2"),
    "verl-token-k3": verl(option="token_k3"),
    "verl-sum-k1": verl(option="seq_sum_k1"),
    "verl-sum-k3": verl(option="seq_sum_k3"),
    "verl-mean-k1": verl(option="seq_mean_k1"),
    "verl-mean-k2": verl(option="seq_mean_k2"),
    "verl-mean-k3": verl(option="seq_mean_k3"),
    "verl-max-k3": verl(option="seq_max_k3"),
    "verl-both": verl("token", "seq_mean_k1"),
    "skyrl-token": skyrl("token"),
    "skyrl-sequence": skyrl("sequence"),
    "skyrl-token-mask": skyrl("token-mask"),
    "skyrl-geometric": skyrl("geometric"),
    "skyrl-product": skyrl("product"),
    "skyrl-outlier": skyrl("outlier"),
    "openrlhf-tis": openrlhf("tis"),
    "openrlhf-icepop": openrlhf("icepop"),
    "openrlhf-seq-mask-tis": openrlhf("seq-mask-tis"),
    "nemo-tis": nemo("tis"),
    "nemo-icepop": nemo("icepop"),
    "nemo-seq-mask-tis": nemo("seq-mask-tis"),
    "nemo-sequence": nemo_sequence,
    "slime-tis": slime("vanilla"),
    "slime-icepop": slime("icepop"),
    "slime-truncate": slime("truncate", "sequence"),
    "slime-clip": slime("clip", "geometric"),
    "slime-mask": slime("mask"),
    "slime-rs": slime("truncate", rs_level="geometric"),
    "slime-veto": slime("truncate", rs_level="token", veto=True),
    "slime-normalised": slime("truncate", normalised=True),
    "prime-dppo": prime(dppo_masked),
    "prime-ipo": prime(lambda x, change: change.abs() > x.ipo_threshold),
    "areal-token-mask": areal("token", "mask"),
    "areal-token-clamp": areal("token", "clamp"),
    "areal-sequence-mask": areal("sequence", "mask"),
    "areal-sequence-clamp": areal("sequence", "clamp"),
    "areal-max": areal("sequence", "mask", agg="max"),
    "areal-k3": areal("token", "mask", metric="kl_k3"),
    "trl-decoupled": trl_decoupled,
    "verl-decoupled": verl("token"),
    "areal-decoupled": areal_decoupled,
}
