"""The interpreter of these tests (`fast_interpreter`) computes what Triton's own does, to the bit."""

import json
import sys
from pathlib import Path

import pytest
from programs import run_program

from fastpg.kernels.tile import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU nothing is interpreted")
# Every kernel of the two schedules, in three dtypes, over ragged tiles; `found` is a list of bytes in hexadecimal.
CODE = """
import interpreted_products, torch
interpreted_products.use_one_order()
import fastpg
from fastpg.kernels.tile import INTERPRETED
assert INTERPRETED
found = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    numbers = torch.Generator().manual_seed(1)
    def rand(*size): return torch.randn(*size, generator=numbers)
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (rand(21, 40), rand(1100, 40), rand(1100)))
    tokens, mask = torch.randint(0, 1100, (21,), generator=numbers), rand(21) > -1
    old, advantages = -8 + rand(21), rand(21)
    head = fastpg.LMHead(weight, bias=bias, softcap=20.0)
    out = fastpg.linear_cispo_loss(
        hidden, head, tokens, old, advantages, mask=mask, entropy=True, outputs=("rank", "logsumexp"), top_k=2, backend="triton"
    )
    two = fastpg.linear_logprobs(hidden, head, tokens, mask=mask, entropy=True, temperature=0.7, backend="triton")
    loss = out.loss + (two.logprobs - 0.1 * two.entropy).sum()
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    found += [x.detach().float().numpy().tobytes().hex() for x in (loss, *out.statistics, *two, *gradients) if x is not None]
"""


def test_bits_are_those_of_tritons_interpreter(tmp_path):
    said = "import json, sys; from triton.runtime import interpreter as i; "
    said += "json.dump([found, i._patch_lang.__module__], sys.stdout)"
    paths = {"PYTHONPATH": str(Path(__file__).resolve().parents[1] / "support")}
    done = run_program("-c", CODE + said, folder=tmp_path, interpreter=True, environment=paths, fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, module = json.loads(done.stdout)
    names = {}
    exec(CODE, names)
    assert module == "triton.runtime.interpreter"
    assert sys.modules["triton.runtime.interpreter"]._patch_lang.__module__ == "fast_interpreter"
    assert len(theirs) >= 30
    assert names["found"] == theirs
