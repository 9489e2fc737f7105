"""What the demo says: answers before and after, words where a batch teaches nothing, the bar, the curves, the installing."""

import csv
import math
import re
import shutil
import subprocess
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from tiny_demo import trained

from fastpg.__main__ import main
from fastpg.demo import answers as demo_answers
from fastpg.demo import command, curves, report, tasks, walk
from fastpg.demo import train as demo
from fastpg.demo.answers import Answer, answers
from fastpg.demo.compare import LossMemory

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.xdist_group("demo")


def printed(say, *given) -> str:
    console = Console(file=StringIO(), width=160)
    say(console, *given)
    return console.file.getvalue()


# ---- Answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("advantage", "learns"), [("group", True), ("none", False)])
def test_answers_get_better_by_the_training_and_not_by_the_control(advantage, learns):
    before, after = trained(advantage).before, trained(advantage).after
    assert [(x.question, x.wanted) for x in after] == [(x.question, x.wanted) for x in before]
    more = sum(x.right for x in after) - sum(x.right for x in before)
    assert more >= 20 if learns else more < 10


def test_the_same_model_answers_the_same():
    model, task = tasks.tiny_model(), tasks.larger_digit()
    assert answers(model, task, 100) == answers(model, task, 100)


def test_answers_are_marked_by_what_is_right():
    torch.manual_seed(0)
    digits = answers(tasks.tiny_model(), tasks.larger_digit(), 100)
    for answer in digits:
        assert answer.wanted == str(max(int(answer.question[0]), int(answer.question[2])))
        assert "." not in answer.said  # up to the stop token
        assert answer.right == (tasks.last_number(answer.said) == int(answer.wanted))
    assert 0 < sum(answer.right for answer in digits) < 50

    for answer in answers(tasks.tiny_model(), walk.Walk(), 100):
        position, goal = int(answer.question[0]), int(answer.question[2])
        assert answer.wanted == (">" if goal > position else "<") * abs(goal - position)
        for move in answer.said:
            position = min(max(position + {">": 1, "<": -1}.get(move, 0), 0), 9)
        assert answer.right == (position == goal)


@pytest.mark.parametrize("task", [tasks.larger_digit(), walk.Walk()], ids=["tiny", "walk"])
def test_the_shown_prompts_differ(task):
    shown = answers(tasks.tiny_model(), task)
    assert len({answer.question for answer in shown}) == len(shown) == demo_answers.SHOWN


def test_the_command_asks_before_the_training_and_after_it(monkeypatch, tmp_path):
    shown = []
    size = lambda model, task=None: float(model.get_output_embeddings().weight.detach().abs().sum())  # noqa: E731
    monkeypatch.setattr(command, "answers", size)
    monkeypatch.setattr(command, "report_answers", lambda console, asks, before, after: shown.extend([before, after]))
    main(["demo", "--model", "tiny", "--device", "cpu", "--steps", "1", "--seed", "5", "--out", str(tmp_path)])
    torch.manual_seed(5)
    model = tasks.tiny_model()
    assert shown[0] == size(model) != shown[1]
    demo.train(model, tasks.larger_digit(), 1, 5)
    assert shown[1] == size(model)


def test_the_table_of_answers():
    """What models say may look like markup."""
    before, after = [Answer("What is 3 + 4?", "7", "[b] Well", False)], [Answer("What is 3 + 4?", "7", "It is 7", True)]
    (row,) = [line for line in printed(report.report_answers, "sums", before, after).splitlines() if "3 + 4" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["What is 3 + 4?", "7", "[b] Well", "wrong", "It is 7", "right"]


# ---- A batch that teaches nothing -----------------------------------------------------------------------------------


def always(*wanted: int) -> tasks.Task:
    """Every answer is 7; the problems want these numbers, in turn."""
    turns = iter(range(10**6))
    draw = lambda random: ([1, 13, 2, 14], wanted[next(turns) % len(wanted)])  # noqa: E731
    return replace(tasks.larger_digit(), draw=draw, decode=lambda ids: "7", prompts_per_step=2, group_size=4)


@pytest.mark.parametrize(
    ("wanted", "reward", "note"),
    [((7,), 1.0, "all groups solved"), ((8,), 0.0, "all groups failed"), ((7, 8), 0.5, "all groups solved or failed")],
)
def test_words_in_the_place_of_nan(wanted, reward, note, monkeypatch, tmp_path, capsys):
    """In the bar, the summary, the file and the picture."""
    texts = []
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(command, "larger_digit", lambda: always(*wanted))
    monkeypatch.setattr(command, "answers", lambda *given: [])
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: texts.append(figure.axes[3].get_xlabel()))
    main(["demo", "--model", "tiny", "--device", "cpu", "--steps", "2", "--out", str(tmp_path)])
    out, bar = capsys.readouterr()
    assert f"step 2 of 2, reward {reward:.2f}, {note} [" in bar
    assert f"{note}, in 2 of 2 steps" in out
    assert any(note in text for text in texts)
    text = (tmp_path / "history.csv").read_text()
    assert not any(re.search(r"\bnan\b", shown) for shown in (text, out, bar, *texts))
    shares = wanted.count(7) / len(wanted), wanted.count(8) / len(wanted)
    for row in csv.DictReader(StringIO(text)):
        assert row["note"] == note
        assert row["ratio_max"] == row["first_ratio_mean"] == ""
        assert (float(row["groups_solved"]), float(row["groups_failed"])) == shares


def test_a_batch_that_teaches_has_no_note(capsys):
    torch.manual_seed(0)
    (row,) = demo.train(tasks.tiny_model(), tasks.larger_digit(), 1).history
    assert row["note"] == ""
    assert all(math.isfinite(value) for name, value in row.items() if name != "note")
    assert row["groups_solved"] == 0 < row["groups_failed"] < 1
    bar = capsys.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert f"step 1 of 1, reward {row['reward']:.2f} [" in bar
    assert "loss" not in bar


def test_shares_of_groups():
    rewards = torch.tensor([1.0, 1, 0, 0, 1, 0, 1, 1])
    assert demo.alike(rewards, 2) == (0.5, 0.25)
    assert demo.words_of(0.5, 0.25) == "all advantages 0"  # an estimator that does not look at groups


# ---- Summary and picture --------------------------------------------------------------------------------------------


def history_of(steps: int, **more: float) -> list[dict]:
    row = {"loss": 0.5, "tokens": 3.0, "groups_solved": 0.25, "groups_failed": 0.5, "note": ""}
    return [{"step": i + 1, "reward": i / steps, **row, **more} for i in range(steps)]


COMPARED = {"reward_full_logits": 0.125, "loss_full_logits": 0.375, "loss_difference": 2e-7}


def test_the_summary_says_what_happened():
    training = demo.Training(history_of(8), {"sample": 1.5, "load": 2.25}, LossMemory(2048, 49152, 2**20, 3 * 2**20))
    lines = list(report.summary(training))
    assert lines == [
        ("right answers", "6% -> 81%, first 2 and last 2 of 8 steps"),
        ("memory of the loss", "fastpg 1.0 MiB, full logits 3.0 MiB"),
        ("", "beyond the gradients; 2048 tokens, V = 49152"),
        ("seconds: sample", "1.5"),
        ("seconds: load", "2.2"),
        ("seconds: all", "3.8"),
    ]
    small = training._replace(memory=LossMemory(2048, 16, 2, 1))
    assert ("", "16 logits a token are too few to save") in report.summary(small)


def figure_of(history, monkeypatch) -> Figure:
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    curves.draw_curves(history, LossMemory(2048, 49152, 200 * 2**20, 1000 * 2**20), "title", Path("curves.png"))
    return drawn[0]


def test_the_panels(monkeypatch):
    reward, memory, length, groups = figure_of(history_of(40), monkeypatch).axes
    assert "Right answers" in reward.get_title()
    assert [bar.get_width() for bar in memory.patches] == [1000, 200]
    assert [text.get_text().strip() for text in memory.texts] == ["1000 MiB", "200 MiB"]
    assert length.get_title() == "Tokens of an answer"
    assert [bar.get_height() for bar in groups.patches[::40]] == [0.25, 0.25, 0.5]  # solved, mixed, failed
    assert groups.get_xlabel() == "step"


def test_the_panels_of_a_comparison(monkeypatch):
    reward, _, loss, _ = figure_of(history_of(40, **COMPARED), monkeypatch).axes
    for axes, full, own in ((reward, 0.125, 36.5 / 40 - 2 / 40), (loss, 0.375, 0.5)):
        lines = {line.get_label(): line.get_ydata()[-1] for line in axes.lines}
        assert lines["full logits"] == pytest.approx(full)
        assert lines["fastpg"] == pytest.approx(own if axes is loss else sum(range(36, 40)) / 160)
    assert "2e-07" in loss.get_xlabel()


def test_smooth():
    assert curves.smooth([1.0, 2.0, 3.0, 7.0]) == [1, 1.5, 2, 4]
    assert curves.smooth([5.0]) == [5]


# ---- Loading and installing -----------------------------------------------------------------------------------------


def test_the_loading_bar_says_what_is_loaded(monkeypatch):
    import transformers

    seen = []
    monkeypatch.setattr(tasks, "check_packages", lambda model: None)
    monkeypatch.setattr(tasks, "_weights_file", lambda: Path("smollm2.gguf"))
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        loader = lambda *given, name=name, **options: seen.append(name) or torch.nn.Identity()  # noqa: E731
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", loader)
    tasks.load_smollm2(lambda doing, share: seen.append((doing, share)))
    assert [x if isinstance(x, str) else x[0] for x in seen] == [
        "importing transformers",
        "reading the weights of SmolLM2-135M-Instruct",
        "AutoModelForCausalLM",
        "reading its tokenizer",
        "AutoTokenizer",
    ]
    shares = [x[1] for x in seen if isinstance(x, tuple)]
    assert shares == sorted(set(shares))

    console = Console(file=StringIO(), width=120, force_terminal=True)
    with report.loading_bar(console) as told:
        told("reading the weights", 0.5)
        assert "reading the weights" not in console.file.getvalue()  # its own clock shows it, or what comes next
    assert "loaded the model" in console.file.getvalue()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("order", [("demo", "test"), ("test", "demo"), ("demo", "lint", "demo")])
def test_the_demo_installs_its_own_packages_alone(order, tmp_path):
    """And whichever is made first, the other finds all it needs."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    installed: set[str] = set()
    for target in order:
        make = ["make", "--dry-run", "CONSTRAINTS=", "EXTRAS=dev", target]
        done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            if "--editable" in line:
                extras = line.split("[")[1].split("]")[0].split(",")
                assert extras == ["demo"] if target == "demo" else set(extras) == {"demo", "dev"}
                installed.update(extras)
            if line.startswith("touch"):
                for stamp in line.split()[1:]:
                    (tmp_path / stamp).touch()
        assert {"demo"} if target == "demo" else {"demo", "dev"} <= installed
    assert installed == ({"demo"} if set(order) == {"demo"} else {"demo", "dev"})
