"""Vocab-parallel heads on 2 and 4 ranks: the result of one process that has the whole weight, and errors on every rank.

All cases of a number of ranks run in one set of processes (`ranks`); the tests read their results.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, cached_property, partial
from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist
from problems import Result, check_result, logprobs_of, oracle, random_problem, relative_error
from ranks import results_of, run_jobs, run_on_ranks

from fastpg import CISPO, LMHead, PPOClip, Reinforce, linear_logprobs, linear_policy_loss, policy_loss, reference
from fastpg.crosscheck.cases import Inputs, Settings

pytestmark = pytest.mark.xdist_group("vocab-parallel ranks")  # its ranks are started once, not in every process

f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
SCHEDULES = ("one-pass", "two-pass", "entropy")


@cache
def made(make: Callable, arguments: tuple = (), options: tuple = ()) -> Inputs:
    """One problem for all cases that describe it alike: to plant rows from uncertain to sure takes longer than a case."""
    torch.manual_seed(0)
    return make(*arguments, **dict(options))


@dataclass
class Case:
    """One call. Test and ranks make its problem each for itself, from the same seed."""

    make: Callable[[], Inputs]
    edges: tuple[int, ...]  # rank r has the rows [edges[r], edges[r + 1]) of the weight
    schedule: str  # "one-pass", "two-pass", or "entropy": two-pass with a gradient through the entropy
    objective: object = CISPO()
    options: dict = field(default_factory=dict)
    workspaces: tuple[int, ...] | None = None  # by rank
    frozen: tuple[str, ...] = ()
    autocast: bool = False

    @cached_property
    def problem(self) -> Inputs:
        if isinstance(self.make, partial):
            return made(self.make.func, self.make.args, tuple(self.make.keywords.items()))
        return made(self.make)

    def on_rank(self, rank: int, group) -> Inputs:
        """The rank's rows of weight, bias and B. Masked rows of hidden hold NaN."""
        rows, head, hidden = slice(*self.edges[rank : rank + 2]), self.problem.head, self.problem.hidden
        if self.problem.mask is not None:
            hidden = torch.where(self.problem.mask[:, None], hidden, torch.nan)
        bias = None if head.bias is None else head.bias[rows]
        lora = head.lora and (head.lora.a, head.lora.b[rows], head.lora.scale)
        head = replace(head, weight=head.weight[rows], bias=bias, lora=lora, group=group, vocab_start=rows.start)
        return replace(self.problem, head=head, hidden=hidden)


def outcome(case: Case, problem: Inputs, **options) -> tuple[Result, torch.Tensor | None]:
    """What the case's schedule makes of the problem, and the entropies where they take part."""
    leaves, entropies = problem.leaves(), None
    for name in case.frozen:
        (leaves.hidden if name == "hidden" else leaves.head.weight).requires_grad_(False)
    inputs = leaves.hidden, leaves.head, leaves.tokens
    options |= {"mask": leaves.mask, "temperature": leaves.temperature}
    if case.schedule == "one-pass":
        out = linear_policy_loss(
            *inputs, leaves.old_logprobs, leaves.advantages, objective=case.objective, reduction="sum", **options
        )
        return Result.of(leaves, Settings(case.objective), out.logprobs, out.loss, out.metrics), None
    if case.schedule == "entropy":
        logprobs, entropies = linear_logprobs(*inputs, entropy=True, **options)
        loss = entropy_loss(problem, logprobs, entropies)
        return Result.of(leaves, Settings(Reinforce()), logprobs, loss), entropies.detach()
    logprobs = linear_logprobs(*inputs, **options).logprobs
    old, advantages = leaves.old_logprobs, leaves.advantages
    loss = policy_loss(logprobs, old, advantages, objective=case.objective, mask=leaves.mask, reduction="sum").loss
    return Result.of(leaves, Settings(case.objective), logprobs, loss), None


def entropy_loss(problem: Inputs, logprobs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    return -(problem.advantages.to(logprobs) * (logprobs + 0.3 * entropies)).sum()


def of_case(rank: int, case: Case) -> tuple[Result, torch.Tensor | None]:
    options = case.options | ({} if case.workspaces is None else {"workspace": case.workspaces[rank]})
    with torch.autocast("cpu", bf16, enabled=case.autocast):
        return outcome(case, case.on_rank(rank, dist.group.WORLD), **options)


def run_cases(rank: int, ranks: int) -> dict:
    return run_jobs({name: (of_case, case) for name, case in CASES[ranks].items()}, rank)


def plain_problem(dtype: torch.dtype) -> Inputs:
    problem = random_problem(60, 333, dtype)
    return moderate(problem) if dtype == f16 else problem


def everything(dtype: torch.dtype, rows: int = 90, vocab: int = 701, hidden_size: int = 64) -> Inputs:
    """Every feature of a head at once; per-token temperatures."""
    problem = random_problem(
        rows, vocab, dtype, hidden_size=hidden_size, bias=True, softcap=20.0, logit_scale=0.7, temperature="per-token",
        masked=True, lora=5, lora_dtype=None if dtype == torch.float64 else f32,
    )  # fmt: skip
    return moderate(problem) if dtype == f16 else problem


def with_fp32_head(problem: Inputs) -> Inputs:
    return replace(problem, head=replace(problem.head, fp32_head=True))


def moderate(problem: Inputs) -> Inputs:
    """For float16, whose range ends at 6e-8: ratios and 1 - p of order 1."""
    logprobs = logprobs_of(problem).float()
    mask = (logprobs < -0.01) if problem.mask is None else problem.mask & (logprobs < -0.01)
    return replace(problem, old_logprobs=logprobs - torch.randn(len(logprobs)), mask=mask)


def wild(*arguments, **options) -> Inputs:
    """Old log-probabilities of which some are far too low, so that sums leave the range."""
    problem = random_problem(*arguments, **options)
    rows = torch.arange(len(problem.tokens))
    return replace(problem, old_logprobs=torch.where(rows % 5 == 0, problem.old_logprobs - 55, problem.old_logprobs))


def with_common_component(lora: int | None) -> Inputs:
    """The rows of a trained embedding have much in common, which cancels in dX: over all ranks, not on one."""
    problem = random_problem(64, 333, bf16, lora=lora)
    weight = 0.2 * torch.randn(333, 64) + 2.0 * torch.randn(64)
    if lora is not None:
        b = problem.head.lora.b.float() + 5.0 * torch.randn(lora)
        factors = problem.head.lora._replace(b=b.to(bf16))
    head = replace(problem.head, weight=weight.to(bf16), lora=factors if lora else None)
    problem = replace(problem, hidden=torch.randn(64, 64).to(bf16), head=head)
    return replace(problem, old_logprobs=logprobs_of(problem).float())


def all_masked(make: Callable[[], Inputs]) -> Inputs:
    problem = make()
    return replace(problem, mask=torch.zeros_like(problem.tokens, dtype=torch.bool))


def parity_cases() -> dict[int, dict[str, Case]]:
    """By number of ranks and name."""
    uneven = (0, 100, 101, 460, 701)  # one rank has a single row
    two, four = {}, {}
    for dtype, schedule in product((f32, bf16, f16, torch.float64), SCHEDULES):
        name = f"{schedule} {str(dtype)[6:]}"
        plain, full = partial(plain_problem, dtype), partial(everything, dtype)
        two[f"{name} plain"] = Case(plain, (0, 167, 333), schedule)
        two[f"{name} one row"] = Case(full, (0, 700, 701), schedule)
        four[f"{name} everything"] = Case(full, uneven, schedule)
        four[f"{name} no checks"] = Case(full, (0, 176, 352, 528, 701), schedule, options={"check": False})
    for dtype, schedule, check in product((f32, bf16, f16), SCHEDULES, (True, False)):
        name = f"{schedule} {str(dtype)[6:]} triton {'' if check else 'no '}checks"
        options = {"backend": "triton", "check": check}
        two[name] = Case(partial(everything, dtype, 20, 151, 32), (0, 150, 151), schedule, options=options)
    for schedule in ("one-pass", "two-pass"):
        # chunks as long as the workspace allows on the largest shard must be cut alike on all
        workspaces = (2 * 2**20, 3 * 2**20, 8 * 2**20, 64 * 2**20)
        long = partial(random_problem, 1100, 701, f32, temperature="per-token", masked=True)
        four[f"{schedule} several chunks"] = Case(long, (0, 640, 641, 700, 701), schedule, workspaces=workspaces)
        for lora in (None, 3):
            name = f"{schedule} common component{' lora' if lora else ''}"
            two[name] = Case(partial(with_common_component, lora), (0, 100, 333), schedule, Reinforce())
        some, edges = partial(random_problem, 40, 333, f32, bias=True, lora=3), (0, 100, 333)
        for frozen in (("hidden",), ("weight",), ("hidden", "weight")):
            two[f"{schedule} frozen {' '.join(frozen)}"] = Case(some, edges, schedule, frozen=frozen)
        two[f"{schedule} all masked"] = Case(partial(all_masked, some), edges, schedule)
        two[f"{schedule} no tokens"] = Case(partial(random_problem, 0, 333, f32, bias=True, lora=3), edges, schedule)
        asked = Case(lambda: with_fp32_head(everything(f32)), (0, 250, 701), schedule, autocast=True)
        two[f"{schedule} fp32_head under autocast"] = asked
        two[f"{schedule} PPO"] = Case(some, edges, schedule, PPOClip(0.2))
    long = partial(wild, 600, 701, bf16, lora=4)
    four["one-pass wild"] = Case(long, uneven, "one-pass", workspaces=(4 * 2**20,) * 4)
    options = {"backend": "triton"}
    two["one-pass wild triton"] = Case(partial(wild, 20, 151, f32), (0, 60, 151), "one-pass", options=options)
    two["one-pass entropy reported"] = Case(some, edges, "one-pass", options={"entropy": True})
    return {2: two, 4: four}


CASES = parity_cases()
NAMES = [(ranks, name) for ranks, cases in CASES.items() for name in cases]


@pytest.fixture(scope="module")
def parity() -> dict:
    return {}


def of_each_rank(parity: dict, ranks: int, name: str) -> list[tuple[Result, torch.Tensor | None]]:
    """By rank, of one case; the first one asked for runs all of that number of ranks."""
    if ranks not in parity:
        parity[ranks] = None
        parity[ranks] = run_on_ranks(run_cases, ranks, ranks, timeout=150)
    if parity[ranks] is None:
        pytest.fail(f"the processes of the {ranks} ranks failed, as another test shows")
    return results_of(parity[ranks], name)


def put_together(results: list[Result]) -> Result:
    """Rank 0's result with the rows of all ranks."""
    rows = {name: torch.cat([r[name] for r in results]) for name in ("dW", "db", "dB") if name in results[0]}
    return Result(results[0] | rows, results[0].settings)


def want_of(case: Case) -> Result:
    """The float64 oracle's, on the whole weight."""
    if case.schedule != "entropy":
        return oracle(case.problem, case.objective)
    wide = case.problem.leaves(torch.float64)
    logprobs, entropies = reference.linear_logprobs(
        wide.hidden, wide.head, wide.tokens, mask=wide.mask, temperature=wide.temperature
    )
    return Result.of(wide, Settings(Reinforce()), logprobs, entropy_loss(wide, logprobs, entropies))


@pytest.mark.parametrize(("ranks", "name"), NAMES, ids=[f"{n}, {r} ranks" for r, n in NAMES])
def test_like_one_process(parity, ranks, name):
    """Log-probabilities have equal bits on all ranks; dX and dA are complete and equal on each; dW, db and dB are the rank's
    rows; all of them as accurate as one process promises to be."""
    case = CASES[ranks][name]
    results = [result for result, _ in of_each_rank(parity, ranks, name)]
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for same in {"logp", "loss", "dX", "dA"} & other.keys():
            assert torch.equal(results[0][same], other[same]), same
    for result, (start, stop) in zip(results, pairwise(case.edges), strict=True):
        assert len(result.get("dW", range(stop - start))) == stop - start
    got, want = put_together(results), want_of(case)
    if case.problem.mask is not None and "dX" in got:
        assert (got["dX"][~case.problem.mask] == 0).all()
    assert ("dX" not in got, "dW" not in got) == ("hidden" in case.frozen, "weight" in case.frozen)
    frozen = {"hidden": "dX", "weight": "dW"}
    got = Result(got | {frozen[name]: want[frozen[name]].to(case.problem.hidden.dtype) for name in case.frozen}, got.settings)
    check_result(case.problem, got, want)


@pytest.mark.parametrize("name", ["one-pass wild", "one-pass wild triton"])
def test_rows_are_recomputed_on_all_ranks(parity, name):
    ranks = 4 if name in CASES[4] else 2
    counts = {int(result.metrics["recomputed_tokens"]) for result, _ in of_each_rank(parity, ranks, name)}
    assert len(counts) == 1
    assert counts.pop() >= 1


def test_silenced_rows_leave_the_products_on_all_ranks(parity):
    counts = {int(result.metrics["silenced_tokens"]) for result, _ in of_each_rank(parity, 2, "one-pass PPO")}
    assert len(counts) == 1
    assert counts.pop() >= 5


@pytest.mark.parametrize("name", [n for n in CASES[4] if n.startswith("entropy")])
def test_entropies(parity, name):
    """As accurate as log-probabilities, and of equal bits on all ranks."""
    case = CASES[4][name]
    entropies = [entropy for _, entropy in of_each_rank(parity, 4, name)]
    wide = case.problem.leaves(torch.float64)
    want = reference.linear_logprobs(wide.hidden, wide.head, wide.tokens, mask=wide.mask, temperature=wide.temperature)[1]
    assert all(torch.equal(entropies[0], other) for other in entropies)
    assert torch.allclose(entropies[0].double(), want, rtol=1e-5, atol=1e-5)


def test_reported_entropy(parity):
    case = CASES[2]["one-pass entropy reported"]
    wide = case.problem.leaves(torch.float64)
    want = reference.linear_logprobs(wide.hidden, wide.head, wide.tokens)[1].mean()
    for result, _ in of_each_rank(parity, 2, "one-pass entropy reported"):
        assert relative_error(result.metrics["entropy"], want) < 1e-5


# What does not fit. Each case changes the arguments of some ranks; every rank must raise, with what is said here of it (a
# string for all ranks, or one by rank), and the group must still serve a correct call.
BAD: dict[str, tuple[Callable[[dict, int], None], str | tuple[str, ...]]] = {}


def bad(name: str, said: str | tuple[str, ...]) -> Callable:
    def register(change: Callable[[dict, int], None]) -> None:
        BAD[name] = change, said

    return register


def on_rank_1(name: str, said: str | tuple[str, ...], **arguments: Callable[[dict], object]) -> None:
    """Rank 1 is given other arguments; a function makes each from the right ones."""

    def change(given: dict, rank: int) -> None:
        if rank == 1:
            given |= {name: make(dict(given)) for name, make in arguments.items()}

    bad(name, said)(change)


OTHER_FAILED = "the call failed on rank(s) [1]"
on_rank_1("overlap", "overlap at 24", vocab_start=lambda a: 24)
on_rank_1("gap", "leave a gap at 25", vocab_start=lambda a: 26)
on_rank_1("other tokens", "tokens and mask", tokens=lambda a: a["tokens"].flip(0))
on_rank_1("other mask", "tokens and mask", mask=lambda a: torch.arange(12) != 3)
on_rank_1("fewer tokens", "number of tokens", **{n: lambda a, n=n: a[n][:5] for n in ("hidden", "tokens", "old", "advantages")})
on_rank_1(
    "other H", "size H", hidden=lambda a: a["hidden"][:, :7], weight=lambda a: a["weight"][:, :7], a=lambda a: a["a"][:, :7]
)
on_rank_1("other temperature", "temperature", temperature=lambda a: 0.9)
on_rank_1("other temperatures", "temperature", temperature=lambda a: torch.linspace(0.5, 1.5, 12))
on_rank_1("other rank of LoRA", "rank of lora", a=lambda a: a["a"][:2], b=lambda a: a["b"][:, :2])
on_rank_1("other scale of LoRA", "lora's scale", lora_scale=lambda a: 0.25)
on_rank_1("no LoRA", "rank of lora", a=lambda a: None)
on_rank_1("other softcap", "softcap", softcap=lambda a: 30.0)
on_rank_1("other scale", "logit_scale", logit_scale=lambda a: 0.5)
on_rank_1("other fp32_head", "agree on fp32_head", fp32_head=lambda a: True)
on_rank_1("other weight, for fp32_head alone", (OTHER_FAILED, "fp32_head=True"), weight=lambda a: a["weight"].bfloat16())
on_rank_1("frozen hidden", "need a gradient", hidden=lambda a: a["hidden"].detach())
on_rank_1("other dtype", "dtype of hidden", **{n: lambda a, n=n: a[n].double() for n in ("hidden", "weight", "a", "b")})
on_rank_1("mask of a wrong dtype", (OTHER_FAILED, "mask must be a bool tensor"), mask=lambda a: torch.ones(12))
on_rank_1("hidden of a wrong size", (OTHER_FAILED, "hidden must be (..., H)"), hidden=lambda a: a["hidden"][:, :7])
on_rank_1("hidden is none", (OTHER_FAILED, "hidden must be a tensor"), hidden=lambda a: None)
on_rank_1("workspace too small", (OTHER_FAILED, "too small"), workspace=lambda a: 1)
on_rank_1("vocab_start missing on one", (OTHER_FAILED, "head.vocab_start is needed"), vocab_start=lambda a: None)


# The next two would let one rank compute rows, or compute rows again, that the other knows nothing of.
@bad("other check", "check")
def _(given: dict, rank: int) -> None:
    given |= {"mask": torch.arange(12) != 3, "check": rank == 0}


@bad("nothing to differentiate on one", "gradient")
def _(given: dict, rank: int) -> None:
    # sums that leave their range
    given |= {"hidden": 30 * given["hidden"].detach(), "weight": given["weight"].detach().requires_grad_(rank == 0)}


@bad("token beyond the vocabulary", "tokens must be in [0, 50)")
def _(given: dict, rank: int) -> None:
    given["tokens"] = torch.cat([given["tokens"][1:], torch.tensor([50])])


@bad("negative token", "tokens must be in [0, 50), the vocabulary of all ranks, or -100; got -3")
def _(given: dict, rank: int) -> None:
    given["tokens"] = torch.cat([given["tokens"][1:], torch.tensor([-3])])


@bad("vocab_start missing", "head.vocab_start is needed")
def _(given: dict, rank: int) -> None:
    given["vocab_start"] = None


@bad("not a group", "head.group must be a torch.distributed process group")
def _(given: dict, rank: int) -> None:
    given["group"] = "WORLD"


@bad("not in the group", "process group that this rank belongs to")
def _(given: dict, rank: int) -> None:
    given["group"] = dist.GroupMember.NON_GROUP_MEMBER


@bad("no backend for the device", "head.group has no backend for cpu tensors")
def _(given: dict, rank: int) -> None:
    given["group"] = given["for_cuda"]


def right_arguments(rank: int, group) -> dict:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight, a, b = random(12, 8), random(50, 8), random(3, 8), random(50, 3)
    rows = slice(25 * rank, 25 * rank + 25)
    return {
        "hidden": hidden.requires_grad_(), "weight": weight[rows].requires_grad_(), "a": a, "b": b[rows], "softcap": None,
        "lora_scale": 0.5, "logit_scale": 1.0, "group": group, "vocab_start": rows.start, "old": random(12) - 3,
        "advantages": random(12), "tokens": torch.arange(12) * 4, "mask": None, "temperature": 1.0, "workspace": None,
        "check": True, "fp32_head": False,
    }  # fmt: skip


def call(schedule: str, given: dict) -> torch.Tensor:
    lora = None if given["a"] is None else (given["a"], given["b"], given["lora_scale"])
    head = LMHead(
        given["weight"], softcap=given["softcap"], logit_scale=given["logit_scale"], lora=lora, group=given["group"],
        vocab_start=given["vocab_start"], fp32_head=given["fp32_head"],
    )  # fmt: skip
    options = {name: given[name] for name in ("mask", "temperature", "workspace", "check")}
    if schedule == "two-pass":
        return linear_logprobs(given["hidden"], head, given["tokens"], **options).logprobs.sum()
    arguments = given["hidden"], head, given["tokens"], given["old"], given["advantages"]
    return linear_policy_loss(*arguments, objective=CISPO(), **options).loss


def run_bad_input(rank: int) -> dict:
    """By case and schedule: the error, the seconds until it came, and dX of a correct call made then."""
    results, for_cuda = {}, dist.new_group(backend="cuda:gloo")
    for name, schedule in product(BAD, ("one-pass", "two-pass")):
        # its own group, whose collectives give up soon: a case that hangs leaves the others alone
        group = dist.new_group(timeout=timedelta(seconds=10))
        given = right_arguments(rank, group) | {"for_cuda": for_cuda}
        BAD[name][0](given, rank)
        error, start = None, time.monotonic()
        try:
            call(schedule, given)
        except Exception as e:
            error = e
        seconds = time.monotonic() - start
        given = right_arguments(rank, group)
        try:
            call(schedule, given).backward()
        except Exception as e:
            given["hidden"].grad = None
            error = f"{error}, and then {e}"
        results[name, schedule] = type(error), str(error), seconds, given["hidden"].grad
        dist.barrier()
    return results


@pytest.fixture(scope="module")
def bad_input() -> list[dict]:
    return run_on_ranks(run_bad_input, 2, timeout=120)


@pytest.mark.parametrize("schedule", ["one-pass", "two-pass"])
@pytest.mark.parametrize("name", BAD)
def test_every_rank_raises_and_the_group_lives_on(bad_input, name, schedule):
    for rank, result in enumerate(bad_input):
        kind, message, seconds, gradient = result[name, schedule]
        said = BAD[name][1]
        assert kind in (TypeError, ValueError), message
        assert (said if isinstance(said, str) else said[rank]) in message
        assert seconds < 5
        assert torch.allclose(gradient, whole_gradient(schedule), rtol=1e-4, atol=1e-6)


def whole_gradient(schedule: str) -> torch.Tensor:
    """dX of a correct call, in one process."""
    shards = [right_arguments(rank, None) for rank in range(2)]
    given = shards[0] | {"vocab_start": None} | {name: torch.cat([s[name] for s in shards]) for name in ("weight", "b")}
    call(schedule, given).backward()
    return given["hidden"].grad


def test_without_torch_distributed():
    head = LMHead(torch.randn(5, 4), group="WORLD", vocab_start=0)
    with pytest.raises(ValueError, match="init_process_group"):
        linear_logprobs(torch.randn(3, 4), head, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("start", [-1, True, 1.0])
def test_vocab_start_is_an_index(start):
    with pytest.raises(ValueError, match="vocab_start must be an int >= 0"):
        LMHead(torch.randn(5, 4), group="WORLD", vocab_start=start)


def test_vocab_start_belongs_to_a_group():
    with pytest.raises(ValueError, match=r"vocab_start=0 needs head\.group"):
        LMHead(torch.randn(5, 4), vocab_start=0)
