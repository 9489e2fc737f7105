"""The plugin of axolotl and the callback of ms-swift: training with and without them, and what they refuse.

axolotl's plugin is tested on its real base class where that is installed, and always on one with the same hooks. ms-swift
imports too much to be installed here: its registry of callbacks and its trainer have stand-ins.
"""

import importlib
import sys
import types
from importlib import metadata

import pytest
import torch
from raising import said

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("pydantic")

VERSIONS = {"axolotl": "0.19.0", "ms-swift": "4.6.0"}


class BasePlugin:
    """axolotl's, by its documentation: hooks that do nothing."""

    def get_input_args(self):
        pass

    def pre_model_load(self, cfg):
        pass

    def post_trainer_create(self, cfg, trainer):
        pass

    def post_train(self, cfg, model):
        pass


class TrainerCallback(transformers.TrainerCallback):
    """ms-swift's, which is made with the trainer's arguments and the trainer."""

    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer


class Seq2SeqTrainer(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As ms-swift's, where labels are the model's: the mean of a micro-batch, times its share of the labels."""
        outputs = model(**inputs)
        loss = outputs["loss"] * ((inputs["labels"][:, 1:] != -100).sum() / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def stand_in(monkeypatch, name, **contents):
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def imported_anew(monkeypatch, name):
    """The adapter, imported beside the modules that are there now; forgotten after the test."""
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def pretend_installed(monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: VERSIONS.get(name) or version(name))


@pytest.fixture(params=["axolotl's own base class", "a base class with its hooks"])
def axolotl(request, monkeypatch):
    if request.param == "axolotl's own base class":
        pytest.importorskip("axolotl.integrations.base")
    else:
        pretend_installed(monkeypatch)
        stand_in(monkeypatch, "axolotl")
        stand_in(monkeypatch, "axolotl.integrations")
        stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=BasePlugin)
    return imported_anew(monkeypatch, "fastpg.integrations.axolotl")


@pytest.fixture
def swift(monkeypatch):
    pretend_installed(monkeypatch)
    stand_in(monkeypatch, "swift")
    stand_in(monkeypatch, "swift.callbacks", TrainerCallback=TrainerCallback, callbacks_map={})
    stand_in(monkeypatch, "swift.trainers", Seq2SeqTrainer=Seq2SeqTrainer)
    return imported_anew(monkeypatch, "fastpg.integrations.swift")


def trainer_of(folder, trainer_class=transformers.Trainer, dtype=torch.float32, **settings):
    """Two steps of two micro-batches, whose numbers of labels differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=61, initializer_range=0.2, **sizes)).to(dtype)
    ids = torch.randint(0, 61, (8, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(12) < torch.arange(8)[:, None] + 2, -100)
    options = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "sgd",
        "learning_rate": 0.5, "lr_scheduler_type": "constant", "logging_steps": 1, "seed": 3,
    }  # fmt: skip
    return trainer_class(
        model=model,
        args=transformers.TrainingArguments(**options | settings),
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}),
    )


def trained(trainer):
    """(losses and gradient norms by step, the trained weights)"""
    trainer.train()
    logged = [(entry["loss"], float(entry["grad_norm"])) for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(logged), {name: p.detach().float() for name, p in trainer.model.named_parameters()}


def check_same(got, want, dtype):
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(got[0], want[0], **tolerance)
    assert len(got[0]) == 2
    for name, weight in want[1].items():
        torch.testing.assert_close(got[1][name], weight, **tolerance, msg=name)


def logits_of(model):
    with torch.no_grad():
        ids = torch.ones(1, 3, dtype=torch.int64)
        return model(input_ids=ids, labels=ids).logits


class Seen(transformers.TrainerCallback):
    """Whether the model has logits while it trains."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.logits = logits_of(model)


# ---- axolotl


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_axolotls_fine_tuning_is_the_same_with_the_plugin(axolotl, tmp_path, dtype):
    want = trained(trainer_of(tmp_path, dtype=dtype))
    trainer, plugin, seen = trainer_of(tmp_path, dtype=dtype), axolotl.FastpgPlugin(), Seen()
    plugin.pre_model_load({})
    plugin.post_trainer_create({"fastpg_backend": "torch"}, trainer)
    trainer.add_callback(seen)
    check_same(trained(trainer), want, dtype)
    assert seen.logits is None
    for _ in range(2):  # axolotl calls it twice
        plugin.post_train({}, trainer.model)
        assert logits_of(trainer.model).shape == (1, 3, 61)


def test_options_reach_fastpg(axolotl, tmp_path):
    plugin, trainer = axolotl.FastpgPlugin(), trainer_of(tmp_path)
    plugin.post_trainer_create({"fastpg_workspace": 1}, trainer)
    with pytest.raises(ValueError, match="workspace=1 bytes is too small"):
        trainer.train()


def test_axolotl_finds_the_keys_of_the_configuration(axolotl):
    module, _, name = axolotl.FastpgPlugin().get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(module), name)
    assert arguments(fastpg_workspace=1 << 20).model_dump() == {"fastpg_workspace": 1 << 20, "fastpg_backend": None}
    with pytest.raises(ValueError, match="fastpg_workspace"):
        arguments(fastpg_workspace="much")


def test_trainers_of_trl_are_given_to_use_fastpg(axolotl):
    pytest.importorskip("trl", minversion="1.16")
    from tiny_trl import fused, stub, tiny_model

    model, plugin = fused(tiny_model()), axolotl.FastpgPlugin()
    of_trl = model.forward
    plugin.pre_model_load({"rl": "grpo", "generate_samples": True})
    plugin.post_trainer_create({"rl": "grpo", "fastpg_workspace": 1 << 24}, stub(model))
    assert model.forward.fastpg_placed.on
    plugin.post_train({"rl": "grpo"}, model)
    assert model.forward == of_trl


ANOTHER = "fastpg computes the cross entropy, and this is another loss"
CONFIGURATIONS = {
    "cut_cross_entropy: True; fastpg computes the cross entropy: leave one of the two out": {"cut_cross_entropy": True},
    "chunked_cross_entropy: True; fastpg computes the cross entropy: leave one of the two out": {"chunked_cross_entropy": True},
    "liger_cross_entropy: True; fastpg computes the cross entropy: leave one of the two out": {
        "liger_cross_entropy": True, "rl": "dpo",
    },
    "liger_fused_linear_cross_entropy: True; fastpg computes the cross entropy: leave one of the two out": {
        "liger_fused_linear_cross_entropy": True,
    },
    f"use_eaft: True; {ANOTHER}": {"use_eaft": True},
    f"orpo_alpha: 0.1; {ANOTHER}": {"orpo_alpha": 0.1},
    f"kd_trainer: True; {ANOTHER}": {"kd_trainer": True},
    f"reward_model: True; {ANOTHER}": {"reward_model": True},
    f"process_reward_model: True; {ANOTHER}": {"process_reward_model": True},
    "generate_samples: True; logits and generation while it trains were not tried": {"generate_samples": True},
    "do_causal_lm_eval: True; logits and generation while it trains were not tried": {"do_causal_lm_eval": True},
    "do_bench_eval: True; logits and generation while it trains were not tried": {"do_bench_eval": True},
    "eval_table_size: 5; logits and generation while it trains were not tried": {"eval_table_size": 5},
}  # fmt: skip


@pytest.mark.parametrize("words", CONFIGURATIONS)
def test_settings_of_axolotl_that_are_refused(axolotl, words):
    plugin = axolotl.FastpgPlugin()
    text = said(lambda: plugin.pre_model_load(CONFIGURATIONS[words]))
    assert text == f"ValueError: FastpgPlugin cannot be used with {words}"


@pytest.mark.parametrize("name", ["context_parallel_size", "tensor_parallel_size"])
def test_parallelism_of_axolotls_that_is_refused(axolotl, name):
    plugin = axolotl.FastpgPlugin()
    plugin.pre_model_load({name: 1})
    text = said(lambda: plugin.pre_model_load({name: 2}))
    assert text == f"ValueError: FastpgPlugin wants sequences and lm_head that are whole on each rank; got {name}: 2"


def test_a_trainer_with_a_loss_of_its_own_is_refused(axolotl, tmp_path):
    plugin, trainer = axolotl.FastpgPlugin(), trainer_of(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="wants the loss of the model itself; Trainer computes one from logits") as caught:
        plugin.post_trainer_create({}, trainer)
    assert "(label_smoother=LabelSmoother(" in str(caught.value)
    assert logits_of(trainer.model) is not None


# ---- ms-swift


def test_ms_swifts_fine_tuning_is_the_same_with_the_callback(swift, tmp_path):
    make = sys.modules["swift.callbacks"].callbacks_map["fastpg"]
    want, trainer, seen = trained(swift_trainer(tmp_path)), swift_trainer(tmp_path), Seen()
    assert trainer.args.use_logits_to_keep is None
    trainer.add_callback(make(trainer.args, trainer))
    assert trainer.args.use_logits_to_keep is False
    trainer.add_callback(seen)
    check_same(trained(trainer), want, torch.float32)
    assert seen.logits is None
    assert logits_of(trainer.model).shape == (1, 3, 61)


def swift_trainer(folder, trainer_class=Seq2SeqTrainer, ranks=1, binary=True, **args):
    trainer = trainer_of(folder, trainer_class)
    scale = types.SimpleNamespace(is_binary_loss_scale=binary)
    trainer.template = types.SimpleNamespace(sequence_parallel_size=ranks, is_binary_loss_scale=None, loss_scale=scale)
    vars(trainer.args).update({"use_logits_to_keep": None, "enable_dft_loss": False, "predict_with_generate": False} | args)
    return trainer


@pytest.mark.parametrize(
    "setting",
    [
        {"enable_dft_loss": True}, {"enable_channel_loss": True}, {"predict_with_generate": True}, {"use_liger_kernel": True},
        {"use_logits_to_keep": True}, {"label_smoothing_factor": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_ms_swift_that_are_refused(swift, tmp_path, setting):
    trainer = swift_trainer(tmp_path, **setting)
    ((name, given),) = setting.items()
    wanted = 0 if name == "label_smoothing_factor" else False
    assert said(lambda: swift.FastpgCallback(trainer.args, trainer)) == (
        f"ValueError: --callbacks fastpg leaves no logits, and --{name} {given} wants them: set it to {wanted}"
    )


def test_other_trainers_of_ms_swift_are_refused(swift, tmp_path):
    trainer = swift_trainer(tmp_path, transformers.Trainer)
    assert said(lambda: swift.FastpgCallback(trainer.args, trainer)) == (
        "ValueError: --callbacks fastpg wants the trainer of swift sft and swift pt, Seq2SeqTrainer; got Trainer, which "
        "computes its loss from logits"
    )


def test_weights_of_labels_and_losses_and_parallelism_of_ms_swift_are_refused(swift, tmp_path):
    trainer = swift_trainer(tmp_path)
    callback, trainer.compute_loss_func = swift.FastpgCallback(trainer.args, trainer), max
    assert said(lambda: callback.on_train_begin(None, None, None)) == (
        "ValueError: --callbacks fastpg wants the loss of the model itself; the trainer has <built-in function max>, of "
        "--loss_type: leave it out"
    )
    trainer = swift_trainer(tmp_path, binary=False)
    callback = swift.FastpgCallback(trainer.args, trainer)
    assert said(lambda: callback.on_train_begin(None, None, None)) == (
        "ValueError: --callbacks fastpg wants labels that weigh 1 or are ignored; --loss_scale has given them other weights, "
        "by which the trainer multiplies losses that it computes from logits"
    )
    trainer = swift_trainer(tmp_path, ranks=2)
    callback = swift.FastpgCallback(trainer.args, trainer)
    assert said(lambda: callback.on_train_begin(None, None, None)) == (
        "ValueError: --callbacks fastpg wants sequences that are whole on each rank; got --sequence_parallel_size 2"
    )
    assert logits_of(trainer.model) is not None


# ---- either


@pytest.mark.parametrize(("module", "name"), [("axolotl", "axolotl"), ("swift", "ms-swift")])
def test_an_absent_framework_is_an_import_error(monkeypatch, module, name):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setitem(sys.modules, module, None)  # also where it is installed
    words = said(lambda: imported_anew(monkeypatch, f"fastpg.integrations.{module}"))
    assert words == f"ImportError: {name} is not installed; this adapter was tested with {name} {VERSIONS[name]}"
