"""A figure of the chapter ``circuits/chinchilla-mcq``: which heads of SmolLM2 look at the right letter, before it is taught and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

WHEN = ("before", "after")


def score_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a seed, time, layer and head, with its correct-letter score.

    Args:
        rows: of ``records/chinchilla-mcq-finetune.json``, each with ``scores_before`` and ``scores_after`` [L, H].
    """
    return pd.DataFrame(
        [
            {"seed": row["seed"], "when": when, "layer": layer, "head": head, "score": round(float(score), 3)}
            for row in rows
            for when in WHEN
            for (layer, head), score in np.ndenumerate(np.array(row[f"scores_{when}"]))
        ]
    )


def heads_chart(frame: pd.DataFrame) -> alt.VConcatChart:
    """Layers across, heads down, darker where END looks at the label of the right line and at no other; a seed at a time."""
    seeds = sorted(int(seed) for seed in frame.seed.unique())
    seed = alt.param("taught_seed", value=seeds[0], bind=alt.binding_radio(options=seeds, name="seed: "))
    cells = (
        alt.Chart(frame)
        .mark_rect(stroke="currentColor", strokeOpacity=0.15)
        .encode(
            x=alt.X("layer:O", axis=alt.Axis(labelAngle=0, values=list(range(0, int(frame.layer.max()) + 1, 5)))),
            y=alt.Y("head:O"),
            color=alt.Color(
                "score:Q",
                title="score",
                scale=alt.Scale(domain=[0, 0.9], scheme="blues", clamp=True),
                legend=alt.Legend(orient="top", gradientLength=120, values=[0, 0.3, 0.6, 0.9]),
            ),
            tooltip=["layer:O", "head:O", alt.Tooltip("score:Q", format=".2f")],
        )
        .transform_filter(alt.datum.seed == seed)
        .properties(width=270, height=110)
    )
    panels = [cells.transform_filter(alt.datum.when == when).properties(title=f"{when} the lessons") for when in WHEN]
    both: alt.VConcatChart = alt.vconcat(*panels, spacing=10).add_params(seed)
    return both
