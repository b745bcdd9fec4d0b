"""Pointer Networks (Vinyals, Fortunato, Jaitly 2015, arXiv:1506.03134).

Taught in the chapter ``foundations/pointer-networks``. Four networks answer with a list of input points: the paper's three (an
LSTM with a fixed output dictionary, the same with attention, and the pointer network) and the Transformer form of today.

All have one interface. ``Solver.read`` looks at the points once, ``Solver.step`` gives the logits of the next symbol, and
``Solver.forward`` those of all symbols of a known answer. Symbol 0 stops, symbol j + 1 is point j.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.language import MLP, Block, SoftmaxAttention, initialise

State = Any  # a tuple of tensors [B, ...]


class Memory(NamedTuple):
    """What a network keeps of the input.

    Attributes:
        x: begin symbol and points, [B, n + 1, 3]: (0, 0, 1), then (x, y, 0).
        e: their encodings, [B, n + 1, D]; that of the begin symbol is what the stop symbol points at.
        keys: what scores are computed with, once for all steps, [B, n + 1, D].
        last: the encoder's last state, [B, D] each; empty without recurrence.
    """

    x: Tensor
    e: Tensor
    keys: Tensor
    last: tuple[Tensor, ...] = ()


def with_begin(points: Tensor) -> Tensor:
    """Points [B, n, 2] of the unit square as inputs [B, n + 1, 3] of mean 0 and variance 1, the begin symbol first.

    Raises:
        ValueError: another shape.
    """
    if points.ndim != 3 or points.shape[2] != 2 or 0 in points.shape:
        raise ValueError(f"points: [B, n, 2] with at least one point is wanted, not {list(points.shape)}")
    scaled = (points - 0.5) * 12**0.5
    return torch.cat([F.pad(scaled[:, :1] * 0, (0, 1), value=1.0), F.pad(scaled, (0, 1))], dim=1)


def chosen(memory: Memory, symbols: Tensor) -> Tensor:
    """What the decoder is fed for symbols [B, M]: coordinates, never an index, [B, M, 3]."""
    return take(memory.x, symbols)


def take(table: Tensor, symbols: Tensor) -> Tensor:
    """Rows of table [B, S, F] at symbols [B, M], [B, M, F]."""
    return table.gather(1, symbols[..., None].expand(-1, -1, table.shape[-1]))


def shifted(targets: Tensor) -> Tensor:
    """What has been said before each symbol of targets [B, M]: begin, then all but the last; padding reads as begin."""
    return F.pad(targets[:, :-1].clamp(min=0), (1, 0))


class Solver(nn.Module):
    """A network that answers a set of points with symbols; see the module's head."""

    def read(self, points: Tensor) -> Memory:
        """Look at points [B, n, 2]."""
        raise NotImplementedError

    def start(self, memory: Memory) -> State:
        """The state before the first symbol: a tuple of tensors [B, ...]."""
        raise NotImplementedError

    def step(self, memory: Memory, state: State, previous: Tensor) -> tuple[Tensor, State]:
        """Logits of the next symbol [B, n + 1], and the state after it, when the last one was ``previous`` [B] (0: none yet)."""
        raise NotImplementedError

    def forward(self, points: Tensor, targets: Tensor) -> Tensor:
        """Logits [B, M, n + 1] of every symbol of targets [B, M], given those before it (teacher forcing)."""
        memory = self.read(points)
        state, logits = self.start(memory), []
        for previous in shifted(targets).unbind(1):
            now, state = self.step(memory, state, previous)
            logits.append(now)
        return torch.stack(logits, dim=1)


# ------------------------------------------------------------------------------------------------------- the paper's three


class AdditiveScore(nn.Module):
    """``u_ij = v . tanh(W1 e_j + W2 d_i)``, without biases (equation 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.v = nn.Linear(width, 1, bias=False)

    def forward(self, keys: Tensor, d: Tensor) -> Tensor:
        """Keys ``W1 e`` [B, S, D] and decoder states d [B, M, D] -> scores [B, M, S]."""
        hidden = torch.tanh(keys[:, None] + self.w2(d)[:, :, None])  # [B, M, S, D]
        scores: Tensor = self.v(hidden)[..., 0]
        return scores


class Recurrent(Solver):
    """What the paper's three networks share: an LSTM that reads, another of the same width that answers, and a score.

    Args:
        width: D, of both.
        fed: numbers that the answering LSTM gets beside the coordinates of the last point.
    """

    decoder: nn.Module

    def __init__(self, width: int, fed: int = 0) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width} must be at least 1")
        self.encoder = nn.LSTM(3, width, batch_first=True)
        self.decoder = nn.LSTM(3 + fed, width, batch_first=True)
        self.score = AdditiveScore(width)

    def read(self, points: Tensor) -> Memory:
        x = with_begin(points)
        e, (h, c) = self.encoder(x)
        return Memory(x, e, self.score.w1(e), (h[0], c[0]))

    def start(self, memory: Memory) -> State:
        return memory.last

    def answer(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """The answering LSTM over inputs [B, M, F]: its outputs d [B, M, D] and last state."""
        h, c = state
        d, (h, c) = self.decoder(inputs, (h[None].contiguous(), c[None].contiguous()))
        return d, (h[0], c[0])

    def logits(self, memory: Memory, d: Tensor) -> Tensor:
        """From decoder states [B, M, D] to logits [B, M, n + 1]."""
        raise NotImplementedError

    def step(self, memory: Memory, state: State, previous: Tensor) -> tuple[Tensor, State]:
        d, state = self.answer(chosen(memory, previous[:, None]), state)
        return self.logits(memory, d)[:, 0], state

    def forward(self, points: Tensor, targets: Tensor) -> Tensor:
        # nothing is fed back but the last point, so that all steps of a known answer are one call of the LSTM
        memory = self.read(points)
        d, _ = self.answer(chosen(memory, shifted(targets)), self.start(memory))
        return self.logits(memory, d)


class PointerNet(Recurrent):
    """Ptr-Net: the attention scores are the logits, so the output dictionary is the input (section 2.3)."""

    def logits(self, memory: Memory, d: Tensor) -> Tensor:
        return self.score(memory.keys, d)


class FixedSoftmax(Recurrent):
    """Sequence to sequence: the symbols are the classes of a softmax whose size is fixed before training (section 2.1).

    Args:
        width: D.
        largest: points that the output dictionary has a class for.
    """

    def __init__(self, width: int, largest: int) -> None:
        super().__init__(width)
        del self.score
        self.head = nn.Linear(width, largest + 1)

    def read(self, points: Tensor) -> Memory:
        x = with_begin(points)
        e, (h, c) = self.encoder(x)
        return Memory(x, e, e, (h[0], c[0]))

    def logits(self, memory: Memory, d: Tensor) -> Tensor:
        return fitted(self.head(d), memory.x.shape[1])


class BlendingAttention(Recurrent):
    """The same with attention as a blend: ``d' = sum_j a_j e_j`` joins d, for the softmax and for the next step (section 2.2)."""

    def __init__(self, width: int, largest: int) -> None:
        super().__init__(width, fed=2 * width)
        self.decoder = nn.LSTMCell(3 + 2 * width, width)  # one step at a time: the blend is fed back
        self.head = nn.Linear(2 * width, largest + 1)

    def start(self, memory: Memory) -> State:
        h, c = memory.last
        return h, c, torch.zeros_like(h)

    def step(self, memory: Memory, state: State, previous: Tensor) -> tuple[Tensor, State]:
        d, c, blend = state
        inputs = torch.cat([chosen(memory, previous[:, None])[:, 0], d, blend], dim=-1)  # [B, 3 + 2 D]
        d, c = self.decoder(inputs, (d, c))
        a = self.score(memory.keys, d[:, None]).softmax(-1)  # [B, 1, n + 1]: a pointer network would stop here
        blend = (a @ memory.e)[:, 0]
        logits = self.head(torch.cat([d, blend], dim=-1))
        return fitted(logits, memory.x.shape[1]), (d, c, blend)

    def forward(self, points: Tensor, targets: Tensor) -> Tensor:
        return Solver.forward(self, points, targets)


def fitted(logits: Tensor, symbols: int) -> Tensor:
    """Class logits [..., L] for an input of n + 1 ``symbols``: classes without a point are cut, points without a class get -inf."""
    return F.pad(logits, (0, max(0, symbols - logits.shape[-1])), value=-torch.inf)[..., :symbols]


# --------------------------------------------------------------------------------------------------------- today's form


class SetPointer(Solver):
    """A Transformer that points: no positions on the inputs, so they are a set, and no recurrence.

    The query knows the mean of all points, the first point of the answer and its last two. One attention of several heads looks
    around ("glimpse"), one head points, with scores clipped to ``clip * tanh(u)`` (Bello et al. 2016, arXiv:1611.09940; Kool
    et al. 2019, arXiv:1803.08475). Since the query forgets everything else, answers in which that matters need a mask or
    another decoder.

    Args:
        width: D.
        layers: of the encoder.
        heads: of encoder and glimpse.
        clip: C.
    """

    def __init__(self, width: int, layers: int = 2, heads: int = 4, clip: float = 10.0) -> None:
        super().__init__()
        self.clip, self.heads = clip, heads
        self.embedding = nn.Linear(3, width)
        self.blocks = nn.Sequential(
            *(
                Block(
                    SoftmaxAttention(width, heads, causal=False),
                    MLP(width, 2 * width),
                    nn.RMSNorm(width),
                    nn.RMSNorm(width),
                )
                for _ in range(layers)
            ),
            nn.RMSNorm(width),
        )
        self.context = nn.Linear(4 * width, width)
        self.glimpse_kv = nn.Linear(width, 2 * width, bias=False)
        self.glimpse_out = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        initialise(self.blocks)

    def read(self, points: Tensor) -> Memory:
        x = with_begin(points)
        e = self.blocks(self.embedding(x))
        return Memory(x, e, self.key(e))

    def start(self, memory: Memory) -> State:
        begin = torch.zeros(len(memory.x), dtype=torch.long, device=memory.x.device)
        return begin, begin  # first symbol of the answer, last but one

    def step(self, memory: Memory, state: State, previous: Tensor) -> tuple[Tensor, State]:
        first, before = state
        first = torch.where(first == 0, previous, first)
        return self.point(memory, torch.stack([first, before, previous], -1)[:, None])[:, 0], (first, previous)

    def forward(self, points: Tensor, targets: Tensor) -> Tensor:
        previous = shifted(targets)  # [B, M]
        first = torch.cat([previous[:, :1], targets[:, :1].expand(-1, targets.shape[1] - 1)], dim=1)
        before = F.pad(previous[:, :-1], (1, 0))
        return self.point(self.read(points), torch.stack([first, before, previous], dim=-1))

    def point(self, memory: Memory, known: Tensor) -> Tensor:
        """Logits [B, M, n + 1] when the answer's first symbol, last but one and last are known [B, M, 3]."""
        batch, steps, _ = known.shape
        seen = take(memory.e, known.flatten(1)).view(batch, steps, -1)  # [B, M, 3 D]
        mean = memory.e.mean(1, keepdim=True).expand(-1, steps, -1)
        q = self.context(torch.cat([mean, seen], dim=-1))  # [B, M, D]
        k, v = self.glimpse_kv(memory.e).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # [B, H, ., D / H]
        q = self.glimpse_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        u = q @ memory.keys.mT * q.shape[-1] ** -0.5  # [B, M, n + 1]
        return self.clip * torch.tanh(u)
