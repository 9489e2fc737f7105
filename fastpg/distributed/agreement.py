"""Vocab-parallel calls: the ranks of a group compare their arguments, so that an error is raised on all of them.

A collective call that one rank does not join, or joins with another shape, hangs or is silently wrong. So before any work every
rank sends one row of integers, and all of them read the same table. This costs one all-gather and one wait of the host.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..lm_head import LMHead
from ..validation import is_dtensor
from .vocab_parallel import gathered

if TYPE_CHECKING:
    from ..linear.call import Inputs

# Names of the numbers that must be equal on all ranks, as errors call them, and of those that may differ.
_EQUAL = (
    "fp32_head", "the dtype of hidden", "hidden's size H", "the number of tokens", "tokens and mask", "the rank of lora",
    "lora's scale", "softcap", "logit_scale", "temperature", "entropy", "which of hidden and lora's A need a gradient",
    "whether there is a gradient to compute", "the backend", "check", "old_logprobs", "support",
)  # fmt: skip
_OWN = ("failed", "vocab_start", "rows of the weight", "smallest token", "largest token", "largest id", "rows of a chunk")


class Facts:
    """One rank's description of the call. After `one_outcome`, `chunk` and `vocab_size` are the numbers that all ranks use."""

    def __init__(self) -> None:
        self.numbers: dict[str, int | torch.Tensor] = {}
        self.chunk: int | None = None  # rows of a chunk: the smallest of all ranks; None where each may choose its own
        self.vocab_size: int | None = None  # V, of all ranks; None where there is one

    def describe(
        self,
        inputs: Inputs,
        computed: torch.Tensor,
        *,
        entropy: bool,
        further: tuple[int, ...] = (0,),
        old_logprobs: torch.Tensor | None = None,
        sets: tuple[torch.Tensor, torch.Tensor] | None = None,
        chunk: int = 0,
    ) -> None:
        """further: which further statistics are asked for, and last top_k. sets: a checksum of those of a support, and the
        largest id in them."""
        hidden, head, tokens, _, temperature, backend, check = inputs
        if head.group is None:
            return
        flat, kept = computed.reshape(-1), torch.where(computed, tokens, -1).reshape(-1).long()
        place = torch.arange(1, len(kept) + 1, device=kept.device)
        grad = torch.is_grad_enabled()
        inputs = hidden, head.weight, head.bias, *(head.lora or ())[:2]
        wanted = [grad and x is not None and x.requires_grad for x in inputs]
        of_lora = head.lora is not None and head.lora.a.requires_grad
        dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        values = (
            int(head.fp32_head), dtypes.index(hidden.dtype), hidden.shape[-1], len(kept),
            # a checksum that sees the order of tokens too; the factor, Knuth's for hashing, spreads neighbouring places
            ((kept + 2) * (place * 2654435761 + 1)).sum(),
            0 if head.lora is None else len(head.lora.a), _bits(0 if head.lora is None else head.lora.scale),
            _bits(head.softcap or 0), _bits(head.logit_scale),
            _checksum(temperature, computed, place), _packed(entropy, further), grad * (2 * hidden.requires_grad + of_lora),
            int(any(wanted)), int(backend == "triton"), int(check), _checksum(old_logprobs, computed, place),
            -1 if sets is None else sets[0],
        )  # fmt: skip
        smallest, largest = torch.where(flat, kept, 0), kept
        if len(kept):
            smallest, largest = smallest.amin(), largest.amax()
        else:
            smallest, largest = 0, -1
        self.numbers = dict(zip(_EQUAL, values, strict=True))
        self.numbers |= {
            "failed": 0, "vocab_start": head.vocab_start, "rows of the weight": len(head.weight), "smallest token": smallest,
            "largest token": largest, "largest id": -1 if sets is None else sets[1], "rows of a chunk": chunk,
        }  # fmt: skip


def one_outcome(head: object, facts: Facts) -> AbstractContextManager[None]:
    """A context for the checks of a call: every rank of head.group raises, or none does. Leaving it compares the ranks.

    Raises TypeError for a group that is not a process group. Raises ValueError where torch.distributed is not initialised or
    the group has no backend for the weight's device, for a missing vocab_start, for shards that leave a gap or overlap, for
    arguments that must be equal and are not, for a token outside the whole vocabulary, and where another rank's checks failed.
    """
    if isinstance(head, LMHead) and head.group is not None:
        return _one_outcome(head, facts)
    return nullcontext()  # (Dynamo cannot break a graph inside one that holds a value)


@contextmanager
def _one_outcome(head: LMHead, facts: Facts) -> Iterator[None]:
    _check_group(head)
    try:
        if head.vocab_start is None and not is_dtensor(head.weight):
            raise ValueError("head.vocab_start is needed with head.group: which entry of the vocabulary row 0 of the weight is")
        yield
    except Exception:
        facts.numbers = {"failed": 1}
        _exchange(facts, head)
        raise
    _compare(_exchange(facts, head), facts)


def _check_group(head: LMHead) -> None:
    """Raises for errors that every rank has alike, and that would keep the ranks from communicating."""
    group = head.group
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("head.group needs torch.distributed.init_process_group to have been called")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"head.group must be a torch.distributed process group that this rank belongs to; got {type(group).__name__}"
        )
    device = head.weight.device.type
    config = str(dist.get_backend_config(group))
    if f"{device}:" not in config:
        raise ValueError(f"head.group has no backend for {device} tensors (it has {config}), but head.weight is on {device}")


def _exchange(facts: Facts, head: LMHead) -> list[dict[str, int]]:
    """The numbers of every rank, in rank order."""
    names, device = _EQUAL + _OWN, head.weight.device
    numbers = [facts.numbers.get(name, 0) for name in names]
    mine = torch.tensor([0 if isinstance(x, torch.Tensor) else x for x in numbers], dtype=torch.int64, device=device)
    for i, x in enumerate(numbers):  # tensors are copied on the device, so the host waits for the table alone
        if isinstance(x, torch.Tensor):
            mine[i] = x
    return [dict(zip(names, row, strict=True)) for row in gathered(mine, head.group).tolist()]


def _compare(table: list[dict[str, int]], facts: Facts) -> None:
    failed = [rank for rank, row in enumerate(table) if row["failed"]]
    if failed:
        raise ValueError(f"head.group: the call failed on rank(s) {failed} of the group; the error is raised there")
    for row in table:
        row.update(_unpacked(row["entropy"]))
    for name in (*_EQUAL, "outputs", "top_k"):
        different = [rank for rank, row in enumerate(table) if row[name] != table[0][name]]
        if different:
            raise ValueError(
                f"head.group: its ranks must agree on {name}; rank(s) {different} of the group differ from rank 0"
                + (f": {[row[name] for row in table]}" if name.endswith(("size H", "tokens", "lora")) else "")
            )
    shards = [(row["vocab_start"], row["vocab_start"] + row["rows of the weight"]) for row in table]
    edge = 0
    for start, stop in sorted(shards):
        if start != edge:
            problem = "leave a gap" if start > edge else "overlap"
            raise ValueError(
                f"head.vocab_start: the ranks' shards {problem} at {min(start, edge)}; [start, stop) by rank: {shards}"
            )
        edge = stop
    if table[0]["smallest token"] < 0 or table[0]["largest token"] >= edge:
        bad = min(table[0]["smallest token"], 0) or table[0]["largest token"]
        raise ValueError(f"tokens must be in [0, {edge}), the vocabulary of all ranks, or -100; got {bad}")
    if table[0]["largest id"] >= edge:
        raise ValueError(f"support.ids must be in [0, {edge}), the vocabulary of all ranks; got {table[0]['largest id']}")
    if table[0]["top_k"] > edge:
        raise ValueError(f"top_k must be at most V = {edge}, the vocabulary of all ranks; got {table[0]['top_k']}")
    facts.vocab_size = edge
    facts.chunk = min(row["rows of a chunk"] for row in table) or None


def _packed(entropy: bool, further: tuple[int, ...]) -> int:
    """What is asked for, in the number that stands for the entropy: so those who ask for no more exchange no more."""
    return int(entropy) + sum(2 ** (i + 1) * asked for i, asked in enumerate(further[:-1])) + 2**16 * further[-1]


def _unpacked(number: int) -> dict[str, int]:
    return {"entropy": number % 2, "outputs": number % 2**16 // 2, "top_k": number // 2**16}


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _checksum(values: float | torch.Tensor | None, computed: torch.Tensor, place: torch.Tensor) -> int | torch.Tensor:
    """A number's bits; or a checksum of the bits of the values that count, times their places. -1 for None."""
    if not isinstance(values, torch.Tensor):
        return -1 if values is None else _bits(values)
    kept = torch.where(computed, values.detach().double(), 0).reshape(-1)
    return (kept.view(torch.int64) * place).sum()
