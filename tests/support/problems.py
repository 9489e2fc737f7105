"""Problems with known answers: inputs, the float64 oracle's results on the same inputs, and the accuracy that is promised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from fastpg import LMHead, reference
from fastpg.crosscheck import accuracy
from fastpg.crosscheck.accuracy import ROW_TOLERANCE, WEIGHT_TOLERANCE


@dataclass(frozen=True)
class Problem:
    hidden: torch.Tensor  # (N, H)
    head: LMHead
    tokens: torch.Tensor  # (N,)
    old_logprobs: torch.Tensor  # (N,)
    advantages: torch.Tensor  # (N,)
    mask: torch.Tensor | None = None  # (N,)
    temperature: float | torch.Tensor = 1.0
    ref_logprobs: torch.Tensor | None = None  # (N,)
    rollout_weights: torch.Tensor | None = None  # (N,)

    def to(self, device: str) -> Problem:
        def moved(x):
            return x.to(device) if isinstance(x, torch.Tensor) else x

        lora = self.head.lora and tuple(moved(x) for x in self.head.lora)
        head = replace(self.head, weight=moved(self.head.weight), bias=moved(self.head.bias), lora=lora)
        return Problem(**{f.name: moved(getattr(self, f.name)) for f in fields(self)} | {"head": head})

    def leaves(self, dtype: torch.dtype | None = None) -> Problem:
        """A copy whose hidden, weight, bias and LoRA factors are fresh leaves that require gradients, in `dtype`."""

        def leaf(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_()

        temperature = self.temperature
        if isinstance(temperature, torch.Tensor) and dtype is not None:
            temperature = temperature.to(dtype)
        lora = self.head.lora
        if lora is not None:
            lora = leaf(lora.a), leaf(lora.b), lora.scale
        head = replace(self.head, weight=leaf(self.head.weight), bias=leaf(self.head.bias), lora=lora)
        return replace(self, hidden=leaf(self.hidden), head=head, temperature=temperature)


@dataclass(frozen=True)
class Result:
    logprobs: torch.Tensor
    loss: torch.Tensor
    dhidden: torch.Tensor
    dweight: torch.Tensor
    dbias: torch.Tensor | None
    da: torch.Tensor | None = None  # of LoRA, as the next
    db: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] | None = None

    @classmethod
    def of(cls, problem: Problem, logprobs: torch.Tensor, loss: torch.Tensor, metrics: dict | None = None) -> Result:
        """Runs the backward of `loss` and collects the gradients of problem.leaves()."""
        loss.backward()
        bias = problem.head.bias
        a, b = (None, None) if problem.head.lora is None else problem.head.lora[:2]
        inputs = problem.hidden, problem.head.weight, bias, a, b
        gradients = (None if x is None else x.grad for x in inputs)
        metrics = metrics and {name: value.cpu() for name, value in metrics.items()}
        return cls(logprobs.detach().cpu(), loss.detach().cpu(), *(g if g is None else g.cpu() for g in gradients), metrics)


def random_problem(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    *,
    hidden_size: int = 64,
    bias: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | str = 1.0,
    masked: bool = False,
    lora: int | None = None,
    lora_dtype: torch.dtype | None = None,
) -> Problem:
    """Rows from uncertain to 1 - p_y = 1e-12, with ratios from e^-40 to e^40 in a scrambled order.

    Confidence is planted by moving the hidden state along its token's weight row. lora: the rank of an update of the head that
    is about a third as large as the weight.
    """
    weight = (torch.randn(vocab, hidden_size) * 0.3).to(dtype)
    bias_values = torch.randn(vocab).to(dtype) if bias else None
    factors = None
    if lora is not None:
        a, b = torch.randn(lora, hidden_size) * 0.1, torch.randn(vocab, lora) * 0.5
        factors = a.to(lora_dtype or dtype), b.to(lora_dtype or dtype), 2 / lora**0.5
    head = LMHead(weight, bias_values, softcap, logit_scale, factors)
    tokens = torch.randint(0, vocab, (rows,))
    hidden = torch.randn(rows, hidden_size)
    per_token = torch.rand(rows) + 0.5 if temperature == "per-token" else temperature
    # every second row is moved until the log-odds for its token are between 0 and 27.6 nats, 1 - p = 1e-12
    wanted = torch.linspace(0, 27.6, rows, dtype=torch.float64)
    planted = (torch.arange(rows) % 2 == 0) & (vocab > 1)
    hidden = _plant(hidden, Problem(hidden, head, tokens, wanted, wanted, None, per_token), wanted, planted).to(dtype)

    wide = Problem(hidden, head, tokens, torch.zeros(rows), torch.zeros(rows), None, per_token).leaves(torch.float64)
    with torch.no_grad():
        logprobs, _ = reference.linear_logprobs(wide.hidden, wide.head, tokens, temperature=wide.temperature)
    log_ratio = torch.linspace(-40, 40, rows)[torch.randperm(rows)]
    advantages = torch.randn(rows).sign() * (0.5 + torch.rand(rows))
    mask = torch.rand(rows) > 0.3 if masked else None
    return Problem(hidden, head, tokens, (logprobs - log_ratio).float(), advantages, mask, per_token)


def _plant(hidden: torch.Tensor, problem: Problem, log_odds: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Moves hidden states along the weight rows of their tokens until the token's log-odds are `log_odds`, by Newton steps."""
    wide = problem.leaves(torch.float64)
    w_y = wide.head.weight.detach()[problem.tokens]
    hidden = hidden.double()
    for _ in range(12 if rows.any() else 0):
        x = hidden.clone().requires_grad_()
        z = reference.logits(x, wide.head, wide.temperature)
        others = z.scatter(1, problem.tokens[:, None], -torch.inf).logsumexp(1)
        now = z.gather(1, problem.tokens[:, None])[:, 0] - others
        slope = (torch.autograd.grad(now.sum(), x)[0] * w_y).sum(1)
        step = ((log_odds - now.detach()) / slope).clamp(-20, 20) * rows
        step = torch.where(slope > 1e-3, step, 0)  # a softcap bounds what can be reached
        hidden = hidden + step[:, None] * w_y
        if (step * slope).abs().max() < 1e-4:
            break
    return hidden


def oracle(problem: Problem, objective: Callable, reduction: str = "sum", kl: tuple | None = None) -> tuple[Result, float]:
    """The float64 result, and the sum of the absolute terms of its loss. kl: (coef, estimator, importance_weighted)."""
    wide = problem.leaves(torch.float64)
    logprobs, _ = reference.linear_logprobs(wide.hidden, wide.head, wide.tokens, mask=wide.mask, temperature=wide.temperature)
    mask = torch.ones_like(wide.tokens, dtype=torch.bool) if wide.mask is None else wide.mask

    def loss_of(logprobs, reduction, mask, kl=kl):
        old, advantages, ref, rollout = (
            None if x is None else x.double()
            for x in (wide.old_logprobs, wide.advantages, wide.ref_logprobs, wide.rollout_weights)
        )
        return reference.policy_loss(
            logprobs, old, advantages, objective=objective, mask=mask, reduction=reduction,
            kl=kl, ref_logprobs=ref, rollout_weights=rollout,
        )  # fmt: skip

    loss = loss_of(logprobs, reduction, mask)
    one_by_one = torch.eye(len(mask), dtype=torch.bool) if len(mask) <= 300 else None
    if one_by_one is None:
        terms = objective(logprobs[mask], wide.old_logprobs.double()[mask], wide.advantages.double()[mask]).detach().abs()
    else:
        terms = torch.stack([loss_of(logprobs.detach(), "sum", m & mask).abs() for m in one_by_one] or [loss.detach() * 0])
    count = max(int(mask.sum()), 1) if reduction == "token-mean" else 1
    return Result.of(wide, logprobs, loss), terms.sum().item() / count


def logprob_tolerance(problem: Problem, device: str = "cpu") -> torch.Tensor:
    """What is promised of each row, (N,) float64, for results from this device."""
    wide = problem.leaves(torch.float64)
    with torch.no_grad():
        largest = reference.logits(wide.hidden, wide.head, wide.temperature).abs().amax(1)
    return accuracy.logprob_tolerance(largest, problem.hidden.dtype, problem.head.hidden_size, device)


def row_errors(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Relative error of each row; rows below 2^-100 are compared absolutely, on that scale."""
    return (got.double() - want).norm(dim=1) / want.norm(dim=1).clamp(min=2.0**-100)


def check_result(
    problem: Problem, got: Result, want: Result, loss_scale: float, conditioning: torch.Tensor | float = 1.0
) -> None:
    """The promised accuracy against the float64 oracle on the same inputs: log-probabilities (absolute, and relative to
    -logp where that is small), loss, dX row by row, dW and db.

    conditioning (N,): (|c| + |dc/dlogp|) / |c| of the coefficient c = dl/dlogp, where an error of logp is amplified.
    """
    dtype = problem.hidden.dtype
    tolerance = logprob_tolerance(problem)
    error = (got.logprobs.double() - want.logprobs).abs()
    assert (error <= tolerance * want.logprobs.abs().clamp(max=1)).all(), f"logp {(error / tolerance).max():.2e}"
    assert abs(got.loss.double() - want.loss) <= 1e-5 * loss_scale

    assert got.dhidden.dtype == got.dweight.dtype == dtype
    rows = row_errors(got.dhidden, want.dhidden)
    limit = ROW_TOLERANCE.get(dtype, tolerance) * conditioning
    assert (rows <= limit).all(), f"dX rows {(rows / limit).max():.2e} of the tolerance"
    assert relative_error(got.dweight, want.dweight) <= WEIGHT_TOLERANCE[dtype]
    for name in ("dbias", "da", "db"):
        if getattr(want, name) is not None:
            assert relative_error(getattr(got, name), getattr(want, name)) <= WEIGHT_TOLERANCE[dtype], name


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp(min=2.0**-100)).item()


def opcheck(operator, *arguments):
    """torch.library.opcheck of one of our operators, with structures as arguments; returns what the operator returns."""
    with torch.no_grad():
        torch.library.opcheck(operator.registered, operator.leaves(*arguments))
        return operator(*arguments)
