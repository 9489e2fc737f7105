"""torchtitan's chunked-loss contract: `FastpgLoss` beside its own `ChunkedLossWrapper`, on one process and on two ranks."""

# ruff: noqa: E402 (imports behind importorskip)

import copy
import importlib
import subprocess
import sys
import types
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from problems import relative_error, row_errors
from raising import said
from ranks import results_of, run_jobs, run_on_ranks
from torch import nn

pytest.importorskip("torchtitan")
pytestmark = pytest.mark.xdist_group("torchtitan's ranks")

from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss, MSELoss
from torchtitan.distributed.utils import get_spmd_backend, set_spmd_backend

from fastpg.crosscheck.accuracy import ROW_TOLERANCE, WEIGHT_TOLERANCE
from fastpg.integrations import torchtitan as adapter
from fastpg.integrations.torchtitan import FastpgLoss

H, V = 32, 97
f32, bf16 = torch.float32, torch.bfloat16


def of_rl(module):
    """A module of torchtitan's RL experiment, whose package wants vLLM when it is imported itself."""
    import torchtitan.experiments

    name = "torchtitan.experiments.rl"
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [f"{folder}/rl" for folder in torchtitan.experiments.__path__]
        sys.modules[name] = package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, by what torchtitan's models import
        return importlib.import_module(f"{name}.{module}")


def config_of(name):
    if name == "cross entropy":
        return CrossEntropyLoss.Config(global_vocab_size=V)
    losses = of_rl("losses")
    return losses.GRPOLoss.Config(clip_eps=0.1) if name == "GRPO" else losses.DAPOLoss.Config(ratio_clip_high=0.4)


LOSSES = ("cross entropy", "GRPO", "DAPO")


def inputs_of(name, shape, lm_head, dtype=f32, seed=0):
    """(hidden states, labels, loss_inputs): ignored labels; or ratios of every size, and tokens without a probability."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, H, generator=generator).to(dtype)
    labels = torch.randint(0, V, shape, generator=generator)
    if name == "cross entropy":
        labels[torch.rand(shape, generator=generator) < 0.3] = -100
        return hidden, labels, {"positions": torch.arange(shape[-1]).expand(shape)}
    with torch.no_grad():
        logprobs = lm_head(hidden).float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    sampled = logprobs + 0.3 * torch.randn(shape, generator=generator)
    advantages = torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.8
    for at, (difference, advantage) in enumerate([(-12.0, -1.0), (12.0, 1.0), (torch.nan, 1.0), (0.0, 0.0)]):
        sampled.view(-1)[at] = logprobs.view(-1)[at] + difference
        advantages.view(-1)[at], mask.view(-1)[at] = advantage, True
    sampled.view(-1)[5], mask.view(-1)[5] = torch.inf, False
    return hidden, labels, {"generator_logprobs": sampled, "advantages": advantages, "loss_mask": mask}


def linear(dtype=f32, seed=1):
    torch.manual_seed(seed)
    return nn.Linear(H, V, bias=False).to(dtype)


def outcome(config, lm_head, hidden, labels, count, loss_inputs):
    loss_fn = config.build(compile_config=None)
    loss_fn.set_lm_head(lm_head)
    hidden, lm_head.weight.grad = hidden.detach().clone().requires_grad_(), None
    loss, metrics = loss_fn(hidden, labels, count, **loss_inputs)
    loss.backward()
    loss = loss.full_tensor() if hasattr(loss, "full_tensor") else loss  # the wrapper's, for hidden states that are a DTensor
    return types.SimpleNamespace(loss=loss.detach(), metrics=metrics, hidden=hidden.grad, weight=lm_head.weight.grad)


def check(got, want, dtype=f32):
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    assert list(got.metrics) == list(want.metrics)
    for name, value in want.metrics.items():
        torch.testing.assert_close(got.metrics[name].float(), value.float(), rtol=1e-4, atol=1e-5, msg=name)
    rows = want.hidden.flatten(0, -2).norm(dim=-1) > 0
    errors = row_errors(got.hidden.flatten(0, -2)[rows], want.hidden.flatten(0, -2)[rows])
    assert errors.max() < ROW_TOLERANCE.get(dtype, 1e-5)
    assert not got.hidden.flatten(0, -2)[~rows].any()
    assert relative_error(got.weight, want.weight) < WEIGHT_TOLERANCE[dtype]


@pytest.mark.parametrize("check_values", [False, True])
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_metrics_and_gradients_are_those_of_torchtitans_wrapper(name, dtype, check_values):
    """In bfloat16 beside the wrapper on the same numbers in float32: its logits are rounded otherwise."""
    lm_head, config = linear(dtype), config_of(name)
    hidden, labels, loss_inputs = inputs_of(name, (2, 24), lm_head, dtype)
    count = torch.tensor(31) if name == "cross entropy" else 31
    wrapper = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=config)
    want = outcome(wrapper, copy.deepcopy(lm_head).float(), hidden.float(), labels, count, loss_inputs)
    got = outcome(FastpgLoss.Config(loss_fn=config, check=check_values), lm_head, hidden, labels, count, loss_inputs)
    check(got, want, dtype)
    assert got.hidden.dtype == got.weight.dtype == dtype


@pytest.mark.parametrize("name", LOSSES)
def test_packed_rows_of_tokens_as_newer_torchtitans_have(name):
    """(T, H), since torchtitan's commit 73aed7f. 0.3.0's own losses want (B, L)."""
    lm_head, config = linear(), config_of(name)
    hidden, labels, loss_inputs = inputs_of(name, (1, 24), lm_head)
    want = outcome(ChunkedLossWrapper.Config(num_chunks=2, loss_fn=config), lm_head, hidden, labels, 17, loss_inputs)
    loss_inputs = {key: x[0] if x.dim() == 2 else x for key, x in loss_inputs.items()}
    got = outcome(FastpgLoss.Config(loss_fn=config), lm_head, hidden[0], labels[0], 17, loss_inputs)
    got.hidden = got.hidden[None]
    check(got, want)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_accumulate_over_micro_batches_of_one_global_count(name):
    """Losses of micro-batches, with a token count of all of them, have the gradient of one batch."""
    lm_head, config = linear(), config_of(name)
    parts = [inputs_of(name, (2, 12), lm_head, seed=seed) for seed in (3, 4)]
    whole = [torch.cat([part[i] for part in parts]) for i in (0, 1)]
    further = {key: torch.cat([part[2][key] for part in parts]) for key in parts[0][2]}
    want = outcome(ChunkedLossWrapper.Config(num_chunks=2, loss_fn=config), lm_head, *whole, 40, further)
    loss_fn = FastpgLoss.Config(loss_fn=config).build()
    loss_fn.set_lm_head(lm_head)
    lm_head.weight.grad, total = None, 0
    for hidden, labels, loss_inputs in parts:
        loss, _ = loss_fn(hidden.requires_grad_(), labels, 40, **loss_inputs)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, want.loss, rtol=1e-5, atol=1e-6)
    assert relative_error(lm_head.weight.grad, want.weight) < 2 * WEIGHT_TOLERANCE[f32]


@pytest.mark.parametrize("name", LOSSES)
def test_validation_calls_without_a_count_and_without_gradients(name):
    lm_head, config = linear(), config_of(name)
    hidden, labels, loss_inputs = inputs_of(name, (2, 12), lm_head)
    ours, theirs = FastpgLoss.Config(loss_fn=config).build(), ChunkedLossWrapper.Config(num_chunks=2, loss_fn=config).build()
    for loss_fn in (ours, theirs):
        loss_fn.set_lm_head(lm_head)
    with torch.no_grad():
        (got, _), (want, _) = (loss_fn(hidden, labels, **loss_inputs) for loss_fn in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not got.requires_grad


def test_a_small_workspace_gives_the_same():
    lm_head = linear()
    hidden, labels, loss_inputs = inputs_of("cross entropy", (4, 256), lm_head)
    one = outcome(FastpgLoss.Config(), lm_head, hidden, labels, 100, loss_inputs)
    many = outcome(FastpgLoss.Config(workspace=430_000), lm_head, hidden, labels, 100, loss_inputs)
    check(many, one)


def test_no_token_counts():
    lm_head = linear()
    hidden, labels, _ = inputs_of("cross entropy", (2, 8), lm_head)
    got = outcome(FastpgLoss.Config(), lm_head, hidden, torch.full_like(labels, -100), 5, {})
    assert got.loss == 0
    assert not got.hidden.any()
    assert not got.weight.any()


def test_a_head_that_torchtitan_casts_to_float32():
    cast = of_rl("models.cast_linear").CastLinear
    layer = cast.Config(in_features=H, out_features=V).build().to(bf16)
    hidden, labels, loss_inputs = inputs_of("GRPO", (2, 8), layer)  # in float32, beside a weight in bfloat16
    config = config_of("GRPO")
    want = outcome(ChunkedLossWrapper.Config(num_chunks=1, loss_fn=config), layer, hidden, labels, 9, loss_inputs)
    got = outcome(FastpgLoss.Config(loss_fn=config), layer, hidden, labels, 9, loss_inputs)
    check(got, want, bf16)
    assert relative_error(got.hidden, want.hidden) < 1e-5
    layer.compute_dtype = bf16
    with pytest.raises(ValueError, match="or a CastLinear in float32; got"):
        FastpgLoss.Config().build().set_lm_head(layer)


def test_the_layers_forward_is_back_after_the_call_and_after_an_error():
    lm_head = linear()
    loss_fn = FastpgLoss.Config().build()
    loss_fn.set_lm_head(lm_head)
    hidden, labels, _ = inputs_of("cross entropy", (2, 8), lm_head)
    loss_fn(hidden, labels)
    with pytest.raises(ValueError, match="labels"):
        loss_fn(hidden, labels[:, 1:])
    assert "forward" not in vars(lm_head)
    lm_head._parallelized = True
    lm_head.forward = wrapped = lambda hidden: hidden
    loss_fn.set_lm_head(lm_head)
    loss_fn(hidden, labels)
    assert lm_head.forward is wrapped


class Own(CrossEntropyLoss):
    """A loss of a user's."""

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        pass

    def __call__(self, pred, labels, global_valid_tokens=None, **kwargs):
        return 2 * super().__call__(pred, labels, global_valid_tokens)[0], {}


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked_forward():
    layer = linear()
    layer.forward = lambda x: 2 * x
    return layer


WANTED = "FastpgLoss.Config(loss_fn=...) must be the config of CrossEntropyLoss, GRPOLoss or DAPOLoss"
ERRORS = {
    "a loss of another kind": (
        lambda: FastpgLoss.Config(loss_fn=MSELoss.Config()).build(),
        f"{WANTED}; got that of MSELoss: keep ChunkedLossWrapper for it",
    ),
    "a loss with another formula": (
        lambda: FastpgLoss.Config(loss_fn=Own.Config()).build(),
        f"{WANTED}; got that of Own: keep ChunkedLossWrapper for it",
    ),
    "a layer with a forward of its own": (
        lambda: FastpgLoss.Config().build().set_lm_head(Scaled(H, V)),
        "FastpgLoss wants an lm_head that is a Linear of torchtitan's, or a CastLinear in float32; got Scaled, "
        "whose forward is another: keep ChunkedLossWrapper for it",
    ),
    "a forward on the instance": (
        lambda: FastpgLoss.Config().build().set_lm_head(hooked_forward()),
        "FastpgLoss wants an lm_head that is a Linear of torchtitan's, or a CastLinear in float32; got "
        "torch.nn.modules.linear.Linear, whose forward is another: keep ChunkedLossWrapper for it",
    ),
    "no lm_head": (
        lambda: FastpgLoss.Config().build()(torch.randn(3, H), torch.zeros(3, dtype=torch.int64)),
        "FastpgLoss has no lm_head: call set_lm_head(model.lm_head) before, as torchtitan's trainers do",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_expressed_is_an_error(name):
    call, words = ERRORS[name]
    assert said(call).replace(f"{__name__}.Scaled", "Scaled") == f"ValueError: {words}"


def test_full_dtensor_is_refused():
    before = get_spmd_backend()
    set_spmd_backend("full_dtensor")
    try:
        with pytest.raises(ValueError, match='"spmd_types" or "partial_dtensor"; got "full_dtensor", where hidden'):
            FastpgLoss.Config().build().set_lm_head(linear())
    finally:
        set_spmd_backend(before)


def test_an_absent_torchtitan_is_an_import_error_and_fastpg_does_not_want_it(tmp_path):
    code = """
import sys
from importlib import metadata
def version(name):
    raise metadata.PackageNotFoundError(name)
metadata.version = version
import fastpg
assert "torchtitan" not in sys.modules
try:
    import fastpg.integrations.torchtitan
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torchtitan is not installed; this adapter was tested with torchtitan 0.3.0"


def test_torchtitans_trainers_see_a_chunked_loss():
    """The one thing that they ask for before they leave the lm_head out of the model's forward."""
    assert isinstance(FastpgLoss.Config().build(compile_config=None), ChunkedLossWrapper)
    assert issubclass(FastpgLoss.Config, BaseLoss.Config)
    assert FastpgLoss.Config().to_dict() == {
        "loss_fn": {"global_vocab_size": None}, "workspace": None, "backend": None, "check": False,
    }  # fmt: skip


# ---- two ranks


def tp_case(rank, backend, name, vocab):
    """[ours, the wrapper's]: with rows of the weight on each rank, as torchtitan shards them; gradients as whole tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torchtitan.distributed.spmd_types import set_current_spmd_mesh

    set_spmd_backend(backend)
    whole = nn.Linear(H, vocab, bias=False)
    with torch.no_grad():
        whole.weight.copy_(torch.randn(vocab, H, generator=torch.Generator().manual_seed(2)) * 0.3)
    hidden, labels, loss_inputs = inputs_of(name, (2, 8), whole)
    labels = labels.where(labels < vocab, 3)
    config = CrossEntropyLoss.Config(global_vocab_size=vocab) if name == "cross entropy" else config_of(name)
    outcomes = []
    for loss in (FastpgLoss.Config(loss_fn=config), ChunkedLossWrapper.Config(num_chunks=2, loss_fn=config)):
        layer = nn.Linear(H, vocab, bias=False)
        if backend == "partial_dtensor":
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
            layer.weight = nn.Parameter(distribute_tensor(whole.weight.detach(), mesh, [Shard(0)]))
            given = DTensor.from_local(hidden.clone(), mesh, [Replicate()])
            done = outcome(loss, layer, given, labels, 11, loss_inputs)
            done.hidden, done.weight = done.hidden.full_tensor(), done.weight.full_tensor()
        else:
            mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("dp", "cp", "tp"))
            layer.weight = nn.Parameter(whole.weight.detach().chunk(2)[rank].clone())
            with set_current_spmd_mesh(mesh):
                done = outcome(loss, layer, hidden, labels, 11, loss_inputs)
            dist.all_reduce(done.hidden)  # as the gradient of a hidden state that every rank has
            rows = [torch.empty(len(part), H) for part in whole.weight.chunk(2)]
            dist.all_gather(rows, done.weight) if vocab % 2 == 0 else None
            done.weight = torch.cat(rows) if vocab % 2 == 0 else done.weight
        outcomes.append(done)
    return outcomes


class Decoder(nn.Module):
    """What torchtitan's Decoder does with its lm_head."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(5)
        self.tok_embeddings, self.norm, self.lm_head = nn.Embedding(V, H), nn.RMSNorm(H), nn.Linear(H, V, bias=False)
        self.layers = nn.Sequential(nn.Linear(H, H), nn.Tanh())
        if tied:
            self.lm_head.weight = self.tok_embeddings.weight

    def forward(self, ids):
        return self.norm(self.layers(self.tok_embeddings(ids)))


def fsdp_case(rank, units, dtype):
    """[ours, the wrapper's] and one process's own logits: (losses of two micro-batches, the gradients of all parameters)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    set_spmd_backend("spmd_types")
    config, tied = config_of("cross entropy"), units == "tied"
    ids = torch.randint(0, V, (2, 2, 2, 8), generator=torch.Generator().manual_seed(7))  # micro-batch, rank, batch, length
    labels = ids.roll(-1, -1).masked_fill(ids % 3 == 0, -100)
    count = (labels != -100).sum()
    outcomes = []
    for loss in (FastpgLoss.Config(loss_fn=config), ChunkedLossWrapper.Config(num_chunks=2, loss_fn=config)):
        model = Decoder(tied)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=f32, cast_forward_inputs=False)
        modules = {"tied": [[model.tok_embeddings, model.norm, model.lm_head]], "own": [[model.norm], [model.lm_head]]}
        for unit in modules.get(units, [[model.norm, model.lm_head]]):
            fully_shard(unit, mp_policy=policy, reshard_after_forward=units != "kept")
        fully_shard(model.layers, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # for gloo
        loss_fn = loss.build()
        loss_fn.set_lm_head(model.lm_head)
        losses = []
        for step in range(2):
            value, _ = loss_fn(model(ids[step, rank]), labels[step, rank], count)
            if units == "own":  # FSDP's hook has sharded the weight again
                assert hasattr(model.lm_head.weight, "full_tensor")
            value.backward()
            losses.append(value.detach())
            if step == 0:  # validation between steps
                with torch.no_grad():
                    again, _ = loss_fn(model(ids[step, rank]), labels[step, rank])
                torch.testing.assert_close(again / count, losses[-1])
                assert units == "kept" or hasattr(model.lm_head.weight, "full_tensor")
        outcomes.append((losses, {name: p.grad.full_tensor() for name, p in model.named_parameters()}))
    model = Decoder(tied)
    logits = model.lm_head(model(ids.flatten(0, 2)))
    (nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count).backward()
    return *outcomes, {name: p.grad for name, p in model.named_parameters()}


TP = [(backend, name, vocab) for backend in ("spmd_types", "partial_dtensor") for name in LOSSES for vocab in (98, 97)]
TP = [case for case in TP if case[1] == "cross entropy" or case[2] == 98]  # torchtitan's RL losses want equal shares
FSDP = [("group", f32), ("group", bf16), ("kept", f32), ("own", f32), ("tied", f32)]


def jobs(rank):
    cases = {("tp", *case): (tp_case, *case) for case in TP} | {("fsdp", *case): (fsdp_case, *case) for case in FSDP}
    return run_jobs(cases, rank)


@pytest.fixture(scope="module")
def done():
    return run_on_ranks(jobs, 2, timeout=120)


@pytest.mark.parametrize("case", TP, ids=str)
def test_tensor_parallel_heads(done, case):
    for ours, theirs in results_of(done, ("tp", *case)):
        check(ours, theirs)


@pytest.mark.parametrize("case", FSDP, ids=str)
def test_fsdp2_with_gradient_accumulation(done, case):
    """Two micro-batches on each of two ranks, divided by the token count of all four."""
    tolerance = 1e-5 if case[1] == f32 else 2e-2
    for (losses, gradients), (wanted, theirs), whole in results_of(done, ("fsdp", *case)):
        torch.testing.assert_close(torch.stack(losses), torch.stack(wanted), rtol=tolerance, atol=tolerance)
        for name, gradient in whole.items():
            assert relative_error(gradients[name], gradient) < tolerance, name
            assert relative_error(gradients[name], theirs[name]) < tolerance, name


def test_a_weight_that_is_sharded_otherwise_is_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer, mesh = linear(), init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(ValueError, match="whole, or sharded along its rows on the tp dimension alone; got placements"):
            adapter._on_this_rank(torch.randn(3, H), layer, False)
        layer.weight = nn.Parameter(distribute_tensor(linear().weight.detach(), mesh, [Shard(0)]))
        _, head = adapter._on_this_rank(torch.randn(3, H), layer, False)
        assert head.group is mesh.get_group()  # used in place, not gathered
    finally:
        dist.destroy_process_group()
