"""One key and one value for every query head, by repeating weights.

With grouped queries several heads share a key and a value, so an edge into "the key of head 4" does not exist. Repeating the
rows of the key and value projections once for each head of the group gives a model that computes the same and has the edge.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from attnlab.circuits.model import HookedLM


def ungrouped(model: HookedLM) -> HookedLM:
    """The model with a key and a value projection for every query head; the model itself if it has them already.

    Only the repeated projections are new tensors: all other weights are shared with ``model``, which stays as it is. The
    copy computes the same logits; ``k`` and ``v`` activations have ``n_heads`` slices in place of ``n_kv_heads``.

    Raises:
        ValueError: if the keys and values are not plain linear layers with one block of rows a group.
    """
    repeats = model.spec.n_heads // model.spec.n_kv_heads
    if repeats == 1:
        return model
    bridge = model.bridge
    for block in bridge.blocks:
        block._teardown_capture_hooks()  # they point back at this model's blocks, and return with its next run
    shared = [*bridge.parameters(), *bridge.buffers(), bridge.tokenizer]
    clone = copy.deepcopy(bridge, {id(item): item for item in shared})
    for layer, block in enumerate(clone.blocks):
        for name in ("k", "v"):
            projection = getattr(block.attn, name)
            where = f"{model.spec.name}, layer {layer}: the projection of {name}"
            wide = _repeated(projection.original_component, model.spec.n_kv_heads, repeats, where)
            projection.set_original_component(wide)
            projection.hook_out.hook_conversion = block.attn.q.hook_out.hook_conversion  # heads split as those of q
        block.attn.original_component.num_key_value_groups = 1
    for module in (clone, *clone.modules()):
        for config in (getattr(module, "cfg", None), getattr(module, "config", None)):
            for size in ("n_key_value_heads", "num_key_value_heads"):
                if getattr(config, size, None) is not None:
                    setattr(config, size, model.spec.n_heads)
    return HookedLM(clone)


def _repeated(linear: Any, groups: int, repeats: int, where: str) -> nn.Linear:
    """The layer with every group's rows ``repeats`` times, ``[groups * repeats * d_head, d_model]``."""
    if not isinstance(linear, nn.Linear) or linear.out_features % groups:
        raise ValueError(f"{where} is {linear}; only an nn.Linear with rows for {groups} groups can be ungrouped")

    def repeat(rows: torch.Tensor) -> nn.Parameter:
        heads = rows.detach().unflatten(0, (groups, -1)).repeat_interleave(repeats, 0)  # [H, d_head, ...]
        return nn.Parameter(heads.flatten(0, 1), requires_grad=False)

    with torch.device("meta"):
        wide = nn.Linear(linear.in_features, linear.out_features * repeats, bias=linear.bias is not None)
    wide.weight = repeat(linear.weight)
    if linear.bias is not None:
        wide.bias = repeat(linear.bias)
    return wide
