"""SFTTrainer, DPOTrainer and KTOTrainer of TRL, three steps on a tiny model, with fastpg's head and with TRL's own."""

# ruff: noqa: E402 (imports behind importorskip)

import inspect
import re

import datasets
import pytest
import torch
from pages import PAGES

pytest.importorskip("trl.trainer.utils", reason="needs the extra [trl]")
peft = pytest.importorskip("peft")

import trl
import trl.trainer.utils as trl_utils
import trl_cases
from tiny_trl import tiny_model

from fastpg.integrations.trl import build_trainer, use_fastpg

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

STEPS = 3
GUIDES = PAGES / "guides.md"
PROMPTS = ["w3 w4 w5", "w6 w7", "w8", "w9 w10 w11 w12", "w13 w14", "w15"]
GOOD = [" w16 w17 <eos>", " w18", " w19 w20 w21", " w22 <eos>", " w23 w24", " w25 w26 w27 <eos>"]
BAD = [" w30", " w31 w32 <eos>", " w33", " w34 w35 w36", " w37 <eos>", " w38 w39"]
ROWS = {
    trl.SFTTrainer: {"prompt": PROMPTS, "completion": GOOD},
    trl.DPOTrainer: {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD},
    trl.KTOTrainer: {"prompt": PROMPTS, "completion": GOOD[:3] + BAD[3:], "label": [True] * 3 + [False] * 3},
}
CONFIGS = {trl.SFTTrainer: trl.SFTConfig, trl.DPOTrainer: trl.DPOConfig, trl.KTOTrainer: trl.KTOConfig}


@pytest.fixture
def make_offline(tokenizer, tmp_path):
    def make(trainer_class, build=None, peft_config=None, **settings):
        options = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no",
            "disable_tqdm": True, "logging_steps": 1, "seed": 3, "max_steps": STEPS, "per_device_train_batch_size": 3,
            "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant",
        }  # fmt: skip
        model = tiny_model()
        reference = {} if trainer_class is trl.SFTTrainer or peft_config is not None else {"ref_model": tiny_model()}
        if reference:
            torch.nn.init.normal_(reference["ref_model"].lm_head.weight, std=0.3)  # not the policy itself
        return (build or trainer_class)(
            model, args=CONFIGS[trainer_class](**{**options, **settings}), processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_dict(ROWS[trainer_class]), peft_config=peft_config, **reference,
        )  # fmt: skip

    return make


def run(trainer):
    """(what was logged at each step, the parameters at the end)"""
    trainer.train()
    clocks = ("runtime", "per_second", "step_time", "flos")
    logs = [{k: v for k, v in entry.items() if not any(c in k for c in clocks)} for entry in trainer.state.log_history]
    return logs, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


CASES = [
    *((trl.SFTTrainer, {"loss_type": x}) for x in trl_cases.SFT_LOSSES),
    (trl.SFTTrainer, {"gradient_accumulation_steps": 2}),
    (trl.SFTTrainer, {"completion_only_loss": False}),
    *((trl.DPOTrainer, {"loss_type": x}) for x in trl_cases.DPO_LOSSES),
    (trl.DPOTrainer, {"loss_type": "sigmoid", "use_weighting": True}),
    (trl.DPOTrainer, {"loss_type": "sigmoid", "precompute_ref_log_probs": True}),
    *((trl.KTOTrainer, {"loss_type": x}) for x in trl_cases.KTO_LOSSES),
]
NEEDED = {"exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}


@pytest.mark.parametrize(("trainer_class", "settings"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_trains_as_with_trls_head(make_offline, calls, monkeypatch, trainer_class, settings):
    settings = {**NEEDED.get(settings.get("loss_type"), {}), **settings}
    theirs = run(make_offline(trainer_class, **settings))
    assert not calls
    trainer = make_offline(trainer_class, **settings)
    models = use_fastpg(trainer, backend="torch").models
    assert models[0] is trainer.model
    assert len(models) == 1 + (trainer_class is not trl.SFTTrainer)
    monkeypatch.delattr(trl_utils, "_ChunkedLogProbFunction")
    ours = run(trainer)
    assert len(ours[0]) == len(theirs[0]) == STEPS + 1
    for our_log, their_log in zip(ours[0], theirs[0], strict=True):
        assert our_log == pytest.approx(their_log, abs=1e-5, rel=1e-5, nan_ok=True)
    for name, parameter in ours[1].items():
        assert torch.allclose(parameter, theirs[1][name], rtol=1e-5, atol=1e-5), name
    assert any(not torch.equal(parameter, x) for parameter, x in zip(ours[1].values(), tiny_model().parameters(), strict=True))
    assert len(calls) >= STEPS


def test_lora_on_the_lm_head_of_sft(make_offline, calls):
    """Which SFTTrainer itself refuses."""
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    heads = []

    def build(model, **options):
        trainer, placed = build_trainer(trl.SFTTrainer, model, **options)
        heads.append(placed)
        return trainer

    trainer = make_offline(trl.SFTTrainer, build=build, peft_config=lora)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lm_head.lora" in name}
    trainer.train()
    assert heads[0].models
    assert before
    assert all(not torch.equal(dict(trainer.model.named_parameters())[name], p) for name, p in before.items())


@pytest.mark.parametrize("trainer_class", [trl.SFTTrainer, trl.DPOTrainer])
def test_prompt_tuning(make_offline, calls, trainer_class):
    """Labels of virtual tokens come first, and TRL cuts them as it does with its own head."""
    settings = {"peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    theirs = run(make_offline(trainer_class, **settings))
    trainer = make_offline(trainer_class, **settings)
    use_fastpg(trainer, backend="torch")
    ours = run(trainer)
    for our_log, their_log in zip(ours[0], theirs[0], strict=True):
        assert our_log == pytest.approx(their_log, abs=1e-5, rel=1e-5, nan_ok=True)
    for name, parameter in ours[1].items():
        assert torch.allclose(parameter, theirs[1][name], rtol=1e-5, atol=1e-5), name
    assert calls


@pytest.mark.parametrize(
    ("trainer_class", "losses"),
    [(trl.SFTTrainer, trl_cases.SFT_LOSSES), (trl.DPOTrainer, trl_cases.DPO_LOSSES), (trl.KTOTrainer, trl_cases.KTO_LOSSES)],
)
def test_every_loss_type_is_tested(trainer_class, losses):
    named = set(re.findall(r'loss_type (?:==|in) [\[(]?"(\w+)"', inspect.getsource(trainer_class)))
    assert named == set(losses)


def test_every_loss_type_of_grpo_is_tested():
    """As the documentation of its configuration lists them."""
    _, _, after = trl.GRPOConfig.__doc__.partition("loss_type (`str`")
    text, _, _ = after.partition("(`")
    assert set(re.findall(r'- `"(\w+)"`', text)) == set(trl_cases.GRPO_LOSSES)


def test_the_guides_table_is_of_what_is_run():
    assert f"<!-- trl -->\n{trl_cases.table()}<!-- /trl -->" in GUIDES.read_text()
