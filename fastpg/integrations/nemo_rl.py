"""NeMo-RL's fused log-probabilities (policy.megatron_cfg.use_fused_linear_logprobs) on fastpg.

from fastpg.integrations.nemo_rl import use_fastpg
use_fastpg(policy_config)     # in the process of each policy worker, before the model runs
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..linear.linear_logprobs import linear_logprobs
from ..lm_head import LMHead
from ..validation import IGNORED_TOKEN
from .versions import check_version

# Of nemo-rl. Its main branch of August 2026 calls itself 0.6.0, as does a release whose function has another argument.
OLDEST, NEWEST = "0.6.0", "0.7.0"


def use_fastpg(policy_config: Mapping[str, Any]) -> None:
    """Puts `from_parallel_hidden_states_to_logprobs` in the place of NeMo-RL's, in this process.

    Its GPTModel.forward with fused log-probabilities then computes them by fastpg: in training, for old and for reference
    log-probabilities.

    policy_config: the `policy` of NeMo-RL's configuration, from which settings are read that fused log-probabilities cannot
        express.

    Raises ImportError where nemo-rl is absent or has no such function with these arguments. Raises ValueError where the setting
    is off that makes NeMo-RL call it, or where temperature, top_k, top_p or context parallelism ask for something else. Warns
    (UserWarning) of a version that was not tested.
    """
    _check(policy_config)
    check_version("nemo-rl", OLDEST, NEWEST)
    from nemo_rl.distributed import model_utils

    ours = inspect.signature(from_parallel_hidden_states_to_logprobs).parameters
    theirs = getattr(model_utils, "from_parallel_hidden_states_to_logprobs", None)
    if theirs is None or list(inspect.signature(theirs).parameters) != list(ours):
        raise ImportError(
            f"nemo_rl.distributed.model_utils must have from_parallel_hidden_states_to_logprobs({', '.join(ours)}); the "
            "installed nemo-rl has not. Release 0.7.0 and the main branch of August 2026 have"
        )
    model_utils.from_parallel_hidden_states_to_logprobs = from_parallel_hidden_states_to_logprobs


def _check(policy: Mapping[str, Any]) -> None:
    megatron, sampling = policy.get("megatron_cfg") or {}, policy.get("generation") or {}
    names = ("use_fused_linear_logprobs", "use_linear_ce_fusion_loss")  # of the main branch, of 0.7
    if not megatron.get("enabled") or not any(megatron.get(name) for name in names):
        raise ValueError(
            "policy.megatron_cfg must have enabled and use_fused_linear_logprobs (0.7: use_linear_ce_fusion_loss) true: else "
            "NeMo-RL computes log-probabilities of ready logits, and fastpg would not be called"
        )
    ranks = megatron.get("context_parallel_size", 1)
    if ranks != 1:
        raise ValueError(f"policy.megatron_cfg.context_parallel_size must be 1 with fused log-probabilities; got {ranks}")
    for name, neutral in (("temperature", (1, None)), ("top_k", (None, -1)), ("top_p", (1, None))):
        given = sampling.get(name)
        if given not in neutral:
            raise ValueError(
                f"policy.generation.{name} must be {neutral[0]} with fused log-probabilities; got {given!r}. They are those of "
                "all logits as they are, and NeMo-RL divides the log-probabilities themselves by a temperature"
            )


def from_parallel_hidden_states_to_logprobs(
    tensor_parallel_hidden_states: torch.Tensor,  # (S, B, H), or this rank's (S / ranks, B, H) under sequence parallelism
    output_weight_layer: torch.Tensor,  # (V, H), or this rank's rows of it
    runtime_gather_output: bool | None,
    target: torch.Tensor,  # (B, S)
    *,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: dist.ProcessGroup | None,
    inference_only: bool = False,
    cp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Log-probabilities (B, S - 1) of target[:, 1:], without the logits; as nemo_rl/distributed/model_utils.py.

    Float32, differentiable in hidden states and weight. Column t belongs to target[:, t + 1], of which the state at t is.
    Packed sequences (1, S) are one row: where another begins, its first token is predicted by the one before it, as in
    NeMo-RL, whose callers leave these out. A target of -100, which NeMo-RL does not have, has log-probability 0 and gradient 0.

    Ranks of tp_group hold hidden states of S / ranks positions each, in rank order, and as many rows of the weight. The results
    are the same on all. Each rank gets the whole gradient of its positions and rows. None: the default group, if there is one.

    runtime_gather_output, chunk_size: NeMo-RL's function ignores the one; fastpg's workspace stands for the other.
    inference_only: the result has no gradient, and nothing is kept for one.

    Raises ValueError for a cp_group of several ranks, as NeMo-RL does, for vocab_end_index - vocab_start_index other than the
    rows of the weight, and for shapes that do not fit.
    """
    if cp_group is not None and dist.get_world_size(cp_group) != 1:
        raise ValueError(f"cp_group must have one rank: context parallelism is not served; got {dist.get_world_size(cp_group)}")
    rows, hidden = len(output_weight_layer), tensor_parallel_hidden_states
    if vocab_end_index - vocab_start_index != rows:
        raise ValueError(
            f"vocab_start_index and vocab_end_index must enclose the {rows} rows of output_weight_layer; got "
            f"{vocab_start_index} and {vocab_end_index}"
        )
    ranks = dist.get_world_size(tp_group) if dist.is_initialized() else 1
    if hidden.dim() != 3 or target.shape != (hidden.shape[1], hidden.shape[0] * ranks):
        raise ValueError(
            f"tensor_parallel_hidden_states must be (S / ranks, B, H) and target (B, S) on {ranks} ranks; got "
            f"{tuple(hidden.shape)} and {tuple(target.shape)}. Several ranks need policy.megatron_cfg.sequence_parallel=true"
        )
    head = LMHead(output_weight_layer)
    if ranks > 1:
        group = dist.group.WORLD if tp_group is None else tp_group
        head = LMHead(output_weight_layer, group=group, vocab_start=vocab_start_index)
    tokens = target.roll(-1, 1)
    tokens[:, -1] = IGNORED_TOKEN  # a token that nothing predicts; its column is dropped
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
        if ranks > 1:
            hidden = _WholeSequence.apply(hidden, group)
        return linear_logprobs(hidden, head, tokens.T).logprobs.T[:, :-1]


class _WholeSequence(torch.autograd.Function):
    """The hidden states of all ranks. fastpg's gradient of them is complete on each, so each takes that of its own."""

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group, ctx.length = group, len(hidden)
        whole = hidden.new_empty(len(hidden) * dist.get_world_size(group), *hidden.shape[1:])
        dist.all_gather([*whole.chunk(dist.get_world_size(group))], hidden.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx, grad):
        return grad.narrow(0, dist.get_rank(ctx.group) * ctx.length, ctx.length), None
