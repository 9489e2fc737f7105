"""What each method of the bench ends in: no peer in `policy_loss`, which stands beside the plain lines. Nothing is timed."""

import sys
from types import SimpleNamespace

import measure
import peers
import plots
import pytest
import torch
from cases import LOSSES, Cell, Head, batch
from endings import plain_cispo_loss
from operations import counted
from readme_tables import loss_table, step_table

import fastpg
from fastpg.loss import policy_loss as loss

TINY = Cell("step", "tiny", Head(300, 32), 64, "float32", ())


@pytest.mark.parametrize("name", LOSSES)
def test_a_wrong_loss_gets_no_number(monkeypatch, name):
    method = peers.METHODS[name]

    def step(b):
        method.step(b)
        b.logprobs.grad *= 1.00001

    monkeypatch.setitem(peers.METHODS, "wrong", method._replace(step=step))
    rows = measure.measure(batch(TINY), ("wrong", name), 1, "cpu", 10)
    assert rows[1]["why_not"].startswith("wrong: the gradient of the log-probabilities is off by 1.0e-05")
    assert "seconds" not in rows[1]
    assert rows[2]["dlogp_error"] < 2e-7
    assert rows[2]["gradient_bytes"] == 4 * TINY.rows  # of the log-probabilities, and not of hidden states and weights
    assert rows[2]["seconds"] > 0


def of_full_logits(hidden, weight, tokens):
    return torch.log_softmax(hidden @ weight.T, -1).gather(1, tokens[:, None])[:, 0]


@pytest.fixture
def stand_ins(monkeypatch):
    """In the place of the peers that need a GPU or a compiler: what they return, from full logits."""
    cce = SimpleNamespace(linear_cross_entropy=lambda hidden, weight, tokens, **more: -of_full_logits(hidden, weight, tokens))
    verl = SimpleNamespace(
        linear_cross_entropy=lambda hidden, weight, tokens, *more: (of_full_logits(hidden, weight, tokens), 0)
    )
    monkeypatch.setattr(peers, "_compiled", lambda: peers._logprobs_of_full_logits)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", cce)
    monkeypatch.setitem(sys.modules, "verl.utils.kernel.linear_cross_entropy", verl)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", peers.METHODS)
@pytest.mark.parametrize("ending", [peers.POLICY_LOSS, peers.PLAIN])
def test_a_method_ends_in_what_it_says_and_no_peer_in_policy_loss(monkeypatch, name, ending):
    """Without an ending, those that say that they end in it fail, and all others run."""
    method, b = peers.METHODS[name], batch(TINY)
    assert method.is_ours or method.ends_in != peers.POLICY_LOSS
    if name not in ("CCE", "verl") and method.why_not(b):
        pytest.skip(method.why_not(b))

    def gone(*args, **options):
        raise InterruptedError(ending)

    if ending == peers.POLICY_LOSS:
        monkeypatch.setattr(fastpg, "policy_loss", gone)
        monkeypatch.setattr(loss, "policy_loss", gone)
    else:
        monkeypatch.setattr(peers, "plain_cispo_loss", gone)
    b = method.variant(b).leaves()
    if method.ends_in == ending:
        with pytest.raises(InterruptedError):
            method.step(b)
    else:
        method.step(b)
        assert (b.logprobs if method.is_loss_alone else b.hidden).grad.isfinite().all()


@pytest.mark.parametrize("kept", [0, 5, 8])
def test_the_plain_lines_are_the_loss_of_policy_loss(kept):
    """Ratios above the bound, and masked tokens, among them."""
    old, advantages, mask = -torch.rand(8), torch.randn(8), torch.arange(8) < kept
    mine, theirs = (torch.linspace(-3, 3, 8).requires_grad_() for _ in range(2))
    loss = plain_cispo_loss(mine, old, advantages, mask)
    want = fastpg.policy_loss(theirs, old, advantages, objective=fastpg.CISPO(), mask=mask).loss
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_operations_of_the_plain_lines():
    """Forward and backward: what a trainer's own lines take, and none for which the host waits. Every peer pays for them."""
    torch.use_deterministic_algorithms(False)  # which fills what is allocated
    b = batch(TINY).leaves()
    with counted() as step:
        peers.METHODS["plain lines alone"].step(b)
    assert 16 <= step.total <= 17, dict(step.counts)
    assert not {"_local_scalar_dense", "nonzero", "index"} & set(step.counts)


def test_tables_and_plots_say_what_a_row_ends_in():
    def row(method, **changes):
        cell = {"section": "step", "dtype": "float32", "method": method}
        errors = {"logp_error": None if method == "Liger" else 1e-6, "dx_error": 1e-6}
        measured = {"seconds": 2e-4, "over_products": 1.5, "peak_bytes": 5, "gradient_bytes": 5}
        return cell | errors | measured | changes

    methods = {"full logits": "plain lines", "Liger": "its own loss", "fastpg one pass": "its own loss"}
    methods["fastpg two passes"] = "policy_loss"
    rows = [row(method, ends_in=ends_in) for method, ends_in in methods.items()]
    labels = ["full logits + plain lines", "Liger", "fastpg one pass", "fastpg two passes + policy_loss"]
    assert [plots._label(r) for r in rows] == labels
    said = [line.split(" | ")[1] for line in step_table({"rows": rows}).splitlines()[2:]]
    assert said == ["plain lines", "its own loss", "its own loss", "`policy_loss`"]
    older = [row(method) for method in methods]
    said = [line.split(" | ")[1] for line in step_table({"rows": older}).splitlines()[2:]]
    assert said == ["`policy_loss`", "its own loss", "its own loss", "`policy_loss`"]
    assert [plots._label(r) for r in older] == list(methods)
    assert "older than this cell" in loss_table({"rows": rows})
    losses = [row(m, section="loss alone", seconds=s, over_products=2e-4) for m, s in zip(LOSSES, (3e-4, 2e-4), strict=True)]
    assert loss_table({"rows": rows + losses}).splitlines()[2:] == [
        "| plain lines | 200 | 1.00 x | 2.0e-04 x |",
        "| **`policy_loss`** | 300 | 1.50 x | 2.0e-04 x |",
    ]
