"""What small sets cost: rows of the weight that are read, one for each token of a set and pass; memory, which V is not in.

Counted from outside, as in `operations`: in PyTorch every operation that reads the weight, on Triton the entries of launches.
"""

import pytest
import torch
from schedules import KERNEL_DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpg import LMHead, Support, linear_cispo_loss, linear_logprobs
from fastpg.kernels import gathered as gathered_kernels
from fastpg.linear.support import most_gathered
from fastpg.tools.memory import transient_bytes

f32, bf16 = torch.float32, torch.bfloat16
H, LARGE = 64, 100_000  # the hidden size, and a vocabulary
ON = [("torch", f32), ("torch", bf16), *([] if KERNEL_DEVICE == "cuda" else [("triton", bf16)])]
ON_EACH = pytest.mark.parametrize(("backend", "dtype"), ON, ids=[f"{b}-{str(d)[6:]}" for b, d in ON])
FUNCTIONS = pytest.mark.parametrize("function", ["logprobs", "loss"])
ALLOCATE = {"zeros_like", "empty_like", "new_zeros", "new_empty"}  # operations that look at nothing but the weight's form


class Reads(TorchDispatchMode):
    """rows: the rows of `weight` that are gathered. others: the names of other operations that read it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.rows, self.others = weight, 0, []

    def of(self, x: object) -> bool:
        return isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() == self.weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if not any(self.of(x) for x in tree_leaves((args, kwargs))) or self.of(out) or name in ALLOCATE:
            return out  # a view of the weight is no reading
        if name in ("index", "index_select"):
            self.rows += len(out)
        elif name.startswith("_embedding_bag"):  # sums of rows, and dot products with them
            self.rows += len(args[2 if name == "_embedding_bag_per_sample_weights_backward" else 1])
        else:
            self.others.append(name)
        return out


@pytest.fixture
def reads_of(monkeypatch):
    """A function: the reads of a weight while `step` runs, on either backend."""

    def reads(weight: torch.Tensor, step) -> Reads:
        found = Reads(weight)

        def counting(launcher, table, index):
            def launch(*arguments):
                found.rows += len(arguments[index]) if found.of(arguments[table]) else 0
                return launcher(*arguments)

            return launch

        with monkeypatch.context() as patch, found:
            patch.setattr(gathered_kernels, "gathered_dots", counting(gathered_kernels.gathered_dots, 2, 3))
            patch.setattr(gathered_kernels, "run_sums", counting(gathered_kernels.run_sums, 2, 3))
            step()
        return found

    return reads


def sets_of_sizes(tokens: torch.Tensor, vocab: int, sizes: torch.Tensor) -> Support:
    """Every token and those that follow it in the vocabulary, 37 apart."""
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    row = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    return Support((tokens[row] + 37 * (torch.arange(len(row)) - offsets[row])) % vocab, offsets)


class Step:
    """Forward and backward of `rows` tokens with sets of these sizes, repeated; with gradients of what is named in `wanted`."""

    def __init__(self, function: str, dtype: torch.dtype, rows: int, vocab: int, sizes: list[int], wanted: str, backend: str):
        self.tokens, self.old = torch.randint(0, min(vocab, LARGE) // 2, (rows,)), torch.randn(rows)
        hidden = torch.randn(rows, H) * 0.1  # so small that no row is computed again
        self.hidden = hidden.to(dtype).requires_grad_("hidden" in wanted)
        self.weight = torch.randn(vocab, H).to(dtype).requires_grad_("weight" in wanted)
        self.head = LMHead(self.weight, weight_grad=torch.zeros(vocab, H) if "buffer" in wanted else None)
        self.sizes = torch.tensor(sizes)[torch.arange(rows) % len(sizes)]
        self.function, self.backend, self.support = function, backend, sets_of_sizes(self.tokens, vocab, self.sizes)

    def __call__(self) -> None:
        options = {"support": self.support, "entropy": True, "backend": self.backend}
        if self.function == "loss":
            total = linear_cispo_loss(self.hidden, self.head, self.tokens, self.old, self.old, **options).loss
        else:
            total = linear_logprobs(self.hidden, self.head, self.tokens, **options).logprobs.sum()
        if total.requires_grad:
            total.backward()


# ---- rows of the weight


@ON_EACH
@FUNCTIONS
@pytest.mark.parametrize("sizes", [[2], [1, 3, 8, 1, 5]], ids=str)
def test_small_sets_read_one_row_for_each_of_their_tokens_and_pass(reads_of, backend, function, dtype, sizes):
    """The forward reads them, and the gradient of the hidden states does; that of the weight reads hidden states. In PyTorch a
    16-bit row that several sets have is widened once in each, for some thousand tokens of sets at a time."""
    for wanted, passes in (("nothing", 1), ("weight", 1), ("hidden", 2), ("hidden weight", 2)):
        step = Step(function, dtype, 35, 1000, sizes, wanted, backend)
        reads, ids = reads_of(step.weight, step), step.support.ids[(step.sizes > 1).repeat_interleave(step.sizes)]
        assert not reads.others
        assert reads.rows == passes * len(ids.unique() if (backend, dtype) == ("torch", bf16) else ids)


@ON_EACH
@FUNCTIONS
def test_sets_of_one_read_nothing(reads_of, backend, function, dtype):
    step = Step(function, dtype, 35, 1000, [1], "hidden weight", backend)
    reads = reads_of(step.weight, step)
    assert (reads.rows, set(reads.others) - {"t"}) == (0, set())


@FUNCTIONS
def test_beside_large_sets_small_ones_are_gathered(reads_of, function):
    """Large ones are multiplied with all of the weight; of it, their products gather each row's own token alone."""
    large, rows = most_gathered(1000, torch.empty(0)) + 1, []
    for sizes in ([large] * 4, [1, 4, large, 15]):
        step = Step(function, f32, 40, 1000, sizes, "hidden weight", "torch")
        reads = reads_of(step.weight, step)
        assert reads.others
        rows.append(reads.rows)
    assert rows[1] - rows[0] == 2 * 10 * (4 + 15)


# ---- memory


def bytes_of(step: Step) -> int:
    """Of temporaries and results, dW aside."""
    used = transient_bytes(step)
    return used - (0 if step.weight.grad is None else step.weight.grad.nbytes)


@ON_EACH
@FUNCTIONS
@pytest.mark.parametrize("wanted", ["nothing", "hidden", "hidden weight", "hidden weight buffer"])
def test_nothing_has_the_size_of_the_vocabulary(backend, function, dtype, wanted):
    """Neither a bit for each logit nor a copy of the weight: only dW has its size, where it is dense and no buffer is given."""
    rows = 2048 if backend == "torch" else 64  # in the interpreter
    step = Step(function, dtype, rows, LARGE, [16] if backend == "torch" else [3], wanted, backend)
    assert bytes_of(step) < min(rows * LARGE // 8, LARGE * H * dtype.itemsize)
    assert (step.weight.grad is not None) == (wanted == "hidden weight")


@FUNCTIONS
@pytest.mark.parametrize("wanted", ["nothing", "hidden", "hidden weight"])
def test_memory_grows_with_the_sets_alone(function, wanted):
    """By a few numbers for each token of a set, fewer than H; and with the vocabulary not at all."""
    used = {}
    for size, vocab in ((8, LARGE), (16, LARGE), (8, 2 * LARGE)):
        torch.manual_seed(0)
        used[size, vocab] = bytes_of(Step(function, f32, 2048, vocab, [size], wanted, "torch"))
    assert used[8, 2 * LARGE] == used[8, LARGE]
    assert 0 < used[16, LARGE] - used[8, LARGE] <= 2048 * 8 * 128 < 2048 * 8 * H * 4
