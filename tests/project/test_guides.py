"""Every block of the start page, the guides, the supports, frameworks.md and distributed.md runs as printed, in a process and a
directory of its own (`programs`). Blocks of the guides that are part of a program of docs/examples/ run in `test_examples`."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from pages import PAGES, blocks_in_examples
from programs import run_program

import fastpg

pytestmark = pytest.mark.xdist_group("programs")  # one process has imported what they need

GUIDES = (PAGES / "guides.md").read_text()
TEXTS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", GUIDES, re.DOTALL | re.MULTILINE))
SECTIONS = {title: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for title, text in TEXTS.items()}
FRAMEWORKS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (PAGES / "frameworks.md").read_text(), re.DOTALL | re.MULTILINE))
# What the block of a section imports; without it the block is not run. None: it imports nothing of the framework's.
IMPORTED = {
    "verl": "verl",
    "SkyRL": "skyrl",
    "OpenRLHF": "flash_attn",  # which openrlhf.models imports; `test_openrlhf` runs the block with a stand-in
    "NeMo-RL": None,
    "prime-rl": None,
    "torchtitan": "torchtitan",
    "axolotl": None,
    "ms-swift": None,
}
# In a process that has imported nothing, as the start page's block. The others: `programs`.
FRESH = "Only logits at hand"


def run(folder: Path, code: str, **options) -> None:
    (folder / "guide.py").write_text(code)
    settings = {"PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    done = run_program("guide.py", folder=folder, environment=settings, **options)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("title", SECTIONS)
def test_guide_runs(title, tmp_path):
    (code,) = SECTIONS[title]  # one block each
    if code in blocks_in_examples():
        return
    ranks = 2 if "torchrun --nproc-per-node 2" in TEXTS[title] else 0
    run(tmp_path, code, ranks=ranks, fresh=title == FRESH)


@pytest.mark.parametrize("page", ["index.md", "supports.md"])
def test_block_of_a_page_runs(page, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)
    run(tmp_path, code, fresh=page == "index.md")


@pytest.mark.parametrize("title", IMPORTED)
def test_guide_of_a_framework_runs(title, tmp_path):
    """Each block on its own; there may be none."""
    if IMPORTED[title] and not importlib.util.find_spec(IMPORTED[title]):  # importing some of them changes other libraries
        pytest.skip(f"make frameworks installs {title}")
    for code in re.findall(r"```python\n(.*?)```", FRAMEWORKS[title], re.DOTALL):
        run(tmp_path, code)


def test_every_section_of_the_frameworks_says_what_was_tested():
    listed = re.findall(r"^- \[(.*?)\]\(#(.*?)\)", (PAGES / "frameworks.md").read_text(), re.MULTILINE)
    assert [title for title, _ in listed] == list(FRAMEWORKS) == list(IMPORTED)
    for title, anchor in listed:
        assert anchor == title.lower().replace(" ", "-")
        assert re.search(r"Tested against|Formula only|Tried with", FRAMEWORKS[title]), title


def test_every_guide_is_in_the_list_of_contents():
    listed = re.findall(r"^- \[(.*?)\]\(#(.*?)\)", GUIDES, re.MULTILINE)
    assert [title for title, _ in listed] == list(SECTIONS)
    for title, anchor in listed:
        assert anchor == re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_loss_of_the_liger_guide_is_ligers():
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    names = {}
    exec(SECTIONS["Coming from Liger's GRPO loss"][0], names)
    hidden, weight = (names[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
    loss_of = liger.LigerFusedLinearGRPOLoss(beta=0.0, loss_type="cispo", epsilon_high=5.0, use_ref_model=False, compiled=False)
    given = (names[name] for name in ("tokens", "attention_mask", "advantages"))
    loss, *_ = loss_of(hidden, weight, *given, old_per_token_logps=names["old_logprobs"])
    loss.backward()
    torch.testing.assert_close(names["loss"].detach(), loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(names["hidden"].grad, hidden.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(names["weight"].grad, weight.grad, rtol=1e-4, atol=1e-6)


def test_the_blocks_of_the_distributed_page():
    """On one process; tests/distributed/test_printed_code.py has two."""
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / "distributed.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    weight = torch.randn(20, 8, requires_grad=True)
    batch = {
        "tokens": torch.randint(0, 20, (4,)), "old_logprobs": -torch.rand(4), "advantages": torch.randn(4),
        "mask": torch.tensor([True, False, True, True]),
    }  # fmt: skip
    names = {
        "torch": torch, "linear_cispo_loss": fastpg.linear_cispo_loss, "LMHead": fastpg.LMHead, "hidden": torch.randn(4, 8),
        "head": weight, "weight": weight, "world_size": 1, "ddp": torch.nn.Embedding(20, 8), **batch,
        "micro_batches": [batch | {"input_ids": torch.randint(0, 20, (4,))}] * 2,
    }  # fmt: skip
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for block in blocks:
            exec(block, names)
    finally:
        torch.distributed.destroy_process_group()
    assert names["count"] == 3
    assert names["loss"].isfinite()
    assert names["buffer"].any()
    assert weight.grad is None
