"""Circuit Component Reuse Across Tasks in Transformer Language Models (Merullo, Eickhoff & Pavlick 2024, arXiv:2310.08744).

Taught in the chapter ``circuits/circuit-reuse``. The experiment in four steps, for any model that does the tasks: score all
heads on three tasks, compare the rankings, name the roles, force the middle heads (section 5 of the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from attnlab.circuits import tasks
from attnlab.circuits.attribution import attribution_patch
from attnlab.circuits.interventions import force_pattern, uniform_over
from attnlab.circuits.metrics import accuracy, choice_accuracy, log_odds, top_token
from attnlab.circuits.model import HookedLM, Node, Run
from attnlab.circuits.pairs import Batch, Pairs
from attnlab.circuits.scores import Scores
from attnlab.claims import bootstrap_mean

ANSWER_KINDS = ("right", "wrong", "another colour", "no colour")
#: the heads of the paper, GPT-2 Medium
GPT2_MEDIUM_HEADS = {
    "inhibition": ("12.3", "13.4", "13.13"),
    "negative mover": ("19.1",),
    "mover": ("15.14", "16.15", "17.4", "18.5", "19.15"),
    "duplicate token": ("6.4",),
    "induction": ("9.3",),
    "content gatherer": ("11.6", "11.7", "12.15"),
}
#: accuracy in percent that the paper reports for GPT-2 Medium on Colored Objects (section 5)
GPT2_MEDIUM_ACCURACY = {
    "untouched": 49.6,
    "negative mover": 78.1,
    "inhibition": 81.5,
    "inhibition + negative mover": 93.7,
}
#: heads of SmolLM2-135M-Instruct that attend from END to S2 on IOI: two like inhibition heads, one that demotes S itself
SMOLLM2_S2_HEADS = ("19.2", "20.0", "23.3")


def pooled(make: Callable[..., Pairs], tokenizer: Any, n: int, seeds: Sequence[int], **options: Any) -> Pairs:
    """``n`` pairs from each seed as one data set; pair ``i * n`` is the first of ``seeds[i]``."""
    parts = [make(tokenizer, n, seed, **options) for seed in seeds]
    return Pairs(parts[0].name, tokenizer, [pair for part in parts for pair in part.pairs])


def three_tasks(
    tokenizer: Any, n: int = 12, seeds: Sequence[int] = (0, 1, 2), year_form: str = "digit"
) -> dict[str, Pairs]:
    """The two tasks that are compared, and greater-than as the control that shares nothing with them but the model."""
    return {
        "IOI": pooled(tasks.ioi, tokenizer, n, seeds),
        "Colored Objects": pooled(tasks.colored_objects, tokenizer, n, seeds),
        "Greater-than": pooled(tasks.greater_than, tokenizer, n, seeds, form=year_form),
    }


def attribution_maps(model: HookedLM, data: dict[str, Pairs]) -> dict[str, Scores]:
    """One map of all heads a task, all in logits (:func:`~attnlab.circuits.metrics.log_odds`)."""
    return {name: attribution_patch(model, pairs, metric=log_odds) for name, pairs in data.items()}


def naive_end_patch(model: HookedLM, pairs: Pairs, heads: Sequence[str | Node]) -> np.ndarray:
    """Exact END patching the plain way, one hook on one whole forward pass a head, ``[G, N]`` changes of the logit difference.

    This is what the restarted :func:`~attnlab.circuits.patching.activation_patch` must equal.
    """
    effect = np.empty((len(heads), len(pairs)))
    with torch.no_grad():
        for batch in pairs.batches():

            def logit_difference(logits: torch.Tensor, batch: Batch = batch) -> torch.Tensor:
                end = logits[:, -1].cpu()
                return (end.gather(1, batch.answers[:, :1]) - end.gather(1, batch.foils[:, :1]))[:, 0]

            clean = logit_difference(model.bridge(batch.clean))
            corrupt = model.run(batch.corrupt, capture=("z",))
            for row, node in enumerate(map(Node.parse, heads)):

                def swap(z: torch.Tensor, hook: Any, node: Node = node, corrupt: Run = corrupt) -> torch.Tensor:
                    z = z.clone()
                    z[:, -1, node.head] = corrupt.acts["z", node.layer][:, -1, node.head]
                    return z

                patched = model.bridge.run_with_hooks(
                    batch.clean, fwd_hooks=[(f"blocks.{node.layer}.attn.hook_z", swap)]
                )
                effect[row, batch.index.numpy()] = (logit_difference(patched) - clean).numpy()
    return effect


def head_roles(
    exact: Scores, direct: np.ndarray, attention: Mapping[Node, Mapping[str, np.ndarray]], heads: Sequence[Node]
) -> pd.DataFrame:
    """What IOI heads do: exact effect, direct effect on the answer, attention at END, and the role that follows.

    The role is a reading of two numbers, as in the paper: a head that attends to IO copies it (``mover``) or works against
    it (``negative mover``); one that attends to S2 writes against S (``demotes S``) or only steers others
    (``inhibition-like``). "Writes" means more than a tenth of the largest direct effect of all heads.

    Args:
        exact: exact END scores.
        direct: :func:`~attnlab.circuits.attribution.direct_logit_attribution`, ``[n_layers, n_heads, N]``.
        attention: :func:`~attnlab.circuits.attribution.attention_to` of at least ``heads`` to IO, S1 and S2.
        heads: the heads to name.
    """
    writes = direct.mean(-1)
    rows = []
    for head in heads:
        to = {name: float(values.mean()) for name, values in attention[head].items()}
        write = float(writes[head.layer, head.head])
        role = _role(to, write, float(np.abs(writes).max()))
        rows.append({"head": str(head), "exact effect": exact.of(head), "direct effect": write, **to, "role": role})
    return pd.DataFrame(rows)


def _role(to: dict[str, float], writes: float, largest: float) -> str:
    place = max(to, key=lambda name: to[name])
    if to[place] < 0.25:
        return "attends elsewhere"
    speaks = abs(writes) > 0.1 * largest
    if place == "IO":
        return ("mover" if writes > 0 else "negative mover") if speaks else "attends to IO"
    if place == "S2":
        return ("demotes S" if writes > 0 else "promotes S") if speaks else "inhibition-like"
    return "attends to S1"


@dataclass(frozen=True)
class Repair:
    """Outcome of forcing heads onto the wrong colours, one row a group of heads."""

    names: Sequence[str]
    choice: np.ndarray  # [G, N] 1 where the right colour beats the two others
    open: np.ndarray  # [G, N] 1 where the right colour beats the whole vocabulary

    def gain(self, row: int, over: Literal["options", "vocabulary"] = "options") -> tuple[float, tuple[float, float]]:
        """Gain in accuracy over row 0 (untouched), in points, with its 95% bootstrap interval over prompts."""
        correct = self._correct(over)
        change = 100 * (correct[row] - correct[0])
        return float(change.mean()), bootstrap_mean(change)

    def gains(self, rows: Sequence[int], over: Literal["options", "vocabulary"] = "options") -> np.ndarray:
        """Gains of several rows in points."""
        correct = self._correct(over)
        return 100 * (correct[list(rows)].mean(1) - correct[0].mean())

    def _correct(self, over: str) -> np.ndarray:
        if over not in ("options", "vocabulary"):
            raise ValueError(f"over={over!r} is unknown; use 'options' (the three colours) or 'vocabulary'")
        return self.choice if over == "options" else self.open


def repair(
    model: HookedLM, pairs: Pairs, groups: Mapping[str, Sequence[str]], towards: Mapping[str, str] | None = None
) -> Repair:
    """Force each group of heads from END onto the two wrong colours and score the answers; row 0 is the untouched model.

    ``towards`` names another target for some groups, such as ``{"the same heads, right colour": "right"}``.
    Source: section 5 of the paper (there: inhibition heads and negative mover of GPT-2 Medium).
    """
    weights = [uniform_over((towards or {}).get(name, "wrong")) for name in ("untouched", *groups)]
    choice, open_ = force_pattern(model, pairs, [(), *groups.values()], weights, metrics=(choice_accuracy, accuracy))
    return Repair(["untouched", *groups], choice, open_)


def answer_kinds(model: HookedLM, pairs: Pairs, groups: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """What the model says when groups of heads are forced onto the wrong colours: shares of four kinds of answer, in percent.

    One row a group: the ``right`` colour, one of the two ``wrong`` ones, ``another colour``, ``no colour``.
    """
    tops = force_pattern(model, pairs, list(groups.values()), uniform_over("wrong"), metrics=(top_token,))[0]  # [G, N]
    rows = []
    for answers in tops:
        said = [model.tokenizer.decode(int(token)).strip().lower() for token in answers]
        options = [[option.strip().lower() for option in pair.options] for pair in pairs.pairs]
        kinds = [
            "right"
            if word == colours[0]
            else "wrong"
            if word in colours
            else "another colour"
            if word in tasks.COLORS
            else "no colour"
            for word, colours in zip(said, options, strict=True)
        ]
        rows.append({kind: 100 * kinds.count(kind) / len(kinds) for kind in ANSWER_KINDS})
    return pd.DataFrame(rows, index=list(groups))


def random_groups(model: HookedLM, heads: Sequence[str], n: int = 20, seed: int = 0) -> dict[str, list[str]]:
    """``n`` different groups with as many heads in the same layers as ``heads``, none of which is in ``heads``: the control.

    Raises:
        ValueError: if the layers do not hold that many different groups.
    """
    rng = np.random.default_rng(seed)
    taken = {model.spec.check(head) for head in heads}
    free = {
        layer: [h for h in range(model.spec.n_heads) if Node(layer, h) not in taken]
        for layer in {t.layer for t in taken}
    }
    wanted = {layer: sum(node.layer == layer for node in taken) for layer in free}
    found: dict[tuple[Node, ...], None] = {}
    enough = all(wanted[layer] <= len(free[layer]) for layer in free)
    for _ in range(100 * n if enough else 0):
        group = [Node(la, int(h)) for la in sorted(free) for h in rng.choice(free[la], wanted[la], replace=False)]
        found[tuple(sorted(group))] = None
        if len(found) == n:
            return {f"random {i}": [str(node) for node in group] for i, group in enumerate(found)}
    raise ValueError(f"n={n} different random groups were not found in layers {sorted(free)}; ask for fewer")


def gpt2_medium_repair(model: HookedLM, n: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The paper's own experiment: GPT-2 Medium, its heads, its numbers beside ours (needs the weights; minutes on a CPU).

    Returns:
        One row a condition: ``condition, paper, accuracy, three-way`` in percent.

    Raises:
        ValueError: if the model is not the size of GPT-2 Medium.
    """
    if (model.spec.n_layers, model.spec.n_heads) != (24, 16):
        raise ValueError(
            f"model {model.spec.name} has {model.spec.n_layers} x {model.spec.n_heads} heads; the paper's are 24 x 16"
        )
    inhibition, negative = GPT2_MEDIUM_HEADS["inhibition"], GPT2_MEDIUM_HEADS["negative mover"]
    groups = {
        "negative mover": negative,
        "inhibition": inhibition,
        "inhibition + negative mover": (*inhibition, *negative),
    }
    outcome = repair(model, tasks.colored_objects(model.tokenizer, n, seed), groups)
    return pd.DataFrame(
        {
            "condition": outcome.names,
            "paper": [GPT2_MEDIUM_ACCURACY[name] for name in outcome.names],
            "accuracy": 100 * outcome.open.mean(1),
            "three-way": 100 * outcome.choice.mean(1),
        }
    )
