"""The one training loop: every chapter, on a laptop or a GPU, trains through :func:`fit`.

An update is a function of the configuration, the number of the step and the state before it: the batch and every mask
of dropout are drawn from generators made of (seed, step). Evaluating in between changes nothing, and a run that was
interrupted and resumed on a CPU, with as many threads, ends in the same bits as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from attnlab import lab
from attnlab.models import checkpoints
from attnlab.models.run import History, TrainConfig, learning_rate

__all__ = [
    "Diverged",
    "History",
    "TrainConfig",
    "decay_groups",
    "evaluating",
    "fit",
    "held_out",
    "learning_rate",
    "seeded",
    "step_generator",
    "tensors",
]

M = TypeVar("M", bound=nn.Module)
Batches = Callable[[np.random.Generator], Any]
Loss = Callable[[nn.Module, Any], Tensor]
Evaluate = Callable[[nn.Module], Mapping[str, float]]

STREAM = 0x7472_6169  # sets the training stream apart from default_rng(seed), from which held-out data tend to come
READ_EVERY = 20  # a GPU runs ahead of Python; asking it for every loss would make it wait for each question


class Diverged(ArithmeticError):
    """The loss or the norm of the gradient is no number any more."""


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    config: TrainConfig,
    *,
    evaluate: Evaluate | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> History:
    """Train ``model`` in place with AdamW, where it lies, and leave it in evaluation mode.

    Args:
        model: on the device to train on.
        batches: gets the generator of a step and returns its batch: arrays or tensors, one or a (named) tuple of them.
            The loop moves them to the model's device and gives floats the model's dtype; see :func:`tensors`.
        loss: gets the model and such a batch and returns a scalar tensor.
        config: rate, schedule, seed and the rest.
        evaluate: gets the model, in evaluation mode without gradients, and returns numbers by name; :func:`held_out`
            makes one. Runs every ``config.evaluate_every`` updates and after the last.
        checkpoint: file to save the run to, whole or not at all; its folder is made if there is none.
        resume: continue from ``checkpoint`` if that file exists; otherwise it is overwritten at the first save.
        progress: show a bar with loss and remaining time for runs over a second; the book's pages show none.

    Returns:
        the history of all updates, also those before a resumption.

    Raises:
        ValueError: nothing to train, a loss that is no scalar, bfloat16 or compilation without a GPU, or a checkpoint
            that is damaged or belongs to another run.
        Diverged: a loss or gradient that is not finite; the last checkpoint stays as it is.
    """
    device = _device_for(model, config)
    optimizer = torch.optim.AdamW(
        decay_groups(model, config.weight_decay), lr=config.lr, betas=config.betas, fused=device.type == "cuda"
    )
    history = History()
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and resume and path.exists():
        history = History(**checkpoints.load(path, model, optimizer, config))
    network = torch.compile(model) if config.compile else model
    read_every = READ_EVERY if device.type == "cuda" else 1
    unread: list[Tensor] = []
    began = time.perf_counter() - history.seconds

    with _private_randomness(), _bar(config.steps, len(history), progress) as bar:
        for step in range(len(history) + 1, config.steps + 1):
            unread.append(_update(model, network, batches, loss, optimizer, config, step))
            evaluating_now = evaluate is not None and _due(step, config.evaluate_every, config.steps)
            saving_now = path is not None and _due(step, config.checkpoint_every or config.evaluate_every, config.steps)
            if len(unread) == read_every or evaluating_now or saving_now or step == config.steps:
                _read(unread, history, config, path)
                bar.set_postfix_str(f"loss {history.loss[-1]:.3f}", refresh=False)
            if evaluate is not None and evaluating_now:
                with evaluating(model), _autocast(config, device):
                    history.evaluations.append({"step": step} | {k: float(v) for k, v in evaluate(model).items()})
            history.seconds = time.perf_counter() - began
            if path is not None and saving_now:
                checkpoints.save(path, model, optimizer, config, history)
            bar.update()
    model.eval()
    return history


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: what decays, and what does not.

    Matrices and convolution kernels decay. Vectors (biases, gains of norms) and embeddings do not: an embedding that no
    batch contains has no gradient to hold it against the decay. Nor does a parameter whose attribute ``no_weight_decay``
    is true, such as the rate of a gate. (``copy.deepcopy`` drops such attributes; build a model anew instead.)

    Raises:
        ValueError: nothing to train.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or id(parameter) in embeddings or getattr(parameter, "no_weight_decay", False)
            (kept if exempt else decayed).append(parameter)
    if not decayed and not kept:
        raise ValueError("model: it has no parameter that requires a gradient; unfreeze what is to be trained")
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def step_generator(seed: int, step: int) -> np.random.Generator:
    """The generator that :func:`fit` hands to ``batches`` at an update: same seed and step, same batch."""
    return np.random.default_rng([STREAM, seed, step])


def seeded(make: Callable[[], M], seed: int) -> M:
    """What ``make()`` returns when torch is seeded with ``seed``; torch's own stream is left as it was found."""
    with _private_randomness():
        torch.manual_seed(seed)
        return make()


def tensors(batch: Any, model: nn.Module) -> Any:
    """A batch where the model can take it: its device, and its dtype for floats. Tuples keep their type."""
    like = next(model.parameters())

    def moved(item: Any) -> Any:
        if isinstance(item, tuple):
            parts = [moved(part) for part in item]
            return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
        if isinstance(item, np.ndarray) and not item.flags.writeable:
            item = item.copy()  # a tensor cannot promise to leave shared memory alone
        tensor = torch.as_tensor(item)
        dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(like.device, dtype, non_blocking=True)

    return moved(batch)


def held_out(batches: Iterable[Any], **metrics: Loss) -> Evaluate:
    """An ``evaluate`` for :func:`fit`: the mean of every metric over the same batches, which should be of one size.

    ``held_out(validation, loss=next_token_loss)`` reports ``loss``. It can be called on a model outside of training too.
    """
    kept = list(batches)
    if not kept or not metrics:
        raise ValueError(
            f"held_out: {len(kept)} batches and {len(metrics)} metrics given; at least one of each is wanted"
        )

    def evaluate(model: nn.Module) -> dict[str, float]:
        with evaluating(model):
            moved = [tensors(batch, model) for batch in kept]
            return {
                name: torch.stack([metric(model, batch).double() for batch in moved]).mean().item()
                for name, metric in metrics.items()
            }

    return evaluate


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the mode is as before."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def _update(
    model: nn.Module,
    network: Callable[..., Any],
    batches: Batches,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    step: int,
) -> Tensor:
    """One update of the parameters. Returns loss and gradient norm [2], still on the device."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    batch = tensors(batches(step_generator(config.seed, step)), model)
    torch.manual_seed(int(np.random.SeedSequence([STREAM, config.seed, step]).generate_state(1, np.uint64)[0]))
    with _autocast(config, next(model.parameters()).device):
        value = loss(network, batch)  # type: ignore[arg-type]
    if value.ndim:
        raise ValueError(f"loss: a scalar is wanted, not a tensor of shape {list(value.shape)}; take its mean")
    value.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if config.clip is None else config.clip)
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack((value.detach().double(), norm.double()))


def _read(unread: list[Tensor], history: History, config: TrainConfig, path: Path | None) -> None:
    """Move the measured numbers into the history, up to the first one that is not finite."""
    for value, norm in torch.stack(unread).tolist():
        step = len(history) + 1
        rate = learning_rate(config, step)
        if not (math.isfinite(value) and math.isfinite(norm)):
            kept = f" {path} keeps the last checkpoint." if path is not None and path.exists() else ""
            raise Diverged(
                f"step {step}: the loss is {value} and the norm of the gradient {norm} at a learning rate of {rate:g}. "
                f"Lower lr, lengthen warmup or lower clip (now {config.clip}).{kept}"
            )
        history.step.append(step)
        history.loss.append(value)
        history.lr.append(rate)
        history.grad_norm.append(norm)
    unread.clear()


def _due(step: int, every: int | None, steps: int) -> bool:
    return step == steps or (every is not None and step % every == 0)


def _device_for(model: nn.Module, config: TrainConfig) -> torch.device:
    """The model's device, if it can do what the configuration asks for."""
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    if device.type != "cuda":
        remedy = f"needs a GPU, and the model lies on {device}; move it there with model.to('cuda'), or use"
        if config.precision != "float32":
            raise ValueError(f"precision: {config.precision!r} {remedy} 'float32'")
        if config.compile:
            raise ValueError(f"compile: True {remedy} False")
    elif config.precision == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"precision: {torch.cuda.get_device_name(device)} has no bfloat16; use precision='float32'")
    return device


def _autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


@contextmanager
def _private_randomness() -> Iterator[None]:
    """Whatever is drawn inside, torch's streams continue afterwards as if nothing had been."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def _bar(total: int, done: int, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(
        total=total, initial=done, desc="training", unit="step", delay=1, leave=False, disable=not show or lab.in_book()
    )
