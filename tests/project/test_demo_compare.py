"""`fastpg demo --compare`: the copy learns by full logits alone, and ends where fastpg does; a wrong loss is seen."""

import csv

import pytest
import torch

from fastpg.__main__ import main
from fastpg.demo import compare, tasks, walk
from fastpg.demo import train as demo
from fastpg.lm_head import LMHead

pytestmark = pytest.mark.xdist_group("demo")


def trained(steps: int, task=None, **options):
    """(the history, the model, its weights at the start)"""
    torch.manual_seed(0)
    model = tasks.tiny_model()
    start = [weight.detach().clone() for weight in model.parameters()]
    return demo.train(model, task or tasks.larger_digit(), steps, **options).history, model, start


@pytest.fixture
def copies(monkeypatch) -> list[compare.FullLogits]:
    """Those that trainings make."""
    made = []
    monkeypatch.setattr(demo, "FullLogits", lambda *given: made.append(compare.FullLogits(*given)) or made[-1])
    return made


@pytest.mark.parametrize(
    ("task", "objective", "top_p"),
    [
        (tasks.larger_digit(), "cispo", 1.0),
        (tasks.larger_digit(), "gspo", 0.8),
        (walk.Walk(prompts_per_step=2), "ppo", 0.8),
        (walk.Walk(prompts_per_step=2), "icepop", 1.0),
    ],
    ids=["digit-cispo", "digit-gspo-top-p", "walk-ppo-top-p", "walk-icepop"],
)
def test_the_copy_learns_what_fastpg_learns(task, objective, top_p, copies):
    history, model, start = trained(4, task, objective=objective, top_p=top_p, compare=True)
    for row in history:
        assert row["loss_difference"] < 1e-6
        assert row["loss_full_logits"] == pytest.approx(row["loss"], abs=1e-5)
        assert row["reward_full_logits"] == row["reward"]
    (copy,) = copies
    assert copy.model is not model
    for own, other, before in zip(model.parameters(), copy.model.parameters(), start, strict=True):
        torch.testing.assert_close(other, own, rtol=0, atol=2e-4)
        assert (own - before).abs().max() > 1e-3


def test_a_comparison_does_not_change_the_training():
    plain, compared = trained(3)[0], trained(3, compare=True)[0]
    assert [{name: row[name] for name in plain[0]} for row in compared] == plain


def test_a_wrong_loss_is_seen(monkeypatch):
    original = demo.loss_of

    def wrong(*arguments, **options):
        out = original(*arguments, **options)
        return out._replace(loss=1.01 * out.loss)

    monkeypatch.setattr(demo, "loss_of", wrong)
    history = trained(2, compare=True)[0]
    assert max(row["loss_difference"] for row in history) > 1e-4


def test_a_wrong_gradient_is_seen(monkeypatch):
    """The loss of a step is right, and so are those of its weights; but the copy goes another way."""
    original = demo.loss_of

    def wrong(*arguments, **options):
        out = original(*arguments, **options)
        return out._replace(loss=2 * out.loss.detach() - out.loss)

    monkeypatch.setattr(demo, "loss_of", wrong)
    history = trained(6, compare=True)[0]
    assert max(row["loss_difference"] for row in history) < 1e-6
    assert max(abs(row["loss"] - row["loss_full_logits"]) for row in history) > 1e-3


def test_the_copy_samples_its_own_answers(monkeypatch):
    """A copy that says nothing but the stop token, and does not learn."""
    made, stop = compare.FullLogits, tasks.larger_digit().stop_token

    def silent(model, *given):
        copy = made(model, *given)
        logits = torch.full((len(tasks.ALPHABET),), -torch.inf).index_fill(0, torch.tensor(stop), 0.0)
        copy.model.get_output_embeddings = lambda: lambda hidden: logits.expand(*hidden.shape[:-1], -1)
        return copy

    monkeypatch.setattr(demo, "FullLogits", silent)
    monkeypatch.setattr(compare.FullLogits, "update", lambda self, batch: self._losses.append(0.0))
    for row in trained(2, compare=True)[0]:
        assert row["reward_full_logits"] == 0 < row["reward"]


def test_full_logits_take_memory_that_fastpg_does_not():
    tokens, mask = torch.randint(0, 4096, (64, 8)), torch.ones(64, 8, dtype=torch.bool)
    batch = compare.Batch(tokens, tokens, mask, -torch.ones(64, 8), torch.ones(64))
    memory = compare.loss_memory(torch.randn(64, 8, 16), LMHead(torch.randn(4096, 16, requires_grad=True)), batch)
    assert (memory.tokens, memory.vocab) == (2048, 4096)
    assert memory.full_logits > 2 * 4 * memory.tokens * memory.vocab
    assert memory.fastpg < memory.full_logits / 2


def test_the_command(tmp_path, capsys):
    main(["demo", "--model", "tiny", "--device", "cpu", "--steps", "3", "--compare", "--out", str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("loss by fastpg", "by full logits", "the same batch differ by at most", "full logits: update"):
        assert words in printed
    with (tmp_path / "history.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert f"{float(row['loss']):+.6f}" in printed
            assert float(row["loss_full_logits"]) == pytest.approx(float(row["loss"]), abs=1e-5)


def test_two_comparisons_at_once_are_refused():
    with pytest.raises(SystemExit, match="--compare and --mismatch are two comparisons; leave one of them out"):
        main(["demo", "--model", "tiny", "--compare", "--mismatch"])
