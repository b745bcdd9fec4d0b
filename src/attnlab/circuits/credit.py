"""Which tokens of a response get more of the reward: weights of the advantages in GRPO from WAAD and FAI.

All series and weights are ``[..., R]``, one number a response token. Source: Li et al. 2025, section 5, equations 13 to 18; the
paper gives neither ``alpha`` nor the two thresholds: one half and the medians over the response stand for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.circuits import rhythm

RULES = ("uniform", "random", "entropy", "local", "global", "coupled")


@dataclass(frozen=True)
class Credit:
    """The numbers of the credit rules.

    Attributes:
        amplify: weight of a chosen token, the paper's gamma.
        share: of the response's tokens that are chosen, the paper's q.
        alpha: of an anchor's extra credit, what goes back to the token that prepared it.
        back: how many tokens before an anchor that token is looked for, the paper's k.
        window: of WAAD.
        horizon: of FAI.
    """

    amplify: float = 1.5
    share: float = 0.4
    alpha: float = 0.5
    back: int = 2
    window: int = rhythm.WINDOW
    horizon: tuple[int, int | None] = rhythm.HORIZON

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must lie in (0, 1]")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie in [0, 1]")
        if self.amplify < 1:
            raise ValueError(f"amplify={self.amplify} must be at least 1: it amplifies")
        if self.back < 1:
            raise ValueError(f"back={self.back} must be at least 1 token")
        rhythm.check_window(self.window)


def preplan_score(waad: Tensor) -> Tensor:
    """How much WAAD changes to the next token, equation 13; the last token has no next and gets 0."""
    return torch.cat([(waad[..., :-1] - waad[..., 1:]).abs(), torch.zeros_like(waad[..., :1])], -1)


def top_share(scores: Tensor, share: float) -> Tensor:
    """The ``round(share * R)`` highest scores of each response (at least one), bool; ties go to the earlier token, NaN never."""
    filled = scores.nan_to_num(nan=-torch.inf)
    count = max(1, round(share * scores.shape[-1]))
    rank = filled.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (rank < count) & ~scores.isnan()


def introductions(waad: Tensor, anchors: Tensor, back: int) -> tuple[Tensor, Tensor]:
    """Locally dominated anchors and the tokens that introduce them, equation 17: two bool tensors ``[..., R]``.

    An anchor is dominated if it looks no farther back than the median token and one of the ``back`` tokens before it has at
    least the median preplan score; the one with the highest score (the earliest of equals) introduces it.
    """
    score = preplan_score(waad)
    length = waad.shape[-1]
    before = torch.full((*waad.shape, back), -torch.inf, dtype=waad.dtype, device=waad.device)
    for j in range(1, min(back, length - 1) + 1):  # the last axis runs from the farthest of these tokens to the nearest
        before[..., j:, back - j] = score[..., :-j]
    best, place = before.max(-1)
    dominated = anchors & (waad <= _median(waad)) & (best >= _median(score))
    target = torch.arange(length, device=waad.device) - back + place
    introduced = torch.zeros_like(waad).scatter_add_(-1, target.clamp(min=0), dominated.to(waad.dtype)) > 0
    return dominated, introduced


def weights(rule: str, waad: Tensor, fai: Tensor, settings: Credit, **extra: Any) -> Tensor:
    """The weights of one rule, ``[..., R]``, at least 1; not yet matched in their mean. They carry no gradient.

    Args:
        rule: one of :data:`RULES`. ``uniform`` is plain GRPO; ``random`` amplifies as many tokens as the others, anywhere.
        waad: of the response.
        fai: of the response, NaN where undefined.
        settings: the numbers.
        extra: ``entropy`` ``[..., R]`` for that rule, ``generator`` for ``random``.

    Raises:
        ValueError: an unknown rule, or series of different shapes.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; use one of {', '.join(RULES)}")
    if waad.shape != fai.shape:
        raise ValueError(f"waad {tuple(waad.shape)} and fai {tuple(fai.shape)} must have one shape")
    waad, fai = waad.detach(), fai.detach()
    if rule == "uniform":
        return torch.ones_like(waad)
    return 1 + (settings.amplify - 1) * extra_credit(rule, waad, fai, settings, **extra).to(waad)


def extra_credit(rule: str, waad: Tensor, fai: Tensor, settings: Credit, **extra: Any) -> Tensor:
    """Of every token, which share of the extra credit it gets: all or nothing, but for the coupled rule."""
    if rule == "random":
        noise = torch.rand(waad.shape, generator=extra["generator"])  # drawn on the CPU: the same on every device
        return top_share(noise, settings.share)
    if rule == "entropy":
        return top_share(extra["entropy"].detach(), settings.share)
    if rule == "local":
        return top_share(preplan_score(waad), settings.share)
    anchors = top_share(fai, settings.share)
    if rule == "global":
        return anchors
    dominated, introduced = introductions(
        waad, anchors, settings.back
    )  # equation 18: a token in two sets gets both terms
    return (anchors & ~dominated) + (1 - settings.alpha) * dominated + settings.alpha * introduced


def matched(gamma: Tensor) -> Tensor:
    """Weights with mean 1 in every response: the same amount of credit, only placed differently."""
    return gamma / gamma.mean(-1, keepdim=True)


def _median(x: Tensor) -> Tensor:
    return x.median(-1, keepdim=True).values


# ------------------------------------------------------------------------------------ maps of a model that is being trained


def middle_layers(n_layers: int, most: int = 5) -> list[int]:
    """At most five evenly spaced layers of the middle third, ends included, as the paper reads them during training."""
    low, high = n_layers // 3, min(2 * n_layers // 3, n_layers - 1)
    count = min(most, high - low + 1)
    return sorted({low + round(i * (high - low) / max(count - 1, 1)) for i in range(count)})


class MapReader:
    """Group means of a model's attention maps, added up layer by layer inside one forward pass without gradients.

    Never more than one layer's maps exist at a time. ``groups`` are chosen once, from a calibration batch, and then frozen.

    Args:
        blocks: the attention modules in the order of the layers; each returns ``(output, maps)``.
        layers: which of them are read.
    """

    def __init__(self, blocks: Sequence[nn.Module], layers: Sequence[int]) -> None:
        self.blocks, self.layers = list(blocks), list(layers)
        self.groups: rhythm.Groups | None = None

    @classmethod
    def of_words(cls, model: Any, layers: Sequence[int] | None = None) -> MapReader:
        """For a :class:`~attnlab.models.word_model.WordModel`; left out, the layers of :func:`middle_layers`."""
        blocks = [block.attn for block in model.network.transformer.h]
        return cls(blocks, middle_layers(len(blocks)) if layers is None else layers)

    def calibrate(self, model: nn.Module, tokens: Tensor, start: int, share: float = 0.3) -> Tensor:
        """Choose and freeze the groups from a batch ``[B, N]``; returns the mean spans ``[layers, heads]``."""
        spans: dict[int, Tensor] = {}

        def note(layer: int, maps: Tensor) -> None:
            spans[layer] = rhythm.head_spans(maps, start).mean(0)

        self._pass(model, tokens, note)
        table = torch.stack([spans[layer] for layer in self.layers])
        local, far = rhythm.group_heads(table, share)
        self.groups = tuple([(self.layers[row], head) for row, head in part] for part in (local, far))  # type: ignore[assignment]
        return table

    def read(self, model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean map of the local heads, of the global heads, both ``[B, N, N]``, and the logits ``[B, N, V]``."""
        if self.groups is None:
            raise ValueError("groups: none yet; call calibrate first")
        sums: list[Tensor | None] = [None, None]

        def add(layer: int, maps: Tensor) -> None:
            for i, group in enumerate(self.groups or ()):
                if heads := [head for at, head in group if at == layer]:
                    part = maps[:, heads].sum(1) / len(group)
                    before = sums[i]
                    sums[i] = part if before is None else before + part

        logits = self._pass(model, tokens, add)
        local, far = sums
        assert local is not None  # group_heads never returns an empty group
        assert far is not None
        return local, far, logits

    def _pass(self, model: nn.Module, tokens: Tensor, note: Any) -> Tensor:
        def hook_of(layer: int) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                maps = output[1] if isinstance(output, tuple) and len(output) > 1 else None
                rhythm.check_maps(maps, 0)
                note(layer, maps)

            return hook

        handles = [self.blocks[layer].register_forward_hook(hook_of(layer)) for layer in self.layers]
        try:
            with torch.no_grad():
                return model(tokens)
        finally:
            for handle in handles:
                handle.remove()


class Weigher:
    """What :func:`attnlab.models.grpo.grpo` calls for the weights of a batch: one credit rule on a model's own maps.

    Args:
        rule: one of :data:`RULES`.
        reader: with frozen groups.
        settings: the numbers.
        seed: of the random rule.
    """

    def __init__(self, rule: str, reader: MapReader, settings: Credit, seed: int = 0) -> None:
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is unknown; use one of {', '.join(RULES)}")
        self.rule, self.reader, self.settings = rule, reader, settings
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: nn.Module, tokens: Tensor, log_probs: Tensor, prompt_length: int) -> Tensor:
        """tokens [N, P + R], log_probs [N, R] -> weights [N, R] of mean 1 in every response"""
        shape = log_probs.shape
        if self.rule in ("uniform", "random"):  # no map is needed
            blank = torch.zeros_like(log_probs)
            return matched(weights(self.rule, blank, blank, self.settings, generator=self.generator))
        local, far, logits = self.reader.read(model, tokens)
        if shape[-1] < self.settings.horizon[0] + 2:
            return torch.ones_like(log_probs)  # too short for a horizon: plain GRPO
        waad = rhythm.waad(local, self.settings.window)[:, prompt_length:]
        anchors = rhythm.fai(far, prompt_length, self.settings.horizon)[:, prompt_length:]
        entropy = rhythm.token_entropy(logits)[:, prompt_length:]
        return matched(weights(self.rule, waad, anchors, self.settings, entropy=entropy))
