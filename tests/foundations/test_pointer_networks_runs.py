"""The tasks, a training run, verdicts from known scores, and a record that goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from attnlab import claims, records
from attnlab.foundations import pointer_networks_runs as runs
from attnlab.foundations import pointer_tasks as tasks
from attnlab.foundations import pointer_verdicts as verdicts
from attnlab.foundations.geometry import IGNORE


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_targets_of_a_task_are_perfect_answers(name):
    task, points = tasks.TASKS[name], tasks.instances(7, 20)
    targets = task.targets(points)
    assert targets.shape[1] <= task.longest(7)
    scores = task.score(points, np.where(targets == IGNORE, 0, targets))
    perfect = {"hull": ("exact", 1), "delaunay": ("coverage", 1), "tour": ("excess", 0)}[name]
    assert scores[perfect[0]] == pytest.approx(perfect[1])


def test_a_batch_is_of_one_size_and_repeats_with_its_seed():
    setting = tasks.Setting("tour", smallest=4, largest=6, batch=5, pool=12)
    points, targets = setting.first_batch(3)
    assert points.shape[0] == 5
    assert 4 <= points.shape[1] <= 6
    assert targets.shape == (5, points.shape[1] + 1)
    assert (setting.first_batch(3)[0] == points).all()
    assert tasks.pool("tour", 4, 12)[0] is tasks.pool("tour", 4, 12)[0]


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_a_few_updates_lower_the_loss(kind):
    run = tasks.Setting(smallest=5, largest=5, width=16, steps=60, batch=16).train(kind, 1)
    assert np.mean(run.loss[-5:]) < np.mean(run.loss[:5])
    rows = tasks.rows_of(run, "hull", (4, 5), count=8)
    assert [row["n"] for row in rows] == [4, 5]
    assert all(0 <= row["exact"] <= row["simple"] <= 1 for row in rows)


def test_a_tour_that_is_none_is_refused():
    with pytest.raises(ValueError, match="not every row visits every point once"):
        tasks.tour_scores(tasks.instances(4, 1), np.array([[1, 2, 2, 4, 0]]))
    with pytest.raises(ValueError, match="kind='bigram' is unknown; use one of fixed softmax"):
        tasks.Setting().build("bigram")


def test_verdicts_take_the_numbers_that_they_say():
    rows = [
        {"kind": kind, "seed": seed, "n": n, "exact": base + seed / 100}
        for kind, base in ((tasks.POINTER, 0.7), (tasks.ATTENTION, 0.4), (tasks.SOFTMAX, 0.1))
        for seed in (0, 1, 2)
        for n in (5, 10)
    ]
    judged = verdicts.three_lstms(rows)
    assert judged["value"] == pytest.approx(71)
    assert judged["interval"] == pytest.approx((70, 72))
    assert judged["controls"]["softmax"][0] == pytest.approx(11)
    assert claims.measure("pointer-networks/ordering", **judged)["verdict"] == "confirmed"
    assert verdicts.three_lstms(rows, n=5) == judged
    with pytest.raises(ValueError, match="n=50: no row of blending attention, fixed softmax, pointer; ask for a size"):
        verdicts.three_lstms(rows, n=50)


def test_the_rule_of_the_order_sees_one_seed_at_the_papers_size():
    record = records.load("pointer-networks-paper")
    judged = verdicts.three_lstms(verdicts.score_rows(record, "hull 50"), n=50)
    assert judged["interval"] == pytest.approx((72.4, 72.4))
    assert claims.measure("pointer-networks/ordering", **judged, seeds=[0])["verdict"] == "confirmed"


def test_verdicts_of_one_network_take_the_numbers_that_they_say():
    exact, by = np.array([True, True, False, False] * 10), np.array([4.0, 3.0, 2.0, 1.0] * 10)
    assert verdicts.halves(exact, by)[0] == 100
    assert verdicts.halves(exact, -by)[0] == -100

    value, (low, high) = verdicts.above(np.full(20, 1.1), np.ones(20))
    assert (value, low, high) == pytest.approx((10, 10, 10))
    scores = {"length": np.full(9, 2.2), "excess": np.full(9, 0.1), "greedy excess": np.full(9, 0.2)}
    judged = verdicts.short_tours(scores)
    assert judged["value"] == pytest.approx(10)
    assert judged["controls"]["nearest"][0] == pytest.approx(20)
    scores["over nearest"] = np.full(9, 0.05)
    assert verdicts.tours_break(scores, scores)["value"] == pytest.approx(5)


def test_tables_print_fail_where_the_paper_does():
    paper = verdicts.paper_table()
    assert len(paper) == 11
    assert (paper["area %"] == "FAIL").sum() == 2
    scores = [{"n": 10, "exact": 0.5, "simple": simple, "area": 0.998} for simple in (1.0, 0.9)]
    rows = [
        {"case": "hull", "impl": kind, "seed": 0, "points": [5, 10], "scores": [score]}
        for kind, score in zip((tasks.POINTER, tasks.SOFTMAX), scores, strict=True)
    ]
    record = runs.records.Record("r", "c", "c", "d", {"gpu": None, "cpus": 1}, {}, rows, {})
    assert verdicts.hull_table(record).to_numpy().tolist() == [
        [tasks.POINTER, "5-10", 10, 50.0, "99.8"],
        [tasks.SOFTMAX, "5-10", 10, 50.0, "FAIL (99.8 of 90%)"],
    ]


def test_triangles_and_tours_stand_beside_the_papers():
    rows = [
        {"case": "hull 50", "impl": tasks.POINTER, "points": [50, 50], "scores": [{"n": 50, "exact": 0.5}]},
        {
            "case": "delaunay 5",
            "impl": tasks.POINTER,
            "points": [5, 5],
            "scores": [{"n": 5, "exact": 0.75, "coverage": 0.9}],
        },
        {
            "case": "tour",
            "impl": tasks.SET,
            "points": [5, 10],
            "scores": [{"n": 12, "length": 3.1, "excess": 0.012}, {"n": 20, "length": 4.0}],
        },
    ]
    table = verdicts.other_tasks(runs.records.Record("r", "c", "c", "d", {"gpu": None, "cpus": 1}, {}, rows, {}))
    assert table.to_numpy().tolist() == [
        ["delaunay", tasks.POINTER, "5", 5, "75.0 % exact, 90.0 % of the triangles", "80.7 %, 93.0 %"],
        ["tour", tasks.SET, "5-10", 12, "length 3.10, 1.2 % above the optimum", ""],
        ["tour", tasks.SET, "5-10", 20, "length 4.00", "length 3.88, 1.3 %"],
    ]


def test_an_untrained_network_has_no_area_to_speak_of():
    with pytest.raises(ValueError, match="answers are simple polygons; train it longer"):
        verdicts.beyond_trained(torch_seeded(), count=20)


def torch_seeded():
    torch.manual_seed(0)
    return tasks.Setting(width=4).build(tasks.POINTER)


def test_a_record_goes_on_where_it_stopped_and_gives_its_networks_back(tmp_path):
    path, parts = tmp_path / "tiny.json", runs.SIZES["tiny"][1:]
    options = {"models": tmp_path, "device": "cpu", "commit": "c", "command": "d"}
    assert not runs.make_record(path, parts, limit_s=-1, **options)
    assert not path.exists()
    assert runs.make_record(path, parts[:1], limit_s=1e9, **options)
    first = json.loads(path.read_text())["rows"]
    assert runs.make_record(path, parts, limit_s=1e9, **options)
    rows = json.loads(path.read_text())["rows"]
    assert rows[: len(first)] == first
    assert [row["case"] for row in rows] == ["tour", "delaunay"]
    record = runs.records.load("tiny", tmp_path)
    assert record is not None
    assert not record.changed()
    assert verdicts.score_rows(record, "tour")[0]["n"] == 5
    solver = runs.load("tour", tasks.POINTER, folder=tmp_path)
    again = tasks.means(tasks.evaluate(solver, "tour", tasks.instances(5, 1000)))
    assert again["length"] == pytest.approx(rows[0]["scores"][0]["length"])
    with pytest.raises(
        ValueError, match=r"pointer-networks-hull-pointer-0\.safetensors is not there; make it with python -m"
    ):
        runs.load("hull", tasks.POINTER, folder=tmp_path)


def test_networks_are_trained_side_by_side_and_stand_in_their_order(tmp_path):
    alone, beside = tmp_path / "alone.json", tmp_path / "beside.json"
    parts = [dataclasses.replace(part, kinds=(tasks.POINTER,), seeds=(0,)) for part in runs.SIZES["tiny"]]
    options = {"models": None, "device": "cpu", "commit": "c", "command": "d"}
    assert runs.make_record(alone, parts, **options)
    assert runs.make_record(beside, parts, workers=2, **options)
    one, two = (json.loads(path.read_text())["rows"] for path in (alone, beside))
    assert [row | {"seconds": 0} for row in two] == [row | {"seconds": 0} for row in one]
    assert not runs.make_record(tmp_path / "none.json", parts, workers=1, limit_s=-1, **options)


def test_the_command_wants_a_device_that_exists(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("here it does")
    with pytest.raises(SystemExit):
        runs.main(["--record", str(tmp_path / "x.json"), "--device", "cuda"])
    assert "there is no such device here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        runs.main(["--record", str(tmp_path / "x.json"), "--workers", "0"])
    assert "--workers 0: at least 1" in capsys.readouterr().err
    assert runs.thinned([1.0, 3.0, 5.0, 7.0], points=2) == [[2, 2.0], [4, 6.0]]
