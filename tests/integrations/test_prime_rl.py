"""The lm_head for prime-rl. pip cannot install prime-rl here: the comparison is with its formula, written out."""

from __future__ import annotations

import sys
import types
from importlib import metadata
from unittest import mock

import pytest
import torch
from full_logits import assert_gradient, assert_values, distribution, wide
from raising import said
from ranks import run_on_ranks

from fastpg.crosscheck.accuracy import WEIGHT_TOLERANCE
from fastpg.integrations.prime_rl import FastpgOutputLinear, use_fastpg

V, H, B, S = 30, 16, 3, 10
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def problem(dtype, rank=0):
    """Hidden states, a weight, labels that are shifted already, a temperature for each, and factors of a loss."""
    generator = torch.Generator().manual_seed(rank)
    hidden = (2 * torch.randn(B, S, H, generator=generator)).to(dtype)
    labels = torch.randint(0, V, (B, S), generator=generator)
    temperature = torch.rand(B, S, generator=generator) + 0.5
    factors = torch.randn(2, B, S, generator=generator)
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(7)).to(dtype)
    return hidden, weight, labels, temperature, factors


@pytest.mark.parametrize("of_entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_formula(dtype, softcap, of_entropy):
    """prime-rl's own layer has no gradient of the entropy; without one, these are its gradients."""
    hidden, weight, labels, temperature, factors = problem(dtype)
    layer, leaf = FastpgOutputLinear(torch.nn.Parameter(weight.clone()), softcap=softcap), hidden.clone().requires_grad_()
    full = [wide(hidden), wide(weight)]
    out, (*want, largest) = layer(leaf, labels, temperature=temperature), distribution(*full, labels, temperature, softcap)
    assert list(out) == ["logprobs", "entropy"]
    for got, expected in zip(out.values(), want, strict=True):
        assert_values(got, expected, largest, dtype, H)
    factors[1] *= of_entropy
    sum((x * f).sum() for x, f in zip(out.values(), factors, strict=True)).backward()
    sum((x * f).sum() for x, f in zip(want, factors, strict=True)).backward()
    for got, expected in zip((leaf, layer.weight), full, strict=True):
        assert_gradient(got.grad, expected.grad, dtype)


def test_packed_rows_and_ignored_labels():
    """One row (1, N), as prime-rl packs it: tokens know nothing of each other. -100 is no token."""
    hidden, weight, labels, temperature, factors = problem(torch.float64)
    labels[1, 5:] = -100
    layer, leaf = FastpgOutputLinear(torch.nn.Parameter(weight)), hidden.clone().requires_grad_()
    packed = [x.reshape(1, B * S, *x.shape[2:]) for x in (leaf, labels, temperature)]
    out, kept = layer(*packed), labels >= 0
    padded = layer(hidden, labels, temperature)
    for name, values in out.items():
        assert torch.allclose(values.view(B, S), padded[name], rtol=1e-12)
        assert not values.view(B, S)[~kept].any()
    (out["logprobs"].view(B, S) * factors[0]).sum().backward()
    full = [wide(hidden), wide(weight)]
    (distribution(*full, labels, temperature)[0] * factors[0])[kept].sum().backward()
    assert_gradient(leaf.grad, full[0].grad, torch.float64)
    assert_gradient(layer.weight.grad, full[1].grad, torch.float64)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_needs_no_gradient_has_none(frozen):
    hidden, weight, labels, temperature, _ = problem(torch.float32)
    layer = FastpgOutputLinear(torch.nn.Parameter(weight, requires_grad=frozen != "weight"))
    hidden.requires_grad_(frozen != "hidden")
    layer(hidden, labels, temperature)["logprobs"].sum().backward()
    assert (hidden.grad is None, layer.weight.grad is None) == (frozen == "hidden", frozen == "weight")


def test_labels_and_temperatures_are_wanted():
    hidden, weight, labels, temperature, _ = problem(torch.float32)
    layer = FastpgOutputLinear(torch.nn.Parameter(weight))
    for given, name, found in (
        ((), "labels", "NoneType"),
        ((labels,), "temperature", "NoneType"),
        ((labels, 0.7), "temperature", "float"),
    ):
        words = f"TypeError: {name} must be a tensor (B, S): this layer computes log-probabilities, and no logits; got {found}"
        assert said(lambda given=given: layer(hidden, *given)) == words
    temperature[1, 2] = 0
    words = "ValueError: temperature must be positive and finite; got 0.0 at position (1, 2)"
    assert said(lambda: layer(hidden, labels, temperature), before_work=False) == words


# ---- FSDP2, as prime-rl wraps a model: norm and lm_head in a unit, in bfloat16; or tied, in the unit of the model


class Tiny(torch.nn.Module):
    def __init__(self, head, tied):
        super().__init__()
        torch.manual_seed(3)
        self.embed_tokens, self.norm = torch.nn.Embedding(V, H), torch.nn.RMSNorm(H)
        weight = self.embed_tokens.weight if tied else torch.nn.Parameter(torch.randn(V, H))
        self.lm_head = head(weight)

    def forward(self, ids, labels, temperature):
        return self.lm_head(self.norm(self.embed_tokens(ids)), labels, temperature=temperature)


class Full(torch.nn.Module):
    """prime-rl's layer without chunks, by autograd on full logits; multiplies in the weight's dtype, as prime-rl does."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, hidden, labels, temperature):
        logits = torch.nn.functional.linear(hidden.float(), self.weight.float()) / temperature.float()[..., None]
        return {"logprobs": logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]}


def trained(rank, head, tied, param_dtype, sharded):
    """Losses of three steps, and the parameters after them: of this rank's rows under FSDP2, or of both ranks' without it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    model = Tiny(head, tied)
    if sharded:
        options = {"mesh": init_device_mesh("cpu", (2,)), "mp_policy": MixedPrecisionPolicy(param_dtype, torch.float32)}
        if not tied:
            fully_shard([model.lm_head, model.norm], reshard_after_forward=False, **options)
        fully_shard(model, **options)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        loss = 0.0
        for r in [rank] if sharded else [0, 1]:
            _, _, labels, temperature, factors = problem(torch.float32, r)
            ids = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(r))
            loss = loss + (model(ids, labels, temperature)["logprobs"] * factors[0]).mean() / (1 if sharded else 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def under_fsdp2(rank):
    found = {}
    for tied in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            ours = trained(rank, FastpgOutputLinear, tied, dtype, sharded=True)
            theirs = trained(rank, Full, tied, dtype, sharded=dtype == torch.bfloat16)
            found[tied, dtype] = ours, theirs
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_on_ranks(under_fsdp2, 2)


@pytest.mark.xdist_group("prime-rl ranks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_trains_under_fsdp2(ranks, tied, dtype):
    """In float32 against one process that has the rows of both ranks; in bfloat16 against full logits under FSDP2 too."""
    for found in ranks:
        (losses, parameters), (want_losses, want) = found[tied, dtype]
        if dtype == torch.bfloat16:
            assert losses == pytest.approx(want_losses, rel=WEIGHT_TOLERANCE[dtype], abs=WEIGHT_TOLERANCE[dtype])
        for got, expected in zip(parameters, want, strict=True):
            assert (got - expected).norm() <= WEIGHT_TOLERANCE[dtype] * expected.norm()
    if dtype == torch.float32:
        mean = [sum(pair) / 2 for pair in zip(*(found[tied, dtype][0][0] for found in ranks), strict=True)]
        assert mean == pytest.approx(ranks[0][tied, dtype][1][0], rel=1e-5, abs=1e-5)


# ---- set-up


class FusedOutputLinear(torch.nn.Linear):
    """What prime-rl's set-up leaves in the model, by name."""


class GemmaFusedOutputLinear(torch.nn.Linear):
    softcap = 30.0


@pytest.fixture
def prime_rl(monkeypatch):
    """A stand-in for prime_rl.trainer.model, with a set-up that replaces the lm_head."""
    module, package = types.ModuleType("prime_rl.trainer.model"), types.ModuleType("prime_rl.trainer")

    def inject_prime_lm_head(model, chunk_size=None):
        new = model.layer(H, V, bias=False)
        new.weight = model.lm_head.weight
        model.lm_head, model.chunk_size = new, chunk_size

    module.inject_prime_lm_head = inject_prime_lm_head
    package.model = module
    for x in (types.ModuleType("prime_rl"), package, module):
        monkeypatch.setitem(sys.modules, x.__name__, x)
    monkeypatch.setattr(metadata, "version", lambda _: "0.8.0")
    return module


def model_with(layer):
    model = torch.nn.Module()
    model.lm_head, model.layer = torch.nn.Linear(H, V, bias=False), layer
    return model.eval()


@pytest.mark.parametrize("layer", [FusedOutputLinear, GemmaFusedOutputLinear])
def test_set_up_by_prime_rl(prime_rl, layer):
    theirs = prime_rl.inject_prime_lm_head
    use_fastpg(workspace=1)
    use_fastpg(workspace=2**20, check=False)  # the last one counts
    assert prime_rl.inject_prime_lm_head.__wrapped__ is theirs
    model = model_with(layer)
    weight = model.lm_head.weight
    prime_rl.inject_prime_lm_head(model, chunk_size=512)
    assert model.chunk_size == 512  # prime-rl's own ran
    head = model.lm_head
    assert type(head) is FastpgOutputLinear
    assert head.weight is weight
    assert (head.softcap, head.workspace, head.check) == (getattr(layer, "softcap", None), 2**20, False)
    assert list(model.state_dict()) == ["lm_head.weight"]
    assert not [p for p in head.parameters() if p.is_meta]


def test_a_head_of_logits_is_refused(prime_rl):
    use_fastpg()
    words = 'ValueError: model.fused_lm_head_token_chunk_size must be a number, which fastpg does not use; "disabled" asks for '
    model = model_with(FusedOutputLinear)
    assert said(lambda: prime_rl.inject_prime_lm_head(model)) == words + "logits, of which fastpg has none"
    assert type(model.lm_head) is torch.nn.Linear


def test_another_layer_is_refused(prime_rl):
    use_fastpg()
    words = "ValueError: layer must be prime-rl's FusedOutputLinear or GemmaFusedOutputLinear; got Linear"
    assert said(lambda: prime_rl.inject_prime_lm_head(model_with(torch.nn.Linear), chunk_size=8)) == words


def test_prime_rl_is_absent(monkeypatch):
    monkeypatch.setattr(metadata, "version", mock.Mock(side_effect=metadata.PackageNotFoundError))
    assert said(use_fastpg) == "ImportError: prime-rl is not installed; this adapter was tested with prime-rl 0.8.0"
