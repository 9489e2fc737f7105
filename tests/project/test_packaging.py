"""What may import what, and what importing fastpg does to other packages."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from imports import imports

import fastpg

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, cwd: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_import_is_light_and_what_this_suite_starts_has_one_thread(tmp_path):
    heavy = ["triton", "transformers", "trl", "peft", "matplotlib", "rich", "hypothesis"]
    code = f"import sys, fastpg; print([name for name in {heavy!r} if name in sys.modules])\n"
    light, threads = run_python(code + "import torch; print(torch.get_num_threads())", tmp_path).stdout.splitlines()
    assert light == "[]"
    assert threads == str(torch.get_num_threads()) == "1"


def test_transformers_does_not_pick_up_our_kernels():
    """From the root, the way CI and the Makefile start Python: with the current directory off sys.path."""
    code = (
        "import sys, fastpg.kernels; from transformers import LlamaForCausalLM; "
        "print([name for name, module in sys.modules.items() if name.split('.')[0] == 'kernels' "
        f"and {str(ROOT)!r} in str(getattr(module, '__path__', ''))])"
    )
    done = run_python(code, ROOT, *(["-P"] if sys.version_info >= (3, 11) else ["-I"]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_root_is_not_on_the_path_of_this_suite():
    spec = importlib.util.find_spec("kernels")
    assert spec is None or str(ROOT / "kernels") not in list(spec.submodule_search_locations or ())


def test_a_checkout_that_is_not_installed_says_what_to_do(tmp_path):
    shutil.copytree(ROOT / "fastpg", tmp_path / "fastpg")
    # an editable install would find fastpg.kernels for the copy too; take its finder away
    done = run_python(
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]; "
        f"sys.path.insert(0, {str(tmp_path)!r}); import fastpg",
        tmp_path,
    )
    assert "pip install -e ." in done.stderr


def test_version_is_the_distributions():
    from importlib.metadata import version

    assert version("fastpg-lm") == fastpg.__version__


def test_the_changelog_tells_of_this_version_first():
    """Below what is unreleased. A date only of a release: until then the heading says that it is none."""
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(fastpg.__version__)}\] - (not yet released|\d{{4}}-\d\d-\d\d)", headings[1])


def test_the_citation_is_of_this_version():
    assert f"version = {{{fastpg.__version__}}}" in (ROOT / "docs" / "pages" / "objectives.md").read_text()


def test_every_public_name_exists_and_is_documented():
    for name in fastpg.__all__:
        assert getattr(fastpg, name).__doc__, name


def test_a_suite_in_parallel_survives_pytest_benchmark(tmp_path):
    """Which says at its start that xdist disables it. A stand-in says it here: versions differ in when and how."""
    pytest.importorskip("xdist")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    said = "Benchmarks are automatically disabled because xdist plugin is active.Benchmarks cannot be performed reliably"
    plugin = f"import warnings, pytest\n@pytest.hookimpl(trylast=True)\ndef pytest_configure(config): warnings.warn({said!r})\n"
    (tmp_path / "stand_in.py").write_text(plugin)
    (tmp_path / "test_one.py").write_text("def test_one(): pass\n")
    code = "import sys, pytest; sys.path.insert(0, '.'); sys.exit(pytest.main(sys.argv[1:]))"
    arguments = ["-q", "-p", "no:benchmark", "-p", "no:cacheprovider", "-p", "stand_in", "-n", "1", "test_one.py"]
    command = [sys.executable, "-c", code, "-p", "xdist.plugin", *arguments]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # others take seconds to import
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_oracle_shares_no_arithmetic_with_the_library():
    of_others = {"fastpg.lm_head", "__future__", "collections", "torch", "typing"}
    found = {name for path in (ROOT / "fastpg" / "reference").glob("*.py") for name in imports(path)}
    assert {name for name in found if not name.startswith("fastpg.reference.")} == of_others


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_triton_and_each_other_only(path):
    inside = {name for name in imports(path) if name.startswith("fastpg")}
    assert all(name.startswith("fastpg.kernels.") for name in inside)
    assert imports(path) - inside <= {"torch", "triton", *sys.stdlib_module_names}


def test_no_file_of_the_package_is_long():
    for path in [*(ROOT / "fastpg").glob("**/*.py"), *(ROOT / "kernels").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 500, path.name
