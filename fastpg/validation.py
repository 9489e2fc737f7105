"""Checks of arguments. Their errors name the argument, the wanted form and the given one.

Checks of shapes and dtypes cost nothing. A check of values is a host read (a copy of a number to the CPU): on a GPU the host
waits until the values are there. Functions with `check=False` make none.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .kernels.limits import IGNORED_TOKEN

if TYPE_CHECKING:
    from .lm_head import LMHead

FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# TRL's values of loss_type and importance_sampling_level, as arguments here. Other libraries mean other bounds and reductions
# by these names, so no name is an objective. A test holds these to the dialects of docs/pages/objectives.md.
_CLIP, _STEP, _ROWS = (
    "PPOClip(epsilon, epsilon_high)",
    "step_tokens / num_processes",
    'reduction="seq-mean-token-mean", denominator=B',
)
_TRL_LOSSES = {
    "grpo": f"{_CLIP}, {_ROWS}",
    "bnpo": _CLIP,
    "dr_grpo": f"{_CLIP}, denominator=B * max_completion_length",
    "dapo": f"{_CLIP}, denominator={_STEP}",
    "cispo": f"CISPO(ratio_max=epsilon_high), denominator={_STEP}",
    "sapo": f"SAPO(sapo_pos, sapo_neg), {_ROWS}",
    "gspo": f"GSPO(epsilon, epsilon_high), {_ROWS}",
    "sequence": f"GSPO(epsilon, epsilon_high), {_ROWS}",
    "token": _CLIP,
    "luspo": 'GSPO(epsilon, epsilon_high), reduction="seq-mean-token-sum", denominator=B',
    "vespo": f"VESPO(k_pos, lambda_pos, k_neg, lambda_neg), denominator={_STEP}",
}


def is_positive_number(value: object) -> bool:
    """A real number of Python or numpy (no bool, string or tensor) that is finite and > 0."""
    is_plain = type(value) in (float, int)  # (asking for numbers.Real takes the host longer)
    is_number = is_plain or (isinstance(value, numbers.Real) and not isinstance(value, bool))
    return is_number and 0 < value <= sys.float_info.max


def is_nonnegative_number(value: object) -> bool:
    """The same, with 0 allowed."""
    return is_positive_number(value) or (isinstance(value, numbers.Real) and not isinstance(value, bool) and value == 0)


def is_dtensor(x: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # whoever made a DTensor has imported it
    return module is not None and isinstance(x, module.DTensor)


def check_plain(name: str, value: Any) -> None:
    """Raises TypeError for a DTensor: its shape is that of all ranks, and its operations are collective calls."""
    if is_dtensor(value):
        raise TypeError(
            f"{name} must be a plain tensor; got a DTensor with placements {value.placements}: pass its .full_tensor(), or its "
            ".to_local() where the call is for this rank's tokens alone"
        )


def check_linear_inputs(
    hidden: torch.Tensor,
    head: LMHead,
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
) -> None:
    """The shapes and dtypes of hidden (..., H), head (V, H), tokens (...), mask (...), temperature: number or (...)."""
    for name, value in (("hidden", hidden), ("tokens", tokens)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    weight = head.weight
    if hidden.dtype not in FLOATING_DTYPES:
        raise TypeError(f"hidden must be float16, bfloat16, float32 or float64; got {hidden.dtype}")
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype} but head.weight is {weight.dtype}; cast one of them, or pass LMHead(weight, "
            "fp32_head=True) for float32 products of both (not of float64), or call under torch.autocast"
        )
    if hidden.dim() == 0 or hidden.shape[-1] != head.hidden_size:
        raise ValueError(
            f"hidden must be (..., H) with H = {head.hidden_size} as in head.weight {tuple(weight.shape)}; got shape "
            f"{tuple(hidden.shape)}"
        )
    _check_tokens(tokens, "hidden", hidden)
    if weight.device != hidden.device:
        raise ValueError(f"head.weight is on {weight.device} but hidden is on {hidden.device}")
    _check_beside_tokens("hidden", hidden, tokens, mask, temperature)


def check_given_logits(
    logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None, temperature: float | torch.Tensor
) -> None:
    """logits (..., V), tokens (...), mask (...), temperature: number or (...)."""
    check_plain("logits", logits)
    for name, value in (("logits", logits), ("tokens", tokens)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if logits.dtype not in FLOATING_DTYPES:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64; got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., V) with V >= 1; got shape {tuple(logits.shape)}")
    _check_tokens(tokens, "logits", logits)
    _check_beside_tokens("logits", logits, tokens, mask, temperature)


def _check_tokens(tokens: torch.Tensor, name: str, x: torch.Tensor) -> None:
    """Checks tokens (...) against the x that predicts them: hidden (..., H) or logits (..., V)."""
    check_plain("tokens", tokens)
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be int64 or int32; got {tokens.dtype}")
    if tokens.shape != x.shape[:-1]:
        raise ValueError(
            f"tokens must have the leading shape of {name}, {tuple(x.shape[:-1])}: {name}[..., t, :] predicts tokens[..., t], "
            f"already shifted; got shape {tuple(tokens.shape)}"
        )


def _check_beside_tokens(
    name: str, x: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None, temperature: float | torch.Tensor
) -> None:
    """All devices against that of x; the shapes of mask and temperature against that of tokens."""
    for other, value in (("tokens", tokens), ("mask", mask), ("temperature", temperature)):
        if isinstance(value, torch.Tensor) and value.device != x.device:
            raise ValueError(f"{other} is on {value.device} but {name} is on {x.device}")
    check_mask(mask, "tokens", tokens)
    check_temperature(temperature, tokens.shape)


def check_mask(mask: torch.Tensor | None, like_name: str, like: torch.Tensor) -> None:
    if mask is None:
        return
    check_plain("mask", mask)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where a token counts; got {kind(mask)} (use mask.bool())")
    if mask.shape != like.shape:
        raise ValueError(f"mask must have the shape of {like_name}, {tuple(like.shape)}; got {tuple(mask.shape)}")
    if mask.device != like.device:
        raise ValueError(f"mask is on {mask.device} but {like_name} is on {like.device}")


def check_temperature(temperature: float | torch.Tensor, shape: torch.Size) -> None:
    if isinstance(temperature, torch.Tensor):
        check_plain("temperature", temperature)
        if not temperature.is_floating_point():
            raise TypeError(f"temperature must be a number or a floating-point tensor; got {temperature.dtype}")
        if temperature.requires_grad:
            raise ValueError("temperature must not require a gradient: none is computed for it; pass temperature.detach()")
        if temperature.dim() > 0 and temperature.shape != shape:
            raise ValueError(
                f"temperature must be a number or have the shape of tokens, {tuple(shape)}; got {tuple(temperature.shape)}"
            )
    elif not is_positive_number(temperature):
        raise ValueError(f"temperature must be a positive number; got {temperature!r}")


def check_values(tokens: torch.Tensor, keep: torch.Tensor, vocab_size: int | None, temperature: float | torch.Tensor) -> None:
    """At kept positions, token ids must be in [0, V) and temperatures > 0. Nothing is asked of masked positions, and nothing of
    token ids if vocab_size is None."""
    in_range = keep if vocab_size is None else tokens == tokens.clamp(0, vocab_size - 1)
    in_range = in_range | ~keep
    require(
        in_range,
        lambda: (
            f"tokens must be in [0, {vocab_size}) or {IGNORED_TOKEN}; got {tokens[~in_range][0].item()} at position "
            f"{tuple((~in_range).nonzero()[0].tolist())}"
        ),
    )
    if isinstance(temperature, torch.Tensor):
        positive = ((temperature > 0) & temperature.isfinite()) | ~keep
        require(
            positive,
            lambda: (
                "temperature must be positive and finite; got "
                f"{temperature.expand(keep.shape)[~positive][0].item()} at position {tuple((~positive).nonzero()[0].tolist())}"
            ),
        )


def require(holds: torch.Tensor, message: Callable[[], str]) -> None:
    """Raises a ValueError with the message unless all of `holds` is True. The host waits for its device."""
    if not bool(holds.all()):
        raise ValueError(message())


def check_token_numbers(
    like_name: str,
    like: torch.Tensor,  # (...): the others must match it
    per_token: dict[str, torch.Tensor | None],
    advantages: torch.Tensor,
    *,
    packed_sequences: bool,  # whether sequence_ids were given
) -> None:
    """Shapes, dtypes and devices of numbers by name (...), and of advantages (...) or one per sequence."""
    shape = tuple(like.shape)
    for name, value in {like_name: like, **per_token, "advantages": advantages}.items():
        check_plain(name, value)
    for name, value in per_token.items():
        if value is None:
            continue
        _check_floating(name, value, like_name, shape)
    if not isinstance(advantages, torch.Tensor) or advantages.dtype == torch.bool or advantages.is_complex():
        raise TypeError(f"advantages must be a real tensor; got {kind(advantages)}")
    per_sequence = (len(shape) == 2 and advantages.shape == shape[:1]) or (packed_sequences and advantages.dim() == 1)
    if advantages.shape != shape and not per_sequence:
        wanted = f"per token {shape}" + (f" or per sequence ({shape[0]},)" if len(shape) == 2 else "")
        if len(shape) == 1:
            wanted += " or one per sequence (S,)" + ("" if packed_sequences else ", with sequence_ids=")
        raise ValueError(f"advantages must be {wanted}; got shape {tuple(advantages.shape)}")
    for name, value in {**per_token, "advantages": advantages}.items():
        if value is not None and value.device != like.device:
            raise ValueError(f"{name} is on {value.device} but {like_name} is on {like.device}")


def _check_floating(name: str, value: torch.Tensor, like_name: str, shape: tuple[int, ...]) -> None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor or None; got {kind(value)}")
    if value.shape != shape:
        raise ValueError(f"{name} must have the shape of {like_name}, {shape}; got {tuple(value.shape)}")


def check_rollout(
    like_name: str,
    like: torch.Tensor,  # (...): the others must match it
    old_logprobs: torch.Tensor | None,
    rollout_logprobs: torch.Tensor | None,
    rollout_correction: object | None,
    rollout_weights: torch.Tensor | None,
) -> None:
    """What a decoupled loss is given: rollout_logprobs (...) beside old_logprobs (...), and at most one way to weights."""
    if rollout_logprobs is None:
        if rollout_correction is not None:
            raise ValueError("rollout_correction was given without rollout_logprobs, which it corrects for")
        return
    for name, value in {"old_logprobs": old_logprobs, "rollout_logprobs": rollout_logprobs}.items():
        check_plain(name, value)
        if value is not None:
            _check_floating(name, value, like_name, tuple(like.shape))
            if value.device != like.device:
                raise ValueError(f"{name} is on {value.device} but {like_name} is on {like.device}")
    if rollout_weights is not None:
        raise ValueError(
            "rollout_logprobs and rollout_weights were both given: weights are made of rollout_logprobs; pass one of them, and "
            "further factors inside rollout_correction"
        )
    if rollout_correction is not None and not callable(rollout_correction):
        raise TypeError(
            "rollout_correction must be a function of (old_logprobs, rollout_logprobs, mask=, sequence_ids=), such as "
            f"functools.partial(fastpg.rollout.truncated_weights, high=2.0), or None; got {kind(rollout_correction)}"
        )


def check_policy_inputs(
    like_name: str,
    like: torch.Tensor,  # (...): the others must match it
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    objective: object,
    kl: object | None,
    ref_logprobs: torch.Tensor | None,
    rollout_weights: torch.Tensor | None,
    *,
    packed_sequences: bool,  # whether sequence_ids were given
) -> None:
    """Shapes, dtypes and devices: old_logprobs, ref_logprobs, rollout_weights (...); advantages (...) or one per sequence."""
    per_token = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "rollout_weights": rollout_weights}
    check_token_numbers(like_name, like, per_token, advantages, packed_sequences=packed_sequences)
    if isinstance(objective, type) or not callable(objective):
        given = kind(objective)
        if isinstance(objective, str):
            given = f"{objective!r}: {_instead_of(objective)}"
        if isinstance(objective, type):
            given = f"the class {objective.__name__}: pass an instance, {objective.__name__}(...)"
        raise TypeError(
            f"objective must be an instance of an objective or a function of (logprobs, old_logprobs, advantages); got {given}"
        )
    if kl is not None and not (callable(kl) and hasattr(kl, "coef")):
        raise TypeError(f"kl must be a KLPenalty, such as KLPenalty(0.01), or None; got {kind(kl)}")
    if (kl is None) != (ref_logprobs is None):
        given, missing = ("kl", "ref_logprobs") if ref_logprobs is None else ("ref_logprobs", "kl")
        raise ValueError(f"{given} was given without {missing}; a KL penalty needs kl=KLPenalty(...) and ref_logprobs")


def _instead_of(name: str) -> str:
    """What to pass in the place of another library's name of a loss."""
    where = '"Dialects" in docs/pages/objectives.md has the names of other libraries'
    known = _TRL_LOSSES.get(name.lower())
    if known is None:
        return f"pass an instance, such as fastpg.CISPO(ratio_max=5.0) or fastpg.PPOClip(0.2, 0.2); {where}"
    return f"what this name means differs between libraries; in TRL it is objective=fastpg.{known}; {where}"


def kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
