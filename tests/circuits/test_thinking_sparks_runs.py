"""The command of ``circuits/thinking-sparks``: what it writes, and how rows become verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from attnlab import claims, records
from attnlab.circuits import thinking_sparks_runs as runs
from attnlab.circuits import thinking_sparks_tables as tables
from attnlab.circuits.post_training import REGIMES, Plan
from attnlab.circuits.thinking_sparks import Timeline

TINY = Plan(
    n_layers=2,
    n_heads=2,
    d_model=8,
    batch=5,
    learn_steps=2,
    slip_steps=1,
    switch_steps=2,
    updates=4,
    every=2,
    prompts=4,
    group=4,
)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The null distribution of a rank correlation takes seconds; its shape is not what is tested here."""
    monkeypatch.setattr(runs._following, "__defaults__", (40,))


def line(method: str, shares: list[list[float]], kl: list[float], reward: list[float] | None = None) -> Timeline:
    """A run of one layer of heads."""
    n = len(shares)
    table, zeros = np.array(shares)[:, None], np.zeros(n)
    earned = np.full(n, np.nan) if reward is None else np.array(reward)
    return Timeline(method, list(range(0, 10 * n, 10)), table, zeros, np.array(kl), zeros, earned)


def rows_of(seed: int) -> list[dict]:
    """Two regimes in which SFT brings in two heads early and keeps them, GRPO one that goes again, drift none."""
    base, two, one = [1.0, 0, 0, 0], [0.6, 0.2, 0.2, 0], [0.8, 0.2, 0, 0]
    found = []
    for regime in REGIMES:
        for run in (
            line("SFT", [base, two, two, two], [0, 0.1, 0.5, 1.0]),
            line("GRPO", [base, one, one, base], [0, 0.05, 0.08, 0.1], [np.nan, 0.1, 0.1, 0.5]),
            line("drift", [base, base, base, base], [0, 0.01, 0.01, 0.01]),
        ):
            found.append({"case": regime, "seed": seed, "operator": "run", **run.row()})
        found.append(
            {"case": regime, "seed": seed, "operator": "noise", "impl": runs.AGAIN, "shares": [[0.9, 0.0, 0.1, 0.0]]}
        )
        for how, without in (("zero", 40.0), ("mean", 60.0)):
            ablation = {"operator": "ablation", "impl": "SFT", "set": "emergent", "how": how, "without": without}
            found.append({"case": regime, "seed": seed, **ablation, "heads": [[0, 1]], "random": [90.0, 80.0 + seed]})
    return found


def test_counts_of_heads_by_method_and_threshold():
    table = runs.head_counts(rows_of(0), [0.05, 0.15]).set_index(["regime", "method", "tau"])
    assert table.loc[("sharpen", "SFT", 0.05)].tolist() == [0, 1, 2, 0]
    assert table.loc[("switch", "GRPO", 0.05)].tolist() == [0, 1, 0, 0]
    assert table.loc[("switch", runs.AGAIN, 0.05), "emergent"] == 0.5  # one head more, none less
    assert table.loc[("switch", runs.AGAIN, 0.15), "lost"] == 0


def test_verdicts_follow_from_rows():
    rows = [row for seed in (0, 1, 2) for row in rows_of(seed)]
    judged = runs.judge(rows)
    assert set(judged) == set(claims.load("thinking-sparks"))
    first = judged["sft-makes-more-emergent-heads-than-grpo"]
    assert (first["value"], first["interval"], first["seeds"]) == (2, (2, 2), [0, 1, 2])
    assert first["controls"] == {"noise": (1.5, (1.5, 1.5)), "drift": (2, (2, 2))}
    assert judged["not-only-step-size"]["value"] == 2  # both have 0.1 nats: SFT two heads, GRPO none
    stay = judged["sft-heads-stay"]
    assert (stay["value"], stay["controls"]) == (1, {"grpo": 0, "emerged": 12, "emerged_grpo": 6})
    follow = judged["grpo-churn-follows-reward"]
    assert follow["value"] == pytest.approx(1)
    assert (follow["controls"]["drift"], follow["controls"]["changes"]) == (0, 6)
    matter = judged["emergent-heads-matter"]
    assert matter["value"] == pytest.approx(45.5)
    assert matter["controls"]["mean"][0] == pytest.approx(25.5)
    for claim, arguments in judged.items():
        assert claims.measure(f"thinking-sparks/{claim}", **arguments)["verdict"]


def test_without_any_emergent_head_the_claims_still_have_a_verdict():
    rows = [{**row, "heads": []} for seed in (0, 1) for row in rows_of(seed) if row["operator"] != "ablation"]
    for row in rows:
        row["shares"] = np.ones_like(row["shares"]).tolist()
    verdicts = {
        claim: claims.measure(f"thinking-sparks/{claim}", **arguments)["verdict"]
        for claim, arguments in runs.judge(rows).items()
    }
    assert verdicts["sft-makes-more-emergent-heads-than-grpo"] == "refuted"
    assert {verdicts[claim] for claim in list(verdicts)[2:]} == {"different setting"}


def test_runs_are_matched_at_the_divergence_that_both_reach():
    shares = [[1.0, 0.0]] * 4
    sft, grpo = line("SFT", shares, [0, 0.1, 0.5, 1.0]), line("GRPO", shares, [0, 0.01, 0.04, 0.3])
    assert runs.at_equal_kl(sft, grpo) == (2, 3)
    assert runs.at_equal_kl(grpo, sft) == (3, 2)


def test_student_interval_and_ranks():
    mean, (low, high) = runs.t_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert high - mean == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert low == pytest.approx(2 * mean - high)
    assert runs.t_interval([0, 0, 0, 0, 0]) == (0, (0, 0))
    with pytest.raises(ValueError, match="at least 2"):
        runs.t_interval([1.0])
    assert runs.rank_correlation(np.array([0, 1, 5]), np.array([0.1, 0.2, 0.3])) == pytest.approx(1)
    assert runs.rank_correlation(np.array([2, 2, 2]), np.array([0.1, 0.2, 0.3])) == 0


def test_the_command_writes_a_record_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "PROBLEMS", 20)
    monkeypatch.setattr(runs, "PAIRS_A_STEP", 2)
    monkeypatch.setattr(runs, "SAMPLED", 3)
    path = tmp_path / "thinking-sparks.json"
    options = {"commit": "abc", "command": "tried"}
    runs.write_record(path, [0], TINY, **options)
    first = records.load(path.stem, tmp_path)
    assert first is not None
    assert not [row for row in first.rows if "claim" in row]  # one seed has no interval
    runs.write_record(path, [0, 1], TINY, **options, resume=True)
    record = records.load(path.stem, tmp_path)
    assert record is not None
    assert record.rows[: len(first.rows)] == first.rows
    assert {row["claim"].split("/")[1] for row in record.rows if "claim" in row} == set(claims.load("thinking-sparks"))
    operators = {"noise": 4, "run": 12, "pass": 16}
    counted = [row["operator"] for row in record.rows if "operator" in row]
    assert {name: counted.count(name) for name in operators} == operators
    assert len(runs.moves(record.rows)) == 2 * 2 * 3 * 2
    data = json.loads(path.read_text())
    data["sources"]["circuits/thinking_sparks.py"] = "other"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="start anew"):
        runs.write_record(path, [0, 1], TINY, **options, resume=True)


def test_a_look_at_every_checkpoint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "PROBLEMS", 20)
    monkeypatch.setattr(runs, "PAIRS_A_STEP", 2)
    monkeypatch.setattr(runs, "SAMPLED", 3)
    looks = runs.Looks(seed=0)
    rows, models = runs.measure_regime("sharpen", runs.bases(TINY, 0, ["sharpen"])["sharpen"], TINY, 0, looks)
    assert list(looks.rows) == [(method, at) for method in ("SFT", "GRPO", "drift") for at in (0, 2, 4)]
    assert len(looks.words) == 10
    attention = looks.rows["GRPO", 4]
    assert attention.shape == (2, 2, 10)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    assert looks.patched["SFT", 0].shape == (2, 2)
    assert [checkpoint.updates for checkpoint in models["SFT"]] == [0, 2, 4]
    assert {row["case"] for row in rows} == {"sharpen"}


def test_tables_of_the_page():
    rows = [row for seed in (0, 1) for row in rows_of(seed)]
    for row in rows:
        if row["operator"] == "ablation":
            row["whole"] = 95.0
    table = tables.summary(rows, 0.05)
    assert table.index.tolist()[:4] == [("sharpen", name) for name in ("SFT", "GRPO", "drift", runs.AGAIN)]
    assert table.loc[("sharpen", "SFT"), ["base", "emergent", "lost"]].tolist() == [1, 2, 0]
    assert table.loc[("switch", "SFT"), "|E|"] == pytest.approx((0.25 + 1 + 1) / 3, abs=1e-3)
    cut = tables.ablation_table(rows).set_index(["regime", "how"])
    assert cut.loc[("switch", "zero"), ["runs", "heads", "whole", "without", "random"]].tolist() == [
        2,
        1,
        95,
        40,
        85.25,
    ]
    assert tables.ablation_table([]).empty
    judged = {claim: claims.measure(f"thinking-sparks/{claim}", **made) for claim, made in runs.judge(rows).items()}
    shown = tables.cards([*rows, *judged.values()], "sft-heads-stay", "not-only-step-size")
    assert [card.claim.id for card in shown] == ["sft-heads-stay", "not-only-step-size"]
    assert tables.cards(rows, "sft-heads-stay") == []
    named = tables.newcomers(rows, 0.05)
    assert named.loc[("switch", 1)].tolist() == ["0.1, 0.2", "none", 0]
    by_threshold = tables.newcomers_by_threshold(rows, [0.05])
    sets = tables.new_heads(rows, 0.05).values()
    assert by_threshold.index.tolist() == [0.05]
    assert by_threshold.SFT.item() == sum(len(found["SFT"]) for found in sets)
    assert by_threshold[["GRPO", "in both"]].to_numpy().tolist() == [[0, 0]]
    assert by_threshold["in either"].item() == by_threshold["in first layer"].item() == by_threshold.SFT.item()
    said = tables.findings([*rows, *judged.values()], 0.05)
    assert said[0].startswith(
        "sharpen, means of 2 seeds at a threshold of 5.0%: 2.0 emergent heads after SFT, 0.0 after GRPO, 0.0 after drift, 0.5"
    )
    assert len(said) == 2 + len(claims.load("thinking-sparks"))
