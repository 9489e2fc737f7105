"""What SkyRL's adapter refuses, and how workers and the entry point place it; SkyRL and Ray are not imported here."""

import sys
import types
from importlib import metadata

import pytest
import torch
from raising import said

from fastpg.integrations import skyrl

transformers = pytest.importorskip("transformers")

IDS = torch.ones(2, 6, dtype=torch.int64)
SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip


class Wrapper(torch.nn.Module):
    """The attributes of SkyRL's HFModelWrapper that the adapter reads."""

    remove_microbatch_padding, sequence_parallel_size, is_vlm = False, 1, False

    def __init__(self, model_class=transformers.LlamaForCausalLM):
        super().__init__()
        self.model = model_class(transformers.LlamaConfig(**SIZES))

    def forward(self, *_, **__):
        raise AssertionError("this forward is to be replaced")


@pytest.fixture(autouse=True)
def tested_version(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: {"skyrl": "0.3.0"}[name])


@pytest.fixture
def wrapper():
    found = Wrapper()
    skyrl.use_fastpg(found)
    return found


def vision():
    found = Wrapper()
    found.is_vlm = True
    return found


def critic():
    return Wrapper(transformers.LlamaForTokenClassification)


REFUSED = {
    "no wrapper": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
        "TypeError: use_fastpg wants SkyRL's HFModelWrapper; got LlamaForCausalLM",
    ),
    "vision": (
        vision,
        "ValueError: use_fastpg does not know the positions of SkyRL's vision models; set "
        "trainer.policy.language_model_only=true, or keep SkyRL's own logits",
    ),
    "no head": (
        critic,
        "ValueError: LlamaForTokenClassification has no output embeddings; pass LMHead(weight, ...) instead of "
        "LMHead.from_model(model)",
    ),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_models_that_are_not_understood(make, words):
    found = make()
    assert said(lambda: skyrl.use_fastpg(found)) == words
    assert "forward" not in vars(found)


def test_a_second_time(wrapper):
    words = "ValueError: this HFModelWrapper has a forward of its own already; call use_fastpg once"
    assert said(lambda: skyrl.use_fastpg(wrapper)) == words


@pytest.mark.parametrize("name", ["pixel_values", "image_grid_thw", "mm_token_type_ids"])
def test_images(wrapper, name):
    words = "pixel_values, image_grid_thw and mm_token_type_ids must be None: the model has no vision encoder"
    assert said(lambda: wrapper(IDS, 3, torch.ones_like(IDS), **{name: IDS})) == f"ValueError: {words}"


def test_several_numbers_of_actions(wrapper):
    """SkyRL's own forward fails on them too, when it slices."""
    words = "ValueError: num_actions must be one number for the batch; got [3, 2]"
    assert said(lambda: wrapper(IDS, [3, 2], torch.ones_like(IDS))) == words


@pytest.mark.parametrize("place", [lambda: skyrl.use_fastpg(Wrapper()), skyrl.replace_fused_lm_head], ids=["model", "kernel"])
def test_without_skyrl(monkeypatch, place):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert said(place) == "ImportError: skyrl is not installed; this adapter was tested with skyrl 0.3.0"


def test_only_the_actions_are_computed(wrapper, monkeypatch):
    """Prompts and padding cost no product."""
    from fastpg.integrations import transformers as adapter

    given, own = [], adapter.patched

    def seen(model, **options):
        given.append(options)
        return own(model, **options)

    monkeypatch.setattr(adapter, "patched", seen)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    _, out = wrapper(IDS, 3, mask, temperature=0.5, return_output=True, compute_entropy=True)
    want = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]]).bool()
    assert torch.equal(out.log_probs != 0, want)
    assert torch.equal(out.entropy != 0, want)
    (options,) = given
    assert options["temperature"] == 0.5


# ---- workers and the entry point


def worker_class(strategy, fused=True):
    """A worker class such as SkyRL's, whose init_model builds a model."""

    class OwnWorker:
        cfg = types.SimpleNamespace(strategy=strategy, fused_lm_head_logprob=fused)

        def init_model(self, path):
            self.model = types.SimpleNamespace(path=path)
            return path

    return OwnWorker


@pytest.fixture
def placed(monkeypatch):
    done = []
    monkeypatch.setattr(skyrl, "use_fastpg", lambda model: done.append(model.path))
    monkeypatch.setattr(skyrl, "replace_fused_lm_head", lambda: done.append("kernel"))
    return done


@pytest.mark.parametrize(("strategy", "want"), [("fsdp", ["a path"]), ("megatron", ["kernel"])])
def test_a_worker_computes_with_fastpg(placed, strategy, want):
    own = worker_class(strategy)
    found = skyrl.with_fastpg(own)
    assert found.__name__ == "OwnWorker"
    assert found().init_model("a path") == "a path"
    assert placed == want
    own().init_model("another")
    assert placed == want


def test_megatron_without_the_fused_log_probability(placed):
    words = "ValueError: trainer.fused_lm_head_logprob must be true with Megatron; got false"
    assert said(skyrl.with_fastpg(worker_class("megatron", fused=False))().init_model) == words
    assert not placed


@pytest.mark.parametrize("strategy", ["fsdp", "megatron"])
def test_the_entry_point_gives_skyrl_workers_with_fastpg(monkeypatch, placed, strategy):
    """`trainer.override_entrypoint` is a setting that SkyRL's own parser refuses."""
    cfg = types.SimpleNamespace(trainer=types.SimpleNamespace(strategy=strategy))
    said_to, kinds = [], ("Policy", "Ref", "Critic")
    begins = {"fsdp": "FSDP", "megatron": "Megatron"}[strategy]

    def remote(*classes, **options):  # @ray.remote(num_gpus=1), which keeps what it is given
        return lambda function: types.SimpleNamespace(remote=function, options=options)

    def module(name, **attributes):
        found = types.ModuleType(name)
        vars(found).update(attributes)
        monkeypatch.setitem(sys.modules, name, found)
        return found

    class Experiment:
        def __init__(self, given):
            assert given is cfg

        def run(self):
            for kind in kinds:
                worker = getattr(workers, f"{kind}Worker")
                if kind != "Critic":
                    assert worker.options == {"num_gpus": 1}
                    worker.remote().init_model(kind)

    for name in ("skyrl", "skyrl.train", "skyrl.train.entrypoints"):
        module(name)
    for name in ("skyrl.backends", "skyrl.backends.skyrl_train", "skyrl.backends.skyrl_train.workers"):
        module(name)
    module(f"skyrl.backends.skyrl_train.workers.{strategy}")
    own = {f"{begins}{kind}WorkerBase": worker_class(strategy) for kind in kinds}
    workers = module(f"skyrl.backends.skyrl_train.workers.{strategy}.{strategy}_worker", **own, CriticWorker="SkyRL's")
    module("skyrl.train.config", SkyRLTrainConfig=types.SimpleNamespace(from_cli_overrides=lambda x: said_to.append(x) or cfg))
    module("skyrl.train.utils", validate_cfg=lambda given: said_to.append(("checked", given)))
    module("skyrl.train.utils.utils", initialize_ray=lambda given: said_to.append(("started", given)))
    module("skyrl.train.entrypoints.main_base", BasePPOExp=Experiment)
    module("ray", remote=remote, get=lambda found: found)
    given = ["trainer.strategy=x", "trainer.override_entrypoint=fastpg.integrations.skyrl"]
    monkeypatch.setattr(sys, "argv", ["main", *given])
    skyrl.main()
    assert said_to == [given[:1], ("checked", cfg), ("started", cfg)]
    assert placed == {"fsdp": ["Policy", "Ref"], "megatron": ["kernel"] * 2}[strategy]
    assert workers.CriticWorker == "SkyRL's"
