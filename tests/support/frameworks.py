"""Frameworks that adapters are compared with, where only a part of what they depend on is installed.

They change other libraries when they are imported: import them in a rank of `ranks`, which is a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType


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
