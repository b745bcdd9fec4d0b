"""The models of the DSF chapter are equal but for their cores; the record goes on; orders of the exponential."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnlab import records
from attnlab.foundations import dsf, dsf_checks, dsf_runs, dsf_softmax, dsf_tables
from attnlab.foundations.dsf_models import Core, QLSTMCore, Spec, effective_memory
from attnlab.models.language import initialise

TINY = replace(dsf_runs.Setting(), steps=2, batch=2, width=16)
SPECS = [spec for spec in dsf_runs.SMALL if spec.kind != "softmax"]


def built(spec, width=16):
    core = spec.core(width)
    torch.manual_seed(0)
    initialise(core)
    return core.double()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_core_is_its_record_whichever_evaluator(spec):
    core, x = built(spec), dsf_checks.draw(0, 2, 11, 16)
    record, u = core.record(x), core.values(x)[:, :, None]
    for evaluate in dsf.EVALUATORS.values():
        torch.testing.assert_close(core(x), evaluate(record, u)[:, :, 0], rtol=0, atol=1e-10)
    assert core.state_floats(32) >= record.size[0] * 16


def test_models_differ_in_their_cores_alone():
    for spec in dsf_runs.SMALL:
        model = TINY.model(spec)
        shell = [name for name, _ in model.named_parameters() if ".core." not in name and ".mlp." not in name]
        assert shell == [
            n for n, _ in TINY.model(Spec("softmax", 32)).named_parameters() if ".core." not in n and ".mlp." not in n
        ]
        assert any(".mlp." in n for n, _ in model.named_parameters()) == spec.mlp


@pytest.mark.parametrize("gate", ["plain", "reversed", "reversed, exponent 1"])
def test_a_gate_starts_where_it_is_told(gate):
    core = QLSTMCore(8, gate, 0.98)
    initialise(core)
    lam = core.record(torch.zeros(1, 3, 8)).lam
    torch.testing.assert_close(lam, torch.full_like(lam, 0.98))
    with torch.no_grad():
        assert effective_memory(core.record(torch.zeros(1, 3, 8))) == pytest.approx(50, rel=1e-3)


def test_a_reversed_gate_of_exponent_1_trains_as_the_plain_one_does():
    plain, other = dsf_checks.disguise(steps=3)
    assert plain == pytest.approx(other, abs=1e-12)


def test_a_state_is_counted():
    floats = {spec.name: TINY.state_floats(spec) for spec in dsf_runs.SMALL}
    assert floats["softmax, n = 32"] == 32 * (32 + 16)
    assert floats["linear, n = 8"] == 8 * 17
    assert floats["S6, n = 8"] == 8 * 16
    assert floats["qLSTM"] == 16


def test_unknown_models_are_named():
    for bad, message in ((("soft",), "kind='soft'"), (("linear",), "needs state"), (("qLSTM", 3), "has no state")):
        with pytest.raises(ValueError, match=message):
            Spec(*bad)
    with pytest.raises(ValueError, match="gate='open'"):
        QLSTMCore(8, "open")
    with pytest.raises(ValueError, match="keep=1"):
        QLSTMCore(8, "plain", 1)


def test_a_record_goes_on_where_it_stopped(tmp_path, capsys):
    path = tmp_path / "dsf.json"
    dsf_runs.main(["--record", str(path), "--tiny", "--budget", "0"])
    assert not path.exists()
    dsf_runs.main(["--record", str(path), "--tiny"])
    rows = records.load("dsf", tmp_path).rows
    assert [row["seed"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert all(row["counts"] and row["lr"] in dsf_runs.Setting().rates for row in rows)
    dsf_runs.main(["--record", str(path), "--tiny"])
    assert len(records.load("dsf", tmp_path).rows) == 6
    capsys.readouterr()


def test_rates_are_chosen_on_a_seed_that_does_not_count():
    setting, spec = replace(TINY, rates=(1e-3, 1e-2)), Spec("qLSTM")
    jobs = list(dsf_runs.todo(setting, [spec], []))[:2]
    assert jobs == [(spec, 100, 1e-3, False), (spec, 100, 1e-2, False)]
    rows = [
        {"case": setting.name, "impl": "qLSTM", "seed": 100, "lr": lr, "counts": False, "accuracy": lr}
        for lr in setting.rates
    ]
    assert list(dsf_runs.todo(setting, [spec], rows)) == [(spec, seed, 1e-2, True) for seed in (0, 1, 2)]


def test_a_model_comes_back_from_its_file(tmp_path):
    spec = Spec("Mamba-2", 32)
    model = dsf_runs.Setting().model(spec)
    dsf_runs.save(model, spec, tmp_path)
    again = dsf_runs.trained(spec, tmp_path)
    tokens = torch.as_tensor(dsf_runs.Setting().draw(dsf_runs.np.random.default_rng(0), 2).tokens)
    torch.testing.assert_close(again(tokens), model(tokens))
    assert dsf_runs.trained(Spec("S6", 8), tmp_path) is None
    found = dsf_runs.cores(again, tokens)
    assert len(found) == 2
    assert all(isinstance(core, Core) for core, _ in found)


def invented(setting, spec, seed):
    accuracy = {"softmax": 0.95, "qLSTM, long start": 0.7}.get(spec.kind, 0.5)
    row = {"case": setting.name, "impl": spec.name, "seed": seed, "counts": True, "seconds": 1.0, "lr": 1e-2}
    memory = {"memory_before": [2.0, 2.0], "memory_after": [3.0, 5.0]}
    return row | memory | {"parameters": 1, "state_floats": 1, "accuracy": accuracy}


def test_verdicts_follow_their_rules():
    rows = [
        invented(setting, spec, seed)
        for setting, specs in dsf_runs.SMALL_PLAN
        for spec in specs
        for seed in dsf_runs.SEEDS
    ]
    by_claim = {row["claim"]: row["verdict"] for row in dsf_tables.claim_rows(rows)}
    assert by_claim["dsf/state-expansion"] == by_claim["dsf/reversed-gate"] == "refuted"
    assert by_claim["dsf/initial-memory"] == "confirmed"
    assert len(dsf_tables.cards([*rows, *dsf_tables.claim_rows(rows)], "reversed-gate", "initial-memory")) == 2
    lacking = [row for row in rows if (row["impl"], row["seed"]) != ("linear, n = 8", 2)]
    assert set(by_claim) - {row["claim"] for row in dsf_tables.claim_rows(lacking)} == {
        f"dsf/{name}" for name in ("state-expansion", "normalisation", "unequal-blocks")
    }
    for row in rows:
        row["accuracy"] -= 0.1 * (row["impl"] == "linear, n = 8") + 0.3 * (row["case"] == "gates")
    by_claim = {row["claim"]: row["verdict"] for row in dsf_tables.claim_rows(rows)}
    assert by_claim["dsf/state-expansion"] == "confirmed"
    assert by_claim["dsf/initial-memory"] == "different setting"  # nobody learned it
    assert dsf_tables.summary(rows).loc["qLSTM, long start", "mean"] == pytest.approx(70)
    assert dsf_tables.gates(rows).loc["qLSTM", "memory after, layer 1"] == 5
    assert dsf_tables.rate(rows, "qLSTM") == dsf_tables.rate([], "qLSTM") == 1e-2


def test_the_needed_order_is_that_of_the_record():
    q, k, v = dsf_softmax.random_problem(2.0, 0)
    order = int(dsf_softmax.needed_order(dsf_softmax.logits(q, k), v.transpose(1, 2)))
    exact = torch.einsum("bhij,bjhv->bihv", _softmax(dsf_softmax.logits(q, k)), v)
    from attnlab.foundations.dsf_builders import softmax_attention

    errors = [
        float((dsf.matrix(softmax_attention(q, k, p), v) - exact).abs().max() / exact.abs().max())
        for p in (order - 2, order)
    ]
    assert errors[1] < dsf_softmax.TOLERANCE <= errors[0]
    with pytest.raises(ValueError, match="float32"):
        dsf_softmax.needed_order(torch.zeros(3, 3))
    seen, hidden = torch.zeros(2, 3, 3, dtype=torch.float64).unbind()
    hidden[0, 2], seen[2, 0] = -torch.inf, torch.nan
    assert int(dsf_softmax.needed_order(hidden)) == 0  # the future may hold anything
    with pytest.raises(ValueError, match="scores: NaN or infinite numbers where a query may read; leave such"):
        dsf_softmax.needed_order(seen)
    with pytest.raises(ValueError, match="values: NaN or infinite"):
        dsf_softmax.needed_order(hidden, seen)


def test_a_pattern_gives_its_logits_back_centred():
    scores = dsf_checks.draw(4, 2, 6, 6) * 3
    found = dsf_softmax.centred(_softmax(scores))
    torch.testing.assert_close(_softmax(found), _softmax(scores), rtol=0, atol=1e-12)
    row = found[0, 4, :5]
    assert float(row.max()) == pytest.approx(-float(row.min()))


def _softmax(scores):
    above = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(above, -torch.inf).softmax(-1)
