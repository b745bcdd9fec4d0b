"""Exercises of the chapter ``circuits/circuit-reuse``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import binom, hypergeom

from attnlab.circuits import (
    HookedLM,
    Node,
    Scores,
    Spec,
    activation_patch,
    choice_accuracy,
    force_pattern,
    uniform_over,
)
from attnlab.circuits.circuit_reuse import SMOLLM2_S2_HEADS
from attnlab.circuits.tasks import colored_objects, ioi
from attnlab.exercises.core import Exercise, Feedback, accept, reject

# ------------------------------------------------------------------------------------------ 1: overlap by chance


def p_at_least(n: int, k: int, shared: int) -> float:
    """Probability that two random ``k``-subsets of ``n`` heads have ``shared`` heads or more in common."""
    return float(hypergeom(n, k, k).sf(shared - 1))  # sf(x) is P(X > x)


def _check_chance(answer: Callable[[int, int, int], float]) -> Feedback:
    cases = [(10, 3, 0), (10, 3, 1), (10, 3, 3), (270, 14, 10), (270, 27, 16)]
    got = {case: float(answer(*case)) for case in cases}
    exact = {case: p_at_least(*case) for case in cases}
    if all(np.isclose(got[case], exact[case], rtol=1e-6, atol=0) for case in cases):
        odds = exact[270, 14, 10]
        return accept(
            f"Two random lists of 14 share 10 heads or more with probability {odds:.0e}: not luck, if luck is uniform."
        )
    if all(np.isclose(got[n, k, x], hypergeom(n, k, k).sf(x), rtol=1e-6, atol=1e-300) for n, k, x in cases):
        return reject("You left out the case of exactly `shared` heads: sf(x) is P(X > x), and P(X >= x) is wanted.")
    if np.isclose(got[10, 3, 1], binom(3, 0.3).sf(0), rtol=1e-6):
        return reject(
            "You drew with replacement (binomial). A list holds a head once, so the draws are not independent."
        )
    if np.isclose(got[270, 14, 10], 14 * 14 / 270, rtol=1e-6):
        return reject("That is the mean overlap k*k/n. The question is how likely `shared` heads or more are.")
    if not np.isclose(got[10, 3, 0], 1.0):
        return reject(f"Any two lists share at least 0 heads, so p(10, 3, 0) must be 1; yours is {got[10, 3, 0]:.3g}.")
    worst = max(cases, key=lambda case: abs(np.log(max(got[case], 1e-300) / exact[case])))
    return reject(
        f"p{worst} should be {exact[worst]:.3g}, yours is {got[worst]:.3g}; small cases can be counted by hand."
    )


# ---------------------------------------------------------------------------- 2: a counterfactual without repetition


def abc_scores() -> Scores:
    """Exact END scores of the role-bearing IOI heads under the ABC counterfactual (three new names, none repeated)."""
    from attnlab.models import pretrained

    model = HookedLM(pretrained.load("smollm2-135m-instruct"))
    pairs = ioi(model.tokenizer, n=12, corruption="abc")
    return activation_patch(model, pairs, ["23.3", "20.0", "19.2", "23.0", "23.2", "24.4"])


def _check_abc(answer: Any) -> Feedback:
    if not isinstance(answer, Scores):
        return reject(f"Hand over the Scores that activation_patch returns, not a {type(answer).__name__}.")
    if answer.made["method"] != "activation patching":
        return reject(
            f"These scores are from {answer.made['method']}: a first-order estimate. Patch exactly with activation_patch."
        )
    if answer.made["data"] != "ioi-abc":
        return reject(
            f"The pairs are {answer.made['data']!r}, whose corrupt prompts still repeat a name. "
            "Make them with ioi(tokenizer, corruption='abc')."
        )
    if answer.made["positions"] != "END":
        return reject(f"You patched at {answer.made['positions']!r}; the chapter's scores to compare with are at END.")
    measured = {str(group[0]) for group in answer.groups if len(group) == 1}
    wanted = {"23.3", "20.0", "19.2", "23.0", "23.2", "24.4"}
    if missing := sorted(wanted - measured):
        return reject(
            f"Heads {', '.join(missing)} are missing; all of 23.3, 20.0, 19.2, 23.0, 23.2, 24.4 are compared."
        )
    found = ", ".join(f"{head} {answer.of(head):+.2f}" for head in sorted(wanted))
    return accept(
        f"Under ABC: {found}. Compare with the flip scores of the chapter: a mover that brings a third name takes IO away, but "
        "does not put S in its place, so its share falls; the heads that look at S2 are what the counterfactual still breaks."
    )


def _tiny_scores(corruption: str, positions: str, method: str) -> Scores:
    """A ``Scores`` that says it was made in the wrong way; its numbers do not matter."""
    made = {"data": f"ioi-{corruption}", "positions": positions, "method": method}
    spec = Spec("none", 30, 9, 3, 576, 64)
    return Scores(spec, [(Node(23, 3),)], np.ones((1, 2)), np.ones(2), np.zeros(2), made)


# ------------------------------------------------------------------------------ 3: how few heads repair the answers


def smallest_repair() -> tuple[list[str], dict[tuple[str, ...], float]]:
    """The smallest set of heads that keeps half of the gain, and the gain in points of every subset of the triple."""
    from itertools import combinations

    from attnlab.models import pretrained

    model = HookedLM(pretrained.load("smollm2-135m-instruct"))
    pairs = colored_objects(model.tokenizer, n=24)
    subsets = [subset for size in (1, 2, 3) for subset in combinations(SMOLLM2_S2_HEADS, size)]
    correct = force_pattern(model, pairs, [(), *subsets], uniform_over("wrong"), metrics=(choice_accuracy,))[0].mean(1)
    gains = {subset: 100 * float(value - correct[0]) for subset, value in zip(subsets, correct[1:], strict=True)}
    enough = [subset for subset in subsets if gains[subset] >= gains[SMOLLM2_S2_HEADS] / 2]
    return list(enough[0]), gains  # subsets are ordered by size


def _check_smallest(answer: Any) -> Feedback:
    try:
        chosen, gains = answer
        gains = {frozenset(subset): float(gain) for subset, gain in gains.items()}
    except (TypeError, ValueError, AttributeError):
        return reject(
            "Hand over a pair: the list of heads, and a dictionary from each tuple of heads to its gain in points."
        )
    full = frozenset(SMOLLM2_S2_HEADS)
    singles = {frozenset([head]) for head in full}
    if full not in gains or not singles <= set(gains):
        return reject(f"Measure at least each head of {', '.join(sorted(full))} alone and all three together.")
    picked = frozenset(_names(chosen))
    if picked not in gains:
        return reject(f"{sorted(picked)} is not among the sets you measured; the claim needs its gain.")
    half = gains[full] / 2
    if gains[picked] < half:
        return reject(
            f"{sorted(picked)} gains {gains[picked]:.1f} points, less than half of {gains[full]:.1f}; it is too small a set."
        )
    smaller = [subset for subset in gains if len(subset) < len(picked) and gains[subset] >= half]
    if smaller:
        return reject(
            f"{sorted(picked)} is enough, but so is the smaller {sorted(smaller[0])} ({gains[smaller[0]]:.1f} points)."
        )
    return accept(
        f"{sorted(picked)} keeps {gains[picked]:.1f} of {gains[full]:.1f} points. A head that repairs alone and writes to the logits "
        "itself demotes what it looks at; nothing has to be passed on to the movers."
    )


def _names(chosen: Sequence[str] | str) -> list[str]:
    return [chosen] if isinstance(chosen, str) else list(chosen)


_GAINS = {("19.2",): 1.0, ("20.0",): 3.0, ("23.3",): 40.0, ("19.2", "20.0", "23.3"): 44.0}

EXERCISES = [
    Exercise(
        number=1,
        title="How surprising is 10 of 14?",
        difficulty="easy",
        minutes=8,
        answer_is="function",
        checker=_check_chance,
        solution=p_at_least,
        wrong={
            "leaves out the tie": lambda n, k, shared: float(hypergeom(n, k, k).sf(shared)),
            "draws with replacement": lambda n, k, shared: float(binom(k, k / n).sf(shared - 1)),
            "gives the mean": lambda n, k, shared: k * k / n,
        },
        hints=(
            "Fix the first list. The second draws k heads without replacement; k of the n heads are marked.",
            "scipy.stats.hypergeom(n, k, k) is that distribution; its sf(x) is P(X > x).",
        ),
    ),
    Exercise(
        number=2,
        title="A counterfactual that repeats no name",
        difficulty="medium",
        minutes=15,
        answer_is="value",
        checker=_check_abc,
        solution=abc_scores,
        wrong={
            "kept the flipping counterfactual": _tiny_scores("flip", "END", "activation patching"),
            "used the first-order estimate": _tiny_scores(
                "abc", "all", "attribution patching, gradient at the base run"
            ),
            "patched every position": _tiny_scores("abc", "all", "activation patching"),
            "measured one head": _tiny_scores("abc", "END", "activation patching"),
        },
        hints=(
            "ioi(...) has an argument for the kind of counterfactual.",
            "activation_patch(model, ioi(model.tokenizer, n=12, corruption='abc'), ['23.3', ...]) patches END by default.",
        ),
    ),
    Exercise(
        number=3,
        title="How few heads repair the answers?",
        difficulty="hard",
        minutes=30,
        answer_is="value",
        checker=_check_smallest,
        solution=smallest_repair,
        wrong={
            "the whole triple": (list(SMOLLM2_S2_HEADS), _GAINS),
            "a head that does too little": (["20.0"], _GAINS),
            "single heads were not tried": (list(SMOLLM2_S2_HEADS), {tuple(SMOLLM2_S2_HEADS): 44.0}),
            "no gains": "23.3",
        },
        hints=(
            "itertools.combinations lists the subsets; force_pattern measures all of them in one call, side by side.",
            "Its weights are uniform_over('wrong'), its metric choice_accuracy; an empty group is the untouched model.",
        ),
    ),
]
