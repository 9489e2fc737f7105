"""A plugin of axolotl: fine-tuning and TRL's trainers without the logits.

    plugins:
      - fastpg.integrations.axolotl.FastpgPlugin

Fine-tuning (no `rl:`): the trainer's model computes its loss as under `fastpg.integrations.transformers.patch`, from the end
of the trainer's set-up to the end of training. With `rl:` the trainer is one of TRL's, and is given to `use_fastpg`.
"""

# ruff: noqa: E402 (axolotl is imported behind check_version, whose error names the versions)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .transformers import patch
from .versions import check_version

check_version("axolotl", "0.19.0", "0.19.0")

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

_ANOTHER_CROSS_ENTROPY = (
    "cut_cross_entropy",
    "chunked_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
)
_ANOTHER_LOSS = ("use_eaft", "orpo_alpha", "kd_trainer", "reward_model", "process_reward_model")
_LOGITS_WHILE_TRAINING = ("generate_samples", "do_causal_lm_eval", "do_bench_eval", "eval_table_size")
_SHARDED_BY_AXOLOTL = ("context_parallel_size", "tensor_parallel_size")


class FastpgArgs(BaseModel):
    """The keys that the plugin adds to axolotl's configuration."""

    fastpg_workspace: int | None = None  # bytes of transient memory, as in `linear_logprobs`
    fastpg_backend: str | None = None  # "torch" or "triton"; None: by the device


class FastpgPlugin(BasePlugin):
    """What axolotl calls, in its order: get_input_args, pre_model_load, post_trainer_create, post_train."""

    def __init__(self) -> None:
        super().__init__()
        self._undo: Callable[[], None] | None = None

    def get_input_args(self) -> str:
        return f"{__name__}.{FastpgArgs.__name__}"

    def pre_model_load(self, cfg: Any) -> None:
        """Raises ValueError for settings beside which the plugin would compute another loss, or fail while it trains."""
        for names, why in (
            (_ANOTHER_CROSS_ENTROPY, "fastpg computes the cross entropy: leave one of the two out"),
            (() if cfg.get("rl") else _ANOTHER_LOSS, "fastpg computes the cross entropy, and this is another loss"),
            (
                () if cfg.get("rl") else _LOGITS_WHILE_TRAINING,
                "logits and generation while it trains were not tried",
            ),
        ):
            for name in names:
                if cfg.get(name):
                    raise ValueError(f"FastpgPlugin cannot be used with {name}: {cfg.get(name)}; {why}")
        for name in _SHARDED_BY_AXOLOTL:
            if (cfg.get(name) or 1) > 1:
                raise ValueError(
                    f"FastpgPlugin wants sequences and lm_head that are whole on each rank; got {name}: {cfg.get(name)}"
                )

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Raises what `patch` or `use_fastpg` raises, and ValueError for a trainer that computes its loss from logits."""
        options = {"workspace": cfg.get("fastpg_workspace"), "backend": cfg.get("fastpg_backend")}
        self._restore()
        if cfg.get("rl"):
            from .trl import use_fastpg

            self._undo = use_fastpg(trainer, **options).undo
            return
        for name in ("label_smoother", "compute_loss_func"):
            if getattr(trainer, name, None) is not None:
                raise ValueError(
                    f"FastpgPlugin wants the loss of the model itself; {type(trainer).__name__} computes one from logits "
                    f"({name}={getattr(trainer, name)!r})"
                )
        self._undo = patch(trainer.model, **options).undo

    def post_train(self, cfg: Any, model: nn.Module) -> None:
        """The model has logits again. axolotl calls it twice."""
        self._restore()

    def _restore(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()
