"""What a kernel's launcher would launch: it is called on tensors without memory, and its launch is noted and not run.

The sizes are those of a common model: H and strides are divisible by 16, which Triton detects at launch, and without which it
vectorises nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch

from .variants import DTYPES, MULTIPLIES, OBJECTIVES, WHOLE_LOSS, Variant

# rows of a chunk (no multiple of 16), vocabulary of a head (that no tile divides: so more is masked), vocabulary of a slice of
# it, hidden size, LoRA's rank
_ROWS, _VOCAB, _SLICE, _SIZE, _RANK = 1000, 128_272, 8192, 2048, 8


def launched(variant: Variant) -> tuple[object, list[object], dict[str, int]]:
    """(kernel, arguments in the order of its parameters, compiler options) that the variant's launcher launches."""
    from triton.runtime.jit import KernelInterface

    found = []

    def noted(kernel: object, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **named: found.append((kernel, arguments, named))

    with mock.patch.object(KernelInterface, "__getitem__", noted):
        _launch(variant)
    ((kernel, arguments, named),) = [launch for launch in found if launch[0].fn.__name__ == f"{variant.kernel}_kernel"]
    bound = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    options = {name: value for name, value in bound.items() if name not in kernel.arg_names}
    return kernel, [bound[name] for name in kernel.arg_names], options


def _launch(variant: Variant) -> None:
    """Calls the variant's launcher on tensors without memory."""
    from ..kernels.anchored_exp import anchored_exp
    from ..kernels.dlogits import Incoming, Statistics, dlogits
    from ..kernels.logsumexp import Running, combine, finished, logsumexp
    from ..kernels.operands import Operands
    from ..kernels.scale import scale as scale_gradients
    from ..kernels.selective import ready_logits, selective_dlogits, selective_logsumexp
    from ..kernels.target import target_logits

    dtype, flags = DTYPES[variant.dtype], variant.flags
    vocab = _SLICE if variant.kernel == "dlogits" else _VOCAB
    entropy, inner = "entropy" in flags, 0.5 if "softcap" in flags else None

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def vector(present: bool = True) -> torch.Tensor | None:
        return meta(_ROWS) if present else None

    lora = (meta(_ROWS, _RANK), meta(vocab, _RANK, dtype=dtype)) if "lora" in flags else None
    bias = meta(vocab, dtype=dtype) if "bias" in flags else None
    scale = vector() if "temperature" in flags else 1.0
    tokens = meta(_ROWS, dtype=torch.int64)
    size = 2 * _SIZE if "persistent" in flags else _SIZE
    sets = meta(_ROWS, vocab // 8, dtype=torch.uint8) if "support" in flags else None
    p = Operands(meta(_ROWS, size, dtype=dtype), meta(vocab, size, dtype=dtype), lora, bias, tokens, scale, inner, sets)
    blocks = _blocks_of(variant, size)
    statistics = Statistics(vector(), vector(entropy), vector(), vector(), vector(entropy))
    unit = vector(variant.kernel == "dlogits" and dtype == torch.float16)
    incoming = Incoming(vector(), vector(entropy), unit, vector("logsumexp" in flags), vector("mean_logits" in flags))

    if variant.kernel in ("keep", "summary", "policy_loss", "gathered_dots", "run_sums", "sum_further"):
        _launch_without_tiles(variant, meta)
    elif variant.kernel == "target":
        target_logits(p, vector("anchor" in flags))
    elif variant.kernel == "anchored_exp":
        exps, further = meta(_ROWS, vocab, dtype=dtype) if "exps" in flags else None, _further(flags, vector(), (_ROWS, 501))
        anchored_exp(p, vector(), entropy, exps, blocks, further)
    elif variant.kernel == "finish":
        _launch_finish(variant, meta)
    elif variant.kernel == "logsumexp":
        logsumexp(p, entropy, blocks, _further(flags, vector(), (_ROWS, 63)))
    elif variant.kernel == "combine":
        parts = Running(meta(_ROWS, 63), meta(_ROWS, 63), meta(_ROWS, 63) if entropy else None)
        sums = _further(flags, vector(), (_ROWS, 63)), _further(flags, vector(), (_ROWS,))
        finished(parts, vector(), *sums) if "finish" in flags else combine(parts, *sums)
    elif variant.kernel == "dlogits":
        dlogits(p, statistics, incoming, meta(_ROWS, vocab, dtype=dtype), blocks)
    elif variant.kernel == "gradient_rows":
        _launch_gradient_rows(p, flags, meta)
    elif variant.kernel == "scale":
        scale_gradients([meta(_ROWS, _SIZE, dtype=dtype), meta(vocab, _SIZE, dtype=dtype)], meta())
    else:
        logits = meta(_ROWS, vocab, dtype=dtype)
        ready = ready_logits(logits, meta(_ROWS, dtype=torch.bool), tokens, vector("temperature" in flags), sets)
        if variant.kernel == "selective_logsumexp":
            selective_logsumexp(ready, entropy)
        else:
            selective_dlogits(ready, statistics, incoming, meta(_ROWS, vocab, dtype=dtype))


def _blocks_of(variant: Variant, size: int) -> object:
    """As `triton_tiles` chooses them."""
    from ..kernels.blocks import blocks_for

    kernel = variant.kernel if variant.kernel in MULTIPLIES else MULTIPLIES[0]  # others have none
    flags = variant.flags
    is_heavy = "softcap" in flags or (kernel == "anchored_exp" and "statistics" in flags)
    return blocks_for(variant.target, DTYPES[variant.dtype], "bias" in flags, is_heavy, kernel, size)


def _further(flags: tuple[str, ...], target: torch.Tensor, shape: tuple[int, ...]) -> object:
    """Every further statistic, of splits or of rows (without keys); nothing without that flag."""
    from ..kernels.row_statistics import NOTHING, Further, empty_further, kept

    keys = 0 if len(shape) == 1 else kept(8 if "top_k" in flags else 1)
    return empty_further(target, shape, keys, Further(None, True, True, True, target)) if "statistics" in flags else NOTHING


def _launch_gradient_rows(p: object, flags: tuple[str, ...], meta: Callable[..., torch.Tensor]) -> None:
    from ..kernels.gradient_rows import HiddenRows, WeightedRows, gradient_rows

    dtype, vocab = p.hidden.dtype, len(p.weight)
    rows, residual = meta(_ROWS, _SIZE, dtype=dtype), None if dtype == torch.float32 else meta(_ROWS)
    places = p.tokens if "places" in flags else None
    hidden = HiddenRows(meta(_ROWS, _SIZE), residual, p.tokens, p.weight, vocab, _SIZE, 1, places, rows, _SIZE)
    gradient_rows(
        meta(_ROWS), HiddenRows() if "frozen_hidden" in flags else hidden,
        WeightedRows() if "frozen_weight" in flags else WeightedRows(p.hidden, _SIZE, rows), _ROWS, _SIZE,
    )  # fmt: skip


def _launch_finish(variant: Variant, meta: Callable[..., torch.Tensor]) -> None:
    from ..kernels.anchored_exp import TileSums
    from ..kernels.finish import Terms, Tokens, finish, finish_with_loss

    dtype, flags, tiles = DTYPES[variant.dtype], variant.flags, 501
    exps = meta(_ROWS, _VOCAB, dtype=dtype) if "exps" in flags else None
    rounds = exps is not None and dtype != torch.float32

    def vector(present: bool = True) -> torch.Tensor | None:
        return meta(_ROWS) if present else None

    sums = TileSums(
        meta(_ROWS, tiles), meta(_ROWS, tiles) if "entropy" in flags else None, meta(_ROWS, tiles) if rounds else None, exps,
        None if exps is None else _VOCAB,
    )  # fmt: skip
    has_temperature = "temperature" in flags
    tokens = Tokens(meta(_ROWS, dtype=torch.int64), None, vector(has_temperature), None if has_temperature else 1.0)
    if not set(flags) & set(OBJECTIVES):
        finish(sums, tokens)
        return
    masked = meta(_ROWS, dtype=torch.uint8) if flags == WHOLE_LOSS else None
    finish_with_loss(sums, tokens, Terms(masked, *_loss_terms(flags, meta)), _loss(flags))


def _loss(flags: tuple[str, ...]) -> object:
    from ..kernels import objectives

    (objective,), whole = (getattr(objectives, name) for name in flags if name in OBJECTIVES), flags == WHOLE_LOSS
    kl = next((getattr(objectives, name) for name in flags if name.startswith("kl")), None)
    bounds, ratio_range = objectives.bounds_of(objective, (0.8, 1.2, 3.0)), objectives.RatioRange(0.8, 1.2)
    of_kl = None if kl is None else 0.1, whole, 20.0 if whole else None
    return objectives.Loss(objective, bounds, kl, *of_kl, whole, ratio_range)


def _loss_terms(flags: tuple[str, ...], meta: Callable[..., torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """Old log-probabilities, advantages, weights, rollout weights, reference. Without all flags one weight serves all rows."""
    whole, has_kl = flags == WHOLE_LOSS, any(name.startswith("kl") for name in flags)
    return (
        meta(_ROWS), meta(_ROWS), meta(_ROWS) if whole else meta(), meta(_ROWS) if whole else None,
        meta(_ROWS) if has_kl else None,
    )  # fmt: skip


def _launch_gathered(variant: Variant, meta: Callable[..., torch.Tensor]) -> None:
    from ..kernels.gathered import gathered_dots, run_sums

    dtype = DTYPES[variant.dtype]
    entries, hidden, weight = (
        meta(8 * _ROWS, dtype=torch.int64), meta(_ROWS, _SIZE, dtype=dtype), meta(_VOCAB, _SIZE, dtype=dtype)
    )  # fmt: skip
    if variant.kernel == "gathered_dots":
        gathered_dots(hidden, entries, weight, entries)
    else:
        adds = "add" in variant.flags
        run_sums(meta(8 * _ROWS), entries, weight, entries, meta(_ROWS, _SIZE) if adds else hidden, adds)


def _launch_without_tiles(variant: Variant, meta: Callable[..., torch.Tensor]) -> None:
    from ..kernels.keep import Factors, Tokens, keep
    from ..kernels.policy_loss import policy_loss
    from ..kernels.row_statistics import sum_further
    from ..kernels.summary import FIELDS, summary

    flags = variant.flags
    mask = meta(_ROWS, dtype=torch.uint8)
    if variant.kernel == "keep":
        temperature = meta(_ROWS) if "temperature" in flags else None
        factors = Factors(meta(_ROWS), meta(_ROWS), meta(_ROWS), meta()) if "skip" in flags else Factors()
        ids = meta(_ROWS, dtype=torch.int64)
        keep(Tokens(ids, mask, temperature, 1), factors, ids if "rows" in flags else None, _VOCAB)
    elif variant.kernel in ("gathered_dots", "run_sums"):
        _launch_gathered(variant, meta)
    elif variant.kernel == "sum_further":
        statistics = ("statistics",)
        further, sums = (_further(statistics, meta(_ROWS), shape) for shape in ((_ROWS, 501), (_ROWS,)))
        sum_further(further, sums, _ROWS, 501)
    elif variant.kernel == "summary":
        summary(meta(FIELDS, 250), "entropy" in flags)
    else:
        policy_loss(meta(_ROWS), mask, _loss_terms(flags, meta), _loss(flags))
