"""What `fastpg compile-report` compiles: kernels, GPU targets, dtypes, and flags (the options that a kernel is called with)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# target -> (backend, architecture, warp size, shared memory of a program in bytes, its matrix instructions)
TARGETS = {
    "cuda:80": ("cuda", 80, 32, 166_912, r"mma\.sync"),
    "cuda:90": ("cuda", 90, 32, 232_448, r"wgmma\.mma_async"),
    "cuda:100": ("cuda", 100, 32, 232_448, r"tcgen05\.mma"),
    "hip:gfx942": ("hip", "gfx942", 64, 65_536, r"v_mfma"),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

OBJECTIVES = ("reinforce", "importance_weighted", "cispo", "ppo_clip", "sapo", "dppo_tv", "dppo_kl", "icepop")
# kernel -> the dtypes it is called with, and its optional features (flags)
KERNELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "keep": (("float32",), ("skip", "rows", "temperature")),
    "target": (("bfloat16", "float16", "float32"), ("anchor", "bias", "softcap", "lora", "temperature")),
    "anchored_exp": (("bfloat16", "float32"), ("exps", "bias", "softcap", "entropy", "lora", "temperature")),
    "finish": (("bfloat16", "float32"), ("exps", "entropy", *OBJECTIVES)),
    "summary": (("float32",), ("entropy",)),
    "logsumexp": (("bfloat16", "float16", "float32"), ("bias", "softcap", "entropy", "lora", "temperature")),
    "combine": (("float32",), ("entropy", "finish")),
    "sum_further": (("float32",), ()),
    "dlogits": (("bfloat16", "float16", "float32"), ("bias", "softcap", "entropy", "lora", "temperature")),
    "gradient_rows": (("bfloat16", "float32"), ("frozen_weight", "frozen_hidden", "places")),
    "scale": (("bfloat16", "float32"), ()),
    "policy_loss": (("float32",), ("cispo",)),
    "gathered_dots": (("bfloat16", "float32"), ()),
    "run_sums": (("bfloat16", "float32"), ("add",)),
    "selective_logsumexp": (("bfloat16", "float16", "float32"), ("entropy", "temperature")),
    "selective_dlogits": (("bfloat16", "float16", "float32"), ("entropy", "temperature")),
}
MULTIPLIES = ("anchored_exp", "logsumexp", "dlogits")
# combinations of flags of `finish`, beside each flag alone
_WITH_KL = [("cispo", "kl_k1"), ("cispo", "kl_k2"), ("cispo", "kl_k3")]
WHOLE_LOSS = ("exps", "entropy", "ppo_clip", "kl_k3", "temperature")
# beside each flag alone and all: sets of a support; every further statistic, with the argmax or with the most of the largest
# logits; and gradients of the logsumexp and of the mean logit
_ALL = ("bias", "softcap", "entropy", "lora", "temperature")
_PERSISTENT = ((), ("entropy",), ("lora",), ("temperature",))
_FURTHER = {
    ("anchored_exp", "bfloat16"): [
        ("exps", "support"), ("exps", *_ALL, "support"), ("exps", "statistics"), ("exps", *_ALL, "statistics", "top_k"),
        ("exps", *_ALL, "statistics", "top_k", "support"),
    ],
    ("anchored_exp", "float32"): [("exps", *_ALL, "support"), ("exps", *_ALL, "statistics", "top_k", "support")],
    ("logsumexp", "bfloat16"): [
        ("support",), ("statistics",), (*_ALL, "statistics", "top_k"), (*_ALL, "statistics", "top_k", "support")
    ],
    ("logsumexp", "float32"): [(*_ALL, "statistics", "top_k"), (*_ALL, "statistics", "top_k", "support")],
    ("combine", "float32"): [("statistics",), ("entropy", "finish", "statistics")],
    ("dlogits", "bfloat16"): [
        ("support",), (*_ALL, "logsumexp", "mean_logits"), (*_ALL, "logsumexp", "mean_logits", "support")
    ],
    ("dlogits", "float32"): [(*_ALL, "support")],
    ("selective_logsumexp", "bfloat16"): [("support",)],
    ("selective_dlogits", "bfloat16"): [("support",)],
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    kernel: str
    target: str
    dtype: str
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([self.kernel, self.target, self.dtype, *(self.flags or ["plain"])])


def variants(kernels: list[str] | None = None, targets: list[str] | None = None) -> Iterator[Variant]:
    """Every kernel, target, dtype and combination of flags that is compiled. "plain" has no flag.

    combine          plain, entropy, finish, both; with further statistics
    finish           bf16: plain, each flag alone, the KL estimators and a whole loss; fp32: a whole loss
    gradient_rows    plain, and in bf16 each flag alone
    policy_loss      CISPO, and a whole loss
    anchored_exp     as other kernels; with further statistics and sets of a support; on sm_90 also the persistent tile
    logsumexp        as other kernels; also with further statistics, and with sets of a support
    dlogits          as other kernels; also with sets of a support, and with gradients of the logsumexp and of the mean logit
    other kernels    plain, in bf16 each flag alone but temperature, all flags
    """
    for kernel in kernels or KERNELS:
        dtypes, flags = KERNELS[kernel]
        for target in targets or TARGETS:
            for dtype in dtypes:
                alone = [(flag,) for flag in flags if flag != "temperature"] if dtype == "bfloat16" else []
                chosen = [(), *alone, flags]
                if kernel == "combine":
                    chosen = [(), ("entropy",), ("finish",), flags]
                elif kernel == "gradient_rows":
                    chosen = [(), *alone]
                elif (kernel, target, dtype) == ("anchored_exp", "cuda:90", "bfloat16"):
                    chosen += [("persistent", "exps", *more) for more in _PERSISTENT]
                elif kernel == "policy_loss":
                    chosen = [("cispo",), WHOLE_LOSS]
                elif kernel == "finish":
                    chosen = [(), *alone, *_WITH_KL, WHOLE_LOSS] if alone else [WHOLE_LOSS]
                chosen += _FURTHER.get((kernel, dtype), [])
                yield from (Variant(kernel, target, dtype, combination) for combination in dict.fromkeys(chosen))
