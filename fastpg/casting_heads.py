"""Tells whether an lm_head's own forward casts to float32 and is linear otherwise. The layer is run; its name says nothing.

Such a layer is a subclass, or an instance with a forward of its own, and asks for a float32 head:

    F.linear(x.float(), self.weight.float())          with torch.autocast(device, enabled=False) around it, or without
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_PROBES, _STAND_IN_ROWS = 3, 16

# Answers by layer, then by its forward and state. They are kept because `LMHead.from_model` runs at every forward of a model.
_answers: weakref.WeakKeyDictionary[nn.Module, dict[tuple, bool]] = weakref.WeakKeyDictionary()


def casts_to_fp32(layer: nn.Module) -> bool:
    """Whether layer(x) is x.float() @ weight.float().T + bias in float32 for 16-bit x, up to float32's rounding.

    The layer's forward is run twice on three rows in 16 bits:

        with random weights   shows that it multiplies by `weight`, not by another tensor it holds
        with its own weight   shows the whole vocabulary; left out if the weight is not whole here (FSDP's shards, ZeRO-3,
                              meta tensors), so that no collective is run

    A layer that holds other tensors or layers is refused, whatever they do at the moment: training may change them.
    The answer is remembered while the layer's forward, and the numbers and strings among its attributes, stay the same; a
    change elsewhere that its forward reads goes unnoticed. Hooks, random numbers, gradients and attributes are left alone.
    """
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not _is_torchs(weight) or not (bias is None or _is_torchs(bias)) or not weight.is_floating_point():
        return False
    if _holds_more(layer):
        return False
    answers, state = _answers.setdefault(layer, {}), _state(layer, weight)
    if state not in answers:
        answers[state] = _ask(layer, weight, bias)
    return answers[state]


def _is_torchs(x: object) -> bool:
    """Whether x is a plain tensor or a DTensor, not a quantisation library's."""
    return isinstance(x, torch.Tensor) and type(x).__module__.partition(".")[0] == "torch"


def _holds_more(layer: nn.Module) -> bool:
    named = {**layer._parameters, **layer._buffers, **layer._modules}
    others = [x for name, x in named.items() if x is not None and name not in ("weight", "bias")]
    return bool(others) or any(isinstance(x, torch.Tensor) for x in vars(layer).values())


def _state(layer: nn.Module, weight: torch.Tensor) -> tuple:
    """The key of an answer: when it changes, the layer is run again. References are weak, as a forward may hold its layer."""
    forward = layer.forward
    function, owner = getattr(forward, "__func__", forward), getattr(forward, "__self__", None)
    try:
        references = weakref.ref(function), None if owner is None else weakref.ref(owner)
        hash(references)
    except TypeError:  # without weak references or a hash the key equals no other, and the layer is run again
        references = (object(),)
    plain = tuple((name, x) for name, x in vars(layer).items() if isinstance(x, (int, float, str)))
    return *references, plain, weight.dtype, _is_whole(weight)


def _is_whole(weight: torch.Tensor) -> bool:
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.dim() == 2 and weight.numel() > 0 and not weight.is_meta


def _ask(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    whole = _is_whole(weight)
    size = weight.shape[-1] if weight.dim() == 2 and weight.shape[-1] else getattr(layer, "in_features", 0)
    if not size:
        return False
    device = torch.device("cpu") if weight.is_meta else weight.device
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, weight.dtype)

    dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    # rows of different sizes, so that a softcap would show
    rows = (random(1, _PROBES, size) * torch.tensor([1.0, 16.0, 256.0], device=device)[:, None]).to(dtype)
    parts = [(random(_STAND_IN_ROWS, size), None if bias is None else random(_STAND_IN_ROWS))]
    if whole:
        parts.append((weight, bias))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return all(_is_fp32_product(_forward(layer, rows, *part), rows, *part) for part in parts)


def _forward(layer: nn.Module, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """Runs the layer's forward with this weight and bias, and restores its state. None if it fails."""
    before = dict(vars(layer))
    # torch.nn.Module looks its parameters up here
    vars(layer)["_parameters"] = {**layer._parameters, "weight": weight, "bias": bias}
    try:
        with torch.random.fork_rng([rows.device] if rows.device.type == "cuda" else []):
            return layer.forward(rows)
    except torch.OutOfMemoryError:  # says nothing about the layer
        raise
    except Exception:
        return None
    finally:
        vars(layer).clear()
        vars(layer).update(before)


def _is_fp32_product(out: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether out is rows (1, P, H) @ weight (V, H).T + bias in float32, up to rounding."""
    if not isinstance(out, torch.Tensor) or out.dtype != torch.float32 or out.shape != (*rows.shape[:2], len(weight)):
        return False
    # one product, like the layer's own: slices might use another kernel, or TF32 where that is allowed
    x, w = rows.float(), weight.float()
    b = None if bias is None else bias.float()
    want = F.linear(x, w, b)
    # Sums of H products in another order differ by less than this. Rounding to 16 bits differs by many times as much.
    scale = x.norm(dim=-1, keepdim=True) * w.norm(dim=1) + (0 if b is None else b.abs())
    close = (out - want).abs() <= 8 * torch.finfo(torch.float32).eps * scale
    return bool((close | (out == want)).all())  # == is for infinities: a bias of -inf bans a token
