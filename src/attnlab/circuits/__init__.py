"""Circuit analysis on any decoder: tasks, patching, attribution, circuits as edges, their faithfulness, pattern surgery.

Start with ``model = HookedLM(pretrained.load("smollm2-135m-instruct"))`` and pairs from :mod:`~attnlab.circuits.tasks`. Heads
are scored with :func:`activation_patch`, :func:`path_patch` or :func:`attribution_patch`. Edges are scored with :func:`eap` on
``ungrouped(model)``; :class:`Graph` turns scores into a circuit, :func:`faithfulness` and :func:`sparsity_curve` say what it is
worth, :func:`to_json` keeps it.
"""

from attnlab.circuits import tasks
from attnlab.circuits.attribution import attention_rows, attention_to, attribution_patch, direct_logit_attribution
from attnlab.circuits.eap import eap, exact_edge_scores
from attnlab.circuits.edges import EdgeScores, Wiring
from attnlab.circuits.evaluate import evaluate, evaluate_many
from attnlab.circuits.export import from_json, to_dot, to_json, to_networkx
from attnlab.circuits.faithfulness import (
    Faithfulness,
    SparsityCurve,
    completeness,
    faithfulness,
    incompleteness,
    minimality,
    sparsity_curve,
)
from attnlab.circuits.graph import Graph, edge_overlap_curve
from attnlab.circuits.interventions import force_pattern, uniform_over
from attnlab.circuits.metrics import (
    Metric,
    Readout,
    accuracy,
    choice_accuracy,
    log_odds,
    log_prob,
    logit_diff,
    prob_diff,
    top_token,
)
from attnlab.circuits.model import INPUT, Edit, HookedLM, Node, Run, Spec
from attnlab.circuits.overlap import chance, overlap, overlap_curve, overlap_interval, top_share
from attnlab.circuits.pairs import Batch, Pair, Pairs
from attnlab.circuits.patching import Receiver, activation_patch, path_patch
from attnlab.circuits.reference import REFERENCE_CIRCUITS, roc
from attnlab.circuits.scores import NoEffectError, Scores
from attnlab.circuits.ungroup import ungrouped

__all__ = [
    "INPUT",
    "REFERENCE_CIRCUITS",
    "Batch",
    "EdgeScores",
    "Edit",
    "Faithfulness",
    "Graph",
    "HookedLM",
    "Metric",
    "NoEffectError",
    "Node",
    "Pair",
    "Pairs",
    "Readout",
    "Receiver",
    "Run",
    "Scores",
    "SparsityCurve",
    "Spec",
    "Wiring",
    "accuracy",
    "activation_patch",
    "attention_rows",
    "attention_to",
    "attribution_patch",
    "chance",
    "choice_accuracy",
    "completeness",
    "direct_logit_attribution",
    "eap",
    "edge_overlap_curve",
    "evaluate",
    "evaluate_many",
    "exact_edge_scores",
    "faithfulness",
    "force_pattern",
    "from_json",
    "incompleteness",
    "log_odds",
    "log_prob",
    "logit_diff",
    "minimality",
    "overlap",
    "overlap_curve",
    "overlap_interval",
    "path_patch",
    "prob_diff",
    "roc",
    "sparsity_curve",
    "tasks",
    "to_dot",
    "to_json",
    "to_networkx",
    "top_share",
    "top_token",
    "ungrouped",
    "uniform_over",
]
