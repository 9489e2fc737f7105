"""Keeps the checkout off sys.path (its kernels/ would shadow Hugging Face's `kernels`) and poisons uninitialised memory.

Without a GPU the kernels run in Triton's interpreter, which has to be asked for before they are imported.
"""

import functools
import gc
import importlib.util
import os
import sys
from pathlib import Path

# Most tensors here are small: a second thread costs more than it brings, and much more on a busy machine. Set before
# numpy and torch are imported, which read it then, and inherited by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

import interpreted_products
import pairs
import pytest
import torch
import worst_hardware

torch.set_num_threads(1)  # also where a plugin has imported torch before

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    interpreted_products.use_one_order()
    if importlib.util.find_spec("triton"):
        import fast_interpreter

        fast_interpreter.use()

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _ROOT]


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory():
    """torch.empty is filled with NaN, so that an output that is not written everywhere shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every combination of parameters, everything that is compiled")


def pytest_generate_tests(metafunc):
    suite = metafunc.module.__name__.rpartition(".")[2]
    if suite in worst_hardware.SUITES and not metafunc.definition.get_closest_marker("this_cpu"):
        metafunc.parametrize("hardware", [worst_hardware.HERE, worst_hardware.WORST], indirect=True, scope="module")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    dropped = pairs.unneeded(items) + [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=dropped)
    kept = set(items) - set(dropped)
    items[:] = [item for item in items if item in kept]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getoption("dist") == "loadgroup":
        from few_scopes import FewScopes

        return FewScopes(config, log)


def pytest_collection_finish():
    """What imports and collection made lives until the end: the garbage collector need not look at it after every few objects.

    On two cores of an AMD EPYC, tests that make many objects (TRL, autograd) took 71 and 73 s so, and 93 and 96 s without.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def hardware(request):
    """Which matrix product a module's tests run on."""
    yield from worst_hardware.product_of(getattr(request, "param", worst_hardware.HERE))


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer); ten seconds and more. Tests that use it belong to the xdist group of this name."""
    import gguf

    from fastpg.demo.tasks import load_smollm2

    with pytest.MonkeyPatch.context() as patch:  # transformers reads the file three times, and makes a map for every module
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        return load_smollm2()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
