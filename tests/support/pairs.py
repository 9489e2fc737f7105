"""Of a test's combinations of parameters, few in which every two values of two parameters meet: `pytest --full` runs all.

A mistake in this library has needed one value, or two together, to show: of 85 one-token mutations of objectives, losses,
reductions, metrics and sequences none was caught by a product of values and missed by every value once.
"""

from collections.abc import Callable
from itertools import combinations

import pytest
import worst_hardware

SUITES = (
    "test_objective_values",
    "test_kl_penalty",
    "test_objective_masks",
    "test_objective_sums",
    "test_objective_metrics",
    "test_parity",
    "test_one_pass",
    "test_one_pass_autograd",
    "test_one_pass_masks",
    "test_support",
    "test_support_masks",
    "test_decoupled",
    "test_decoupled_one_pass",
    "test_cpu_products",
    "test_linear_cross_entropy",
    "test_fp32_head",
    "test_kernels",
    "test_enumeration",
    "test_memory_of_kernels",
    "test_lora",
    "test_silenced",
    "test_support_costs",
    "test_backends",
    "test_keep_kernel",
    "test_casting_heads",
    "test_selective",
    "test_weight_grad",
    "test_kept",
    "test_gradient_rows",
    "test_loss_kernels",
    "test_host_reads_and_settings",
    "test_scaling",
    "test_wire",
    "test_row_statistics",
    "test_bad_input",
    "test_batch_objectives",
)


def values(item: pytest.Item) -> set[tuple]:
    """Every value of a parameter."""
    return {(name, id(value)) for name, value in item.callspec.params.items()}


def pairs(item: pytest.Item) -> set[tuple]:
    """Every two values of two parameters; the one value where there is one parameter."""
    found = values(item)
    return set(combinations(sorted(found), 2)) if len(found) > 1 else found


def cover(items: list[pytest.Item], of: Callable[[pytest.Item], set[tuple]]) -> list[pytest.Item]:
    """Few of the items of one test function in which everything occurs that occurs in any of them: greedily, the first that
    brings most."""
    brings = {item: of(item) for item in items}
    missing, kept = set().union(*brings.values()), []
    while missing:
        best = max(items, key=lambda item: len(brings[item] & missing))
        kept.append(best)
        missing -= brings[best]
    return kept


def unneeded(items: list[pytest.Item]) -> list[pytest.Item]:
    """The items that bring nothing new: no pair in the suites named above, no value on the worst hardware."""
    functions: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        if getattr(item, "callspec", None) is None:
            continue
        worst = item.callspec.params.get("hardware") == worst_hardware.WORST
        if worst or item.module.__name__.rpartition(".")[2] in SUITES:
            functions.setdefault((item.module, item.originalname, worst), []).append(item)
    dropped = []
    for (*_, worst), group in functions.items():
        kept = set(cover(group, values if worst else pairs))
        dropped += [item for item in group if item not in kept]
    return dropped
