"""Every Python block of the README runs, two of them are the same loss, and measurements are those in bench/results."""

import csv
import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from endings import plain_cispo_loss
from pages import PAGES
from readme_tables import (
    H100_SERIES,
    H100_STEP,
    RESULTS,
    accuracy_table,
    first_table,
    goals_table,
    h100_table,
    loss_table,
    step_table,
)  # fmt: skip

import fastpg
from fastpg.crosscheck import accuracy
from fastpg.crosscheck.accuracy import SMALLEST_RANGE, TENSOR_CORE_TERMS, UNIT, logprob_tolerance

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
HELP = (Path(fastpg.__file__).parent / "HELP.md").read_text()
OF_RESULTS = (RESULTS.parent / "README.md").read_text()
PROMISES = (PAGES / "promises.md").read_text()
TRL = re.search(r"<!-- trl -->\n```python\n(.*?)```\n<!-- /trl -->", README, re.DOTALL)[1]
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if block != TRL]


def test_it_is_short():
    assert len(README.splitlines()) <= 120


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own
def test_the_line_for_trl(tmp_path):
    pytest.importorskip("trl")
    from tiny_trl import make_tokenizer, maker

    trainer = maker(make_tokenizer(), tmp_path)(max_steps=1)
    exec(TRL, {"trainer": trainer})
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.fixture
def names() -> dict:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    input_ids = torch.randint(0, 50, (3, 9))
    head, old_logprobs, advantages = fastpg.LMHead.from_model(model), -4 * torch.rand(3, 8), torch.randn(3, 8)
    hidden, mask = torch.randn(3, 8, 32), torch.rand(3, 8) > 0.3
    return {
        "torch": torch, "fastpg": fastpg, "model": model, "input_ids": input_ids, "tokens": input_ids[:, 1:], "mask": mask,
        "old_logprobs": old_logprobs, "advantages": advantages, "head": head, "hidden": hidden,
            }  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS, ids=["before", "after"])
def test_block_runs(block, names):
    exec(block, names)


def test_the_description_of_the_package_has_the_same_code_and_stands_alone():
    """On an index page a path leads nowhere."""
    assert re.findall(r"```python\n(.*?)```", HELP, re.DOTALL) == [TRL, BLOCKS[1]]
    assert "](" not in HELP
    assert HELP.splitlines()[2:8] == README.splitlines()[2:8]


def test_before_and_after_are_the_same_loss_and_gradients(names):
    results = []
    for block in BLOCKS[:2]:
        code = [line for line in block.splitlines() if line and not line.startswith(("#", "import", "from"))]
        assert len(code) <= 6
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
    assert f"<!-- bench -->\n{step_table(results)}<!-- /bench -->" in OF_RESULTS
    assert f"<!-- goals -->\n{goals_table(results)}<!-- /goals -->" in OF_RESULTS
    assert f"<!-- loss -->\n{loss_table(results)}<!-- /loss -->" in OF_RESULTS
    step, series = (json.loads(path.read_text()) for path in (H100_STEP, H100_SERIES))
    measured = {round(row["over_products"], 2) for row in results["rows"] + step["rows"] if "over_products" in row}
    measured |= {round(row["x"], 2) for row in series["runs"]["third"] if "x" in row}
    for number in re.findall(r"\b(\d+\.\d+) x\b", README):
        assert float(number) in measured, number


def test_measurements_on_a_gpu_are_those_of_the_results():
    step, series = (json.loads(path.read_text()) for path in (H100_STEP, H100_SERIES))
    assert f"<!-- first -->\n{first_table(step, series)}<!-- /first -->" in README
    assert f"<!-- h100 -->\n{h100_table(step, series)}<!-- /h100 -->" in OF_RESULTS
    machine = f"{series['gpu']}, torch {series['torch']}, triton {series['triton']}, {series['code']}, {series['date']}"
    assert machine in " ".join(OF_RESULTS.split())
    assert series["gpu"] in " ".join(README.split())
    assert series["code"] in README
    assert (step["about"]["machine"], step["about"]["date"]) == (series["gpu"], series["date"])
    errors = {r["name"]: r["logp"] for run in series["runs"].values() for r in run if r.get("H") == 4096 and "logp" in r}
    one, two, full = (f"{errors[name]:.1e}" for name in ("fastpg one pass", "fastpg two passes", "full logits"))
    words = " ".join(OF_RESULTS.split())
    assert f"the largest error was {one} in one pass and {two} in two (full logits in bf16: {full})" in words
    assert f"the largest error of a log-probability was {one}; from logits in bf16 it is {full}" in " ".join(README.split())
    refused = next(r for r in step["rows"] if r["name"].startswith("qwen3-8b") and r["method"] == "fastpg one pass")
    assert refused["logp_error"] > 1.2e-5  # what the gate of that commit allowed
    assert refused["logp_error"] <= logprob_tolerance(12.0, torch.bfloat16, refused["hidden"], "cuda")
    third = {(r["section"], r["name"]): r for r in series["runs"]["third"] if r.get("H") == 4096}
    names = {"bare products": "bare products", "as is": "one pass", "fastpg two passes": "two passes"}
    times = {name: (statistics.median(third["proto", n]["ms"]), third["peak", n]["peak"] / 2**30) for n, name in names.items()}
    said = ", ".join(f"{name} {ms:.1f} ({peak:.2f} GiB)" for name, (ms, peak) in times.items())
    assert said in (RESULTS.parents[2] / "kernels" / "README.md").read_text()
    small = {r["name"]: f"{r['x']:.2f}" for r in series["runs"]["third"] if r.get("H") == 576 and r["section"] == "proto"}
    assert f"({small['full logits, compiled']} x against {small['one chunk']} x)" in " ".join(README.split())


def test_the_comparison_of_the_demo_is_that_of_the_results():
    rows = list(csv.DictReader((RESULTS.parent / "demo-compare.csv").read_text().splitlines()))
    page = " ".join((PAGES / "demo.md").read_text().split())
    assert f"right equally often in all {len(rows)} steps" in page
    assert all(row["reward"] == row["reward_full_logits"] for row in rows)
    largest = max(float(row["loss_difference"]) for row in rows)
    assert f"their losses differed by at most {largest:.0e}".replace("e-0", "e-") in page


def test_the_families_are_those_of_the_results():
    found = [row["result"] for row in json.loads((RESULTS.parent / "families.json").read_text())["families"]]
    assert f"[{len(found)} model families](docs/pages/families.md)" in README
    assert f"built small, {found.count('ok')} agree" in " ".join(README.split())


def test_the_promise_is_that_of_the_code():
    formula = f"{UNIT[torch.bfloat16]:g} max({SMALLEST_RANGE}, |z|max)".replace("e-06", "e-6")
    on_gpus = f"{formula} max(1, H / {TENSOR_CORE_TERMS})"
    for document in (PROMISES, (RESULTS.parents[2] / "kernels" / "README.md").read_text(), accuracy.logprob_tolerance.__doc__):
        words = " ".join(document.split())
        assert formula in words.replace(on_gpus, "")  # by itself as well
        assert on_gpus in words
    table = accuracy_table(json.loads(H100_SERIES.read_text()))
    assert f"<!-- accuracy -->\n{table}<!-- /accuracy -->" in OF_RESULTS


def test_the_results_are_whole():
    results = json.loads(RESULTS.read_text())
    since = {"loss alone"} if any("ends_in" in row for row in results["rows"]) else set()  # older results have neither
    assert {row["section"] for row in results["rows"]} == {"step", "H = 2048", "over N", "over V", "samples"} | since
    assert len(results["goals"]) == 21
    assert {"date", "machine", "versions"} <= set(results["about"])
    for name in ("results.csv", "time_over_products.png", "memory_over_vocab.png", "over_tokens.png"):
        assert (RESULTS.parent / name).is_file()
