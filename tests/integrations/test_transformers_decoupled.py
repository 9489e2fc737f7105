"""`causal_lm_policy_loss` with `rollout_logprobs`: every number stands at its token, and the weights come before the model."""

from functools import partial

import pytest
import torch
import transformers

import fastpg
from fastpg import CISPO, PPOClip, rollout
from fastpg.integrations.transformers import causal_lm_policy_loss, token_logprobs

F64 = torch.float64
SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
CORRECTIONS = {
    "plain": None,
    "masked": partial(rollout.masked_weights, low=0.7, high=1.5, unscored="zero"),
    "sequence": partial(rollout.truncated_weights, high=3.0, level="sequence", unscored="zero"),
}
corrections = pytest.mark.parametrize("correction", CORRECTIONS.values(), ids=CORRECTIONS)


def build():
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES), dtype=F64).eval()


def batch(model):
    """Three rows of 9 tokens, the second padded; old and rollout log-probabilities, NaN where nothing is predicted."""
    ids, mask = torch.randint(3, 61, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    given = {"completion_mask": torch.rand(3, 9) > 0.3, "attention_mask": mask}
    with torch.no_grad():
        ready = token_logprobs(model, ids, **given)
    old = ready.logprobs + 0.3 * torch.randn(3, 9, dtype=F64)
    behaviour = old + 0.4 * torch.randn(3, 9, dtype=F64)
    old, behaviour = (torch.where(ready.mask, x, torch.nan) for x in (old, behaviour))
    return ids, given, old, behaviour, ready.mask


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@corrections
@pytest.mark.parametrize("check", [True, False])
def test_equals_policy_loss_of_ready_log_probabilities(correction, check):
    model = build()
    ids, given, old, behaviour, mask = batch(model)
    advantages = torch.randn(3, dtype=F64)
    options = {"objective": PPOClip(), "rollout_logprobs": behaviour, "rollout_correction": correction}
    got = causal_lm_policy_loss(model, ids, old_logprobs=old, advantages=advantages, check=check, **given, **options)
    ready = token_logprobs(model, ids, **given)
    want = fastpg.policy_loss(ready.logprobs, old, advantages, mask=mask, **options)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(model, got.loss), gradient(model, want.loss), rtol=1e-8, atol=1e-11)
    for name in rollout.mismatch_metrics(old, behaviour, mask):
        assert torch.equal(got.metrics[name], want.metrics[name]), name
    if check:
        skipped = 0 if correction is not CORRECTIONS["masked"] else (correction(old, behaviour, mask) == 0)[mask].sum()
        assert got.metrics["skipped_tokens"] == skipped


@corrections
def test_packed_rows_are_the_rows(correction):
    model = build()
    ids, given, old, behaviour, mask = batch(model)
    given["attention_mask"][:] = 1
    with torch.no_grad():
        mask = token_logprobs(model, ids, **given).mask
    old, behaviour = (torch.where(mask, torch.nan_to_num(x, -2.0), torch.nan) for x in (old, behaviour))
    options = {"objective": CISPO(), "rollout_correction": correction, "reduction": "seq-mean-token-mean"}
    advantages = torch.randn(3, dtype=F64)
    want = causal_lm_policy_loss(
        model, ids, given["attention_mask"], old, advantages, completion_mask=given["completion_mask"],
        rollout_logprobs=behaviour, **options,
    )  # fmt: skip
    sequences, positions = torch.arange(3).repeat_interleave(9)[None], torch.arange(9).repeat(3)[None]
    flat = [x.reshape(1, 27) for x in (ids, old, given["completion_mask"], behaviour)]
    got = causal_lm_policy_loss(
        model, flat[0], None, flat[1], advantages, completion_mask=flat[2], rollout_logprobs=flat[3],
        sequence_ids=sequences, position_ids=positions, **options,
    )  # fmt: skip
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-10, atol=1e-12)
    assert got.metrics.to_dict() == pytest.approx(want.metrics.to_dict())


def test_the_correction_sees_the_callers_layout_before_the_model_runs():
    """So what it closes over may have the shape of input_ids."""
    model = build()
    ids, given, old, behaviour, mask = batch(model)
    seen = []

    def noted(*pair, mask, sequence_ids):
        seen.append((*pair, mask, sequence_ids))
        raise RuntimeError("before the model")

    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(RuntimeError, match="before the model"):
        causal_lm_policy_loss(
            model, ids, old_logprobs=old, advantages=torch.ones(3), objective=CISPO(), rollout_logprobs=behaviour,
            rollout_correction=noted, **given,
        )  # fmt: skip
    ((old_seen, behaviour_seen, mask_seen, no_ids),) = seen
    for a, b in ((old_seen, old), (behaviour_seen, behaviour), (mask_seen, mask)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert no_ids is None


def test_a_token_that_was_not_scored():
    model = build()
    ids, given, old, behaviour, mask = batch(model)
    b, t = mask.nonzero()[1].tolist()
    behaviour[b, t] = torch.nan
    call = partial(causal_lm_policy_loss, model, ids, old_logprobs=old, advantages=torch.ones(3), objective=CISPO(), **given)
    with pytest.raises(ValueError, match=rf"got nan at \({b}, {t}\), a token that the engine did not score"):
        call(rollout_logprobs=behaviour)
    out = call(rollout_logprobs=behaviour, rollout_correction=CORRECTIONS["sequence"])
    assert out.metrics["unscored_tokens"] == out.metrics["skipped_tokens"] == 1
    assert out.logprobs[b, t].isnan()  # it cost no work
