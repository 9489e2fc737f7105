"""What a call asks of the process around it: no host reads, no thread, no default of the user's, nothing left changed."""

import multiprocessing
import os
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from corrections import ZERO_UNSCORED
from problems import random_problem
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastpg import (
    CISPO,
    DPPOKL,
    DPPOTV,
    GSPO,
    SAPO,
    IcePop,
    ImportanceWeighted,
    KLPenalty,
    LMHead,
    PPOClip,
    Reinforce,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
    selective_logprobs,
)
from fastpg.linear.gathered import gathered_partials
from fastpg.linear.rows import Rows
from fastpg.tiles.host_read import HostRead
from fastpg.tiles.structures import Asked, Entries, Head

ROWS, VOCAB, SIZE = 64, 300, 16
OBJECTIVES = [Reinforce(), ImportanceWeighted(), CISPO(), PPOClip(), SAPO(), DPPOTV(), DPPOKL(), IcePop()]
OBJECTIVES += [lambda logp, old, a: (logp - old).exp() * a]


def inputs(lora=False, softcap=None):
    hidden, weight = torch.randn(ROWS, SIZE, requires_grad=True), torch.randn(VOCAB, SIZE, requires_grad=True)
    factors = (torch.randn(2, SIZE, requires_grad=True), torch.randn(VOCAB, 2, requires_grad=True), 0.5) if lora else None
    head = LMHead(weight, torch.zeros(VOCAB, requires_grad=True), softcap, lora=factors)
    tokens, old = torch.randint(0, VOCAB, (ROWS,)), -torch.rand(ROWS)
    mask = torch.rand(ROWS) > 0.3
    return hidden, head, tokens, old, torch.randn(ROWS), mask


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("kl", [None, KLPenalty(0.1)], ids=["", "kl"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda f: type(f).__name__)
def test_one_pass_reads_nothing_without_checks(objective, kl, lora):
    """Fake tensors have no values: any read of the host raises."""
    with FakeTensorMode():
        hidden, head, tokens, old, advantages, mask = inputs(lora, softcap=5.0)
        out = linear_policy_loss(
            hidden, head, tokens, old, advantages, objective=objective, mask=mask, temperature=torch.rand(ROWS) + 0.5, kl=kl,
            ref_logprobs=old if kl else None, rollout_weights=torch.rand(ROWS), entropy=True, check=False,
        )  # fmt: skip
        out.loss.backward()
        leaves = [hidden, head.weight, head.bias, *(head.lora[:2] if lora else ())]
        assert all(x.grad.shape == x.shape for x in leaves)


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("entropy", [False, True])
def test_two_passes_read_nothing_without_checks(entropy, lora):
    with FakeTensorMode():
        hidden, head, tokens, *_, mask = inputs(lora)
        logprobs, entropies = linear_logprobs(hidden, head, tokens, mask=mask, entropy=entropy, check=False)
        (logprobs.sum() + (entropies.sum() if entropy else 0)).backward()
        assert hidden.grad.shape == hidden.shape
        logits = torch.randn(ROWS, VOCAB, requires_grad=True)
        selective_logprobs(logits, tokens, mask=mask, entropy=entropy, check=False).logprobs.sum().backward()
        assert logits.grad.shape == logits.shape


def test_a_fake_tensor_of_any_size_has_no_memory_to_ask_for():
    """E and dW of a real head are in large pages; here they have none. Also V = 262144, whose one tile of fp32 rows needs more
    than the default workspace."""
    with FakeTensorMode():
        for vocab in (49_152, 262_144):
            hidden, weight = torch.randn(2048, 576, requires_grad=True), torch.randn(vocab, 576, requires_grad=True)
            tokens, old = torch.randint(0, vocab, (2048,)), torch.zeros(2048)
            linear_policy_loss(hidden, weight, tokens, old, old, objective=CISPO(), check=False).loss.backward()
            assert weight.grad.shape == weight.shape


def test_a_default_is_no_reason_to_refuse_and_a_request_is():
    with FakeTensorMode():
        hidden, weight, tokens, old = torch.randn(8, 576), torch.randn(262_144, 576), torch.zeros(8).long(), torch.zeros(8)
        hidden.requires_grad_()
        linear_policy_loss(hidden, weight, tokens, old, old, objective=CISPO(), check=False)
        with pytest.raises(ValueError, match="workspace=268435456 bytes is too small"):
            linear_policy_loss(hidden, weight, tokens, old, old, objective=CISPO(), check=False, workspace=2**28)


def test_policy_loss_reads_nothing():
    with FakeTensorMode():
        logprobs = torch.randn(8, 8, requires_grad=True)
        for objective in (*OBJECTIVES, GSPO()):
            policy_loss(logprobs, -torch.rand(8, 8), torch.randn(8), objective=objective).loss.backward()


def test_statistics_of_small_sets_read_nothing():
    """Rows and tokens of sets are counted before. No size depends on values then, whatever is asked; dots are the kernels'."""
    with FakeTensorMode():
        rows = Rows(torch.randn(5, SIZE), None, None, None, torch.zeros(5, dtype=torch.int64), None)
        row, column = torch.zeros(2, 12, dtype=torch.int64).unbind()
        entries, asked = Entries(row, column, torch.zeros(5, dtype=torch.int64)), Asked(*[True] * 6, top_k=3)
        kernels = SimpleNamespace(gathered_dots=lambda *_: torch.randn(12))
        head = Head(torch.randn(VOCAB, SIZE), None, torch.randn(VOCAB), 3.0, 1.0)
        found = gathered_partials(kernels, rows, head, entries, asked, None).partials
    assert found.further.values.shape == found.further.ids.shape == (5, 3)


@pytest.mark.parametrize("correction", [None, ZERO_UNSCORED], ids=["plain", "zero"])
def test_decoupled_losses_read_nothing_without_checks(correction):
    """To see that every token is scored, the host waits: `policy_loss` too, but not for a correction that gives weight 0."""
    with FakeTensorMode():
        hidden, head, tokens, old, advantages, mask = inputs()
        named = {"objective": CISPO(), "rollout_logprobs": -torch.rand(ROWS), "rollout_correction": correction}
        linear_policy_loss(hidden, head, tokens, old, advantages, mask=mask, check=False, **named).loss.backward()
        logprobs = torch.randn(ROWS, requires_grad=True)
        policy_loss(logprobs, old, advantages, mask=mask, check=False, **named).loss.backward()
        with pytest.raises(DataDependentOutputException) if correction is None else nullcontext():
            policy_loss(logprobs, old, advantages, mask=mask, **named)


def test_fake_tensors_see_a_read():
    """Else the tests above prove nothing."""
    with FakeTensorMode():
        hidden, head, tokens, *_ = inputs()
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            linear_logprobs(hidden, head, tokens, mask=torch.rand(ROWS) > 0.5, check=True)


class Reads(TorchDispatchMode):
    """Operators whose result the host must wait for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.item")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", ["one-pass", "two-pass"])
def test_with_checks_the_host_reads_the_rows_and_the_flags(schedule, monkeypatch):
    """The numbers of tokens, and that of flagged rows, are read through HostRead. On a CPU so is that of silenced rows, unless
    nobody wants it."""
    waits = []
    read = HostRead.read
    monkeypatch.setattr(HostRead, "read", lambda self: waits.append(self) or read(self))
    hidden, head, tokens, old, advantages, mask = inputs()
    with Reads() as reads:
        if schedule == "one-pass":
            linear_policy_loss(
                hidden, head, tokens, old, advantages, objective=CISPO(), mask=mask, skip_silenced=False
            ).loss.backward()
        else:
            linear_logprobs(hidden, head, tokens, mask=mask, skip_silenced=False).logprobs.sum().backward()
    # On a CPU, where that is free, lost rows of E and the incoming factor are read too. The size of nonzero_static is known.
    names = [name.removeprefix("aten.").removesuffix(".default") for name in reads.names]
    assert names.count("nonzero") <= (schedule == "one-pass")  # where rows are flagged
    found = [name for name in names if name != "nonzero"]
    assert found[0] == "nonzero_static"
    assert set(found[1:]) == ({"_local_scalar_dense"} if schedule == "one-pass" else set())
    assert len(found) <= 3
    assert len(waits) == (2 if schedule == "one-pass" else 1)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_threads(backend):
    """Two threads call different functions at once: each gets what it gets alone, and the precision switch is as before."""
    switch = torch.backends.mkldnn.matmul
    problem = random_problem(300, 1000, torch.float32)

    def one_pass():
        leaves = problem.leaves()
        out = linear_policy_loss(
            leaves.hidden,
            leaves.head,
            leaves.tokens,
            leaves.old_logprobs,
            leaves.advantages,
            objective=CISPO(),
            backend=backend,
        )
        out.loss.backward()
        return out.logprobs, leaves.hidden.grad, leaves.head.weight.grad

    def two_pass():
        leaves = problem.leaves()
        logprobs = linear_logprobs(leaves.hidden, leaves.head, leaves.tokens, backend=backend).logprobs
        logprobs.sum().backward()
        return logprobs.detach(), leaves.hidden.grad, leaves.head.weight.grad

    # the interpreter itself is not made for threads; there the calls run one after the other, each in a thread of its own
    lock = threading.Lock() if backend == "triton" else nullcontext()
    want, found, before = {f: f() for f in (one_pass, two_pass)}, {}, switch.fp32_precision

    def work(function):
        results = []
        for _ in range(2 if backend == "triton" else 5):
            with lock:
                results.append(function())
        found[function] = results

    threads = [threading.Thread(target=work, args=(f,)) for f in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for function, results in found.items():
        assert len(results) in (2, 5)
        for result in results:
            for got, expected in zip(result, want[function], strict=True):
                assert torch.equal(got, expected)
    assert switch.fp32_precision == before


def _child(queue):
    hidden, head, tokens, old, advantages, _ = inputs()
    torch.set_num_threads(1)
    out = linear_policy_loss(hidden, head, tokens, old, advantages, objective=CISPO())
    out.loss.backward()
    queue.put(bool(hidden.grad.isfinite().all()))


@pytest.mark.skipif(not hasattr(os, "fork") or torch.cuda.is_available(), reason="a CUDA context cannot be forked")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_after_import_and_use():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue,))
    process.start()
    assert queue.get(timeout=60)
    process.join()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("default", ["dtype", "device"])
def test_the_users_defaults_change_nothing(default, backend, dtype):
    problem = random_problem(40, 200, dtype, bias=True, temperature=0.7, lora=2)
    logits, ids = torch.randn(3, 9), torch.tensor([1, 2, 3])

    def results():
        leaves = problem.leaves()
        out = linear_policy_loss(
            leaves.hidden, leaves.head, leaves.tokens, leaves.old_logprobs, leaves.advantages, objective=CISPO(),
            temperature=0.7, backend=backend, entropy=True,
        )  # fmt: skip
        out.loss.backward()
        two_pass = linear_logprobs(leaves.hidden, leaves.head, leaves.tokens, entropy=True, backend=backend)
        given = selective_logprobs(logits, ids, temperature=0.7, entropy=True, backend=backend)
        gradients = leaves.hidden.grad, leaves.head.weight.grad, leaves.head.bias.grad, leaves.head.lora.b.grad
        return [x.detach() for x in (out.loss, out.logprobs, *out.metrics.values(), *gradients, *two_pass, *given)]

    want, before = results(), torch.get_default_dtype()
    try:
        if default == "dtype":
            torch.set_default_dtype(torch.float64)
        else:  # whatever was made without naming a device would be there, without values
            torch.set_default_device("meta")
        got = results()
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
