"""What a ROC curve does not tell, and whom it may be drawn against: resample curves of rankings, published circuits of GPT-2.

Used in the chapter ``circuits/sae-circuits``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from attnlab.circuits import sae_circuits as sae
from attnlab.circuits import tasks
from attnlab.circuits.metrics import Metric, logit_diff
from attnlab.circuits.model import HookedLM, Node
from attnlab.circuits.pairs import Pairs
from attnlab.circuits.patching import activation_patch
from attnlab.circuits.reference import REFERENCE_CIRCUITS, roc


def head_curve(
    model: HookedLM,
    pairs: Pairs,
    rankings: Mapping[str, Sequence[Node]],
    kept: Sequence[int],
    metric: Metric = logit_diff,
) -> pd.DataFrame:
    r"""Faithfulness of the first heads of each ranking when every other head is resampled at every position.

    :math:`F = (m(C) - m(\emptyset)) / (m(G) - m(\emptyset))`: 1 for the whole model, 0 with all heads resampled; MLPs and
    embedding are left alone. The same as :func:`~attnlab.circuits.faithfulness.faithfulness` of
    :meth:`~attnlab.circuits.graph.Graph.of_nodes` with these heads and all MLPs, by patching nodes instead of masking edges.

    Returns:
        columns ``ranking, kept, faithfulness``.

    Raises:
        ValueError: for a ranking that is not one of all heads, or a count outside 0 to the number of heads.
    """
    heads = model.spec.heads
    for name, order in rankings.items():
        if sorted(order) != sorted(heads):
            raise ValueError(f"ranking {name!r} lists {len(order)} heads; all {len(heads)} are wanted, each once")
    if wrong := [count for count in kept if not 0 <= count <= len(heads)]:
        raise ValueError(f"kept={wrong[0]} must lie between 0 and {len(heads)}")
    asked = [(name, count) for name in rankings for count in kept]
    groups = [list(rankings[name])[count:] for name, count in asked if count < len(heads)]
    scores = activation_patch(model, pairs, [heads, *groups], metric=metric, positions="all").values
    left = iter(1 - scores[1:] / scores[0])
    rows = [
        {"ranking": name, "kept": count, "faithfulness": 1.0 if count == len(heads) else float(next(left))}
        for name, count in asked
    ]
    return pd.DataFrame(rows)


def reference_rows(model: HookedLM, n: int = 50, seed: int = 0, m: int = 200, epochs: int = 500) -> pd.DataFrame:
    """AUC against the published circuits of GPT-2 small, every disputed variant: columns ``task, variant, method, auc``.

    Raises:
        ValueError: if the model is not the size of GPT-2 small.
    """
    if (model.spec.n_layers, model.spec.n_heads) != (12, 12):
        raise ValueError(
            f"model {model.spec.name} has {model.spec.n_layers} x {model.spec.n_heads} heads; the circuits' are 12 x 12"
        )
    data = {
        "ioi/gpt2-small": tasks.ioi(model.tokenizer, n, seed, corruption="abc"),
        "greater-than/gpt2-small": tasks.greater_than(model.tokenizer, n, seed, form="year"),
    }
    rows = []
    for name, pairs in data.items():
        writes = sae.head_writes(model, pairs)["mean"].normalised()
        scores: dict[str, np.ndarray] = {
            "SAE (paper), new codes": sae.unique_codes(
                sae.sae_codes(writes, m, seed=seed, epochs=epochs).values, writes.positive
            ),
            "untrained encoder, new codes": sae.unique_codes(
                sae.sae_codes(writes, m, seed=seed, epochs=0).values, writes.positive
            ),
            "mean difference": sae.mean_difference(writes),
        }
        circuit = REFERENCE_CIRCUITS[name]
        for variant in (None, *circuit.variants):
            truth = circuit.labels(model.spec.heads, variant)
            rows += [
                {
                    "task": name,
                    "variant": variant or "as first published",
                    "method": method,
                    "auc": roc(values, truth).auc,
                }
                for method, values in scores.items()
            ]
    return pd.DataFrame(rows)
