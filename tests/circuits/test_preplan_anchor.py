"""Reading answers with a tiny model, the tests of the rhythm, and the record of the credit rules."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from attnlab import claims, records
from attnlab.circuits import HookedLM, chain_model, rhythm
from attnlab.circuits import preplan_anchor as study
from attnlab.circuits import preplan_anchor_runs as runs
from attnlab.circuits.preplan_anchor import Reading
from attnlab.data import word_problems
from attnlab.data.word_problems import Answer

OPEN, CLOSE = 1, 2


class Chat:
    """As much of a tokenizer with a chat template as reading needs."""

    def convert_tokens_to_ids(self, mark: str) -> int:
        return {"<|im_start|>": OPEN, "<|im_end|>": CLOSE}[mark]

    def decode(self, tokens: list[int]) -> str:
        return f" w{tokens[0]}"

    def apply_chat_template(self, messages, add_generation_prompt: bool, return_dict: bool) -> dict[str, list[int]]:
        assert add_generation_prompt
        assert return_dict
        return {"input_ids": [OPEN, 9, 8, *range(10, 10 + len(messages[0]["content"].split())), CLOSE, 8, OPEN, 7, 8]}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [20 + len(word) for word in text.split()]}


PROMPT = [OPEN, 5, 8, 6, CLOSE, 8, OPEN, 9, 8, 11, 12, 13, 14, CLOSE, 8, OPEN, 7, 8]
TEMPLATE = [*range(9), 13, 14, 15, 16, 17]


def answer(n: int = 30, seed: int = 0) -> Answer:
    return Answer("how much", 3, "text", PROMPT, np.random.default_rng(seed).integers(20, 40, n).tolist())


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookedLM, "tokenizer", Chat())


def full_maps(model: HookedLM, given: Answer) -> torch.Tensor:
    """All maps [L, H, N, N], at once."""
    found: list[torch.Tensor] = []
    study.each_layer(
        model, torch.tensor([[*given.prompt, *given.response]]), lambda layer, maps: found.append(maps.clone())
    )
    return torch.stack(found)


# ----------------------------------------------------------------------------------------------------------- reading


def test_template_columns_leave_the_problem_alone() -> None:
    assert study.template_columns(Chat(), answer()) == TEMPLATE
    with pytest.raises(ValueError, match="has no user message between template marks"):
        study.template_columns(Chat(), answer()._replace(prompt=[5, 6, 7]))


def test_spans_are_means_over_the_answers_for_both_treatments(lm: HookedLM) -> None:
    two = [answer(30, 0), answer(25, 1)]
    spans, first = study.all_spans(lm, two)
    maps = [full_maps(lm, one) for one in two]
    start = len(PROMPT)
    kept = torch.stack([rhythm.head_spans(m, start) for m in maps]).mean(0)
    removed = torch.stack([rhythm.head_spans(rhythm.without_columns(m, TEMPLATE), start) for m in maps]).mean(0)
    torch.testing.assert_close(spans["kept"].float(), kept.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spans["removed"].float(), removed.float(), rtol=1e-5, atol=1e-5)
    assert first == pytest.approx(float(torch.stack([m[:, :, start:, 0].mean() for m in maps]).mean()), rel=1e-5)


def test_a_reading_holds_the_group_means_of_one_pass(lm: HookedLM) -> None:
    given = answer()
    groups = {"kept": ([(0, 1), (2, 3)], [(1, 0), (1, 5)]), "removed": ([(2, 0)], [(0, 0), (2, 2)])}
    read = study.read_answer(lm, given, groups)
    maps = full_maps(lm, given)
    start = len(PROMPT)
    torch.testing.assert_close(read["kept"].local, (maps[0, 1] + maps[2, 3]) / 2)
    torch.testing.assert_close(read["kept"].far, (maps[1, 0] + maps[1, 5]) / 2)
    without = rhythm.without_columns(maps, TEMPLATE)
    torch.testing.assert_close(read["removed"].far, (without[0, 0] + without[2, 2]) / 2)
    reading = read["kept"]
    assert reading.start == start
    assert reading.words == [f" w{token}" for token in given.response]
    np.testing.assert_allclose(reading.waad(5), rhythm.waad(reading.local, 5)[start:].numpy(), atol=1e-5)
    assert np.isnan(reading.fai((10, None))).tolist() == [False] * 20 + [True] * 10


def test_both_alignments_of_the_entropy_are_one_series_shifted(lm: HookedLM) -> None:
    given = answer()
    reading = study.read_answer(lm, given, {"kept": ([(0, 0)], [(0, 1)])})["kept"]
    own, after = reading.entropy["input"], reading.entropy["prediction"]
    assert len(own) == len(after) == len(given.response)
    np.testing.assert_allclose(own[1:], after[:-1])
    tokens = torch.tensor([[*given.prompt, *given.response]])
    with torch.no_grad():
        logits = lm.bridge(tokens)[0].float()
    row = torch.distributions.Categorical(logits=logits[len(PROMPT) - 1]).entropy()  # predicts the first token
    assert own[0] == pytest.approx(float(row), rel=1e-4)


def test_maps_that_a_fused_kernel_does_not_form_are_refused() -> None:
    def run(tokens: torch.Tensor, fwd_hooks: list[Any]) -> None:
        fwd_hooks[0][1](None, hook=None)

    fused = SimpleNamespace(
        spec=SimpleNamespace(n_layers=1), device=torch.device("cpu"), bridge=SimpleNamespace(run_with_hooks=run)
    )
    with pytest.raises(ValueError, match="maps is None: fused attention forms no map"):
        study.each_layer(fused, torch.ones(1, 4, dtype=torch.long), lambda layer, maps: None)  # type: ignore[arg-type]


def test_controls_keep_the_tokens_or_the_form() -> None:
    given = answer()
    mixed = study.shuffled(given, 1)
    assert sorted(mixed.response) == sorted(given.response)
    assert mixed.response != given.response
    assert mixed.prompt == given.prompt
    assert study.shuffled(given, 1) == mixed
    (one,) = study.as_answers(Chat(), [("Describe a tree.", "green and tall")])
    assert one.prompt[:3] == [OPEN, 9, 8]
    assert one.response == [25, 23, 24]


# --------------------------------------------------------------------------------------------------------- the rhythm


def reading(n: int = 90, lag: int = 1, seed: int = 0) -> Reading:
    """A reading whose FAI peaks ``lag`` tokens after its WAAD and whose entropy is high where WAAD is."""
    rng = np.random.default_rng(seed)
    marks = np.sort(rng.choice(np.arange(5, n - 15), 9, replace=False))
    local = torch.eye(n, dtype=torch.float64)
    for t in marks:
        local[t, t], local[t, t - 4] = 0.5, 0.5
    far = torch.eye(n, dtype=torch.float64)
    for t in marks + lag:
        far[t + 10 :, t] = 0.05
    far -= torch.diag(far.sum(-1) - 1)
    entropy = rng.random(n)
    entropy[marks] += 2
    return Reading([f"w{i}" for i in range(n)], 0, local, far, {"input": entropy, "prediction": np.roll(entropy, -1)})


def test_a_planted_rhythm_is_found_and_one_that_lags_is_not() -> None:
    found = study.rhythm_tests([reading(seed=i) for i in range(8)])
    assert found["follows"].value > 0.9
    assert found["follows"].p < 0.01
    assert found["entropy"].value > 1.5
    assert found["entropy"].p < 0.01
    late = study.rhythm_tests([reading(lag=4, seed=i) for i in range(8)])["follows"]
    assert late.value < 0.5


def test_the_table_has_both_treatments_and_both_alignments() -> None:
    some = [reading(seed=i) for i in range(3)]
    table = study.rhythm_table({"kept": some, "removed": some})
    assert len(table) == 6
    assert table.groupby("statistic").size().to_dict() == {study.NAMES["entropy"]: 4, study.NAMES["follows"]: 2}
    row = study.rhythm_row("follows", rhythm.ShiftTest(np.array([0.5, 0.7]), np.linspace(0, 1, 101)), text="x")
    assert row["measured"] == pytest.approx(60)
    assert row["null, 1%"] == pytest.approx(1)
    assert row["null, 99%"] == pytest.approx(99)
    assert row["text"] == "x"


def test_top_words_count_peaks() -> None:
    same = reading()
    words = dict(study.top_words([same, same], lambda r: r.waad()))
    assert set(words.values()) == {2}


def test_stored_answers_are_whole_and_say_how_they_were_made() -> None:
    answers, made = word_problems.load()
    assert len(answers) == runs.WANTED
    assert made["model"] == "smollm2-135m-instruct"
    asked = dict(word_problems.PROBLEMS)
    for stored in answers:
        assert asked[stored.problem] == stored.result
        assert runs.SHORTEST <= len(stored.response) <= runs.LONGEST
    with pytest.raises(ValueError, match=r"path: no.json holds no stored answers .*; make it with --answers"):
        word_problems.load(Path("no.json"))


# ------------------------------------------------------------------------------------------------------------ records


def made_rows(gains: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {"case": "credit", "impl": rule, "seed": seed, "score": 50 + gain + seed % 2, "after": 80.0, "seconds": 1.0}
        for rule, gain in gains.items()
        for seed in runs.SEEDS
    ]


def test_gains_are_paired_by_seed() -> None:
    rows = made_rows({"uniform": 0.0, "random": 1.0, "coupled": 3.0})
    rows[-1]["score"] += 1  # one seed of coupled
    mean, (low, high) = runs.paired(rows, "coupled", "random")
    error = 2 * np.std([2, 2, 2, 2, 3], ddof=1) / np.sqrt(5)
    assert mean == pytest.approx(2.2)
    assert (low, high) == pytest.approx((2.2 - error, 2.2 + error))
    table = runs.credit_table(rows)
    assert table.loc["random", "over random credit"] == 0
    assert table.loc["coupled", "seeds"] == 5
    with pytest.raises(ValueError, match=r"coupled has seeds \[0, 1, 2, 3\], random \[0, 1, 2, 3, 4\]"):
        runs.paired(rows[:-1], "coupled", "random")
    with pytest.raises(ValueError, match="at least two, the same"):
        runs.paired([row for row in rows if row["seed"] == 0], "coupled", "random")


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.0, "refuted"), (2.0, "confirmed"), (-3.0, "refuted"), (9.0, "confirmed")]
)
def test_no_gain_is_both_confirmed_and_refuted(gain: float, verdict: str) -> None:
    rows = made_rows({"uniform": 0.0, "random": 0.0, "coupled": gain})
    rows[-1]["score"] += 0.1
    rows[-2]["score"] -= 0.1
    assert runs.judged(rows)["verdict"] == verdict


def test_a_record_is_written_with_what_it_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = chain_model.Task(operands=3, width=16)
    base = task.model().eval()
    monkeypatch.setattr(runs, "TASK", task)
    monkeypatch.setattr(chain_model, "load_base", lambda: (base, "abc"))
    path = tmp_path / "preplan-anchor.json"
    chosen = ["--rules", "uniform", "random", "coupled", "--seeds", "0", "1", "--iterations", "2"]
    runs.main(["--record", str(path), *chosen, "--commit", "0123abc"])
    record = records.load("preplan-anchor", tmp_path)
    assert record is not None
    assert record.command.endswith("--record records/preplan-anchor.json " + " ".join(chosen))
    assert record.changed() == []
    assert all(record.sources.values())
    cases = [row.get("case") for row in record.rows]
    assert cases == ["base"] + ["credit"] * 6 + [None]
    assert record.rows[-1]["claim"] == "preplan-anchor/coupled-credit"
    assert record.rows[-1]["seeds"] == [0, 1]
    assert all(len(row["curve"]) == 2 for row in record.rows if row.get("case") == "credit")
    assert json.loads(path.read_text())["commit"] == "0123abc"
    runs.main(["--record", str(path), *chosen[:4], "local", *chosen[4:], "--commit", "later"])
    again = records.load("preplan-anchor", tmp_path)
    assert again is not None
    assert again.rows[:5] + again.rows[7:9] == record.rows[:7], "runs that are there were made anew"
    assert [row.get("impl") for row in again.rows[5:]] == ["local", "local", "coupled", "coupled", None]


def test_the_base_is_saved_where_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "TASK", chain_model.Task(operands=3, width=16, steps=2, batch=4))
    runs.main(["--base", str(tmp_path / "models" / "base.safetensors")])
    model, digest = chain_model.load_base(tmp_path / "models" / "base.safetensors")
    assert digest
    assert model.settings["d_model"] == 16


def test_the_command_wants_something_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runs.main([])
    assert "nothing to do; give --answers, --base or --record" in capsys.readouterr().err


def test_the_record_of_this_checkout_gives_the_verdict_that_it_tells() -> None:
    record = records.load("preplan-anchor")
    if record is None:
        pytest.skip("not made yet")
    rows = [row for row in record.rows if row.get("case") == "credit"]
    (judged,) = [row for row in record.rows if "claim" in row]
    again = runs.judged(rows)
    assert again["verdict"] == judged["verdict"]
    assert again["value"] == pytest.approx(judged["value"])
    assert judged["rule_hash"] == claims.get(judged["claim"]).rule_hash
