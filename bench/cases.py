"""The inputs of the bench: heads of real models, batches for them, and the cells of the table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Head(NamedTuple):
    """Vocabulary, hidden size and softcap as in the model's published configuration."""

    vocab: int
    hidden: int
    softcap: float | None = None


HEADS = {
    "smollm2-135m": Head(49152, 576),
    "gemma3-270m": Head(262144, 640),
    "qwen3-0.6b": Head(151936, 1024),
    "llama3.2-1b": Head(128256, 2048),
    "qwen3-8b": Head(151936, 4096),
    "gemma2-2b": Head(256000, 2304, 30.0),
    "llama3-70b": Head(128256, 8192),
}


@dataclass(frozen=True)
class Cell:
    """One batch, on which several methods are compared with each other and with the bare products.

    The bare products are the three matrix products of a step and nothing else: the floor of every method.

    zero_share: the share of tokens whose advantage is exactly 0. rounds: each has two timed runs of every method.
    """

    section: str
    name: str
    head: Head
    rows: int
    dtype: str
    methods: tuple[str, ...]
    zero_share: float = 0.0
    rounds: int = 2


class Batch(NamedTuple):
    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    tokens: torch.Tensor  # (N,)
    old_logprobs: torch.Tensor  # (N,)
    advantages: torch.Tensor  # (N,)
    mask: torch.Tensor  # (N,) bool: all tokens count, but a trainer always passes a mask
    logprobs: torch.Tensor  # (N,) fp32, of these hidden states: for methods that start from log-probabilities
    softcap: float | None = None
    frozen: bool = False  # the weight takes no gradient
    workspace: int | None = None  # bytes; None: the default

    def leaves(self) -> Batch:
        """The same batch with hidden, weight and logprobs as fresh leaves of autograd (no copy of their values)."""
        hidden, weight = self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(not self.frozen)
        return self._replace(hidden=hidden, weight=weight, logprobs=self.logprobs.detach().requires_grad_())

    def some(self, rows: int) -> Batch:
        """At most `rows` rows of the batch, evenly spaced, because neighbours may all have weight zero."""
        chosen = torch.arange(0, len(self.tokens), max(1, len(self.tokens) // rows), device=self.tokens.device)[:rows]
        per_row = ("hidden", "tokens", "old_logprobs", "advantages", "mask", "logprobs")
        return self._replace(**{name: getattr(self, name)[chosen] for name in per_row})

    def to(self, device: str) -> Batch:
        return Batch(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in self))

    def with_logprobs(self, noise: torch.Tensor | float = 0.0) -> Batch:
        """The same batch with the log-probabilities of its hidden states, and old ones that differ from them by the noise."""
        logprobs = exact_logprobs(self, torch.float32).float()
        return self._replace(logprobs=logprobs, old_logprobs=logprobs + noise)

    def gradient_bytes(self) -> int:
        return self.hidden.nbytes + (0 if self.frozen else self.weight.nbytes)


def batch_of(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, advantages: torch.Tensor, softcap: float | None = None
) -> Batch:
    """A batch without log-probabilities, which `with_logprobs` adds."""
    none = torch.empty(0)
    return Batch(hidden, weight, tokens, none, advantages, torch.ones_like(tokens, dtype=torch.bool), none, softcap)


def batch(cell: Cell, device: str = "cpu", seed: int = 0) -> Batch:
    """A random batch: logits with a standard deviation of 2, tokens drawn at random, ratios within about e^+-0.1."""
    head, dtype = cell.head, DTYPES[cell.dtype]
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(cell.rows, head.hidden, generator=generator).to(dtype)
    weight = torch.empty(head.vocab, head.hidden, dtype=dtype)
    for part in weight.split(8192):  # no second copy in fp32
        part.copy_(torch.randn(part.shape, generator=generator) * (2 / head.hidden**0.5))
    tokens = torch.randint(0, head.vocab, (cell.rows,), generator=generator)
    advantages = torch.randn(cell.rows, generator=generator)
    advantages[torch.randperm(cell.rows, generator=generator)[: round(cell.zero_share * cell.rows)]] = 0
    noise = 0.1 * torch.randn(cell.rows, generator=generator).to(device)
    return batch_of(hidden, weight, tokens, advantages, head.softcap).to(device).with_logprobs(noise)


def exact_logprobs(b: Batch, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The log-probabilities (N,) of the batch, computed in `dtype`, some rows at a time."""
    found = []
    for h, t in zip(b.hidden.split(512), b.tokens.split(512), strict=True):
        z = torch.cat([h.to(dtype) @ w.to(dtype).T for w in b.weight.split(32768)], 1)
        z = z if b.softcap is None else b.softcap * torch.tanh(z / b.softcap)
        found.append(z.log_softmax(-1).gather(1, t[:, None])[:, 0])
    return torch.cat(found)


OURS = ("fastpg one pass", "fastpg two passes")
VARIANTS = ("fastpg one pass, half zero weights", "fastpg one pass, frozen weight")
LOSSES = ("policy_loss alone", "plain lines alone")  # on ready log-probabilities
OVER_TOKENS = ("fastpg one pass", "full logits", "full logits, compiled", "TRL")
SMALL = HEADS["smollm2-135m"]


def cpu_cells() -> list[Cell]:
    """The cells that two cores finish in less than ten minutes."""
    cells, one = [], ("fastpg one pass",)
    for dtype in DTYPES:
        # in fp32 the default workspace cuts this batch into two chunks; in bf16 one chunk holds it
        more = ("fastpg one pass, several chunks", "torch linear_cross_entropy") if dtype == "bfloat16" else ()
        methods = (*OURS, *VARIANTS, *more, "full logits", "full logits, compiled", "TRL", "Liger", "CCE", "verl")
        cells.append(Cell("step", f"SmolLM2's head, {dtype}", SMALL, 2048, dtype, methods))
        wide = Head(SMALL.vocab, 2048)
        cells.append(Cell("H = 2048", f"H = 2048, {dtype}", wide, 512, dtype, (*one, "full logits"), rounds=1))
        for rows in (1024, 4096, 8192) if dtype == "bfloat16" else (1024, 4096):
            methods = OVER_TOKENS if dtype == "bfloat16" else one
            cells.append(Cell("over N", f"N = {rows}, {dtype}", SMALL, rows, dtype, methods, rounds=1))
        for vocab in (8192, 49152, 151936, 262144):
            methods = (*OURS, "full logits") if dtype == "bfloat16" else one
            cells.append(Cell("over V", f"V = {vocab}, {dtype}", Head(vocab, 576), 512, dtype, methods, rounds=1))
    return [*cells, loss_cell(2048, "float32")]


def gpu_cells() -> list[Cell]:
    """The same questions at the sizes of training runs. The step of five of these heads has been measured on an H100."""
    cells = []
    peers = (
        "full logits", "full logits, compiled", "TRL", "Liger", "Liger, scaled cross entropy", "QuACK",
        "torch linear_cross_entropy", "CCE", "verl",
    )  # fmt: skip
    methods = (*OURS, *VARIANTS, "fastpg one pass, one chunk", *peers)
    for name, head in HEADS.items():
        cells.append(Cell("step", f"{name}, bfloat16", head, 8192, "bfloat16", methods))
    for name in ("smollm2-135m", "qwen3-0.6b"):  # where the host counts most
        for rows in (512, 2048):
            few = (*OURS, "full logits", "full logits, compiled")
            cells.append(Cell("small batch", f"{name}, N = {rows}, bfloat16", HEADS[name], rows, "bfloat16", few, rounds=5))
    step = cells[list(HEADS).index("qwen3-8b")]
    for rows in (1024, 2048, 4096, 16384, 32768):
        cells.append(Cell("over N", f"N = {rows}, bfloat16", step.head, rows, "bfloat16", OVER_TOKENS))
    for vocab in (32768, 65536, 151936, 262144):
        methods = ("fastpg one pass", "fastpg two passes", "full logits")
        cells.append(Cell("over V", f"V = {vocab}, bfloat16", Head(vocab, 4096), 4096, "bfloat16", methods))
    return [*cells, loss_cell(8192, "bfloat16")]


def loss_cell(rows: int, dtype: str) -> Cell:
    """The cost of `policy_loss` alone.

    A loss takes less than a millisecond, hence the many rounds. Its share of a step is largest at this head.
    """
    return Cell("loss alone", f"{rows} log-probabilities, {dtype} head", SMALL, rows, dtype, LOSSES, rounds=100)


def tiny_cells() -> list[Cell]:
    """Small cells of most sections and methods, on about a hundred tokens: to exercise the program, not to measure."""
    head, one = Head(1000, 64), ("fastpg one pass",)
    methods = (*OURS, *VARIANTS, "full logits", "TRL", "Liger", "torch linear_cross_entropy")
    cells = [Cell("step", f"tiny, {dtype}", head, 96, dtype, methods) for dtype in DTYPES]
    few = (*one, "full logits")
    cells += [replace(cells[0], section="over N", name=f"N = {n}, float32", rows=n, methods=few) for n in (32, 64)]
    cells += [replace(cells[0], section="over V", name=f"V = {v}, float32", head=Head(v, 64), methods=few) for v in (200, 500)]
    cells.append(replace(cells[0], section="loss alone", name="96 log-probabilities, float32 head", methods=LOSSES))
    return cells
