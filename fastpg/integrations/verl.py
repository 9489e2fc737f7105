"""fastpg under verl: its fused log-probabilities and entropies, for FSDP and for Megatron.

    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.external_lib=fastpg.integrations.verl_fused

verl calls a model with `temperature`, and takes log_probs and entropy from what it returns. `use_fastpg` puts a forward in
front of one model's, which answers such calls and passes all others on. It runs inside the wrappers of PEFT and FSDP, which
verl puts around the model later. `replace_fused_kernels` does so for every model that verl would give a forward of its own.
Under Megatron verl's forwards stay, and call the `linear_cross_entropy` of this file.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist

from ..linear.linear_logprobs import linear_logprobs
from ..lm_head import LMHead
from .tensor_parallel import share_of_rank
from .versions import check_version

REDUCTIONS = ("none", "sum", "mean")
_TESTED = "0.6.0", "0.9.1"
_FUSED_FORWARDS = ("forward_with_torch_backend", "forward_with_triton_backend")  # verl's, which it sets on the model's class
_KERNEL = "verl.utils.kernel.linear_cross_entropy"
_CALLERS = (
    "verl.models.mcore.model_forward_fused",
    "verl.models.mcore.model_forward_1f1b_overlap",
)  # which import its function


def use_fastpg(
    model: torch.nn.Module,
    *,
    fp32_head: bool = False,
    workspace: int | None = None,
    backend: str | None = None,
    check: bool = True,
) -> None:
    """Makes one model answer verl's fused calls: log-probabilities and entropies of tokens, without the logits.

    A call with `temperature` (a number, or a tensor with the shape of the labels) returns a `HeadlessOutput`, whose log_probs
    and entropy are float32 (B, T). A value stands at the state that predicts its token. Other calls are the model's own.
    shift_labels (B, T) are the tokens that the states predict. Where they are not given, labels, or else input_ids, move by one
    position as in verl: the last state of a row predicts the row's first token. -100 is no token: its values are 0.

    Softcap, logit scale, bias and LoRA of the lm_head are part of the distribution. verl's own backends multiply by
    lm_head.weight alone. Only the forward of this instance is replaced; verl replaces that of the class.

    Args:
        model: a transformers causal language model, before verl wraps it. Its class must not have verl's fused forward.
        fp32_head, workspace, backend, check: as in `fastpg.integrations.transformers.patched`.

    Raises ImportError without verl, and TypeError or ValueError for a model that fastpg does not understand, such as a critic,
    or that has this forward already. Warns (UserWarning) of a version of verl that was not tested.
    """
    from .peft import causal_lm
    from .transformers import patched

    check_version("verl", *_TESTED)
    lm, options = causal_lm(model), {"fp32_head": fp32_head, "workspace": workspace, "backend": backend, "check": check}
    if getattr(type(lm).forward, "__name__", "") in _FUSED_FORWARDS:
        raise ValueError(
            f"{type(lm).__name__}.forward is verl's {type(lm).forward.__name__}, which calls no lm_head; use_fastpg must come "
            "before verl's patch: set external_lib=fastpg.integrations.verl_fused, or leave use_fused_kernels off"
        )
    own = lm.forward
    if hasattr(own, "fastpg_answers"):
        raise ValueError(f"this {type(lm).__name__} has fastpg's forward already; call use_fastpg once")
    with patched(lm, **options):
        pass  # for its errors

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if "temperature" not in kwargs:  # also where `patched` calls this forward from within `_answer`
            return own(*args, **kwargs)
        return _answer(lm, options, args, kwargs)

    forward.fastpg_answers = True
    lm.forward = forward


def _answer(lm: Any, options: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    from .transformers import patched

    temperature, labels, shifted = (kwargs.pop(name, None) for name in ("temperature", "labels", "shift_labels"))
    if shifted is None:
        ids = labels if labels is not None else kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ValueError("one of shift_labels, labels and input_ids must be given; got none")
        if _ulysses_ranks() > 1:
            raise ValueError(
                f"shift_labels must be given where {_ulysses_ranks()} ranks share a sequence: the token after a rank's last is "
                "another rank's. verl gives them since 0.8; with an older one set ulysses_sequence_parallel_size=1"
            )
        shifted = ids.roll(-1, -1)
    with patched(lm, temperature=temperature, entropy=True, **options):
        return lm.forward(*args, shift_labels=shifted, **kwargs)


def _ulysses_ranks() -> int:
    ulysses = sys.modules.get("verl.utils.ulysses")  # verl has imported it before it makes groups
    return 1 if ulysses is None else ulysses.get_ulysses_sequence_parallel_world_size()


def replace_fused_kernels(**options: Any) -> None:
    """Replaces verl's fused kernels in this process: models that verl builds from here on with use_fused_kernels=True.

    With FSDP, `use_fastpg` is called with `options` in the place of verl's patch_forward_with_backends, whatever impl_backend
    is, and the classes of models keep their forward. With Megatron, the `linear_cross_entropy` of this file takes the place of
    verl's. Nothing else of verl is changed.

    Warns (UserWarning) where verl builds a language model without use_fused_kernels, as it then computes logits. verl's engines
    veomni, automodel and torchtitan call neither function.

    Raises ImportError without verl.
    """
    check_version("verl", *_TESTED)
    monkey_patch = importlib.import_module("verl.models.transformers.monkey_patch")
    own = monkey_patch.patch_forward_with_backends

    @functools.wraps(own)
    def patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend=None):
        if use_fused_kernels:
            use_fastpg(model, **options)
            return
        if getattr(model, "get_output_embeddings", lambda: None)() is not None:  # not a critic's
            said = (
                "use_fused_kernels is off, so that verl computes the logits and fastpg is not used: set it beside external_lib"
            )
            warnings.warn(said, stacklevel=2)
        own(model, use_fused_kernels, fused_kernels_backend)

    monkey_patch.patch_forward_with_backends = patch_forward_with_backends
    importlib.import_module(_KERNEL).linear_cross_entropy = linear_cross_entropy
    for name in _CALLERS:  # those that are imported later find the replaced function
        if name in sys.modules:
            sys.modules[name].linear_cross_entropy = linear_cross_entropy


def linear_cross_entropy(
    hidden: torch.Tensor,  # (..., H)
    weight: torch.Tensor,  # (V, H), or this rank's rows of it
    labels: torch.Tensor,  # (...)
    temperature: float | torch.Tensor | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the labels and entropies, without the logits; as verl/utils/kernel/linear_cross_entropy.py.

    hidden (..., H) is flattened to N tokens, as in verl. Returns (logprobs, entropy), float32, differentiable in hidden and
    weight. entropy is (N,). logprobs (log-probabilities, not losses) are (N,), or with reduction "sum" or "mean" their sum or
    mean over all N. A label of -100, which verl does not have, has log-probability and entropy 0 and counts in the mean.
    Without tokens the mean is 0.

    dist_process_group: the ranks hold V rows each of the whole vocabulary, in rank order, as Megatron shards it. fastpg's own
        gradient of hidden is complete on every rank. Here each rank returns 1 / ranks of it, since Megatron's regions around
        the call sum it over the group, as with verl.

    Raises TypeError or ValueError for arguments that do not fit, as `linear_logprobs` does, and for another reduction.
    """
    reduction = "none" if reduction is None else reduction.lower()
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "none", "sum" or "mean"; got {reduction!r}')
    head = LMHead(weight)
    if dist_process_group is not None:
        start = dist.get_rank(dist_process_group) * len(weight)
        hidden, head = share_of_rank(hidden, weight, dist_process_group, start)
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if isinstance(temperature, torch.Tensor) and temperature.dim() > 0:
        temperature = temperature.reshape(-1)
    temperature = 1.0 if temperature is None else temperature
    logprobs, entropy = linear_logprobs(hidden, head, labels, temperature=temperature, entropy=True)
    if reduction == "none":
        return logprobs, entropy
    total = logprobs.sum()
    return total if reduction == "sum" else total / max(len(logprobs), 1), entropy
