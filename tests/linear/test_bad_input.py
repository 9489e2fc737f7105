"""Inputs that do not fit raise, before any work, an error with the argument, what was given and what is wanted; and inputs that
look bad but are allowed work."""

import math
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpg import CISPO, LMHead, Reinforce, linear_logprobs, policy_loss

INF, NAN = math.inf, math.nan
V, H = 7, 4  # and (B, T) = (2, 3)


class NoProducts(TorchDispatchMode):
    """Fails on the first matrix product, or operator of fastpg."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not re.match(r"(aten\.(add|b|)(mm|mv|bmm|matmul|linear)|fastpg\.)", name), f"{name} ran before the error"
        return func(*args, **(kwargs or {}))


def linear_inputs(**changes):
    """Arguments of linear_logprobs; weight, bias, softcap and logit_scale make up the head."""
    inputs = {
        "hidden": torch.randn(2, 3, H),
        "weight": torch.randn(V, H),
        "bias": torch.randn(V),
        "tokens": torch.tensor([[0, 1, 2], [3, 4, 6]]),
    }
    return inputs | changes


def call_linear(hidden, tokens, weight=None, bias=None, head=None, softcap=None, logit_scale=1.0, **options):
    head = LMHead(weight, bias, softcap, logit_scale) if head is None else head
    return linear_logprobs(hidden, head, tokens, **options)


def spoilt(value, index=(1, 2), shape=(2, 3)):
    """Ones, but for one value."""
    ones = torch.ones(shape)
    ones[index] = value
    return ones


def token(value):
    tokens = torch.tensor([[0, 1, 2], [3, 4, 6]])
    tokens[1, 2] = value
    return tokens


# ---- linear_logprobs and LMHead: id -> (changes, error, what the message says: argument, given or wanted, the other)

BAD_LINEAR = {
    "hidden-list": ({"hidden": [[1.0]]}, TypeError, r"hidden must be a tensor; got list"),
    "hidden-int": ({"hidden": torch.ones(2, 3, H).long()}, TypeError, r"hidden must be float16, .*float64; got torch.int64"),
    "hidden-width": ({"hidden": torch.ones(2, 3, H + 1)}, ValueError, r"hidden must be .* H = 4 .*got shape \(2, 3, 5\)"),
    "hidden-0d": ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden must be .* H = 4 .*got shape \(\)"),
    "hidden-dtype": (
        {"hidden": torch.ones(2, 3, H).bfloat16()},
        TypeError,
        r"hidden is torch.bfloat16 but head.weight is torch.float32; cast",
    ),
    "hidden-fp64": (
        {"hidden": torch.ones(2, 3, H).double()},
        TypeError,
        r"hidden is torch.float64 but head.weight is torch.float32",
    ),
    "weight-list": ({"weight": [[1.0]]}, TypeError, r"head.weight must be a floating-point tensor \(V, H\); got list"),
    "weight-int": ({"weight": torch.ones(V, H).int()}, TypeError, r"head.weight must be a floating-point .*got torch.int32"),
    "weight-1d": ({"weight": torch.ones(V)}, ValueError, r"head.weight must be \(V, H\).*got shape \(7,\)"),
    "weight-3d": ({"weight": torch.ones(1, V, H)}, ValueError, r"head.weight must be \(V, H\).*got shape \(1, 7, 4\)"),
    "weight-empty": ({"weight": torch.ones(0, H)}, ValueError, r"head.weight must be .* V >= 1.*got shape \(0, 4\)"),
    "weight-no-width": ({"weight": torch.ones(V, 0)}, ValueError, r"head.weight must be .* H >= 1.*got shape \(7, 0\)"),
    "weight-layer": ({"head": torch.nn.Bilinear(1, H, V)}, TypeError, r"head.weight must be .* tensor \(V, H\); got Bilinear"),
    "bias-list": ({"bias": [0.0] * V}, TypeError, r"head.bias must be a tensor .*got list"),
    "bias-dtype": ({"bias": torch.ones(V).bfloat16()}, TypeError, r"head.bias must .*torch.float32.*got torch.bfloat16"),
    "bias-length": ({"bias": torch.ones(H)}, ValueError, r"head.bias must be \(V,\) = \(7,\); got shape \(4,\)"),
    "bias-2d": ({"bias": torch.ones(V, 1)}, ValueError, r"head.bias must be \(V,\) = \(7,\); got shape \(7, 1\)"),
    "softcap-zero": ({"softcap": 0.0}, ValueError, r"head.softcap must be a positive number or None; got 0.0"),
    "softcap-negative": ({"softcap": -30.0}, ValueError, r"head.softcap must be a positive number or None; got -30.0"),
    "softcap-nan": ({"softcap": NAN}, ValueError, r"head.softcap must be a positive number or None; got nan"),
    "softcap-inf": ({"softcap": INF}, ValueError, r"head.softcap must be a positive number or None; got inf"),
    "softcap-str": ({"softcap": "30"}, (TypeError, ValueError), r"head.softcap must be a positive number or None; got '?30"),
    "scale-zero": ({"logit_scale": 0}, ValueError, r"head.logit_scale must be a positive number; got 0"),
    "scale-negative": ({"logit_scale": -1.0}, ValueError, r"head.logit_scale must be a positive number; got -1.0"),
    "scale-nan": ({"logit_scale": NAN}, ValueError, r"head.logit_scale must be a positive number; got nan"),
    "scale-none": ({"logit_scale": None}, (TypeError, ValueError), r"head.logit_scale must be a positive number; got None"),
    "tokens-list": ({"tokens": [[0, 1, 2]]}, TypeError, r"tokens must be a tensor; got list"),
    "tokens-float": ({"tokens": torch.ones(2, 3)}, TypeError, r"tokens must be int64 or int32; got torch.float32"),
    "tokens-uint8": ({"tokens": torch.ones(2, 3).byte()}, TypeError, r"tokens must be int64 or int32; got torch.uint8"),
    "tokens-bool": ({"tokens": torch.ones(2, 3).bool()}, TypeError, r"tokens must be int64 or int32; got torch.bool"),
    "tokens-shifted": (
        {"tokens": torch.zeros(2, 2).long()},
        ValueError,
        r"tokens must .*\(2, 3\).*already shifted; got .*\(2, 2\)",
    ),
    "tokens-flat": ({"tokens": torch.zeros(6).long()}, ValueError, r"tokens must .*\(2, 3\).*got shape \(6,\)"),
    "tokens-one-hot": ({"tokens": torch.zeros(2, 3, V).long()}, ValueError, r"tokens must .*\(2, 3\).*got shape \(2, 3, 7\)"),
    "token-too-large": ({"tokens": token(V)}, ValueError, r"tokens must be in \[0, 7\) or -100; got 7 at position \(1, 2\)"),
    "token-negative": ({"tokens": token(-1)}, ValueError, r"tokens must be in \[0, 7\) or -100; got -1 at position \(1, 2\)"),
    "token-minus-99": ({"tokens": token(-99)}, ValueError, r"tokens must be in \[0, 7\) or -100; got -99 at position \(1, 2\)"),
    "mask-int": ({"mask": torch.ones(2, 3).long()}, TypeError, r"mask must be a bool tensor.*got torch.int64 .*mask.bool\(\)"),
    "mask-float": ({"mask": torch.ones(2, 3)}, TypeError, r"mask must be a bool tensor.*got torch.float32"),
    "mask-list": ({"mask": [[True] * 3] * 2}, TypeError, r"mask must be a bool tensor.*got list"),
    "mask-per-sequence": (
        {"mask": torch.ones(2).bool()},
        ValueError,
        r"mask must have the shape of tokens, \(2, 3\); got \(2,\)",
    ),
    "mask-broadcast": ({"mask": torch.ones(2, 1).bool()}, ValueError, r"mask must have .* \(2, 3\); got \(2, 1\)"),
    "temperature-zero": ({"temperature": 0.0}, ValueError, r"temperature must be a positive number; got 0.0"),
    "temperature-negative": ({"temperature": -1}, ValueError, r"temperature must be a positive number; got -1"),
    "temperature-nan": ({"temperature": NAN}, ValueError, r"temperature must be a positive number; got nan"),
    "temperature-inf": ({"temperature": INF}, ValueError, r"temperature must be a positive number; got inf"),
    "temperature-str": ({"temperature": "1"}, (TypeError, ValueError), r"temperature must be a positive number; got '1'"),
    "temperature-none": ({"temperature": None}, (TypeError, ValueError), r"temperature must be a positive number; got None"),
    "temperature-bool": ({"temperature": True}, (TypeError, ValueError), r"temperature must be a positive number; got True"),
    "temperature-int-tensor": ({"temperature": torch.ones(2, 3).int()}, TypeError, r"temperature must .*got torch.int32"),
    "temperature-per-sequence": (
        {"temperature": torch.ones(2)},
        ValueError,
        r"temperature must be a number or have the shape of tokens, \(2, 3\); got \(2,\)",
    ),
    "temperature-broadcast": ({"temperature": torch.ones(2, 1)}, ValueError, r"temperature must .*\(2, 3\); got \(2, 1\)"),
    "temperature-requires-grad": (
        {"temperature": torch.ones(2, 3, requires_grad=True)},
        ValueError,
        r"temperature must not require a gradient.*temperature.detach\(\)",
    ),
    "temperature-one-zero": (
        {"temperature": spoilt(0.0)},
        ValueError,
        r"temperature must be positive.*; got 0.0 at .*\(1, 2\)",
    ),
    "temperature-one-negative": (
        {"temperature": spoilt(-2.0)},
        ValueError,
        r"temperature must be positive.*; got -2.0 at .*\(1, 2\)",
    ),
    "temperature-one-nan": ({"temperature": spoilt(NAN)}, ValueError, r"temperature must be positive.*; got nan at .*\(1, 2\)"),
    "temperature-one-inf": ({"temperature": spoilt(INF)}, ValueError, r"temperature must be .*finite.*; got inf at .*\(1, 2\)"),
    "temperature-0d-zero": ({"temperature": torch.tensor(0.0)}, ValueError, r"temperature must be positive.*; got 0.0"),
    "workspace-zero": ({"workspace": 0}, ValueError, r"workspace must be a positive number of bytes; got 0"),
    "workspace-negative": ({"workspace": -1}, ValueError, r"workspace must be a positive number of bytes; got -1"),
    "workspace-float": ({"workspace": 1e9}, (TypeError, ValueError), r"workspace must be .* of bytes; got 1000000000.0"),
    "workspace-str": ({"workspace": "1GB"}, (TypeError, ValueError), r"workspace must be .* of bytes; got '1GB'"),
    "workspace-bool": ({"workspace": True}, (TypeError, ValueError), r"workspace must be .* of bytes; got True"),
    "workspace-too-small": ({"workspace": 1000}, ValueError, r"workspace=1000 bytes is too small.*\(7, 4\).*needs \d+"),
    "backend": ({"backend": "cuda"}, ValueError, r"backend must be .*\"torch\".*; got 'cuda'"),
    "tokens-device": ({"tokens": token(0).to("meta")}, ValueError, r"tokens is on meta but hidden is on cpu"),
    "mask-device": ({"mask": torch.ones(2, 3, device="meta").bool()}, ValueError, r"mask is on meta but hidden is on cpu"),
    "temperature-device": (
        {"temperature": torch.ones(2, 3, device="meta")},
        ValueError,
        r"temperature is on meta but hidden is on cpu",
    ),
    "weight-device": (
        {"weight": torch.ones(V, H, device="meta"), "bias": None},
        ValueError,
        r"head.weight is on meta but hidden is on cpu",
    ),
    "bias-device": ({"bias": torch.ones(V, device="meta")}, TypeError, r"head.bias must .*device .*cpu.*; got .* on meta"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_LINEAR.values(), ids=BAD_LINEAR)
def test_linear_logprobs_names_what_does_not_fit(changes, error, message):
    inputs = linear_inputs(**changes)
    with NoProducts(), pytest.raises(error, match=message):
        call_linear(**inputs)


VALUES_READ_FROM_TENSORS = ("token-", "temperature-one-", "temperature-0d-")
SHAPES = [name for name in BAD_LINEAR if not name.startswith(VALUES_READ_FROM_TENSORS)]


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_dtypes_are_checked_without_check(name):
    """check=False leaves out what costs a host read, nothing else."""
    changes, error, message = BAD_LINEAR[name]
    inputs = linear_inputs(**changes)
    with NoProducts(), pytest.raises(error, match=message):
        call_linear(**inputs, check=False)


def test_the_good_inputs_are_good():
    """Otherwise the tests above could pass for another reason."""
    assert call_linear(**linear_inputs()).logprobs.isfinite().all()


def test_products_are_noticed():
    with NoProducts(), pytest.raises(AssertionError, match="ran before the error"):
        call_linear(**linear_inputs())


@pytest.mark.parametrize(("vocab", "hidden_size"), [(7, 4), (5000, 64), (300, 3000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_the_workspace_asked_for_is_enough_and_not_more(vocab, hidden_size, dtype):
    weight, hidden, tokens = (
        torch.ones(vocab, hidden_size, dtype=dtype),
        torch.ones(3, hidden_size, dtype=dtype),
        torch.arange(3),
    )
    with pytest.raises(ValueError, match=r"needs \d+") as caught:
        linear_logprobs(hidden, weight, tokens, workspace=1)
    needed = int(re.search(r"needs (\d+)", str(caught.value))[1])
    with pytest.raises(ValueError, match=f"workspace={needed - 1} bytes is too small"):
        linear_logprobs(hidden, weight, tokens, workspace=needed - 1)
    logprobs = linear_logprobs(hidden, weight.requires_grad_(), tokens, workspace=needed).logprobs
    logprobs.sum().backward()
    assert logprobs.tolist() == pytest.approx([-math.log(vocab)] * 3)


def test_dtypes_may_differ_under_autocast_alone():
    inputs = linear_inputs(weight=torch.randn(V, H).bfloat16(), bias=None)
    with pytest.raises(TypeError, match=r"hidden is torch.float32 but head.weight is torch.bfloat16"):
        call_linear(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert call_linear(**inputs).logprobs.dtype == torch.float32


# ---- not errors: empty batches

EMPTY = {"packed": (0,), "no-sequence": (0, 5), "no-position": (2, 0), "all-masked": (2, 3), "no-token": (2, 3)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
CHECK = pytest.mark.parametrize("check", [True, False], ids=["check", "no-check"])


@CHECK
@DTYPES
@pytest.mark.parametrize("kind", EMPTY)
def test_no_tokens_is_a_differentiable_zero(kind, dtype, check):
    """So that a rank without tokens stays in step with the others."""
    shape = EMPTY[kind]
    hidden = torch.full((*shape, H), NAN, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(V, H, dtype=dtype, requires_grad=True), torch.randn(V, dtype=dtype, requires_grad=True)
    tokens = torch.full(shape, -100 if kind == "no-token" else 10**6)
    mask = None if kind == "no-token" else torch.zeros(shape, dtype=torch.bool)

    result = linear_logprobs(hidden, LMHead(weight, bias), tokens, mask=mask, entropy=True, check=check)
    kept = torch.zeros(shape, dtype=torch.bool)
    advantages = torch.full(shape, NAN)
    output = policy_loss(result.logprobs, None, advantages, objective=CISPO(), mask=kept)
    assert output.loss.item() == 0
    assert output.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(result.entropy, torch.zeros(shape, dtype=output.loss.dtype))
    (output.loss + result.entropy.sum()).backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad.dtype == dtype
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


# ---- not errors: anything at all in masked rows

KEEP = torch.tensor([[True, False, True], [False, True, True]])


def run(hidden, tokens, weight, bias, mask=None, advantages=None, **options):
    """The loss of CISPO plus an entropy bonus, all results and all gradients."""
    hidden, weight, bias = (x.detach().clone().requires_grad_() for x in (hidden, weight, bias))
    result = linear_logprobs(hidden, LMHead(weight, bias, 5.0, 0.7), tokens, mask=mask, entropy=True, **options)
    loss = policy_loss(result.logprobs, torch.full(tokens.shape, -2.0), advantages, objective=CISPO(), mask=KEEP).loss
    (loss + result.entropy.sum() / 8).backward()
    return {
        "logprobs": result.logprobs.detach(),
        "entropy": result.entropy.detach(),
        "loss": loss.detach(),
        "dhidden": hidden.grad,
        "dweight": weight.grad,
        "dbias": bias.grad,
    }


MASKED = {
    "hidden-nan": ("hidden", NAN),
    "hidden-inf": ("hidden", INF),
    "hidden--inf": ("hidden", -INF),
    "token-too-large": ("tokens", V),
    "token-negative": ("tokens", -1),
    "temperature-zero": ("temperature", 0.0),
    "temperature-negative": ("temperature", -1.0),
    "temperature-nan": ("temperature", NAN),
    "temperature-inf": ("temperature", INF),
    "advantages-nan": ("advantages", NAN),
}


@CHECK
@DTYPES
@pytest.mark.parametrize(
    ("how", "what"), [("mask", what) for what in MASKED] + [("-100", what) for what in MASKED if not what.startswith("token")]
)
def test_garbage_at_masked_positions_changes_no_bit(what, how, dtype, check):
    argument, garbage = MASKED[what]
    clean = linear_inputs(temperature=torch.full((2, 3), 0.9), advantages=torch.randn(2, 3), check=check)
    clean |= {name: clean[name].to(dtype) for name in ("hidden", "weight", "bias")}
    if how == "mask":
        clean["mask"] = KEEP
    else:
        clean["tokens"] = torch.where(KEEP, clean["tokens"], -100)
    masked = ~KEEP[..., None] if argument == "hidden" else ~KEEP
    wanted = run(**clean)
    actual = run(**clean | {argument: clean[argument].masked_fill(masked, garbage)})
    for name, value in wanted.items():
        assert value.isfinite().all(), name
        assert torch.equal(actual[name], value), name
    for name in ("logprobs", "entropy", "dhidden"):
        assert (wanted[name][~KEEP] == 0).all(), name
        assert (wanted[name][KEEP] != 0).all(), name


# ---- not errors: NaN where it was asked for


@CHECK
@DTYPES
@pytest.mark.parametrize("garbage", [NAN, INF], ids=["nan", "inf"])
def test_nan_in_a_kept_row_is_reported_and_stays_there(garbage, dtype, check):
    inputs = linear_inputs(check=check)
    inputs |= {name: inputs[name].to(dtype) for name in ("hidden", "weight", "bias")}
    clean = call_linear(**inputs, entropy=True)
    inputs["hidden"][1, 2, 0] = garbage
    dirty = call_linear(**inputs, entropy=True)

    others = spoilt(0.0).bool()
    assert dirty.logprobs[1, 2].isnan()
    assert dirty.entropy[1, 2].isnan()
    assert torch.equal(dirty.logprobs[others], clean.logprobs[others])
    assert torch.equal(dirty.entropy[others], clean.entropy[others])
    assert policy_loss(dirty.logprobs, clean.logprobs, torch.ones(2), objective=Reinforce()).loss.isnan()


@DTYPES
@pytest.mark.parametrize("bad", [V, -1, -99, 10**9, -(10**9)])
def test_an_unchecked_token_outside_the_vocabulary_gives_nan_for_its_row_only(bad, dtype):
    inputs = linear_inputs()
    inputs |= {name: inputs[name].to(dtype) for name in ("hidden", "weight", "bias")}
    clean = call_linear(**inputs).logprobs
    dirty = call_linear(**inputs | {"tokens": token(bad)}, check=False).logprobs
    others = spoilt(0.0).bool()
    assert dirty[1, 2].isnan()
    assert torch.equal(dirty[others], clean[others])
