"""The dialect table of rollout-corrections.md, row by row: the call written there against the formula in `rollout_dialects`."""

import re
from contextlib import suppress
from functools import partial
from math import exp
from types import SimpleNamespace

import pytest
import torch
from pages import PAGES
from rollout_dialects import F64, OPTIONS, THEIRS, batch, lengths

import fastpg
from fastpg import rollout

PAGE = (PAGES / "rollout-corrections.md").read_text()
CALLS = dict(re.findall(r"^\| ([\w-]+) \| .* \| `([^`]+)` \|$", PAGE.partition("| id | setting | CALL |")[2], re.MULTILINE))
FUNCTIONS = ["icepop", "masked_weights", "mismatch_metrics", "token_veto", "truncated_weights", "within_band"]


def ours(call, x):
    """The call of the page, in which ... stands for the three tensors."""
    names = {name: getattr(fastpg, name) for name in fastpg.__all__} | {name: getattr(rollout, name) for name in FUNCTIONS}
    names |= {"torch": torch, "exp": exp, "partial": partial} | vars(x)
    given = {"old_logprobs": x.old, "objective": fastpg.PPOClip(x.eps, x.eps), "mask": x.mask}
    given |= eval(f"dict({call.replace('(...', '(old, rollout, mask')})", names)
    return fastpg.policy_loss(x.logprobs, advantages=x.advantages, **given).loss


@pytest.mark.parametrize("name", THEIRS)
def test_loss_and_gradient_of_the_dialect(name):
    x = batch(name)
    loss, wanted = ours(CALLS[name], x), THEIRS[name](x)
    (gradient,), (wanted_gradient,) = (torch.autograd.grad(value, x.logprobs) for value in (loss, wanted))
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-10, atol=1e-17)
    assert (gradient[x.mask] != 0).any()


# rows whose weights are one function of (old, rollout, mask), and nothing more
ONE_FUNCTION = {name: call for name, call in CALLS.items() if re.search(r"rollout_weights=\w+\(\.\.\.,[^()]*\)(,|$)", call)}


@pytest.mark.parametrize("name", ONE_FUNCTION)
def test_rows_of_one_function_are_decoupled_losses_with_it(name):
    """As the page says of them."""
    assert len(ONE_FUNCTION) > 20
    x, made_of = batch(name), r"rollout_logprobs=rollout, rollout_correction=partial(\1\2)"
    call = re.sub(r"rollout_weights=(\w+)\(\.\.\.(,[^()]*)\)", made_of, CALLS[name])
    assert "rollout_weights" not in call
    assert torch.equal(ours(call, x), ours(CALLS[name], x))


@pytest.mark.parametrize("name", THEIRS)
def test_the_batch_takes_the_correction_apart(name):
    """Without weights, or without the mask, it is another loss: no row passes for nothing."""
    x = batch(name)
    wanted = THEIRS[name](x)
    of_correction = r"(rollout_weights|rollout_logprobs|rollout_correction|mask)=.*?"
    call = re.sub(of_correction + r"(?=, (?:reduction|kl|mask|rollout_correction)=|$)", "", CALLS[name])
    call = re.sub(r"(?:, )+", ", ", call.strip(", "))
    assert "within" not in call
    assert "weights" not in call
    assert abs(ours(call, x) - wanted) > 1e-3 * abs(wanted)


@pytest.mark.parametrize("name", THEIRS)
def test_every_option_of_a_call_matters(name):
    x = batch(name)
    loss, call = ours(CALLS[name], x), CALLS[name]
    options = [option for option in OPTIONS[name.split("-")[0]] if re.search(rf"\b{option}\b(?!=)", call)]
    assert options or "high" in call
    for option in options:
        losses = []
        for factor in (0.2, 0.8, 1.25, 5):
            with suppress(ValueError):  # the band is upside down
                losses.append(ours(call, SimpleNamespace(**vars(x) | {option: getattr(x, option) * factor})))
        assert any(changed != loss for changed in losses), option


def test_the_mask_of_the_installed_trl():
    """Its own function, beside the formula above."""
    trainer = pytest.importorskip("trl").GRPOTrainer
    x = batch("trl")
    theirs = trainer.get_off_policy_mask(x.A, x.logprobs, x.rollout, x.mask.double(), x.off_policy_mask_threshold)
    low = exp(-x.off_policy_mask_threshold)
    keep = torch.where(x.A >= 0, True, rollout.within_band(x.logprobs, x.rollout, x.mask, low=low, level="geometric"))
    assert torch.equal((theirs * x.mask).bool(), keep & x.mask)
    assert 0 < theirs.sum() < 8


def test_the_batch_leaves_every_bound_on_both_sides():
    x = batch("verl")
    d = x.old - x.rollout
    total = (d * x.mask).sum(-1, keepdim=True)
    rows = x.mask.any(-1)
    for values in (d.exp()[x.mask], total.exp()[rows], (total / lengths(x)).exp()[rows]):
        assert (values < 0.6).any()
        assert (values > 1.4).any()
        assert ((values > 0.75) & (values < 1.3)).any()
    assert (d[x.mask].exp() < 0.02).sum() == 1


def test_every_row_and_every_function_is_on_the_page():
    assert list(CALLS) == list(THEIRS)
    for name in FUNCTIONS:
        assert re.search(rf"^\| `{name}\b", PAGE, re.MULTILINE)
    found = rollout.mismatch_metrics(torch.zeros(1, 2, dtype=F64), torch.zeros(1, 2), low=1)
    for name in found:
        assert f"`{name}`" in PAGE
    for choice in (*rollout.Level.__args__, *rollout.Measure.__args__):
        assert choice == "ratio" or f'"{choice}"' in PAGE
