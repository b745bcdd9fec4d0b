"""Attention as an RNN (Feng et al. 2024, arXiv:2405.13956). Taught in the chapter ``kernels/aaren``.

With a query that never changes, softmax attention over a growing past is a running sum (:mod:`attnlab.mixers.softmax_merge`).
Here are the layer that makes of it, the rounds of its scan, two shortcuts that fail, and a stream of tokens beside one with a
cache. What is trained stands in :mod:`attnlab.kernels.aaren_tasks`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab import lab
from attnlab.kernels.aaren_scan import aaren_scan
from attnlab.mixers import Summary, leaf, merge, read
from attnlab.models.language import Block, SequenceModel, SoftmaxAttention
from attnlab.models.training import seeded


class Aaren(nn.Module):
    """Causal softmax attention whose query is learned, and the same at every token (section 3 of the paper).

    A layer has the four matrices of softmax attention and one vector more, the query before its projection. What is kept of
    the past is a :class:`~attnlab.mixers.softmax_merge.Summary`, V + 2 numbers a head.

    Args:
        width: D, a multiple of ``heads``.
        heads: H; K = V = D / H.
        scale: of the scores; left out, ``K ** -0.5``.

    Raises:
        ValueError: sizes that are not positive, heads that do not divide the width.
    """

    def __init__(self, width: int, heads: int, *, scale: float | None = None) -> None:
        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise ValueError(f"heads={heads} must divide width={width}, and both be positive; choose a divisor")
        self.heads = heads
        self.scale = (width // heads) ** -0.5 if scale is None else scale
        self.query = nn.Parameter(torch.randn(width))
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key = nn.Linear(width, width, bias=False)
        self.to_value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        return self.absorb(x)[0]

    def absorb(self, x: Tensor, past: Summary | None = None) -> tuple[Tensor, Summary]:
        """The outputs of a piece of a stream [B, T, D], after what ``past`` summarises, and the summary of both."""
        o, summary = aaren_scan(*self.scores_and_values(x), initial=past)
        return self.out(o.flatten(2)), summary  # [B, T, H, V] -> [B, T, D]

    def step(self, x: Tensor, past: Summary | None = None) -> tuple[Tensor, Summary]:
        """The output of one token [B, D], after what ``past`` summarises, and the new summary: one merge, no sequence."""
        s, v = self.scores_and_values(x)
        summary = leaf(s, v) if past is None else merge(past, leaf(s, v))
        return self.out(read(summary).flatten(1)), summary  # [B, H, V] -> [B, D]

    def scores_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] -> scores [..., H] and values [..., H, V]"""
        return x @ self.score_weights().mT, self.to_value(x).unflatten(-1, (self.heads, -1))

    def score_weights(self) -> Tensor:
        """[H, D]: query and key matrix in one, since ``q . (W_k x) = (W_k^T q) . x``. No key is ever formed."""
        query = self.to_query(self.query).unflatten(-1, (self.heads, -1))  # [H, K]
        keys = self.to_key.weight.unflatten(0, (self.heads, -1))  # [H, K, D]
        return self.scale * torch.einsum("hk,hkd->hd", query, keys)


class CausalMean(nn.Module):
    """The control: every token counts the same. :class:`Aaren` with all scores equal, without what makes the scores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]  # [T, 1]
        return self.out(self.to_value(x).cumsum(1) / count)


# ------------------------------------------------------------------------------------------ the scan and its shortcuts


def scan_rounds(s: Tensor, v: Tensor) -> list[Summary]:
    """The scan of Hillis and Steele, round by round, for one head: scores [T], values [T, V].

    After round j the entry of token t summarises the last ``2 ** j`` tokens up to t, or all of them if there are fewer.
    The last round holds every prefix. In a round all merges are independent of each other.
    """
    rounds = [leaf(s, v)]
    reach = 1
    while reach < len(s):
        old = rounds[-1]
        earlier, later = Summary(*(x[:-reach] for x in old)), Summary(*(x[reach:] for x in old))
        pairs = zip(old, merge(earlier, later), strict=True)
        rounds.append(Summary(*(torch.cat([x[:reach], merged]) for x, merged in pairs)))
        reach *= 2
    return rounds


def raw_exponentials(s: Tensor, v: Tensor) -> Tensor:
    """A shortcut that fails: quotient of two running sums of ``exp(s)``, which overflow. s [B, T, H], v [B, T, H, V]."""
    weight = s.exp()[..., None]
    return (weight * v).cumsum(1) / weight.cumsum(1)


def one_maximum(s: Tensor, v: Tensor) -> Tensor:
    """A shortcut that fails: the maximum of the whole sequence is subtracted, so early tokens underflow to 0 / 0."""
    return raw_exponentials(s - s.amax(1, keepdim=True), v)


# ----------------------------------------------------------------------------------------------------------- streaming


@torch.no_grad()
def stream(model: SequenceModel, x: Tensor) -> Tensor:
    """What a model of :class:`Aaren` layers returns for [B, T, F], read one token at a time: [B, T, O].

    Between two tokens nothing is kept but a summary a layer.

    Raises:
        ValueError: a layer of another kind.
    """
    trunk = model.trunk
    blocks = [block for block in trunk.blocks if isinstance(block, Block)]
    mixers = [block.mixer for block in blocks if isinstance(block.mixer, Aaren)]
    if len(mixers) < len(trunk.blocks):
        kinds = ", ".join(type(block.mixer).__name__ for block in blocks)
        raise ValueError(f"model: its layers are {kinds}; only Aaren layers stream")
    past: list[Summary | None] = [None] * len(blocks)
    outputs = []
    for t in range(x.shape[1]):
        h = model.embedding(x[:, t])  # [B, D]
        if trunk.positions is not None:
            h = h + trunk.positions.weight[t]
        for layer, (block, mixer) in enumerate(zip(blocks, mixers, strict=True)):
            mixed, past[layer] = mixer.step(block.mixer_norm(h), past[layer])
            h = h + mixed
            h = h + block.mlp(block.mlp_norm(h))
        outputs.append(model.head(trunk.norm(h)))
    return torch.stack(outputs, 1)


class RunningSummary:
    """One stream of one Aaren layer."""

    def __init__(self, layer: Aaren) -> None:
        self.layer = layer
        self.past: Summary | None = None

    @torch.no_grad()
    def absorb(self, x: Tensor) -> None:
        """Read tokens [T, D] at once."""
        self.past = self.layer.absorb(x[None], self.past)[1]

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """One token [D] -> [D]."""
        o, self.past = self.layer.step(x[None], self.past)
        return o[0]

    @property
    def bytes(self) -> int:
        """What is kept of the past."""
        return 0 if self.past is None else sum(x.numel() * x.element_size() for x in self.past)


class GrowingCache:
    """The control: one stream of one softmax attention layer, which keeps every key and value.

    Args:
        layer: without ALiBi and rotary positions.
        capacity: the most tokens it can hold; their room is taken at once, so that no step has to move them.
    """

    def __init__(self, layer: SoftmaxAttention, capacity: int) -> None:
        self.layer = layer
        width = layer.out.in_features
        self.room = layer.out.weight.new_zeros(2, layer.heads, capacity, width // layer.heads)  # [k or v, H, N, K]
        self.tokens = 0

    @torch.no_grad()
    def absorb(self, x: Tensor) -> None:
        """Read tokens [T, D] at once."""
        self._write(self._project(x))

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """One token [D] -> [D]: it joins the cache, then looks at all of it."""
        qkv = self._project(x[None])
        self._write(qkv)
        k, v = self.room[:, :, : self.tokens]
        return self.layer.out(F.scaled_dot_product_attention(qkv[0], k, v, scale=self.layer.scale).flatten())

    @property
    def bytes(self) -> int:
        """What is kept of the past."""
        return self.room[:, :, : self.tokens].numel() * self.room.element_size()

    def _project(self, x: Tensor) -> Tensor:
        """[T, D] -> queries, keys and values [3, H, T, K]"""
        return self.layer.qkv(x).unflatten(-1, (3, self.layer.heads, -1)).permute(1, 2, 0, 3)

    def _write(self, qkv: Tensor) -> None:
        until = self.tokens + qkv.shape[2]
        self.room[:, :, self.tokens : until] = qkv[1:]
        self.tokens = until


@dataclass(frozen=True)
class Cost:
    """What one layer costs when it generates after ``context`` tokens: ``ms`` a token in every repeat, and bytes kept."""

    layer: str
    context: int
    bytes: int
    ms: np.ndarray


@torch.no_grad()
def costs(
    contexts: Sequence[int], *, width: int = 64, heads: int = 4, repeats: int = 15, tokens: int = 20
) -> list[Cost]:
    """Memory of one stream and time of one token, for Aaren and for cached softmax attention, after ``contexts`` tokens.

    The past is read at once, so that nobody has to wait for it; then ``tokens`` tokens are timed one by one, ``repeats``
    times. What counts is the seconds of the one thread that works, and of a repeat its median, so that other programs hardly
    matter; all streams take turns, so that a machine that is slow for a minute is slow for all of them.
    """
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(repeats, tokens, width, generator=generator)
    streams: list[tuple[str, int, RunningSummary | GrowingCache]] = []
    for context in contexts:
        summary = RunningSummary(seeded(lambda: Aaren(width, heads), 0))
        cache = GrowingCache(seeded(lambda: SoftmaxAttention(width, heads), 0), context + repeats * tokens)
        past = torch.randn(context, width, generator=generator)
        for name, each in (("Aaren", summary), ("softmax with KV cache", cache)):
            each.absorb(past)
            streams.append((name, context, each))
    kept = [each.bytes for _, _, each in streams]
    ms = np.empty((len(streams), repeats))
    with lab.one_thread():
        for repeat in range(repeats):
            for row, (_, _, each) in enumerate(streams):
                ms[row, repeat] = np.median([_milliseconds(each, token) for token in new[repeat]])
    return [Cost(name, context, kept[row], ms[row]) for row, (name, context, _) in enumerate(streams)]


def _milliseconds(stream: RunningSummary | GrowingCache, token: Tensor) -> float:
    began = time.thread_time()
    stream.step(token)
    return 1000 * (time.thread_time() - began)
