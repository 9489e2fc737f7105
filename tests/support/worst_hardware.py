"""The one matrix product as the worst hardware would have it, and the suites that run through it once more.

Processors differ in what they do to operands of `fastpg.tiles.products`, and a test sees one processor. So the parity, property
and LoRA suites run a second time on a product that

    refuses   an operand with anything that is not finite in the memory between its rows, or behind its last one: oneDNN's AMX
              kernels read there, and multiply what they find by 0
    rounds    fp32 operands to bf16 wherever torch's switch allows it, as AMX does and other CPUs do not

In that second run each test function gets every value of each of its parameters once, and not every combination (`pairs`).
"""

from collections.abc import Iterator

import pytest
import torch

from fastpg.tiles import products

SUITES = ("test_parity", "test_properties", "test_lora")
HERE, WORST = "this CPU", "worst CPU"


def memory_around(x: torch.Tensor) -> torch.Tensor:
    """What the storage of x (rows, columns) holds between its first entry and the end of its last row's stride, x left out."""
    sizes = list(zip(x.shape, x.stride(), strict=True))
    end = sum((size - 1) * stride for size, stride in sizes) + 1
    end = max(end, *(size * stride for size, stride in sizes))
    available = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    span = x.detach().as_strided((min(end, available),), (1,))
    owned = torch.zeros(end, dtype=torch.bool, device=x.device)
    owned.as_strided(x.shape, x.stride()).fill_(True)
    return span[~owned[: len(span)]]


def worst_product(product):
    """`fastpg.tiles.products._multiply`, on the worst hardware."""

    def multiply(a, b, out=None, accumulate=False, dtype=None):
        for name, x in (("first", a), ("second", b)):
            if x.device.type == "cpu" and x.numel():
                around = memory_around(x)
                assert around.isfinite().all(), f"the {name} operand, {tuple(x.shape)} of {x.dtype}, stands in memory with NaN"
        if a.dtype == torch.float32 and a.device.type == "cpu" and torch.backends.mkldnn.matmul.fp32_precision == "bf16":
            a, b = (x.bfloat16().float() for x in (a, b))
        return product(a, b, out, accumulate, dtype)

    return multiply


def product_of(hardware: str) -> Iterator[None]:
    """Puts the product of `hardware` in the library's place while the generator is suspended."""
    with pytest.MonkeyPatch.context() as patch:
        if hardware == WORST:
            patch.setattr(products, "_multiply", worst_product(products._multiply))
        yield
