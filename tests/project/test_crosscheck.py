"""`fastpg check` from a real process: it passes here, says how it was misused, and fails where a kernel is wrong."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from objectives import OBJECTIVES
from problems import random_problem
from programs import run_program

import fastpg
from fastpg import CISPO, GSPO, ImportanceWeighted, KLPenalty, LMHead, PPOClip, reference
from fastpg.crosscheck import assert_matches_oracle, cases, command, judge
from fastpg.tools.memory import transient_bytes

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter, which has the GPU's place elsewhere")


pytestmark = pytest.mark.xdist_group("interpreter programs")  # one process has imported what they need


def check(*arguments: str, folder: Path, fresh: bool = False, **environment: str) -> subprocess.CompletedProcess:
    """fresh: in a process that has imported nothing."""
    unset = {"TRITON_INTERPRET": None, "FASTPG_BACKEND": None, "COLUMNS": "200"}
    words = ("-m", "fastpg", "check", *arguments)
    return run_program(*words, folder=folder, environment=unset | environment, interpreter=True, fresh=fresh)


def test_the_interpreter_is_asked_for_before_triton_is_imported(tmp_path):
    """The other tests' processes have imported Triton with it."""
    done = check(
        "--interpret", "--quick", "--dtype", "fp32", "--operation", "selective_logprobs", "--json", folder=tmp_path, fresh=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert {c["backend"] for c in json.loads(done.stdout)["checked"]} == {"torch cpu", "triton interpreter"}


def test_every_operation_passes_on_every_backend(tmp_path):
    done = check("--interpret", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["misses"] == found["compiled"] == []
    assert found["versions"]["torch"] == torch.__version__
    checked = found["checked"]
    seen = {(c["operation"], c["backend"], c["dtype"]) for c in checked}
    linear = ("linear_logprobs", "linear_policy_loss", "linear_cispo_loss", "selective_logprobs")
    for operation in linear:
        assert {(operation, "torch cpu", d) for d in ("float32", "bfloat16", "float16", "float64")} <= seen
        assert {(operation, "triton interpreter", d) for d in ("float32", "bfloat16", "float16")} <= seen
    assert ("policy_loss", "torch cpu", "float32") in seen
    quantities = {name for c in checked for name in c["deviations"]}
    assert quantities == {"logp", "entropy", "loss", "dX, a row", "dW", "db", "dA", "dB", "dlogits, a row", "dlogp"}
    for c in checked:
        for d in c["deviations"].values():
            assert d["error"] <= d["tolerance"]
    # what is measured is not nothing, and the tolerance is out of reach of full logits in the model's dtype
    worst = max(d["multiple"] for c in checked for d in c["deviations"].values())
    assert 0.1 < worst <= 1
    bf16 = [c for c in checked if c["dtype"] == "bfloat16" and c["features"].startswith("33x") and c["full_logits"]]
    assert all(c["full_logits"]["logp"]["multiple"] > 100 for c in bf16)
    assert list(tmp_path.iterdir()) == []


def test_lines_for_people(tmp_path):
    """As in the log of a CI: no colours, 100 columns but for the last line, and nothing on stderr."""
    done = check("--quick", "--dtype", "fp32", folder=tmp_path, FORCE_COLOR="", COLUMNS="40")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    versions, *lines, last = done.stdout.splitlines()
    assert versions.startswith("fastpg 0")
    assert "\x1b" not in done.stdout
    assert all(len(line) <= 100 for line in lines)
    for operation in cases.OPERATIONS:
        assert len([line for line in lines if line.startswith(f"{operation} ")]) == 1
    assert re.match(
        r"all \d\d comparisons hold on the CPU; the closest to its tolerance: 0\.\d\d of it, \w+ of \w+, torch cpu, ", last
    )
    verbose = check("--quick", "--dtype", "fp32", "--operation", "linear_cispo_loss", "--verbose", folder=tmp_path)
    assert verbose.returncode == 0, verbose.stderr
    for words in ("full logits", "LoRA", "comparisons hold on the CPU; the closest"):
        assert words in verbose.stdout


def test_a_head_of_given_sizes_and_the_head_of_a_model(tmp_path):
    done = check("--hidden", "48", "--vocab", "999", "--dtype", "bf16", "--tokens", "7", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert {c["features"].split(",")[0] for c in json.loads(done.stdout)["checked"]} == {"7x48x999"}

    config = {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_size": 40, "vocab_size": 333,
        "final_logit_softcapping": 12.0, "torch_dtype": "bfloat16", "num_attention_heads": 4, "num_hidden_layers": 1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = check("--model", ".", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    checked = json.loads(done.stdout)["checked"]
    assert {c["dtype"] for c in checked} == {"bfloat16"}
    assert all(c["features"].startswith("64x40x333") and "softcap 12" in c["features"] for c in checked)


def test_the_compile_report_follows(monkeypatch, capsys):
    """Here of one kernel, where the command asks for all."""
    run = subprocess.run
    monkeypatch.setattr(command.subprocess, "run", lambda words, **options: run([*words, "--kernel", "combine"], **options))
    fastpg_main(["check", "--quick", "--operation", "policy_loss", "--dtype", "fp32", "--compile", "hip:gfx942", "--json"])
    compiled = json.loads(capsys.readouterr().out)["compiled"]
    assert [(c["kernel"], c["target"]) for c in compiled] == [("combine", "hip:gfx942")] * 6
    assert all(c["registers"] > 16 for c in compiled)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--operation", "linear"], "'linear' (choose from"),
        (["--dtype", "int8"], "'int8' (choose from"),
        (["--backend", "cuda"], "'cuda' (choose from"),
        (["--backend", "triton", "--interpret", "--operation", "policy_loss"], "on triton interpreter"),
        (["--verbose", "--json"], "not allowed with"),
        (["--hidden", "64"], "--hidden and --vocab go together"),
        (["--hidden", "0", "--vocab", "8"], "must be a whole number >= 1"),
        (["--tokens", "8"], "--tokens needs --hidden and --vocab"),
        (["--model", "nowhere"], "directory with a config.json"),
        (["--model", ".", "--hidden", "8", "--vocab", "8"], "leave --hidden and --vocab out"),
        (["--operation", "policy_loss", "--dtype", "bf16"], "no case"),
        (["--compile", "cuda:12"], "invalid choice"),
        (["--interpret", "--device", "cuda"], "--interpret is of the CPU"),
        pytest.param(["--backend", "triton", "--device", "cpu"], "--backend triton needs", marks=WITHOUT_GPU),
        pytest.param(["--device", "cuda"], "--device cuda: torch finds no GPU", marks=WITHOUT_GPU),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_misuse(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(command, "check", None)  # it comes before any work
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stopped:
        fastpg_main(["check", *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def fastpg_main(arguments):
    from fastpg.__main__ import main

    main(arguments)


def test_the_interpreter_needs_triton(tmp_path):
    """In a process to which triton is not installed."""
    hide = "import importlib.util as u, sys\nf = u.find_spec\nu.find_spec = lambda n, *a: None if n == 'triton' else f(n, *a)\n"
    run = "from fastpg.__main__ import main\nmain(['check', '--interpret', '--quick'])"
    unset = {"TRITON_INTERPRET": None, "FASTPG_BACKEND": None}
    done = run_program("-c", hide + run, folder=tmp_path, environment=unset, interpreter=True)
    assert done.returncode == 2
    assert "--interpret needs triton" in done.stderr


MUTATIONS = {
    "the target stays in the sum": (
        "anchored_exp.py", "others = columns[None, :] != mine.token[:, None]", "others = columns[None, :] >= 0",
        "linear_cispo_loss", "fp32", "logp",
    ),
    "no anchor": (
        "anchored_exp.py", "log2_e = log2_z - mine.anchor[:, None]", "log2_e = log2_z", "linear_cispo_loss", "fp32", "logp",
    ),
    "the softcap's slope": (
        "tile.py", "slope = 4.0 * q", "slope = 3.9 * q", "linear_logprobs", "fp32", "dX, a row",
    ),
    "what rounding takes": (
        "anchored_exp.py", "r = s - tl.sum(stored.to(tl.float32), 1)", "r = s - s",
        "linear_cispo_loss", "bf16", "dX, a row",
    ),
    "the sign of the entropy's gradient": (
        "dlogits.py", "(-mine.h[:, None] * surprise - mine.g", "(mine.h[:, None] * surprise - mine.g",
        "linear_logprobs", "fp32", "dX, a row",
    ),
}  # fmt: skip


@WITHOUT_GPU
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_is_found(mutation, tmp_path):
    file, right, wrong, operation, dtype, quantity = MUTATIONS[mutation]
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fastpg", tmp_path / "copy" / "fastpg", ignore=ignored)
    shutil.copytree(ROOT / "kernels", tmp_path / "copy" / "fastpg" / "kernels", ignore=ignored)
    kernel = tmp_path / "copy" / "fastpg" / "kernels" / file
    source = kernel.read_text()
    assert source.count(right) == 1
    kernel.write_text(source.replace(right, wrong))

    arguments = ("--interpret", "--quick", "--operation", operation, "--dtype", dtype)
    # PYTHONPATH goes before the finder of an editable install
    done = check(*arguments, folder=tmp_path, PYTHONPATH=str(tmp_path / "copy"))
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("MISS ") for line in lines), done.stderr
    assert all(f"MISS {operation}, triton interpreter" in line for line in lines)  # and the torch backend is right
    assert any(f": {quantity} is off by " in line and "tolerance" in line for line in lines), done.stderr


def test_ready_logits_are_judged_without_a_matrix_of_vocab_by_vocab():
    case = cases.Case("selective_logprobs", torch.float32, 7, 4000, 16)
    used = transient_bytes(lambda: list(judge.check(case, {"torch cpu": "cpu"})))
    assert used < 2**22 < 4000**2


@pytest.mark.parametrize(("arguments", "threads"), [([], 1), (["--hidden", "16", "--vocab", "40"], 2)])
def test_small_cases_run_on_one_thread_and_a_head_of_given_sizes_on_all(arguments, threads, monkeypatch, capsys):
    """The caller's setting is there again afterwards, also where the check fails."""
    seen = set()

    def fails(case, places):
        seen.add(torch.get_num_threads())
        raise RuntimeError("stop")

    monkeypatch.setattr(command, "check", fails)
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="stop"):
            fastpg_main(["check", "--dtype", "fp32", *arguments])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == {threads}


def arguments_of(problem):
    return problem.hidden, problem.head, problem.tokens, problem.old_logprobs, problem.advantages


@pytest.mark.parametrize("backend", ["torch", None])
def test_a_users_tensors_match(backend):
    problem = random_problem(40, 300, torch.bfloat16, bias=True, softcap=20.0, temperature="per-token", masked=True, lora=3)
    garbage = torch.where(problem.mask[:, None], problem.hidden, torch.nan)
    problem = replace(problem, hidden=garbage)
    options = {"mask": problem.mask, "temperature": problem.temperature, "backend": backend}
    assert_matches_oracle(*arguments_of(problem), **options)
    assert problem.hidden.grad is None


def test_sequences_penalties_and_zero_advantages_match():
    problem = random_problem(40, 300, torch.float32)
    hidden, tokens = problem.hidden.view(4, 10, -1), problem.tokens.view(4, 10)
    advantages = torch.tensor([1.0, 0.0, -2.0, 0.5])  # a sequence costs nothing
    with torch.no_grad():
        logprobs = fastpg.linear_logprobs(hidden, problem.head, tokens).logprobs
    old = logprobs - 0.1 * torch.rand(4, 10)
    tokens = tokens.masked_fill(torch.rand(4, 10) < 0.2, -100)
    assert_matches_oracle(hidden, problem.head, tokens, old, advantages, reduction="seq-mean-token-mean")
    assert_matches_oracle(hidden, problem.head, tokens, None, advantages, objective=CISPO(2.0))
    assert_matches_oracle(hidden, problem.head, tokens, old, advantages, objective=GSPO(0.5, 0.5))
    penalty = {"kl": KLPenalty(0.1, "k3"), "ref_logprobs": logprobs + 0.3, "rollout_weights": torch.rand(4, 10) + 0.5}
    assert_matches_oracle(hidden, problem.head, tokens, old, advantages, objective=PPOClip(0.5, 0.5), **penalty)
    assert_matches_oracle(hidden, problem.head.weight, tokens, old, advantages, objective=lambda lp, o, A: A * (lp - o).tanh())


@pytest.mark.parametrize(
    ("schedule", "quantity", "wrong"),
    [
        ("one_pass", "logp", lambda x: x + 1e-3),
        ("one_pass", "loss", lambda x: x * 1.01),
        ("two_pass", "dX", lambda x: x * torch.linspace(1, 1.001, len(x))[:, None]),
        ("two_pass", "dW", lambda x: x * 1.001),
        ("two_pass", "dX", lambda x: x * torch.nan),
        ("one_pass", "db", lambda x: -x),
    ],
)
def test_a_wrong_result_is_named(schedule, quantity, wrong, monkeypatch):
    problem = random_problem(40, 300, torch.float32, bias=True)
    right = getattr(cases, schedule)

    def broken(*arguments, **options):
        found = right(*arguments, **options)
        return found | {quantity: wrong(found[quantity])}

    monkeypatch.setattr(cases, schedule, broken)
    name = {"one_pass": "one pass", "two_pass": "two passes"}[schedule]
    with pytest.raises(AssertionError, match=rf"{name} \(.*\): {quantity}.* is off by .*, tolerance ") as raised:
        assert_matches_oracle(*arguments_of(problem))
    assert str(raised.value).count("is off by") == 1


def test_what_the_library_refuses_stays_its_error():
    problem = random_problem(10, 30, torch.float32)
    with pytest.raises(ValueError, match="temperature"):
        assert_matches_oracle(*arguments_of(problem), temperature=0.0)
    with pytest.raises((TypeError, ValueError), match="weight"):
        assert_matches_oracle(problem.hidden, LMHead(torch.randn(30, 63)), *arguments_of(problem)[2:])


def test_an_fp32_head_on_16_bit_states():
    problem = random_problem(30, 50, torch.bfloat16)
    head = LMHead(problem.head.weight.float(), fp32_head=True)
    assert_matches_oracle(problem.hidden, head, problem.tokens, problem.old_logprobs, problem.advantages)


@pytest.mark.parametrize("known", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_judges_formula_of_an_objective_is_the_oracles(known):
    """The judge is given the library's objectives, and finds the oracle's by itself."""
    logprobs, old, advantages = -torch.rand(6, dtype=torch.float64), -torch.rand(6), torch.randn(6)
    ids = () if known.level == "token" else (torch.tensor([0, 1, 0, 2, 1, 0]),)
    found = cases.reference_objective(known.objective)(logprobs, old.double(), advantages.double(), *ids)
    assert torch.equal(found, known.oracle(logprobs, old.double(), advantages.double(), *ids))


def test_its_tolerances_are_the_stated_ones():
    """Relative to a small |logp|; wider with H on tensor cores; no wider where a coefficient is as steep as the ratio."""
    problem = random_problem(10, 30, torch.bfloat16, hidden_size=4096)
    settings, want = cases.Settings(ImportanceWeighted()), cases.oracle(problem, cases.Settings(ImportanceWeighted()))
    wide = problem.leaves(torch.float64)
    largest = reference.logits(wide.hidden, wide.head, 1.0).detach().abs().amax(1)
    wrong = want | {"logp": want["logp"] + 1.0, "dX": want["dX"] * 2}
    for device, factor in (("cpu", 1), ("cuda", 4)):
        found = {d.quantity: d for d in judge.deviations(problem, settings, wrong, want, device)}
        promised = factor * 1e-6 * largest.clamp(min=10) * want["logp"].abs().clamp(max=1)
        assert min(abs(found["logp"].tolerance / promised - 1)) < 1e-6
        assert found["dX, a row"].tolerance == pytest.approx(8e-3, rel=1e-4)
    fp32 = random_problem(10, 30, torch.float32)
    want = cases.oracle(fp32, settings)
    found = {d.quantity: d for d in judge.deviations(fp32, settings, want | {"dX": want["dX"] * 2}, want)}
    wide = fp32.leaves(torch.float64)
    promised = 1e-6 * reference.logits(wide.hidden, wide.head, 1.0).detach().abs().amax(1).clamp(min=10)
    assert min(abs(found["dX, a row"].tolerance / promised - 1)) < 1e-4
