"""Peak memory of one step of the loss over its tokens, at the head of Qwen3-8B in bf16, as it would be on a GPU.

    python bench/memory_over_tokens.py           writes memory-over-tokens.json and memory_over_tokens.png into bench/results

Needs no GPU: bytes are counted on meta tensors (on_meta.py). The H100's own figures, for 8192 tokens, are dots in the picture.
Gradients of hidden states and weight are included; the two themselves, and the rest of a model, are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from cases import HEADS, Batch
from on_meta import Allocations, NoKernel, as_on_a_gpu
from peers import full_logits, plain_loss, trl

import fastpg

RESULTS = Path(__file__).parent / "results"
COUNTED, PICTURE = RESULTS / "memory-over-tokens.json", RESULTS / "memory_over_tokens.png"
HEAD = HEADS["qwen3-8b"]
ROWS = (1024, 2048, 4096, 8192, 16384, 24576, 32768, 49152, 65536)


def one_pass(b: Batch) -> None:
    fastpg.linear_cispo_loss(b.hidden, b.weight, b.tokens, b.old_logprobs, b.advantages, check=False).loss.backward()


def two_passes(b: Batch) -> None:
    plain_loss(fastpg.linear_logprobs(b.hidden, b.weight, b.tokens, check=False).logprobs, b).backward()


METHODS = {"fastpg one pass": one_pass, "fastpg two passes": two_passes, "full logits": full_logits, "TRL": trl}


def batch(rows: int) -> Batch:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    hidden, weight = meta(rows, HEAD.hidden, dtype=torch.bfloat16), meta(HEAD.vocab, HEAD.hidden, dtype=torch.bfloat16)
    tokens, old, advantages, mask = meta(rows, dtype=torch.int64), meta(rows), meta(rows), meta(rows, dtype=torch.bool)
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), tokens, old, advantages, mask, meta(rows))


@contextmanager
def _trl_as_on_a_gpu() -> Iterator[None]:
    """TRL's head with its Triton kernels, which write in place what its PyTorch code allocates."""
    from trl.kernels import chunked_logprob

    replaced = {name: NoKernel() for name in vars(chunked_logprob) if name.endswith("_kernel")}
    with (
        mock.patch.multiple(chunked_logprob, _use_triton=lambda device: True, **replaced),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),  # it has no answer for meta tensors
    ):
        yield


def peak_bytes(method: str, rows: int) -> int:
    b = batch(rows)
    inputs = [x for x in b if isinstance(x, torch.Tensor)]
    with as_on_a_gpu(), _trl_as_on_a_gpu(), Allocations(inputs) as allocations:
        METHODS[method](b)
    return allocations.peak


def main() -> None:
    rows = {method: {count: peak_bytes(method, count) for count in ROWS} for method in METHODS}
    about = {"head": HEAD._asdict(), "dtype": "bfloat16", "torch": torch.__version__, "what": __doc__.splitlines()[0]}
    COUNTED.write_text(json.dumps({"about": about, "peak_bytes": rows}, indent=1) + "\n")
    for method, of_method in rows.items():
        print(f"{method:18}", *(f"{x / 2**30:7.2f}" for x in of_method.values()), "GiB")


if __name__ == "__main__":
    main()
