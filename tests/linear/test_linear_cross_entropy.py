"""`linear_cross_entropy` against torch's on float64 logits: losses and gradients of hidden, weight, bias."""

import pytest
import torch
import torch.nn.functional as F
from schedules import KERNEL_DEVICE

from fastpg import LMHead, linear_cross_entropy
from fastpg.crosscheck.accuracy import ROW_TOLERANCE, WEIGHT_TOLERANCE
from fastpg.tiles import products as tile_products

ROWS, SIZE, VOCAB = 33, 24, 300
FORMS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01, "reduction": "sum"},
    {"label_smoothing": 0.3, "z_loss": 0.1},
    {"label_smoothing": 0.3, "z_loss": 0.1, "reduction": "none"},
    {"denominator": 70.0},
    {"denominator": 70.0, "label_smoothing": 0.2},
    {"weight": True},
    {"weight": True, "reduction": "sum"},
    {"weight": True, "reduction": "none"},
    {"weight": True, "z_loss": 0.1},
    {"weight": True, "z_loss": 0.1, "reduction": "none"},
    {"weight": True, "denominator": 70.0},
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(dtype, device="cpu", ignored=-100):
    hidden, weight, bias = torch.randn(ROWS, SIZE), torch.randn(VOCAB, SIZE) * 0.3, torch.randn(VOCAB) * 0.1
    labels = torch.randint(0, VOCAB, (ROWS,))
    labels[::5] = ignored
    return *(x.to(device, dtype).requires_grad_() for x in (hidden, weight, bias)), labels.to(device)


def class_weights(dtype=torch.float64, device="cpu"):
    """Those of every third class are 0."""
    weights = torch.rand(VOCAB, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.5
    weights[::3] = 0
    return weights.to(device, dtype)


def expected(hidden, matrix, bias, labels, softcap=None, ignored=-100, **form):
    """By full logits."""
    z_loss, reduction, denominator = form.pop("z_loss", 0.0), form.pop("reduction", "mean"), form.pop("denominator", None)
    z = hidden @ matrix.T + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, labels, ignore_index=ignored, reduction="none", **form)
    keep = (labels != ignored).double()
    if "weight" in form:
        keep = keep * form["weight"][labels.clamp(min=0)]
    losses = losses + torch.where(keep > 0, keep * z_loss * z.logsumexp(-1).square(), 0)
    if reduction == "none":
        return losses
    return losses.sum() / (1 if reduction == "sum" else denominator or keep.sum())


def device_of(backend):
    return KERNEL_DEVICE if backend == "triton" else "cpu"


@pytest.mark.parametrize(
    ("dtype", "backend"), [(d, b) for b in ("torch", "triton") for d in DTYPES if (d, b) != (torch.float64, "triton")], ids=str
)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_is_torchs(backend, dtype, form, softcap):
    *leaves, labels = inputs(dtype, device_of(backend))
    wide = [x.detach().double().requires_grad_() for x in leaves]
    narrow = form | ({"weight": class_weights(dtype, labels.device)} if "weight" in form else {})
    got = linear_cross_entropy(leaves[0], LMHead(*leaves[1:], softcap=softcap), labels, backend=backend, **narrow)
    wide_form = narrow | ({"weight": narrow["weight"].double()} if "weight" in form else {})
    want = expected(*wide, labels, softcap, **wide_form)
    assert got.shape == want.shape
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-6)
    grad = torch.rand_like(want) + 0.5
    got.backward(grad.to(got.dtype))
    want.backward(grad)
    whole = WEIGHT_TOLERANCE[dtype]
    row = ROW_TOLERANCE.get(dtype, whole)
    errors = (leaves[0].grad.double() - wide[0].grad).norm(dim=1)
    assert (errors <= row * wide[0].grad.norm(dim=1)).all()
    for x, y in zip(leaves[1:], wide[1:], strict=True):
        assert (x.grad.double() - y.grad).norm() <= whole * y.grad.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [-100, 7])
@pytest.mark.parametrize("shape", [(ROWS,), (3, 11)])
def test_class_weights_are_torchs(reduction, ignored, shape):
    """torch's own reductions, losses and gradients, with a weight of 0 at some labels; and none at those of class 7."""
    *leaves, labels = inputs(torch.float64, ignored=ignored)
    weights, labels = class_weights(), labels.view(shape)
    hidden, options = leaves[0].view(*shape, SIZE), {"weight": weights, "ignore_index": ignored, "reduction": reduction}
    assert (weights[labels.clamp(min=0)] == 0).any()
    got = linear_cross_entropy(hidden, LMHead(*leaves[1:]), labels, **options)
    want = F.cross_entropy((hidden @ leaves[1].T + leaves[2]).flatten(0, -2), labels.flatten(), **options).view(got.shape)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grad = torch.rand_like(want)
    for x, y in zip(*(torch.autograd.grad(loss, leaves, grad) for loss in (got, want)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", [{}, {"z_loss": 0.1}, {"reduction": "none"}], ids=str)
def test_a_class_of_weight_0_costs_no_work(form):
    """Its labels are as if they were ignored: NaN there reaches nothing."""
    *leaves, labels = inputs(torch.float64)
    weights, light = class_weights(), class_weights()[labels.clamp(min=0)] == 0
    with torch.no_grad():
        leaves[0][light] = torch.nan
    loss = linear_cross_entropy(leaves[0], LMHead(*leaves[1:]), labels, weight=weights, **form).sum()
    same = linear_cross_entropy(leaves[0], LMHead(*leaves[1:]), labels.masked_fill(light, -100), weight=weights, **form).sum()
    assert torch.equal(loss, same)
    assert loss > 0
    loss.backward()
    assert not leaves[0].grad[light].any()


def test_a_mean_of_weights_of_both_signs_is_torchs():
    *leaves, labels = inputs(torch.float64)
    weights = torch.linspace(-1, 2, VOCAB, dtype=torch.float64)
    got = linear_cross_entropy(leaves[0], LMHead(*leaves[1:]), labels, weight=weights)
    torch.testing.assert_close(
        got, F.cross_entropy(leaves[0] @ leaves[1].T + leaves[2], labels, weight=weights), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("form", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("ignored", [7, -1, 10**6])
def test_ignore_index_may_be_any_number(ignored, form):
    *leaves, labels = inputs(torch.float32, ignored=ignored)
    got = linear_cross_entropy(leaves[0], LMHead(*leaves[1:]), labels, ignore_index=ignored, **form)
    wide = [x.detach().double() for x in leaves]
    safe = labels.masked_fill(labels == ignored, -100)
    assert torch.allclose(got.double(), expected(*wide, safe, **form), rtol=1e-5)


@pytest.mark.parametrize(
    "form",
    [{}, {"z_loss": 0.1}, {"reduction": "none"}, {"weight": torch.ones(VOCAB)}, {"weight": torch.ones(VOCAB), "z_loss": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("rows", [0, 4])
def test_without_a_label_the_loss_is_0_and_differentiable(rows, form):
    hidden = torch.full((rows, SIZE), torch.nan, requires_grad=True)
    weight = torch.randn(VOCAB, SIZE, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((rows,), -100), **form).sum()
    assert loss == 0
    loss.backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_sequences_keep_their_shape():
    *leaves, labels = inputs(torch.float32)
    hidden, labels = leaves[0].detach()[:30].view(5, 6, SIZE), labels[:30].view(5, 6)
    weight = leaves[1].detach()
    losses = linear_cross_entropy(hidden, weight, labels, reduction="none")
    assert losses.shape == (5, 6)
    packed = linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), reduction="none")
    assert torch.equal(losses.flatten(), packed)
    mean = linear_cross_entropy(hidden, weight, labels)
    assert torch.allclose(mean, losses.sum() / (labels != -100).sum(), rtol=1e-5)


def test_micro_batches_add_up():
    *leaves, labels = inputs(torch.float32)
    head, count = LMHead(*(x.detach() for x in leaves[1:])), (labels != -100).sum()
    weights = class_weights(torch.float32)
    weighted = {"weight": weights, "denominator": torch.where(labels == -100, 0, weights[labels.clamp(min=0)]).sum()}
    for form in ({}, {"label_smoothing": 0.1, "z_loss": 0.1}, weighted, weighted | {"z_loss": 0.1}):
        form = {"denominator": count} | form
        whole = linear_cross_entropy(leaves[0].detach(), head, labels, **{n: x for n, x in form.items() if n != "denominator"})
        parts = [
            linear_cross_entropy(leaves[0].detach()[part], head, labels[part], **form)
            for part in (slice(0, 10), slice(10, ROWS))
        ]
        assert torch.allclose(sum(parts), whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("form", "products"),
    [({}, 3), ({"weight": torch.ones(VOCAB)}, 3), ({"z_loss": 0.1}, 4), ({"reduction": "none"}, 4)],
    ids=str,
)
def test_the_plain_mean_takes_three_products(form, products, monkeypatch):
    made, multiply = [], tile_products._multiply
    monkeypatch.setattr(tile_products, "_multiply", lambda *args, **kwargs: made.append(1) or multiply(*args, **kwargs))
    *leaves, labels = inputs(torch.float32)
    linear_cross_entropy(leaves[0], leaves[1], labels.clamp(min=0), backend="torch", **form).sum().backward()
    assert len(made) == products


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be a number in \[0, 1\); got 1.0"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be a number >= 0; got -1.0"),
        ({"z_loss": torch.tensor(1.0)}, ValueError, "z_loss must be"),
        ({"reduction": "token-mean"}, ValueError, 'reduction must be "mean", "sum" or "none"; got \'token-mean\''),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int; got 1.5"),
        ({"denominator": 2.0, "reduction": "sum"}, ValueError, "denominator replaces the count"),
        ({"denominator": 0.0}, ValueError, "denominator must be a positive number"),
        ({"labels": torch.zeros(3)}, TypeError, "labels must be an int64 or int32 tensor; got torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, ValueError, r"labels must have the leading shape of hidden, \(33,\)"),
        ({"weight": torch.ones(VOCAB), "labels": torch.full((ROWS,), VOCAB)}, ValueError, r"labels must be in \[0, 300\)"),
        ({"weight": torch.zeros(VOCAB), "labels": torch.full((ROWS,), VOCAB)}, ValueError, r"labels must be in \[0, 300\)"),
        ({"weight": torch.zeros(VOCAB), "labels": torch.full((ROWS,), -1), "z_loss": 0.1}, ValueError, "labels must be in"),
        ({"weight": [1.0]}, TypeError, r"weight must be a floating-point tensor \(V,\), .* or None; got list"),
        ({"weight": torch.ones(VOCAB, dtype=torch.long)}, TypeError, "or None; got torch.int64"),
        ({"weight": torch.ones(VOCAB - 1)}, ValueError, r"weight must be \(V,\) = \(300,\), .*; got shape \(299,\)"),
        ({"weight": torch.ones(VOCAB, 1)}, ValueError, r"weight must be \(V,\)"),
        ({"weight": torch.ones(VOCAB, device="meta")}, ValueError, "weight is on meta but labels is on cpu"),
        ({"weight": torch.ones(VOCAB, requires_grad=True)}, ValueError, "weight must not require a gradient"),
        (
            {"weight": torch.ones(VOCAB), "label_smoothing": 0.1},
            ValueError,
            "weight cannot be given with label_smoothing=0.1: torch weights every term",
        ),
        (
            {"labels": torch.full((ROWS,), VOCAB)},
            ValueError,
            r"labels must be in \[0, 300\) or -100; got 300 at position \(0,\)",
        ),
        ({"labels": torch.full((ROWS,), -1), "z_loss": 0.1}, ValueError, r"labels must be in \[0, 300\) or -100; got -1"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, error, words):
    *leaves, labels = inputs(torch.float32)
    labels = change.pop("labels", labels)
    with pytest.raises(error, match=words):
        linear_cross_entropy(leaves[0], leaves[1], labels, **change)


def test_class_weights_beside_a_group():
    """On every rank alike, before the ranks exchange anything."""
    *leaves, labels = inputs(torch.float32)
    head = LMHead(leaves[1], group="WORLD", vocab_start=0)
    with pytest.raises(ValueError, match=r'weight cannot be given with head\.group; use reduction="none"'):
        linear_cross_entropy(leaves[0], head, labels, weight=torch.ones(VOCAB))
