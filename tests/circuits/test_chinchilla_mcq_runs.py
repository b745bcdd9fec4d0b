"""The command that trains the small models, and the study over them: what is kept, what is refused, what is chosen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from attnlab import records
from attnlab.circuits import HookedLM
from attnlab.circuits import chinchilla_mcq_runs as runs
from attnlab.circuits import chinchilla_mcq_study as study
from attnlab.circuits.subspaces import fit_heads


@pytest.fixture
def tiny(monkeypatch):
    """Families that train in a second."""
    monkeypatch.setattr(runs, "SIZES", {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_mlp": 8})
    monkeypatch.setattr(runs, "BATCH", 4)
    short = {
        name: dataclasses.replace(family, steps=51, seeds=(0, 1))
        for name, family in runs.FAMILIES.items()
        if name != "order"
    }
    monkeypatch.setattr(runs, "FAMILIES", short)
    return short


def test_training_keeps_models_and_says_where_they_come_from(tiny, tmp_path, capsys):
    folder = tmp_path / "models"
    runs.train(folder, "abc", ["list"])
    record = records.load("chinchilla-mcq-models", tmp_path)
    assert [row["file"] for row in record.rows] == [f"chinchilla-mcq-list-{seed}.safetensors" for seed in (0, 1)]
    assert all(runs.digest(folder / row["file"]) == row["sha256"] for row in record.rows)
    assert record.rows[0]["layout"] == "list"
    assert set(record.rows[0]["accuracy"]) >= {"ABCD", "shuffled", "random"}
    assert len(runs.load_models("list", folder)) == 2
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    runs.train(folder, "abc", ["list"])  # all are there
    assert capsys.readouterr().out == ""
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_equal_seeds_make_equal_models(tiny):
    first, second = (runs.train_one(tiny["eight"], 1, progress=False)[0].state_dict() for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)


def test_models_that_are_not_there_are_refused_with_the_command(tmp_path):
    with pytest.raises(ValueError, match=r"chinchilla-mcq-list-0.safetensors is not in .*--train records/models"):
        runs.load_models("list", tmp_path)
    with pytest.raises(ValueError, match="mixed, order, list, eight are known, not 'lines'"):
        runs.load_models("lines", tmp_path)


def test_the_command_teaches_with_its_settings_and_records(monkeypatch, tmp_path, capsys):
    asked = []

    def lesson_of(lesson, seed, device, keep):
        asked.append((lesson.steps, lesson.lr, seed, device, keep.name))
        return {"seed": seed, "before": {}, "after": {}, "seconds": 1.0, "heads": []}

    monkeypatch.setattr(runs, "finetune_one", lesson_of)
    out = tmp_path / "chinchilla-mcq-finetune.json"
    runs.main(
        [
            "--finetune",
            str(out),
            "--seeds",
            "4",
            "5",
            "--steps",
            "7",
            "--lr",
            "0.01",
            "--device",
            "cpu",
            "--commit",
            "abc",
        ]
    )
    assert asked == [(7, 0.01, seed, "cpu", f"chinchilla-mcq-smollm2-{seed}.safetensors") for seed in (4, 5)]
    record = records.load(out.stem, tmp_path)
    assert [row["seed"] for row in record.rows] == [4, 5]
    assert record.command.endswith("--finetune records/chinchilla-mcq-finetune.json --seeds 4 5 --steps 7 --device cpu")
    assert not record.changed()


def test_the_shipped_models_are_those_of_their_records():
    rows = [
        row
        for name in ("chinchilla-mcq-models", "chinchilla-mcq-mixed")
        if (record := records.load(name)) is not None
        for row in record.rows
    ]
    digests = {row["file"]: row["sha256"] for row in rows}
    for family in ("mixed", "order", "list"):
        for seed in runs.FAMILIES[family].seeds:
            path = runs.model_path(family, seed)
            assert path.is_file()
            assert runs.digest(path) == digests[path.name]
            assert path.stat().st_size < 500_000


@pytest.fixture(scope="module")
def trained() -> study.Small:
    """One shipped model that does the task."""
    return study.Small("list", 0, HookedLM(runs.load_models("list")[0].bridge("list-0")))


def test_prompts_to_fit_and_to_measure_on_are_not_the_same(trained):
    fit, measure = trained.drawn("ABCD", study.FIT), trained.drawn("ABCD")
    assert (fit.tokens != measure.tokens).any(1).mean() > 0.9
    np.testing.assert_array_equal(measure.tokens, trained.drawn("ABCD").tokens)


def test_crossed_prompts_make_place_letter_and_right_independent(trained):
    sheet = study.crossed(trained, copies=1)
    for line in range(4):
        letters = sheet.labels[sheet.gold == line]
        for place in range(4):
            assert len(set(letters[:, place].unique(return_counts=True)[1].tolist())) == 1
    for row in study.key_shares(trained):
        assert row["place"] + row["letter"] + row["right or wrong"] + row["rest"] == pytest.approx(1.0)


def test_whole_heads_lose_nothing_and_empty_ones_do(trained):
    size = trained.model.spec.d_head
    assert trained.lost("ABCD", dict.fromkeys("qkv", size)) == 0
    assert trained.lost("ABCD", dict.fromkeys("qkv", 0)) > 20
    assert trained.lost("ABCD", {}) == 0


def test_an_interval_runs_over_the_seeds(trained):
    found = study.over_seeds([trained, trained], lambda small: float(small.seed))
    assert found == {"value": 0.0, "interval": (0.0, 0.0)}
    assert study.control([trained], lambda small: 3.0) == (3.0, (3.0, 3.0))


def test_too_few_prompts_to_fit_on_are_refused(trained):
    from attnlab.circuits.chinchilla_mcq import Sheet

    with pytest.raises(ValueError, match="too few for 16 dimensions"):
        fit_heads(trained.model, Sheet.of(trained.drawn("ABCD", n=40)), trained.heads[:1])
