"""The losses of NeMo-RL, prime-rl, AReaL and open-instruct, written out in PyTorch on a batch of `dialects`."""

import torch

# ---- NeMo-RL: nemo_rl/algorithms/loss/loss_functions.py, ClippedPGLossFn; the KL term: calculate_kl of algorithms/utils.py


def nemo(*, token_level=True, sequence=False, cispo=False, ratio=True, dual_clip=False, kl=False):
    def loss(x):
        mask, d = x.mask.double(), x.logprobs - x.old_logprobs
        if sequence:
            d = ((d * mask).sum(-1) / mask.sum(-1).clamp(min=1)).unsqueeze(-1).expand_as(d)
        ratios = d.exp() if ratio else x.logprobs
        clamped = ratios.clamp(1.0 - x.low, 1.0 + x.high) if ratio else x.logprobs
        if cispo:
            losses = -x.advantages * clamped.detach() * x.logprobs
        else:
            losses = torch.max(-x.advantages * ratios, -x.advantages * clamped)
        if dual_clip:
            losses = torch.where(x.advantages < 0, torch.min(losses, -x.advantages * x.ratio_clip_c), losses)
        if kl:  # use_on_policy_kl_approximation, kl_output_clamp_value=None
            weights, logr = torch.exp(x.logprobs - x.old_logprobs), x.ref - x.logprobs
            inside = logr.clamp(min=-x.kl_clamp, max=x.kl_clamp)
            weights = torch.where(logr == inside, weights, weights.detach())
            losses = losses + x.beta * weights * (torch.exp(inside) - 1 - inside)
        if token_level:
            return (losses * mask).sum() / x.valid_toks
        return ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1)).sum() / x.valid_seqs

    return loss


# ---- prime-rl: src/prime_rl/trainer/rl/loss.py, default_loss_fn and ipo_loss_fn with adv_tau=1; compute_loss


def prime(*, ipo=False):
    def loss(x):
        log_ratio = x.logprobs - x.old_logprobs
        difference = torch.exp(x.logprobs) - torch.exp(x.old_logprobs)
        if ipo:
            is_masked = difference.abs() > x.threshold
        else:
            is_masked = torch.where(x.advantages > 0, difference > x.mask_high, difference < -x.mask_low)
        keep = x.mask & ~is_masked
        losses = -(keep * x.advantages * log_ratio.exp()) + x.kl_tau * (x.mask * log_ratio**2)
        return losses.sum() / x.rl_scale

    return loss


# ---- AReaL: areal/utils/functional/functional.py


def areal_ppo(level="token", *, decoupled=False):
    def loss(x):
        advantages, d = x.advantages, x.logprobs - x.old_logprobs
        if level == "sequence":
            lengths = x.mask.sum(dim=1, keepdim=True).clamp(min=1)
            ratio = torch.exp(torch.where(x.mask, d, 0.0).sum(dim=1, keepdim=True) / lengths).expand_as(d)
            advantages = (torch.where(x.mask, advantages, 0.0).sum(dim=-1, keepdim=True) / lengths).expand_as(d)
        else:
            ratio = torch.where(x.mask, torch.exp(d), 0)
        losses = torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - x.eps_clip, 1 + x.eps_clip_higher))
        if decoupled:
            losses = torch.min(losses, torch.sign(advantages) * x.c_clip * advantages) * x.w
        return torch.where(x.mask, losses, 0).sum() / x.mask.count_nonzero()

    return loss


# ---- open-instruct: open_instruct/grpo_utils.py, compute_grpo_loss; masked_mean: open_instruct/rl_utils.py


def open_instruct(loss_fn="dapo", *, rho=False, kl_estimator=None, denominator=None):
    def loss(x):
        ratio = torch.exp(x.logprobs - x.old_logprobs)
        if loss_fn == "cispo":
            losses = -x.advantages * torch.clamp(ratio.detach(), max=1.0 + x.clip_higher) * x.logprobs
        else:
            clipped = -x.advantages * torch.clamp(ratio, 1.0 - x.clip_lower, 1.0 + x.clip_higher)
            losses = torch.max(-x.advantages * ratio, clipped)
        if rho:
            losses = losses * x.w
        if kl_estimator is not None:
            diff = (x.logprobs - x.ref).clamp(-40.0, 40.0)
            losses = losses + x.beta * {2: torch.expm1(-diff) + diff, 3: ratio * diff}[kl_estimator]
        return (losses * x.mask).sum() / (x.mask.sum() if denominator is None else denominator)

    return loss
