"""A step over the tokens that a sampler kept: SmolLM2's own text at top_p 0.95, against the bare products and the usual ways.

    python bench/sampled_support.py             N = 2048 tokens, fp32 and bf16; a few minutes, on an idle machine

The sets are those of nucleus sampling at temperature 1: the most probable tokens whose probabilities reach top_p, and the one
that crosses it. Each step is forward and backward of a CISPO loss. Runs are interleaved, and the figure is the median. Each
method is compared with full logits in float64 on some rows.

    bare products    X W^T, Z W, Z^T X of the same shapes and dtype, the floor of a step over the whole vocabulary
    rows copied      the rows of W of all sets, read and written once
    fastpg           linear_cispo_loss(support=)
    full logits      log_softmax of all logits, -inf outside the sets
    gathered         rows of the weight by indexing, softmax over them and autograd: plain PyTorch on the same sets
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from cases import DTYPES
from measure import machine

import fastpg
from fastpg import Support
from fastpg.demo.tasks import load_smollm2
from fastpg.tools.memory import transient_bytes

PROMPTS = (
    "The",
    "Once upon a time",
    "Write a poem about the sea.",
    "def main():",
    "In 1905,",
    "Dear Sir or Madam,",
    "Why",
    "1 + 1",
)


class Batch(NamedTuple):
    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    tokens: torch.Tensor  # (N,)
    old_logprobs: torch.Tensor  # (N,)
    advantages: torch.Tensor  # (N,)
    support: Support

    def to(self, dtype: torch.dtype) -> Batch:
        return self._replace(hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))

    def leaves(self) -> Batch:
        return self._replace(hidden=self.hidden.detach().requires_grad_(), weight=self.weight.detach().requires_grad_())


@torch.no_grad()
def sampled(rows: int, top_p: float) -> Batch:
    """Hidden states of text that SmolLM2 sampled, and what top_p left of the vocabulary at each token."""
    model, tokenizer = load_smollm2()
    torch.manual_seed(0)
    hidden, tokens = [], []
    while sum(map(len, tokens)) < rows:
        prompt = tokenizer(PROMPTS[len(tokens) % len(PROMPTS)], return_tensors="pt").input_ids
        ids = model.generate(
            prompt, do_sample=True, top_p=top_p, top_k=0, temperature=1.0, max_new_tokens=256, min_new_tokens=256,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        states = model.base_model(ids).last_hidden_state[0]
        hidden.append(states[prompt.shape[1] - 1 : -1])
        tokens.append(ids[0, prompt.shape[1] :])
    hidden, tokens = torch.cat(hidden)[:rows], torch.cat(tokens)[:rows]
    weight = model.get_output_embeddings().weight.detach()
    kept = []
    for states, ids in zip(hidden.split(256), tokens.split(256), strict=True):
        p, order = (states @ weight.T).softmax(-1).sort(descending=True)
        some = torch.zeros_like(p, dtype=torch.bool).scatter_(1, order, p.cumsum(-1) - p < top_p)
        kept.append(some.scatter_(1, ids[:, None], True))  # a rounding error apart, the token is among them
    support = Support.from_mask(torch.cat(kept))
    old = fastpg.linear_logprobs(hidden, weight, tokens, support=support).logprobs
    advantages = torch.randn(rows)
    return Batch(hidden, weight, tokens, old + 0.05 * torch.randn(rows), advantages, support)


def cispo(logprobs: torch.Tensor, b: Batch) -> torch.Tensor:
    ratio = (logprobs - b.old_logprobs).exp().clamp(max=5).detach()
    return -(ratio * b.advantages * logprobs).mean()


def by_fastpg(b: Batch) -> torch.Tensor:
    return fastpg.linear_cispo_loss(b.hidden, b.weight, b.tokens, b.old_logprobs, b.advantages, support=b.support).loss


def by_full_logits(b: Batch) -> torch.Tensor:
    logits = (b.hidden @ b.weight.T).float()
    mask = b.support.mask(len(b.weight))
    logprobs = logits.masked_fill(~mask, -torch.inf).log_softmax(-1).gather(1, b.tokens[:, None])[:, 0]
    return cispo(logprobs, b)


def by_gathering(b: Batch) -> torch.Tensor:
    ids, sizes = b.support.ids.long(), b.support.sizes()
    row = torch.arange(len(sizes)).repeat_interleave(sizes)
    z = (b.hidden[row] * b.weight[ids]).sum(-1, dtype=torch.float32)
    largest = torch.full((len(sizes),), -torch.inf).scatter_reduce(0, row, z.detach(), "amax")
    total = torch.zeros(len(sizes)).index_add(0, row, (z - largest[row]).exp())
    own = z[ids == b.tokens[row]]
    return cispo(own - largest - total.log(), b)


METHODS: dict[str, Callable[[Batch], torch.Tensor]] = {
    "fastpg": by_fastpg, "full logits": by_full_logits, "gathered": by_gathering,
}  # fmt: skip


def step(method: Callable[[Batch], torch.Tensor], b: Batch) -> Batch:
    b = b.leaves()
    method(b).backward()
    return b


def check(method: Callable[[Batch], torch.Tensor], b: Batch, rows: int = 64) -> float:
    """The largest relative error of dX and dW against full logits in float64, over some rows."""
    at = int(b.support.offsets[rows])
    some = b._replace(
        hidden=b.hidden[:rows], tokens=b.tokens[:rows], old_logprobs=b.old_logprobs[:rows], advantages=b.advantages[:rows],
        support=Support(b.support.ids[:at], b.support.offsets[: rows + 1], b.support.whole[:rows]),
    )  # fmt: skip
    got, want = step(method, some), step(method_in_float64, some)
    pairs = ((got.hidden.grad, want.hidden.grad), (got.weight.grad, want.weight.grad))
    return max(((x.double() - y.double()).norm() / y.double().norm()).item() for x, y in pairs)


def method_in_float64(b: Batch) -> torch.Tensor:
    logits = b.hidden.double() @ b.weight.double().T
    mask = b.support.mask(len(b.weight))
    return cispo(logits.masked_fill(~mask, -torch.inf).log_softmax(-1).gather(1, b.tokens[:, None])[:, 0], b)


def bare_products(b: Batch) -> Callable[[], None]:
    z = torch.randn(len(b.hidden), len(b.weight)).to(b.hidden.dtype)

    def run() -> None:
        _ = b.hidden @ b.weight.T
        _ = z @ b.weight
        _ = z.T @ b.hidden

    return run


def rows_copied(b: Batch) -> Callable[[], None]:
    def run() -> None:
        for ids in b.support.ids.long().split(512):
            _ = b.weight[ids]

    return run


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measured(b: Batch, rounds: int) -> dict[str, dict[str, float]]:
    runs = {"bare products": bare_products(b), "rows copied": rows_copied(b)} | {
        name: (lambda m=m: step(m, b)) for name, m in METHODS.items()
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):  # the first is not counted
        for name, run in runs.items():
            found[name].append(seconds(run))
    times = {name: statistics.median(t[1:]) for name, t in found.items()}
    floor = times["bare products"]
    results = {name: {"seconds": t, "over bare products": t / floor} for name, t in times.items()}
    for name, method in METHODS.items():
        results[name] |= {"error": check(method, b), "MiB": transient_bytes(lambda m=method: step(m, b)) / 2**20}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    results = {"machine": machine("cpu"), "top_p": options.top_p, "rows": options.rows}
    batch = sampled(options.rows, options.top_p)
    for name, dtype in DTYPES.items():
        b = batch.to(dtype)
        sizes = torch.where(b.support.whole, len(b.weight), b.support.sizes()).double()
        results["sizes"] = {
            "mean": sizes.mean().item(), "median": sizes.median().item(), "largest": sizes.max().item(),
            "share of 1": (sizes == 1).double().mean().item(),
            "above V / 256": (sizes > len(b.weight) / 256).double().mean().item(),
        }  # fmt: skip
        results[name] = measured(b, options.rounds)
        print(name, json.dumps(results["sizes"]))
        for method, numbers in results[name].items():
            print(f"  {method:14}", "  ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
