"""Several models of one architecture trained at once: their parameters stacked, one batched product where there were many.

Seeds of a small model differ in nothing but numbers. One product of stacked matrices costs less than the same products one by one,
most of all on a GPU; and since an optimizer such as AdamW works number by number, each model is trained as if it were alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap


class Stacked(nn.Module):
    """R models as one: inputs [R, ...] to outputs [R, ...], model r on inputs r.

    For a mean loss over everything the gradient of each model is a share 1/R of its own, which Adam does not notice; train without
    clipping (``clip=None``), since a norm over all models would tie them together.

    Args:
        models: at least one, alike in everything but their numbers. Buffers are those of the first. They are copied.

    Raises:
        ValueError: no model, or models whose parameters differ in name or shape.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise ValueError("models: at least one is wanted, not none")
        shapes = [{name: value.shape for name, value in model.named_parameters()} for model in models]
        for number, other in enumerate(shapes):
            if other != shapes[0]:
                raise ValueError(f"models: number {number} has other parameters than number 0; build all of them alike")
        self.count = len(models)
        stacked, _ = stack_module_state(list(models))
        self.names = list(stacked)
        self.stacked = nn.ParameterList([nn.Parameter(stacked[name].detach().clone()) for name in self.names])
        self._template = [copy.deepcopy(models[0]).requires_grad_(False)]  # in a list: its parameters are not ours

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stacked:
        self._template[0]._apply(fn)  # buffers move with the parameters
        super()._apply(fn, recurse)
        return self

    def forward(self, *inputs: Tensor) -> Any:
        """Every input [R, ...]; the outputs of the models stacked the same way."""
        template = self._template[0]

        def one(parameters: dict[str, Tensor], *args: Tensor) -> Any:
            return functional_call(template, parameters, args)

        return vmap(one)(dict(zip(self.names, self.stacked, strict=True)), *inputs)

    def unstack(self) -> list[nn.Module]:
        """The R models, with their present numbers, each on its own."""
        models = []
        for index in range(self.count):
            model = copy.deepcopy(self._template[0]).requires_grad_(True)
            with torch.no_grad():
                for name, value in zip(self.names, self.stacked, strict=True):
                    model.get_parameter(name).copy_(value[index])
            models.append(model.eval())
        return models
