"""fastpg under TRL's trainers: unchanged SFT, DPO, KTO, GRPO, RLOO and others, with log-probabilities from `linear_logprobs`.

    trainer = GRPOTrainer(...)
    use_fastpg(trainer)
    trainer.train()

TRL (1.16 and later) replaces the forward of its policy and reference model. Called with `fused_lm_head=True` and `labels`, that
forward returns log-probabilities and statistics of each token, from which every loss is computed. `use_fastpg` puts one more
forward in front of it, on the model's instance. This one answers such calls and passes all others (generation) on to TRL's. It
runs in the place of TRL's, inside the model's wrappers, so that hooks of DDP, FSDP and DeepSpeed fire and adapters switch as
PEFT wants.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..linear.kept import Kept, kept
from ..linear.linear_logprobs import TokenLogprobs, linear_logprobs
from ..linear.outputs import TokenStatistics
from ..lm_head import LMHead, is_elsewhere, left_out
from ..loss.reductions import mean_of_kept
from ..validation import IGNORED_TOKEN
from .deepspeed import gather_for_backward, gathered, gathered_by_layer
from .placed import Placed, layers, placed_on

_NEEDED = "fastpg.integrations.trl needs trl >= 1.16, the first whose trainers call the model with fused_lm_head=True"
_TESTED = "1.16.0"  # the versions of TRL that the tests have run on, the oldest and the newest of them being one
# what TRL's head may be asked for beside log_probs: names of `linear_logprobs` too
_STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_TREE_ATTENTION = "tree_fa3"  # AsyncGRPOTrainer's: it wants further arguments, which describe packed rows
_ANSWERED = ("loss", "log_probs", *_STATISTICS, "label_mask", "aux_loss")


class FastpgHeads:
    """The forwards that `use_fastpg` placed. `undo()`, or the end of a `with` statement, removes them."""

    def __init__(self) -> None:
        self.models: list[nn.Module] = []
        self._placed: list[Placed] = []

    def undo(self) -> None:
        """Lets TRL's own heads answer again. Further calls do nothing.

        A forward that something has wrapped since (accelerate does, for mixed precision) stays, and passes all calls on.
        Warns if the lm_head has an adapter, because TRL's own head ignores it.
        """
        for placed in self._placed:
            placed.undo()
            if _has_adapter(placed.model):
                warnings.warn(
                    "TRL's own head computes from lm_head.weight alone: the adapter on the lm_head is ignored from here on",
                    stacklevel=2,
                )
        self.models, self._placed = [], []

    def __enter__(self) -> FastpgHeads:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def use_fastpg(trainer: Any, *, workspace: int | None = None, backend: str | None = None) -> FastpgHeads:
    """Makes a TRL trainer's models compute log-probabilities and their statistics by `linear_logprobs`.

        use_fastpg(trainer)
        trainer.train()

    The trainer is a constructed SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer, RLOOTrainer, or another one that uses TRL's
    fused head. Losses, masks, metrics and reference models remain the trainer's own. Logits are fp32 whatever the dtype of the
    model; TRL's own head rounds them to that dtype. cast_lm_head_to_fp32=True in the trainer's args, or a head that casts by
    itself, sets `LMHead`'s fp32_head.
    Only `forward` of the trainer's own models is changed, nothing global.

    Args:
        workspace: bytes of transient memory, as in `linear_logprobs`.
        backend: "torch" or "triton", as in `linear_logprobs`.

    Returns a handle with `undo()`, also a context manager.

    Log-probabilities are over the whole vocabulary, as TRL's own. If the trainer samples rollouts with top_p, top_k or min_p,
    their ratios to the sampler's log-probabilities are biased, and a UserWarning says so. The sets of tokens that the sampler
    kept (`fastpg.Support`) cannot be used here: a trainer of TRL 1.16 calls its model with token ids, masks, labels and images,
    and hands what else a rollout returns to the reward functions alone.

    For LoRA on the lm_head, which TRL's trainers refuse when built, see `build_trainer`.
    Under DeepSpeed's ZeRO-3 every rank has to call it, before `train`. It gathers one decoder layer at a time.

    Raises, before anything is changed:
        ImportError: trl is older than 1.16, or its head gives or takes other things than those that the tests have run on.
        TypeError, ValueError: the trainer's models have no fused head, or have fastpg's already; Liger is in use; the
            head is no linear layer; it has an adapter that `LMHead.from_model` cannot express in training mode, such as one
            with dropout; or it gives other log-probabilities than the policy's own forward on four tokens.
    """
    output = _output_class()
    _check_trainer(trainer)
    found = [(model, settings) for name in ("model", "ref_model") for model, settings in _fused_models(trainer, name)]
    if not found:
        raise ValueError(
            f"{type(trainer).__name__}'s models have no fused lm_head of TRL's; use_fastpg wants a trainer that has, such as "
            "SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer or RLOOTrainer"
        )
    _warn_of_sampling(trainer.args)
    heads = FastpgHeads()
    scorers = [_Scorer(settings, workspace, backend) for _, settings in found]
    for (model, _), scorer in zip(found, scorers, strict=True):
        _check_head(model)
        if model is found[0][0]:
            with trainer.accelerator.autocast(), gathered_by_layer(model), _attention_to_a_row(model):
                _check_against_own_logits(model, scorer)
    for (model, _), scorer in zip(found, scorers, strict=True):
        heads._placed.append(_place(model, scorer, output))
        heads.models.append(model)
    return heads


def build_trainer(
    trainer_class: type, model: nn.Module, *args: Any, workspace: int | None = None, backend: str | None = None, **kwargs: Any
) -> tuple[Any, FastpgHeads]:
    """(trainer, heads): `trainer_class(model, *args, **kwargs)`, given to `use_fastpg`. LoRA on the lm_head is allowed.

        config = LoraConfig(target_modules=["q_proj", "v_proj", "lm_head"])
        trainer, heads = build_trainer(GRPOTrainer, model, reward_funcs=..., args=..., train_dataset=..., peft_config=config)

    GRPOTrainer and RLOOTrainer refuse an adapter on the lm_head, because their own head would not train it. While one is
    constructed here, the model shows it the layer under the adapter. model: the loaded model, not a name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"build_trainer wants the model itself, loaded before; got {type(model).__name__}")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.get_output_embeddings = lambda: _linear_layer(type(base).get_output_embeddings(base))
    try:
        trainer = trainer_class(model, *args, **kwargs)
    finally:
        del base.get_output_embeddings
    return trainer, use_fastpg(trainer, workspace=workspace, backend=backend)


class _Settings(NamedTuple):
    """The options that the trainer gave TRL's fused head."""

    temperature: float
    cast_lm_head_to_fp32: bool
    outputs: tuple[str, ...]


class _Scorer(NamedTuple):
    settings: _Settings
    workspace: int | None
    backend: str | None

    def __call__(
        self, model: nn.Module, hidden: torch.Tensor, tokens: torch.Tensor, rows: Kept | None = None
    ) -> TokenLogprobs | TokenStatistics:
        """Scores tokens (B, T) given hidden (B, T, H). The head is read at each call, as PEFT and FSDP replace its tensors."""
        head = LMHead.from_model(model, fp32_head=self.settings.cast_lm_head_to_fp32)
        device = head.weight.device
        return linear_logprobs(
            hidden.to(device),
            head,
            tokens.to(device),
            mask=rows if rows is not None and tokens.device == device else None,
            temperature=self.settings.temperature,
            outputs=[name for name in _STATISTICS if name in self.settings.outputs],
            workspace=self.workspace,
            backend=self.backend,
        )


def _place(model: nn.Module, scorer: _Scorer, output: type) -> Placed:
    def answer(model: nn.Module, below: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not kwargs.pop("fused_lm_head", False):
            return below(*args, **kwargs)
        return _answer(model, scorer, output, args, kwargs)

    return Placed(model, answer)


def _answer(model: nn.Module, scorer: _Scorer, output: type, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The output of TRL's fused forward for the same arguments: see `trl.trainer.utils.add_fused_lm_head`."""
    labels, shift_labels, count = (kwargs.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch"))
    kwargs["use_cache"] = False
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    tokens = shift_labels
    if shift_labels is None:  # all states are scored, the last with no token, since a slice of them would be a copy
        tokens = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED_TOKEN)], 1)
    rows = kept(tokens != IGNORED_TOKEN)  # the host waits before the model runs
    backbone = model.base_model(*args, **kwargs)
    parameters = [*model.get_output_embeddings().parameters()]
    gather_for_backward(model, parameters)
    with gathered(parameters):
        found = scorer(model, backbone.last_hidden_state, tokens, rows)
    per_token = {"log_probs": found.logprobs} | {
        name: getattr(found, name) for name in _STATISTICS if name in scorer.settings.outputs
    }
    per_token["label_mask"] = tokens.to(found.logprobs.device) != IGNORED_TOKEN
    if shift_labels is None:
        per_token = {name: x[:, :-1] for name, x in per_token.items()}
    log_probs, mask = per_token["log_probs"], per_token["label_mask"]
    count = count.to(log_probs.device) if isinstance(count, torch.Tensor) else count
    loss = mean_of_kept(-log_probs, mask, count)  # 0 without a label; TRL's is 0 / 0 if the count is 0
    aux_loss = None
    if kwargs.get("output_router_logits"):
        aux_loss = _load_balancing_loss(model, backbone.router_logits, kwargs.get("attention_mask"))
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    return output(loss=loss, aux_loss=aux_loss, **per_token)


def _load_balancing_loss(model: nn.Module, router_logits: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # TRL uses it for every family

    config = model.config.get_text_config()
    experts = config.num_experts if hasattr(config, "num_experts") else model.num_experts
    return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, attention_mask)


def _output_class() -> type:
    import trl

    try:
        from trl.trainer.utils import FusedCausalLMOutput
    except ImportError as error:
        raise ImportError(f"{_NEEDED}; found trl {trl.__version__}") from error
    fields = {field.name for field in dataclasses.fields(FusedCausalLMOutput)}
    if fields != set(_ANSWERED):
        raise ImportError(
            f"the output of trl {trl.__version__}'s fused lm_head differs from that of {_TESTED}, which fastpg answers, in "
            f"{', '.join(sorted(fields ^ set(_ANSWERED)))}: use that version"
        )
    return FusedCausalLMOutput


def _check_trainer(trainer: Any) -> None:
    if not all(hasattr(trainer, name) for name in ("model", "args", "accelerator")):
        raise TypeError(f"use_fastpg wants a trainer of TRL's; got {type(trainer).__name__}")
    if getattr(trainer.args, "use_liger_kernel", False):
        raise ValueError("use_liger_kernel=True patches the model when training starts, and would drop fastpg's head; use one")


def _warn_of_sampling(args: Any) -> None:
    further = getattr(args, "generation_kwargs", None)
    further = further if isinstance(further, dict) else {}
    top_p, top_k, min_p = (further.get(name, getattr(args, name, None)) for name in ("top_p", "top_k", "min_p"))
    on = {
        "top_p": top_p if top_p is not None and top_p < 1 else None,
        "top_k": top_k if top_k is not None and top_k > 0 else None,  # vLLM knows -1 beside 0
        "min_p": min_p or None,
    }
    given = ", ".join(f"{name}={value}" for name, value in on.items() if value is not None)
    if given:
        warnings.warn(
            f"with {given} rollouts are sampled from some tokens of the vocabulary, but the trainer's log-probabilities are "
            "over all of it, so that ratios to the sampler's log-probabilities are biased. TRL hands no sets of kept tokens to "
            "its models. Sample from the whole vocabulary, or write the step with fastpg.integrations.transformers."
            "token_logprobs, whose support= takes the sets as a fastpg.Support",
            stacklevel=3,
        )


def _fused_models(trainer: Any, name: str) -> Iterator[tuple[nn.Module, _Settings]]:
    """The models whose forward is TRL's fused one, inside any wrapper (PEFT, DDP, FSDP, engines), with their settings."""
    wrapped = getattr(trainer, name, None)
    for module in () if wrapped is None else wrapped.modules():
        if "forward" not in vars(module):
            continue
        if placed_on(module.forward):  # by use_fastpg, or by integrations.transformers
            raise ValueError(f"the trainer's {name} has fastpg's head already; undo that one before placing another")
        settings = next((s for s in map(_settings_of, layers(module.forward)) if s is not None), None)
        if settings is not None:
            yield module, settings


def _settings_of(function: Any) -> _Settings | None:
    """Read from the closure of TRL's fused forward, as it keeps them nowhere else. None for any other function.

    This function and `_output_class` are all that knows TRL's contract.
    """
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None or function.__globals__.get("__name__") != "trl.trainer.utils":
        return None
    values = {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
    try:
        settings = _Settings(*(values[name] for name in _Settings._fields))
    except KeyError as error:
        raise ImportError(f"{_NEEDED}; the installed version's fused forward has no {error}") from error
    unknown = sorted(set(settings.outputs) - {"log_probs", *_STATISTICS})
    if unknown:
        raise ImportError(
            f"the trainer asks its lm_head for {', '.join(unknown)}, which trl {_TESTED} did not know: use that version"
        )
    return settings


def _linear_layer(layer: Any) -> Any:
    """The layer under PEFT's wrappers."""
    layer = getattr(layer, "original_module", layer)
    return getattr(layer, "base_layer", layer)


def _has_adapter(model: nn.Module) -> bool:
    return hasattr(model.get_output_embeddings(), "base_layer")


def _check_head(model: nn.Module) -> None:
    """Checks that the head can be read in training mode, where an adapter's dropout is refused as it would be ignored."""
    if model.base_model is model:
        raise ValueError(f"{type(model).__name__} has no backbone of its own (base_model), whose hidden states fastpg needs")
    layer = model.get_output_embeddings() or nn.Identity()  # from_model refuses None
    training = layer.training
    try:
        layer.train()
        with gathered(layer.parameters()):
            if not is_elsewhere(layer):  # a reference that FSDP1 has sharded
                LMHead.from_model(model)
    finally:
        layer.train(training)


@contextmanager
def _attention_to_a_row(model: nn.Module) -> Iterator[None]:
    """Within the context the model can be called with a row of tokens alone. Its lm_head does not depend on its attention."""
    config = model.config.get_text_config()
    own = getattr(config, "_attn_implementation", None)
    if own != _TREE_ATTENTION:
        yield
        return
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = own


@torch.no_grad()
def _check_against_own_logits(model: nn.Module, scorer: _Scorer) -> None:
    """Compares the model's own logits of four tokens, scaled and capped by it, with fastpg's head on the same states."""
    states = []
    hook = model.base_model.register_forward_hook(lambda module, args, result: states.append(result[0]))
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(min(4, model.config.get_text_config().vocab_size), device=device)[None]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout may draw random numbers
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    # Under autocast accelerate may have widened rounded logits to fp32. 2e-3: an fp32 model may be multiplied in TF32.
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else logits.dtype
    rounding = max(8 * torch.finfo(dtype).eps, 2e-3)
    logits = logits.float()
    unlikely = logits.masked_fill(logits.isinf(), 0).argmin(-1)  # any factor or cap changes their log-probabilities
    own = (logits / scorer.settings.temperature).log_softmax(-1).gather(-1, unlikely[..., None])[..., 0]
    ours = scorer(model, states[0], unlikely).logprobs.to(own.device)
    largest = float(logits[logits.isfinite()].abs().max()) / scorer.settings.temperature
    tolerance = rounding * largest + 1e-5
    if not torch.allclose(ours, own, rtol=0, atol=tolerance):
        bare = dataclasses.replace(LMHead.from_model(model), softcap=None, logit_scale=1.0)
        products = linear_logprobs(states[0], bare, unlikely, temperature=scorer.settings.temperature).logprobs.to(own.device)
        if torch.allclose(products, own, rtol=0, atol=tolerance) and left_out(model):
            raise ValueError(f"{left_out(model)}, or keep TRL's own head, which reads that configuration")
        raise ValueError(
            f"{type(model).__name__}'s own logits are not those of LMHead.from_model on its hidden states: log-probabilities "
            f"differ by {float((ours - own).abs().max()):.3g}; the model does something between them that fastpg does not know"
        )
