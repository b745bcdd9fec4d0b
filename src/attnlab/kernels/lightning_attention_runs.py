"""The experiments of the chapter ``kernels/lightning-attention``: language models that differ in one thing, and their price.

Every model has the parameters of the first, TNL: what the others lack or add is made up for in the hidden size of their channel
mixers. All have norms without gains, so that only the mixers, the positions and the channel mixers differ.

``python -m attnlab.kernels.lightning_attention_runs --record records/lightning-attention.json --commit SHA`` repeats the
comparison with six layers on a GPU, with every model of ``arms``, and times training steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attnlab import claims, data, lab
from attnlab.kernels import records
from attnlab.kernels.lightning_attention import SRMSNorm, decay_table, tnl
from attnlab.mixers.decays import Schedule
from attnlab.models.language import MLP, SGLU, Decoder, SoftmaxAttention
from attnlab.models.losses import next_token_loss
from attnlab.models.sweep import count_parameters, match_parameters
from attnlab.models.training import History, TrainConfig, evaluating, fit, held_out, seeded, tensors

if TYPE_CHECKING:
    import pandas as pd

VOCAB = len(data.char_vocab)
SEEDS = (0, 1, 2)
OURS, ALIBI, SOFTMAX, UNDECAYED, UNGATED = (
    "TNL",
    "Transformer + ALiBi",
    "Transformer",
    "TNL, no decay",
    "TNL, no gate",
)
JUDGED = (OURS, ALIBI, SOFTMAX, UNDECAYED, UNGATED)
SCHEDULES = ("TNL, eq. 10 from h = 1", "TNL, eq. 10 from h = 0")
ROTARY = "Transformer + rotary"

#: the trained claims: the control by its name in the claim, and the model that it is
CONTROLS = {
    "better-than-transformer": ("transformer", SOFTMAX),
    "beyond-locality": ("alibi", ALIBI),
    "decay": ("undecayed", UNDECAYED),
    "gate": ("ungated", UNGATED),
}


# ---------------------------------------------------------------------------------------------------------- the models


@dataclass(frozen=True)
class Setting:
    """Sizes of one comparison, the same for all its models.

    Attributes:
        width, heads, layers: D, H and L.
        context: T, tokens a sequence.
        batch: B, sequences an update.
        steps: updates.
        lr: learning rate, the same for all.
        held_out: sequences of validation text, spread evenly over all of it.
        precision: see :class:`~attnlab.models.run.TrainConfig`.
    """

    width: int = 64
    heads: int = 4
    layers: int = 2
    context: int = 128
    batch: int = 8
    steps: int = 120
    lr: float = 6e-3
    held_out: int = 64
    precision: Literal["float32", "bfloat16"] = "float32"


def arms(s: Setting) -> dict[str, Callable[[int], Decoder]]:
    """The models that are compared, by name; each builds itself for a hidden size of its channel mixers."""
    table = decay_table(s.layers, s.heads)
    none, flat = torch.zeros_like(table), decay_table(s.layers, s.heads, by_layer=False)
    learned: dict[str, Any] = {"positions": "learned", "max_length": s.context}

    def linear(log_decay: Tensor, **options: Any) -> Callable[[int], Decoder]:
        return lambda hidden: tnl(VOCAB, s.width, log_decay, hidden=hidden, **options)

    def of(schedule: Schedule) -> Tensor:
        return decay_table(s.layers, s.heads, schedule)

    return {
        OURS: linear(table),
        ALIBI: partial(_transformer, s, slopes=-table),
        SOFTMAX: partial(_transformer, s, **learned),
        UNDECAYED: linear(none, lrpe="none", **learned),
        UNGATED: linear(table, gate=False),
        "TNL, layers alike": linear(flat),
        "TNL, no LRPE": linear(table, lrpe="none"),
        SCHEDULES[0]: linear(of("paper")),
        SCHEDULES[1]: linear(of("fla")),
        "Transformer + ALiBi, SGLU": partial(_transformer, s, slopes=-table, mlp=SGLU),
        ROTARY: partial(_transformer, s, rotary=True),
        "Transformer + ALiBi, rotary first": partial(_transformer, s, slopes=-table, rotary="first"),
        "Transformer + ALiBi, rotary": partial(_transformer, s, slopes=-table, rotary=True),
    }


def _transformer(
    s: Setting, hidden: int, *, slopes: Tensor | None = None, rotary: bool | str = False, mlp: Any = MLP, **options: Any
) -> Decoder:
    """Softmax attention in the same shell; ``slopes`` [L, H]."""

    def mixer(layer: int) -> nn.Module:
        return SoftmaxAttention(
            s.width,
            s.heads,
            slopes=None if slopes is None else slopes[layer],
            rotary=rotary is True or (rotary == "first" and layer == 0),
        )

    options.setdefault("positions", None)
    return Decoder(VOCAB, s.width, s.layers, mixer, make_mlp=lambda _: mlp(s.width, hidden), norm=SRMSNorm, **options)


def build(name: str, s: Setting) -> Decoder:
    """A new model of the comparison, with the parameters of TNL.

    Raises:
        ValueError: a name that :func:`arms` does not know.
    """
    if name not in (makers := arms(s)):
        raise ValueError(f"name: {name!r} is no model of this comparison; there are {', '.join(makers)}")
    return makers[name](hidden_size(name, s))


@cache
def hidden_size(name: str, s: Setting) -> int:
    """F of a model's channel mixer: 2 D for TNL, and for the others what makes parameters equal within 1 %."""
    makers = arms(s)
    if name == OURS:
        return 2 * s.width
    target = count_parameters(seeded(partial(makers[OURS], 2 * s.width), 0))
    return match_parameters(makers[name], target, tolerance=0.01)


# ------------------------------------------------------------------------------------------------------ the comparison


def train(name: str, s: Setting, seed: int, *, evaluate: bool = True) -> tuple[Decoder, History]:
    """A trained model and its history, whose last evaluation has the validation ``loss`` in nats a character."""
    model = seeded(partial(build, name, s), seed).to(lab.device())
    config = TrainConfig(s.steps, s.lr, warmup=s.steps // 10, seed=seed, precision=s.precision)
    ids = _characters("train")

    def batches(rng: np.random.Generator) -> NDArray[np.int64]:
        return data.windows(rng, ids, s.batch, s.context)

    measure = held_out(_validation(s), loss=next_token_loss) if evaluate else None
    return model, fit(model, batches, next_token_loss, config, evaluate=measure, progress=False)


def compare(s: Setting, names: Iterable[str] = JUDGED, seeds: Sequence[int] = SEEDS) -> pd.DataFrame:
    """Train models of the comparison: one row a run, ``model, seed, parameters, loss, seconds``."""
    import pandas as pd

    with lab.one_thread():  # so small matrices gain little from a second
        return pd.DataFrame([run(name, s, seed) for name in lab.progress(list(names), "models") for seed in seeds])


def run(name: str, s: Setting, seed: int) -> dict[str, Any]:
    """One row of :func:`compare`."""
    model, history = train(name, s, seed)
    return {
        "model": name,
        "seed": seed,
        "parameters": count_parameters(model),
        "loss": history.final["loss"],
        "seconds": history.seconds,
    }


def measured(frame: pd.DataFrame, name: str) -> tuple[float, tuple[float, float]]:
    """Mean validation loss of a model over its seeds, and their range."""
    losses = frame.loc[frame.model == name, "loss"]
    return float(losses.mean()), (float(losses.min()), float(losses.max()))


def verdict(frame: pd.DataFrame, claim: str) -> dict[str, Any]:
    """Arguments of ``claims.check`` for a trained claim of :data:`CONTROLS`, from the rows of :func:`compare`."""
    control, name = CONTROLS[claim]
    value, interval = measured(frame, OURS)
    shown = frame[frame.model.isin((OURS, name))]
    return {
        "value": value,
        "interval": interval,
        "controls": {control: measured(frame, name)},
        "seeds": sorted({int(seed) for seed in shown.seed}),
        "seconds": float(shown.seconds.sum()),
    }


@cache
def _characters(split: Literal["train", "validation"]) -> NDArray[np.int64]:
    return data.char_vocab.encode(data.text(split=split))


def _validation(s: Setting) -> list[NDArray[np.int64]]:
    """Held-out pieces in batches of one size, from the start to the end of the validation text."""
    pieces = data.blocks(_characters("validation"), s.context)
    chosen = pieces[np.linspace(0, len(pieces) - 1, s.held_out).astype(int)]
    return np.split(chosen, max(1, s.held_out // 64))


# ----------------------------------------------------------------------------------------------------------- the speed


def speed(s: Setting, lengths: Sequence[int], *, tokens: int, rounds: int = 5, training: bool = False) -> pd.DataFrame:
    """Tokens a second of whole models over lengths, with as many tokens in every batch.

    The Transformer has rotary positions: learned ones end, and ALiBi leaves torch's fastest kernel. Every round times
    everything once, so that a slow minute of the machine falls on both models alike.

    Args:
        tokens: B T of every batch.
        training: whole updates by the training loop instead of forward passes.

    Returns:
        one row a model, length and round: ``model, length, round, tokens/s``.

    Raises:
        ValueError: a length that does not divide the tokens.
    """
    import pandas as pd

    if wrong := [n for n in lengths if n < 1 or tokens % n]:
        raise ValueError(f"lengths: {wrong} do not divide tokens={tokens}, and every length must have the same work")
    models = {name: seeded(partial(build, name, s), 0).to(lab.device()) for name in (OURS, ROTARY)}
    timed = partial(_update_seconds, precision=s.precision) if training else _forward_seconds
    rows: list[dict[str, Any]] = []
    with lab.one_thread():
        for number in range(-1, rounds):  # the first warms up: kernels are compiled for each shape
            for length in lengths:
                batch = data.windows(np.random.default_rng(0), _characters("train"), tokens // length, length)
                for name, model in models.items():
                    rate = tokens / timed(model, batch)
                    rows.append({"model": name, "length": length, "round": number, "tokens/s": rate})
    frame = pd.DataFrame(rows)
    return frame[frame["round"] >= 0].reset_index(drop=True)


def _update_seconds(model: nn.Module, batch: NDArray[np.int64], *, precision: Any, updates: int = 3) -> float:
    """Seconds of one update, by the clock of the training loop, which waits for the GPU before it reads it."""
    config = TrainConfig(updates, lr=1e-6, precision=precision)
    return fit(model, lambda _: batch, next_token_loss, config, progress=False).seconds / updates


def _forward_seconds(model: nn.Module, batch: NDArray[np.int64], *, enough: float = 0.25) -> float:
    """Seconds of one forward pass: the fastest of as many as fit into ``enough``, at least one.

    On a CPU they are the thread's own, since other programs slow a clock down.
    """
    moved, seconds = tensors(batch, model), list[float]()
    clock = time.thread_time if moved.device.type == "cpu" else time.perf_counter
    with evaluating(model):
        while sum(seconds) < enough:
            began = clock()
            next_token_loss(model, moved).item()
            seconds.append(clock() - began)
    return min(seconds)


def kept_speed(frame: pd.DataFrame, name: str) -> tuple[float, tuple[float, float]]:
    """Speed at the longest length over that at the shortest, of a frame of :func:`speed`: median and range of the rounds."""
    table = frame[frame.model == name].pivot(index="round", columns="length", values="tokens/s")
    ratio = table[table.columns.max()] / table[table.columns.min()]
    return float(ratio.median()), (float(ratio.min()), float(ratio.max()))


def speed_verdict(frame: pd.DataFrame) -> dict[str, Any]:
    """Arguments of ``claims.check`` for ``constant-speed``."""
    value, interval = kept_speed(frame, OURS)
    return {"value": value, "interval": interval, "controls": {"transformer": kept_speed(frame, ROTARY)}}


# ----------------------------------------------------------------------------------------------------------- the price


def recalled(pairs: int, width: int, seed: int) -> dict[str, float]:
    """Shares of random pairs that come back when every key asks for its value: out of one state, and by softmax.

    Keys are random unit vectors [pairs, width], values normal. The state is ``sum k v^T``, without decay. Softmax sees the same
    keys at the norm ``sqrt(width)`` that normalised features have, with its usual scale, which multiplies cosines by
    ``sqrt(width)``. An answer counts if its own value has the largest product with it among all values.
    """
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(pairs, width, generator=generator, dtype=torch.float64) for _ in range(2))
    keys = nn.functional.normalize(keys, dim=-1)
    answers = {
        "state": keys @ (keys.T @ values),
        "softmax": (width**0.5 * keys @ keys.T).softmax(-1) @ values,
    }  # each [pairs, width]
    right = torch.arange(pairs)
    return {name: float(((o @ values.T).argmax(-1) == right).double().mean()) for name, o in answers.items()}


def saturation(width: int, pairs: Sequence[int], seeds: Sequence[int] = SEEDS) -> pd.DataFrame:
    """:func:`recalled` over numbers of pairs: one row a number, reader and seed, ``pairs, reader, seed, recalled``."""
    import pandas as pd

    return pd.DataFrame(
        {"pairs": n, "reader": reader, "seed": seed, "recalled": share}
        for n in pairs
        for seed in seeds
        for reader, share in recalled(n, width, seed).items()
    )


def saturation_verdict(frame: pd.DataFrame, pairs: int) -> dict[str, Any]:
    """Arguments of ``claims.check`` for ``state-saturates``: mean and range at one number of pairs."""
    at = frame[frame.pairs == pairs].groupby("reader").recalled
    found = {str(name): (float(x.mean()), (float(x.min()), float(x.max()))) for name, x in at}
    value, interval = found["state"]
    return {"value": value, "interval": interval, "controls": {"softmax": found["softmax"]}}


# ---------------------------------------------------------------------------------------------------------- the record

LARGE = Setting(width=256, layers=6, context=512, batch=64, steps=300, lr=2e-3, held_out=256, precision="bfloat16")
LENGTHS = tuple(2**n for n in range(10, 17))  # 1k to 64k tokens
SOURCES = tuple(
    f"{name}.py"
    for name in (
        "kernels/lightning_attention",
        "kernels/lightning_attention_runs",
        "kernels/decay_function",
        "kernels/decay_launch",
        "kernels/decay_sweep",
        "kernels/linear_decay",
        "models/language",
        "models/training",
    )
)


def make(path: Path, s: Setting, lengths: Sequence[int], *, commit: str, seconds: float, command: str) -> None:
    """Time and train, and write the record anew after each model, so that an interruption costs one model.

    Args:
        seconds: models that no claim asks for begin only before so many have passed.
    """
    import pandas as pd

    began = time.perf_counter()
    timed = speed(s, lengths, tokens=max(lengths), training=True)
    rows = speed_rows(timed)
    rows.append(_claim("constant-speed", **speed_verdict(timed), seconds=time.perf_counter() - began))
    print(f"speed: {time.perf_counter() - began:.0f} s", flush=True)
    frames: list[pd.DataFrame] = []
    for name in (*JUDGED, *(name for name in arms(s) if name not in JUDGED)):
        if name not in JUDGED and time.perf_counter() - began > seconds:
            break
        frames.append(compare(s, [name]))
        rows += training_rows(frames[-1], s)
        if name == JUDGED[-1]:
            rows += [_claim(claim, **verdict(pd.concat(frames), claim)) for claim in CONTROLS]
        records.write(path, rows, sources=SOURCES, command=command, commit=commit)
        mean, (low, high) = measured(frames[-1], name)
        print(f"{name}: {mean:.3f} [{low:.3f}, {high:.3f}], {time.perf_counter() - began:.0f} s so far", flush=True)


def speed_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of the record from those of :func:`speed`."""
    return [
        {"case": "speed", "operator": "training step", "shape": {"T": length}}
        | {"model": name, "round": number, "tokens/s": rate}
        for name, length, number, rate in frame[["model", "length", "round", "tokens/s"]].itertuples(index=False)
    ]


def training_rows(frame: pd.DataFrame, s: Setting) -> list[dict[str, Any]]:
    """Rows of the record from those of :func:`compare`."""
    setting = {"width": s.width, "layers": s.layers, "context": s.context, "batch": s.batch, "steps": s.steps}
    return [
        {"case": "text", "operator": "training"} | {str(key): x for key, x in row.items()} | setting
        for row in frame.to_dict("records")
    ]


def recorded(record: records.Record) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The frames of :func:`compare` and :func:`speed` as a record has them."""
    frame = record.frame()
    timed = frame[frame.case == "speed"].rename(columns={"T": "length"})
    text = frame[frame.case == "text"].dropna(axis=1, how="all")
    return text, timed[["model", "length", "round", "tokens/s"]].astype({"length": int, "round": int})


def _claim(name: str, **found: Any) -> dict[str, Any]:
    return dict(claims.measure(f"lightning-attention/{name}", **found, origin="record"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m attnlab.kernels.lightning_attention_runs", description="Train and time on a GPU."
    )
    parser.add_argument("--record", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--commit", required=True, help="of the code that runs")
    parser.add_argument("--seconds", type=float, default=110, help="begin no model beyond the judged ones after these")
    options = parser.parse_args(arguments)
    if lab.device().type != "cuda":
        print(
            "error: this takes a minute or two on a GPU and hours without; the chapter runs a small version",
            file=sys.stderr,
        )
        return 2
    command = f"{parser.prog} --record records/{options.record.name} --commit {options.commit}"
    make(options.record, LARGE, LENGTHS, commit=options.commit, seconds=options.seconds, command=command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
