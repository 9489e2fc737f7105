"""One family: log-probabilities, losses and gradients of its tiny model, by fastpg and by autograd through its full logits."""

from __future__ import annotations

import contextlib
import inspect
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pictures import image_inputs, of_tokens, padded_on_the_left, takes_images
from special_cases import WITHOUT_TIMM
from tiny_models import END_OF_WORDS, FIRST_WORD, NotBuiltError, NotCausalError, active_settings, tiny_model, with_all_active

import fastpg
from fastpg import CISPO
from fastpg.integrations.transformers import causal_lm_policy_loss, token_logprobs

# Largest differences that rounding in float32 may make. Both sides run the same model; only what follows its states differs.
VALUES, GRADIENTS = 2e-6, 1e-4  # of log-probabilities, over the largest |logit| or 10; of a gradient, over its largest entry
BANNED = 1e6  # a logit of this size is no result of a product
SMALLEST_GRADIENT = 1e-3  # gradients below this share of the model's largest are compared as if they were this large
ROWS, LENGTH = 4, 9  # 4 rows, as MusicGen takes one row for each of 4 codebooks


class WrongError(Exception):
    """fastpg and the model's own logits disagree."""


class RefusedError(Exception):
    """The words of fastpg's refusal."""


def words_of_fastpg(error: Exception) -> bool:
    """Whether an error is fastpg's own, and not one of the model's forward that it ran."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, (ValueError, TypeError)) and Path(fastpg.__file__).parent in Path(frame.filename).parents


def ours(function: Callable, *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options)
    except Exception as error:
        if words_of_fastpg(error):
            raise RefusedError(str(error)) from error
        raise WrongError(f"{type(error).__name__}: {error}") from error


def own_inputs(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, more: dict[str, Any]) -> dict[str, Any]:
    """What `generate` gives to the model's forward for these tokens, without a cache."""
    names = inspect.signature(model.forward).parameters
    inputs = {"input_ids": ids, **more}
    if mask is not None:
        inputs["attention_mask"] = mask
        if "position_ids" in names:
            if hasattr(model, "_prepare_position_ids_for_generation"):
                inputs["position_ids"] = model._prepare_position_ids_for_generation(ids, {**more, "attention_mask": mask})
            else:
                inputs["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    if "use_cache" in names or hasattr(model.config.get_text_config(), "use_cache"):
        inputs["use_cache"] = False
    return inputs


def log_probabilities(logits: torch.Tensor, ids: torch.Tensor, temperature: Any) -> torch.Tensor:
    """(B, T - 1) log-probabilities of ids[:, 1:]."""
    t = temperature[:, 1:, None] if isinstance(temperature, torch.Tensor) else temperature
    return (logits[:, :-1].float() / t).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    if got.keys() != want.keys():
        raise WrongError(f"gradients of other parameters: {sorted(got.keys() ^ want.keys())[:3]}")
    largest = max(float(g.abs().max()) for g in want.values())
    errors = {}
    for name, g in want.items():
        errors[name] = float((got[name] - g).abs().max() / max(float(g.abs().max()), SMALLEST_GRADIENT * largest))
    name = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    if not errors[name] <= GRADIENTS:
        raise WrongError(f"the gradient of {name} differs by {errors[name]:.1e} of its largest entry")
    return errors[name]


class Comparison:
    """Largest errors so far, and the names of what was compared."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.value_error = self.gradient_error = 0.0
        self.done: list[str] = []

    def tokens(self, name: str, ids: torch.Tensor, mask: torch.Tensor | None, temperature: Any, more: dict[str, Any]) -> None:
        """token_logprobs, and the gradient of a random function of them; with the router's loss where `more` asks for it."""
        out = self.model(**own_inputs(self.model, ids, mask, more))
        want, kept = log_probabilities(out.logits, ids, temperature), self._kept(ids, mask)
        got = ours(token_logprobs, self.model, ids, mask, temperature=temperature, **more)
        if not torch.equal(got.mask[:, 1:], kept) or got.mask[:, 0].any():
            raise WrongError("other tokens are kept")
        generator = torch.Generator().manual_seed(3)
        weights = torch.randn(kept.shape, generator=generator)
        sizes = out.logits.detach().abs()
        self._values(got.logprobs[:, 1:], want, kept, float(sizes[sizes < BANNED].max()))
        losses = [(weights * x + x**2 / 10)[kept].sum() for x in (got.logprobs[:, 1:], want)]
        own_aux = getattr(out, "aux_loss", None) if more.get("output_router_logits") else None
        if (got.aux_loss is None) != (own_aux is None):
            raise WrongError(f"aux_loss is {got.aux_loss}, the model's own {own_aux}")
        if own_aux is not None:
            losses = [loss + aux for loss, aux in zip(losses, (got.aux_loss, own_aux), strict=True)]
        self._gradients(name, *losses)

    def policy_loss(self, name: str, ids: torch.Tensor, more: dict[str, Any]) -> None:
        """causal_lm_policy_loss, whose pass over the vocabulary is another one."""
        advantages = torch.tensor([1.0, -0.5, 0.3, 2.0])[: len(ids)]
        want = log_probabilities(self.model(**own_inputs(self.model, ids, None, more)).logits, ids, 1.0)
        out = ours(causal_lm_policy_loss, self.model, ids, None, None, advantages, objective=CISPO(), **more)
        loss = -(advantages[:, None] * want).mean()
        if not abs(float(out.loss.detach() - loss.detach())) <= VALUES * max(10.0, float(want.detach().abs().max())):
            raise WrongError(f"the policy loss is {float(out.loss.detach())}, of full logits {float(loss.detach())}")
        self._gradients(name, out.loss, loss)

    def _kept(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        return real[:, 1:] & real[:, :-1]

    def _values(self, got: torch.Tensor, want: torch.Tensor, kept: torch.Tensor, largest: float) -> None:
        error = float((got - want).detach()[kept].abs().max())
        if not error <= VALUES * max(10.0, largest):
            raise WrongError(f"log-probabilities differ by {error:.1e}")
        self.value_error = max(self.value_error, error)

    def _gradients(self, name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        theirs = gradients(self.model, want)
        self.gradient_error = max(self.gradient_error, gradient_error(gradients(self.model, got), theirs))
        self.done.append(name)


def padding(ids: torch.Tensor, left: bool) -> torch.Tensor:
    """(B, T) of 0 and 1: the first row has none, another has three."""
    mask = torch.ones_like(ids)
    for row, count in enumerate([0, 3, 1, 2][: len(ids)]):
        mask[row, : count if left else 0] = 0
        mask[row, ids.shape[1] - (0 if left else count) :] = 0
    return mask


def sees_the_future(model: Any, ids: torch.Tensor, more: dict[str, Any]) -> bool:
    """Whether logits depend on a later token: then they are no log-probabilities of a sequence."""
    other = ids.clone()
    other[:, -1] = FIRST_WORD + (ids[:, -1] + 1 - FIRST_WORD) % (END_OF_WORDS - FIRST_WORD)
    with torch.no_grad():
        a, b = (model(**own_inputs(model, x, None, more)).logits[:, :-1] for x in (ids, other))
    return not torch.allclose(a, b, atol=1e-3)


def compare_text(model: Any, found: Comparison) -> None:
    ids = torch.randint(FIRST_WORD, END_OF_WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    more = {name: value for name, value in of_tokens(model, ids).items() if name == "token_type_ids"}
    temperature = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) + 0.5
    found.tokens("text", ids, None, 1.0, more)
    if sees_the_future(model, ids, more):
        raise NotCausalError("its logits depend on later tokens")
    for name, left, t in (("left padding", True, 0.7), ("right padding", False, temperature)):
        found.tokens(name, ids, padding(ids, left), t, more)
    found.policy_loss("policy loss", ids, more)
    if has_router_loss(model):
        found.tokens("router loss", ids, padding(ids, True), 1.0, {"output_router_logits": True})


def has_router_loss(model: Any) -> bool:
    config = model.config.get_text_config()
    asked = "output_router_logits" in inspect.signature(model.forward).parameters or hasattr(config, "output_router_logits")
    return asked and (hasattr(model, "router_aux_loss_coef") or hasattr(config, "router_aux_loss_coef"))


def compare_images(model: Any, found: Comparison) -> None:
    ids, images = image_inputs(model)
    given = images | of_tokens(model, ids)
    found.tokens("images", ids, None, 1.0, given)
    found.policy_loss("images, policy loss", ids, given)
    ids, mask = padded_on_the_left(ids)
    found.tokens("images, left padding", ids, mask, 0.7, images | of_tokens(model, ids))


def compare(model_type: str, class_name: str) -> dict[str, Any]:
    """The row of a family: of its own configuration, and of one in which all caps and scales of its head are active."""
    row = {"model_type": model_type, "class": class_name} | _compared(model_type, class_name, {})
    if model_type in WITHOUT_TIMM:
        row["remark"] = "with SigLIP's vision tower in the place of timm's"
    changes = row.pop("neutral", {})
    if row["result"] == "ok" and changes:
        given = next(iter(changes.values())) if isinstance(next(iter(changes.values())), dict) else changes
        words = ", ".join(f"{name}={value:g}" for name, value in given.items())
        other = _compared(model_type, class_name, changes)
        if other["result"] in ("ok", "refused"):
            row["with"] = {"settings": words, "result": other["result"], "reason": other.get("reason", "")}
            row["error"] = max(row["error"], other["error"])
        else:
            row |= {"result": other["result"], "reason": f"with {words}: {other['reason']}"}
    return row


def _compared(model_type: str, class_name: str, changes: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"result": "ok"}
    found = None
    try:
        model = tiny_model(model_type, class_name, changes)
        found = Comparison(model)
        row |= {"head": head_of(model), "neutral": with_all_active(model.config), "takes_images": takes_images(model)}
        row |= _texts_and_images(model, found, not changes)
    except RefusedError as error:
        row |= {"result": "refused", "reason": str(error)}
    except WrongError as error:
        row |= {"result": "wrong", "reason": str(error)}
    except NotCausalError as error:
        row |= {"result": "no causal language model", "reason": str(error)}
    except Exception as error:
        row |= {"result": "not built", "reason": said(error)}
    if found is not None:
        row |= {"checks": found.done, "error": found.value_error, "gradient_error": found.gradient_error}
    return row


def _texts_and_images(model: Any, found: Comparison, with_images: bool) -> dict[str, str]:
    """What could not be run, in words. One of text and images has to."""
    if model.config.is_encoder_decoder:  # input_ids are its encoder's
        ours(token_logprobs, model, torch.full((ROWS, LENGTH), FIRST_WORD))
        raise WrongError("an encoder-decoder is not refused")
    without: dict[str, str] = {}
    for name, function in (("text", compare_text), ("images", compare_images)):
        if name == "images" and not (takes_images(model) and with_images):
            continue
        try:
            function(model, found)
        except (RefusedError, WrongError) as error:
            raise type(error)(f"with images: {error}" if name == "images" else str(error)) from error
        except NotCausalError:
            raise
        except Exception as error:
            without[f"no {name}"] = said(error)
    if not found.done:
        raise NotBuiltError("; ".join(without.values()))
    return without


def said(error: Exception) -> str:
    words = " ".join(str(error).split())
    if isinstance(error, ImportError):
        missing = re.search(r"requires the (\w+) library|No module named '(\w+)'", words)
        return f"it needs the package {missing[1] or missing[2]}" if missing else words
    return words if isinstance(error, NotBuiltError) else f"{type(error).__name__}: {words}"


def head_of(model: Any) -> list[str]:
    """What is special about its head, in words."""
    layer = model.get_output_embeddings()
    words = [f"{name}={value:g}" for name, value in active_settings(model.config).items()]
    words += ["bias"] if getattr(layer, "bias", None) is not None else []
    embedding = None
    with contextlib.suppress(Exception):
        embedding = model.get_input_embeddings()
    return words + (["tied"] if getattr(embedding, "weight", 0) is getattr(layer, "weight", 1) else [])
