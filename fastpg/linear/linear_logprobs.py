"""Log-probabilities and entropies as a differentiable function of hidden states and the lm_head: the two-pass schedule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict, overload

import torch

from ..distributed import vocab_parallel
from ..distributed.agreement import Facts, one_outcome
from ..lm_head import LMHead
from ..tiles.host_read import HostRead
from ..tiles.structures import (
    Asked,
    Entries,
    Further,
    Gradients,
    Head,
    Incoming,
    RowResults,
    RowStatistics,
    Wanted,
    beyond_entropy,
)
from . import operators
from .call import (
    counted,
    differentiable,
    head_of,
    needs_gradient,
    prepare,
    skips_silenced,
    with_inputs,
    without_autocast,
)
from .kept import Kept
from .online import Plan
from .outputs import TokenStatistics, asked_of, check_top_k, token_statistics
from .rows import Rows, rows_of
from .statistics import row_results, set_results
from .support import RowSets, Support, agreed_sets, sets_of
from .workspace import plan_logprobs

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TokenLogprobs(NamedTuple):
    """logprobs (...): log-probability of each token, 0 where masked. entropy (...): of each token's distribution, or None.

    Both float32, or float64 for float64 inputs.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None


class LogprobOptions(TypedDict, total=False):
    """Keyword arguments of `linear_logprobs` that do not decide what it returns; a test holds them to its signature."""

    mask: torch.Tensor | Kept | None
    support: Support | None
    temperature: float | torch.Tensor
    entropy: bool
    skip_silenced: bool | None
    workspace: int | None
    backend: str | None
    check: bool


@overload
def linear_logprobs(
    hidden: torch.Tensor, head: torch.Tensor | LMHead, tokens: torch.Tensor, **options: Unpack[LogprobOptions]
) -> TokenLogprobs: ...


@overload
def linear_logprobs(
    hidden: torch.Tensor, head: torch.Tensor | LMHead, tokens: torch.Tensor, *, outputs: Sequence[str], top_k: int = 0,
    **options: Unpack[LogprobOptions],
) -> TokenStatistics: ...  # fmt: skip


@overload
def linear_logprobs(
    hidden: torch.Tensor, head: torch.Tensor | LMHead, tokens: torch.Tensor, *, top_k: int, **options: Unpack[LogprobOptions]
) -> TokenStatistics: ...


def linear_logprobs(
    hidden: torch.Tensor,  # (..., H)
    head: torch.Tensor | LMHead,  # (V, H), or an LMHead
    tokens: torch.Tensor,  # (...)
    *,
    mask: torch.Tensor | Kept | None = None,  # (...)
    support: Support | None = None,
    temperature: float | torch.Tensor = 1.0,  # number or (...)
    entropy: bool = False,
    outputs: Sequence[str] = (),
    top_k: int = 0,
    skip_silenced: bool | None = None,
    workspace: int | None = None,
    backend: str | None = None,
    check: bool = True,
) -> TokenLogprobs | TokenStatistics:
    """log softmax(logits)[token] for each token, and the entropy of softmax(logits), without the logits.

        z    = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature
        logp = z[token] - logsumexp_v z_v          H = -sum_v p_v log p_v

    Both results are differentiable in hidden, weight and bias, so that any loss can be written on top. The forward keeps a few
    numbers per row, and the backward recomputes the logits tile by tile: four matrix products in all. Logits are fp32 for bf16
    and fp16 inputs. Gradients are summed in fp32 and rounded once.

    With `outputs` or `top_k` the result is a `TokenStatistics`, which has a field for each of these. They come from the same
    sweep over the vocabulary, and what is not asked for costs nothing. On a GPU, asking may change the last bits of the others.

        "entropy"            H, as with entropy=True
        "logsumexp"          logsumexp_v z_v, differentiable, so that a z-loss can be written on top
        "argmax"             the id of the largest logit, the smallest id of equal logits
        "is_top1"            argmax == token
        "mean_logits"        sum_v z_v / V, differentiable, so that label smoothing can be
        "log_sum_sq_probs"   log sum_v p_v^2
        "rank"               0 where is_top1, else the number of v != token with z_v > z[token], but at least 1
        top_k=k              the k largest log p_v in descending order, and their ids (..., k)

    Only logprobs, entropy, logsumexp and mean_logits are differentiable.

    Args:
        hidden: (..., H) float16, bfloat16, float32 or float64; hidden[..., t, :] is the state that predicts tokens[..., t]
            (already shifted). Hidden states that cannot be viewed as (N, H), such as `states[:, :-1]`, are copied once. To
            avoid that, pass all states and end `tokens` with -100. Of a DTensor, which must be replicated, the local tensor.
        head: the weight (V, H) in hidden's dtype, or an LMHead with bias, softcap and logit_scale. Under torch.autocast hidden
            and head are used in its dtype, float32 ones too, unless LMHead(weight, fp32_head=True) asks for float32.
        tokens: (...) int64 or int32 in [0, V); -100 means "not a token": value 0, no work, gradient exactly 0.
        mask: (...) bool, False means the same. Nothing at a masked position is ever read into the arithmetic. A `Kept`, which
            `fastpg.kept` makes of it before the model runs, saves the wait for the number of rows.
        support: a `Support`, the set of tokens that each position's softmax is over: those that the sampler kept. Sums over v
            are then over the set, V in mean_logits is its size, and all others have gradient 0. In top_k, what a set has too
            few of has the log-probability -inf and the id -1. Rows with small sets (at most V / 256 tokens on accelerators, on
            a CPU V / 32, or V / 64 of a 16-bit weight) cost dot products with gathered rows of the weight, and beside the
            workspace about 70 bytes of memory for each of their tokens. Rows whose set is their token alone cost nothing.
            Other rows take the products of the whole vocabulary, and a bit for each logit, V / 8 bytes a row, until backward;
            with check=False, where the host does not look at sizes, all rows do.
        temperature: > 0, a number or per token (...); divides the logits, as in the sampler.
        entropy: also return the entropy of each row, in nats.
        outputs: any of the names above, as a tuple or a list.
        top_k: from 0 to 8, and at most V.
        skip_silenced: backward leaves out tokens all of whose incoming gradients are 0 (a clip, a mask). True: the host waits
            for their number. None: True with backend="torch" on a CPU, False elsewhere. Vocab-parallel heads compute all.
        workspace: bytes of transient memory; default 256 MiB on a CPU, 1 GiB on accelerators. On top come the results, and
            one fp32 copy of dX. Log-probabilities do not depend on it.
        backend: "torch" or "triton"; None: triton for CUDA and ROCm tensors, torch elsewhere. The environment variable
            FASTPG_BACKEND replaces that default.
        check: True checks token ids and temperatures, and the host waits for the device once, to skip masked rows. False reads
            nothing and computes every row (for torch.compile and CUDA graphs); a token outside [0, V) then gives NaN.

    A token's log-probability has the same bits whatever else is in the batch. NaN or inf at a kept position gives NaN.
    The inputs and five numbers per row are saved for backward. Double backward raises. Under non-reentrant checkpointing the
    forward's product runs again. On a CPU, bf16 products set a process-wide torch switch while they run (see `products`).

    Raises TypeError or ValueError, naming the argument, for dtypes, shapes and devices that do not fit, for unknown or repeated
    names in outputs, for a top_k out of range, and for a workspace too small for one tile.
    """
    agreed = Facts()
    with one_outcome(head, agreed):
        asked = asked_of(entropy, outputs, top_k)
        inputs = prepare(hidden, head, tokens, mask, temperature, backend, check)
        if isinstance(mask, Kept) and mask.skips:
            raise ValueError("mask=kept(mask, advantages) leaves out tokens whose advantage is 0: pass kept(mask)")
        check_top_k(asked.top_k, inputs.head)
        skips = skips_silenced(skip_silenced, inputs)
        tokens_that_count = counted(inputs, support=support)
        chunk_rows = plan_logprobs(head_of(inputs.head), asked=asked, workspace=workspace, backend=inputs.backend)
        how = How(chunk_rows, inputs.backend, skips)
        agreed.describe(
            inputs,
            tokens_that_count.keep,
            entropy=asked.entropy,
            further=asked[1:],
            sets=agreed_sets(support, tokens_that_count.keep, inputs.head),
        )
    with without_autocast(inputs.hidden.device):
        rows = rows_of(inputs, tokens_that_count)
        sets = sets_of(support, rows, inputs, agreed.vocab_size, skips=not beyond_entropy(asked))
        if sets is None:
            found = rows_results(rows, inputs.head, asked, how)
        else:
            found = _over_sets(sets, asked, how, inputs.head)
    tokens_that_count.check()
    if len(outputs) or asked.top_k:
        return token_statistics(found, rows, tokens.shape, inputs.head.vocab_start or 0, outputs)
    values = found.statistics[:2]
    return TokenLogprobs(*(None if v is None else rows.scatter(v).reshape(tokens.shape) for v in values))


class How(NamedTuple):
    """How a call computes its rows."""

    chunk_rows: int
    backend: str
    skip_silenced: bool  # backward leaves out rows without an incoming gradient


def _over_sets(sets: RowSets, asked: Asked, how: How, head: LMHead) -> RowResults:
    """The results of rows whose softmax is over a set of their own each."""
    large = small = None
    if sets.large is not None:
        large = rows_results(sets.large, head, asked, how)
        large = sets.over_their_sets(large, vocab_parallel.all_columns(head.weight, head.group) if asked.mean else 0)
    if sets.small is not None:
        small = rows_results(sets.small, head, asked, how, sets.entries)
    return sets.together(large, small)


def rows_results(rows: Rows, head: LMHead, asked: Asked, how: How, entries: Entries | None = None) -> RowResults:
    """What is asked of the rows, each over its own entries where these are given. Where an input needs a gradient,
    log-probabilities, entropies and logsumexps have one, and the other numbers of `RowStatistics` are None."""
    first_column = 0 if head.group is None else head.vocab_start
    call = _Call(rows, head_of(head), asked, how, head.group, first_column, entries, head.weight_grad)
    if not needs_gradient(rows.hidden, head):
        with torch.no_grad():
            return _found(call)[0]
    logprobs, entropy, logsumexp, *further = _LinearLogprobs.apply(*differentiable(call), with_inputs(call))
    return RowResults(RowStatistics(logprobs, entropy, None, logsumexp, None), Further(*further))


class _Call(NamedTuple):
    """One call: its rows and its head, and how they are computed."""

    rows: Rows
    head: Head
    asked: Asked
    how: How
    group: vocab_parallel.Group
    first_column: int
    entries: Entries | None  # of rows whose softmax is over small sets; None: over all columns, or those of `rows.allowed`
    weight_grad: torch.Tensor | None


def _found(call: _Call) -> tuple[RowResults, Entries | None]:
    """The results of the rows, and the entries with their logits."""
    rows, head, asked, how, group, first_column, entries, _ = call
    if entries is None:
        return row_results(rows, head, asked, how.chunk_rows, how.backend, group, first_column), None
    return set_results(rows, head, entries, asked, how.backend, group, first_column)


class _LinearLogprobs(torch.autograd.Function):
    """(logprobs (K,), entropy (K,) or None, logsumexp (K,) or None, and the fields of `Further`) of the rows of a call."""

    @staticmethod
    def forward(ctx, hidden, lora_hidden, weight, lora_weight, bias, call):
        whole = with_inputs(call, hidden, lora_hidden, weight, lora_weight, bias)
        (statistics, further), entries = _found(whole)
        ctx.save_for_backward(*whole.rows, *whole.head[:3], *statistics, *(entries or ()))
        ctx.call = call._replace(rows=Rows(*(None,) * len(Rows._fields)))  # saved_tensors hold the rows
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in further if x is not None and x is not further.mean_logits))
        return statistics.logprobs, statistics.entropy, statistics.logsumexp if call.asked.logsumexp else None, *further

    # Not once_differentiable: where the incoming gradient is a constant, it would drop a second derivative silently. The
    # operator called here has no derivative, and raises when one is asked for.
    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, grad_logsumexp, grad_argmax, grad_mean_logits, *others):
        saved = iter(ctx.saved_tensors)  # read once: checkpointing unpacks each tensor a single time
        rows, weights, statistics = (_next(saved, count) for count in (len(Rows._fields), 3, len(RowStatistics._fields)))
        statistics, entries = RowStatistics(*statistics), tuple(saved)
        call = ctx.call._replace(
            rows=Rows(*rows), head=Head(*weights, *ctx.call.head[3:]), entries=Entries(*entries) if entries else None
        )
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(statistics.logprobs)
        wanted, of_sum = Wanted(*ctx.needs_input_grad[:5]), None
        if grad_mean_logits is not None:
            of_sum = grad_mean_logits / (
                vocab_parallel.all_columns(call.head.weight, call.group) if call.entries is None else call.entries.sizes
            )
        incoming = Incoming(grad_logprobs, grad_entropy, grad_logsumexp, of_sum)
        return *gradients_of(call, statistics, incoming, wanted), None


def _next(values: Iterator[torch.Tensor], count: int) -> tuple[torch.Tensor, ...]:
    return tuple(itertools.islice(values, count))


def _with_gradient(rows: Rows, statistics: RowStatistics, incoming: Incoming) -> tuple[Rows, RowStatistics, Incoming]:
    """Those rows that have an incoming gradient. A row whose log-probability is NaN stays, so that its gradient is NaN too."""
    has_one = statistics.logprobs.isnan()
    for gradient in incoming:
        has_one = has_one if gradient is None else has_one | (gradient != 0)
    count = HostRead(has_one.sum()).read()
    if count == len(has_one):
        return rows, statistics, incoming
    places = torch.nonzero_static(has_one, size=count)[:, 0]
    return rows.select(places), statistics.select(places), incoming.select(places)


def gradients_of(call: _Call, statistics: RowStatistics, incoming: Incoming, wanted: Wanted) -> Gradients:
    """The two-pass backward. dX is summed over the ranks of the group, so it is complete on each."""
    rows, group = call.rows, call.group
    plan = Plan(call.how.chunk_rows, call.how.backend, group is not None)
    if call.how.skip_silenced and group is None and call.entries is None:
        rows, statistics, incoming = _with_gradient(rows, statistics, incoming)
    with without_autocast(rows.hidden.device):  # backward() may be called under autocast
        if call.entries is None:
            gradients = operators.two_pass_backward(rows, call.head, statistics, incoming, wanted, plan, call.weight_grad)
        else:
            gradients = operators.gathered_backward(
                rows, call.head, call.entries, statistics, incoming, wanted, plan, call.weight_grad
            )  # fmt: skip
    if group is None:
        return gradients
    dhidden, dlora_hidden = (None if x is None else vocab_parallel.all_reduced(x, group) for x in gradients[:2])
    if dhidden is not None:
        dhidden = rows.scatter_rounded(dhidden)
    if dlora_hidden is not None:
        dlora_hidden = rows.scatter(dlora_hidden)
    return gradients._replace(hidden=dhidden, lora_hidden=dlora_hidden)
