"""What tests with TRL share. Imported where a fixture is asked for: TRL may not be installed."""

import gc

import pytest


@pytest.fixture(autouse=True)
def _no_garbage_collection_over_imports():
    """accelerate collects garbage twice a training run. Frameworks are imported by tests, after conftest has frozen the rest.

    60 CPU seconds of the suite were spent so, on two cores of an AMD EPYC with AVX2.
    """
    yield
    gc.freeze()


@pytest.fixture(scope="module")
def tokenizer():
    from tiny_trl import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def make(tokenizer, tmp_path):
    from tiny_trl import maker

    return maker(tokenizer, tmp_path)


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of each call of linear_logprobs by the integration."""
    from fastpg import linear_logprobs
    from fastpg.integrations import trl

    made = []

    def counted(*args, **kwargs):
        made.append(kwargs)
        return linear_logprobs(*args, **kwargs)

    monkeypatch.setattr(trl, "linear_logprobs", counted)
    return made
