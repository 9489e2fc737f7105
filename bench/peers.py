"""The methods that are compared: the same CISPO step, forward and backward, by fastpg, by full logits and by other libraries.

Every method takes a Batch whose hidden and weight are leaves and runs forward and backward. It returns its log-probabilities
(N,), or None if it does not compute them for the caller. Peers run at their best settings for these shapes. `why_not` says why
a method cannot run on a batch.

The plain lines of a trainer turn a peer's log-probabilities into a loss, so nothing of fastpg is in a peer's time. fastpg's
two passes end in `policy_loss`, because their users call it. fastpg's one pass, Liger's GRPO and QuACK have their own loss.
`policy_loss` and the plain lines are also measured alone, on ready log-probabilities.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cases import Batch
from endings import plain_cispo_loss

import fastpg

PLAIN, POLICY_LOSS, OWN = "plain lines", "policy_loss", "its own loss"


class Method(NamedTuple):
    step: Callable[[Batch], torch.Tensor | None]
    why_not: Callable[[Batch], str | None]  # None: it runs on this batch
    is_ours: bool = False
    variant: Callable[[Batch], Batch] = lambda b: b  # from the cell's batch to the one it runs on
    ends_in: str = PLAIN  # how its log-probabilities become a loss
    is_loss_alone: bool = False  # it starts from ready log-probabilities, which are a leaf


def plain_loss(logprobs: torch.Tensor, b: Batch) -> torch.Tensor:
    return plain_cispo_loss(logprobs, b.old_logprobs, b.advantages, b.mask)


def policy_loss(logprobs: torch.Tensor, b: Batch) -> torch.Tensor:
    return fastpg.policy_loss(logprobs, b.old_logprobs, b.advantages, objective=fastpg.CISPO(), mask=b.mask).loss


def _head(b: Batch) -> fastpg.LMHead:
    return fastpg.LMHead(b.weight, softcap=b.softcap)


def one_pass(b: Batch) -> torch.Tensor:
    options = {"mask": b.mask, "workspace": b.workspace}
    out = fastpg.linear_cispo_loss(b.hidden, _head(b), b.tokens, b.old_logprobs, b.advantages, **options)
    out.loss.backward()
    return out.logprobs


def two_passes(b: Batch) -> torch.Tensor:
    logprobs = fastpg.linear_logprobs(b.hidden, _head(b), b.tokens, mask=b.mask, workspace=b.workspace).logprobs
    policy_loss(logprobs, b).backward()
    return logprobs.detach()


def _logprobs_of_full_logits(hidden, weight, tokens, softcap):
    """The lines of a trainer: logits in the dtype of the model, log_softmax in fp32, gather."""
    z = (hidden @ weight.T).float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z, -1).gather(1, tokens[:, None])[:, 0]


def full_logits(b: Batch) -> torch.Tensor:
    logprobs = _logprobs_of_full_logits(b.hidden, b.weight, b.tokens, b.softcap)
    plain_loss(logprobs, b).backward()
    return logprobs.detach()


@functools.cache
def _compiled() -> Callable:
    return torch.compile(_logprobs_of_full_logits, dynamic=True)


def full_logits_compiled(b: Batch) -> torch.Tensor:
    logprobs = _compiled()(b.hidden, b.weight, b.tokens, b.softcap)
    plain_loss(logprobs, b).backward()
    return logprobs.detach()


def trl(b: Batch) -> torch.Tensor:
    """TRL's head (1.16), with the chunk of its trainers and no output that CISPO does not need."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    arguments = b.hidden, b.weight, None, b.tokens, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, b.softcap, 1.0, ()
    logprobs = ChunkedLogProbFunction.apply(*arguments)[0]
    plain_loss(logprobs, b).backward()
    return logprobs.detach()


def liger(b: Batch) -> None:
    """Liger's fused linear GRPO on sequences of 256 tokens, one sequence per chunk; compiled on a GPU, eager on a CPU.

    The tokens of a sequence share one advantage.
    """
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    shape = _sequences(b)
    loss_of = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=b.hidden.is_cuda, use_ref_model=False, epsilon_high=5.0, loss_type="cispo"
    )
    tokens, old = b.tokens.view(shape), b.old_logprobs.view(shape)
    mask = torch.ones(shape, dtype=torch.int64, device=tokens.device)
    hidden = b.hidden.view(*shape, -1)
    loss, *_ = loss_of(hidden, b.weight, tokens, mask, b.advantages.view(shape)[:, 0], old_per_token_logps=old)
    loss.backward()


def _sequences(b: Batch) -> tuple[int, int]:
    length = min(256, len(b.tokens))
    return len(b.tokens) // length, length


def _shared_advantages(b: Batch) -> Batch:
    shape = _sequences(b)
    return b._replace(advantages=b.advantages.view(shape)[:, :1].expand(shape).reshape(-1))


def _half_zero_weights(b: Batch) -> Batch:
    return b._replace(advantages=b.advantages * (torch.arange(len(b.tokens), device=b.tokens.device) % 2))


def torch_linear_cross_entropy(b: Batch) -> torch.Tensor:
    """torch's own, in chunks. It runs only where these give per-token losses, which CISPO's coefficients need."""
    logprobs = -F.linear_cross_entropy(b.hidden, b.weight, b.tokens, reduction="none", options=_torch_options())
    plain_loss(logprobs.float(), b).backward()
    return logprobs.detach().float()


@functools.cache
def _torch_options():
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        return None
    x, w, y = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8), torch.zeros(4, dtype=torch.int64)
    try:
        F.linear_cross_entropy(x, w, y, reduction="none", options=options()).mul(torch.rand(4)).sum().backward()
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        return None
    return options()


def cce(b: Batch) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    logprobs = -linear_cross_entropy(
        b.hidden, b.weight, b.tokens, softcap=b.softcap, reduction="none", filter_eps=None,
        impl="cce" if b.hidden.is_cuda else "torch_compile",
    )  # fmt: skip
    plain_loss(logprobs.float(), b).backward()
    return logprobs.detach().float()


def verl(b: Batch) -> torch.Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logprobs, _ = linear_cross_entropy(b.hidden, b.weight, b.tokens, 1.0, "none")
    plain_loss(logprobs, b).backward()
    return logprobs.detach()


def liger_scaled(b: Batch) -> torch.Tensor:
    """Liger's per-token scaled cross entropy: of the kernels that it has for this GPU, the one that it chooses itself."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    logprobs = -LigerFusedLinearScaledCrossEntropyFunction.apply(b.hidden, b.weight, b.tokens, 1.0, -100, 1, False)
    plain_loss(logprobs, b).backward()
    return logprobs.detach()


def quack(b: Batch) -> None:
    """QuACK's cross entropy in chunks, with its gradients in the forward: three products, and one weight for all tokens."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    chunked_linear_cross_entropy(b.hidden, b.weight, b.tokens, reduction="mean").backward()


def _as_cross_entropy(b: Batch) -> Batch:
    """On-policy, with advantages of 1: the gradient of CISPO is then that of the mean cross entropy."""
    return b._replace(old_logprobs=b.logprobs, advantages=torch.ones_like(b.advantages))


def policy_loss_alone(b: Batch) -> None:
    policy_loss(b.logprobs, b).backward()


def plain_lines_alone(b: Batch) -> None:
    plain_loss(b.logprobs, b).backward()


def bare_products(b: Batch) -> None:
    """The floor: logits, dX and dW as three products of the same shapes and dtype, and nothing else."""
    z = b.hidden @ b.weight.T
    _ = z @ b.weight
    _ = z.T @ b.hidden


def _always(b: Batch) -> None:
    return None


def _needs(package: str, *, cuda: bool = False, softcap: bool = True, dtypes: tuple[torch.dtype, ...] = ()) -> Callable:
    def why_not(b: Batch) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        if cuda and not b.hidden.is_cuda:
            return "needs a GPU"
        if not softcap and b.softcap is not None:
            return "has no softcap"
        return f"has no {b.hidden.dtype}" if dtypes and b.hidden.dtype not in dtypes else None

    return why_not


def _needs_liger_scaled() -> Callable:
    of_liger = _needs("liger_kernel", cuda=True, softcap=False, dtypes=HALF)

    def why_not(b: Batch) -> str | None:
        found = of_liger(b)
        if found is None and importlib.util.find_spec("liger_kernel.ops.fused_linear_scaled_cross_entropy") is None:
            return "this version of liger_kernel has none"
        return found

    return why_not


def _why_not_torch(b: Batch) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has none"
    if b.softcap is not None:
        return "has no softcap"
    return "its chunks give no per-token losses; without them it is full logits" if _torch_options() is None else None


HALF = (torch.float16, torch.bfloat16)
METHODS: dict[str, Method] = {
    "fastpg one pass": Method(one_pass, _always, is_ours=True, ends_in=OWN),
    "fastpg two passes": Method(two_passes, _always, is_ours=True, ends_in=POLICY_LOSS),
    "fastpg one pass, half zero weights": Method(one_pass, _always, True, _half_zero_weights, OWN),
    "fastpg one pass, frozen weight": Method(one_pass, _always, True, lambda b: b._replace(frozen=True), OWN),
    "fastpg one pass, several chunks": Method(one_pass, _always, True, lambda b: b._replace(workspace=2**27), OWN),
    "fastpg one pass, one chunk": Method(one_pass, _always, True, lambda b: b._replace(workspace=2**33), OWN),
    "full logits": Method(full_logits, _always),
    "full logits, compiled": Method(full_logits_compiled, _always),
    "TRL": Method(trl, _needs("trl")),
    "Liger": Method(liger, _needs("liger_kernel", softcap=False), variant=_shared_advantages, ends_in=OWN),
    "torch linear_cross_entropy": Method(torch_linear_cross_entropy, _why_not_torch),
    "CCE": Method(cce, _needs("cut_cross_entropy", cuda=True, dtypes=HALF)),
    "verl": Method(verl, _needs("verl", cuda=True, softcap=False)),
    "Liger, scaled cross entropy": Method(liger_scaled, _needs_liger_scaled()),
    "QuACK": Method(quack, _needs("quack", cuda=True, softcap=False, dtypes=HALF), variant=_as_cross_entropy, ends_in=OWN),
    "policy_loss alone": Method(policy_loss_alone, _always, is_ours=True, ends_in=POLICY_LOSS, is_loss_alone=True),
    "plain lines alone": Method(plain_lines_alone, _always, is_loss_alone=True),
}
