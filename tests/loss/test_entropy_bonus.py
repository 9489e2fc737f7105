"""An entropy bonus in `policy_loss`, from the entropies of `linear_logprobs`; and why one pass has none."""

import math

import pytest
import torch
from batches import F32, F64, MASK, as_rows, batch, every_layout, every_reduction, lay_out
from objectives import INF, NAN
from raising import said

from fastpg import (
    CISPO,
    GSPO,
    LinearPolicyLoss,
    LMHead,
    linear_cispo_loss,
    linear_logprobs,
    linear_policy_loss,
    masked_mean,
    policy_loss,
    reference,
)


def with_entropies(dtype=F64, layout="rows", per_sequence=False):
    given = batch(dtype, per_sequence) | {"entropies": 3 * torch.rand(6, 5, dtype=dtype)}
    return lay_out(given, layout)


def gradients(given, **options):
    given = dict(given)
    given["logprobs"], given["entropies"] = (given[k].clone().requires_grad_() for k in ("logprobs", "entropies"))
    output = policy_loss(**given, **options)
    return output, *torch.autograd.grad(output.loss, (given["logprobs"], given["entropies"]))


@pytest.mark.parametrize("denominator", [None, 7.5])
@every_layout
@every_reduction
def test_the_bonus_has_the_weights_of_the_policy_term(reduction, layout, denominator):
    """By loops: -0.3 weight_n / D at every kept token, whatever the rollout weights and the KL penalty are."""
    given = with_entropies(layout=layout)
    weights = lay_out({"w": torch.rand(6, 5, dtype=F64), "mask": MASK}, layout)["w"]
    options = {"objective": CISPO(), "reduction": reduction, "denominator": denominator, "rollout_weights": weights}
    output, of_logprobs, of_entropies = gradients(given, entropy_coef=0.3, **options)
    plain, wanted_of_logprobs, _ = gradients(given, entropy_coef=0.0, **options)
    lengths = MASK.sum(1).tolist()
    count = denominator or {"token-mean": 15, "sum": 1}.get(reduction, 5)
    wanted = torch.zeros(6, 5, dtype=F64)
    for b, t in MASK.nonzero().tolist():
        wanted[b, t] = -0.3 / count / (lengths[b] if reduction == "seq-mean-token-mean" else 1)
    torch.testing.assert_close(as_rows(of_entropies, layout), wanted, rtol=1e-13, atol=0)
    bonus = (wanted * as_rows(given["entropies"], layout)).sum()
    torch.testing.assert_close(output.loss, plain.loss + bonus, rtol=1e-13, atol=0)
    assert torch.equal(of_logprobs, wanted_of_logprobs)
    torch.testing.assert_close(output.metrics["entropy_loss"], bonus, rtol=1e-13, atol=0)
    mean = as_rows(given["entropies"], layout)[MASK].mean()
    torch.testing.assert_close(output.metrics["entropy"], mean, rtol=1e-13, atol=0)
    assert not output.metrics["entropy"].requires_grad
    assert not output.metrics["entropy_loss"].requires_grad


@every_reduction
@pytest.mark.parametrize(("dtype", "backend"), [(F64, "torch"), (F32, "torch"), (F32, "triton")], ids=str)
def test_equals_the_oracle(reduction, dtype, backend):
    """On Triton the policy term is one kernel's."""
    given = with_entropies(dtype)
    output, *found = gradients(given, objective=CISPO(), reduction=reduction, entropy_coef=0.1, backend=backend)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in given.items()}
    leaves = [wide[k].requires_grad_() for k in ("logprobs", "entropies")]
    loss = reference.policy_loss(**wide, objective=reference.cispo(), reduction=reduction, entropy_coef=0.1)
    assert output.loss.dtype == dtype
    eps = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.loss.double(), loss, rtol=eps, atol=eps * 5)
    for actual, wanted in zip(found, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=eps, atol=eps * wanted.abs().max().item())


def test_from_hidden_states_it_equals_full_logits():
    """loss and gradients of hidden states and weight, where p log p of the vocabulary is written out."""
    hidden, weight = torch.randn(3, 4, 8, dtype=F64, requires_grad=True), torch.randn(20, 8, dtype=F64, requires_grad=True)
    tokens, mask, a = torch.randint(0, 20, (3, 4)), torch.rand(3, 4) > 0.3, torch.randn(3, dtype=F64)
    out = linear_logprobs(hidden, LMHead(weight), tokens, mask=mask, entropy=True)
    options = {"objective": GSPO(0.2, 0.3), "mask": mask, "reduction": "seq-mean-token-mean"}
    output = policy_loss(out.logprobs, None, a, **options, entropies=out.entropy, entropy_coef=0.2)
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    entropies = -(log_p.exp() * log_p).sum(-1)
    logprobs = log_p.gather(-1, tokens[..., None])[..., 0]
    lengths = mask.sum(1).clamp(min=1)
    ratio = (torch.where(mask, logprobs - logprobs.detach(), 0).sum(1) / lengths).exp()
    per_row = ratio * a * (lengths > 0) * mask.any(1) + 0.2 * torch.where(mask, entropies, 0).sum(1) / lengths
    wanted = -per_row.sum() / mask.any(1).sum()
    torch.testing.assert_close(output.loss, wanted, rtol=1e-12, atol=1e-14)
    for got, want in zip(
        torch.autograd.grad(output.loss, (hidden, weight)), torch.autograd.grad(wanted, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_a_token_mean_is_masked_means():
    """The documented line for a mean over all tokens, whatever the loss."""
    given = with_entropies()
    output = policy_loss(**given, objective=CISPO(), entropy_coef=0.01)
    entropies = given.pop("entropies")
    loss = policy_loss(**given, objective=CISPO()).loss - 0.01 * masked_mean(entropies, MASK)
    torch.testing.assert_close(output.loss, loss, rtol=1e-14, atol=0)


@every_layout
def test_masked_garbage_changes_no_bit(layout):
    given = with_entropies(layout=layout)
    masked = ~given["mask"]
    wanted = gradients(given, objective=CISPO(), entropy_coef=0.1)
    for garbage in (NAN, INF, -INF):
        dirty = given | {"entropies": given["entropies"].masked_fill(masked, garbage)}
        found = gradients(dirty, objective=CISPO(), entropy_coef=0.1)
        assert torch.equal(found[0].loss, wanted[0].loss)
        assert torch.equal(found[2], wanted[2])
        assert (found[2][masked] == 0).all()
        assert torch.equal(found[0].metrics["entropy"], wanted[0].metrics["entropy"])
    given["entropies"][given["mask"].nonzero()[3].unbind()] = NAN
    assert policy_loss(**given, objective=CISPO(), entropy_coef=0.1).loss.isnan()


@every_reduction
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 3)])
def test_no_tokens(shape, reduction):
    bad, mask = torch.full(shape, NAN), torch.zeros(shape, dtype=torch.bool)
    given = {"logprobs": bad, "old_logprobs": bad, "advantages": bad, "entropies": bad, "mask": mask}
    output, of_logprobs, of_entropies = gradients(given, objective=CISPO(), reduction=reduction, entropy_coef=0.1)
    assert output.loss.item() == output.metrics["entropy"].item() == output.metrics["entropy_loss"].item() == 0
    assert not of_logprobs.any()
    assert not of_entropies.any()


def test_one_token():
    given = {"logprobs": torch.tensor([-1.0]), "old_logprobs": None, "advantages": torch.tensor([2.0])}
    output = policy_loss(**given, objective=CISPO(), entropies=torch.tensor([0.5]), entropy_coef=0.1)
    assert output.loss.item() == pytest.approx(2.0 - 0.05)
    assert output.metrics.to_dict() | {"entropy": 0.5, "tokens": 1} == pytest.approx(output.metrics.to_dict())


def test_metrics_without_a_bonus():
    """Entropies alone are reported, and need no gradient; without them there is no such metric."""
    given = with_entropies()
    logprobs = given.pop("logprobs").requires_grad_()
    metrics = policy_loss(logprobs, **given, objective=CISPO()).metrics
    assert metrics["entropy_loss"] == 0
    assert metrics["entropy"].item() == pytest.approx(given["entropies"][MASK].mean().item())
    given.pop("entropies")
    assert not {"entropy", "entropy_loss"} & policy_loss(logprobs, **given, objective=CISPO()).metrics.keys()


def test_evaluation_needs_no_gradient():
    given = with_entropies(F32)
    with torch.no_grad():
        given["logprobs"].requires_grad_()
        assert policy_loss(**given, objective=CISPO(), entropy_coef=0.1).loss.isfinite()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own
def test_compiled():
    given = with_entropies()
    start, entropies = given.pop("logprobs").requires_grad_(), given.pop("entropies").requires_grad_()

    def step(logprobs, entropies):
        out = policy_loss(logprobs, **given, objective=CISPO(), entropies=entropies, entropy_coef=0.1)
        return out.loss, out.metrics["entropy_loss"]

    torch._dynamo.reset()
    want, got = step(start, entropies), torch.compile(step, fullgraph=True, backend="aot_eager")(start, entropies)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(x[0], (start, entropies)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


ONES = torch.ones(2, 3)
WANTED = "those of linear_logprobs(..., entropy=True)"
BAD = {
    "coef": ({"entropy_coef": -0.1}, "ValueError: entropy_coef must be a number >= 0; got -0.1"),
    "coef-none": ({"entropy_coef": None}, "ValueError: entropy_coef must be a number >= 0; got None"),
    "coef-nan": ({"entropy_coef": math.nan}, "ValueError: entropy_coef must be a number >= 0; got nan"),
    "coef-alone": (
        {"entropy_coef": 0.1, "entropies": None},
        f"ValueError: entropy_coef=0.1 was given without entropies; an entropy bonus needs {WANTED}",
    ),
    "list": ({"entropies": [1.0]}, "TypeError: entropies must be a floating-point tensor or None; got list"),
    "int": ({"entropies": ONES.long()}, "TypeError: entropies must be a floating-point tensor or None; got torch.int64"),
    "shape": (
        {"entropies": torch.ones(2)},
        "ValueError: entropies must have the shape of logprobs, (2, 3); got (2,)",
    ),
    "device": ({"entropies": ONES.to("meta")}, "ValueError: entropies is on meta but logprobs is on cpu"),
    "detached": (
        {"entropies": ONES},
        "ValueError: entropies must be differentiable where entropy_coef=0.1, or the bonus would change nothing; pass "
        f"{WANTED}, undetached",
    ),
    "kl, entropies": (
        {"kl": 1, "entropies": None},
        "TypeError: kl must be a KLPenalty, such as KLPenalty(0.01), or None; got int",
    ),
    "entropies, reduction": (
        {"entropies": ONES.long(), "reduction": "mean"},
        "TypeError: entropies must be a floating-point tensor or None; got torch.int64",
    ),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD)
def test_entropies_that_do_not_fit(changes, words):
    given = {"old_logprobs": None, "advantages": torch.ones(2), "objective": CISPO(), "entropy_coef": 0.1}
    logprobs = torch.zeros(2, 3, requires_grad=True)
    assert said(lambda: policy_loss(logprobs, **given | changes)) == words


@pytest.mark.parametrize("coef", [0.01, -0.01, NAN, None, "0"])
def test_one_pass_says_why_it_has_none(coef):
    """-h p (log p + H) is not E times one number per row."""
    arguments = torch.full((2, 3, 4), NAN), torch.randn(7, 4), torch.zeros(2, 3, dtype=torch.long), None, torch.ones(2, 3)
    words = (
        f"ValueError: entropy_coef must be 0 in the one-pass loss; got {coef!r}: the term -entropy_coef H has the gradient "
        "entropy_coef p_v (log p_v + H) in a row's logits, which is not the row's exponentials times one number, all that one "
        "pass has of it; use linear_logprobs(..., entropy=True) and policy_loss(..., entropies=, entropy_coef=)"
    )
    assert said(lambda: linear_policy_loss(*arguments, objective=CISPO(), entropy_coef=coef)) == words
    assert said(lambda: linear_cispo_loss(*arguments, entropy_coef=coef)) == words
    assert said(lambda: LinearPolicyLoss(objective=CISPO(), entropy_coef=coef)(*arguments)) == words


def test_one_pass_takes_a_coefficient_of_0():
    hidden, weight, tokens = torch.randn(2, 3, 4), torch.randn(7, 4), torch.zeros(2, 3, dtype=torch.long)
    assert linear_cispo_loss(hidden, weight, tokens, None, ONES, entropy_coef=0).loss.isfinite()
