"""Which tokens each position's distribution is over, where a sampler has kept only some of the vocabulary: `Support`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import validation
from ..tiles.structures import Entries, Further, RowResults, RowStatistics

if TYPE_CHECKING:
    from ..lm_head import LMHead
    from .call import Inputs
    from .rows import Rows

_INTEGERS = (torch.int32, torch.int64)
_FEWEST = 8


class Support(NamedTuple):
    """The set of tokens that each position's distribution is over: those that top-k, top-p or min-p left to sample from.

        out = fastpg.linear_logprobs(hidden, head, tokens, support=support)

    logp, entropy and all else are then those of softmax over the set. A token outside of it has no probability and no gradient.
    Rollouts that were sampled with top-p have log-probabilities of this kind. Ratios of log-probabilities over the whole
    vocabulary to these are biased (DeepSeek-V3.2, arXiv 2512.02556, section 3.1, "Keep Sampling Mask").

    The sets are stored one after the other, as in a sparse matrix by rows (CSR). Position n, counted over the flattened tokens,
    has ids[offsets[n]:offsets[n + 1]], in any order. `from_mask`, `from_lists` and `from_sampler` make one of other forms.
    """

    ids: torch.Tensor  # (M,) int32 or int64
    offsets: torch.Tensor  # (N + 1,) int32 or int64, ascending
    whole: torch.Tensor | None = None  # (N,) bool: True where the distribution is over the whole vocabulary

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> Support:
        """From mask (..., V) bool, True where a token belongs to the set. On a GPU the host waits for the number of ids."""
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.dim() == 0:
            raise TypeError(f"mask must be a bool tensor (..., V), True where a token was kept; got {validation.kind(mask)}")
        flat = mask.reshape(-1, mask.shape[-1])
        whole = flat.all(1)
        some = flat & ~whole[:, None]
        return cls(some.nonzero()[:, 1].int(), _offsets(some.sum(1)), whole)

    @classmethod
    def from_lists(
        cls, sets: Sequence[Sequence[int] | torch.Tensor | None], *, device: torch.device | str | None = None
    ) -> Support:
        """From one list or tensor of ids per position, positions (B, T) flattened. None: the whole vocabulary."""
        ids, sizes = _joined(sets, "sets")
        return cls(ids, _offsets(sizes), torch.tensor([x is None for x in sets], dtype=torch.bool)).to(device or "cpu")

    @classmethod
    def from_sampler(cls, outputs: Sequence[Any], mask: torch.Tensor) -> Support:
        """From what an inference engine returns of each completion, put where `mask` says that sampled tokens are.

            support = Support.from_sampler([output.sampling_mask for output in completions], completion_mask)

        outputs: one entry per sequence. An entry is an object or dictionary with `token_ids` and `offsets` (vLLM's
            SamplingMask), or one list of ids per sampled token (SGLang's output_token_sampling_mask). An empty list, and None,
            stand for the whole vocabulary: the engine has recorded no set there. An entry of None is a sequence without sets.
        mask: (B, T) bool, True at the tokens that were sampled; those of row b are the tokens of outputs[b], in order. Or (N,)
            for packed sequences, one after the other. Set n is put where token n itself is: shift both alike. Positions outside
            the mask have the whole vocabulary.
        """
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.dim() not in (1, 2):
            raise TypeError(f"mask must be a bool tensor (B, T) or (N,), True at sampled tokens; got {validation.kind(mask)}")
        if mask.dim() == 2 and len(outputs) != len(mask):
            raise ValueError(f"outputs must have one entry for each of the {len(mask)} rows of mask; got {len(outputs)}")
        found, places = [_of_output(output, number) for number, output in enumerate(outputs)], mask.cpu()
        sizes = torch.zeros(mask.numel(), dtype=torch.int64)
        rows = sizes.view(mask.shape)
        if mask.dim() == 2:
            for b, of_row in enumerate(found):
                _place(rows[b], places[b], [of_row], f"row {b} of mask")
        else:
            _place(rows, places, found, "mask")
        ids = torch.cat([x.ids for x in found if x is not None] or [torch.empty(0, dtype=torch.int32)])
        return cls(ids, _offsets(sizes), sizes == 0).to(mask.device)

    @classmethod
    def cat(cls, supports: Sequence[Support]) -> Support:
        """The sets of several supports, one after the other. On a GPU the host waits for the number of ids."""
        if not supports or not all(isinstance(x, Support) for x in supports):
            raise TypeError(f"supports must be a sequence of at least one fastpg.Support; got {validation.kind(supports)}")
        inside = torch.cat([_rows_of_ids(x)[1] for x in supports])
        whole = [x.offsets.new_zeros(len(x.offsets) - 1, dtype=torch.bool) if x.whole is None else x.whole for x in supports]
        return cls(
            torch.cat([x.ids for x in supports])[inside],
            _offsets(torch.cat([x.sizes() for x in supports])),
            None if all(x.whole is None for x in supports) else torch.cat(whole),
        )

    def select(self, positions: torch.Tensor) -> Support:
        """The sets at `positions` (...), int32 or int64, in that order. On a GPU the host waits for the number of ids.

        support.select(torch.arange(B * T).view(B, T)[rows])  # some rows of (B, T), as for a mini-batch
        """
        if not isinstance(positions, torch.Tensor) or positions.dtype not in _INTEGERS:
            raise TypeError(f"positions must be an int32 or int64 tensor; got {validation.kind(positions)}")
        flat = positions.reshape(-1).long()
        first, sizes = self.offsets[:-1][flat].long(), self.sizes()[flat]
        offsets = _offsets(sizes)
        ids = self.ids[torch.repeat_interleave(first - offsets[:-1], sizes) + torch.arange(sizes.sum(), device=sizes.device)]
        return Support(ids, offsets, None if self.whole is None else self.whole[flat])

    def with_tokens(self, tokens: torch.Tensor) -> Support:
        """The sets with each position's own token, tokens (...), added where it was missing.

        An engine may keep only the most probable ids of a large set and leave out the one that it has sampled. Positions whose
        token is negative, such as -100, stay as they are. On a GPU the host waits for the number of ids.
        """
        flat = tokens.reshape(-1)
        check_support(self, tokens)
        row, inside = _rows_of_ids(self)
        has = torch.zeros_like(flat, dtype=torch.int32)
        has.index_add_(0, row, ((self.ids == flat[row]) & inside).int())
        whole = torch.zeros_like(flat, dtype=torch.bool) if self.whole is None else self.whole
        add = (has == 0) & (flat >= 0) & ~whole
        row, ids = torch.cat([row[inside], add.nonzero()[:, 0]]), torch.cat([self.ids[inside], flat[add].to(self.ids.dtype)])
        order = row.sort(stable=True).indices
        return Support(ids[order], _offsets(self.sizes() + add), self.whole)

    def sizes(self) -> torch.Tensor:
        """(N,) int64: how many ids each position has; 0 where `whole` is True, if its set was left empty."""
        return self.offsets.diff().long()

    def mask(self, vocab_size: int) -> torch.Tensor:
        """(N, V) bool: True where a token belongs to the set. For tests and small vocabularies."""
        row, inside = _rows_of_ids(self)
        mask = torch.zeros(len(self.offsets) - 1, vocab_size, dtype=torch.bool, device=self.ids.device)
        mask[row[inside], self.ids[inside].long()] = True
        return mask if self.whole is None else mask | self.whole[:, None]

    def to(self, device: torch.device | str) -> Support:
        """The sets on another device."""
        return Support(*(None if x is None else x.to(device) for x in self))

    def shifted(self) -> Support:
        """The sets of the positions one later: set n becomes that of position n - 1, and the last position has none of its own.

        For hidden states that predict the next token. A view: no id is copied.
        """
        whole = None if self.whole is None else torch.cat([self.whole[1:], self.whole.new_ones(1)])
        return Support(self.ids, torch.cat([self.offsets[1:], self.offsets[-1:]]), whole)


def _offsets(sizes: torch.Tensor) -> torch.Tensor:
    return torch.cat([sizes.new_zeros(1, dtype=torch.int64), sizes.cumsum(0)])


def _joined(sets: Sequence[Sequence[int] | torch.Tensor | None], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of all sets, one after the other, int32; and the size of each, int64, 0 for None."""
    given = [() if x is None else x for x in sets]
    ids = _of_numbers(list(chain.from_iterable(given))) if all(isinstance(x, (list, tuple)) for x in given) else None
    if ids is None:  # some are tensors, or none of ours, whose place an error names
        ids = torch.cat([_ids(x, f"{name}[{place}]") for place, x in enumerate(given)])
    return ids, torch.tensor([len(x) for x in given], dtype=torch.int64)


def _of_numbers(ids: list[int]) -> torch.Tensor | None:
    """int32, several times as fast as torch.tensor; None where they are not all integers of 32 bits."""
    if not set(map(type, ids)) <= {int}:
        return None
    try:
        return torch.frombuffer(array("i", ids), dtype=torch.int32) if ids else torch.empty(0, dtype=torch.int32)
    except OverflowError:
        return None


def _ids(ids: Sequence[int] | torch.Tensor, name: str) -> torch.Tensor:
    """One set, int32."""
    try:
        found = torch.as_tensor(ids, device="cpu") if len(ids) else torch.empty(0, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a list of token ids, or None; got {validation.kind(ids)}") from error
    if found.dim() != 1 or found.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be a list of token ids, or None; got {validation.kind(found)} {tuple(found.shape)}")
    narrow = found.int()
    if not torch.equal(found.long(), narrow):  # else it would come back as another id
        raise ValueError(f"{name} must have ids of 32 bits; got {int(found[found != narrow][0])}")
    return narrow


class _Completion(NamedTuple):
    """The sets of one completion, one after the other."""

    ids: torch.Tensor  # int32
    sizes: torch.Tensor  # int64, of each sampled token; 0 where there is no set


def _of_output(output: Any, number: int) -> _Completion | None:
    """The sets of an entry of `from_sampler`; None: it has none."""
    if output is None:
        return None
    fields = output if isinstance(output, dict) else vars(output) if hasattr(output, "__dict__") else {}
    ids, offsets = (fields.get(name, getattr(output, name, None)) for name in ("token_ids", "offsets"))
    if ids is not None and offsets is not None:
        edges = torch.as_tensor(offsets, device="cpu").long()
        sizes = edges.diff()
        if not len(edges) or edges[0] != 0 or edges[-1] != len(ids) or bool((sizes < 0).any()):
            raise ValueError(
                f"outputs[{number}].offsets must ascend from 0 to the number of its token_ids, {len(ids)}; got "
                f"{edges[:8].tolist()}"
            )
        found = _of_numbers(ids) if isinstance(ids, list) else None
        return _Completion(_ids(ids, f"outputs[{number}].token_ids") if found is None else found, sizes)
    given = type(output).__name__
    if isinstance(output, (list, tuple)):
        others = [ids for ids in output if ids is not None and not hasattr(ids, "__len__")]
        if not others:
            return _Completion(*_joined(output, f"outputs[{number}]"))
        given = f"{given} of {type(others[0]).__name__}"
    raise TypeError(
        f"outputs[{number}] must have token_ids and offsets, as vLLM's SamplingMask, or be a list of lists of ids; got {given}"
    )


def _place(sizes: torch.Tensor, sampled: torch.Tensor, found: list[_Completion | None], where: str) -> None:
    """Writes the sizes of the sets of `found`, one completion after the other, to the places of sizes that are sampled."""
    some = [x.sizes for x in found if x is not None]
    if not some:
        return
    if len(some) < len(found):
        raise ValueError("outputs of packed sequences must have sets for all of them or for none: a length of None is unknown")
    joined, count = torch.cat(some), int(sampled.sum())
    if len(joined) != count:
        raise ValueError(f"{where} has {count} sampled tokens, but outputs have sets of {len(joined)}")
    sizes[sampled] = joined


def check_support(support: Support, tokens: torch.Tensor) -> None:
    """The types, shapes and devices of a support for tokens (...). `check_sets` checks its values."""
    if not isinstance(support, Support):
        raise TypeError(
            "support must be a fastpg.Support, which Support.from_mask, from_lists and from_sampler make; got "
            f"{validation.kind(support)}"
        )
    for name, x, dtypes in (("ids", support.ids, _INTEGERS), ("offsets", support.offsets, _INTEGERS)):
        if not isinstance(x, torch.Tensor) or x.dtype not in dtypes or x.dim() != 1:
            raise TypeError(f"support.{name} must be an int32 or int64 tensor of one dimension; got {validation.kind(x)}")
    count, whole = tokens.numel(), support.whole
    if len(support.offsets) != count + 1:
        raise ValueError(
            f"support must have a set for each of the {count} tokens, offsets ({count + 1},); got offsets "
            f"({len(support.offsets)},)"
        )
    if whole is not None and (not isinstance(whole, torch.Tensor) or whole.dtype != torch.bool or whole.shape != (count,)):
        raise TypeError(f"support.whole must be a bool tensor ({count},), or None; got {validation.kind(whole)}")
    for name, x in support._asdict().items():
        if x is not None and x.device != tokens.device:
            raise ValueError(f"support.{name} is on {x.device} but tokens is on {tokens.device}")


class _Predicting(Support):
    """Sets at the states that predict their tokens, which `check_sets` has seen, but without knowing the vocabulary."""

    largest = -1  # of the ids of tokens that count

    def to(self, device: torch.device | str) -> Support:
        moved = _Predicting(*super().to(device))
        moved.largest = self.largest
        return moved


def predicting(support: Support | None, tokens: torch.Tensor, check: bool) -> Support | None:
    """The sets at the states that predict their tokens, one place earlier, as `tokens` (B, T) stand there, -100 for none."""
    if support is None:
        return None
    check_support(support, tokens)
    ahead = support.shifted()
    if not check:
        return ahead
    checked = _Predicting(*ahead)
    checked.largest = check_sets(ahead, tokens != validation.IGNORED_TOKEN, tokens, None, first=1)
    return checked


def _rows_of_ids(support: Support) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each id, (M,): the position whose set it is in, and whether it is in any. The host does not wait."""
    offsets, place = support.offsets.long(), torch.arange(len(support.ids), device=support.ids.device)
    row = torch.searchsorted(offsets[1:], place, right=True)
    return row.clamp(max=max(len(offsets) - 2, 0)), (place >= offsets[0]) & (place < offsets[-1])


def check_sets(support: Support, keep: torch.Tensor, tokens: torch.Tensor, vocab: int | None, first: int = 0) -> int:
    """Raises ValueError for sets of tokens that count, keep (...), which are no sets of the vocabulary with their token.

    vocab: None where it is not known, or ranks hold parts of it; they compare the largest id themselves. first: the position
    that errors call the first one. Returns the largest of the ids, -1 for none. The host waits once; of sets that were checked
    without a vocabulary it need not.
    """
    if isinstance(support, _Predicting):
        if vocab is None or support.largest < vocab:
            return support.largest
        first = 1  # errors name the tokens' own positions
    keep, flat, ids = keep.reshape(-1), tokens.reshape(-1), support.ids
    sizes, (row, inside) = support.sizes(), _rows_of_ids(support)
    if not len(flat):
        return -1
    counts = keep if support.whole is None else keep & ~support.whole
    used = inside & counts[row]
    own = torch.zeros_like(flat, dtype=torch.int32).index_add_(0, row, (used & (ids == flat[row])).int())
    foreign = used & ((ids < 0) | (ids >= (2**31 - 1 if vocab is None else vocab)))
    place = torch.arange(len(ids), device=ids.device)
    # equal neighbours after sorting by position and id; ids that do not count are all different
    keys = torch.where(used, row * 2**32 + ids.long(), -1 - place).sort()
    again = torch.zeros_like(used)
    again[keys.indices[1:]] = keys.values[1:] == keys.values[:-1]
    wrong_offsets = (sizes < 0).any() | (support.offsets[0] < 0) | (support.offsets[-1] > len(ids))
    problems = (wrong_offsets[None], counts & (sizes == 0), foreign, again, counts & (own == 0))
    largest = torch.cat([torch.where(used, ids, -1), ids.new_full((1,), -1)]).amax()
    *found, highest = torch.stack([*(x.any() for x in problems), largest]).tolist()
    if not any(found):
        return highest
    if bool(wrong_offsets):
        raise ValueError(f"support.offsets must ascend, from 0 or more to at most the number of ids, {len(ids)}")
    kinds = ("empty", "foreign", "again", "missing")
    what, problem = next(pair for pair in zip(kinds, problems[1:], strict=True) if bool(pair[1].any()))
    at = int(problem.nonzero()[0, 0])
    n, token = (at, int(flat[at])) if what in ("empty", "missing") else (int(row[at]), int(ids[at]))
    where, limit = f"position {n + first}", 2**31 - 1 if vocab is None else vocab
    raise ValueError(
        {
            "empty": f"support has an empty set for the token at {where}, which counts: mask it, or set support.whole there",
            "foreign": f"support.ids must be in [0, {limit}); got {token} in the set of {where}",
            "again": f"support has the id {token} twice in the set of {where}",
            "missing": f"support leaves out the sampled token {token} at {where}, which then has no probability: "
            "support.with_tokens(tokens) adds it",
        }[what]
    )


def agreed_sets(support: Support | None, keep: torch.Tensor, head: LMHead) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What ranks compare: a checksum of the sets of tokens that count, keep (...), and the largest of their ids, () each.

    None without a support, and where there are no other ranks.
    """
    if support is None or head.group is None:
        return None
    row, inside = _rows_of_ids(support)
    counts = keep.reshape(-1) if support.whole is None else keep.reshape(-1) & ~support.whole
    used = inside & counts[row] if len(counts) else inside & False
    ids = torch.where(used, support.ids.long(), -1)
    # mixed before it is summed, since two sets may have equal sums of ids; the factor is Knuth's for hashing
    mixed = (ids + 2) * 2654435761
    mixed = (mixed ^ (mixed >> 15)) * (2 * row + 3)
    return torch.where(used, mixed, 0).sum(), torch.cat([ids, ids.new_full((1,), -1)]).amax()


class RowSets(NamedTuple):
    """The sets of the K rows of a call, and three kinds of rows by the size of their sets. A kind without rows is None.

    A row whose set is its token alone may be of none of these: its log-probability and its entropy are 0.
    """

    sizes: torch.Tensor  # (K,) int64: how many tokens a row's set has, 0 for the whole vocabulary
    large: Rows | None  # rows that are multiplied with all of the weight, with the columns of their softmax
    at_large: torch.Tensor | None  # int64: their places among the K rows; None: all of these
    others: torch.Tensor | None  # the places of the other rows; None: there are none
    small: Rows | None  # rows that are multiplied with gathered rows of the weight
    at_small: torch.Tensor | None
    entries: Entries | None  # of the small ones

    def over_their_sets(self, found: RowResults, vocab_size: int | torch.Tensor) -> RowResults:
        """The results of the large rows, where sums over the set take its size in the place of V."""
        statistics, further = found
        sizes = self.sizes if self.at_large is None else self.sizes[self.at_large]
        if further.mean_logits is not None:
            share = vocab_size / sizes.clamp(min=1).to(further.mean_logits.dtype)  # integers would be divided in float32
            further = further._replace(mean_logits=further.mean_logits * torch.where(sizes == 0, 1, share))
        return RowResults(statistics, further)

    def together(self, large: RowResults | None, small: RowResults | None) -> RowResults:
        """The results of all K rows."""
        found = [(x, at) for x, at in ((large, self.at_large), (small, self.at_small)) if x is not None]
        if len(found) == 1 and found[0][1] is None:
            results = found[0][0]
        else:
            statistics = RowStatistics(
                *(self.placed([(x[0][i], at) for x, at in found]) for i in range(len(RowStatistics._fields)))
            )
            further = Further(*(self.placed([(x[1][i], at) for x, at in found]) for i in range(len(Further._fields))))
            results = RowResults(statistics, further)
        further = results.further
        if further.top_ids is None:
            return results
        places = torch.arange(further.top_ids.shape[1], device=self.sizes.device)
        beyond = (places >= self.sizes[:, None]) | (further.top_logprobs == -torch.inf)  # a banned token, in the set or not
        beyond &= self.sizes[:, None] > 0
        logprobs, ids = further.top_logprobs.masked_fill(beyond, -torch.inf), further.top_ids.masked_fill(beyond, -1)
        return RowResults(results.statistics, further._replace(top_logprobs=logprobs, top_ids=ids))

    def placed(self, parts: list[tuple[torch.Tensor | None, torch.Tensor | None]]) -> torch.Tensor | None:
        """Values of some rows at their places among the K, (K, ...), 0 for the others."""
        given = [(x, at) for x, at in parts if x is not None]
        if not given:
            return None
        out = given[0][0].new_zeros(len(self.sizes), *given[0][0].shape[1:])
        for x, at in given:
            out = x if at is None else out.index_copy(0, at, x)
        return out


def sets_of(support: Support | None, rows: Rows, inputs: Inputs, vocab_size: int | None, skips: bool) -> RowSets | None:
    """The sets of the rows of a call; None without a support.

    vocab_size: V of all ranks; None where there is one. skips: rows whose set is their token alone are not computed, as nobody
    asks for more than their log-probability and their entropy. The host waits for the number of rows of each kind; where it
    reads nothing, all rows are large ones.
    """
    if support is None:
        return None
    head, sizes = inputs.head, support.sizes()
    if support.whole is not None:
        sizes = sizes.masked_fill(support.whole, 0)
    sizes = sizes if rows.indices is None else sizes[rows.indices]
    if not inputs.host_reads:
        return RowSets(sizes, _large(support, rows, head), None, None, None, None, None)
    is_large = (sizes == 0) | (sizes > most_gathered(vocab_size or head.vocab_size, head.weight))
    is_small = ~is_large & (sizes > (1 if skips else 0))
    counts = torch.stack([is_large.sum(), is_small.sum(), torch.where(is_small, sizes, 0).sum()]).tolist()
    large, at_large = _chosen(rows, is_large, counts[0])
    small, at_small = _chosen(rows, is_small, counts[1])
    entries = others = None
    if counts[1]:
        entries = _entries(support, small.indices, sizes if at_small is None else sizes[at_small], counts[2], head)
    if at_large is not None:
        others = torch.nonzero_static(~is_large, size=len(sizes) - counts[0])[:, 0]
    if counts[0] or not counts[1]:  # where nothing is computed, results still have a gradient, of 0
        return RowSets(sizes, _large(support, large, head), at_large, others, small if counts[1] else None, at_small, entries)
    return RowSets(sizes, None, at_large, others, small, at_small, entries)


def _chosen(rows: Rows, wanted: torch.Tensor, count: int) -> tuple[Rows, torch.Tensor | None]:
    """The `count` rows that are wanted, and their places; None: all."""
    if count == len(wanted):
        return rows, None
    places = torch.nonzero_static(wanted, size=count)[:, 0]
    return rows.select(places), places


def most_gathered(vocab_size: int, weight: torch.Tensor) -> int:
    """The most tokens of a set for which gathered rows of the weight cost less than a product with all of them.

    It depends on nothing else of a batch, so that neither do a row's bits. A product reads the weight once for each tile of 128
    or 256 rows of hidden states: V / 256 rows of it, or more, for each row. That is the limit on accelerators, an estimate from
    bytes: it was not measured. On a CPU products are slower beside memory. With SmolLM2's head, on two cores of an AMD EPYC
    (AVX-512), a row of the three bare products took as long as V / 30 gathered tokens in fp32, and V / 91 in bf16.
    """
    share = 256 if weight.device.type != "cpu" else 64 if weight.dtype.itemsize == 2 else 32
    return max(_FEWEST, vocab_size // share)


def _large(support: Support, rows: Rows, head: LMHead) -> Rows:
    allowed = packed_sets(support, rows.indices, rows.tokens, head.vocab_start or 0, len(head.weight))
    return type(rows)(*rows[:-1], allowed)  # (Dynamo of torch 2.9 loses what `_replace` makes where a graph breaks)


def _entries(support: Support, places: torch.Tensor | None, sizes: torch.Tensor, count: int, head: LMHead) -> Entries:
    """The entries of rows at these places, whose sets have `count` ids in all; those in this rank's columns."""
    first = support.offsets[:-1] if places is None else support.offsets[places]
    row = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes, output_size=count)
    within = torch.arange(count, device=sizes.device) - (sizes.cumsum(0) - sizes)[row]
    column = support.ids[first[row].long() + within].long() - (head.vocab_start or 0)
    column = column[(row * 2**32 + column).argsort()]  # so that the order of a set's ids changes no bit
    if head.group is not None:
        here = (column >= 0) & (column < len(head.weight))
        row, column = row[here], column[here]
    return Entries(row, column, sizes)


def packed_sets(support: Support, places: torch.Tensor | None, tokens: torch.Tensor, first: int, columns: int) -> torch.Tensor:
    """The sets of the positions at `places` (K,), None: of all, as `Chunk.allowed`: bits of the columns first, first + 1, ...

    tokens: (K,), counted from the first of these columns. A row's own token always belongs to its set.
    """
    row, inside = _rows_of_ids(support)
    count, width = len(tokens), -(-columns // 8)
    if places is not None:  # the number of each position among the rows; `count` for the others
        number = torch.full((len(support.offsets),), count, device=row.device)
        row = number.index_copy_(0, places, torch.arange(count, device=row.device))[row]
    column = support.ids.long() - first
    inside = inside & (column >= 0) & (column < columns)
    byte = torch.where(inside, row * width + column // 8, count * width)
    bits = torch.zeros((count + 1) * width, dtype=torch.uint8, device=row.device)
    bits.index_add_(0, byte, torch.where(inside, 1 << column % 8, 0).to(torch.uint8))
    bits = bits.view(count + 1, width)[:count]
    if support.whole is not None:
        bits.masked_fill_((support.whole if places is None else support.whole[places])[:, None], 255)
    here = (tokens >= 0) & (tokens < columns)
    own = torch.where(here, tokens, 0)[:, None]
    with_own = bits.gather(1, own // 8) | torch.where(here[:, None], 1 << own % 8, 0).to(torch.uint8)
    return bits.scatter_(1, own // 8, with_own)
