"""The programs of docs/examples/: they run from top to bottom, and print what their first lines say.

Most of each is a block of guides.md, letter by letter. `test_guides` does not run these blocks again.
"""

import ast
import re

import pytest
import torch
from pages import EXAMPLES, blocks_in_examples
from programs import run_program

pytestmark = pytest.mark.xdist_group("programs")  # one process has imported what they need

# What a program prints, as a pattern; "torchrun": it is started on two ranks.
PRINTED = {
    "plain_loop": r"step 0: 0\.\d+ of the tokens are even\n(?s:.*)step 2: .*\n\{'ratio_mean': ",
    "grpo_with_trl": r"\{'train_loss': .*'reward': \d.*'entropy': 3\.\d+",
    "patch_trainer": r"loss of each step: \[[\d., ]+\]\nperplexity: \d+\.\d+ generated: \[\d+, \d+, \d+, \d+\]",
    "lora_on_the_lm_head": r"step 0: .* [+-]0\.000 and [+-]0\.000\n(?s:.*)step 3: .* \+0\.(?!000)\d+ and -0\.(?!000)",
    "logging_metrics": r"the tracker, at step 2: \{'step': 2, .*'mismatch_abs_max'.*\nthe Trainer's log: \{'loss': .*'ess': ",
    "vocab_parallel": r"loss (-?\d\.\d+), of the whole head \1\n(?s:.*)loss (-?\d\.\d+), of the whole head \2",
    "cuda_graph": "each step was a replay" if torch.cuda.is_available() else "no GPU is here: the steps ran without a graph",
}
# The one of the guides with two ranks that torchrun itself starts; those of the guides are started as it would.
FRESH = ("vocab_parallel",)


def test_every_example_is_run_and_says_what_it_shows():
    assert {path.stem for path in EXAMPLES} == set(PRINTED)
    for path in EXAMPLES:
        said = ast.get_docstring(ast.parse(path.read_text()))
        assert "prints" in said, path.name
        assert f"docs/examples/{path.name}" in said, path.name


def test_the_guides_have_a_block_of_every_example():
    assert sorted(blocks_in_examples().values()) == sorted(EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path):
    if path.stem == "grpo_with_trl":
        pytest.importorskip("trl")
    ranks = 2 if "torchrun" in path.read_text() else 0
    settings = {"PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    done = run_program(str(path), folder=tmp_path, environment=settings, ranks=ranks, fresh=path.stem in FRESH)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(PRINTED[path.stem], done.stdout), done.stdout
