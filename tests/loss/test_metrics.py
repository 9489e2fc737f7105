"""Metrics are a Mapping that is computed when it is looked at: what a trainer does with a dict of tensors, it does here."""

import copy
import pickle
from collections.abc import Mapping

import pytest
import torch
from operations import counted
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpg import CISPO, GSPO, PPOClip, linear_cispo_loss, linear_logprobs, linear_policy_loss, policy_loss

N, H, V = 24, 8, 50


def inputs(device="cpu"):
    """hidden, weight, tokens, old log-probabilities, advantages (some 0) and mask."""
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    advantages = torch.randn(N)
    advantages[::4] = 0
    tensors = hidden, weight, torch.randint(0, V, (N,)), -3 - torch.rand(N), advantages, torch.rand(N) > 0.3
    return [x.detach().to(device).requires_grad_(x.requires_grad) for x in tensors]


def one_pass(check=True, **options):
    *arguments, mask = inputs()
    return linear_cispo_loss(*arguments, mask=mask, check=check, entropy=True, **options)


def from_logprobs(objective=None, masked=True):
    logprobs, old, advantages = -torch.rand(4, 6), -torch.rand(4, 6), torch.randn(4)
    mask = torch.rand(4, 6) > 0.3 if masked else None
    return policy_loss(logprobs, old, advantages, objective=objective or PPOClip(), mask=mask)


MAKERS = {
    "one pass": one_pass,
    "one pass, unchecked": lambda: one_pass(check=False),
    "policy_loss": from_logprobs,
    "policy_loss, no mask": lambda: from_logprobs(masked=False),
    "GSPO": lambda: from_logprobs(GSPO()),
}
COUNTS = ("tokens", "skipped_tokens", "recomputed_tokens", "repeated_products", "silenced_tokens")
COPIES = [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: type(x)(dict(x))]
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@makers
def test_a_mapping_of_detached_0d_tensors(make):
    metrics = make().metrics
    assert isinstance(metrics, Mapping)
    assert list(metrics) == list(metrics.keys()) == list(dict(metrics))
    assert len(metrics) == len(dict(metrics)) >= 10
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    assert "ess" in metrics
    assert "no such metric" not in metrics
    assert metrics.get("no such metric") is None
    with pytest.raises(KeyError, match="no such metric"):
        metrics["no such metric"]


@makers
def test_to_dict_reads_the_host_once(make):
    metrics = make().metrics
    with counted() as step:
        numbers = metrics.to_dict()
    assert step.counts["_local_scalar_dense"] == 0
    assert numbers == {name: value.item() for name, value in metrics.items()}
    for name, number in numbers.items():
        assert type(number) is (int if name in COUNTS else float), name


def test_nothing_is_computed_before_a_look():
    """Beside one copy of the log-probabilities, and one of a mask that is the caller's."""
    for make in MAKERS.values():
        step = make().metrics
        with counted() as few:
            step["tokens"]
        with counted() as all_of_them:
            dict(step)
        assert few.total <= 3
        assert all_of_them.total > 20


@makers
def test_or_adds_entries_without_a_look(make):
    metrics = make().metrics
    before = metrics.to_dict()
    with counted() as step:
        both = metrics | {"aux_loss": torch.tensor(2.0), "ess": torch.tensor(-1.0)}
    assert step.total <= 2  # torch.tensor
    assert both["aux_loss"] == 2
    assert both["ess"] == -1  # the right one, as in a dict
    assert both.to_dict() == before | {"aux_loss": 2.0, "ess": -1.0}
    assert "aux_loss" not in metrics
    assert metrics.to_dict() == before
    left = {"aux_loss": torch.tensor(3.0), "ess": torch.tensor(7.0)} | metrics
    assert isinstance(left, dict)
    assert {name: value.item() for name, value in left.items()} == {"aux_loss": 3.0} | before
    metrics |= {"aux_loss": torch.tensor(4.0)}
    assert metrics["aux_loss"] == 4


@makers
@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: type(x)(dict(x))]
)
def test_copies_and_pickles_are_the_same(make, again):
    """The last is what accelerate's helpers do to an output of a model: the type called with a dict."""
    metrics = make().metrics | {"mine": torch.tensor(1.0)}
    other = again(metrics)
    assert type(other) is type(metrics)
    assert list(other) == list(metrics)
    assert other.to_dict() == metrics.to_dict()


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_later_changes_in_place_alter_nothing(check, masked):
    hidden, weight, tokens, old, advantages, mask = inputs()
    if not masked:
        mask.fill_(True)
        advantages.fill_(1.0)
    out = linear_policy_loss(hidden, weight, tokens, old, advantages, objective=PPOClip(), mask=mask, check=check, entropy=True)
    before = out.metrics.to_dict()
    for x in (hidden, weight, old, advantages, out.logprobs):
        x.data.fill_(0.5)
    mask.logical_not_()
    tokens.zero_()
    assert out.metrics.to_dict() == before


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("objective", [PPOClip(), GSPO()])
def test_later_changes_in_place_alter_nothing_of_policy_loss(packed, masked, objective):
    logprobs, old, mask = -torch.rand(24), -torch.rand(24), torch.rand(24) > 0.3
    ids = torch.arange(24) // 6
    if not packed:
        logprobs, old, mask, ids = (*(x.view(4, 6) for x in (logprobs, old, mask)), None)
    out = policy_loss(logprobs, old, torch.randn(4), objective=objective, mask=mask if masked else None, sequence_ids=ids)
    before = out.metrics.to_dict()
    for x in (logprobs, old, out.logprobs):
        x.fill_(-7.0)
    mask.logical_not_()
    if ids is not None:
        ids.zero_()
    assert out.metrics.to_dict() == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, from tracing any autograd.Function
def test_an_output_of_a_fullgraph_compile():
    def call(hidden, weight, tokens, old, advantages, mask):
        out = linear_cispo_loss(hidden, weight, tokens, old, advantages, mask=mask, check=False, entropy=True)
        return out, out.metrics | {"again": out.metrics["ess"]}

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    arguments = inputs()
    want, (out, more) = call(*arguments)[0], compiled(*arguments)
    assert type(out.metrics) is type(want.metrics)
    assert out.metrics.to_dict() == pytest.approx(want.metrics.to_dict(), rel=1e-5)
    assert more["again"] == out.metrics["ess"]

    logprobs = linear_logprobs(*arguments[:3]).logprobs.detach()
    compiled = torch.compile(lambda *x: policy_loss(*x, objective=CISPO()).metrics, fullgraph=True, backend="aot_eager")
    want = policy_loss(logprobs, *arguments[3:5], objective=CISPO()).metrics
    assert compiled(logprobs, *arguments[3:5]).to_dict() == pytest.approx(want.to_dict(), rel=1e-5)


def test_a_look_reads_no_value():
    """As inside a CUDA graph, where a read of the host is an error: fake tensors have no values to read."""
    with FakeTensorMode():
        *arguments, mask = inputs()
        out = linear_cispo_loss(*arguments, mask=mask, check=False, entropy=True)
        assert all(value.dim() == 0 for value in dict(out.metrics).values())
        assert all(value.dim() == 0 for value in from_logprobs(GSPO()).metrics.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_inside_a_cuda_graph_a_look_shows_the_last_replay():
    *arguments, mask = inputs("cuda")
    old = arguments[3]

    def call():
        return linear_cispo_loss(*arguments, mask=mask, check=False).metrics

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metrics = call()
        inside = metrics["ess"]
    for _ in range(2):
        old.copy_(-3 - torch.rand_like(old))
        graph.replay()
        want = call().to_dict()
        assert metrics.to_dict() == pytest.approx(want, rel=1e-5)
        assert inside.item() == pytest.approx(want["ess"], rel=1e-5)


def test_rows_are_selected_before_anything_is_computed_on_them():
    """With checks an objective sees the tokens that count, and no others; without, zeros in their place."""
    hidden, weight, tokens, old, advantages, mask = inputs()
    seen = []

    def objective(logprobs, old, advantages):
        seen.append((len(logprobs), old.clone()))
        return logprobs * advantages

    old[~mask] = torch.nan
    for check in (True, False):
        seen.clear()
        linear_policy_loss(hidden, weight, tokens, old, advantages, objective=objective, mask=mask, check=check).loss.backward()
        assert {count for count, _ in seen} == {int(mask.sum()) if check else N}
        assert all(values.isfinite().all() for _, values in seen)
