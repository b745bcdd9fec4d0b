"""One small base model and three ways to go on: supervised fine-tuning, GRPO, and more of what it was trained on.

The task is :mod:`attnlab.data.chains`, sums with a chain of partial sums. Two regimes ask two questions of the same base:

- ``"sharpen"``: the base writes chains whose steps slip; post-training only has to make a used skill reliable.
- ``"switch"``: the base was then taught to answer at once four times in five, though it can write a chain; post-training has to
  change what the model does, not how well.

Every run keeps its weights at equal numbers of updates, so runs can be compared checkpoint by checkpoint. Used by the chapter
``circuits/thinking-sparks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from attnlab.data import chains
from attnlab.models.grpo import GRPOConfig, grpo, rollout, token_log_probs
from attnlab.models.training import TrainConfig, evaluating, fit
from attnlab.models.word_model import WordModel

Regime = Literal["sharpen", "switch"]
Method = Literal["SFT", "GRPO", "drift"]
REGIMES: tuple[Regime, ...] = ("sharpen", "switch")
METHODS: tuple[Method, ...] = ("SFT", "GRPO", "drift")
LENGTH = 6  # tokens of a response: s2 ; s3 ; s4 E
PHASE = 1000  # seeds of successive phases lie this far apart, so that none sees the batches of another

Batches = Callable[[np.random.Generator], "Lesson"]


@dataclass(frozen=True)
class Plan:
    """Sizes and rates of one seed's models; the defaults are those of the chapter and of its record.

    Attributes:
        n_layers, n_heads, d_model: of the model; its MLPs are twice as wide.
        batch: sequences an update, of all supervised training.
        learn_steps, learn_lr: of the base on right chains, at a constant rate.
        slip_steps, slip_lr: of the base afterwards, on chains with slips.
        slip: probability that a step of such a chain is a random digit.
        switch_steps, switch_lr: of the further training that makes the base of ``"switch"``.
        direct: share of immediate answers in it.
        updates: of every run after the base; GRPO makes two an iteration.
        every: updates between checkpoints.
        lr: of SFT and drift, constant.
        grpo_lr, prompts, group: of GRPO.
    """

    n_layers: int = 3
    n_heads: int = 8
    d_model: int = 64
    batch: int = 128
    learn_steps: int = 300
    learn_lr: float = 4e-3
    slip_steps: int = 150
    slip_lr: float = 2e-3
    slip: float = 0.25
    switch_steps: int = 150
    switch_lr: float = 1e-3
    direct: float = 0.8
    updates: int = 80
    every: int = 10
    lr: float = 5e-4
    grpo_lr: float = 3e-4
    prompts: int = 32
    group: int = 8

    def __post_init__(self) -> None:
        if self.updates < 1 or self.every < 1 or self.updates % self.every or self.every % 2:
            raise ValueError(
                f"updates={self.updates}, every={self.every}: an even number of updates between checkpoints that divides all "
                "updates is wanted, since GRPO makes two an iteration"
            )


class Lesson(NamedTuple):
    """What a supervised update learns from: ``prompts`` [N, P] and ``responses`` [N, R]."""

    prompts: NDArray[np.int64]
    responses: NDArray[np.int64]


class Base(NamedTuple):
    """A base model and the data that it was trained on last, on which ``drift`` goes on."""

    model: WordModel
    batches: Batches


class Checkpoint(NamedTuple):
    """A model after some updates; ``reward`` is what GRPO earned since the checkpoint before (NaN elsewhere)."""

    updates: int
    model: WordModel
    reward: float


def lesson(rng: np.random.Generator, n: int, slip: float = 0.0, direct: float = 0.0) -> Lesson:
    """``n`` problems of four operands with responses of six tokens.

    A share ``direct`` of them (rounded down) is answered at once, ``y E E E E E``; the others by a chain
    ``s2 ; s3 ; s4 E`` whose steps slip with probability ``slip``.

    Raises:
        ValueError: a share that is none.
    """
    if not 0.0 <= direct <= 1.0:
        raise ValueError(f"direct: a share from 0 to 1 is wanted, not {direct}")
    batch = chains.sums(rng, n, slip=slip)
    responses = batch.chains.copy()
    at_once = int(direct * n)
    responses[:at_once] = chains.STOP
    responses[:at_once, 0] = batch.answers[:at_once]
    return Lesson(batch.prompts, responses)


def response_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean negative log probability of the responses' tokens, in nats; prompts are not learned."""
    prompts, responses = batch
    return -token_log_probs(model, prompts, responses).mean()


def base_model(plan: Plan, seed: int) -> Base:
    """The base of ``"sharpen"``: it learns right chains from scratch (which takes fewer updates), then chains with slips."""
    model = WordModel(
        chains.WORDS,
        n_layers=plan.n_layers,
        n_heads=plan.n_heads,
        d_model=plan.d_model,
        d_mlp=2 * plan.d_model,
        context=8 + LENGTH,
        init_std=plan.d_model**-0.5,
        seed=seed,
    )

    def right(rng: np.random.Generator) -> Lesson:
        return lesson(rng, plan.batch)

    def batches(rng: np.random.Generator) -> Lesson:
        return lesson(rng, plan.batch, slip=plan.slip)

    warmup = min(20, plan.learn_steps - 1)
    learn = TrainConfig(plan.learn_steps, plan.learn_lr, warmup, schedule="constant", seed=seed)
    fit(model, right, response_loss, learn)
    fit(model, batches, response_loss, TrainConfig(plan.slip_steps, plan.slip_lr, seed=seed + PHASE))
    return Base(model, batches)


def reluctant(base: Base, plan: Plan, seed: int) -> Base:
    """The base of ``"switch"``: the same model, then taught to answer at once in a share ``plan.direct`` of all cases."""
    model = copied(base.model)

    def batches(rng: np.random.Generator) -> Lesson:
        return lesson(rng, plan.batch, direct=plan.direct)

    fit(model, batches, response_loss, TrainConfig(plan.switch_steps, plan.switch_lr, seed=seed + 2 * PHASE))
    return Base(model, batches)


def post_train(base: Base, method: Method, plan: Plan, seed: int) -> list[Checkpoint]:
    """Go on from a copy of the base and keep the model every ``plan.every`` updates; the base itself comes first.

    ``"SFT"`` learns right chains, ``"GRPO"`` is paid for the right last digit, ``"drift"`` sees more of the base's own data at the
    rate of SFT: what training changes that teaches nothing new.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; use one of {', '.join(METHODS)}")
    own = seed + 3 * PHASE
    kept = [Checkpoint(0, base.model, float("nan"))]
    model = copied(base.model)
    if method == "GRPO":
        earned: list[float] = []

        def after(iteration: int, model: nn.Module, reward: float) -> None:
            earned.append(reward)
            if 2 * iteration % plan.every == 0:
                kept.append(Checkpoint(2 * iteration, copied(model), float(np.mean(earned))))
                earned.clear()

        config = GRPOConfig(plan.updates // 2, plan.prompts, plan.group, updates=2, lr=plan.grpo_lr, seed=own)
        grpo(model, chains.sums, _reward, LENGTH, config, on_iteration=after)
        return kept

    def batches(rng: np.random.Generator) -> Lesson:
        return lesson(rng, plan.batch)

    def keep(model: nn.Module) -> dict[str, float]:
        kept.append(Checkpoint(kept[-1].updates + plan.every, copied(model), float("nan")))
        return {}

    config_of_fit = TrainConfig(plan.updates, plan.lr, schedule="constant", seed=own, evaluate_every=plan.every)
    fit(model, base.batches if method == "drift" else batches, response_loss, config_of_fit, evaluate=keep)
    return kept


def _reward(batch: chains.Sums, responses: Tensor) -> Tensor:
    return torch.as_tensor(chains.correct(batch, responses))


# ------------------------------------------------------------------------------------------------- what a model does


def chain_probability(model: nn.Module, problems: chains.Sums) -> float:
    """Chance that a sample at temperature 1 is the right chain, token by token: the mean over problems, exact."""
    with evaluating(model):
        log_probs = token_log_probs(model, torch.as_tensor(problems.prompts), torch.as_tensor(problems.chains))
    return float(log_probs.double().sum(1).exp().mean())


def chain_accuracy(model: nn.Module, problems: chains.Sums) -> float:
    """Share of problems for which greedy decoding writes the right chain; one forward, since every token must be the likeliest."""
    prompts, responses = (torch.as_tensor(x) for x in (problems.prompts, problems.chains))
    with evaluating(model):
        logits = model(torch.cat([prompts, responses], 1)[:, :-1])[:, prompts.shape[1] - 1 :]  # [N, R, V]
    return float((logits.argmax(-1) == responses).all(1).double().mean())


def divergence(model: nn.Module, base: nn.Module, problems: chains.Sums) -> float:
    """KL(model || base) in nats a token, over the tokens of right chains."""
    tokens = torch.as_tensor(np.concatenate([problems.prompts, problems.chains], 1))[:, :-1]
    start = problems.prompts.shape[1] - 1
    with torch.no_grad():
        ours, theirs = (net(tokens)[:, start:].double().log_softmax(-1) for net in (model, base))
    return float(F.kl_div(theirs, ours, log_target=True, reduction="none").sum(-1).mean())


def distance(model: nn.Module, base: nn.Module) -> float:
    """Euclidean distance of all weights."""
    pairs = zip(model.parameters(), base.parameters(), strict=True)
    return float(sum(((a.detach() - b.detach()).double() ** 2).sum() for a, b in pairs) ** 0.5)


def right_samples(model: nn.Module, problems: chains.Sums, n: int, seed: int = 0) -> NDArray[np.int64]:
    """How many of ``n`` samples at temperature 1 end in the right digit, for each problem, ``[N]``."""
    prompts = torch.as_tensor(problems.prompts).repeat_interleave(n, 0)
    responses, _ = rollout(model, prompts, LENGTH, 1.0, torch.Generator().manual_seed(seed))
    return chains.correct(problems, responses).reshape(-1, n).sum(1).astype(np.int64)


# ------------------------------------------------------------------------------------------------- heads turned up or off

Head = tuple[int, int]  # layer, head


def scaled(model: WordModel, heads: Iterable[Head], factor: float = 0.0, mean: Tensor | None = None) -> WordModel:
    """A copy in which what these heads write is multiplied by ``factor``; 0 takes them out.

    Args:
        model: stays as it is.
        heads: ``(layer, head)``.
        factor: 0 ablates, 1 changes nothing.
        mean: of :func:`mean_outputs`; the part of a write that is taken away is replaced by the same part of its mean.

    Raises:
        ValueError: a head that the model does not have.
    """
    copy = copied(model)
    width = copy.settings["d_model"] // copy.settings["n_heads"]
    with torch.no_grad():
        for layer, head in heads:
            if not (0 <= layer < copy.settings["n_layers"] and 0 <= head < copy.settings["n_heads"]):
                raise ValueError(f"heads holds {layer}.{head}, which the model does not have")
            rows = slice(head * width, (head + 1) * width)
            out = copy.network.transformer.h[layer].attn.c_proj  # z [.., d] @ weight [d, d] + bias
            if mean is not None:
                out.bias += (1 - factor) * mean[layer, rows] @ out.weight[rows]
            out.weight[rows] *= factor
    return copy


def mean_outputs(model: WordModel, problems: chains.Sums) -> Tensor:
    """Mean output of every head over problems and positions, before its output matrix, ``[L, d_model]``: head after head."""
    seen: list[Tensor] = []
    blocks = model.network.transformer.h
    hooks = [
        block.attn.c_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean((0, 1))))
        for block in blocks
    ]
    try:
        with evaluating(model):
            model(torch.as_tensor(np.concatenate([problems.prompts, problems.chains], 1))[:, :-1])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)


def like(heads: Sequence[Head], n_heads: int, n_sets: int, rng: np.random.Generator) -> list[list[Head]]:
    """Random sets with as many heads in each layer as ``heads``, none of which is in ``heads``.

    Layers that have fewer other heads than are wanted give all they have.
    """
    layers = sorted({layer for layer, _ in heads})
    sets: list[list[Head]] = []
    for _ in range(n_sets):
        chosen: list[Head] = []
        for layer in layers:
            own = {head for at, head in heads if at == layer}
            others = [head for head in range(n_heads) if head not in own]
            picks = rng.choice(len(others), size=min(len(own), len(others)), replace=False)
            chosen += [(layer, others[pick]) for pick in sorted(picks)]
        sets.append(chosen)
    return sets


def copied(model: nn.Module) -> WordModel:
    """The same weights in a model of their own, in evaluation mode."""
    if not isinstance(model, WordModel):
        raise ValueError(f"model: a WordModel is wanted, not a {type(model).__name__}")
    copy = WordModel(**model.settings)
    copy.load_state_dict(model.state_dict())
    return copy.eval()
