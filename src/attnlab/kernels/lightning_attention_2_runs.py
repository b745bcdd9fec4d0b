"""The clock of the chapter ``kernels/lightning-attention-2``: forms timed on a CPU, and the claims that a GPU record decides.

``python -m attnlab.kernels.lightning_attention_2_runs --of linear-kernels-h200 --record records/lightning-attention-2.json``
judges the GPU claims by the record of ``attnlab.kernels.bench``. It computes nothing anew: machine, date and versions of its
rows are those of that record.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import claims, lab
from attnlab.kernels import records
from attnlab.kernels.lightning_attention_2 import cost
from attnlab.mixers import chunked, parallel, recurrent

if TYPE_CHECKING:
    import pandas as pd

Form = Callable[[Tensor, Tensor, Tensor], Tensor]

ENOUGH_S = 0.2  # a call that was repeated for so long, or that takes so long, is not repeated again
REPEATS = 8


# ------------------------------------------------------------------------------------------------------- on a CPU


def forms(log_decay: Tensor, chunk_size: int = 64) -> dict[str, Form]:
    """The forms by name, each from q, k, v [B, T, H, D] to outputs [B, T, H, D].

    All but two compute the same function: ``"cumulative sum"`` knows no decay, ``"softmax"`` is torch's fused causal attention.
    """
    return {
        "recurrent": lambda q, k, v: recurrent(q, k, v, log_decay)[0],
        "cumulative sum": _cumulative_sum,
        "tiled": lambda q, k, v: chunked(q, k, v, log_decay, chunk_size=chunk_size)[0],
        "masked product": lambda q, k, v: _one_by_one(lambda q, k, v: parallel(q, k, v, log_decay)[0], q, k, v),
        "softmax": _softmax,
    }


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fused causal attention; torch wants [B, H, T, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _cumulative_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention as its formula is read: all T states [K, V], then all reads. Without decay."""
    states = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(1)
    return torch.einsum("bthk,bthkv->bthv", q * q.shape[-1] ** -0.5, states)


def _one_by_one(form: Form, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence of the batch after the other: all their [T, T] matrices at once would not fit into memory."""
    return torch.cat([form(q[n : n + 1], k[n : n + 1], v[n : n + 1]) for n in range(len(q))])


def sequences(
    length: int, *, tokens: int, heads: int = 2, width: int = 64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v [tokens / length, length, heads, width] in float32: the same numbers for every length.

    Raises:
        ValueError: a length that does not divide the tokens.
    """
    if length < 1 or tokens % length:
        raise ValueError(f"length={length} must divide tokens={tokens}, so that every length has the same work")
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(tokens // length, length, heads, width, generator=generator) for _ in range(3)
    )  # [B, T, H, D]
    return q, k, v


@torch.inference_mode()
def seconds(form: Form, inputs: Sequence[Tensor]) -> float:
    """The fastest of up to eight runs: whatever else the machine does can only slow one down."""
    began, best = time.perf_counter(), math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        form(*inputs)
        now = time.perf_counter()
        best = min(best, now - start)
        if now - began > ENOUGH_S:
            break
    return best


def compare_forms(log_decay: Tensor, length: int, *, width: int = 64) -> pd.DataFrame:
    """What every form costs by counting and by the clock, on one sequence and one thread: one row a form."""
    import pandas as pd

    inputs = sequences(length, tokens=length, heads=len(log_decay), width=width)
    rows = {}
    with lab.one_thread():
        for name, form in forms(log_decay).items():
            one = cost(name, length, width)
            took = seconds(form, inputs)
            rows[name] = {
                "operations a token": one.flops // length,
                "steps in a row": one.steps,
                "numbers kept": one.kept,
                "ms": 1e3 * took,
                "GFLOP/s": len(log_decay) * one.flops / took / 1e9,
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def time_chunks(log_decay: Tensor, sizes: Sequence[int], *, length: int = 8192, rounds: int = 3) -> pd.DataFrame:
    """Milliseconds of the tiled form by chunk size, one sequence, one thread: one row a size and round, ``chunk, round, ms``."""
    import pandas as pd

    inputs = sequences(length, tokens=length, heads=len(log_decay))
    with lab.one_thread():
        rows = [
            {"chunk": size, "round": number, "ms": 1e3 * seconds(forms(log_decay, size)["tiled"], inputs)}
            for number in range(rounds)
            for size in sizes
        ]
    return pd.DataFrame(rows)


def time_lengths(
    log_decay: Tensor,
    lengths: Mapping[str, Sequence[int]],
    *,
    tokens: int = 16_384,
    rounds: int = 5,
    width: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """Time forms over lengths at a constant number of tokens, on one thread.

    Every round times everything once, so that a slow minute of the machine falls on all forms alike.

    Args:
        log_decay: [H]; gives the number of heads too.
        lengths: for each form of :func:`forms`, the lengths to time.

    Returns:
        One row a form, length and round: ``form, length, round, seconds, tokens/s``.
    """
    import pandas as pd

    every = sorted({n for some in lengths.values() for n in some})
    by_name = {name: forms(log_decay)[name] for name in lengths}
    rows = []
    with lab.one_thread():
        for number in lab.progress(range(-1, rounds), "rounds"):  # the first only warms up, with the shortest sequences
            for length in every if number >= 0 else every[:1]:
                inputs = sequences(length, tokens=tokens, heads=len(log_decay), width=width, seed=seed)
                for name, form in by_name.items():
                    if length in lengths[name]:
                        took = seconds(form, inputs)
                        row = {"form": name, "length": length, "round": number, "seconds": took}
                        rows.append({**row, "tokens/s": tokens / took})
    frame = pd.DataFrame(rows)
    return frame[frame["round"] >= 0].reset_index(drop=True)


def slopes(frame: pd.DataFrame, form: str, shortest: int = 0) -> list[float]:
    """Slope of log(tokens/s) against log(length) from ``shortest`` on, one a round; 0 is constant speed, -1 quadratic work.

    Raises:
        ValueError: fewer than two lengths to fit.
    """
    import numpy as np

    chosen = frame[(frame.form == form) & (frame.length >= shortest)]
    if chosen.length.nunique() < 2:
        raise ValueError(f"form={form!r}: fewer than two lengths from {shortest} on; a slope needs two")
    return [
        float(np.polyfit(np.log(one.length.to_numpy()), np.log(one["tokens/s"].to_numpy()), 1)[0])
        for _, one in chosen.groupby("round")
    ]


def ratio(frame: pd.DataFrame, form: str, other: str, length: int) -> list[float]:
    """How many times faster ``form`` is than ``other`` at one length, one number a round."""
    at = frame[frame.length == length].pivot(index="round", columns="form", values="seconds")
    return [float(x) for x in at[other] / at[form]]


def middle(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The median of all rounds, and their range as the interval."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5)), (min(values), max(values))


def crossover(lengths: Sequence[int], ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The length from which on ``ours`` seconds are fewer than ``theirs``, by a power law between two measured lengths.

    Returns:
        None if ``ours`` are fewer at every length, or not at the longest.
    """
    gap = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]  # negative where ours is faster
    slower = [i for i, g in enumerate(gap) if g >= 0]
    if not slower or slower[-1] == len(gap) - 1:
        return None
    last = slower[-1]
    share = gap[last] / (gap[last] - gap[last + 1])
    return math.exp(math.log(lengths[last]) * (1 - share) + math.log(lengths[last + 1]) * share)


def overtakes(lengths: Sequence[int], ours: Sequence[float], theirs: Sequence[float]) -> str:
    """:func:`crossover` in words, also where there is none."""
    found = crossover(lengths, ours, theirs)
    if found is not None:
        return f"from about {found:,.0f} tokens on"
    if ours[-1] < theirs[-1]:
        return f"at every measured length, from {lengths[0]:,} tokens on"
    return f"at no measured length, up to {lengths[-1]:,} tokens"


# ------------------------------------------------------------------------------------------------------- on a GPU

PASSES = ("forward", "forward+backward")
KINDS = {"attnlab": "ours", "fla": "linear", "sdpa": "softmax", "flex": "softmax", "torch": "control"}
"""What an implementation of the benchmark is, by how its name begins."""


def kind(impl: str) -> str:
    """``ours``, ``linear``, ``softmax`` or ``control``: what an implementation of the benchmark is, and its colour.

    Raises:
        ValueError: an implementation that :data:`KINDS` does not know.
    """
    for start, name in KINDS.items():
        if impl.lower().startswith(start):
            return name
    raise ValueError(f"impl={impl!r} begins with none of {', '.join(KINDS)}; say in KINDS what it is")


def law(frame: pd.DataFrame, *, tokens: int = 65_536, heads: int = 16, width: int = 128) -> pd.DataFrame:
    """The timed rows of a kernel record that show constant speed, by pass, kind, implementation and length.

    Args:
        frame: ``record.frame()``.
        tokens, heads, width: B T, H, and K = V of the rows wanted.

    Raises:
        ValueError: no such rows.
    """
    chosen = frame[
        (frame.operator == "linear_decay")
        & (frame.case == "lightning decay")
        & (frame["B"] * frame["T"] == tokens)
        & (frame["H"] == heads)
        & (frame["K"] == width)
        & (frame["V"] == width)
        & frame.ms.notna()
    ]
    if chosen.empty:
        raise ValueError(
            f"frame: no timed rows of linear_decay with {tokens} tokens, {heads} heads and K = V = {width}"
        )
    order = list(dict.fromkeys(KINDS.values()))
    rank = chosen.assign(kind=chosen.impl.map(kind)).assign(order=lambda rows: rows.kind.map(order.index))
    return rank.sort_values(["pass", "order", "impl", "T"]).drop(columns="order").reset_index(drop=True)


def fastest(rows: pd.DataFrame, what: str, way: str) -> pd.Series:
    """Milliseconds of the fastest implementation of a kind by length T, for the pass ``way``."""
    found: pd.Series = _calls(rows, what, way).ms
    return found


def _calls(rows: pd.DataFrame, what: str, way: str) -> pd.DataFrame:
    """Of the fastest implementation by length T: the median of its calls ``ms``; ``ms20`` and ``ms80`` cut off a fifth at each end."""
    chosen = rows[(rows.kind == what) & (rows["pass"] == way)]
    return chosen.loc[chosen.groupby("T").ms.idxmin()].set_index("T")[["ms20", "ms", "ms80"]]


def largest_errors(rows: pd.DataFrame) -> pd.DataFrame:
    """The largest relative error of every implementation that has one, by pass; softmax has none."""
    found: pd.DataFrame = rows[rows.error.notna()].pivot_table(
        index="impl", columns="pass", values="error", aggfunc="max"
    )
    return found


def judge(record: records.Record) -> list[claims.Row]:
    """The rows of the GPU claims, with the machine, date and versions of the record that decides them.

    The interval of a ratio says how far calls wander: from the fast end of one side over the slow end of the other to the reverse.
    """
    rows = law(record.frame())
    forward, training = (_calls(rows, "ours", way) for way in PASSES)
    softmax = _calls(rows, "softmax", PASSES[0])
    gains = [_gain(_calls(rows, "linear", way), ours) for way, ours in zip(PASSES, (forward, training), strict=True)]
    found = {
        "constant-speed-gpu": (_growth(forward), {"training": _growth(training), "softmax": _growth(softmax)}),
        "faster-than-fla": (gains[0], {"training": gains[1]}),
    }
    return [
        claims.measure(f"lightning-attention-2/{name}", value, interval=interval, controls=controls, record=record)
        for name, ((value, interval), controls) in found.items()
    ]


def _ratio(one: Any, other: Any) -> tuple[Any, Any, Any]:
    """How many times as long ``one`` takes as ``other``, at least and at most; of two lengths numbers, of all by length."""
    return one.ms / other.ms, one.ms20 / other.ms80, one.ms80 / other.ms20


def _growth(calls: pd.DataFrame) -> tuple[float, tuple[float, float]]:
    """Time at 65,536 tokens a sequence over time at 1,024, with interval."""
    value, low, high = map(float, _ratio(calls.loc[65_536], calls.loc[1_024]))
    return value, (low, high)


def _gain(theirs: pd.DataFrame, ours: pd.DataFrame) -> tuple[float, tuple[float, float]]:
    """The least speed-up over the lengths from 1,024 to 16,384 tokens, with interval."""
    value, low, high = (float(ratio.loc[1_024:16_384].min()) for ratio in _ratio(theirs, ours))
    return value, (low, high)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the judged claims of a kernel record as a record of their own."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=str(__doc__).splitlines()[0])
    parser.add_argument("--of", default="linear-kernels-h200", help="name of the kernel record")
    parser.add_argument("--record", type=Path, required=True, help="file to write")
    chosen = parser.parse_args(arguments)
    record = records.load(chosen.of)
    if record is None:
        parser.error(
            f"--of: there is no records/{chosen.of}.json; make it with python -m attnlab.kernels.bench on a GPU"
        )
    rows = judge(record)
    command = f"{parser.prog} --of {chosen.of} --record records/{chosen.record.name}"
    lab.write_json(
        chosen.record,
        {
            "schema": records.SCHEMA,
            "command": command,
            "commit": record.commit,
            "date": record.date,
            "machine": record.machine,
            "versions": record.versions,
            "rows": rows,
        },
    )
    for row in rows:
        print(f"{row['claim']}: {row['verdict']} ({row['value']:.3g})")


if __name__ == "__main__":
    main()
