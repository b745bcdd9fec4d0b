"""What an attention costs as it grows longer, and the record that a GPU makes of the chapter ``kernels/flowformer``.

The command is ``python -m attnlab.kernels.flowformer --record records/flowformer.json``; ``--tiny`` tries it anywhere.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnlab import claims, lab
from attnlab.kernels import records
from attnlab.kernels.causal_flow import causal_flow
from attnlab.kernels.flowformer import ARMS, Attention
from attnlab.kernels.flowformer_runs import SEEDS, Distractors, Recall, Task, Text, train, verdict
from attnlab.models.sweep import best

if TYPE_CHECKING:
    import pandas as pd


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attnlab.kernels.causal_flow`, without the final state."""
    return causal_flow(q, k, v, return_state=False)[0]


#: what is timed: dtype, and an attention that is handed q, k and v of it
COSTS: dict[str, tuple[torch.dtype, Attention]] = {
    "softmax": (torch.bfloat16, ARMS["softmax"]),
    "elu+1 linear": (torch.float32, ARMS["elu+1 linear"]),
    "flow": (torch.float32, ARMS["flow"]),
    "flow, causal kernel": (torch.bfloat16, causal),
}


def cost(
    lengths: Iterable[int],
    impls: Iterable[str] = tuple(COSTS),
    *,
    heads: int = 8,
    width: int = 64,
    backward: bool = True,
    repeats: int = 5,
    device: torch.device | None = None,
) -> list[dict[str, Any]]:
    """Time and memory of one attention on one sequence: a row of the record for each implementation and length.

    On a CPU everything runs in float32. ``memory_mb`` is what a GPU allocated beyond the inputs; None on a CPU.
    """
    device = lab.device() if device is None else device
    rows = []
    for length in lengths:
        for impl in impls:
            dtype, attention = COSTS[impl]
            dtype = dtype if device.type == "cuda" else torch.float32
            generator = torch.Generator(device).manual_seed(0)
            shape = (1, length, heads, width)
            qkv = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3)]
            ms, memory = _timed(partial(_pass, attention, qkv, backward), device, repeats)
            rows.append(
                {
                    "case": "cost",
                    "operator": "attention",
                    "impl": impl,
                    "pass": "forward and backward" if backward else "forward",
                    "shape": {"B": 1, "T": length, "H": heads, "K": width, "V": width},
                    "dtype": str(dtype).removeprefix("torch."),
                    "ms": ms,
                    "memory_mb": memory,
                }
            )
    return rows


def _pass(attention: Attention, qkv: list[Tensor], backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            attention(*qkv)
        return
    leaves = [x.detach().requires_grad_() for x in qkv]
    o = attention(*leaves)
    torch.autograd.grad(o, leaves, torch.ones_like(o))


def _timed(call: Callable[[], None], device: torch.device, repeats: int) -> tuple[float, float | None]:
    """Median milliseconds of a call and, on a GPU, the megabytes it allocates at most."""
    gpu = device.type == "cuda"
    call()  # compiles and allocates
    before = torch.cuda.memory_allocated() if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    memory = (torch.cuda.max_memory_allocated() - before) / 1e6 if gpu else None
    return 1e3 * median(seconds), memory


#: the larger tasks with the learning rates that every arm may choose from
LARGE: dict[Task, tuple[float, ...]] = {
    # informative places grow as the root of the length: the plain average starts as far from chance as on the small task
    Distractors(width=64, steps=300, length=2048, informative=16, longer=(4096, 8192)): (5e-3, 1e-2, 2e-2),
    Recall(width=64, steps=400, pairs=16, keys=64): (3e-3, 1e-2, 2e-2),
    Text(): (1e-3, 3e-3),
}
TINY: dict[Task, tuple[float, ...]] = {
    Distractors(width=8, steps=2, batch=2, examples=4, length=12, longer=(24,)): (1e-2,),
    Recall(width=8, steps=2, batch=4, examples=8): (1e-3, 1e-2),
}
LENGTHS = tuple(2**n for n in range(10, 17))  # 1k to 64k tokens
SOURCES = tuple(
    f"kernels/{name}.py"
    for name in (
        "flowformer",
        "flowformer_runs",
        "flowformer_record",
        "flow_gates",
        "flow_gradients",
        "flow_sweep",
        "flow_walks",
    )
)
COMMAND = "python -m attnlab.kernels.flowformer"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Train and time on a GPU.")
    parser.add_argument("--record", type=Path, required=True, help="the JSON to write, such as records/flowformer.json")
    parser.add_argument("--commit", help="what the code is, where there is no repository to ask")
    parser.add_argument("--workers", type=int, help="processes that train at the same time; left out, one an arm")
    parser.add_argument(
        "--tiny", action="store_true", help="a few updates of tiny models, on any machine: does it run?"
    )
    options = parser.parse_args(arguments)
    if not options.tiny and lab.device().type != "cuda":
        print(
            "error: this takes minutes on a GPU and hours without one; --tiny tries the command, the chapter runs a small version",
            file=sys.stderr,
        )
        return 2
    tasks, lengths, workers = (TINY, (64, 128), 1) if options.tiny else (LARGE, LENGTHS, len(ARMS))
    command = f"{COMMAND} --record records/{options.record.name}{' --tiny' if options.tiny else ''}"
    make(options.record, tasks, lengths, workers=options.workers or workers, command=command, commit=options.commit)
    return 0


def make(
    path: Path,
    tasks: dict[Task, tuple[float, ...]],
    lengths: Sequence[int],
    *,
    workers: int,
    command: str = COMMAND,
    commit: str | None = None,
) -> None:
    """Time, then train, and write the record anew after each task, so that an interruption costs one task.

    Rows of training carry every learning rate; ``chosen`` marks those of the rate whose median loss over the seeds is lowest,
    from which the verdicts are taken.

    Args:
        path: of the record.
        tasks: with the learning rates to choose from.
        lengths: tokens, to time.
        workers: processes that train, each one arm at a time; 1 trains in this one.
        command: what the record says made it.
        commit: of the code; none: asked of git.
    """
    written = partial(records.write, path, sources=SOURCES, command=command, commit=commit or _commit())
    rows = cost(lengths)
    written(rows)
    with _pool(workers) as each:
        for task, lrs in tasks.items():
            start = time.perf_counter()
            frames = list(each(partial(_train, task, lrs), ARMS))
            chosen = [best(frame, "loss") for frame in frames]
            for frame, at_best in zip(frames, chosen, strict=True):
                rows += training_rows(task, frame.assign(chosen=frame.index.isin(at_best.index)))
            if task.name in ("recall", "distractors"):
                rows.append(_claim(task.name, chosen, time.perf_counter() - start))
            written(rows)
            print(f"{task.name}: {time.perf_counter() - start:.0f} s", flush=True)


@contextmanager
def _pool(workers: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A ``map`` over processes, or the built-in one for a single worker."""
    if workers == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        yield pool.map


def training_rows(task: Task, frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of the record from those of :func:`~attnlab.kernels.flowformer_runs.compare`; a run that diverged has null losses."""
    plain = frame.astype(object).where(frame.notna(), None)
    setting = {
        "case": task.name,
        "operator": "training",
        "steps": task.steps,
        "layers": task.layers,
        "width": task.width,
    }
    return [
        setting | {str(k): x for k, x in row.items()}
        for row in plain.rename(columns={"arm": "impl"}).to_dict("records")
    ]


def _train(task: Task, lrs: tuple[float, ...], arm: str) -> pd.DataFrame:
    return train(task, arm, lrs, SEEDS)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _claim(name: str, chosen: Sequence[pd.DataFrame], seconds: float) -> dict[str, Any]:
    import pandas as pd

    found = verdict(pd.concat(chosen), name)
    return dict(claims.measure(f"flowformer/{name}", **found, seconds=seconds, origin="record"))


def _commit() -> str:
    """The commit of this checkout, or "unknown" where there is none."""
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
