"""What each method of the bench ends in: no peer in `policy_loss`, which stands beside the plain lines. Nothing is timed."""

import sys
from types import SimpleNamespace

import measure
import peers
import pytest
import torch
from cases import LOSSES, Cell, Head, batch
from endings import plain_cispo_loss
from operations import counted

import fastpg

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
        monkeypatch.setattr(fastpg.losses, "policy_loss", gone)
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
