"""Metrics against the logits of the bridge, pads, copies and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab.circuits import (
    Pair,
    Pairs,
    Readout,
    accuracy,
    choice_accuracy,
    log_odds,
    log_prob,
    logit_diff,
    prob_diff,
)
from attnlab.circuits.metrics import METRICS

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture
def uneven(lm):
    """Pairs with one to three answers, foils and options."""
    words = "t2 t3 t4"
    pairs = [
        Pair(words, "t2 t9 t4", ["t5"], ["t6"], {}, ["t5", "t6"]),
        Pair("t9 t3 t4", words, ["t7", "t8", "t11"], ["t10"], {}, ["t7", "t10", "t12"]),
        Pair("t4 t3 t4", words, ["t13"], ["t14", "t15"], {}, ["t13", "t14", "t15"]),
    ]
    (batch,) = Pairs("uneven", lm.tokenizer, pairs).batches()
    return batch


@pytest.fixture
def seen(lm, uneven):
    """The readout of the clean prompts and the logits of the bridge itself."""
    run = lm.run(uneven.clean)
    with torch.no_grad():
        logits = lm.bridge(uneven.clean)[:, -1]
    return Readout(lm, run.resid[3], uneven), logits


def lists(table):
    return [[token for token in row if token >= 0] for row in table.tolist()]


def test_every_metric_against_its_definition(seen, uneven):
    end, logits = seen
    probs = logits.softmax(-1)
    rows = list(zip(lists(uneven.answers), lists(uneven.foils), lists(uneven.options), strict=True))
    expected = {
        logit_diff: [logits[i, a[0]] - logits[i, f[0]] for i, (a, f, _) in enumerate(rows)],
        log_odds: [math.log(probs[i, a].sum() / probs[i, f].sum()) for i, (a, f, _) in enumerate(rows)],
        prob_diff: [probs[i, a].sum() - probs[i, f].sum() for i, (a, f, _) in enumerate(rows)],
        log_prob: [math.log(probs[i, a[0]]) for i, (a, _, _) in enumerate(rows)],
        accuracy: [float(logits[i].argmax() == a[0]) for i, (a, _, _) in enumerate(rows)],
        choice_accuracy: [float(max(o, key=lambda t, i=i: logits[i, t]) == o[0]) for i, (_, _, o) in enumerate(rows)],
    }
    assert set(METRICS.values()) == set(expected)
    for metric, values in expected.items():
        torch.testing.assert_close(metric(end), torch.tensor([float(v) for v in values], dtype=torch.float64), **EXACT)


def test_accuracies_can_be_right_and_wrong(lm, uneven):
    """The answer is put on the largest, then on the smallest logit."""
    with torch.no_grad():
        logits = lm.bridge(uneven.clean)[:, -1]
    for extreme, expected in ((logits.argmax(-1), 1.0), (logits.argmin(-1), 0.0)):
        other = logits.topk(2).indices[:, 1]
        answers, options = extreme[:, None], torch.stack([extreme, other], 1)
        batch = type(uneven)(**{**vars(uneven), "answers": answers, "options": options})
        end = Readout(lm, lm.run(uneven.clean).resid[3], batch)
        assert accuracy(end).tolist() == [expected] * 3
        assert choice_accuracy(end).tolist() == [expected] * 3


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_copies_are_read_copy_by_copy(lm, uneven, metric):
    """Row ``c * B + b`` is pair ``b``: three stacked copies give the same values three times."""
    run = lm.run(uneven.clean)
    one = metric(Readout(lm, run.resid[3], uneven))
    three = metric(Readout(lm, run.resid[3].repeat(3, 1, 1), uneven))
    torch.testing.assert_close(three.view(3, 3), one.expand(3, 3), **EXACT)


def test_log_odds_of_one_answer_and_one_foil_is_the_logit_difference(lm, batch):
    end = Readout(lm, lm.run(batch.clean).resid[3], batch)
    torch.testing.assert_close(log_odds(end), logit_diff(end), **EXACT)


@pytest.mark.parametrize("metric", [logit_diff, log_odds, prob_diff, log_prob])
def test_gradients_are_finite_with_padded_lists(lm, uneven, metric):
    resid = lm.run(uneven.clean).resid[3].detach().requires_grad_(True)
    (grad,) = torch.autograd.grad(metric(Readout(lm, resid, uneven)).sum(), resid)
    assert grad.isfinite().all()
    assert (grad[:, -1].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("options", [(), ("t5",)])
def test_choice_accuracy_needs_a_choice(lm, options):
    (batch,) = Pairs("open", lm.tokenizer, [Pair("t2 t3", "t2 t4", ["t5"], ["t6"], {}, options)]).batches()
    with pytest.raises(ValueError, match="at least two options"):
        choice_accuracy(Readout(lm, lm.run(batch.clean).resid[3], batch))
