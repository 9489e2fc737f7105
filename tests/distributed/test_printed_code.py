"""The code that the documents print, on two ranks under DDP: gradients are equal on both, and those of one process.

Its blocks are read from the documents. A line that wraps the model is put behind the one that makes it, and every rank has
sequences of its own. `tests/project/test_guides.py` runs the programs that start ranks themselves.
"""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from pages import PAGES
from ranks import results_of, run_jobs, run_on_ranks
from torch import nn

import fastpg
from fastpg.distributed import global_count

pytestmark = pytest.mark.xdist_group("data-parallel ranks")

RANKS = 2
IMPORTED_BY_FUNCTIONS = ("transformers.models.llama.modeling_llama",)
FACTORS = ("mask", "old_logprobs", "advantages")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


BEFORE, AFTER = blocks((Path(__file__).resolve().parents[2] / "README.md").read_text())[-2:]
GUIDES = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (PAGES / "guides.md").read_text(), re.DOTALL | re.MULTILINE))
WRAP = re.search(r"`(model = [\w.]*DistributedDataParallel\(model\))`", GUIDES["A plain PyTorch loop"])[1]
WITH_BUFFER = blocks((PAGES / "distributed.md").read_text())[1]


def changed(code: str, old: str, new: str) -> str:
    assert code.count(old) == 1, old
    return code.replace(old, new)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in found.items()}


# README: hidden states of a model, and the one-pass loss


def llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=tied, **SIZES))


def readme_names(model: nn.Module, rows: slice = slice(None)) -> dict:
    from fastpg.integrations.transformers import patched

    torch.manual_seed(1)
    ids = torch.randint(0, 50, (6, 9))
    mask = torch.arange(8) < torch.tensor([8, 1, 7, 2, 8, 3])[:, None]
    batch = {"input_ids": ids, "tokens": ids[:, 1:], "mask": mask, "advantages": torch.randn(6, 8)}
    batch |= {"old_logprobs": -4 + torch.randn(6, 8)}
    return {"torch": torch, "fastpg": fastpg, "patched": patched, "model": model, **{n: x[rows] for n, x in batch.items()}}


def readme(rank: int, wrapper: str, tied: bool, past_the_wrapper: bool = False) -> dict:
    names = readme_names(llama(tied), slice(rank, None, RANKS))
    if wrapper == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(names["model"].model.layers[0])
        fully_shard(names["model"])
    else:
        exec(WRAP, names)
    names["denominator"] = global_count(names["mask"]).clamp(min=1) / RANKS
    code = changed(AFTER, "mask=mask)", "mask=mask, denominator=denominator)")
    exec(changed(code, "model(input_ids)", "model.module(input_ids)") if past_the_wrapper else code, names)
    return gradients(names["model"])


def with_unused_parameters(rank: int) -> dict:
    """What a guide says of find_unused_parameters=True: the functions are right, and README's lines raise."""
    from fastpg.integrations.transformers import causal_lm_policy_loss

    names = readme_names(llama(), slice(rank, None, RANKS))
    names["model"] = nn.parallel.DistributedDataParallel(names["model"], find_unused_parameters=True)
    ids, mask, old, advantages = names["input_ids"], *(nn.functional.pad(names[n], (1, 0)) for n in FACTORS)
    options = {"completion_mask": mask, "denominator": global_count(mask) / RANKS}
    causal_lm_policy_loss(names["model"], ids, None, old, advantages, objective=fastpg.CISPO(), **options).loss.backward()
    found = {name: x.clone() for name, x in gradients(names["model"]).items()}
    try:
        exec(AFTER, names)
    except RuntimeError as error:
        return {"gradients": found, "error": str(error)}
    return {"gradients": found, "error": "none"}


def with_full_logits(tied: bool) -> dict:
    names = readme_names(llama(tied))
    exec(BEFORE, names)
    return gradients(names["model"])


# GUIDES: the plain loop

LOOP = blocks(GUIDES["A plain PyTorch loop"])[0]
STEP = dedent(re.search(r"    hidden = model\(inputs\)\n.*?backward\(\)\n", LOOP, re.DOTALL)[0])
BATCH = ("inputs", "tokens", "old_logprobs", "advantages")


def plain_loop(rank: int) -> dict:
    """After its steps, and the gradients of one more on the last batch."""
    names, head = {}, re.search(r"^head = .*$", LOOP, re.MULTILINE)[0]
    code = changed(LOOP, "torch.manual_seed(0)", f"torch.manual_seed({rank})")  # DDP starts from rank 0's weights
    exec(changed(code, head, f"{head}\n{WRAP}"), names)
    exec(STEP, names)
    net = names["model"].module
    return {"weights": net.state_dict(), "batch": [names[n] for n in BATCH], "gradients": gradients(net)}


# GUIDES: a transformers model

OF_TRANSFORMERS = blocks(GUIDES["transformers"])[0]


def transformers_guide(seed: int, made: str, names: dict) -> nn.Module:
    """made: what follows the line that makes the model."""
    line = "model = LlamaForCausalLM(config)\n"
    code = changed(OF_TRANSFORMERS, "torch.manual_seed(0)", f"torch.manual_seed({seed})")
    exec(changed(code, line, line + made), names)
    return names["model"]


# DISTRIBUTED: the buffer of weight_grad


class States(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.body = nn.Embedding(41, 16), nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 41, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(self.embedding(ids)).tanh()


def micro_batches(rank: int) -> list[dict]:
    generator = torch.Generator().manual_seed(3 + rank)
    found = []
    for _ in range(3):
        ids = torch.randint(0, 41, (2, 7), generator=generator)
        mask = torch.rand(2, 7, generator=generator) < (0.9, 0.3)[rank]
        old, advantages = (torch.randn(2, 7, generator=generator) for _ in range(2))
        found.append(
            {"input_ids": ids, "tokens": ids.roll(-1, 1), "mask": mask, "old_logprobs": old - 4, "advantages": advantages}
        )
    return found


def with_buffer(rank: int, tied: bool, averaged: bool) -> dict:
    model, mine = States(tied), micro_batches(rank)
    count = global_count(torch.stack([m["mask"] for m in mine]))
    names = {
        "torch": torch, "LMHead": fastpg.LMHead, "linear_cispo_loss": fastpg.linear_cispo_loss, "weight": model.lm_head.weight,
        "ddp": nn.parallel.DistributedDataParallel(model), "micro_batches": mine, "world_size": RANKS,
        "denominator": count / RANKS if averaged else count,
    }  # fmt: skip
    division = re.search(r"^buffer /= .*\n", WITH_BUFFER, re.MULTILINE)[0]
    exec(WITH_BUFFER if averaged else changed(WITH_BUFFER, division, ""), names)
    return gradients(model) | {"buffer": names["buffer"]}


JOBS = {
    "README, DDP": (readme, "DDP", False),
    "README, DDP, tied": (readme, "DDP", True),
    "README, FSDP2": (readme, "FSDP2", False),
    "README, past DDP": (readme, "DDP", False, True),
    "plain loop": (plain_loop,),
    "transformers": (lambda rank: gradients(transformers_guide(rank, WRAP + "\n", {})),),
    "buffer": (with_buffer, False, True),
    "buffer, tied": (with_buffer, True, True),
    "buffer, summed": (with_buffer, False, False),
    "unused parameters": (with_unused_parameters,),
}


def every_job(rank: int) -> dict:
    return run_jobs(JOBS, rank)


@pytest.fixture(scope="module")
def done() -> list[dict]:
    return run_on_ranks(every_job, RANKS, timeout=120)


def assert_close(found: dict, want: dict) -> None:
    assert found.keys() == want.keys()
    for name, x in want.items():
        assert x.any(), name
        assert (found[name] - x).norm() <= 1e-5 * x.norm(), name


@pytest.mark.parametrize("name", ["README, DDP", "README, DDP, tied", "README, FSDP2"])
def test_the_lines_of_the_readme(done, name):
    """With the denominator that its table names. One process has the whole batch, and full logits."""
    want = with_full_logits("tied" in name)
    a, b = results_of(done, name)
    assert_close(a, want)
    assert all(torch.equal(a[p], b[p]) for p in want)


def test_the_module_inside_ddp_is_not_synchronised(done):
    """The trap that the documents warn of."""
    a, b = results_of(done, "README, past DDP")
    assert not any(torch.equal(a[name], b[name]) for name in a)


def test_a_wrapper_that_looks_for_unused_parameters(done):
    want, said = with_full_logits(tied=False), "Expected to mark a variable ready only once"
    assert said in " ".join(GUIDES["Data parallel"].split())
    for result in results_of(done, "unused parameters"):
        assert_close(result["gradients"], want)
        assert said in result["error"]


def test_the_plain_loop(done):
    a, b = results_of(done, "plain loop")
    assert not torch.equal(a["batch"][0], b["batch"][0])
    assert all(torch.equal(x, b["weights"][name]) for name, x in a["weights"].items())
    names = {}
    exec(LOOP[: LOOP.index("prompts =")], names)
    names["model"].load_state_dict(a["weights"])
    names |= {name: torch.cat(x) for name, x in zip(BATCH, zip(a["batch"], b["batch"], strict=True), strict=True)}
    exec(STEP, names)
    for of_rank in (a, b):
        assert_close(of_rank["gradients"], gradients(names["model"]))


def test_the_guide_of_transformers(done):
    """Its ranks have as many tokens each, so that the mean over the whole batch is that of their means."""
    state, parts = {}, []
    for seed in range(RANKS):
        names = {"state": state}
        made = "state or state.update(model.state_dict())\nmodel.load_state_dict(state)\n"
        parts.append(gradients(transformers_guide(seed, made, names)))
    for found in results_of(done, "transformers"):
        assert_close(found, {name: (x + parts[1][name]) / 2 for name, x in parts[0].items()})


@pytest.mark.parametrize("name", ["buffer", "buffer, tied", "buffer, summed"])
def test_the_buffer_of_weight_grad(done, name):
    """Summed over micro-batches and ranks it is the gradient of one process, which has no buffer."""
    model, tied = States("tied" in name), "tied" in name
    whole = [m for rank in range(RANKS) for m in micro_batches(rank)]
    ids, tokens, mask, old, advantages = (
        torch.cat([m[key] for m in whole]) for key in ("input_ids", "tokens", "mask", "old_logprobs", "advantages")
    )
    fastpg.linear_cispo_loss(model(ids), model.lm_head.weight, tokens, old, advantages, mask=mask).loss.backward()
    want = gradients(model)
    weight = "embedding.weight" if tied else "lm_head.weight"
    for found in results_of(done, name):
        buffer = found.pop("buffer")
        if not tied:
            assert not found[weight].any()  # DDP averaged zeros
        found[weight] = found[weight] + buffer  # a tied embedding has its own share in .grad
        compared = [weight] if name == "buffer, summed" else [*want]  # DDP averages the others, whatever the denominator
        assert_close({key: found[key] for key in compared}, {key: want[key] for key in compared})
