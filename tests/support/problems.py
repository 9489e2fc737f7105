"""Random problems for the library's own judge, `fastpg.crosscheck`, and what tests ask beyond its promise for any inputs."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastpg import KLPenalty, LMHead, reference
from fastpg.crosscheck import cases, judge
from fastpg.crosscheck.accuracy import LOSS_TOLERANCE, ROW_TOLERANCE, WEIGHT_TOLERANCE
from fastpg.crosscheck.cases import Inputs, Settings


class Result(dict):
    """An outcome by the judge's names, {"logp", "loss", "dX", "dW", "db", "dA", "dB"}, on the CPU; and what it is of."""

    def __init__(self, outcome: dict[str, torch.Tensor], settings: Settings, metrics: dict | None = None) -> None:
        super().__init__({name: value.detach().cpu() for name, value in outcome.items()})
        self.settings = settings
        self.metrics = metrics and {name: value.cpu() for name, value in metrics.items()}

    @classmethod
    def of(cls, leaves: Inputs, settings: Settings, logprobs: torch.Tensor, loss: torch.Tensor, metrics=None) -> Result:
        """Runs the backward of `loss` and collects the gradients of the leaves."""
        return cls({"logp": logprobs, "loss": loss, **leaves.gradients(loss)}, settings, metrics)


def oracle(x: Inputs, objective, reduction: str = "sum", kl: KLPenalty | None = None) -> Result:
    settings = Settings(objective, reduction, kl)
    return Result(cases.oracle(x, settings), settings)


def logprobs_of(x: Inputs) -> torch.Tensor:
    """The oracle's, float64; 0 where masked."""
    wide = x.leaves(torch.float64)
    with torch.no_grad():
        return reference.linear_logprobs(wide.hidden, wide.head, wide.tokens, mask=wide.mask, temperature=wide.temperature)[0]


def check_result(x: Inputs, got: Result, want: dict | None = None) -> None:
    """What the judge promises of any inputs, and what holds beyond it for problems as they are here:

    gradients of the head within WEIGHT_TOLERANCE and the loss within 1e-5 of the sum of its absolute terms, however large the
    logits are, since rounding errors average out; in float16 no allowance for the spacing of its smallest numbers; no gradient
    at all where the oracle has none.
    """
    want = cases.oracle(x, got.settings) if want is None else want
    dtype = x.hidden.dtype
    assert (got["dX"].dtype, got["dW"].dtype) == (dtype, x.head.weight.dtype)
    for d in judge.deviations(x, got.settings, got, want):
        assert d.multiple <= 1, str(d)
        if d.quantity in ("dW", "db", "dA", "dB"):
            assert d.error <= WEIGHT_TOLERANCE[dtype], str(d)
        if d.quantity == "loss":
            assert d.error <= LOSS_TOLERANCE[torch.float32] * judge.absolute_loss(want["logp"], x, got.settings), str(d)
    if dtype == torch.float16 and "entropy" not in want:
        assert (row_errors(got["dX"], want["dX"]) <= ROW_TOLERANCE[dtype]).all()
    assert not got["dX"][(want["dX"] == 0).all(-1)].any()


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
) -> Inputs:
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
    hidden = _plant(hidden, Inputs(hidden, head, tokens, wanted, wanted, None, per_token), wanted, planted).to(dtype)

    x = Inputs(hidden, head, tokens, torch.zeros(rows), torch.zeros(rows), None, per_token)
    logprobs = logprobs_of(x)
    log_ratio = torch.linspace(-40, 40, rows)[torch.randperm(rows)]
    advantages = torch.randn(rows).sign() * (0.5 + torch.rand(rows))
    mask = torch.rand(rows) > 0.3 if masked else None
    return replace(x, old_logprobs=(logprobs - log_ratio).float(), advantages=advantages, mask=mask)


@torch.no_grad()
def _plant(hidden: torch.Tensor, problem: Inputs, log_odds: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Moves hidden states along the weight rows of their tokens until the token's log-odds are `log_odds`, by Newton steps.

    Scores are linear in the hidden state: two products serve all steps.
    """
    hidden = hidden.double()
    if not rows.any():
        return hidden
    wide = problem.leaves(torch.float64)
    tokens, temperature = problem.tokens[rows, None], wide.temperature
    w_y = wide.head.weight.detach()[tokens[:, 0]]
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[rows, None]
    scores = reference.logits(hidden[rows], replace(wide.head, softcap=None))
    slopes = reference.logits(w_y, replace(wide.head, softcap=None, bias=None))
    moved = torch.zeros(len(tokens), 1, dtype=torch.float64)
    for _ in range(12):
        capped = reference.softcap(scores + moved * slopes, wide.head.softcap)
        z, of_z = capped / temperature, slopes / temperature
        if wide.head.softcap is not None:
            of_z = of_z * (1 - (capped / wide.head.softcap).square())
        others = z.scatter(1, tokens, -torch.inf)
        total = others.logsumexp(1, keepdim=True)
        now = z.gather(1, tokens) - total
        slope = of_z.gather(1, tokens) - ((others - total).exp() * of_z).sum(1, keepdim=True)
        step = ((log_odds[rows, None] - now) / slope).clamp(-20, 20)
        step = torch.where(slope > 1e-3, step, 0)  # a softcap bounds what can be reached
        moved += step
        if (step * slope).abs().max() < 1e-4:
            break
    return hidden.index_add(0, rows.nonzero()[:, 0], moved * w_y)


def moderate_problem(rows: int, dtype: torch.dtype) -> Inputs:
    """log ratios and log(ref / pi) of order 1, rollout weights around 1."""
    problem = random_problem(rows, 1000, dtype)
    logprobs = logprobs_of(problem)
    old, ref = (logprobs - torch.randn(rows) for _ in range(2))
    return replace(problem, old_logprobs=old.float(), ref_logprobs=ref.float(), rollout_weights=torch.rand(rows) + 0.5)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of two results of this library, or of a part of one."""
    return ((got.double() - want).norm() / want.norm().clamp(min=2.0**-100)).item()


def row_errors(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """As `relative_error`, of each row."""
    return (got.double() - want).norm(dim=1) / want.norm(dim=1).clamp(min=2.0**-100)


def opcheck(operator, *arguments):
    """torch.library.opcheck of one of our operators, with structures as arguments; returns what the operator returns."""
    with torch.no_grad():
        torch.library.opcheck(operator.registered, operator.leaves(*arguments))
        return operator(*arguments)
