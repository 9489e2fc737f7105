"""Random problems: shapes, strides, dtypes, masks, sets, extreme logits and ratios, each optional argument present or absent.

Accuracy is that of `fastpg.crosscheck`, against the float64 oracle; the rest is about bits. FASTPG_EXAMPLES=2000 tries more
problems than the few that `make test` has time for.
"""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampled_sets import logprobs_over, oracle_over
from schedules import TORCH

from fastpg import (
    CISPO,
    SAPO,
    ImportanceWeighted,
    KLPenalty,
    LMHead,
    PPOClip,
    Reinforce,
    Support,
    linear_logprobs,
    linear_policy_loss,
    reference,
)
from fastpg.crosscheck.cases import Inputs, Settings, reference_loss
from fastpg.crosscheck.judge import deviations

EXAMPLES = int(os.environ.get("FASTPG_EXAMPLES", "100"))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OBJECTIVES = [Reinforce(), ImportanceWeighted(), CISPO(), CISPO(2.0, 0.5), CISPO(None), PPOClip(0.2, 0.28, 3.0), SAPO()]
JUMPS = torch.tensor([0.5, 0.8, 1.28, 2.0, 3.0, 5.0], dtype=torch.float64)
# what the autouse fixtures of conftest do is the same for every example
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def examples(share: float):
    count = max(int(EXAMPLES * share), 5)
    return settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=QUIET)


def strided(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same matrix in another memory layout."""
    rows, columns = x.shape
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "sliced":  # rows of a larger matrix, at an odd offset; NaN around them
        return torch.full((rows + 2, columns + 3), torch.nan, dtype=x.dtype)[1:-1, 1:-2].copy_(x)
    if layout == "every second":
        return torch.full((rows, 2 * columns), torch.nan, dtype=x.dtype)[:, ::2].copy_(x)
    if layout == "expanded":  # one row, many times
        return x[:1].expand(rows, columns)
    return x


LAYOUTS = st.sampled_from(["contiguous", "transposed", "sliced", "every second", "expanded"])


SETS = {"one": (1, 1), "small": (2, 8), "large": (9, 2**31), "whole": (2**31, 2**31)}  # sizes, of which at most V are there


def sets(kind: str, tokens: torch.Tensor, vocab: int, generator: torch.Generator) -> torch.Tensor | None:
    """(N, V) bool: of each row, its token and others; None for no sets. Of "mixed" sets each row has one of any kind."""
    if kind == "none":
        return None
    kinds = torch.randint(0, len(SETS), tokens.shape, generator=generator)
    kinds = kinds if kind == "mixed" else torch.full_like(kinds, [*SETS].index(kind))
    low, high = (torch.tensor(ends).clamp(max=vocab)[kinds] for ends in zip(*SETS.values(), strict=True))
    sizes = low + ((high - low + 1) * torch.rand(tokens.shape, generator=generator)).long()
    order = torch.rand(len(tokens), vocab, generator=generator).scatter_(1, tokens[:, None], -1.0)
    return order.argsort(1).argsort(1) < sizes[:, None]


def support_of(x: Inputs, members: torch.Tensor | None, spoilt: bool = False) -> Support | None:
    """The sets. Every second one descends, or has each id where it is the whole vocabulary. spoilt: anything where masked."""
    if members is None:
        return None
    found = [None if row.all() and n % 2 else row.nonzero()[:, 0] for n, row in enumerate(members)]
    found = [ids if ids is None or n % 2 else ids.flip(0) for n, ids in enumerate(found)]
    if spoilt:
        garbage = [[], [0, 0], [-7, members.shape[1]], None]
        found = [ids if k else garbage[n % 4] for n, (ids, k) in enumerate(zip(found, x.keep().tolist(), strict=True))]
    return Support.from_lists(found)


@st.composite
def problems(draw, dtypes=DTYPES, largest=(40, 200, 40)):
    """(Inputs, Settings, sets). Log ratios away from jumps by 1e-2; in fp16 of order 1, and rows that it can hold."""
    dtype = draw(st.sampled_from(dtypes))
    rows, vocab, hidden_size = (draw(st.integers(low, high)) for low, high in zip((0, 1, 1), largest, strict=True))
    if dtype.itemsize == 2:  # dW of a few numbers: its three roundings do not average out
        hidden_size = max(hidden_size, 8)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    some = st.booleans()
    size = draw(st.sampled_from([0.01, 1.0, 5.0, 60.0] if dtype != torch.float16 else [0.01, 1.0]))
    head_options = {}
    if draw(some):
        head_options["bias"] = normal(vocab).to(dtype)
    if draw(some):
        head_options["softcap"] = draw(st.sampled_from([1.0, 5.0, 30.0]))
    if draw(some):
        head_options["logit_scale"] = draw(st.sampled_from([0.0625, 0.7, 3.0]))
    if draw(some):
        rank = draw(st.integers(1, 9))
        wide = torch.float64 if dtype == torch.float64 else draw(st.sampled_from([dtype, torch.float32]))
        head_options["lora"] = (normal(rank, hidden_size) * 0.2).to(wide), (normal(vocab, rank) * 0.5).to(wide), 0.7
    weight = strided((normal(vocab, hidden_size) * size / hidden_size**0.5).to(dtype), draw(LAYOUTS))
    head = LMHead(weight, **head_options)

    hidden, tokens = normal(rows, hidden_size).to(dtype), torch.randint(0, vocab, (rows,), generator=generator)
    if rows > 1 and draw(some):
        hidden[rows // 2], tokens[rows // 2] = hidden[0], tokens[0]
    if draw(some) and size <= 5 and dtype != torch.float16:  # confident rows
        w_y = weight.float()[tokens[::3]]
        hidden[::3] += (draw(st.sampled_from([5.0, 20.0])) * w_y / w_y.square().sum(1, keepdim=True).clamp(min=0.1)).to(dtype)
    if rows:
        hidden = strided(hidden, draw(LAYOUTS))
    if head.softcap is not None and rows:
        # 1 - tanh^2 of u / c is known to 2 |u| / c times what u is: far beyond the cap no promise could hold
        u = reference.logits(hidden, replace(head, softcap=None)).abs()
        head = replace(head, softcap=max(head.softcap, u[u.isfinite()].max().item() / 10))
    temperature = draw(st.sampled_from([1.0, 0.6, None]))
    temperature = uniform(rows) + 0.5 if temperature is None else temperature
    mask = uniform(rows) > draw(st.sampled_from([0.1, 0.5, 1.0])) if draw(some) else None

    members = sets(draw(st.sampled_from(["none", "mixed", *SETS])), tokens, vocab, generator)
    objective = draw(st.sampled_from(OBJECTIVES))
    penalty = KLPenalty(0.1, draw(st.sampled_from(["k1", "k2"]))) if draw(some) else None
    rollout = uniform(rows) + 0.5 if draw(some) else None
    reduction = draw(st.sampled_from(["sum", "token-mean"])) if dtype != torch.float16 else "sum"
    advantages = normal(rows).sign() * (0.5 + uniform(rows))
    if draw(some):
        advantages[::4] = 0

    x = Inputs(hidden, head, tokens, None, advantages, mask, temperature, None, rollout)
    logprobs, _ = logprobs_over(replace(x, mask=None), members)
    extreme = isinstance(objective, (Reinforce, ImportanceWeighted, CISPO)) and penalty is None and dtype != torch.float16
    widest = draw(st.sampled_from([0.0, 1.0, 40.0])) if extreme else 1.0
    log_ratio = widest * normal(rows).clamp(-1.9, 1.9).double()
    log_ratio = torch.where((log_ratio.exp()[:, None] / JUMPS - 1).abs().amin(1) < 1e-2, log_ratio + 0.05, log_ratio)
    old = (logprobs - log_ratio).to(torch.float64 if dtype == torch.float64 else torch.float32)
    # far logits are rounded to 1e-3 by an old log-probability in fp32, and 1e-6 max(10, |z|) of them is 1e-2: a jump is near
    if size == 60.0:
        objective, penalty = draw(st.sampled_from([Reinforce(), ImportanceWeighted(), CISPO(None)])), None
    if penalty is not None:
        x = replace(x, ref_logprobs=logprobs + normal(rows))
    on_policy = draw(st.booleans())
    if dtype == torch.float16:
        fine = logprobs < -0.01 if members is None else (logprobs < -0.01) | (members.sum(1) == 1)
        mask = fine if mask is None else mask & fine
    x = replace(x, old_logprobs=None if on_policy else old, mask=mask)
    return x, Settings(objective, reduction, penalty), members


def with_garbage(x: Inputs) -> Inputs:
    """NaN, inf and huge numbers at whatever is masked."""
    keep = x.keep()
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.finfo(x.hidden.dtype).max])

    def spoil(values):
        if values is None or not isinstance(values, torch.Tensor):
            return values
        bad = garbage[torch.arange(len(values)) % 4].to(values.dtype)
        return torch.where(keep.view(-1, *[1] * (values.dim() - 1)), values, bad.view(-1, *[1] * (values.dim() - 1)))

    names = ("hidden", "old_logprobs", "advantages", "ref_logprobs", "rollout_weights")
    return replace(x, **{name: spoil(getattr(x, name)) for name in names}, tokens=torch.where(keep, x.tokens, 2**40))


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].nan_to_num(7.0), b[name].nan_to_num(7.0)), name


def size_of_rows(x: Inputs, how: Settings, members: torch.Tensor | None) -> torch.Tensor:
    """Half of sum_v |dscore_nv| |w_v|, (N,): a row of dX if nothing cancels, as it does where rows of W are alike."""
    wide, keep = x.leaves(torch.float64), x.keep()
    head, T = wide.head, wide.temperature
    weight = head.weight if head.lora is None else head.weight + head.lora.scale * head.lora.b @ head.lora.a
    scores = wide.hidden @ weight.T + (0 if head.bias is None else head.bias)
    scores = scores.detach().requires_grad_()
    z = reference.softcap(head.logit_scale * scores, head.softcap) / (T[:, None] if isinstance(T, torch.Tensor) else T)
    z = z if members is None else torch.where(members, z, -torch.inf)
    logprobs = torch.where(keep, reference.token_distribution(z, x.tokens)[0], 0)
    (gradient,) = torch.autograd.grad(reference_loss(logprobs, wide, how), scores)
    return gradient.abs() @ weight.detach().norm(dim=1) / 2


def outcome(schedule, x: Inputs, how: Settings, members: torch.Tensor | None, backend: str, spoilt: bool = False) -> dict:
    support = support_of(x, members, spoilt)
    return schedule(with_garbage(x) if spoilt else x, how.objective, how.reduction, how.kl, backend=backend, support=support)


def check_accuracy(x: Inputs, how: Settings, members: torch.Tensor | None, backend: str) -> None:
    want = oracle_over(x, members, how.objective, how.reduction, how.kl) | {"scale": size_of_rows(x, how, members)}
    for schedule in TORCH:
        found = deviations(x, how, outcome(schedule, x, how, members, backend), want)
        missed = [str(d) for d in found if d.multiple > 1 and d.multiple > cancellation(d.quantity, x, how, members, want)]
        assert not missed, (schedule.__name__, missed)


def cancellation(quantity: str, x: Inputs, how: Settings, members: torch.Tensor | None, want: dict) -> float:
    """The sum of the tokens' absolute shares of a gradient of the head, over that gradient: shares are what is rounded."""
    if quantity not in ("dW", "db", "dA", "dB"):
        return 1.0
    places, sizes = x.keep().nonzero()[:, 0], torch.zeros_like(want[quantity])
    for n in places:
        only = replace(x, mask=torch.arange(len(x.tokens)) == n)
        sizes += oracle_over(only, members, how.objective, "sum", how.kl)[quantity].abs()
    count = max(len(places), 1) if how.reduction == "token-mean" else 1
    shares = (sizes.norm() / count / want[quantity].norm().clamp(min=2.0**-100)).item()
    # three roundings of at most 2^-9 average out, to 5e-3, over many numbers, but not over the few of these heads
    return shares * (3 * 2.0**-9 / 5e-3 if x.hidden.dtype == torch.bfloat16 else 1.0)


def check_bits(x: Inputs, how: Settings, members: torch.Tensor | None, backend: str) -> None:
    for schedule in TORCH:
        once = outcome(schedule, x, how, members, backend)
        same(once, outcome(schedule, x, how, members, backend))
        if x.mask is not None:
            same(once, outcome(schedule, x, how, members, backend, spoilt=True))
            assert (once["dX"][~x.mask] == 0).all()
            assert (once["logp"][~x.mask] == 0).all()


def check_permutation(x: Inputs, how: Settings, members: torch.Tensor | None, backend: str, seed: int) -> None:
    """Log-probabilities and entropies of permuted rows are the permuted ones, and of any subset the subset."""
    order, support = torch.randperm(len(x.tokens), generator=torch.Generator().manual_seed(seed)), support_of(x, members)
    every = slice(None)

    def given(rows, *names):
        found = {name: getattr(x, name) for name in ("mask", "temperature", *names)}
        found = {name: v[rows] if isinstance(v, torch.Tensor) else v for name, v in found.items()}
        places = torch.arange(len(order))[rows]
        return found | {"support": None if support is None else support.select(places), "backend": backend}

    def values(rows):
        return linear_logprobs(x.hidden[rows], x.head, x.tokens[rows], entropy=True, **given(rows))

    whole = values(every)
    for rows in (order, order[: len(order) // 3]):
        part = values(rows)
        assert torch.equal(part.logprobs, whole.logprobs[rows])
        assert torch.equal(part.entropy, whole.entropy[rows])
    if x.old_logprobs is None:
        return

    def loss(rows):
        hidden = x.hidden[rows].detach().clone().requires_grad_()
        out = linear_policy_loss(
            hidden, x.head, x.tokens[rows], x.old_logprobs[rows], x.advantages[rows], objective=how.objective, kl=how.kl,
            reduction="sum", **given(rows, "ref_logprobs", "rollout_weights"),
        )  # fmt: skip
        return out.logprobs.nan_to_num(7.0)

    assert torch.equal(loss(order), loss(every)[order])


@given(problems())
@examples(1)
def test_the_torch_backend_matches_the_oracle(problem):
    check_accuracy(*problem, "torch")


@given(problems())
@examples(0.5)
def test_bits_of_the_torch_backend(problem):
    check_bits(*problem, "torch")


@pytest.mark.this_cpu
@given(problems(), st.integers(0, 2**31))
@examples(0.5)
def test_permuted_rows_of_the_torch_backend(problem, seed):
    check_permutation(*problem, "torch", seed)


KERNELS = problems(DTYPES[1:], (12, 40, 24))
IN_THE_INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="on CPU tensors, in the interpreter")


@IN_THE_INTERPRETER
@given(KERNELS)
@examples(0.06)
def test_the_kernels_match_the_oracle(problem):
    check_accuracy(*problem, "triton")


@IN_THE_INTERPRETER
@given(KERNELS, st.integers(0, 2**31))
@examples(0.03)
def test_bits_of_the_kernels(problem, seed):
    check_bits(*problem, "triton")
    check_permutation(*problem, "triton", seed)
