"""`LMHead`, the last layer of a language model: a weight, and the few numbers that some models put around it."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from .casting_heads import casts_to_fp32
from .validation import FLOATING_DTYPES, is_positive_number, kind

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

# The names that model configurations give to the parts of `softcap(logit_scale * (x . w + b))`.
_SOFTCAP_NAMES = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIER_NAMES = ("logit_scale", "lm_head_multiplier", "output_multiplier")


class LoRA(NamedTuple):
    """A low-rank update of the weight: `weight + scale * b @ a` (Hu et al., arXiv 2106.09685; scale = alpha / r there)."""

    a: torch.Tensor  # (r, H)
    b: torch.Tensor  # (V, r)
    scale: float


@dataclass(frozen=True, eq=False)
class LMHead:
    """An lm_head: `logits = softcap(logit_scale * (hidden @ weight.T + bias))`, `softcap(u) = c tanh(u / c)`.

    weight: (V, H) 16-, 32- or 64-bit floating. Pass the Parameter itself, so that gradients reach it (tied embeddings too). An
        nn.Linear stands for its weight and bias.
    bias: (V,) in the weight's dtype, or None. An entry of -inf bans a token (under a softcap its logit is only -c).
    softcap: c > 0, or None for no cap (Gemma 2: 30).
    logit_scale: > 0. It multiplies after the bias and before the cap (Cohere: logit_scale, Granite: 1 / logits_scaling).
    lora: (A (r, H), B (V, r), scale), each factor in the weight's dtype or float32. It adds scale * (hidden @ A.T) @ B.T to
        hidden @ weight.T; only hidden @ A.T is stored. A frozen weight costs no (V, H) buffer.
    group: a torch.distributed process group whose ranks each hold some rows of the weight (vocab-parallel). Token ids remain
        those of the whole vocabulary; bias and B have the rows of this rank's weight. None: the weight is whole.
    vocab_start: with a group, the token id of row 0 of this rank's weight.
    weight_grad: (V, H) buffer in float32 (float64 for float64 weights). Backward adds the weight's gradient to it and leaves
        `weight.grad` as it is. Use it for micro-batches: a sum of their gradients in 16 bits is biased. DDP does not see it:
        where ranks have tokens of their own, `all_reduce` it once, after the last micro-batch, and divide it by their number
        if the other gradients are averaged.
    fp32_head: True multiplies in float32, under autocast too. Hidden, weight, bias and LoRA's factors may then each be
        float16, bfloat16 or float32; their gradients come back in their own dtypes. A 16-bit weight is copied to a float32
        (V, H), which lives for the call in one pass, until backward in two. False: under autocast its dtype is used, even
        for a float32 weight, since master weights are float32 too. float64 stays float64 and is not mixed with others.

    A weight that is a DTensor is used in place if its rows are sharded on `group`; its placement then gives vocab_start.
    Any other DTensor is gathered for the call. See `fastpg.distributed`.

    Raises TypeError or ValueError naming the field that does not fit.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    lora: LoRA | tuple[torch.Tensor, torch.Tensor, float] | None = None
    group: ProcessGroup | None = None
    vocab_start: int | None = None
    weight_grad: torch.Tensor | None = None
    fp32_head: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.weight, torch.nn.Linear):
            self._take(self.weight)
        weight, bias = self.weight, self.bias
        _check_whole(weight, self.lora)
        if not isinstance(weight, torch.Tensor) or weight.dtype not in FLOATING_DTYPES:
            raise TypeError(f"head.weight must be a floating-point tensor (V, H); got {kind(weight)}")
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"head.weight must be (V, H) with V >= 1 and H >= 1; got shape {tuple(weight.shape)}")
        if not isinstance(self.fp32_head, bool):
            raise TypeError(f"head.fp32_head must be True or False; got {kind(self.fp32_head)}")
        if bias is not None:
            allowed = _mixed_dtypes(weight, self.fp32_head)
            if not isinstance(bias, torch.Tensor) or bias.dtype not in allowed or bias.device != weight.device:
                raise TypeError(
                    f"head.bias must be a tensor with the weight's dtype and device ({weight.dtype}, {weight.device}); "
                    f"got {kind(bias)}{f' on {bias.device}' if isinstance(bias, torch.Tensor) else ''}"
                )
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"head.bias must be (V,) = ({weight.shape[0]},); got shape {tuple(bias.shape)}")
        if self.softcap is not None and not is_positive_number(self.softcap):
            raise ValueError(f"head.softcap must be a positive number or None; got {self.softcap!r}")
        if not is_positive_number(self.logit_scale):
            raise ValueError(f"head.logit_scale must be a positive number; got {self.logit_scale!r}")
        if self.lora is not None:
            _check_lora(self.lora, weight, _mixed_dtypes(weight, self.fp32_head) | {torch.float32})
            object.__setattr__(self, "lora", LoRA(*self.lora))
        if self.weight_grad is not None:
            _check_weight_grad(self.weight_grad, weight)
        if self.vocab_start is not None:
            if isinstance(self.vocab_start, bool) or not isinstance(self.vocab_start, int) or self.vocab_start < 0:
                raise ValueError(f"head.vocab_start must be an int >= 0; got {self.vocab_start!r}")
            if self.group is None:
                raise ValueError(f"head.vocab_start={self.vocab_start} needs head.group, the ranks that hold the other rows")

    def _take(self, layer: torch.nn.Linear) -> None:
        """Weight and bias of a layer that was given in the place of the weight."""
        if self.bias is not None:
            raise ValueError("head.bias was given beside a Linear layer, which has its own; pass LMHead(layer.weight, bias)")
        layer = _linear(layer)
        object.__setattr__(self, "bias", layer.bias)
        object.__setattr__(self, "weight", layer.weight)

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the weight. With a group, those of this rank."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """H, the size of a hidden state."""
        return self.weight.shape[1]

    @classmethod
    def from_model(cls, model: PreTrainedModel, *, fp32_head: bool = False) -> LMHead:
        """The head of a transformers causal language model, read from its output embeddings and its configuration.

        It knows final logit soft-capping (Gemma 2 and 3, RecurrentGemma, xLSTM) and logit scales (Cohere, Granite, Falcon-H1,
        HyperCLOVA X). Of PEFT's layers it knows modules_to_save (the active copy is read) and LoRA with one active adapter.
        While adapters are disabled or merged, the base weight alone is read. Read the head anew after adapters are switched.

        fp32_head: as in `LMHead`. A layer whose own forward casts to float32 and is linear otherwise sets it, such as
        `F.linear(x.float(), self.weight.float())` in a class or on the instance. `casting_heads` runs the layer to know.

        PEFT's trainable tokens are rows of the weight, of which a copy is made. Wrappers (torch.compile, DDP, FSDP) and
        accelerate's hooks are seen through.

        Raises ValueError where the model has no output embeddings, or where they are another layer: quantised, with another
        forward of their own, or adapted in another way (several adapters, DoRA, a LoRA bias, LoRA dropout in training); and
        where their weight is not there: offloaded by accelerate, partitioned by DeepSpeed's ZeRO-3 or sharded by FSDP1, of
        which they may also be a unit of their own.
        """
        while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
            model = model.module
        if not hasattr(model, "get_output_embeddings"):
            raise TypeError(f"from_model wants a transformers model, which may be wrapped; got {kind(model)}")
        output = model.get_output_embeddings()
        if output is None:
            raise ValueError(
                f"{type(model).__name__} has no output embeddings; pass LMHead(weight, ...) instead of LMHead.from_model(model)"
            )
        layer, weight, lora = _layer_and_tensors(output)
        fp32_head = fp32_head or not _has_forward_of(layer, torch.nn.Linear)  # _linear refuses all but layers that cast
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        softcap = next((cap for name in _SOFTCAP_NAMES if (cap := getattr(config, name, None))), None)
        bias = getattr(layer, "bias", None)
        return cls(weight, bias, softcap, _config_scale(config), lora, fp32_head=fp32_head)


def other_logits(model: PreTrainedModel, head: LMHead, bare: bool) -> str:
    """What is said of a model whose own logits are not those of its head. bare: they are the products of its lm_head alone."""
    read = f"softcap={head.softcap}, logit_scale={head.logit_scale}, as read from its configuration"
    said = f"{type(model).__name__} does something else to its logits than {read}; compute its logits in full"
    return (bare and left_out(model)) or said


def left_out(model: PreTrainedModel) -> str:
    """What is said of a model that leaves out the scale or the cap of the text model within it; "" if it has no such model."""
    name, config = type(model).__name__, model.config.get_text_config()
    values = {key: getattr(config, key, None) for key in (*_SOFTCAP_NAMES, *_MULTIPLIER_NAMES, "logits_scaling")}
    given = {key: x for key, x in values.items() if isinstance(x, (int, float)) and x not in (0, 1)}
    if config is model.config or not given:
        return ""
    neutral = " and ".join(f"model.config.get_text_config().{key} = {None if key in _SOFTCAP_NAMES else 1.0}" for key in given)
    return (
        f"{name} returns logits without the {', '.join(f'{key}={x}' for key, x in given.items())} of its text model's "
        f"configuration ({type(config).__name__}), by which a server that runs that text model, such as vLLM, samples. For the "
        f"logits of {name} set {neutral}; for those of the text model give its last_hidden_state to linear_logprobs or "
        "linear_policy_loss, with LMHead.from_model(model)"
    )


def as_head(head: torch.Tensor | torch.nn.Linear | LMHead) -> LMHead:
    """A bare (V, H) weight is a head without bias, cap or scale, and a Linear layer one with its bias."""
    return head if isinstance(head, LMHead) else LMHead(head)


def _mixed_dtypes(weight: torch.Tensor, fp32_head: bool) -> set[torch.dtype]:
    """The dtypes that a bias or a LoRA factor may have beside this weight."""
    return set(FLOATING_DTYPES) - {torch.float64} if fp32_head and weight.dtype != torch.float64 else {weight.dtype}


def _check_whole(weight: object, lora: object) -> None:
    factors = lora[:2] if isinstance(lora, tuple) else ()
    names = ("weight", "lora's A", "lora's B")[: 1 + len(factors)]  # (Dynamo of torch 2.9 takes every zip for a strict one)
    for name, x in zip(names, (weight, *factors), strict=True):
        if _is_sharded(x):
            raise ValueError(
                f"head.{name} is sharded by FSDP1 (FullyShardedDataParallel) outside the forward of the module that it wraps; "
                "pass the wrapped model to token_logprobs or causal_lm_policy_loss, or compute the loss in that forward"
            )


def _check_lora(lora: object, weight: torch.Tensor, allowed: set[torch.dtype]) -> None:
    if not isinstance(lora, tuple) or len(lora) != 3:
        raise TypeError(f"head.lora must be (A, B, scale) or None; got {kind(lora)}")
    a, b, scale = lora
    vocab, hidden_size = weight.shape
    for name, factor in (("A", a), ("B", b)):
        if not isinstance(factor, torch.Tensor) or factor.dtype not in allowed or factor.device != weight.device:
            where = f" on {factor.device}" if isinstance(factor, torch.Tensor) else ""
            raise TypeError(
                f"head.lora's {name} must be a tensor in the weight's dtype or float32, on its device ({weight.dtype}, "
                f"{weight.device}); got {kind(factor)}{where}"
            )
    if a.dim() != 2 or b.dim() != 2 or 0 in a.shape or a.shape[1] != hidden_size or b.shape != (vocab, a.shape[0]):
        raise ValueError(
            f"head.lora must be A (r, H) = (r, {hidden_size}) and B (V, r) = ({vocab}, r) of one rank r >= 1; got A "
            f"{tuple(a.shape)} and B {tuple(b.shape)}"
        )
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"head.lora's scale must be a finite number; got {scale!r}")


def _check_weight_grad(buffer: object, weight: torch.Tensor) -> None:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if not isinstance(buffer, torch.Tensor) or buffer.dtype != dtype or buffer.device != weight.device:
        where = f" on {buffer.device}" if isinstance(buffer, torch.Tensor) else ""
        raise TypeError(f"head.weight_grad must be a {dtype} tensor on {weight.device}; got {kind(buffer)}{where}")
    if buffer.shape != weight.shape or buffer.requires_grad:
        raise ValueError(
            f"head.weight_grad must have the weight's shape {tuple(weight.shape)} and require no gradient; got shape "
            f"{tuple(buffer.shape)}{', which requires one' if buffer.requires_grad else ''}"
        )
    if not weight.requires_grad:
        raise ValueError("head.weight_grad was given, but head.weight requires no gradient: nothing would be added to it")


def _config_scale(config) -> float:
    scale = 1.0
    for name in _MULTIPLIER_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, (int, float)):  # MPT's logit_scale may be a string that transformers ignores
            scale *= value
    # The same name means opposite things: Granite's models divide by it, HyperCLOVA X multiplies.
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        multiplies = getattr(config, "model_type", "").startswith("hyperclovax")
        scale = scale * scaling if multiplies else scale / scaling
    return float(scale)


def _layer_and_tensors(layer: torch.nn.Module) -> tuple[torch.nn.Module, torch.Tensor, LoRA | None]:
    """The linear layer inside output embeddings (plain, or casting to float32), its weight, and the LoRA that PEFT adds."""
    if "peft" in sys.modules:  # whoever wrapped the layer has imported it
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper
        from peft.utils.other import TrainableTokensWrapper

        if isinstance(layer, BaseTunerLayer):
            base = _linear(layer.base_layer)
            return base, base.weight, _active_lora(layer)
        if isinstance(layer, ModulesToSaveWrapper):
            active = [] if layer.disable_adapters else layer.active_adapters
            layer = layer.modules_to_save[active[0]] if active else layer.original_module
        elif isinstance(layer, TrainableTokensWrapper):
            rows = layer.token_adapter
            base, own = _linear(rows.base_layer), rows.merged or rows.disable_adapters
            return base, base.weight if own else rows.get_merged_weights(layer.active_adapters), None
    return _linear(layer), layer.weight, None


def _linear(layer: torch.nn.Module) -> torch.nn.Module:
    if _is_fsdp1_unit(layer):
        raise ValueError(
            "the output embeddings are a unit of FSDP1 (FullyShardedDataParallel) of their own, which gathers their weight for "
            "the backward of their own output alone; leave them out of auto_wrap_policy, so that they belong to the unit "
            "around them, or use FSDP2 (fully_shard)"
        )
    plain = isinstance(layer, torch.nn.Linear) and _has_forward_of(layer, torch.nn.Linear)
    if not plain and not casts_to_fp32(layer):
        raise ValueError(
            f"the output embeddings are {_type_name(layer)}, whose forward is not that of torch.nn.Linear; compute the logits "
            "in full, or pass LMHead(weight, ...) if they are hidden @ weight.T + bias"
        )
    if is_partitioned(layer.weight):
        raise ValueError(
            "the output embeddings' weight is partitioned by DeepSpeed's ZeRO-3 outside their own forward; use token_logprobs "
            "or causal_lm_policy_loss, which read it there, or deepspeed.zero.GatheredParameters around call and backward"
        )
    if layer.weight.is_meta and "_hf_hook" in vars(layer):
        raise ValueError(
            "the output embeddings' weight is offloaded by accelerate; give lm_head a device in device_map, where it stays"
        )
    if type(layer.weight).__module__.partition(".")[0] != "torch":
        raise ValueError(f"the output embeddings hold a weight of type {_type_name(layer.weight)}; a plain tensor is wanted")
    return layer


def _active_lora(layer: torch.nn.Module) -> LoRA | None:
    """The update that a PEFT layer's forward adds to its base layer, or None."""
    from peft.tuners.lora.layer import Linear

    if not _has_forward_of(layer, Linear):
        raise ValueError(
            f"the output embeddings carry a {_type_name(layer)}; of PEFT's layers only LoRA's Linear is understood"
        )
    if layer.merged and layer.disable_adapters:
        raise ValueError("the output embeddings' LoRA is merged and disabled at once; unmerge it first")
    if layer.merged or layer.disable_adapters:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise ValueError(f"the output embeddings have {len(active)} active LoRA adapters, {active}; one is wanted")
    name = active[0]
    dropout = layer.lora_dropout[name]
    if any(map(_is_fsdp1_unit, (layer.lora_A[name], layer.lora_B[name]))):
        problem = (
            "has units of FSDP1 (FullyShardedDataParallel) of its own; leave its layers out of auto_wrap_policy, or use FSDP2 "
            "(fully_shard)"
        )
    elif name in getattr(layer, "lora_variant", ()) or layer.use_dora.get(name):
        problem = "is a variant such as DoRA, which is no low-rank update of the weight"
    elif layer.lora_A[name].bias is not None or layer.lora_B[name].bias is not None:
        problem = "has a bias (lora_bias=True)"
    elif dropout.training and getattr(dropout, "p", 0) > 0:
        problem = f"has dropout {dropout.p} in training mode; set it to 0, or call model.eval()"
    else:
        return LoRA(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    raise ValueError(f"the output embeddings' LoRA adapter {name!r} {problem}")


def is_elsewhere(layer: torch.nn.Module) -> bool:
    """Whether the weight of output embeddings is whole in a forward alone, of their own or of a module around them."""
    weight = getattr(layer, "weight", None)
    return is_partitioned(weight) or (_is_sharded(weight) and not _is_fsdp1_unit(layer))


def is_partitioned(weight: torch.Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds a share of the weight on every rank, so that there is none here."""
    return hasattr(weight, "ds_id") and weight.shape != getattr(weight, "ds_shape", weight.shape)


def _is_sharded(x: object) -> bool:
    """Whether FSDP1 has left a share of the parameter here, flat, or (use_orig_params=False) a view of memory that it freed."""
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or x.is_meta or torch.compiler.is_compiling():
        return False
    return (x.dim() == 1 and hasattr(x, "_fsdp_flattened")) or (x.numel() > 0 and x.untyped_storage().size() == 0)


def _is_fsdp1_unit(layer: object) -> bool:
    return hasattr(layer, "_fsdp_wrapped_module")


def _has_forward_of(layer: torch.nn.Module, cls: type) -> bool:
    own = vars(layer)
    forward = own.get("_old_forward" if "_hf_hook" in own else "forward")  # accelerate's hooks wrap the layer's own
    if forward is not None and (getattr(forward, "__func__", None), getattr(forward, "__self__", None)) != (cls.forward, layer):
        return False
    return type(layer).forward is cls.forward


def _type_name(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"
