"""Further statistics of tokens beside those of full logits in float64."""

import pytest
import torch
from schedules import KERNEL_DEVICE

from fastpg import LMHead, TokenStatistics, reference
from fastpg.crosscheck.accuracy import logprob_tolerance
from fastpg.crosscheck.cases import Inputs
from fastpg.linear.outputs import OUTPUTS

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EVERYTHING = {
    "bias": True, "softcap": 9.0, "logit_scale": 0.7, "temperature": "per-token", "masked": True, "lora": 5,
}  # fmt: skip
ON = [
    (backend, dtype)
    for backend in ("torch", "triton")
    for dtype in (f64, f32, bf16, f16)
    if (backend, dtype) != ("triton", f64)
]
ON_EACH = pytest.mark.parametrize(("backend", "dtype"), ON, ids=[f"{b}-{str(d)[6:]}" for b, d in ON])


def logits_of(x: Inputs) -> torch.Tensor:
    wide = x.leaves(f64)
    T = wide.temperature
    return reference.logits(wide.hidden, wide.head, T.expand(x.tokens.shape) if isinstance(T, torch.Tensor) else T).detach()


def oracle(x: Inputs, top_k: int = 0) -> reference.Statistics:
    wide = x.leaves(f64)
    with torch.no_grad():
        return reference.linear_logprobs(
            wide.hidden, wide.head, wide.tokens, mask=x.mask, temperature=wide.temperature, outputs=OUTPUTS, top_k=top_k
        )


def check(x: Inputs, got: TokenStatistics, top_k: int = 0) -> None:
    """Floats within the promise of a log-probability; ids and ranks those of logits that are off by no more than it."""
    want, z, keep = oracle(x, top_k), logits_of(x), x.keep()
    finite = torch.where(z.isfinite(), z.abs(), 0).amax(1)
    tolerance = logprob_tolerance(finite, x.hidden.dtype, x.head.hidden_size, KERNEL_DEVICE)
    assert got.logprobs.dtype == (f64 if x.hidden.dtype == f64 else f32)
    for name in ("logprobs", "entropy", "logsumexp", "mean_logits", "log_sum_sq_probs", "top_logprobs"):
        value, exact = getattr(got, name), getattr(want, name)
        if exact is None:
            assert value is None
            continue
        assert (value.dtype, value.shape) == (got.logprobs.dtype, exact.shape), name
        limit = tolerance
        if name in ("logprobs", "log_sum_sq_probs"):
            # log sum p^2 is close to 2 log p of a confident token, and as accurate as that
            own = want.logprobs.abs().clamp(max=1) + torch.finfo(value.dtype).tiny
            limit = tolerance * (own if name == "logprobs" else 2 * torch.where(want.logprobs > -0.5, own, 1))
        error = torch.where(value.double() == exact, 0, (value.double() - exact).abs())
        assert (error <= (limit if exact.dim() == 1 else limit[:, None])).all(), f"{name} is off by {error.max()}"
    own = z.gather(1, x.tokens.clamp(min=0)[:, None])
    others = z.scatter(1, x.tokens.clamp(min=0)[:, None], -torch.inf)
    margin = 2 * tolerance[:, None]
    best = got.argmax.clamp(min=0)[:, None]
    assert (z.gather(1, best) >= z.amax(1, keepdim=True) - margin)[keep].all()
    assert torch.equal(got.is_top1, (got.argmax == x.tokens) & keep)
    most, least = ((others > own + m).sum(1).clamp(min=1) for m in (-margin, margin))
    assert ((got.rank >= least) & (got.rank <= most))[keep & ~got.is_top1].all()
    assert not got.rank[got.is_top1].any()
    for ids in (got.argmax, got.rank, *([got.top_ids] if top_k else [])):
        assert ids.dtype == torch.int64
        assert (ids[~keep] == -1).all()
        assert ((ids >= 0) & (ids < z.shape[1]))[keep].all()
    if top_k:
        check_largest(got, z, keep, margin, tolerance)


def check_largest(
    got: TokenStatistics, z: torch.Tensor, keep: torch.Tensor, margin: torch.Tensor, tolerance: torch.Tensor
) -> None:
    ids, count = got.top_ids[keep], got.top_ids.shape[1]
    assert (z[keep].gather(1, ids) >= z[keep].topk(count).values - margin[keep]).all()
    assert all(len(set(row)) == count for row in ids.tolist())
    assert (got.top_logprobs.diff(dim=1) <= 0).all()
    assert torch.equal(ids[:, 0], got.argmax[keep])
    is_own = (ids == got.is_top1[keep, None] * got.argmax[keep, None]) & got.is_top1[keep, None]
    assert torch.equal(got.top_logprobs[keep][is_own], got.logprobs[keep][is_own.any(1)])


def whole_numbers(rows: int, vocab: int, dtype: torch.dtype = f32) -> Inputs:
    """Logits that every backend computes exactly, with many equal ones; the rows of the weight come twice."""
    hidden, weight = torch.randint(-2, 3, (rows, 8)).to(dtype), torch.randint(-2, 3, (vocab // 2, 8)).to(dtype)
    tokens = torch.randint(0, vocab, (rows,))
    return Inputs(hidden, LMHead(torch.cat([weight, weight])), tokens, torch.zeros(rows), torch.zeros(rows))
