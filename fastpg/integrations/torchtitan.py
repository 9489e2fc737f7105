"""fastpg in the place of torchtitan's `ChunkedLossWrapper`, for the losses that it wraps.

    loss=FastpgLoss.Config(loss_fn=CrossEntropyLoss.Config())      # was: ChunkedLossWrapper.Config(num_chunks=8, loss_fn=...)

torchtitan's trainers leave the lm_head out of the model's forward where the loss is a `ChunkedLossWrapper`, and hand the layer
to the loss (`set_lm_head`). The loss is called as `(hidden states, labels, global_valid_tokens, **loss_inputs)` and returns
`(loss, metrics)`. `FastpgLoss` is a subclass so that they do the same for it. It keeps nothing of the wrapper's computation.

The layer is called once, with the loss in the place of its forward, for the hooks of FSDP2 that reduce its gradient after the
backward. The gradients wait for the trainer's `backward`, in one autograd graph with the decoder's.
"""

# ruff: noqa: E402 (torchtitan is imported behind check_version, whose error names the versions)

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..linear.linear_cross_entropy import linear_cross_entropy
from ..linear.linear_policy_loss import linear_policy_loss
from ..lm_head import LMHead
from ..validation import is_dtensor
from .tensor_parallel import share_of_gradient
from .versions import check_version

check_version("torchtitan", "0.3.0", "0.3.0")

import spmd_types as spmd
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
from torchtitan.distributed.utils import get_spmd_backend

# Not imported: whoever uses them has imported them.
_DAPO, _CAST_LINEAR = "torchtitan.experiments.rl.losses.dapo", "torchtitan.experiments.rl.models.cast_linear"
_MAX_LOG_RATIO = 10.0  # torchtitan's bound of the log ratio before exp: tokens beyond it have no gradient


class FastpgLoss(ChunkedLossWrapper):
    """The loss `loss_fn` of the lm_head's logits, which are never built."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """loss_fn: CrossEntropyLoss.Config(), or GRPOLoss.Config(...) or DAPOLoss.Config(...) of torchtitan.experiments.rl.

        workspace: bytes of transient memory, in the place of num_chunks. None: the default of `linear_policy_loss`.
        backend: "torch" or "triton". None: by the device.
        check: False: the host reads nothing from the device, as CUDA graphs want, which torchtitan captures by default. True,
            beside training.disable_cuda_graphs: values are checked, and tokens that do not count cost no work.
        """

        loss_fn: BaseLoss.Config = field(default_factory=CrossEntropyLoss.Config)
        workspace: int | None = None
        backend: str | None = None
        check: bool = False

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        """compile_config is not used: the loss has no operations of its own that torch.compile could fuse."""
        self.loss_fn = config.loss_fn.build()
        self.lm_head = None
        self._compute = _computation_of(self.loss_fn)
        self._options = {"workspace": config.workspace, "backend": config.backend, "check": config.check}

    def set_lm_head(self, lm_head: torch.nn.Module) -> None:
        """Raises ValueError for a layer that is not linear, and for a backend of parallelism that fastpg does not serve."""
        if get_spmd_backend() == "full_dtensor":
            raise ValueError(
                'FastpgLoss wants parallelism.spmd_backend="spmd_types" or "partial_dtensor"; got "full_dtensor", where hidden '
                "states and losses are DTensors over all ranks"
            )
        self._fp32_head = _casts_to_fp32(lm_head)
        self.lm_head = lm_head

    def __call__(
        self,
        pred: torch.Tensor,  # (T, H), or (B, L, H) as in torchtitan 0.3.0
        labels: torch.Tensor,  # (T) or (B, L)
        global_valid_tokens: torch.Tensor | float | None = None,
        **loss_inputs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss over all of labels, divided by global_valid_tokens, and its metrics. pred: hidden states."""
        layer = self.lm_head
        if layer is None:
            raise ValueError("FastpgLoss has no lm_head: call set_lm_head(model.lm_head) before, as torchtitan's trainers do")

        def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = _Given(*_on_this_rank(hidden, layer, self._fp32_head), labels, global_valid_tokens, self._options)
            return self._compute(given, **loss_inputs)

        with spmd.no_typecheck(), _in_place_of_forward(layer, forward):
            if hasattr(layer, "unshard"):  # by FSDP2; explicitly, as torchtitan does for the sake of CUDA graphs
                layer.unshard()
            loss, *metrics = layer(pred)
            if hasattr(layer, "reshard") and not loss.requires_grad:  # else FSDP2 does after the backward
                layer.reshard()
        return loss, dict(zip(self._compute.metrics, metrics, strict=True))


class _Given(NamedTuple):
    """The arguments of a loss."""

    hidden: torch.Tensor
    head: LMHead
    labels: torch.Tensor
    count: torch.Tensor | float | None
    options: dict[str, Any]


class _CrossEntropy:
    metrics = ()

    def __call__(self, given: _Given, **loss_inputs: Any) -> tuple[torch.Tensor]:
        """loss_inputs, such as positions, are ignored, as torchtitan's CrossEntropyLoss does."""
        hidden, head, labels, count, options = given
        reduction = "sum" if count is None else "mean"
        return (linear_cross_entropy(hidden, head, labels, reduction=reduction, denominator=count, **options),)


@dataclass(frozen=True)
class _ClippedSurrogate:
    """DAPOLoss, of which GRPOLoss is the case of equal bounds."""

    lowest: float
    highest: float
    metrics = (
        "loss/mean",
        "loss/ratio_mean",
        "loss/ratio_clipped_frac",
        "bit_wise/logprob_diff/mean",
        "bit_wise/ratio_tokens_different/mean",
        "bit_wise/logprob_diff/max",
        "trainer/entropy/mean",
    )

    def __call__(
        self, given: _Given, *, generator_logprobs: torch.Tensor, advantages: torch.Tensor, loss_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """A token whose generator_logprobs is not finite does not count, as in torchtitan."""
        hidden, head, labels, count, options = given
        count = 1 if count is None else max(count, 1)
        mask = loss_mask & generator_logprobs.isfinite()
        out = linear_policy_loss(
            hidden, head, labels, generator_logprobs, advantages, objective=self._objective, mask=mask, denominator=count,
            outputs=("entropy",), **options,
        )  # fmt: skip
        difference = (out.logprobs - generator_logprobs).masked_fill(~mask, 0)
        ratio = self._ratio(difference)
        numbers = [
            ratio,
            ((ratio - self._clipped(ratio)).abs() > 1e-6).float(),
            difference,
            (difference.abs() > 1e-6).float(),
            out.statistics.entropy,
        ]
        ratios, clipped, differences, different, entropies = ((x * mask).sum() / count for x in numbers)
        largest = difference.abs().max()
        return out.loss, out.loss.detach(), ratios, clipped, differences, different, largest, entropies

    def _objective(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        ratio = self._ratio(logprobs - old_logprobs)
        return torch.min(ratio * advantages, self._clipped(ratio) * advantages)

    def _ratio(self, log_ratio: torch.Tensor) -> torch.Tensor:
        return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()

    def _clipped(self, ratio: torch.Tensor) -> torch.Tensor:
        return ratio.clamp(self.lowest, self.highest)


def _computation_of(loss_fn: BaseLoss) -> _CrossEntropy | _ClippedSurrogate:
    """What computes this loss. A subclass whose __call__ is its own is another loss."""
    dapo = getattr(sys.modules.get(_DAPO), "DAPOLoss", None)
    call = type(loss_fn).__call__
    if call is CrossEntropyLoss.__call__:
        return _CrossEntropy()
    if dapo is not None and call is dapo.__call__:
        return _ClippedSurrogate(1 - loss_fn.ratio_clip_low, 1 + loss_fn.ratio_clip_high)
    raise ValueError(
        f"FastpgLoss.Config(loss_fn=...) must be the config of CrossEntropyLoss, GRPOLoss or DAPOLoss; got that of "
        f"{type(loss_fn).__name__}: keep ChunkedLossWrapper for it"
    )


def _casts_to_fp32(layer: torch.nn.Module) -> bool:
    """Whether it multiplies in float32, as torchtitan's CastLinear does. Raises ValueError for other layers than these two."""
    forward = type(layer).forward
    own = "forward" in vars(layer) and not getattr(layer, "_parallelized", False)  # torchtitan's shards inputs and outputs
    if forward is torch.nn.Linear.forward and not own:
        return False
    cast = getattr(sys.modules.get(_CAST_LINEAR), "CastLinear", None)
    if cast is not None and forward is cast.forward and not own and layer.compute_dtype == torch.float32:
        return True
    raise ValueError(
        "FastpgLoss wants an lm_head that is a Linear of torchtitan's, or a CastLinear in float32; got "
        f"{type(layer).__module__}.{type(layer).__qualname__}, whose forward is another: keep ChunkedLossWrapper for it"
    )


@contextmanager
def _in_place_of_forward(layer: torch.nn.Module, forward: Callable) -> Iterator[None]:
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


def _on_this_rank(hidden: torch.Tensor, layer: torch.nn.Module, fp32_head: bool) -> tuple[torch.Tensor, LMHead]:
    """Hidden states and the head where the layer's weight is whole or this rank's rows of it, as within its forward."""
    weight, bias = layer.weight, layer.bias
    if is_dtensor(weight):
        if weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard(0):
            raise ValueError(
                "FastpgLoss wants an lm_head whose weight is whole, or sharded along its rows on the tp dimension alone; got "
                f"placements {weight.placements} on {weight.device_mesh}"
            )
        return hidden, LMHead(weight, bias, group=weight.device_mesh.get_group(), fp32_head=fp32_head)
    if get_spmd_backend() != "spmd_types" or spmd_mesh_size("tp") == 1:
        return hidden, LMHead(weight, bias, fp32_head=fp32_head)
    group = current_spmd_mesh().get_group("tp")
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    share = -(-layer.out_features // ranks)  # as torch.chunk cuts: the last ranks may have fewer
    if weight.shape[0] != min(share, layer.out_features - share * rank):
        raise ValueError(
            f"FastpgLoss wants {share} rows of the lm_head's {layer.out_features} on each of {ranks} ranks, fewer on the last; "
            f"rank {rank} has {weight.shape[0]}"
        )
    hidden = share_of_gradient(hidden, ranks)  # torchtitan sums over tp, and each rank has all of it
    return hidden, LMHead(weight, bias, group=group, vocab_start=share * rank, fp32_head=fp32_head)
