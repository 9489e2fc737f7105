"""The pictures of the README: what they are drawn from is what the schedules allocate, and what an H100 measured."""

import json

import memory_over_tokens
import pytest
import readme_pictures as pictures
from memory_over_tokens import COUNTED, METHODS, peak_bytes
from readme_tables import H100_SERIES, H100_STEP

COUNTS = json.loads(COUNTED.read_text())["peak_bytes"]
STEP, SERIES = (json.loads(path.read_text()) for path in (H100_STEP, H100_SERIES))


@pytest.mark.parametrize("rows", [1024, 8192, 65536])
@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_are_those_that_are_allocated_today(method, rows):
    if method == "TRL":
        pytest.importorskip("trl")
    assert peak_bytes(method, rows) == pytest.approx(COUNTS[method][str(rows)], rel=1e-3)  # vectors (N,) differ by version


def test_the_bytes_are_those_that_a_gpu_measured():
    """full logits and TRL's head have not changed since. One pass now is what was called one chunk then."""
    rows, measured = pictures.of_the_head(STEP)
    measured["fastpg one pass"] = next(
        r["peak"] / pictures.GIB
        for r in SERIES["runs"]["third"]
        if (r.get("H"), r["section"], r["name"]) == (4096, "peak", "one chunk")
    )
    for method in ("full logits", "TRL", "fastpg one pass"):
        assert COUNTS[method][str(rows)] / pictures.GIB == pytest.approx(measured[method], rel=0.02), method


def test_full_logits_run_out_of_memory_in_the_picture_and_fastpg_does_not():
    peaks = {method: max(of_method.values()) for method, of_method in COUNTS.items()}
    assert peaks["full logits"] > 80e9
    assert max(peaks["fastpg one pass"], peaks["fastpg two passes"]) < 0.06 * 80e9


def test_pictures_are_drawn(tmp_path):
    pictures.memory_over_tokens(json.loads(COUNTED.read_text()), STEP, tmp_path / "memory.png")
    pictures.milliseconds(STEP, SERIES, tmp_path / "milliseconds.png")
    for name in ("memory", "milliseconds"):
        assert (tmp_path / f"{name}.png").stat().st_size > 20000
    for path in (pictures.MEMORY, pictures.MILLISECONDS):
        assert path.is_file()
    assert list(memory_over_tokens.METHODS) == list(COUNTS)
