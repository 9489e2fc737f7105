"""fastpg under SkyRL: the log-probabilities of its policy and reference workers, for FSDP and for Megatron.

    trainer.override_entrypoint=fastpg.integrations.skyrl

With FSDP, SkyRL's `HFModelWrapper` calls a model for its logits. `use_fastpg` gives one wrapper a forward without logits. With
Megatron, SkyRL has a fused log-probability of its own (trainer.fused_lm_head_logprob=true). `replace_fused_lm_head` replaces
the function that it ends in. `with_fastpg` makes a worker class do one or the other; `main` starts SkyRL with such workers.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import torch

from ..linear.linear_logprobs import linear_logprobs
from ..validation import IGNORED_TOKEN
from .tensor_parallel import share_of_rank
from .versions import check_version

_TESTED = "0.3.0", "0.3.0"
_WORKERS = {"fsdp": "FSDP", "megatron": "Megatron"}  # trainer.strategy -> how the names of its worker classes begin
_PACKAGE = "skyrl.backends.skyrl_train"


def use_fastpg(
    wrapper: torch.nn.Module,
    *,
    fp32_head: bool = False,
    workspace: int | None = None,
    backend: str | None = None,
    check: bool = True,
) -> None:
    """Makes one `HFModelWrapper` compute log-probabilities and entropies of actions without the logits.

    The forward has SkyRL's arguments and results, with sample packing and sequence parallelism too. Only the tokens of the last
    num_actions columns that attention_mask keeps are computed: log-probabilities of others, and entropies of the output at
    others, are 0. The output has no logits. Softcap, logit scale, bias and LoRA of the lm_head are read as the model has them.

    Args:
        wrapper: the model of a policy or reference worker, before or after FSDP wraps the transformers model in it.
        fp32_head, workspace, backend, check: as in `fastpg.integrations.transformers.patched`.

    Raises ImportError without SkyRL, and TypeError or ValueError for what is no such wrapper, for a vision model, for a model
    that fastpg does not understand, and where it was called before. Warns (UserWarning) of a version that was not tested.
    """
    from .transformers import patched

    check_version("skyrl", *_TESTED)
    if not all(hasattr(wrapper, name) for name in ("model", "remove_microbatch_padding", "sequence_parallel_size", "is_vlm")):
        raise TypeError(f"use_fastpg wants SkyRL's HFModelWrapper; got {type(wrapper).__name__}")
    if wrapper.is_vlm:
        raise ValueError(
            "use_fastpg does not know the positions of SkyRL's vision models; set trainer.policy.language_model_only=true, or "
            "keep SkyRL's own logits"
        )
    if "forward" in vars(wrapper):
        raise ValueError("this HFModelWrapper has a forward of its own already; call use_fastpg once")
    options = {"fp32_head": fp32_head, "workspace": workspace, "backend": backend, "check": check}
    with patched(wrapper.model, **options):
        pass  # for its errors
    wrapper.forward = functools.partial(_forward, wrapper, options)


def _forward(
    wrapper: Any,
    options: dict[str, Any],
    sequences: torch.Tensor,  # (B, S)
    num_actions: int | list[int],
    attention_mask: torch.Tensor,  # (B, S)
    *,
    temperature: float = 1.0,
    return_output: bool = False,
    compute_entropy: bool = False,
    entropy_requires_grad: bool = True,
    pixel_values: None = None,
    image_grid_thw: None = None,
    mm_token_type_ids: None = None,
) -> Any:
    """`HFModelWrapper.forward` for text: log-probabilities (B, num_actions), and the output with entropies (B, S)."""
    from .transformers import patched

    if pixel_values is not None or image_grid_thw is not None or mm_token_type_ids is not None:
        raise ValueError("pixel_values, image_grid_thw and mm_token_type_ids must be None: the model has no vision encoder")
    if isinstance(num_actions, list):
        if len(num_actions) != 1:
            raise ValueError(f"num_actions must be one number for the batch; got {num_actions}")
        num_actions = num_actions[0]
    real, ranks = attention_mask != 0, wrapper.sequence_parallel_size
    wanted = real & real.roll(-1, 1)
    wanted[:, : -num_actions - 1] = wanted[:, -1:] = False
    labels = sequences.roll(-1, 1).masked_fill(~wanted, IGNORED_TOKEN)
    positions = (real.long().cumsum(1) - 1).masked_fill(~real, 1)
    mask = attention_mask
    if wrapper.remove_microbatch_padding:
        sequences, positions, labels, mask = sequences[real][None], positions[real][None], labels[real][None], None
    padding = 0
    if ranks > 1:
        ulysses = importlib.import_module(f"{_PACKAGE}.distributed.ulysses.utils")
        labels = torch.nn.functional.pad(labels, (0, -labels.shape[1] % ranks), value=IGNORED_TOKEN)
        labels = ulysses.slice_input_tensor(labels, dim=1, padding=False)
        sequences, positions, mask, padding = ulysses.ulysses_pad_and_slice_inputs(sequences, positions, mask, ranks)
    with patched(wrapper.model, temperature=temperature, entropy=compute_entropy, **options):
        out = wrapper.model(sequences, attention_mask=mask, position_ids=positions, shift_labels=labels)

    def whole(x: torch.Tensor) -> torch.Tensor:
        if ranks > 1:
            x = ulysses.gather_outputs_and_unpad(x, gather_dim=1, unpad_dim=1, padding_size=padding)
        return x.new_zeros(real.shape).masked_scatter(real, x) if wrapper.remove_microbatch_padding else x

    if compute_entropy:
        out["entropy"] = whole(out.entropy if entropy_requires_grad else out.entropy.detach())
    logprobs = whole(out.log_probs)[:, -num_actions - 1 : -1]
    return (logprobs, out) if return_output else logprobs


def fused_lm_head_logprob(
    backend: str,
    hidden: torch.Tensor,  # (B, S, H)
    weight: torch.Tensor,  # (V / ranks, H): this rank's rows
    target: torch.Tensor,  # (B, S)
    vocab_start_index: int,
    *others: Any,
) -> torch.Tensor:
    """Log-probabilities (B, S) of targets: SkyRL's `_fused_lm_head_logprob_apply`, with its nine arguments in order.

    others: vocab_end_index and chunk_size, which are not needed, the process group of tensor parallelism, and inference_only.
    backend, SkyRL's own choice, is not read either. Each rank returns 1 / ranks of the gradient of hidden, as SkyRL's ranks
    return parts that sum to it. A target of -100 has log-probability 0.
    """
    _, _, group, inference_only = others
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
        share, head = share_of_rank(hidden.to(weight.dtype), weight, group, vocab_start_index)
        return linear_logprobs(share, head, target).logprobs


def replace_fused_lm_head() -> None:
    """Replaces the function that SkyRL's fused log-probability ends in under Megatron, in this process.

    It takes effect with trainer.fused_lm_head_logprob=true, whatever fused_lm_head_logprob_backend is. The entropy that SkyRL
    then logs remains its own. Raises ImportError without SkyRL.
    """
    check_version("skyrl", *_TESTED)
    importlib.import_module(f"{_PACKAGE}.distributed.megatron.model_utils")._fused_lm_head_logprob_apply = fused_lm_head_logprob


def with_fastpg(worker_class: type) -> type:
    """A subclass of a policy or reference worker of SkyRL's, such as `FSDPPolicyWorkerBase`, that computes with fastpg.

        PolicyWorker = ray.remote(num_gpus=1)(with_fastpg(FSDPPolicyWorkerBase))

    Its init_model raises ValueError for Megatron without trainer.fused_lm_head_logprob=true, and as `use_fastpg` does.
    """

    class Worker(worker_class):  # type: ignore[misc, valid-type]
        def init_model(self, *args: Any, **kwargs: Any) -> Any:
            megatron = self.cfg.strategy == "megatron"
            if megatron:
                if not self.cfg.fused_lm_head_logprob:
                    raise ValueError("trainer.fused_lm_head_logprob must be true with Megatron; got false")
                replace_fused_lm_head()
            result = super().init_model(*args, **kwargs)
            if not megatron:
                use_fastpg(self.model)
            return result

    Worker.__name__, Worker.__qualname__ = worker_class.__name__, worker_class.__qualname__
    return Worker


def main() -> None:
    """SkyRL's own entry point with fastpg in policy and reference workers, where trainer.override_entrypoint is this module."""
    import ray
    from skyrl.train.config import SkyRLTrainConfig
    from skyrl.train.utils import validate_cfg
    from skyrl.train.utils.utils import initialize_ray

    check_version("skyrl", *_TESTED)
    cfg = SkyRLTrainConfig.from_cli_overrides([x for x in sys.argv[1:] if not x.startswith("trainer.override_entrypoint=")])
    validate_cfg(cfg)
    initialize_ray(cfg)
    ray.get(ray.remote(num_cpus=1)(_train).remote(cfg))


def _train(cfg: Any) -> None:
    import ray
    from skyrl.train.entrypoints.main_base import BasePPOExp

    strategy = cfg.trainer.strategy
    workers = importlib.import_module(f"{_PACKAGE}.workers.{strategy}.{strategy}_worker")
    for name in ("PolicyWorker", "RefWorker"):  # BasePPOExp takes them from the module
        own = getattr(workers, f"{_WORKERS[strategy]}{name}Base")
        setattr(workers, name, ray.remote(num_gpus=1)(with_fastpg(own)))
    BasePPOExp(cfg).run()
