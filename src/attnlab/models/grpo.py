r"""Group-relative policy optimisation (GRPO) for any module from tokens to logits.

For every prompt a group of ``G`` responses is sampled and rewarded. A response's advantage is its reward relative to its group, so no
value network is needed, and the clipped objective of PPO does the rest:

.. math:: J = \frac1N \sum_i \frac1R \sum_t \min\big(\rho_{it} A_{it},\ \mathrm{clip}(\rho_{it}, 1 - \epsilon, 1 + \epsilon) A_{it}\big),
          \qquad \rho_{it} = \frac{\pi(o_{it})}{\pi_{old}(o_{it})}

without a penalty on the distance from the first policy (Shao et al. 2024, arXiv:2402.03300). ``A_it`` is the advantage of response
``i``, times a weight of its token ``t`` where somebody gives weights: used by the chapters ``circuits/thinking-sparks`` and
``circuits/preplan-anchor``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from attnlab.lab import progress
from attnlab.models.training import Diverged

if TYPE_CHECKING:
    import pandas as pd

STREAM = 0x6772_706F  # sets prompts and samples apart from those that fit() draws under the same seed
BETAS = (0.9, 0.95)
LARGEST_NORM = 1.0  # of the gradient

Ask = Callable[[np.random.Generator, int], Any]
Reward = Callable[[Any, Tensor], Tensor]
Weigh = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class GRPOConfig:
    """How :func:`grpo` trains; equal configurations and models make equal runs on a CPU with as many threads.

    Attributes:
        iterations: batches of prompts, each answered by the policy of that moment.
        prompts: B, prompts a batch.
        group: G, responses a prompt, at least 2.
        updates: gradient steps a batch.
        lr: of AdamW, constant, without weight decay.
        clip: how far the ratio may leave 1 before a token stops to count.
        temperature: of the samples, and of the policy whose ratio is formed.
        seed: of prompts and samples.
    """

    iterations: int = 80
    prompts: int = 32
    group: int = 8
    updates: int = 2
    lr: float = 3e-4
    clip: float = 0.2
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"iterations": 1, "prompts": 1, "group": 2, "updates": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: at least {least} is wanted, not {getattr(self, name)}")
        for name in ("lr", "clip", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: a positive number is wanted, not {getattr(self, name)}")


def rollout(
    model: nn.Module, prompts: Tensor, length: int, temperature: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Sample ``length`` tokens after each prompt [B, P]: responses [B, R] and their log probabilities [B, R], without gradients.

    The probabilities are those of the distribution that was sampled. Temperature 0 takes the likeliest token; its log
    probabilities are those at temperature 1.

    Raises:
        ValueError: prompts that are not [B, P], a length below 1, a negative temperature.
    """
    if prompts.ndim != 2 or not prompts.numel():
        raise ValueError(f"prompts: tokens [B, P] are wanted, not shape {tuple(prompts.shape)}")
    if length < 1:
        raise ValueError(f"length: at least one token is wanted, not {length}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: 0 (greedy) or more is wanted, not {temperature}")
    tokens, chosen = prompts, []
    with torch.no_grad():
        for _ in range(length):
            log_probs = (model(tokens)[:, -1].float() / (temperature or 1.0)).log_softmax(-1)  # [B, V]
            if temperature:
                token = torch.multinomial(log_probs.exp(), 1, generator=generator)
            else:
                token = log_probs.argmax(-1, keepdim=True)
            chosen.append(log_probs.gather(1, token))
            tokens = torch.cat([tokens, token], dim=1)
    return tokens[:, prompts.shape[1] :], torch.cat(chosen, dim=1)


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """Rewards [B, G] relative to their group: minus its mean, over its standard deviation plus ``eps``; [B, G].

    A group of equal rewards says nothing: 0, exactly.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards: one row a group, [B, G], are wanted, not shape {tuple(rewards.shape)}")
    centred = rewards - rewards.mean(1, keepdim=True)
    scaled = centred / (rewards.std(1, keepdim=True, correction=0) + eps)
    return scaled.masked_fill(_equal(rewards)[:, None], 0.0)


def token_log_probs(model: nn.Module, prompts: Tensor, responses: Tensor, temperature: float = 1.0) -> Tensor:
    """Log probabilities [N, R] that the model gives to the tokens of responses [N, R] after prompts [N, P]."""
    if len(prompts) != len(responses):
        raise ValueError(f"responses: one a prompt is wanted, not {len(responses)} for {len(prompts)} prompts")
    tokens = torch.cat([prompts, responses], dim=1)
    logits = model(tokens[:, :-1])[:, prompts.shape[1] - 1 :]  # [N, R, V]: the logits before each token of the response
    return (logits.float() / temperature).log_softmax(-1).gather(2, responses[..., None])[..., 0]


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor | None = None, clip: float = 0.2
) -> Tensor:
    """Minus the clipped objective, a scalar: mean over the tokens of a response, then over the responses.

    Args:
        log_probs: [N, R], with gradients.
        old_log_probs: [N, R], of the policy that sampled.
        advantages: [N].
        weights: [N, R], of the tokens; they multiply advantages that are not negative, and no gradient flows through them.
        clip: how far the ratio may leave 1.

    Raises:
        ValueError: shapes that do not fit.
    """
    if old_log_probs.shape != log_probs.shape or (weights is not None and weights.shape != log_probs.shape):
        shapes = [tuple(x.shape) for x in (log_probs, old_log_probs, weights) if x is not None]
        raise ValueError(f"log_probs, old_log_probs and weights must have one shape [N, R], not {shapes}")
    if advantages.shape != log_probs.shape[:1]:
        raise ValueError(f"advantages: one a response, [{len(log_probs)}], not shape {tuple(advantages.shape)}")
    credit = advantages.detach()[:, None].expand_as(log_probs)
    if weights is not None:
        credit = torch.where(credit >= 0, credit * weights.detach(), credit)
    ratio = (log_probs - old_log_probs.detach()).exp()
    return -torch.minimum(ratio * credit, ratio.clamp(1 - clip, 1 + clip) * credit).mean(1).mean()


def grpo(
    model: nn.Module,
    ask: Ask,
    reward: Reward,
    length: int,
    config: GRPOConfig,
    weigh: Weigh | None = None,
    on_iteration: Callable[[int, nn.Module, float], None] | None = None,
) -> pd.DataFrame:
    """Train ``model`` in place, where it lies, and leave it in evaluation mode; dropout stays off, or no ratio would begin at 1.

    Args:
        model: tokens [B, T] to logits [B, T, V].
        ask: gets a generator and B, returns a batch with ``.prompts`` [B, P], an array or a tensor.
        reward: gets that batch and responses [B * G, R], those to a prompt side by side, and returns rewards [B * G].
        length: R, tokens a response.
        config: rates, sizes, seed.
        weigh: gets the model, tokens [N, P + R], old log probabilities [N, R] and P, and returns weights [N, R] of the tokens;
            see :func:`policy_loss`.
        on_iteration: is told the number of iterations done (from 1), the model and the mean reward before its update.

    Returns:
        one row an iteration: ``iteration``, mean ``reward`` and the share of groups whose rewards are all ``equal``.

    Raises:
        ValueError: rewards of another number than the responses.
        Diverged: a reward, loss or gradient that is not finite.
    """
    import pandas as pd

    model.eval()
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=BETAS, weight_decay=0.0)
    rows = []
    for iteration in progress(range(1, config.iterations + 1), "GRPO"):
        rng = np.random.default_rng([STREAM, config.seed, iteration])
        generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
        batch = ask(rng, config.prompts)
        prompts = torch.as_tensor(batch.prompts, device=device).repeat_interleave(config.group, 0)  # [N, P], N = B G
        responses, old = rollout(model, prompts, length, config.temperature, generator)
        rewards = torch.as_tensor(reward(batch, responses), device=device).to(old.dtype)
        if rewards.shape != responses.shape[:1]:
            raise ValueError(f"reward: one a response, [{len(responses)}], not shape {tuple(rewards.shape)}")
        groups = rewards.view(-1, config.group)
        advantages = group_advantages(groups).flatten()
        weights = None
        if weigh is not None:
            with torch.no_grad():
                weights = weigh(model, torch.cat([prompts, responses], 1), old, prompts.shape[1])
        for _ in range(config.updates):
            now = token_log_probs(model, prompts, responses, config.temperature)
            _step(policy_loss(now, old, advantages, weights, config.clip), trained, optimizer, iteration)
        mean = float(rewards.mean())
        rows.append({"iteration": iteration, "reward": mean, "equal": float(_equal(groups).float().mean())})
        if on_iteration is not None:
            on_iteration(iteration, model, mean)
    return pd.DataFrame(rows)


def _equal(rewards: Tensor) -> Tensor:
    """Which groups [B, G] hold one reward G times, [B]."""
    return rewards.amax(1) == rewards.amin(1)


def _step(loss: Tensor, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer, iteration: int) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
    if not (loss.isfinite() and norm.isfinite()):
        raise Diverged(
            f"iteration {iteration}: the loss is {loss.item():g}, the gradient's norm {norm.item():g}; lower lr"
        )
    optimizer.step()
