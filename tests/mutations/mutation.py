"""What a mutation is, and the file that a test's name stands for."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # names of files in tests/, without folder, test_ and .py
    only: str = ""  # pytest's -k


def file_of(name: str) -> Path:
    """From the root: kernels -> tests/kernels/test_kernels.py."""
    (path,) = ROOT.glob(f"tests/*/test_{name}.py")
    return path.relative_to(ROOT)
