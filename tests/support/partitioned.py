"""A layer as DeepSpeed's ZeRO-3 leaves it, and the two functions of DeepSpeed that code has to call then."""

import contextlib
import sys
import types

import torch


def gather(parameter):
    parameter.data = parameter.ds_whole


def release(parameter):
    parameter.data = torch.empty(0, dtype=parameter.dtype)


def partition(layer, in_its_forward=True):
    """The weight is whole in the layer's own forward alone; without in_its_forward in none, as where no engine has hooks."""
    p = layer.weight
    p.ds_id, p.ds_whole, p.ds_shape = 0, p.data, p.shape
    if in_its_forward:
        layer.register_forward_pre_hook(lambda *_: gather(p))
        layer.register_forward_hook(lambda *_: release(p))
    release(p)


def replace_deepspeed(monkeypatch):
    """The list of (module, parameter) that are registered from here on: DeepSpeed gathers them for the module's backward."""
    registered = []

    @contextlib.contextmanager
    def gathered(parameters):
        for p in parameters:
            gather(p)
        yield
        for p in parameters:
            release(p)

    zero = types.SimpleNamespace(
        register_external_parameter=lambda *given: registered.append(given), GatheredParameters=gathered
    )
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    return registered
