"""The loss types of TRL's trainers that are run with fastpg's head and with TRL's own; the guide's table is made of them."""

GRPO_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
DPO_LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
    "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
SFT_LOSSES = ["nll", "dft"]
KTO_LOSSES = ["kto", "apo_zero_unpaired"]


def table() -> str:
    """The trainers and loss types, as rows of the guide."""
    rows = {
        "SFTTrainer": (SFT_LOSSES, "entropy, is_top1"),
        "DPOTrainer": (DPO_LOSSES, "entropy, mean_logits, is_top1; with `use_weighting` log_sum_sq_probs"),
        "KTOTrainer": (KTO_LOSSES, "entropy, mean_logits"),
        "GRPOTrainer": (GRPO_LOSSES, "entropy"),
        "RLOOTrainer": ([], "entropy"),
        "AsyncGRPOTrainer": ([], "entropy"),
    }
    lines = ["| trainer | `loss_type` | reads beside log-probabilities |", "|---|---|---|"]
    lines += [f"| {name} | {', '.join(losses) or 'has none'} | {reads} |" for name, (losses, reads) in rows.items()]
    return "\n".join(lines) + "\n"
