"""Breaks fastpg on purpose, a line at a time, and sees the tests notice: `python tests/mutations.py [name ...] [--jobs N]`.

Each mutation is made in a copy of the tree in a temporary folder, where pytest runs the tests named beside it until the first
failure. First the same tests run without a mutation, and have to pass. Exit status 1 if a mutation survives, if its old text
is not found exactly once, or if the tests end in anything but a failed test. Minutes; needs no GPU. pytest does not collect
this file; `test_mutations_apply` keeps the list from rotting.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # file names in tests/, without test_ and .py
    only: str = ""  # pytest's -k


class Result(NamedTuple):
    caught: bool
    by: str  # the failed test, or what went wrong
    seconds: float


MUTATIONS = [
    # ---- kernels
    Mutation(
        "logsumexp: sums not moved to the new pivot",
        "kernels/logsumexp.py",
        "return larger, s * decay + tl.sum(e, 1), q",
        "return larger, s + tl.sum(e, 1), q",
        "kernels",
        "test_against_float64 and 2100",
    ),
    Mutation(
        "logsumexp: entropy's Q not moved to the new pivot",
        "kernels/logsumexp.py",
        "q = decay * (q + s * shift) + tl.sum(e * finite, 1)",
        "q = decay * q + tl.sum(e * finite, 1)",
        "kernels",
        "test_against_float64 and 2100",
    ),
    Mutation(
        "logsumexp: one column beyond the vocabulary counts",
        "kernels/logsumexp.py",
        "(columns[None, :] == token[:, None]) | (columns >= V)[None, :]",
        "(columns[None, :] == token[:, None]) | (columns > V)[None, :]",
        "kernels",
        "test_against_float64 and 17-96",
    ),
    Mutation(
        "logsumexp: splits added up on their own pivots",
        "kernels/logsumexp.py",
        "s += decay * partial",
        "s += partial",
        "kernels",
        "pivots_far_apart",
    ),
    Mutation(
        "dlogits: sigmoid(t) as a difference that cancels",
        "kernels/dlogits.py",
        "at_target = g * tl.exp(log_1mp)",
        "at_target = g * (1.0 - 1.0 / (1.0 + tl.exp(t)))",
        "kernels",
        "test_against_float64 and 130-1100",
    ),
    Mutation(
        "dlogits: softcap's inner factor missing",
        "kernels/dlogits.py",
        "factor = factor * head.inner",
        "factor = factor * 1.0",
        "kernels",
        "test_against_float64 and 40-softcap",
    ),
    Mutation(
        "dlogits: what rounding took is not reported",
        "kernels/dlogits.py",
        "taken = tl.sum(tl.where((columns < head.V)[None, :], d - stored.to(tl.float32), 0.0), 1)",
        "taken = mine.g * 0.0",
        "kernels",
        "test_against_float64 and bf16 and 17-96",
    ),
    Mutation(
        "dlogits: entropy's gradient without H",
        "kernels/dlogits.py",
        "propagate_nan=tl.PropagateNan.ALL) + mine.entropy[:, None]",
        "propagate_nan=tl.PropagateNan.ALL)",
        "kernels",
        "test_against_float64 and 17-96",
    ),
    Mutation(
        "target: last entry of the hidden state left out",
        "kernels/target.py",
        "mask = in_chunk[:, None] & (h < head.H)",
        "mask = in_chunk[:, None] & (h < head.H - 1)",
        "kernels",
        "test_against_float64 and 17-96",
    ),
    Mutation(
        "target: bias left out",
        "kernels/target.py",
        "score += tl.load(head.BIAS + column).to(tl.float32)",
        "score += 0.0",
        "kernels",
        "test_against_float64 and 40-bias-",
    ),
    Mutation(
        "target: a token one beyond the vocabulary is inside",
        "kernels/target.py",
        "inside = (token >= 0) & (token < head.V)",
        "inside = (token >= 0) & (token <= head.V)",
        "kernels",
        "test_against_float64 and 17-96",
    ),
    Mutation(
        "target: an infinite anchor",
        "kernels/target.py",
        'tl.where(inside & (z != float("inf")), z, float("nan"))',
        'tl.where(inside, z, float("nan"))',
        "one_pass",
        "infinite_hidden_states",
    ),
    Mutation(
        "anchored_exp: one column beyond the vocabulary counts",
        "kernels/anchored_exp.py",
        "counts = (columns < head.V)[None, :]",
        "counts = (columns <= head.V)[None, :]",
        "kernels",
        "test_against_float64 and 17-96",
    ),
    Mutation(
        "objectives: upper bound of the ratio used as a lower one",
        "kernels/objectives.py",
        "ratio = tl.minimum(ratio, ratio_max,",
        "ratio = tl.maximum(ratio, ratio_max,",
        "device_objectives",
        "autograd",
    ),
    Mutation(
        "objectives: a clip that holds leaves a slope",
        "kernels/objectives.py",
        "slope = tl.where(is_constant, 0.0, surrogate)",
        "slope = surrogate",
        "device_objectives",
        "autograd",
    ),
    Mutation(
        "objectives: rollout weights multiply the value and not the slope",
        "kernels/objectives.py",
        "value, slope = value * rollout, slope * rollout",
        "value, slope = value * rollout, slope",
        "device_objectives backends",
        "token_loss or fused",
    ),
    Mutation(
        "objectives: k3 cancels where log ratios are small",
        "kernels/objectives.py",
        "k = tl.where(is_near, near, far - e)",
        "k = far - e",
        "device_objectives",
        "estimator or exact_to_two_ulp",
    ),
    Mutation(
        "objectives: a subclass takes its parent's formula",
        "fastpg/loss/objectives.py",
        "            cls.device_function = None\n",
        "            pass\n",
        "backends",
        "which_losses",
    ),
    Mutation(
        "finish: a lost row without checks has an ordinary loss",
        "kernels/finish.py",
        'loss = tl.where(lost, float("nan"), loss)',
        "loss = loss",
        "finish_kernel",
        "shown",
    ),
    Mutation(
        "finish: a flagged row's factor is not zero",
        "kernels/finish.py",
        "factor = tl.where(keep & in_range & factor_in_range, factor, 0.0)",
        "factor = tl.where(keep, factor, 0.0)",
        "one_pass",
        "recomputed",
    ),
    Mutation(
        "combine: +inf against others of -inf is a certainty",
        "kernels/logsumexp.py",
        'target = tl.where(target == float("inf"), float("nan"), target)',
        "target = target",
        "kernels finish_kernel parity properties",
    ),
    Mutation(
        "operator: what is absent comes back as an empty tensor",
        "fastpg/tiles/operator.py",
        "return None if template is None else leaf",
        "return leaf",
        "autograd",
        "opcheck or compiles",
    ),
    Mutation(
        "selective: masked rows are read",
        "kernels/selective.py",
        "mask = (inside & keep)[:, None]",
        "mask = inside[:, None]",
        "selective",
        "masked_rows",
    ),
    # ---- tile ops
    Mutation(
        "tile ops: target's column left in the sum",
        "fastpg/tiles/torch_tiles.py",
        "torch.where(inside, 0, e.gather(1, column))",
        "e.gather(1, column)",
        "parity",
        "test_each_head_option and one_pass",
    ),
    Mutation(
        "tile ops: logits multiplied by the temperature",
        "fastpg/tiles/torch_tiles.py",
        "score.div_(temperature)",
        "score.mul_(temperature)",
        "parity",
        "test_each_head_option",
    ),
    Mutation(
        "tile ops: entropy's Q not moved to the new pivot",
        "fastpg/tiles/torch_tiles.py",
        "weighted.copy_(decay * (weighted + total * shift)",
        "weighted.copy_(decay * weighted",
        "parity",
        "test_entropies_over_several_tiles",
    ),
    Mutation(
        "tile ops: gradient without the softcap's slope",
        "fastpg/tiles/torch_tiles.py",
        "            z.mul_(slope)\n",
        "            pass\n",
        "parity",
        "test_each_head_option",
    ),
    Mutation(
        "selective: gradient without the temperature",
        "fastpg/tiles/torch_tiles.py",
        "if temperature is None else keep / temperature[:, 0]",
        "if temperature is None else keep / torch.ones_like(temperature[:, 0])",
        "selective",
        "temperatures",
    ),
    # ---- schedules
    Mutation(
        "rows: hidden states of masked rows are read",
        "fastpg/linear/rows.py",
        "return x if self.masked is None else x.masked_fill(self.masked[start:stop, None], 0)",
        "return x",
        "one_pass lora",
        "garbage or without_host_reads",
    ),
    Mutation(
        "one pass: factors out of range are not flagged",
        "fastpg/linear/anchored.py",
        "flagged = flagged | ~_factor_in_range(factor, g)",
        "flagged = flagged | (factor != factor)",
        "one_pass",
        "e_80_are_recomputed",
    ),
    Mutation(
        "one pass: flagged rows add to their chunk as well",
        "fastpg/linear/anchored.py",
        "factor = factor.masked_fill(flagged, 0)",
        "factor = factor",
        "one_pass",
        "recomputed",
    ),
    Mutation(
        "one pass: dW of many chunks summed in bf16",
        "fastpg/linear/anchored.py",
        "weight.dtype if once and not self.options.wide_weight else self.dtype",
        "weight.dtype if not self.options.wide_weight else self.dtype",
        "one_pass",
        "rounded_once",
    ),
    Mutation(
        "one pass: the memory behind E's rows is left as it was",
        "fastpg/linear/anchored.py",
        "exps[:, vocab:] = 0",
        "exps[:, vocab:]",
        "worst_hardware parity",
        "rows_of_e_end or (worst and test_ragged)",
    ),
    Mutation(
        "two passes: fp32 D multiplied as if it held bf16 values",
        "fastpg/tiles/torch_tiles.py",
        "stored = torch.bfloat16 if head.weight.dtype == torch.bfloat16 else out.dtype",
        "stored = out.dtype",
        "parity",
        "worst and common_component",
    ),
    Mutation(
        "products: LoRA's fp32 factors multiplied as bf16",
        "fastpg/linear/lora.py",
        "product(tile, x, transposed, False, False)",
        "product(tile, x, transposed, False, True)",
        "lora",
        "worst and test_parity",
    ),
    Mutation(
        "products: a user's weight with gaps is an operand",
        "fastpg/tiles/torch_tiles.py",
        "(weight.stride(1) == 1 and not has_gaps(weight))",
        "(weight.stride(1) == 1)",
        "properties",
        "worst and torch_backend",
    ),
    Mutation(
        "one pass: fp16 gradients rounded before the incoming factor is known",
        "fastpg/linear/linear_policy_loss.py",
        "return g * grad_loss,",
        "return g,",
        "scaling",
        "gradient_scaler",
    ),
    Mutation(
        "one pass: the incoming factor rounded to bf16",
        "fastpg/linear/linear_policy_loss.py",
        "factor = grad_loss.to(accumulation_dtype(gradient.dtype))",
        "factor = grad_loss.to(gradient.dtype)",
        "scaling",
        "scaled_in_fp32",
    ),
    Mutation(
        "two passes: z_y from another column's product",
        "fastpg/tiles/torch_tiles.py",
        "torch.cat([target_logits(_block_of(chunk, block), head).logit for block in blocks])",
        "target_logits(chunk, head).logit.roll(1)",
        "accuracy",
        "targets_logit or from_the_product",
    ),
    Mutation(
        "accuracy: no factor of H on tensor cores",
        "fastpg/crosscheck/accuracy.py",
        "terms = max(1.0, hidden_size / TENSOR_CORE_TERMS) if on_tensor_cores else 1.0",
        "terms = 1.0",
        "accuracy crosscheck",
        "promise or tolerances_are_those",
    ),
    Mutation(
        "rows: columns side by side are an operand",
        "fastpg/linear/rows.py",
        "hidden if hidden.stride(1) == 1 else hidden.contiguous()",
        "hidden",
        "worst_hardware batch_invariance",
        "rows_side_by_side or layout_of_hidden",
    ),
    Mutation(
        "products: LoRA's B with gaps is an operand",
        "fastpg/tiles/products.py",
        "return _multiply(a, dense(b.to(dtype)))",
        "return _multiply(a, b.to(dtype))",
        "parity",
        "worst and operands_in",
    ),
    Mutation(
        "selective: the token is read in 32 bits",
        "kernels/selective.py",
        "column = tl.load(ready.TOKENS + r, mask=in_chunk, other=-1).to(tl.int64)",
        "column = tl.load(ready.TOKENS + r, mask=in_chunk, other=-1).to(tl.int32)",
        "selective",
        "outside_is_nan",
    ),
    Mutation(
        "bench: a peer may raise a RuntimeError and nothing else",
        "bench/measure.py",
        "except Exception as error:",
        "except RuntimeError as error:",
        "bench",
        "raises",
    ),
    Mutation(
        "bench: peers end in policy_loss",
        "bench/peers.py",
        "return plain_cispo_loss(logprobs, b.old_logprobs, b.advantages, b.mask)",
        "return policy_loss(logprobs, b)",
        "bench_endings",
        "ends_in_what",
    ),
    Mutation(
        "check: a GPU's kernels are not compiled before",
        "fastpg/crosscheck/command.py",
        'if small and "triton gpu" in places:',
        "if False:",
        "crosscheck_compile",
    ),
    Mutation(
        "small work: as many threads as there are",
        "fastpg/tools/threads.py",
        "torch.set_num_threads(1)",
        "torch.set_num_threads(before)",
        "crosscheck demo",
        "one_thread",
    ),
    Mutation(
        "demo: on the CPU, whatever there is",
        "fastpg/demo/command.py",
        'device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")',
        'device = "cpu"',
        "demo",
        "device",
    ),
    Mutation(
        "two passes: fp16's unit not taken out",
        "fastpg/linear/online.py",
        "sums[span].div_(fp16.unit[span, None])",
        "sums[span].div_(1.0)",
        "parity",
        "test_fp16_slices or (test_every_head_option_at_once and float16)",
    ),
    Mutation(
        "two passes: what rounding took is not given back",
        "fastpg/linear/online.py",
        "sums[span].add_(at_target.mul_(residual[span, None]))",
        "sums[span].add_(at_target.mul_(0))",
        "parity",
        "weights_with_a_common_component",
    ),
    Mutation(
        "LoRA: scale dropped",
        "fastpg/linear/lora.py",
        "return out.mul_(scale)",
        "return out",
        "lora",
        "test_parity",
    ),
    Mutation(
        "vocab-parallel: dX of one rank alone",
        "fastpg/linear/anchored.py",
        "(_summed(x, rows, group) for x in (self.dhidden, self.dlora_hidden))",
        "(x for x in (self.dhidden, self.dlora_hidden))",
        "vocab_parallel",
        "test_like_one_process and one-pass and 2",
    ),
    Mutation(
        "vocab-parallel: the owner's entry from its own sum",
        "fastpg/linear/anchored.py",
        "torch.where(in_range, -after * slope, 0)",
        "torch.where(in_range, -before * slope, 0)",
        "vocab_parallel",
        "test_like_one_process and one-pass and 2",
    ),
    # ---- objectives, reductions, estimators
    Mutation(
        "clip: bounds swapped",
        "fastpg/loss/objectives.py",
        "constant = ratio.clamp(ratio_min, ratio_max) * advantages",
        "constant = ratio.clamp(ratio_max, ratio_min) * advantages",
        "sequence_objectives objectives",
        "by_hand or equals_the_formula",
    ),
    Mutation(
        "KL penalty: wrong sign",
        "fastpg/loss/policy_loss.py",
        "values = values - kl.coef * kl(",
        "values = values + kl.coef * kl(",
        "objectives",
        "kl",
    ),
    Mutation(
        "token-mean: divided by all positions, masked ones too",
        "fastpg/loss/reductions.py",
        "count = weights.sum() if",
        "count = torch.ones_like(weights).sum() if",
        "objectives",
        "equal_the_oracle",
    ),
    Mutation(
        "metrics: the caller's log-probabilities instead of a copy",
        "fastpg/loss/policy_loss.py",
        "logprobs, old = torch.stack([logprobs, terms.old(logprobs)])",
        "old = terms.old(logprobs)",
        "metrics",
        "in_place",
    ),
    Mutation(
        "metrics: to_dict reads the host for each",
        "fastpg/loss/metrics.py",
        "numbers = torch.stack([x.detach().double() for x in values]).tolist() if values else []",
        "numbers = [x.item() for x in values]",
        "metrics",
        "reads_the_host_once",
    ),
    Mutation(
        "one pass: a token without weight hides an old log-probability that is not finite",
        "fastpg/linear/linear_policy_loss.py",
        "others = others + (old - old)",
        "others = others + 0",
        "one_pass traps",
    ),
    Mutation(
        "grpo: std without eps",
        "fastpg/advantages.py",
        "return centred / (std + eps) if scale else centred",
        "return centred / std if scale else centred",
        "advantages",
    ),
    Mutation(
        "grpo: std divides by n where n - 1 is asked for",
        "fastpg/advantages.py",
        "std = (squares / (count - int(unbiased)).clamp(min=1)).sqrt()",
        "std = (squares / count.clamp(min=1)).sqrt()",
        "advantages",
    ),
    Mutation(
        "gae: lambda ignored",
        "fastpg/advantages.py",
        "_discounted_sums(delta, sequence, gamma * lam)",
        "_discounted_sums(delta, sequence, gamma)",
        "advantages",
        "gae",
    ),
    # ---- nothing kept
    Mutation(
        "reductions: a masked token weighs 0 / D",
        "fastpg/loss/reductions.py",
        "return torch.where(mask, weights / denominator, 0).to(dtype)",
        "return (weights / denominator).to(dtype)",
        "nothing_kept",
        "weigh_nothing",
    ),
    Mutation(
        "reductions: masked_mean multiplies masked values by 0",
        "fastpg/loss/reductions.py",
        "(torch.where(mask, values, 0).to(dtype) *",
        "(values.to(dtype) *",
        "nothing_kept",
        "reach_neither",
    ),
    Mutation(
        "patched: the loss is a sum over a count of 0",
        "fastpg/integrations/transformers.py",
        "loss = mean_of_kept(-out.logprobs, tokens != validation.IGNORED_TOKEN, count)",
        "loss = -out.logprobs.sum() / (1 if count is None else count)",
        "nothing_kept",
        "patched_without_items",
    ),
    # ---- float32 heads
    Mutation(
        "fp32_head: autocast wins over it",
        "fastpg/linear/call.py",
        "if head.fp32_head:",
        "if head.fp32_head and not torch.is_autocast_enabled(hidden.device.type):",
        "fp32_head",
        "the_error_of",
    ),
    Mutation(
        "fp32_head: a float32 weight is a request",
        "fastpg/linear/call.py",
        "if head.fp32_head:",
        "if head.fp32_head or head.weight.dtype == torch.float32:",
        "fp32_head",
        "autocast_wins_by_default",
    ),
    Mutation(
        "two passes: autocast narrows the products of backward",
        "fastpg/linear/linear_logprobs.py",
        "with torch.autocast(rows.hidden.device.type, enabled=False):",
        'with torch.autocast(rows.hidden.device.type, enabled=torch.is_autocast_enabled("cpu")):',
        "fp32_head",
        "backward_may",
    ),
    Mutation(
        "from_model: a head that casts is used in its own dtype",
        "fastpg/lm_head.py",
        "fp32_head = fp32_head or not _has_forward_of(layer, torch.nn.Linear)",
        "fp32_head = fp32_head or False",
        "casting_heads",
        "asked_once",
    ),
    Mutation(
        "casting heads: not tried on other weights",
        "fastpg/casting_heads.py",
        "parts = [(random(_STAND_IN_ROWS, size), None if bias is None else random(_STAND_IN_ROWS))]",
        "parts = []",
        "casting_heads",
        "another_layers_weight",
    ),
    Mutation(
        "casting heads: not tried on all of the vocabulary",
        "fastpg/casting_heads.py",
        "    if whole:",
        "    if False:",
        "casting_heads",
        "refused_as_before",
    ),
    Mutation(
        "casting heads: a product in 16 bits passes",
        "fastpg/casting_heads.py",
        "8 * torch.finfo(torch.float32).eps",
        "torch.finfo(torch.bfloat16).eps",
        "casting_heads",
        "refused_as_before",
    ),
    Mutation(
        "TRL: cast_lm_head_to_fp32 is forgotten",
        "fastpg/integrations/trl.py",
        "fp32_head=self.settings.cast_lm_head_to_fp32",
        "fp32_head=False",
        "trl",
        "test_bf16",
    ),
    Mutation(
        "ranks need not agree on fp32_head",
        "fastpg/distributed/agreement.py",
        "int(head.fp32_head), ",
        "0, ",
        "vocab_parallel",
        "other and fp32_head",
    ),
]

# Loaded by pytest in the copy: an editable install must not win over it.
_PLUGIN = """
from pathlib import Path

def pytest_collection_finish(session):
    import fastpg, fastpg.kernels
    for module in (fastpg, fastpg.kernels):
        assert Path(__file__).parent in Path(module.__file__).parents, module.__file__
"""


def place(folder: Path, file: str) -> Path:
    """Where a file of the tree is in its copy: the package is laid out as it is installed, in a folder of its own."""
    if file.startswith("bench/"):
        return folder / file
    return folder / "package" / ("fastpg/" + file if file.startswith("kernels/") else file)


def copy_tree(folder: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(ROOT / "fastpg", folder / "package" / "fastpg", ignore=ignored)
    shutil.copytree(ROOT / "kernels", folder / "package" / "fastpg" / "kernels", ignore=ignored)
    for name in ("tests", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "package" / "imports_the_copy.py").write_text(_PLUGIN)


def run_tests(folder: Path, tests: str, only: str) -> Result:
    """pytest -x in a copy. Caught: a test ran and failed."""
    files = [f"tests/test_{name}.py" for name in tests.split()]
    options = [
        "-x",
        "-q",
        "-rf",
        "--tb=no",
        "-p",
        "imports_the_copy",
        "-p",
        "no:cacheprovider",
        *(["-k", only] if only else []),
    ]
    settings = {"PYTHONPATH": str(folder / "package"), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - start
    failed = re.search(r"^(?:FAILED|ERROR) tests/test_(\S+?\.py::[^\n]*?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return Result(False, done.stdout.strip().splitlines()[-1], seconds)
    if done.returncode == 1 and failed:
        return Result(True, failed[1], seconds)
    return Result(False, f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]}", seconds)


def without_mutation(tests: str, only: list[str]) -> Result:
    """What has to catch something passes as it is."""
    with tempfile.TemporaryDirectory(prefix="fastpg-") as name:
        copy_tree(Path(name))
        return run_tests(Path(name), tests, " or ".join(dict.fromkeys(only)))


def with_mutation(mutation: Mutation) -> Result:
    with tempfile.TemporaryDirectory(prefix="fastpg-") as name:
        copy_tree(Path(name))
        path = place(Path(name), mutation.file)
        text = path.read_text()
        if text.count(mutation.old) != 1:
            return Result(False, f"old text found {text.count(mutation.old)} times in {mutation.file}", 0.0)
        path.write_text(text.replace(mutation.old, mutation.new))
        return run_tests(Path(name), mutation.tests, mutation.only)


def main() -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help="mutations whose names contain this; all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutations at a time (default: one per core)")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if not arguments.names or any(n in m.name for n in arguments.names)]
    if not chosen:
        parser.error(f"no mutation has one of {arguments.names} in its name")

    sane: dict[str, list[str]] = {}
    for m in chosen:
        sane.setdefault(m.tests, []).append(f"({m.only})" if m.only else "test")

    start = time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        unchanged = pool.map(without_mutation, sane, sane.values())
        results = list(pool.map(with_mutation, chosen))
    table = Table("mutation", "caught by", "s", title=f"{len(chosen)} mutations, {time.monotonic() - start:.0f} s")
    failures = 0
    for tests, result in zip(sane, unchanged, strict=True):
        passes = not result.caught and " passed" in result.by
        failures += not passes
        table.add_row(f"none: {tests}", ("" if passes else "[red]fails[/]: ") + escape(result.by), f"{result.seconds:.0f}")
    table.add_section()
    for mutation, result in zip(chosen, results, strict=True):
        failures += not result.caught
        said = ("" if result.caught else "[red]survives[/]: ") + escape(result.by)
        table.add_row(mutation.name, said, f"{result.seconds:.0f}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(f"{sum(r.caught for r in results)} of {len(chosen)} caught")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
