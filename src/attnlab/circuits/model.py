"""A language model that can be stopped, edited and restarted in the middle.

Circuit analysis runs the same prompt hundreds of times with one activation changed. Two facts make that cheap:

- nothing *below* the changed layer changes, so a run can restart from the cached residual stream of that layer;
- attention is causal, so nothing *before* the changed position changes either: the earlier tokens take part only
  through their cached keys and values.

:class:`HookedLM` wraps a ``TransformerBridge`` of TransformerLens and offers just that. It works for every decoder that
the bridge runs with a key/value cache; grouped-query attention (GQA) is honoured, so ``z`` has one slice a query head and
``k`` and ``v`` one a key/value group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: activations that can be captured or edited, and the bridge's hook for each
HOOKS = {
    "resid_pre": "blocks.{}.hook_in",  # [B, T, d_model]       residual stream entering the block
    "q": "blocks.{}.attn.hook_q",  # [B, T, n_heads, d_head]   before the rotary embedding
    "k": "blocks.{}.attn.hook_k",  # [B, T, n_kv_heads, d_head]
    "v": "blocks.{}.attn.hook_v",  # [B, T, n_kv_heads, d_head]
    "pattern": "blocks.{}.attn.hook_pattern",  # [B, n_heads, T, T]  after the softmax
    "z": "blocks.{}.attn.hook_z",  # [B, T, n_heads, d_head]   head output before W_O
    "mlp_in": "blocks.{}.ln2.hook_in",  # [B, T, d_model]     residual stream entering the norm of the MLP
    "mlp_out": "blocks.{}.mlp.hook_out",  # [B, T, d_model]
}


class Node(NamedTuple):
    """One writer to the residual stream: a head ``9.6``, an MLP ``m9`` or the embedding ``input``."""

    layer: int
    head: int | None = None

    @classmethod
    def parse(cls, text: str | tuple[int, int | None]) -> Node:
        """Read ``"9.6"``, ``"L9H6"``, ``"a9.h6"``, ``"m9"`` or ``"input"``; a ``(layer, head)`` pair passes through."""
        if isinstance(text, tuple):
            return cls(*text)
        if text == "input":
            return INPUT
        if match := re.fullmatch(r"[LaA]?(\d+)(?:\.|\.?[Hh])(\d+)", text):
            return cls(int(match[1]), int(match[2]))
        if match := re.fullmatch(r"m(\d+)", text):
            return cls(int(match[1]), None)
        raise ValueError(
            f"node {text!r} is not understood; write a head as '9.6', an MLP as 'm9', the embedding as 'input'"
        )

    def __str__(self) -> str:
        if self == INPUT:
            return "input"
        return f"m{self.layer}" if self.head is None else f"{self.layer}.{self.head}"


INPUT = Node(-1, None)


@dataclass(frozen=True)
class Spec:
    """The sizes of a model that circuit analysis needs."""

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int

    @property
    def heads(self) -> list[Node]:
        """All query heads, layer by layer."""
        return [Node(layer, head) for layer in range(self.n_layers) for head in range(self.n_heads)]

    @property
    def nodes(self) -> list[Node]:
        """Every writer to the residual stream: the embedding, all heads, all MLPs."""
        return [INPUT, *self.heads, *(Node(layer) for layer in range(self.n_layers))]

    def check(self, node: str | tuple[int, int | None]) -> Node:
        """Parse a node and refuse one that the model does not have.

        Raises:
            ValueError: if the layer or the head is out of range.
        """
        found = Node.parse(node)
        if found != INPUT and not (
            0 <= found.layer < self.n_layers and (found.head is None or 0 <= found.head < self.n_heads)
        ):
            raise ValueError(
                f"node {found} does not exist in {self.name}: "
                f"layers run from 0 to {self.n_layers - 1}, heads from 0 to {self.n_heads - 1}"
            )
        return found


class Edit(NamedTuple):
    """Replace an activation: ``change(act, first)`` gets the activation from position ``first`` on and returns the new one."""

    kind: str  # a key of HOOKS
    layer: int
    change: Callable[[Tensor, int], Tensor]


@dataclass
class Run:
    """One forward pass, with all that a restart needs.

    ``resid[l]`` [B, T - first, d_model] enters block ``l``; ``resid[n_layers]`` leaves the last block. ``acts[(kind, layer)]``
    holds what was captured. ``kv[l]`` is the pair of keys and values, [B, n_kv_heads, T, d_head] each, after the rotary embedding.
    """

    resid: dict[int, Tensor]
    acts: dict[tuple[str, int], Tensor]
    kv: dict[int, tuple[Tensor, Tensor]]
    first: int = 0

    def stack(self, kind: str) -> Tensor:
        """All captured layers of one kind, stacked: ``[n_layers, B, ...]``."""
        return torch.stack([self.acts[key] for key in sorted(self.acts) if key[0] == kind])


class _KeyValues:
    """What the model sees as its key/value cache: records what it is given, or prepends the clean prefix to it."""

    def __init__(self, prefix: dict[int, tuple[Tensor, Tensor]] | None = None, first: int = 0) -> None:
        self.prefix, self.first = prefix or {}, first
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, k: Tensor, v: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.first:
            copies = len(k) // len(self.prefix[layer][0])
            pk, pv = (x[:, :, : self.first].repeat(copies, 1, 1, 1) for x in self.prefix[layer])
            k, v = torch.cat([pk, k], dim=2), torch.cat([pv, v], dim=2)
        else:
            self.seen[layer] = (k, v)  # only a whole run is restarted from, so only its cache is kept
        return k, v

    def get_seq_length(self, *_: Any) -> int:
        return self.first


class HookedLM:
    """A decoder that runs with edits, from any layer and any position on.

    Args:
        bridge: a ``TransformerBridge`` (see :func:`attnlab.models.pretrained.load`); it is put into eval mode and its
            parameters are frozen, since circuit analysis needs gradients of activations only.
    """

    def __init__(self, bridge: Any) -> None:
        self.bridge = bridge.eval().requires_grad_(False)
        cfg = bridge.cfg
        self.spec = Spec(
            name=str(cfg.model_name),
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_head,
        )

    @property
    def tokenizer(self) -> Any:
        return self.bridge.tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.bridge.parameters()).device

    @cached_property
    def W_O(self) -> Tensor:
        """Output projections, ``[n_layers, n_heads, d_head, d_model]``: head ``h`` writes ``z[:, :, h] @ W_O[layer, h]``."""
        return self.bridge.W_O.detach()

    @cached_property
    def _unembed(self) -> tuple[Tensor, Tensor]:
        weight = self.bridge.W_U.detach().T.contiguous()  # [V, d_model]
        bias = getattr(self.bridge, "b_U", None)
        return weight, (torch.zeros_like(weight[:, 0]) if bias is None else bias.detach())

    def run(
        self,
        tokens: Tensor,
        edits: Sequence[Edit] = (),
        capture: Iterable[str] = (),
        grad: bool = False,
        base: Run | None = None,
        first: int = 0,
    ) -> Run:
        """Run the whole model on ``tokens`` [B, T] (no padding) and keep every residual, key and value.

        With ``grad=True`` the captured activations carry gradients (those of the parameters are never computed). If
        ``base`` ran on prompts with the same tokens before position ``first``, only ``first ..`` are run.
        """
        with torch.no_grad():
            resid = self.bridge(tokens.to(self.device), stop_at_layer=0)[:, first:]  # [B, T - first, d_model]
        if grad:
            resid = resid.detach().requires_grad_(True)
        cache = _KeyValues(base.kv if base else None, first)
        return self._blocks({0: resid}, self.spec.n_layers, cache, edits, capture, grad)

    def resume(
        self,
        base: Run,
        starts: Sequence[int],
        first: int = 0,
        edits: Sequence[Edit] = (),
        capture: Iterable[str] = (),
        stop: int | None = None,
    ) -> Run:
        """Run copies of ``base`` [B, T] again with edits, positions ``first ..`` only, all copies in one sweep.

        Copy ``c`` begins to differ at block ``starts[c]`` (ascending) and joins the sweep there; below, it is ``base``. Row
        ``c * B + b`` is copy ``c`` of example ``b``, so the rows present in a block are always the first ones. Exact as
        long as no edit touches a copy below its start or before ``first``.
        """
        stop = self.spec.n_layers if stop is None else stop
        joining = {layer: base.resid[layer][:, first:].repeat(starts.count(layer), 1, 1) for layer in set(starts)}
        return self._blocks(joining, stop, _KeyValues(base.kv, first), edits, capture, grad=False)

    def readout(self, resid: Tensor) -> Tensor:
        """Final norm of the last position: ``[R, T, d_model] -> [R, d_model]``."""
        return self.bridge.ln_final(resid[:, -1:])[:, 0]

    def logits(self, normed: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits of the whole vocabulary ``[R, V]``, or of the chosen ``tokens`` ``[R, k]`` alone, from the normed residual.

        The unembedding dominates short prompts (49,152 x 576 for SmolLM2); a logit difference needs two of its rows.
        """
        weight, bias = self._unembed
        if tokens is None:
            return normed @ weight.T + bias
        return torch.einsum("rd,rkd->rk", normed, weight[tokens]) + bias[tokens]

    def _blocks(
        self,
        joining: dict[int, Tensor],
        stop: int,
        cache: _KeyValues,
        edits: Sequence[Edit],
        capture: Iterable[str],
        grad: bool,
    ) -> Run:
        """Blocks up to ``stop - 1``; the rows ``joining[l]`` [R, T - first, d_model] enter the sweep at block ``l``."""
        first, start = cache.first, min(joining)
        run = Run(resid={}, acts={}, kv=cache.seen, first=first)
        resid = joining[start][:0]
        extra = self._position_arguments(first, first + resid.shape[1])
        with torch.set_grad_enabled(grad), self._hooks(run, edits, tuple(capture), range(start, stop)):
            for layer in range(start, stop):
                if layer in joining:
                    resid = torch.cat([resid, joining[layer]])
                run.resid[layer] = resid
                block = self.bridge.blocks[layer]
                out = block(resid, attention_mask=None, past_key_values=cache, use_cache=True, **extra)
                resid = out[0] if isinstance(out, tuple) else out
        run.resid[stop] = resid
        return run

    @contextmanager
    def _hooks(self, run: Run, edits: Sequence[Edit], capture: Sequence[str], layers: range) -> Iterator[None]:
        """Attach edits first, then captures (which so see the edited value); detach both even if the run fails."""

        def editing(edit: Edit) -> Callable[..., Tensor]:
            return lambda act, hook: edit.change(act, run.first)

        def capturing(kind: str, layer: int) -> Callable[..., Tensor]:
            def keep(act: Tensor, hook: Any) -> Tensor:
                run.acts[kind, layer] = act
                return act  # handed back, so that the kept tensor is the one on the path of the gradient

            return keep

        hooks: list[tuple[str, Callable[..., Any]]] = []
        hooks += [(HOOKS[e.kind].format(e.layer), editing(e)) for e in edits if e.layer in layers]
        hooks += [(HOOKS[kind].format(layer), capturing(kind, layer)) for kind in capture for layer in layers]
        with self.bridge.hooks(fwd_hooks=hooks):
            yield

    def _position_arguments(self, first: int, last: int) -> dict[str, Any]:
        """What a block wants to know about positions ``first .. last - 1``: rotary tables, where the model has them."""
        rotary = getattr(self.bridge, "rotary_emb", None)
        if rotary is None:  # learned positions are in the embedding already
            return {}
        ids = torch.arange(first, last, device=self.device)[None]
        like = torch.empty(1, 1, self.spec.d_model, device=self.device, dtype=self._unembed[0].dtype)
        with torch.no_grad():
            return {"position_embeddings": rotary(like, ids), "position_ids": ids}
