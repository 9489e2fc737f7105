"""The sets of tokens that transformers' `generate` has sampled from, as a `fastpg.Support`.

    with recorded_support(model) as kept:
        sequences = model.generate(input_ids, attention_mask=attention_mask, do_sample=True, top_p=0.95)
    out = token_logprobs(model, sequences, support=kept.support(sequences), ...)

`generate` applies top-k, top-p, min-p and their like by logits processors, which set the scores of other tokens to -inf. It
adds these itself, after all processors that it is given. The one that records has to come after them. For this reason the
context replaces `_get_logits_processor`, the method of the model that lists the processors, and adds to its result.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

from .. import validation
from ..linear.support import Support
from .peft import causal_lm

_OURS = "_fastpg_recording"  # attribute that marks methods which replace a model's own
_METHODS = ("generate", "_get_logits_processor")
_ONE_TOKEN_A_STEP = ("sample", "greedy_search")
# the settings that make `generate` search beams, or accept several tokens in a step
_OTHER_MODES = (
    "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "num_beams", "num_beam_groups",
    "constraints", "force_words_ids", "penalty_alpha", "dola_layers",
)  # fmt: skip


class Recording:
    """What the last call of `generate` within `recorded_support` has kept."""

    def __init__(self) -> None:
        self._found: _Recorder | None = None

    def support(self, sequences: torch.Tensor) -> Support:
        """The sets that `sequences` (B, T) were sampled from, B T of them: set b T + t is that of sequences[b, t].

        sequences: what `generate` returned, all rows in their order, or the first T columns of it.

        Prompts, with their padding, have the whole vocabulary. The padding after a sequence that ended early has the sets that
        the model would have sampled from. They need not hold the padding's token: leave these positions out by a mask.
        Raises ValueError for sequences that the last call has not sampled. For the number of ids and this check the host waits.
        """
        if self._found is None:
            raise RuntimeError("nothing is recorded: within recorded_support(model), call the model's generate before")
        if not isinstance(sequences, torch.Tensor) or sequences.dtype not in (torch.int32, torch.int64) or sequences.dim() != 2:
            shape = tuple(getattr(sequences, "shape", ()))
            raise TypeError(f"sequences must be an integer tensor (B, T); got {validation.kind(sequences)} {shape}")
        steps, seen, first = self._found.steps, self._found.seen, self._found.prompt_length
        rows, longest, length = len(seen), first + len(steps), sequences.shape[1]
        if len(sequences) != rows or not first <= length <= longest:
            raise ValueError(
                f"sequences must be those of the last call of generate, ({rows}, {longest}), of which the first {first} tokens "
                f"are prompts; got {tuple(sequences.shape)}"
            )
        seen = seen.to(sequences.device)[:, :length]  # all but the token of the last step
        wrong = (sequences[:, : seen.shape[1]] != seen).nonzero()
        if len(wrong):
            raise ValueError(
                "sequences must be those of the last call of generate, rows in their order; they differ from what it sampled "
                f"at position {tuple(wrong[0].tolist())}"
            )
        device = seen.device
        whole = Support.from_lists([None], device=device)
        sets = Support.cat([*(step.to(device) for step in steps), whole])  # row after row of each step; then the whole one
        step = torch.arange(-first, length - first, device=device)
        place = step * rows + torch.arange(rows, device=device)[:, None]
        return sets.select(torch.where(step < 0, len(steps) * rows, place))


@contextmanager
def recorded_support(model: torch.nn.Module) -> Iterator[Recording]:
    """Within the context, calls of the model's `generate` record which tokens could be sampled at each step.

    These are the tokens whose scores are above -inf after all processors: top_k, top_p, min_p, typical_p and others, as well as
    suppressed tokens and processors of your own. With do_sample=False `generate` uses none of the former, and the sets are the
    whole vocabulary. Where all tokens are kept no ids are stored; else memory is 4 bytes for each token of a set.

    Sets are all that is recorded. A temperature goes to `token_logprobs(temperature=)`. Processors that change scores in
    another way, such as repetition_penalty, sample from another distribution than that of the model over the set.

    Args:
        model: a transformers causal language model that generates, which PEFT, DDP or FSDP may wrap.

    Yields a `Recording`, whose `support(sequences)` can be called within the context and after it. A call of `generate`
        replaces the record of the one before, and one that fails leaves none. For calls whose sequences are joined later, take
        the support of each, and `Support.cat`. With num_return_sequences the rows are those of the sequences. With
        inputs_embeds alone `generate` returns no prompts, and the sets are those of the sampled tokens.

    The host waits once a step, for the number of ids. Only this instance is patched, and all is restored when the context ends,
    also by an exception. Raises RuntimeError if the model is being recorded already. `generate` raises ValueError for beam
    search, and for assisted, contrastive or other decoding that does not take one token for each row and step.
    """
    lm = causal_lm(model)
    if not isinstance(lm, GenerationMixin):
        raise TypeError(f"model must have transformers' generate; {type(lm).__name__} has none")
    if hasattr(lm.generate, _OURS):
        raise RuntimeError(f"this {type(lm).__name__} is being recorded already; leave that context before")
    recording = Recording()
    before = {name: vars(lm)[name] for name in _METHODS if name in vars(lm)}
    for name, method in zip(_METHODS, _recording_methods(lm, recording), strict=True):
        setattr(method, _OURS, True)
        setattr(lm, name, method)
    try:
        yield recording
    finally:
        for name in _METHODS:
            delattr(lm, name)
        for name, method in before.items():
            setattr(lm, name, method)


class _Recorder(LogitsProcessor):
    """The sets of each step. Returns the scores as they are."""

    def __init__(self) -> None:
        self.steps: list[Support] = []
        self.seen = torch.empty(0, 0, dtype=torch.int64)  # what the last step has read, (B, T)
        self.prompt_length = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.steps:
            self.prompt_length = input_ids.shape[1]
        if input_ids.shape[1] != self.prompt_length + len(self.steps):
            raise RuntimeError("recorded_support wants one token for each row and step; generate did something else")
        self.steps.append(Support.from_mask(scores > -torch.inf))
        self.seen = input_ids
        return scores


def _recording_methods(lm: GenerationMixin, recording: Recording) -> tuple[Any, Any]:
    """Replacements of `_METHODS`."""
    own_generate, own_processors = lm.generate, lm._get_logits_processor
    calls: list[types.SimpleNamespace] = []  # the call under way

    @functools.wraps(own_generate)
    def generate(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(own_generate).bind_partial(*args, **kwargs).arguments | kwargs
        paged = given.get("cache_implementation") == "paged"
        if paged or given.get("custom_generate") is not None:
            name = "cache_implementation" if paged else "custom_generate"
            raise ValueError(f"recorded_support knows generate's own loop alone; leave {name}={given[name]!r} out")
        recording._found = None
        calls.append(types.SimpleNamespace(assistant=given.get("assistant_model"), recorder=None))
        try:
            out = own_generate(*args, **kwargs)
        finally:
            call = calls.pop()
        recording._found = call.recorder  # of a call that did not fail
        return out

    @functools.wraps(own_processors)
    def processors(generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        if not calls:
            raise RuntimeError("recorded_support records generate, and not generate_batch, whose rows come and go")
        _check_mode(generation_config, calls[-1].assistant)
        found = own_processors(generation_config, *args, **kwargs)
        calls[-1].recorder = _Recorder()
        return LogitsProcessorList([*found, calls[-1].recorder])

    return generate, processors


def _check_mode(config: GenerationConfig, assistant: Any) -> None:
    mode = getattr(config.get_generation_mode(assistant), "value", "")
    if mode in _ONE_TOKEN_A_STEP:
        return
    values = {name: getattr(config, name, None) for name in _OTHER_MODES} | {"assistant_model": assistant}
    on = {name: value for name, value in values.items() if value is not None and value is not False and value != 1}
    said = ", ".join(f"{name}={type(v).__name__ if isinstance(v, torch.nn.Module) else v}" for name, v in on.items())
    raise ValueError(
        f"recorded_support wants generate to take one token for each row and step; {said} is {mode.replace('_', ' ')}, which "
        "reorders rows or takes several tokens: leave it out"
    )
