"""The cases of `fastpg check`: inputs, the operations under test, the float64 oracle, and plain code with full logits.

The last three return an Outcome: named tensors, {"logp": ..., "loss": ..., "dX": ..., "dW": ...}. `judge` compares them, with
the tolerances in `accuracy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields, replace

import torch

from .. import reference
from ..linear.linear_logprobs import linear_logprobs
from ..linear.linear_policy_loss import linear_cispo_loss, linear_policy_loss
from ..linear.selective_logprobs import selective_logprobs
from ..lm_head import LMHead
from ..loss.batch_objectives import VESPO, ClipCov, KLCov
from ..loss.objectives import CISPO, GSPO, SAPO, ImportanceWeighted, KLPenalty, Objective, ObjectiveFunction, PPOClip, Reinforce
from ..loss.policy_loss import policy_loss
from ..loss.reductions import Reduction
from ..loss.trust_regions import DPPOKL, DPPOTV, IcePop

Outcome = dict[str, torch.Tensor]
OPERATIONS = ("linear_logprobs", "linear_policy_loss", "linear_cispo_loss", "selective_logprobs", "policy_loss")


def towards_the_advantage(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """A user's objective: minus the squared distance of the log ratio from the advantage."""
    return -((logprobs - old_logprobs - advantages) ** 2)


OBJECTIVES: dict[str, Objective | ObjectiveFunction] = {
    "Reinforce": Reinforce(),
    "ImportanceWeighted": ImportanceWeighted(),
    "CISPO": CISPO(),
    "CISPO, both bounds": CISPO(2.0, 0.5),
    "PPOClip": PPOClip(0.2, 0.28, dual_clip=3.0),
    "SAPO": SAPO(),
    "DPPOTV": DPPOTV(),
    "DPPOKL": DPPOKL(ratio_max=3.0),
    "IcePop": IcePop(),
    "a function": towards_the_advantage,
    "GSPO": GSPO(0.2, 0.28),
}
# Objectives whose gradient does not depend on the ratio's last bits. Their ratios go from e^-40 to e^40; those of the others
# are of order 1.
_ANY_RATIO = ("Reinforce", "ImportanceWeighted", "CISPO", "CISPO, both bounds")
_BOUNDS = (0.5, 0.8, 1.28, 2.0, 3.0, 5.0)


@dataclass(frozen=True)
class Inputs:
    hidden: torch.Tensor  # (..., H)
    head: LMHead | None  # None: hidden is ready logits
    tokens: torch.Tensor  # (...)
    old_logprobs: torch.Tensor | None  # (...)
    advantages: torch.Tensor  # (...), or (B,)
    mask: torch.Tensor | None = None  # (...)
    temperature: float | torch.Tensor = 1.0
    ref_logprobs: torch.Tensor | None = None  # (...)
    rollout_weights: torch.Tensor | None = None  # (...)
    frozen: bool = False  # whether the weight requires no gradient

    def keep(self) -> torch.Tensor:
        keep = self.tokens != -100
        return keep if self.mask is None else keep & self.mask

    def leaves(self, dtype: torch.dtype | None = None) -> Inputs:
        """These inputs as leaves that require gradients. They share memory; with a dtype, all are converted to it."""

        def leaf(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.detach().to(dtype or x.dtype).requires_grad_()

        def number(x):
            return x.to(dtype) if dtype is not None and isinstance(x, torch.Tensor) else x

        head, lora = self.head, self.head.lora
        weight = head.weight.detach().to(dtype or head.weight.dtype).requires_grad_(not self.frozen)
        factors = None if lora is None else (leaf(lora.a), leaf(lora.b), lora.scale)
        head = replace(head, weight=weight, bias=leaf(head.bias), lora=factors, weight_grad=None)
        names = ("old_logprobs", "advantages", "temperature", "ref_logprobs", "rollout_weights")
        return replace(self, hidden=leaf(self.hidden), head=head, **{name: number(getattr(self, name)) for name in names})

    def to(self, device: str) -> Inputs:
        def moved(x):
            return x.to(device) if isinstance(x, torch.Tensor) else x

        head = self.head
        lora = None if head.lora is None else tuple(moved(x) for x in head.lora)
        head = replace(head, weight=moved(head.weight), bias=moved(head.bias), lora=lora, weight_grad=None)
        return Inputs(**{f.name: moved(getattr(self, f.name)) for f in fields(self)} | {"head": head})

    def gradients(self, loss: torch.Tensor) -> Outcome:
        """Runs the backward of a loss of these leaves, and returns their gradients."""
        loss.backward()
        a, b = (None, None) if self.head.lora is None else self.head.lora[:2]
        named = {"dX": self.hidden, "dW": self.head.weight, "db": self.head.bias, "dA": a, "dB": b}
        return {name: x.grad for name, x in named.items() if x is not None and x.requires_grad}


@dataclass(frozen=True)
class Settings:
    """The loss of the log-probabilities. objective None: there is no loss, only log-probabilities."""

    objective: Objective | ObjectiveFunction | None = None
    reduction: Reduction = "sum"
    kl: KLPenalty | None = None


@dataclass(frozen=True)
class Case:
    operation: str
    dtype: torch.dtype
    rows: int
    vocab: int
    hidden_size: int
    features: tuple[str, ...] = ()
    objective: str | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    backends: tuple[str, ...] = ("torch", "triton")

    def runs_on(self, backend: str) -> bool:
        return backend in self.backends and (backend == "torch" or self.dtype != torch.float64)

    def describe(self) -> str:
        numbers = [
            f"{name} {x:g}" for name, x in (("softcap", self.softcap), ("scale", self.logit_scale)) if x not in (None, 1)
        ]
        sizes = f"{self.rows}x{self.hidden_size}x{self.vocab}"
        return ", ".join([sizes, *([self.objective] if self.objective else []), *self.features, *numbers])

    def settings(self) -> Settings:
        kl = KLPenalty(0.1, "k2") if "KL" in self.features else None
        reduction = "seq-mean-token-mean" if self.objective == "GSPO" else "sum"
        return Settings(OBJECTIVES[self.objective] if self.objective else None, reduction, kl)


ALL_FEATURES = ("bias", "per-token temperature", "mask", "LoRA")
EVERYTHING = {"features": ALL_FEATURES, "softcap": 9.0, "logit_scale": 0.7}


def cases(dtypes: list[torch.dtype], quick: bool, interpret: bool) -> Iterator[Case]:
    """In every dtype: no feature, and all together. In fp32, unless quick, also each feature alone. Sizes are ragged.

    The interpreter is slow. It gets smaller sizes, and of the objectives with KL and rollout weights PPOClip alone.
    """
    sizes = (33, 301, 40) if quick or interpret else (65, 1037, 72)
    alone = [{"features": (f,)} for f in (*ALL_FEATURES, "frozen weight")] + [{"softcap": 5.0}, {"logit_scale": 0.25}]
    small = [(1, 1, 8), (3, 2, 33), (5, 17, 64)]
    for dtype in dtypes:
        variants = [{}, EVERYTHING] + ([] if quick or dtype != torch.float32 else alone)
        common = {"features": ("rows of W alike",)}
        for options in variants + ([common] if dtype == torch.bfloat16 else []):
            yield Case("linear_cispo_loss", dtype, *sizes, objective="CISPO", **options)
            yield Case("linear_logprobs", dtype, *sizes, **options)
            if options in ({}, EVERYTHING):
                with_entropy = options | {"features": ("entropy", *options.get("features", ()))}
                yield Case("linear_logprobs", dtype, *sizes, **with_entropy)
        objectives = ["PPOClip"] if quick else [name for name in OBJECTIVES if name != "GSPO"]
        for objective in objectives:
            backends = ("torch",) if interpret and objective != "PPOClip" else ("torch", "triton")
            features = ("KL", "rollout weights")
            yield Case("linear_policy_loss", dtype, *sizes, objective=objective, features=features, backends=backends)
        yield Case("linear_policy_loss", dtype, *sizes, objective="ImportanceWeighted", **EVERYTHING)
        for features in ((), ("entropy", "per-token temperature", "mask")):
            yield Case("selective_logprobs", dtype, *sizes, features=features)
        for shape in () if quick or dtype == torch.float16 else small:
            yield Case("linear_cispo_loss", dtype, *shape, objective="CISPO", features=("bias",))
            yield Case("linear_logprobs", dtype, *shape, features=("bias",))
        if dtype in (torch.float32, torch.float64):
            for objective in OBJECTIVES:
                features = () if objective == "GSPO" else ("KL", "rollout weights", "mask")
                yield Case("policy_loss", dtype, 60, 50, 16, features, objective, backends=("torch",))


def head_cases(
    dtypes: list[torch.dtype], rows: int, hidden: int, vocab: int, softcap: float | None, scale: float
) -> Iterator[Case]:
    """Every linear operation, and selective_logprobs, on a head of the sizes that a user asked for."""
    for dtype in dtypes:
        options = {
            "dtype": dtype,
            "rows": rows,
            "vocab": vocab,
            "hidden_size": hidden,
            "softcap": softcap,
            "logit_scale": scale,
        }
        yield Case("linear_cispo_loss", objective="CISPO", **options)
        yield Case("linear_policy_loss", objective="PPOClip", features=("KL", "mask"), **options)
        yield Case("linear_logprobs", features=("entropy",), **options)
        yield Case("selective_logprobs", **options)


def inputs_of(case: Case, device: str = "cpu") -> Inputs:
    """Inputs on the CPU, with rows from uncertain to 1 - p_y = 1e-12.

    Confident rows are made by moving hidden states along the weight row of their token.
    The old log-probabilities are made from those of the oracle, which it computes on `device`.
    The smallest fp16 number is 6e-8. So confident rows are masked in fp16, and ratios are of order 1.
    """
    rows, dtype = case.rows, case.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight = torch.randn(case.vocab, case.hidden_size) * 2.4 / case.hidden_size**0.5
        alike = 20 * weight.std() * torch.randn(case.hidden_size) if "rows of W alike" in case.features else None
        bias = torch.randn(case.vocab).to(dtype) if "bias" in case.features else None
        lora = None
        if "LoRA" in case.features:  # fp32 beside a 16-bit weight, as in PEFT
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            lora = (torch.randn(5, case.hidden_size) * 0.1).to(wide), (torch.randn(case.vocab, 5) * 0.5).to(wide), 0.9
        temperature = torch.rand(rows) + 0.5 if "per-token temperature" in case.features else 1.0
        tokens = torch.randint(0, case.vocab, (rows,))
        hidden = torch.randn(rows, case.hidden_size)
        log_odds = torch.linspace(0, 27.6, rows) + torch.tensor(float(case.vocab)).log() + 3
        log_odds = torch.where(torch.arange(rows) % 2 == 0, log_odds * temperature / case.logit_scale, 0)
        w_y = weight[tokens]
        hidden += log_odds[:, None] * w_y / w_y.square().sum(1, keepdim=True).clamp(min=0.1)
        if alike is not None:  # the logits do not see the component that all rows share; in dX it must cancel
            hidden -= (hidden @ alike)[:, None] * alike / alike.square().sum()
            weight += alike
        advantages = torch.randn(rows).sign() * (0.5 + torch.rand(rows))
        any_ratio = case.objective in _ANY_RATIO and "KL" not in case.features and dtype != torch.float16
        log_ratio = torch.linspace(-40, 40, rows)[torch.randperm(rows)] if any_ratio else torch.randn(rows).clamp(-2, 2)
        jump = torch.tensor(_BOUNDS)
        near = (log_ratio.exp()[:, None] / jump - 1).abs().amin(1) < 1e-2
        log_ratio = torch.where(near, log_ratio + 0.05, log_ratio)
        mask = torch.rand(rows) > 0.3 if "mask" in case.features else None
        rollout = torch.rand(rows) + 0.5 if "rollout weights" in case.features else None
        ref_noise = torch.randn(rows)

    hidden, weight = hidden.to(dtype), weight.to(dtype)
    head = LMHead(weight, bias, case.softcap, case.logit_scale, lora)
    with torch.no_grad():
        plain = Inputs(hidden, head, tokens, None, advantages, None, temperature).to(device).leaves(torch.float64)
        logprobs = reference.linear_logprobs(plain.hidden, plain.head, plain.tokens, temperature=plain.temperature)[0].cpu()
    if dtype == torch.float16:
        mask = (logprobs < -0.01) if mask is None else mask & (logprobs < -0.01)
    if "mask" in case.features:
        hidden = torch.where(mask[:, None], hidden, torch.nan)  # nothing may read these
    ref = (logprobs - ref_noise).float() if "KL" in case.features else None
    old, frozen = (logprobs - log_ratio).float(), "frozen weight" in case.features
    return Inputs(hidden, head, tokens, old, advantages, mask, temperature, ref, rollout, frozen)


# The operations under test. Without an objective, `_scalar` makes one number of log-probabilities and entropies, to be
# differentiated.


def outcome(case: Case, x: Inputs, backend: str, logits: torch.Tensor | None) -> Outcome:
    """Runs the case's operation on the device of x. logits: for selective_logprobs. policy_loss is not run here (`judge`)."""
    settings, entropy = case.settings(), "entropy" in case.features
    if case.operation == "linear_cispo_loss":
        return cispo(x, settings, backend)
    if case.operation == "linear_policy_loss":
        return one_pass(x, settings, backend)
    if case.operation == "linear_logprobs":
        return two_pass(x, settings, backend, entropy)
    return selective(logits, x, backend, entropy)


def two_pass(x: Inputs, settings: Settings, backend: str | None, entropy: bool = False) -> Outcome:
    """linear_logprobs, with policy_loss on top where there is an objective."""
    x = x.leaves()
    options = {"mask": x.mask, "temperature": x.temperature, "backend": backend}
    logprobs, entropies = linear_logprobs(x.hidden, x.head, x.tokens, entropy=entropy, **options)
    return _finished(x, logprobs, entropies, settings, policy_loss)


def one_pass(x: Inputs, settings: Settings, backend: str | None) -> Outcome:
    x = x.leaves()
    out = linear_policy_loss(
        x.hidden, x.head, x.tokens, x.old_logprobs, x.advantages, objective=settings.objective, mask=x.mask,
        temperature=x.temperature, reduction=settings.reduction, kl=settings.kl, ref_logprobs=x.ref_logprobs,
        rollout_weights=x.rollout_weights, backend=backend,
    )  # fmt: skip
    return {"logp": out.logprobs.detach(), "loss": out.loss.detach(), **x.gradients(out.loss)}


def cispo(x: Inputs, settings: Settings, backend: str | None) -> Outcome:
    x, objective = x.leaves(), settings.objective
    out = linear_cispo_loss(
        x.hidden, x.head, x.tokens, x.old_logprobs, x.advantages, ratio_max=objective.ratio_max, ratio_min=objective.ratio_min,
        mask=x.mask, temperature=x.temperature, reduction=settings.reduction, backend=backend,
    )  # fmt: skip
    return {"logp": out.logprobs.detach(), "loss": out.loss.detach(), **x.gradients(out.loss)}


def ready_logits(x: Inputs) -> torch.Tensor:
    """The input of selective_logprobs: the oracle's logits, in the dtype of the model."""
    with torch.no_grad():
        wide = x.leaves(torch.float64)
        hidden = torch.where(x.keep()[:, None], wide.hidden, 0)
        return reference.logits(hidden, wide.head).to(x.hidden.dtype)


def selective(logits: torch.Tensor, x: Inputs, backend: str | None, entropy: bool) -> Outcome:
    leaf = logits.detach().requires_grad_()
    options = {"mask": x.mask, "temperature": x.temperature, "backend": backend}
    logprobs, entropies = selective_logprobs(leaf, x.tokens, entropy=entropy, **options)
    return _of_logits(leaf, x, logprobs, entropies)


def loss_only(logprobs: torch.Tensor, x: Inputs, settings: Settings, function: Callable) -> Outcome:
    """A policy_loss (the library's or the oracle's `function`) on ready log-probabilities."""
    leaf = logprobs.detach().requires_grad_()
    loss = _loss(leaf, x, settings, function)
    loss.backward()
    return {"loss": loss.detach(), "dlogp": leaf.grad}


# The oracle, and plain code with full logits.


def oracle(x: Inputs, settings: Settings, entropy: bool = False) -> Outcome:
    """The reference in float64. "scale" has dX's row norms without the entropy, as the terms of their sum may cancel."""
    wide = x.leaves(torch.float64)
    values = reference.linear_logprobs(wide.hidden, wide.head, wide.tokens, mask=wide.mask, temperature=wide.temperature)
    scale = {}
    if entropy:
        (alone,) = torch.autograd.grad((values[0] * wide.advantages).sum(), wide.hidden, retain_graph=True)
        scale = {"scale": alone.flatten(0, -2).norm(dim=1)}
    return _finished(wide, values[0], values[1] if entropy else None, settings, reference.policy_loss) | scale


def full_logits(x: Inputs, settings: Settings, entropy: bool = False) -> Outcome:
    """Full logits and their log_softmax in the dtype of the model, as in most training code."""
    x = x.leaves()
    keep = x.keep()
    hidden = torch.where(keep[..., None], x.hidden, 0)
    scores = hidden @ x.head.weight.T
    if x.head.lora is not None:
        a, b, scale = x.head.lora
        scores = scores + scale * ((hidden.to(a.dtype) @ a.T) @ b.T).to(scores.dtype)
    scores = x.head.logit_scale * (scores if x.head.bias is None else scores + x.head.bias)
    capped = scores if x.head.softcap is None else x.head.softcap * torch.tanh(scores / x.head.softcap)
    T = x.temperature[..., None].to(capped.dtype) if isinstance(x.temperature, torch.Tensor) else x.temperature
    values = (torch.where(keep, value, 0) for value in _log_softmax(capped / T, x.tokens.clamp(min=0)))
    logprobs, entropies = (v if v.dtype == torch.float64 else v.float() for v in values)
    return _finished(x, logprobs, entropies if entropy else None, settings, reference.policy_loss)


def oracle_of_logits(logits: torch.Tensor, x: Inputs, entropy: bool) -> Outcome:
    """The reference on ready logits. "scale" has dlogits' row norms without the entropy."""
    leaf = logits.detach().double().requires_grad_()
    keep = x.keep()
    T = x.temperature.double()[:, None] if isinstance(x.temperature, torch.Tensor) else x.temperature
    kept = reference.token_distribution((leaf / T)[keep], x.tokens[keep])
    logprobs, entropies = (torch.zeros(keep.shape, dtype=k.dtype, device=k.device).masked_scatter(keep, k) for k in kept)
    (alone,) = torch.autograd.grad((logprobs * x.advantages).sum(), leaf, retain_graph=True)
    return _of_logits(leaf, x, logprobs, entropies if entropy else None) | {"scale": alone.norm(dim=1)}


def log_softmax_of_logits(logits: torch.Tensor, x: Inputs, entropy: bool) -> Outcome:
    leaf = logits.detach().requires_grad_()
    T = x.temperature[:, None].to(leaf.dtype) if isinstance(x.temperature, torch.Tensor) else x.temperature
    logprobs, entropies = (torch.where(x.keep(), v, 0) for v in _log_softmax(leaf / T, x.tokens))
    return _of_logits(leaf, x, logprobs, entropies if entropy else None)


def reference_objective(objective: Objective | ObjectiveFunction) -> reference.Objective:
    """The oracle's own formula for one of the library's objectives. A user's function is its own definition."""
    match objective:
        case Reinforce():
            return reference.reinforce
        case ImportanceWeighted(level="token"):
            return reference.importance_weighted
        case ImportanceWeighted(level=level):
            return reference.importance_weighted_by(level)
        case CISPO():
            return reference.cispo(objective.ratio_max, objective.ratio_min)
        case PPOClip():
            return reference.ppo_clip(objective.eps_low, objective.eps_high, objective.dual_clip)
        case GSPO():
            return reference.gspo(objective.eps_low, objective.eps_high)
        case SAPO():
            return reference.sapo(objective.tau_pos, objective.tau_neg)
        case VESPO():
            return reference.vespo(objective.k_pos, objective.lambda_pos, objective.k_neg, objective.lambda_neg)
        case ClipCov():
            bounds = objective.cov_min, objective.cov_max
            return reference.clip_cov(objective.eps_low, objective.eps_high, objective.fraction, *bounds)
        case KLCov():
            return reference.kl_cov(objective.coef, objective.fraction)
        case DPPOTV():
            return reference.dppo_tv(objective.delta_low, objective.delta_high, objective.ratio_max, objective.two_sided)
        case DPPOKL():
            return reference.dppo_kl(objective.delta_low, objective.delta_high, objective.ratio_max)
        case IcePop():
            return reference.icepop(objective.ratio_max, objective.ratio_min)
    return objective


def reference_loss(logprobs: torch.Tensor, x: Inputs, settings: Settings) -> torch.Tensor:
    return _loss(logprobs, x, settings, reference.policy_loss)


def _log_softmax(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = torch.log_softmax(logits, -1)
    return log_p.gather(-1, tokens[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def _of_logits(leaf: torch.Tensor, x: Inputs, logprobs: torch.Tensor, entropies: torch.Tensor | None) -> Outcome:
    found = {"logp": logprobs.detach()} | ({} if entropies is None else {"entropy": entropies.detach()})
    _scalar(logprobs, entropies, x).backward()
    return found | {"dlogits": leaf.grad}


def _finished(
    x: Inputs, logprobs: torch.Tensor, entropies: torch.Tensor | None, settings: Settings, function: Callable
) -> Outcome:
    found = {"logp": logprobs.detach()} | ({} if entropies is None else {"entropy": entropies.detach()})
    if settings.objective is None:
        return found | x.gradients(_scalar(logprobs, entropies, x))
    loss = _loss(logprobs, x, settings, function)
    return found | {"loss": loss.detach(), **x.gradients(loss)}


def _scalar(logprobs: torch.Tensor, entropies: torch.Tensor | None, x: Inputs) -> torch.Tensor:
    total = (logprobs * x.advantages).sum()
    return total if entropies is None else total + 0.5 * (entropies * x.advantages.roll(1)).sum()


def _loss(logprobs: torch.Tensor, x: Inputs, settings: Settings, function: Callable) -> torch.Tensor:
    options = {"ref_logprobs": x.ref_logprobs, "rollout_weights": x.rollout_weights, "reduction": settings.reduction}
    if function is policy_loss:
        out = policy_loss(
            logprobs, x.old_logprobs, x.advantages, objective=settings.objective, mask=x.keep(), kl=settings.kl, **options
        )
        return out.loss
    kl = None if settings.kl is None else astuple(settings.kl)
    objective = reference_objective(settings.objective)
    return function(logprobs, x.old_logprobs, x.advantages, objective=objective, mask=x.keep(), kl=kl, **options)
