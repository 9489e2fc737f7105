"""`fastpg demo --mismatch`: engines are what they say, and return the log-probabilities of their tokens. Of a seed's two runs
one is corrected."""

import csv
import math
import re
from random import Random

import pytest
import torch
from pages import PAGES

from fastpg.__main__ import main
from fastpg.demo import engines, mismatch
from fastpg.demo import train as demo
from fastpg.demo.tasks import ALPHABET, larger_digit, tiny_model

pytestmark = pytest.mark.xdist_group("demo")


def model_of(seed: int = 0):
    torch.manual_seed(seed)
    return tiny_model()


def rollouts_of(engine, seed: int = 0):
    return demo.sample(engine, larger_digit(), Random(seed), torch.Generator().manual_seed(seed))


def trained(engine, model, steps: int = 2, objective: str = "cispo"):
    return demo.train(model, larger_digit(), steps, objective=objective, engine=engine).history


def test_the_stale_engine_is_so_many_batches_behind(monkeypatch):
    monkeypatch.setattr(engines.Stale, "batches", 2)
    model = model_of()
    engine, seen = engines.Stale(model, corrected=False), []
    for batch in range(5):
        with torch.no_grad():
            model.get_output_embeddings().weight.fill_(batch)
        engine.read_weights(model)
        seen.append(engine.get_output_embeddings().weight.unique().tolist())
    assert seen == [[0], [0], [0], [1], [2]]


def test_the_broken_engine_draws_any_token_with_its_share():
    model = model_of()
    head, hidden = model.get_output_embeddings(), 8 * torch.randn(5, 64)
    probabilities = engines.Broken(model, corrected=False).get_output_embeddings()(hidden).softmax(-1)
    torch.testing.assert_close(probabilities, 0.7 * head(hidden).softmax(-1) + 0.3 / len(ALPHABET))


def test_the_rounded_engine_has_15_values_a_matrix():
    model = model_of()
    engine = engines.Rounded(model, corrected=False)
    engine.read_weights(model)
    for rounded, weight in zip(engine._copy.parameters(), model.parameters(), strict=True):
        step = weight.abs().max() / 7
        if weight.dim() > 1:
            assert 7 <= len(rounded.unique()) <= 15
            assert 0 < (rounded - weight).abs().max() <= 0.5001 * step
        else:
            assert torch.equal(rounded, weight)


@pytest.mark.parametrize("kind", engines.ENGINES)
def test_an_engine_returns_the_log_probabilities_of_its_tokens(kind):
    """By a whole forward of the engine's own weights over prompts and tokens."""
    model = model_of()
    engine = engines.ENGINES[kind](model, corrected=True)
    engine.read_weights(model)
    with torch.no_grad():  # the model has gone on since
        for weight in model.parameters():
            weight.mul_(1.5)
    rollouts = rollouts_of(engine)
    whole = torch.cat([rollouts.prompts.repeat_interleave(16, 0), rollouts.tokens], 1)
    with torch.no_grad():
        probabilities = engine._copy(whole).logits[:, rollouts.prompts.shape[1] - 1 : -1].softmax(-1)
    if kind == "broken":
        probabilities = 0.7 * probabilities + 0.3 / len(ALPHABET)
    wanted = probabilities.log().gather(-1, rollouts.tokens[..., None])[..., 0]
    torch.testing.assert_close(engine.logprobs(rollouts)[rollouts.mask], wanted[rollouts.mask], rtol=0, atol=1e-5)


def test_the_engine_samples(monkeypatch):
    """Where all of its tokens are broken, a model that says one token alone is not heard."""
    monkeypatch.setattr(engines.Broken, "share", 1.0)
    model = model_of()
    with torch.no_grad():
        model.model.norm.weight.zero_()  # equal logits
        model.get_output_embeddings().weight.zero_()
    tokens = rollouts_of(engines.Broken(model, corrected=False)).tokens
    assert set(tokens.flatten().tolist()) == set(range(len(ALPHABET)))
    history = trained(engines.Broken(model_of(), corrected=False), model_of(), 1)
    tokens_of_uniform = sum((15 / 16) ** t for t in range(4))  # the full stop ends an answer
    assert history[0]["tokens"] == pytest.approx(tokens_of_uniform, abs=0.15)


@pytest.mark.parametrize(("kind", "objective"), [("broken", "cispo"), ("broken", "gspo"), ("rounded", "cispo")])
@pytest.mark.parametrize("corrected", [False, True])
def test_weights_are_those_of_the_trainer_over_the_engine(corrected, kind, objective, monkeypatch):
    """Old log-probabilities are the trainer's in both runs; one of them has min(p / q, 2) as rollout weights."""
    monkeypatch.setattr(engines.Broken, "share", 0.7)  # ratios of up to 1 / 0.3
    monkeypatch.setattr(engines.Rounded, "largest", 2)
    model, seen, original = model_of(), [], demo.loss_of
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)  # a policy that is sure of some tokens
    engine = engines.ENGINES[kind](model, corrected)
    sample = demo.sample

    def sampled(*arguments):
        rollouts = sample(*arguments)
        with torch.no_grad():
            logits = model(torch.cat([rollouts.prompts.repeat_interleave(16, 0), rollouts.tokens], 1)).logits
        p = logits[:, rollouts.prompts.shape[1] - 1 : -1].softmax(-1).gather(-1, rollouts.tokens[..., None])[..., 0]
        seen.append((p, engine.logprobs(rollouts).exp(), rollouts))
        return rollouts

    def loss_of(*arguments, **options):
        seen.append((arguments[4], options["rollout_weights"]))
        return original(*arguments, **options)

    monkeypatch.setattr(demo, "sample", sampled)
    monkeypatch.setattr(demo, "loss_of", loss_of)
    (numbers,) = trained(engine, model, 1, objective)
    p, q, rollouts = seen[0]
    kept, ratio = rollouts.mask, p / q
    parts = demo.parts_of_groups(rollouts.episodes, 16)
    for (old, weights), rows in zip(seen[1:], parts, strict=True):
        torch.testing.assert_close(old[kept[rows]], p[rows][kept[rows]].log(), rtol=0, atol=1e-5)
        if corrected:
            torch.testing.assert_close(weights[kept[rows]], ratio[rows][kept[rows]].clamp(max=2), rtol=1e-4, atol=1e-5)
        else:
            assert weights is None
    rho = ratio[kept]
    assert numbers["mismatch_kl_k3"] == pytest.approx(float((rho - 1 - rho.log()).mean()), rel=1e-3)
    assert numbers["mismatch_ess"] == pytest.approx(float(rho.sum() ** 2 / (len(rho) * rho.square().sum())), rel=1e-4)
    assert numbers["mismatch_ess"] < 0.98
    assert (rho > 2).any()


def test_a_correction_for_an_engine_without_a_mismatch_changes_nothing():
    histories = [trained(engines.Engine(model := model_of(), corrected), model) for corrected in (False, True)]
    histories.append(trained(None, model_of()))
    for history in histories[:2]:
        assert all(row.pop("mismatch_kl_k3") < 1e-6 and row.pop("mismatch_ess") > 1 - 1e-6 for row in history)
        for row, wanted in zip(history, histories[2], strict=True):
            assert row == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", engines.ENGINES)
def test_a_pair_of_runs(kind):
    """Both start from the same model and samples; they part at once where the engine is another policy."""
    steps = 3 if kind == "stale" else 2  # its first two batches are of the same weights in both runs
    plain, corrected = mismatch.run_pair(kind, 1, steps, "cispo", "group", "cpu")
    assert (plain.seed, plain.corrected, corrected.seed, corrected.corrected) == (1, False, 1, True)
    assert all(math.isfinite(x) for run in (plain, corrected) for x in run)
    assert 0 < plain.kl != corrected.kl > 0
    assert plain.ess < 1
    assert list(mismatch.run_pair(kind, 1, steps, "cispo", "group", "cpu")) == [plain, corrected]


def test_the_command(tmp_path, capsys):
    arguments = ["--model", "tiny", "--device", "cpu", "--steps", "2", "--seeds", "2", "--seed", "5", "--out", str(tmp_path)]
    main(["demo", *arguments, "--mismatch"])
    printed = capsys.readouterr().out
    for words in ("--mismatch stale", "uncorrected", "corrected", "trained policy itself", "mismatch KL", "mismatch ESS", "±"):
        assert words in printed
    assert "truncated_weights(high=2.0)" in printed
    with (tmp_path / "mismatch.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["corrected"]) for row in rows] == [(s, c) for s in "56" for c in ("False", "True")]
    main(["demo", *arguments, "--steps", "1", "--seeds", "1", "--mismatch=broken"])
    assert "--mismatch broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--mismatch"], "--mismatch trains the tiny model; got --model smollm2, add --model tiny"),
        (["--model", "walk", "--mismatch"], "got --model walk, add --model tiny"),
        (["--model", "tiny", "--top-p", "0.9", "--mismatch"], "samples from all tokens; got --top-p 0.9, leave it out"),
        (["--model", "tiny", "--seeds", "2"], "--seeds is of --mismatch; add it, or choose one seed by --seed"),
    ],
)
def test_options_that_do_not_fit(given, words):
    with pytest.raises(SystemExit, match=words):
        main(["demo", *given])


def test_an_unknown_engine(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--model", "tiny", "--mismatch", "slow"])
    assert "--mismatch: invalid choice: 'slow'" in capsys.readouterr().err


def test_the_guide_has_a_measured_row_for_every_engine():
    guide = (PAGES / "guides.md").read_text()
    table = re.search(r"<!-- mismatch -->\n(.*?)<!-- /mismatch -->", guide, re.DOTALL)[1]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(engines.ENGINES)
