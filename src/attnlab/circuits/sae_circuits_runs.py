"""What the chapter ``circuits/sae-circuits`` keeps: its small trained models, and its experiment on three tasks of a real model.

``python -m attnlab.circuits.sae_circuits_runs --train`` trains the models of :mod:`attnlab.circuits.repeats` (a CPU, about
two minutes a model) and writes ``records/sae-circuits-models.json`` beside them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnlab import lab
from attnlab.circuits import repeats
from attnlab.kernels import records

COMMAND = "python -m attnlab.circuits.sae_circuits_runs"


def train_models(folder: Path, seeds: Sequence[int], steps: int = 1500, **sizes: int) -> list[dict[str, Any]]:
    """Train the models of these seeds and write one file each; one row a model, with its hash and its losses in nats."""
    rows = []
    for seed in seeds:
        start = time.perf_counter()
        model, _ = repeats.train(seed, steps, **sizes)
        path = repeats.path_of(seed, folder)
        folder.mkdir(parents=True, exist_ok=True)
        model.save(path)
        losses = repeats.losses_by_position(model, np.random.default_rng(10_000 + seed))
        rows.append(
            {
                "case": "training",
                "operator": "repeats",
                "seed": seed,
                "file": path.name,
                "sha256": repeats.file_hash(path),
                "steps": steps,
                "loss in the first period": float(losses[: repeats.SHORTEST - 1].mean()),
                "loss after the longest period": float(losses[repeats.LONGEST :].mean()),
                "seconds": time.perf_counter() - start,
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--train", action="store_true", help="train the small models into --folder")
    parser.add_argument("--folder", type=Path, default=repeats.FOLDER.parent, help="the folder of the records")
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    options = parser.parse_args(arguments)
    if options.train:
        with lab.one_thread():
            rows = train_models(options.folder / "models", repeats.SEEDS)
        records.write(
            options.folder / "sae-circuits-models.json",
            rows,
            sources=["circuits/repeats.py", "models/word_model.py", "models/training.py"],
            command=f"{COMMAND} --train",
            commit=options.commit,
        )


if __name__ == "__main__":
    main()
