"""A callback of ms-swift: fine-tuning without the logits. Importing this module registers it under the name "fastpg".

    swift sft --external_plugins fastpg_plugin.py --callbacks fastpg ...      # the file: import fastpg.integrations.swift

While its `Seq2SeqTrainer` trains, the model computes its loss as under `fastpg.integrations.transformers.patch`.
"""

# ruff: noqa: E402 (swift is imported behind check_version, whose error names the versions)

from __future__ import annotations

from typing import Any

from .transformers import Patch, patch
from .versions import check_version

check_version("ms-swift", "4.6.0", "4.6.0")

from swift.callbacks import TrainerCallback, callbacks_map

# Settings of a trainer's args beside which its loss or its generation wants logits: names, and what they may be.
_WITHOUT_LOGITS = {
    "enable_dft_loss": (False, None),
    "enable_channel_loss": (False, None),
    "predict_with_generate": (False, None),
    "use_liger_kernel": (False, None),
    "use_logits_to_keep": (False, None),
    "label_smoothing_factor": (0, None),
}


class FastpgCallback(TrainerCallback):
    """Patches the trainer's model when training begins, and takes the patch off when it ends."""

    def __init__(self, args: Any, trainer: Any) -> None:
        """Raises ValueError for another trainer, and for settings beside which the trainer would want logits."""
        from swift.trainers import Seq2SeqTrainer  # which cannot be imported while plugins are

        super().__init__(args, trainer)
        self._patch: Patch | None = None
        if getattr(type(trainer), "compute_loss", None) is not Seq2SeqTrainer.compute_loss:
            raise ValueError(
                "--callbacks fastpg wants the trainer of swift sft and swift pt, Seq2SeqTrainer; got "
                f"{type(trainer).__name__}, which computes its loss from logits"
            )
        for name, wanted in _WITHOUT_LOGITS.items():
            given = getattr(args, name, None)
            if given not in wanted:
                raise ValueError(f"--callbacks fastpg leaves no logits, and --{name} {given} wants them: set it to {wanted[0]}")
        args.use_logits_to_keep = False  # None would cut the labels: fastpg's rows are those of the labels that count anyway

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises ValueError for a trainer that computes its loss from logits, and what `patch` raises."""
        trainer = self.trainer
        if getattr(trainer, "compute_loss_func", None) is not None:
            raise ValueError(
                f"--callbacks fastpg wants the loss of the model itself; the trainer has {trainer.compute_loss_func!r}, of "
                "--loss_type: leave it out"
            )
        template = trainer.template
        binary = template.is_binary_loss_scale
        if not (template.loss_scale.is_binary_loss_scale if binary is None else binary):
            raise ValueError(
                "--callbacks fastpg wants labels that weigh 1 or are ignored; --loss_scale has given them other weights, by "
                "which the trainer multiplies losses that it computes from logits"
            )
        ranks = template.sequence_parallel_size
        if ranks > 1:
            raise ValueError(
                f"--callbacks fastpg wants sequences that are whole on each rank; got --sequence_parallel_size {ranks}"
            )
        self._patch = patch(trainer.model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._patch is not None:
            self._patch.undo()


callbacks_map["fastpg"] = FastpgCallback
