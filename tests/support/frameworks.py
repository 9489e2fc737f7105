"""Frameworks that adapters are compared with, where only a part of what they depend on is installed.

They change other libraries when they are imported: import them in a rank of `ranks`, which is a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch


class Names(ModuleType):
    """Stands for a library of which names are imported, as base classes and in annotations, and nothing is called."""

    __path__ = ()

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def installed(*distributions: str) -> bool:
    try:
        return all(metadata.version(name) for name in distributions)
    except metadata.PackageNotFoundError:
        return False


def of_verl(module: str) -> ModuleType:
    """A module of verl, which needs no more than names of Ray here, and an older TRL: it is told that there is none."""
    if importlib.util.find_spec("ray") is None:  # not a second time: then it is found
        sys.modules["ray"] = Names("ray")
    importlib.import_module("verl.models.transformers.monkey_patch").is_trl_available = lambda: False
    return importlib.import_module(module)


def of_skyrl(module: str) -> ModuleType:
    """A module of SkyRL's training backend, without skyrl.backends itself: that imports a server, which wants Python 3.12."""
    if "skyrl.backends" not in sys.modules:
        folder = Path(importlib.import_module("skyrl").__file__).parent
        package = sys.modules["skyrl.backends"] = ModuleType("skyrl.backends")
        package.__path__ = [str(folder / "backends")]
        sys.modules["flash_attn"] = Names("flash_attn")
        padding = sys.modules["flash_attn.bert_padding"] = Names("flash_attn.bert_padding")
        padding.unpad_input, padding.pad_input = _unpad_input, _pad_input
    return importlib.import_module(f"skyrl.backends.skyrl_train.{module}")


def _unpad_input(x: torch.Tensor, attention_mask: torch.Tensor) -> tuple:
    """flash_attn's: the rows of (B, S, ...) that the mask keeps, and their indices, first of five results."""
    indices = attention_mask.flatten().nonzero()[:, 0]
    return x.flatten(0, 1)[indices], indices, None, None, None


def _pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return out.index_copy(0, indices, hidden_states).view(batch, seqlen, *hidden_states.shape[1:])
