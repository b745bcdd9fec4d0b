"""Circuit analysis on any decoder: tasks, patching, attribution, overlap and pattern surgery.

Start with ``model = HookedLM(pretrained.load("smollm2-135m-instruct"))``, make pairs with :mod:`~attnlab.circuits.tasks`, and
score heads with :func:`activation_patch`, :func:`path_patch` or :func:`attribution_patch`.
"""

from attnlab.circuits import tasks
from attnlab.circuits.attribution import attention_rows, attention_to, attribution_patch, direct_logit_attribution
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
from attnlab.circuits.scores import NoEffectError, Scores

__all__ = [
    "INPUT",
    "Batch",
    "Edit",
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
    "Spec",
    "accuracy",
    "activation_patch",
    "attention_rows",
    "attention_to",
    "attribution_patch",
    "chance",
    "choice_accuracy",
    "direct_logit_attribution",
    "force_pattern",
    "log_odds",
    "log_prob",
    "logit_diff",
    "overlap",
    "overlap_curve",
    "overlap_interval",
    "path_patch",
    "prob_diff",
    "tasks",
    "top_share",
    "top_token",
    "uniform_over",
]
