"""What runs here: versions, the device, and the backend that a call would take. For bug reports, and for the log of a check."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from ..tiles.backend import choose_backend


def versions() -> dict[str, str]:
    from .. import __version__

    others = {name: _version(name) for name in ("triton", "transformers")}
    return {"fastpg": __version__, "python": platform.python_version(), "torch": torch.__version__, **others}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device_name() -> str:
    """The GPU that torch finds, else the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def about() -> str:
    """One line: fastpg, torch, triton; and the backend that tensors on the device here take."""
    found = versions()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        backend = f"backend {choose_backend(None, torch.empty(0, device=device))}"
    except (ValueError, ModuleNotFoundError) as error:  # FASTPG_BACKEND asks for what is not here
        backend = f"no backend: {error}"
    named = ", ".join(f"{name} {found[name]}" for name in ("fastpg", "torch", "triton"))
    return f"{named}; on {device} ({device_name()}): {backend}"


def install_command(extra: str) -> str:
    """How to install what an extra of pyproject.toml names: of the checkout, where fastpg is imported from one."""
    root = Path(__file__).resolve().parents[2]
    return f'pip install -e ".[{extra}]"' if (root / "pyproject.toml").is_file() else f'pip install "fastpg-lm[{extra}]"'
