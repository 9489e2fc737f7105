"""What crosses ranks, counted: the first table of distributed.md, and that no rank exchanges anything with V entries."""

import re

import pytest
import torch
import torch.distributed as dist
from pages import PAGES
from ranks import run_on_ranks

from fastpg import LMHead, linear_cispo_loss, linear_logprobs

pytestmark = pytest.mark.xdist_group("data-parallel ranks")  # its ranks are started once, not in every process

N, MASKED, H, V, RANK = 300, 40, 24, 101, 3
AGREEMENT = 192
PAGE = (PAGES / "distributed.md").read_text()
LARGEST = 12  # bytes of a row for each of the largest logits that is kept
FURTHER = {  # outputs and top_k: (bytes of a row, bytes in all, bytes of the backward) beyond those of log-probabilities
    (("logsumexp",), 0): (0, 0, 0),
    (("mean_logits",), 0): (4, 8, 8),
    (("log_sum_sq_probs",), 0): (4, 0, 0),
    (("argmax",), 0): (LARGEST, 0, 0),
    (("is_top1", "argmax"), 0): (LARGEST, 0, 0),
    (("rank",), 0): (16 + LARGEST, 0, 0),
    ((), 1): (LARGEST, 0, 0),
    (("argmax",), 3): (3 * LARGEST, 0, 0),
    (("mean_logits", "log_sum_sq_probs", "rank", "is_top1", "logsumexp"), 8): (120, 8, 8),
}


def counted(rank: int) -> dict[str, dict[str, list[int]]]:
    """Bytes that this rank handed to each collective, in order, by kind of call."""
    from fastpg.distributed import vocab_parallel

    log: dict[str, list[int]] = {}
    gather, reduce = dist.all_gather, dist.all_reduce
    vocab_parallel.dist.all_gather = lambda out, x, **k: (log.setdefault("gather", []).append(x.nbytes), gather(out, x, **k))
    vocab_parallel.dist.all_reduce = lambda x, **k: (log.setdefault("reduce", []).append(x.nbytes), reduce(x, **k))
    torch.manual_seed(0)
    weight, hidden, tokens = torch.randn(V, H), torch.randn(N, H), torch.randint(0, V, (N,))
    factors = torch.randn(RANK, H, requires_grad=True), torch.randn(V, RANK)
    mask, advantages, old = torch.arange(N) >= MASKED, torch.randn(N), -torch.rand(N)
    share = -(-V // dist.get_world_size())
    rows = slice(rank * share, (rank + 1) * share)
    found = {}

    def head(lora: bool) -> LMHead:
        update, softcap = ((factors[0], factors[1][rows], 0.1), 5.0) if lora else (None, None)
        shard = weight[rows].requires_grad_()
        return LMHead(shard, softcap=softcap, lora=update, group=dist.group.WORLD, vocab_start=rows.start)

    for entropy in (False, True):
        for lora in (False, True):
            x = hidden.clone().requires_grad_()
            loss = linear_cispo_loss(x, head(lora), tokens, old, advantages, mask=mask, entropy=entropy).loss
            loss.backward()
            found[f"one pass {entropy} {lora}"] = log.copy()
            log.clear()
            logprobs = linear_logprobs(x, head(lora), tokens, mask=mask, entropy=entropy).logprobs
            found[f"forward {entropy} {lora}"] = log.copy()
            log.clear()
            logprobs.sum().backward()
            found[f"backward {entropy} {lora}"] = log.copy()
            log.clear()
    for outputs, top_k in FURTHER:
        x = hidden.clone().requires_grad_()
        results = linear_logprobs(x, head(False), tokens, mask=mask, outputs=outputs, top_k=top_k)
        found[f"forward {outputs} {top_k}"] = log.copy()
        log.clear()
        sum(r.sum() for r in results if r is not None and r.requires_grad).backward()
        found[f"backward {outputs} {top_k}"] = log.copy()
        log.clear()
        linear_cispo_loss(x, head(False), tokens, old, advantages, mask=mask, outputs=outputs, top_k=top_k)
        found[f"one pass {outputs} {top_k}"] = log.copy()
        log.clear()
    return found


@pytest.fixture(scope="module", params=[2, 4])
def log(request):
    ranks = run_on_ranks(counted, request.param)
    assert all(other == ranks[0] for other in ranks)
    return ranks[0]


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora and softcap"])
@pytest.mark.parametrize("entropy", [False, True], ids=["logprobs", "entropy"])
def test_bytes_are_those_of_the_page(log, entropy, lora):
    K = N - MASKED
    padded = -(-K // 256) * 256  # PyTorch tiles pad a chunk's rows
    gradients = [4 * K * H, 4 * K * RANK][: 1 + lora]
    one, forward, backward = (log[f"{name} {entropy} {lora}"] for name in ("one pass", "forward", "backward"))
    of_target = 12 if lora else 8  # the head with LoRA has a softcap
    assert one == {"gather": [AGREEMENT, of_target * padded, (8 if entropy else 4) * padded], "reduce": gradients}
    assert forward["gather"][0] == AGREEMENT
    assert sum(forward["gather"][1:]) == (20 if entropy else 16) * K
    assert "reduce" not in forward
    assert backward == {"reduce": gradients}


@pytest.mark.parametrize(("outputs", "top_k"), FURTHER, ids=str)
def test_bytes_of_further_statistics_are_those_of_the_page(log, outputs, top_k):
    K = N - MASKED
    of_row, once, in_backward = FURTHER[outputs, top_k]
    forward, backward = (log[f"{name} {outputs} {top_k}"] for name in ("forward", "backward"))
    assert forward["gather"][0] == AGREEMENT
    assert sum(forward["gather"][1:]) == (16 + of_row) * K + once
    assert "reduce" not in forward
    assert backward.pop("gather", []) == [in_backward] * bool(in_backward)
    assert backward == {"reduce": [4 * K * H]}
    one = log[f"one pass {outputs} {top_k}"]
    padded, known = -(-K // 256) * 256, 8 if "rank" in outputs else 0
    assert sum(one["gather"]) == AGREEMENT + (12 + of_row - known) * padded + once
    assert one["reduce"] == [4 * K * H]


def test_the_page_has_the_most_of_further_statistics():
    (most,) = re.findall(r"^\| with `outputs=`, `top_k=` \|.*\| up to (\d+) K, and 16 \|", PAGE, re.MULTILINE)
    assert int(most) == max(of_row for of_row, _, _ in FURTHER.values())
    assert max(once + in_backward for _, once, in_backward in FURTHER.values()) == 16
