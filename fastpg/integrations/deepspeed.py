"""Parameters that DeepSpeed's ZeRO-3 has partitioned, for code that reads them where their own module's forward does not run.

Every rank holds a share of each parameter. The parameter itself is empty, but in the forward and the backward of its module. A
parameter that ZeRO-3 handles has a `ds_id`; for all others the functions here do nothing. Gathering is collective: every rank
has to come here, with the same parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from ..lm_head import is_partitioned

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def gathered(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Within the context they are whole. Those that are whole already stay so after it."""
    parameters = [p for p in parameters if is_partitioned(p)]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def gather_for_backward(module: torch.nn.Module, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Has ZeRO-3 gather them for the backward of `module`, whose forward is running, and for its next forwards.

    Without gradients too: from two forwards without them ZeRO-3 concludes what a third will gather, and refuses more.
    """
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            import deepspeed

            deepspeed.zero.register_external_parameter(module, parameter)


@contextmanager
def gathered_by_layer(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the model can be called before it has an engine, which would gather its parameters.

    Of the decoder layers one is whole at a time, so that a model that fits on no single rank can run. All else, such as the
    embeddings and the lm_head, is whole in the context.
    """
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    with gathered(p for p in model.parameters() if id(p) not in in_layers), ExitStack() as one_layer:
        handles = [
            handle
            for layer in layers
            for handle in (
                layer.register_forward_pre_hook(lambda layer, _: one_layer.enter_context(gathered(layer.parameters()))),
                layer.register_forward_hook(lambda *_: one_layer.close()),
            )
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
