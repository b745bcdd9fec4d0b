"""Does circuit analysis interpretability scale? Multiple choice in Chinchilla (Lieberum, Rahtz, Kramár et al. 2023, arXiv:2307.09458).

A sheet of lettered questions, what each node writes to the letters, and which heads look at the right letter;
:mod:`~attnlab.circuits.subspaces` compresses those. Taught in the chapter ``circuits/chinchilla-mcq``. Definitions follow public
summaries of the paper; its body was not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab.circuits.attribution import through_final_norm
from attnlab.circuits.model import INPUT, Edit, HookedLM, Node
from attnlab.data.choices import Choices

#: a head counts as a correct-letter head from this score on; the paper's own threshold is not known to us
CORRECT_LETTER = 0.3


@dataclass(frozen=True)
class Sheet:
    """Prompts of one length: ``tokens`` [N, T], ``labels`` [N, k] and where they stand ``label_at`` [N, k], ``gold`` [N] the right line.

    Raises:
        ValueError: shapes that do not fit, fewer than two lines, a line or a position that does not exist, a repeated label.
    """

    tokens: Tensor
    labels: Tensor
    label_at: Tensor
    gold: Tensor

    def __post_init__(self) -> None:
        n, k = self.labels.shape if self.labels.ndim == 2 else (0, 0)
        if k < 2 or self.tokens.ndim != 2 or len(self.tokens) != n or self.label_at.shape != (n, k):
            raise ValueError(
                f"labels: tokens [N, T], labels and label_at [N, k] with k of at least 2 are wanted, not shapes "
                f"{tuple(self.tokens.shape)}, {tuple(self.labels.shape)}, {tuple(self.label_at.shape)}"
            )
        if self.gold.shape != (n,) or not bool(((self.gold >= 0) & (self.gold < k)).all()):
            raise ValueError(f"gold: [N] with lines from 0 to {k - 1} is wanted, not {self.gold.tolist()[:8]}")
        if not bool(((self.label_at >= 0) & (self.label_at < self.tokens.shape[1])).all()):
            raise ValueError(f"label_at: positions from 0 to {self.tokens.shape[1] - 1} are wanted")
        if any(len(set(row)) < k for row in self.labels.tolist()):
            raise ValueError(
                "labels: a prompt has the same label twice, so its answer is no letter; make them different"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def answers(self) -> Tensor:
        """The right label, ``[N]``."""
        return self.labels.gather(1, self.gold[:, None])[:, 0]

    @classmethod
    def of(cls, given: Choices) -> Sheet:
        """The sheet of prompts in words."""
        at = torch.as_tensor(given.label_at).expand(len(given.gold), -1)
        return cls(torch.as_tensor(given.tokens), torch.as_tensor(given.labels), at, torch.as_tensor(given.gold))


# ------------------------------------------------------------------------------------------------ logits of the letters


def label_logits(model: HookedLM, sheet: Sheet, edits: Sequence[Edit] = ()) -> Tensor:
    """Logits of the labels that each prompt shows, ``[N, k]``, with activations edited on the way."""
    with torch.no_grad():
        run = model.run(sheet.tokens, edits)
        normed = model.readout(run.resid[model.spec.n_layers])
        return model.logits(normed, sheet.labels.to(normed.device)).cpu()


def centred(logits: Tensor) -> Tensor:
    """Logits ``[..., k]`` minus their mean over the labels: what prefers one label to the others."""
    return logits - logits.mean(-1, keepdim=True)


def restricted_loss(logits: Tensor, gold: Tensor) -> Tensor:
    """Cross-entropy over the shown labels only, ``[N]`` in nats: the answer's probability once a label is certain to come."""
    return -logits.log_softmax(-1).gather(1, gold[:, None])[:, 0]


def is_right(logits: Tensor, gold: Tensor) -> np.ndarray:
    """1 where the right label has the largest logit among those shown, ``[N]``; chance is ``1 / k``."""
    return (logits.argmax(-1) == gold).double().numpy()


# ------------------------------------------------------------------------------------------------- who writes the letter


@dataclass(frozen=True)
class DirectEffects:
    """What every node writes to the centred logit of the right label: ``values`` [nodes, N] in logits.

    ``nodes`` names the rows: embedding, heads, MLPs, and last ``bias``, all constant terms together. The rows sum to the
    centred logit, ``total`` [N].
    """

    nodes: Sequence[str]
    values: np.ndarray
    total: np.ndarray

    def mean(self) -> dict[str, float]:
        """Mean over prompts, by node."""
        return dict(zip(self.nodes, self.values.mean(1).tolist(), strict=True))

    def share(self, nodes: Sequence[str]) -> float:
        """Share of the mean total that some nodes write together."""
        return float(self.values[[self.nodes.index(node) for node in nodes]].mean(1).sum() / self.total.mean())


def direct_effects(model: HookedLM, sheet: Sheet) -> DirectEffects:
    r"""The direct effect of every node, with the scale of the final norm held at its value in the full run.

    .. math:: DE_n = \langle w_n / \sigma \odot \gamma,\; u_{gold} - \tfrac{1}{k} \sum_i u_i \rangle

    for the write ``w_n`` [d_model] at END and the unembedding rows ``u_i`` of the labels.
    """
    spec = model.spec
    with torch.no_grad():
        run = model.run(sheet.tokens, capture=("z", "mlp_out"))
        final = run.resid[spec.n_layers][:, -1]  # [N, d_model]
        weight, bias = model._unembed
        labels, answers = sheet.labels.to(final.device), sheet.answers.to(final.device)
        wanted = weight[answers] - weight[labels].mean(1)  # [N, d_model]
        direction = through_final_norm(model, final, wanted)
        heads = torch.einsum("lbhe,lhed,bd->lhb", run.stack("z")[:, :, -1], model.W_O, direction)
        mlps = torch.einsum("lbd,bd->lb", run.stack("mlp_out")[:, :, -1], direction)
        start = (run.resid[0][:, -1] * direction).sum(-1)
        rest = (final * direction).sum(-1) - heads.sum((0, 1)) - mlps.sum(0) - start  # biases of W_O
        norm_bias = getattr(model.bridge.ln_final, "bias", None)
        constant = bias[answers] - bias[labels].mean(1)
        if norm_bias is not None:
            constant = constant + wanted @ norm_bias
        values = torch.cat([start[None], heads.flatten(0, 1), mlps, (rest + constant)[None]])
    names = [str(node) for node in (INPUT, *spec.heads, *(Node(layer) for layer in range(spec.n_layers)))]
    total = centred(label_logits(model, sheet)).gather(1, sheet.gold[:, None])[:, 0]
    return DirectEffects([*names, "bias"], values.double().cpu().numpy(), total.double().numpy())


# ---------------------------------------------------------------------------------------------------- where heads look


def label_attention(model: HookedLM, sheet: Sheet, at: Tensor | None = None, edits: Sequence[Edit] = ()) -> np.ndarray:
    """Attention of every head from END to each label, ``[L, H, N, k]``; or to the positions ``at`` [N, k]."""
    where = (sheet.label_at if at is None else at).to(model.device)
    with torch.no_grad():
        pattern = model.run(sheet.tokens, edits, capture=("pattern",)).stack("pattern")[:, :, :, -1]  # [L, N, H, T]
    index = where[None, :, None].expand(len(pattern), -1, pattern.shape[2], -1)
    return pattern.gather(-1, index).transpose(1, 2).double().cpu().numpy()


def gold_matrix(attention: np.ndarray, gold: Any) -> np.ndarray:
    """Mean attention by right line, ``[..., k, k]``: row ``g`` is where END looks when line ``g`` is right.

    Args:
        attention: ``[..., N, k]``.
        gold: ``[N]``; every line must be right at least once, or its row would be the mean of nothing.
    """
    lines, given = attention.shape[-1], np.asarray(gold)
    if missing := sorted(set(range(lines)) - set(given.tolist())):
        raise ValueError(f"gold: line {missing[0]} is never right, so its row has no prompts; balance the right lines")
    return np.stack([attention[..., given == line, :].mean(-2) for line in range(lines)], axis=-2)


def correct_letter_score(matrix: np.ndarray) -> np.ndarray:
    """Attention to the right label minus attention to each other one, ``[...]``: 1 if only the right one is looked at, 0 if all alike."""
    lines = matrix.shape[-1]
    diagonal = np.trace(matrix, axis1=-2, axis2=-1)
    return diagonal / lines - (matrix.sum((-2, -1)) - diagonal) / (lines * (lines - 1))


def category(matrix: np.ndarray, threshold: float = CORRECT_LETTER) -> str:
    """The kind of a head by its matrix ``[k, k]``. The kinds are the paper's (section 3.2), the thresholds ours.

    ``correct letter``: the score reaches ``threshold``. ``single letter``: one line's own cell does, and the other lines' do not
    reach half of it. ``uniform``: at least half of the attention goes to the labels, nearly evenly. Else ``other``.
    """
    own = np.diag(matrix)
    order = np.sort(own)[::-1]
    best = int(own.argmax())
    away = np.delete(matrix[:, best], best).mean()
    if own.min() >= threshold / 2 and correct_letter_score(matrix) >= threshold:
        return "correct letter"
    if own[best] - away >= threshold and order[1] <= order[0] / 2:
        return "single letter"
    if matrix.sum(1).mean() >= 0.5 and np.ptp(matrix) <= 0.1:
        return "uniform"
    return "other"


def heads_above(scores: np.ndarray, threshold: float = CORRECT_LETTER) -> list[str]:
    """Heads whose score ``[L, H]`` reaches the threshold, the strongest first."""
    found = [(layer, head) for layer, head in np.argwhere(scores >= threshold).tolist()]
    return [f"{layer}.{head}" for layer, head in sorted(found, key=lambda cell: -scores[cell])]
