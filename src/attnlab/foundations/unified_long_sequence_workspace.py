"""The mixers of :mod:`attnlab.mixers` in the template ``Y = M(X) phi(X)`` of the chapter ``foundations/unified-long-sequence``.

None of them says what its matrix is, and none has to: all are linear in the values, so column j of the matrix is what the mixer
returns if the value of token j is 1 and all others are 0. Linear attention and the recurrence of :func:`attnlab.mixers.attend`
itself are among the mixers of :mod:`attnlab.foundations.unified_long_sequence`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab import mixers
from attnlab.foundations.unified_long_sequence_template import Mixer, Mixing

Form = Literal["recurrent", "chunked"]


class Asked(NamedTuple):
    """What the tokens decide, all [B, T, 1, D]: queries, keys, and the log of what is kept of the past, at most 0."""

    q: Tensor
    k: Tensor
    log_decay: Tensor


class WorkspaceMixer(Mixer):
    """One head of a mixer of the workspace: its matrix token by token, from the definition; its output in chunks."""

    asks, cost, state = True, "T D²", "D²"
    own_matrices = False  # for each channel

    def __init__(self, width: int, length: int) -> None:
        super().__init__(width, length)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.gate = nn.Linear(width, width)

    def core(self, asked: Asked, v: Tensor, form: Form) -> Tensor:
        """The mixer on values v [B, T, 1, V], in the form asked for where it has several: [B, T, 1, V]."""
        raise NotImplementedError

    def asked(self, x: Tensor) -> Asked:
        """From tokens x [B, T, D]; the offset lets an untrained gate keep 95 percent."""
        return Asked(*(y[:, :, None] for y in (self.q(x), self.k(x), F.logsigmoid(self.gate(x) + 3))))

    def mix(self, x: Tensor) -> Mixing:
        batch, length, width = x.shape
        asked, ones = self.asked(x), torch.eye(length, dtype=x.dtype, device=x.device)
        if not self.own_matrices:  # one-hot values as T channels
            matrix = self.core(asked, ones[:, None].expand(batch, -1, -1, -1), "recurrent")[:, :, 0]
            return Mixing(matrix, self.v(x))
        asked = Asked(*(y.repeat_interleave(length, 0) for y in asked))  # one-hot values as T sequences
        probes = ones.repeat(batch, 1)[:, :, None, None].expand(-1, -1, 1, width)
        columns = self.core(asked, probes, "recurrent")[:, :, 0].unflatten(0, (batch, length))  # [B, S, T, D]
        return Mixing(columns.permute(0, 3, 2, 1), self.v(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.core(self.asked(x), self.v(x)[:, :, None], "chunked")[:, :, 0]


class RetentionMixer(WorkspaceMixer):
    """Retention: rotated queries and keys, and a decay that no token decides."""

    def core(self, asked: Asked, v: Tensor, form: Form) -> Tensor:
        return mixers.retention(asked.q, asked.k, v, form=form)[0]


class LightningMixer(WorkspaceMixer):
    """Lightning attention: the same without rotation, with a decay of its own schedule."""

    def core(self, asked: Asked, v: Tensor, form: Form) -> Tensor:
        log_decay = mixers.lightning_log_decay(1, 0, 2, schedule="alibi", dtype=v.dtype).to(v.device)
        return mixers.lightning_attention(asked.q, asked.k, v, log_decay, form=form)[0]


class GLAMixer(WorkspaceMixer):
    """Gated linear attention: a decay for each token and key channel."""

    def core(self, asked: Asked, v: Tensor, form: Form) -> Tensor:
        return mixers.gla(asked.q, asked.k, v, asked.log_decay, form=form)[0]


class HGRNMixer(WorkspaceMixer):
    """HGRN: a gate for each channel and no query, so every channel has a matrix of its own."""

    cost, state, own_matrices = "T D", "D", True

    def core(self, asked: Asked, v: Tensor, form: Form) -> Tensor:
        return mixers.hgrn(v[:, :, 0], asked.log_decay[:, :, 0], form=form)[0][:, :, None]


class HGRN2Mixer(WorkspaceMixer):
    """HGRN-2: gated linear attention whose key is what the gate lets go."""

    def core(self, asked: Asked, v: Tensor, form: Form) -> Tensor:
        return mixers.hgrn2(asked.q, v, asked.log_decay, form=form)[0]


class SSDMixer(WorkspaceMixer):
    """Mamba-2: the step of a token decides what is kept and how strongly is written; the skip path is on the diagonal."""

    def core(self, asked: Asked, v: Tensor, form: Form) -> Tensor:
        one = v.new_ones(1)
        step = -asked.log_decay.mean(-1)
        return mixers.ssd(v, step, one.log(), asked.k, asked.q, skip=one, form=form)[0]


class DeltaMixer(WorkspaceMixer):
    """The delta rule: a write replaces what its key held, so earlier tokens reach the output through all keys between."""

    def core(self, asked: Asked, v: Tensor, form: Form) -> Tensor:
        return mixers.delta_rule(asked.q, F.normalize(asked.k, dim=-1), v, _strength(asked), form=form)[0]


class GatedDeltaMixer(WorkspaceMixer):
    """The gated delta rule: the same on a state that decays."""

    def core(self, asked: Asked, v: Tensor, form: Form) -> Tensor:
        k, log_decay = F.normalize(asked.k, dim=-1), asked.log_decay.mean(-1)
        return mixers.gated_delta_rule(asked.q, k, v, log_decay, _strength(asked), form=form)[0]


class AarenMixer(WorkspaceMixer):
    """Aaren: softmax attention of one fixed query, here of ones, over every prefix."""

    cost, state = "T D", "D + 2"

    def core(self, asked: Asked, v: Tensor, form: Form) -> Tensor:
        return mixers.aaren(asked.k.sum(-1) * self.width**-0.5, v, form=form)[0]


class FlowMixer(WorkspaceMixer):
    """Flow attention over the whole sequence, which has one form only."""

    causal, state = False, "–"

    def core(self, asked: Asked, v: Tensor, form: Form) -> Tensor:
        return mixers.flow_attention(asked.q, asked.k, v)


class CausalFlowMixer(WorkspaceMixer):
    """Causal flow attention: five sums over the past."""

    state = "D² + 4 D + 1"

    def core(self, asked: Asked, v: Tensor, form: Form) -> Tensor:
        return mixers.causal_flow_attention(asked.q, asked.k, v, form=form)[0]


WORKSPACE: dict[str, type[Mixer]] = {
    "retention": RetentionMixer,
    "lightning attention": LightningMixer,
    "GLA": GLAMixer,
    "HGRN, a channel": HGRNMixer,
    "HGRN-2": HGRN2Mixer,
    "SSD (Mamba-2)": SSDMixer,
    "delta rule": DeltaMixer,
    "gated delta rule": GatedDeltaMixer,
    "Aaren": AarenMixer,
    "flow attention": FlowMixer,
    "causal flow attention": CausalFlowMixer,
}


def _strength(asked: Asked) -> Tensor:
    """Strength of a write [B, T, 1] in (0, 1)."""
    return asked.log_decay[..., 0].exp()
