"""The workflow, the issue forms and the pull request's template: they parse, and what they call or name is there."""

import re
from pathlib import Path

import pytest

from fastpg.__main__ import main

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
if not GITHUB.exists():
    pytest.skip("not a checkout: there is no .github", allow_module_level=True)
WORKFLOW = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
JOBS = WORKFLOW["jobs"]
EVENTS = WORKFLOW[True]  # YAML 1.1 reads the key `on` as a truth value
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def steps(job: str, key: str) -> list:
    return [step[key] for step in JOBS[job]["steps"] if key in step]


def python_of(job: str) -> str:
    (version,) = (step["python-version"] for step in steps(job, "with") if "python-version" in step)
    return version


def test_jobs_call_what_exists():
    assert {job: steps(job, "run") for job in JOBS} == {
        "run": ["bash .ci/run"],
        "oldest": [".ci/versions oldest"],
        "gpu": ["make gpu"],
    }
    assert (ROOT / ".ci" / "run").exists()
    assert (ROOT / ".ci" / "versions").stat().st_mode & 0o111
    assert re.search(r'^    "oldest": \[', (ROOT / ".ci" / "versions").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make (\w+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)) | {"gpu"} <= TARGETS


def test_every_job_ends_and_caches_files_that_exist():
    assert all(job["timeout-minutes"] <= 90 for job in JOBS.values())
    for job in ("run", "oldest"):
        (cached,) = (step["cache-dependency-path"] for step in steps(job, "with") if step.get("cache") == "pip")
        assert all((ROOT / name).exists() for name in cached.split())


def test_pythons():
    """The oldest that pyproject.toml allows has a job; the whole suite runs on one that its pins allow."""
    (oldest,) = re.findall(r'^requires-python = ">=([\d.]+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert python_of("oldest") == oldest
    assert python_of("run") == "3.11"


def test_the_gpu_job_is_off_by_default_and_never_runs_a_strangers_code():
    assert EVENTS["workflow_dispatch"]["inputs"]["gpu"] == {
        "description": "also `make gpu`, on a self-hosted runner with the label gpu", "type": "boolean", "default": False
    }  # fmt: skip
    dispatched, pushed = JOBS["gpu"]["if"].split(" || ")
    assert dispatched == "(github.event_name == 'workflow_dispatch' && inputs.gpu)"
    assert pushed == "(github.event_name == 'push' && vars.GPU_RUNNER == 'true')"
    assert JOBS["gpu"]["runs-on"] == ["self-hosted", "gpu"]
    assert "pull_request" in EVENTS
    assert "pull_request_target" not in EVENTS
    assert WORKFLOW["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_an_issue_form_is_one_that_github_takes(form):
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= set(content)
    ids = [field["id"] for field in content["body"]]
    assert len(set(ids)) == len(ids) > 1
    for field in content["body"]:
        assert field["type"] in ("textarea", "input")
        assert field["attributes"]["label"]
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert set(field["attributes"]) <= {"label", "description", "render"}


def test_a_bug_report_asks_for_versions_the_input_and_a_check(capsys):
    fields = {field["id"]: field for field in yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text())["body"]}
    assert set(fields) == {"what", "input", "versions", "check"}
    assert all(field["validations"]["required"] for field in fields.values())
    assert "`fastpg --version`" in fields["versions"]["attributes"]["description"]
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    options = set(re.findall(r"--\w+", capsys.readouterr().out))
    asked = re.findall(r"`([^`]*)`", fields["check"]["attributes"]["description"])
    assert all(option in options for command in asked for option in re.findall(r"--\w+", command))


def test_a_loss_is_asked_for_by_its_formula_and_source():
    fields = {field["id"]: field for field in yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "feature.yml").read_text())["body"]}
    assert [name for name, field in fields.items() if field.get("validations", {}).get("required")] == ["formula", "source"]


@pytest.mark.parametrize("path", [*FORMS, GITHUB / "pull_request_template.md"], ids=lambda path: path.name)
def test_files_that_are_named_exist(path):
    for name in re.findall(r"`(?:bash )?([\w./]*/[\w./]*|\w+\.md)`", path.read_text()):
        assert (ROOT / name).exists(), name


def test_the_template_has_a_line_for_every_rule_of_a_change():
    template = (GITHUB / "pull_request_template.md").read_text()
    rules = (ROOT / "CONTRIBUTING.md").read_text().split("## How a change is made")[1].split("\n## ")[0]
    for words in ("fastpg/reference/", "shares no code", "row by row", "code once", "olerance", "before any work", "measured"):
        assert words in rules, words
        assert words in template, words
