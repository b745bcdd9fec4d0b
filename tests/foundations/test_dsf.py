"""Oracles of ``attnlab.foundations.dsf``: evaluators against each other, records against direct formulas, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnlab import mixers
from attnlab.foundations import dsf, dsf_builders, dsf_checks
from attnlab.foundations.dsf_checks import draw

CASES = list(dsf_checks.cases())
Q, K, U = draw(1, 2, 13, 3, 4), draw(2, 2, 13, 3, 4), draw(3, 2, 13, 3, 5)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_all_evaluators_and_the_dense_matrices_give_the_direct_formula(name):
    case = dsf_checks.cases()[name]
    wanted = case.direct(U)
    for evaluate in dsf.EVALUATORS.values():
        close(evaluate(case.record, U), wanted)
    for size in (1, 3, 12, 13, 50):
        close(dsf.chunked(case.record, U, size), wanted)
    close(dsf_checks.dense_outputs(case.record, U), wanted)


@pytest.mark.parametrize("length", [1, 2, 17])
def test_random_transitions_of_every_shape(length):
    for k, v in ((1, 1), (4, 1), (1, 5), (4, 5)):
        log_lam = draw(k + v, 2, length, 3, k, v) / 2  # below and above 0
        b, c, u = draw(1, 2, length, 3, 4, v), draw(2, 2, length, 3, 4, 1), draw(3, 2, length, 3, 5)
        record = dsf.Recurrence(log_lam, b, c, draw(4, 2, length, 3, 5))
        wanted = dsf.recurrent(record, u)
        for evaluate in (dsf.scan, dsf.matrix, lambda r, x: dsf.chunked(r, x, 4)):
            close(evaluate(record, u), wanted)


def test_no_tokens_no_outputs():
    record = dsf_builders.normalised_attention(Q[:, :0], K[:, :0], Q[:, :0, :, 0])
    for evaluate in dsf.EVALUATORS.values():
        assert evaluate(record, U[:, :0]).shape == (2, 0, 3, 5)


def test_the_future_is_not_seen_and_gradients_are_right():
    record, changed = dsf_checks.cases()["S6"].record, U.clone()
    changed[:, 7:] += 1
    for evaluate in dsf.EVALUATORS.values():
        close(evaluate(record, changed)[:, :7], evaluate(record, U)[:, :7], 1e-12)
    small = [x[:1, :4, :1].clone().requires_grad_() for x in (record.log_lam, record.b, record.c)]
    for evaluate in dsf.EVALUATORS.values():
        assert torch.autograd.gradcheck(lambda *x, run=evaluate: run(dsf.Recurrence(*x), U[:1, :4, :1]), small)


def test_delta_rule_transitions_run_one_token_at_a_time_and_nowhere_else():
    key, beta, decay = F.normalize(K, dim=-1), draw(5, 2, 13, 3).sigmoid(), -draw(6, 2, 13, 3).exp()
    plain, gated = dsf_builders.delta_rule(Q, key, beta), dsf_builders.delta_rule(Q, key, beta, decay)
    close(dsf.recurrent(plain, U), mixers.delta_rule(Q, key, U, beta)[0])
    close(dsf.recurrent(gated, U), mixers.gated_delta_rule(Q, key, U, decay, beta)[0])
    close(dsf_checks.dense_outputs(gated, U), dsf.recurrent(gated, U))
    for evaluate in (dsf.scan, dsf.chunked, dsf.matrix):
        with pytest.raises(ValueError, match=r"diagonal minus rank one .*use recurrent"):
            evaluate(plain, U)
    with pytest.raises(ValueError, match="rank one"):
        dsf.transfer(plain)


def test_normalisers_telescope():
    log_eta = draw(7, 2, 13, 3)
    record, shifted = (dsf_builders.normalised_attention(Q, K, x) for x in (log_eta, log_eta + 2))
    close(shifted.lam, record.lam, 1e-12)
    close(dsf.matrix(shifted, U), dsf.matrix(record, U) * torch.tensor(-2.0, dtype=torch.float64).exp())
    factor = draw(8, 2, 13, 3)
    other = dsf_builders.normalised_attention(Q, K, log_eta + factor)  # any factor of row i only rescales row i
    close(dsf.matrix(other, U), dsf.matrix(record, U) * (-factor).exp()[..., None])


def test_a_time_invariant_s6_is_a_convolution():
    dt, a = torch.full((1, 9, 1, 5), 0.3, dtype=torch.float64), torch.arange(1.0, 5, dtype=torch.float64)
    b, c = draw(9, 4), draw(10, 4)
    record = dsf_builders.s6(dt, a, b.expand(1, 9, 1, 4), c.expand(1, 9, 1, 4))
    kernel = torch.stack([(c * (-a * 0.3 * ago).exp() * 0.3 * b).sum() for ago in range(9)])
    u = draw(11, 1, 9, 1, 5)
    wanted = torch.stack([sum(kernel[i - j] * u[0, j, 0] for j in range(i + 1)) for i in range(9)])
    close(dsf.scan(record, u)[0, :, 0], wanted)


def test_the_reversed_gate_is_a_power_of_a_sigmoid():
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)
    for a in (0.1, 1.0, 16.0):
        close((-a * F.softplus(x, threshold=50)).exp(), (-x).sigmoid() ** a, 1e-12)  # torch takes x itself from 20 on


def test_s6_writes_its_step_and_not_one_minus_its_transition():
    gaps = dsf_checks.write_gates()
    assert gaps["write sigmoid(x)"] < 1e-12
    assert gaps["write softplus(x), as S6"] > 0.1


def test_the_order_of_the_kronecker_product_matters():
    assert dsf_checks.transposed_error() > 0.01


def test_monomials_stand_for_tensor_powers():
    x, y = draw(12, 6, 3), draw(13, 6, 3)
    for order in (0, 1, 3, 5):
        phi = dsf_builders.exponential_features(x, order), dsf_builders.exponential_features(y, order)
        assert phi[0].shape[-1] == dsf_builders.feature_count(3, order)
        s = (x * y).sum(-1)
        wanted = sum(s**p / torch.tensor(p).double().add(1).lgamma().exp() for p in range(order + 1))
        close((phi[0] * phi[1]).sum(-1), wanted)
    with pytest.raises(ValueError, match="order=-1"):
        dsf_builders.exponential_features(x, -1)


def test_an_odd_order_can_lose_its_normaliser():
    with pytest.raises(ValueError, match=r"normaliser is -.*even order"):
        dsf_builders.softmax_attention(20 * Q, K, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_lam": torch.zeros(2, 13, 3, 4)}, r"log_lam: shape \(2, 13, 3, 4\).*K or 1"),
        ({"b": torch.zeros(2, 12, 3, 4, 1).double()}, "b: shape .*B, T, H = "),
        ({"c": torch.zeros(2, 13, 3, 3, 1).double()}, "c: shape .*does not broadcast"),
        ({"b": torch.zeros(2, 13, 3, 4, 1)}, "b: dtype torch.float32"),
        ({"log_lam": torch.full((2, 13, 3, 1, 1), -torch.inf).double()}, "log_lam: holds NaN or infinite"),
        ({"d": torch.zeros(2, 13, 3).double()}, "d: shape"),
        ({"rank_one": (Q, Q[..., :2])}, "right: shape"),
    ],
)
def test_what_makes_no_record_is_named(change, message):
    good = {"log_lam": Q[..., :1, None], "b": K[..., None], "c": Q[..., None]}
    with pytest.raises(ValueError, match=message):
        dsf.Recurrence(**{**good, **change})


def test_inputs_and_sizes_that_do_not_fit_are_named():
    record = dsf_checks.cases()["S6"].record
    with pytest.raises(ValueError, match=r"u: shape .*\(2, 13, 3, 5\)"):
        dsf.recurrent(record, U[..., :2])
    with pytest.raises(ValueError, match="u: dtype"):
        dsf.matrix(record, U.float())
    with pytest.raises(ValueError, match="chunk_size=0"):
        dsf.chunked(record, U, 0)
    with pytest.raises(ValueError, match="log_eta: holds NaN or infinite"):
        dsf_builders.normalised_attention(Q, K, torch.full((2, 13, 3), torch.inf).double())
    long = dsf_builders.normalised_attention(draw(1, 1, 17, 1, 2), draw(2, 1, 17, 1, 2), draw(3, 1, 17, 1))
    with pytest.raises(ValueError, match="17 tokens with N = 4, but dense"):
        dsf.dense(long, 2)
