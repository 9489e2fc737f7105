"""Every Python block of the README runs, the first two are the same loss, and its measurements are those in bench/results."""

import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from endings import plain_cispo_loss
from readme_tables import H100_SERIES, H100_STEP, RESULTS, accuracy_table, goals_table, h100_table, loss_table, step_table

import fastpg
from fastpg.crosscheck import accuracy
from fastpg.crosscheck.accuracy import SMALLEST_RANGE, TENSOR_CORE_TERMS, UNIT, logprob_tolerance

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def names() -> dict:
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastpg.integrations.transformers import patched

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    input_ids = torch.randint(0, 50, (3, 9))
    head, old_logprobs, advantages = fastpg.LMHead.from_model(model), -4 * torch.rand(3, 8), torch.randn(3, 8)
    hidden, mask = torch.randn(3, 8, 32), torch.rand(3, 8) > 0.3
    micro = {"hidden": hidden, "tokens": input_ids[:, 1:], "old_logprobs": old_logprobs, "advantages": advantages}
    return {
        "torch": torch, "fastpg": fastpg, "model": model, "input_ids": input_ids, "tokens": input_ids[:, 1:], "mask": mask,
        "old_logprobs": old_logprobs, "advantages": advantages, "head": head, "hidden": hidden, "micro_batches": [micro] * 2,
        "total_tokens": 48, "patched": patched,
    }  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:40])
def test_block_runs(block, names):
    exec(block, names)


def test_before_and_after_are_the_same_loss_and_gradients(names):
    results = []
    for block in BLOCKS[:2]:
        assert len([line for line in block.splitlines() if not line.startswith("#")]) <= 6
        names["model"].zero_grad()
        exec(block, names)
        results.append([names["loss"].detach(), *(p.grad.clone() for p in names["model"].parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_bench_lets_peers_end_in_the_lines_of_before(names):
    exec(BLOCKS[0], names)
    plain = plain_cispo_loss(*(names[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")))
    torch.testing.assert_close(plain, names["loss"])


def test_measurements_are_those_of_the_results():
    results = json.loads(RESULTS.read_text())
    assert f"<!-- bench -->\n{step_table(results)}<!-- /bench -->" in README
    of_results = (RESULTS.parent / "README.md").read_text()
    assert f"<!-- goals -->\n{goals_table(results)}<!-- /goals -->" in of_results
    assert f"<!-- loss -->\n{loss_table(results)}<!-- /loss -->" in of_results
    step, series = (json.loads(path.read_text()) for path in (H100_STEP, H100_SERIES))
    measured = {round(row["over_products"], 2) for row in results["rows"] + step["rows"] if "over_products" in row}
    measured |= {round(row["x"], 2) for row in series["runs"]["third"] if "x" in row}
    for number in re.findall(r"\b(\d+\.\d+) x\b", README):  # nowhere else in it either
        assert float(number) in measured, number
    about = results["about"]
    assert about["machine"].split(",")[0] in README
    assert f"torch {'.'.join(about['versions']['torch'].split('.')[:2])}," in README


def test_measurements_on_a_gpu_are_those_of_the_results():
    step, series = (json.loads(path.read_text()) for path in (H100_STEP, H100_SERIES))
    assert f"<!-- h100 -->\n{h100_table(step, series)}<!-- /h100 -->" in README
    machine = f"{series['gpu']}, torch {series['torch']}, triton {series['triton']}, {series['code']}, {series['date']}"
    assert machine in " ".join(README.split())
    assert (step["about"]["machine"], step["about"]["date"]) == (series["gpu"], series["date"])
    errors = {r["name"]: r["logp"] for run in series["runs"].values() for r in run if r.get("H") == 4096 and "logp" in r}
    one, two, full = (f"{errors[name]:.1e}" for name in ("fastpg one pass", "fastpg two passes", "full logits"))
    assert f"the largest error was {one} in one pass and {two} in two (full logits in bf16: {full})" in " ".join(README.split())
    refused = next(r for r in step["rows"] if r["name"].startswith("qwen3-8b") and r["method"] == "fastpg one pass")
    assert refused["logp_error"] > 1.2e-5  # what the gate of that commit allowed
    assert refused["logp_error"] <= logprob_tolerance(12.0, torch.bfloat16, refused["hidden"], "cuda")
    third = {(r["section"], r["name"]): r for r in series["runs"]["third"] if r.get("H") == 4096}
    names = {"bare products": "bare products", "as is": "one pass", "fastpg two passes": "two passes"}
    times = {name: (statistics.median(third["proto", n]["ms"]), third["peak", n]["peak"] / 2**30) for n, name in names.items()}
    said = ", ".join(f"{name} {ms:.1f} ({peak:.2f} GiB)" for name, (ms, peak) in times.items())
    assert said in (RESULTS.parents[2] / "kernels" / "README.md").read_text()


def test_the_promise_is_that_of_the_code():
    formula = f"{UNIT[torch.bfloat16]:g} max({SMALLEST_RANGE}, |z|max)".replace("e-06", "e-6")
    on_gpus = f"{formula} max(1, H / {TENSOR_CORE_TERMS})"
    for document in (README, (RESULTS.parents[2] / "kernels" / "README.md").read_text(), accuracy.logprob_tolerance.__doc__):
        words = " ".join(document.split())
        assert formula in words.replace(on_gpus, "")  # by itself as well
        assert on_gpus in words
    table = accuracy_table(json.loads(H100_SERIES.read_text()))
    assert f"<!-- accuracy -->\n{table}<!-- /accuracy -->" in (RESULTS.parent / "README.md").read_text()


def test_the_results_are_whole():
    results = json.loads(RESULTS.read_text())
    since = {"loss alone"} if any("ends_in" in row for row in results["rows"]) else set()  # older results have neither
    assert {row["section"] for row in results["rows"]} == {"step", "H = 2048", "over N", "over V", "samples"} | since
    assert len(results["goals"]) == 21
    assert {"date", "machine", "versions"} <= set(results["about"])
    for name in ("results.csv", "time_over_products.png", "memory_over_vocab.png", "over_tokens.png"):
        assert (RESULTS.parent / name).is_file()
