"""What the chapter ``circuits/preplan-anchor`` keeps: answers of SmolLM2, a small model, and the comparison of credit rules.

``python -m attnlab.circuits.preplan_anchor_runs --answers FILE`` generates the answers, ``--base FILE`` trains the small model,
``--record FILE`` trains it on under every credit rule and seed. Each takes minutes on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attnlab import claims, lab, records
from attnlab.circuits import chain_model
from attnlab.circuits.credit import RULES
from attnlab.data import word_problems
from attnlab.models.grpo import GRPOConfig

if TYPE_CHECKING:
    import pandas as pd

SEEDS = (0, 1, 2, 3, 4)
ITERATIONS = 25
TASK = chain_model.Task()
SOURCES = tuple(
    f"{name}.py"
    for name in ("circuits/rhythm", "circuits/credit", "circuits/chain_model", "data/chains", "models/grpo")
)

# ------------------------------------------------------------------------------------------------------- answers

SHORTEST, LONGEST, WANTED = 90, 150, 20


def generate(path: Path, command: str, wanted: int = WANTED) -> None:
    """Greedy answers of SmolLM2-135M-Instruct to the problems in their order; the first ``wanted`` of at least 90 tokens are kept."""
    from attnlab.models import smollm2

    loaded: tuple[Any, Any] = smollm2.load_model()
    model, tokenizer = loaded
    answers: list[dict[str, Any]] = []
    asked = 0
    for problem, result in word_problems.PROBLEMS:
        if len(answers) == wanted:
            break
        asked += 1
        prompt = tokenizer.apply_chat_template(
            word_problems.message(problem), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            full = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=LONGEST,
                pad_token_id=tokenizer.pad_token_id,
            )
        response = full[0, len(prompt) :].tolist()
        if len(response) >= SHORTEST:
            text = tokenizer.decode(response, skip_special_tokens=True)
            answers.append(
                {"problem": problem, "result": result, "text": text, "prompt": list(prompt), "response": response}
            )
        print(f"{asked}: {len(response)} tokens", flush=True)
    made = {
        "command": command,
        "model": smollm2.NAME,
        "sha256": smollm2.SOURCE.sha256,
        "date": lab.now(),
        "versions": lab.versions(),
        "asked": asked,
        "decoding": f"greedy, {SHORTEST} to {LONGEST} tokens, shorter answers passed over",
    }
    lab.write_json(path, {"made": made, "answers": answers})


# -------------------------------------------------------------------------------------------------- credit rules


def config(seed: int, iterations: int = ITERATIONS) -> GRPOConfig:
    """How every rule trains: 16 problems an iteration, 8 answers each."""
    return GRPOConfig(iterations=iterations, prompts=16, group=8, seed=seed)


def run_row(rule: str, seed: int, iterations: int = ITERATIONS) -> dict[str, Any]:
    """Train the base under one rule: the mean reward over training and the reward of every iteration, in percent."""
    base, _ = chain_model.load_base()
    start = time.perf_counter()
    with lab.one_thread():
        model, history = chain_model.train_with_credit(base, rule, seed, partial(config, iterations=iterations), TASK)
        after = chain_model.accuracy(model, TASK.held_out(256), temperature=1.0)
    return {
        "case": "credit",
        "impl": rule,
        "seed": seed,
        "score": 100 * float(history.reward.mean()),
        "after": 100 * after,
        "seconds": time.perf_counter() - start,
        "curve": [round(100 * reward, 3) for reward in history.reward],
    }


def paired(rows: Iterable[dict[str, Any]], rule: str, reference: str) -> tuple[float, tuple[float, float]]:
    """Mean difference of two rules' scores over seeds, in points, and two standard errors around it.

    Raises:
        ValueError: other seeds than the reference's, or fewer than two.
    """
    scores: dict[str, dict[int, float]] = {rule: {}, reference: {}}
    for row in rows:
        if row.get("impl") in scores:
            scores[row["impl"]][row["seed"]] = row["score"]
    mine, theirs = scores[rule], scores[reference]
    if len(mine) < 2 or mine.keys() != theirs.keys():
        raise ValueError(f"rows: {rule} has seeds {sorted(mine)}, {reference} {sorted(theirs)}; at least two, the same")
    gaps = np.array([mine[seed] - theirs[seed] for seed in sorted(mine)])
    mean, error = float(gaps.mean()), float(gaps.std(ddof=1) / np.sqrt(len(gaps)))
    return mean, (mean - 2 * error, mean + 2 * error)


def judged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ledger's row of the claim ``coupled-credit``."""
    value, interval = paired(rows, "coupled", "random")
    seeds = sorted({row["seed"] for row in rows if row.get("impl") == "coupled"})
    seconds = sum(row["seconds"] for row in rows if row.get("impl") in ("coupled", "random", "uniform"))
    return dict(
        claims.measure(
            "preplan-anchor/coupled-credit",
            value,
            interval=interval,
            controls={"uniform": paired(rows, "coupled", "uniform")},
            seeds=seeds,
            seconds=seconds,
            origin="record",
        )
    )


def credit_table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row a rule: mean reward over training and sampled accuracy after it, in percent, and the gain over random credit."""
    import pandas as pd

    runs = [row for row in rows if row.get("case") == "credit"]
    table = {}
    for rule in dict.fromkeys(row["impl"] for row in runs):
        mine = [row for row in runs if row["impl"] == rule]
        gain, (low, high) = paired(runs, rule, "random")
        table[rule] = {
            "reward over training": float(np.mean([row["score"] for row in mine])),
            "accuracy after": float(np.mean([row["after"] for row in mine])),
            "over random credit": gain,
            "from": low,
            "to": high,
            "seeds": len(mine),
        }
    return pd.DataFrame.from_dict(table, orient="index")


def write_record(
    path: Path, rules: Sequence[str], seeds: Sequence[int], iterations: int, *, command: str, commit: str
) -> None:
    """Train and write the record, anew after each run, so that an interruption costs one run.

    Runs that the file holds already stay, if code, base and number of iterations were the same.
    """
    base, digest = chain_model.load_base()
    held = TASK.held_out(256)
    first = {
        "case": "base",
        "sha256": digest,
        "greedy": 100 * chain_model.accuracy(base, held),
        "sampled": 100 * chain_model.accuracy(base, held, temperature=1.0),
    }
    runs = kept_runs(path, digest, iterations)
    for rule, seed in product(rules, seeds):
        if (rule, seed) in runs:
            continue
        row = runs[rule, seed] = run_row(rule, seed, iterations)
        print(f"{rule}, seed {seed}: {row['score']:.1f} %, {row['seconds']:.0f} s", flush=True)
        rows = [runs[key] for key in sorted(runs, key=lambda key: (RULES.index(key[0]), key[1]))]
        compared = [{seed for known, seed in runs if known == rule} for rule in ("uniform", "random", "coupled")]
        if len(compared[0]) > 1 and compared[0] == compared[1] == compared[2]:
            rows.append(judged(rows))
        records.write(path, [first, *rows], sources=SOURCES, command=command, commit=commit)


def kept_runs(path: Path, digest: str, iterations: int) -> dict[tuple[str, int], dict[str, Any]]:
    """The runs by rule and seed that a record of the same code and base already holds."""
    before = records.load(path.stem, path.parent)
    if before is None or before.changed() or before.rows[0].get("sha256") != digest:
        return {}
    runs = [row for row in before.rows if row.get("case") == "credit" and len(row["curve"]) == iterations]
    return {(row["impl"], row["seed"]): row for row in runs}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    name = "python -m attnlab.circuits.preplan_anchor_runs"
    parser = argparse.ArgumentParser(prog=name, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--answers", type=Path, help="file to write the answers of SmolLM2 to")
    parser.add_argument("--base", type=Path, help="file to write the trained small model to")
    parser.add_argument("--record", type=Path, help="the JSON to write, such as records/preplan-anchor.json")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES, help="credit rules to compare")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="seeds of every rule")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of GRPO")
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    chosen = parser.parse_args(arguments)
    if not (chosen.answers or chosen.base or chosen.record):
        parser.error("nothing to do; give --answers, --base or --record")
    if chosen.answers:
        generate(chosen.answers, f"{name} --answers {chosen.answers.name}")
    if chosen.base:
        chosen.base.parent.mkdir(parents=True, exist_ok=True)
        with lab.one_thread():
            chain_model.train_base(TASK).save(chosen.base)
    if chosen.record:
        command = f"{name} --record records/{chosen.record.name}"
        for option in ("rules", "seeds", "iterations"):
            if (value := getattr(chosen, option)) != parser.get_default(option):
                command += f" --{option} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        options = {"command": command, "commit": chosen.commit}
        write_record(chosen.record, chosen.rules, chosen.seeds, chosen.iterations, **options)


if __name__ == "__main__":
    main()
