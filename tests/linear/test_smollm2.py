"""The accuracy promises on a real language model: hidden states of completions that SmolLM2-135M-Instruct sampled."""

import dataclasses

import pytest
import torch
from problems import Result, check_result, oracle
from schedules import TORCH_SCHEDULES

from fastpg import CISPO, LMHead, reference
from fastpg.crosscheck.cases import Inputs

pytestmark = pytest.mark.xdist_group("smollm2")

PROMPTS = ["What is 17 + 25?", "Write a short poem about the sea."]


def test_the_model_can_count(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("One, two, three, four,", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " five"
    assert model.get_output_embeddings().weight.shape == (49152, 576)


@pytest.fixture(scope="module")
def completions(smollm2):
    """(hidden (N, H), head, tokens (N,)) of about 50 sampled tokens, fp32, from certain to surprising."""
    model, tokenizer = smollm2
    torch.manual_seed(0)
    hidden, tokens = [], []
    for prompt in PROMPTS:
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            sampled = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=True, top_k=0, top_p=1.0
            )
            states = model.model(sampled).last_hidden_state
        hidden.append(states[0, ids.shape[1] - 1 : -1])
        tokens.append(sampled[0, ids.shape[1] :])
    return torch.cat(hidden), LMHead.from_model(model), torch.cat(tokens)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def problem(request, completions) -> tuple[Inputs, Result]:
    """And the oracle's result, whose logits take seconds."""
    hidden, head, tokens = completions
    head = dataclasses.replace(head, weight=head.weight.detach().to(request.param))
    hidden = hidden.to(request.param)
    with torch.no_grad():
        logprobs, _ = reference.linear_logprobs(hidden.double(), dataclasses.replace(head, weight=head.weight.double()), tokens)
    torch.manual_seed(1)
    log_ratio = torch.randn(len(tokens)).clamp(-3, 3)
    inputs = Inputs(hidden, head, tokens, (logprobs - log_ratio).float(), torch.randn(len(tokens)))
    return inputs, oracle(inputs, CISPO())


@TORCH_SCHEDULES
def test_loss_and_gradients_on_sampled_completions(schedule, problem):
    problem, want = problem
    assert (want["logp"] > -1e-2).any()  # the model is sure of some tokens
    assert (want["logp"] < -3).any()  # and surprised by others
    check_result(problem, schedule(problem, CISPO()), want)
