"""`docs/pages/families.md`, from `bench/results/families.json`; a test compares them."""

from __future__ import annotations

from typing import Any

ORDER = ("ok", "refused", "no causal language model", "not built", "wrong")

_HEAD = """# Model families

fastpg computes log-probabilities without the logits. For that it has to know what a model does with the output of its last
layer: some models scale it, cap it, or leave out part of it. This page says for which models of transformers it was compared
with the model's own logits, and what was found.

{count} of {total} model families agree with their own logits. {refusals}

| result | families | meaning |
|---|---:|---|
{counts}

The comparison ran on {date}, on a CPU in float32, with transformers {transformers}, torch {torch} and Python {python}. It took
{minutes} minutes in {jobs} processes. To run it again, or for one family alone:

    python tests/families
    python tests/families qwen3 Gemma3ForConditionalGeneration

## What was compared

A family is a class that transformers lists for `AutoModelForCausalLM` or `AutoModelForImageTextToText`. Its configuration was
shrunk to a few layers, a width of 32 and a vocabulary of 64, and its weights are random. What is particular about the head was
kept: its bias, its cap, its scale, and whether it is tied to the embeddings. A cap or scale that the configuration leaves out
was also set, in a second model.

The reference is the model's own forward with full logits, under autograd. Compared were:

- the log-probabilities of `token_logprobs`, and the gradients of a random function of them in all parameters of the model;
- without padding, with padding on the left at temperature 0.7, and on the right with a temperature for each token;
- the loss and the gradients of `causal_lm_policy_loss`;
- the router's load-balancing loss, where the model has one: its value and its gradients;
- once more with images, for models that take `pixel_values`: without padding, with padding on the left, and the policy loss.

A tiny model shows that the mathematics of the head and the arguments of the forward are right. It does not show that a
checkpoint of billions of parameters fits into memory, or that its 16-bit numbers are precise enough.

## What to do with a refused family

fastpg refuses a model rather than train on other logits than the model's. The table has the words of the error. These ways
remain, and the error says which of them fit:

- Set the named value of the configuration to neutral, if the logits of the wrapping model are the ones that are wanted
  (`model.config.get_text_config().logit_scale = 1.0`).
- Call the inner model, and give its last hidden states to `linear_logprobs` or `linear_policy_loss`, with
  `LMHead.from_model(model)` or `LMHead(weight, bias, softcap, logit_scale)`. It is right where the logits are
  `softcap(logit_scale * (hidden @ weight.T + bias))`.
- For a head that leaves out the last rows of its weight (`unpadded_vocab_size`), call the inner model in the same way, with
  `LMHead(weight[:unpadded_vocab_size])`.
- For an encoder-decoder, give its decoder's last hidden states to `linear_logprobs` or `linear_policy_loss`, with
  `LMHead.from_model(model)` where its head is plain.
- Compute the logits in full, and give them to `selective_logprobs`, then to `policy_loss`.

## The families

In the column "compared", "router" is the load-balancing loss. The column "head" says what is particular about the head; "tied"
means that its weight is that of the embeddings. Under "images", "no" means that they were not compared.

| model_type | class | result | compared | images | head | remark |
|---|---|---|---|---|---|---|
"""


def page(results: dict[str, Any]) -> str:
    rows = results["families"]
    counts = {name: sum(row["result"] == name for row in rows) for name in ORDER}
    table = "\n".join(f"| {name} | {counts[name]} | {_MEANING[name]} |" for name in ORDER if counts[name])
    head = _HEAD.format(
        count=counts["ok"], total=len(rows), refusals=_refusals(counts), counts=table, date=results["date"],
        python=results["python"], minutes=results["minutes"], jobs=results["jobs"], **results["versions"],
    )  # fmt: skip
    ordered = sorted(rows, key=lambda row: (row["model_type"], row["class"]))
    return head + "\n".join(map(_line, ordered)) + "\n"


_MEANING = {
    "ok": "the same log-probabilities, losses and gradients, up to rounding",
    "refused": "fastpg raises an error that says why",
    "no causal language model": "its logits are not those of the next token given the tokens before it",
    "not built": "no tiny model of it could be made",
    "wrong": "fastpg and the model's own logits disagree: a defect",
}


def _refusals(counts: dict[str, int]) -> str:
    wrong = f" {counts['wrong']} are wrong." if counts["wrong"] else " None is wrong."
    return f"{counts['refused']} are refused with a reason.{wrong}"


def _line(row: dict[str, Any]) -> str:
    checks = row.get("checks", [])
    compared = ", ".join(
        word for word, check in (("text", "text"), ("padding", "left padding"), ("router", "router loss")) if check in checks
    )
    images = "yes" if "images" in checks else "no" if row.get("takes_images") else "takes none"
    head = ", ".join(row.get("head", []))
    cells = (f"`{row['model_type']}`", f"`{row['class']}`", row["result"], compared, images, head, _remark(row))
    return f"| {' | '.join(cells)} |"


def _remark(row: dict[str, Any]) -> str:
    """A table's cell: no bars, no lines."""
    words = [row["reason"]] if row.get("reason") else []
    words += [row["remark"]] if "remark" in row else []
    other = row.get("with")
    if other:
        words.append(f"{other['settings']}: {other['result']}" + (f", {other['reason']}" if other["reason"] else ""))
    for name in ("text", "images"):
        if f"no {name}" in row:
            words.append(f"no {name}: {row[f'no {name}']}")
    text = "; ".join(words).replace("|", "/")
    return text if len(text) <= 700 else text[:697] + "..."
