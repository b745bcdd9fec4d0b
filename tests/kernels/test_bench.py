"""The benchmark without a GPU: its plumbing on tiny shapes, its arithmetic, and that nobody who fails or wins is hidden."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from attnlab.kernels import records
from attnlab.kernels.bench import measure, peers, problems, report
from attnlab.kernels.bench.__main__ import lacking, main
from attnlab.kernels.bench.peers import Implementation, Run
from attnlab.kernels.bench.registry import CASES, MAIN, MANY_ROWS, NARROW, OPERATORS, TINY

LIGHTNING, GATES, AAREN, FLOW, UNDECAYED = CASES
BANDWIDTH = 4.27e12  # bytes a second of an H200


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The record of a whole run without a GPU."""
    folder = tmp_path_factory.mktemp("records")
    assert main(["--out", str(folder / "kernels.json"), "--commit", "abc"]) == 0
    return json.loads((folder / "kernels.json").read_text()), folder


def problem_of(case, shape=TINY[0]):
    return case.draw(shape, torch.Generator().manual_seed(0), torch.float32)


def rows_of(case, implementation, shape=TINY[0]):
    problem = problem_of(case, shape)
    return measure.measure(case, problem, implementation, lambda: measure.exact_results(case, problem), BANDWIDTH)


def made_up(call, **options) -> Implementation:
    """A peer of the lightning case that answers with `call(q, k, v)`."""

    def prepare(problem):
        x = problem.copies()
        return Run(lambda: call(x["q"], x["k"], x["v"]), x)

    return Implementation("peer", prepare, devices=("cpu",), **options)


def test_every_operator_is_measured_in_both_passes(finished):
    record, _ = finished
    seen = {(row["operator"], row["case"], row["pass"]) for row in record["rows"] if row["impl"] == "attnlab"}
    assert seen == {(case.operator, case.name, name) for case in CASES for name in measure.PASSES}
    assert {tuple(row["shape"].values()) for row in record["rows"]} == {(2, 96, 2, 16, 16), (1, 70, 2, 12, 20)}


def test_every_row_has_time_rates_and_errors(finished):
    record, _ = finished
    for row in record["rows"]:
        assert 0 < row["ms20"] <= row["ms"] <= row["ms80"], row
        assert min(row["gbps"], row["tflops"], row["floor_share"], row["floor_ms"]) > 0, row
        assert row["error"] == max(row["errors"].values()) < 2e-6, row
        wanted = {"aaren_scan": {"o", "ds", "dv"}, "scalar_gated": {"o", "dq", "dk", "dv", "dlog_decay"}}
        both = wanted.get(row["operator"], {"o", "dq", "dk", "dv"})
        assert set(row["errors"]) == (both if row["pass"] == "forward+backward" else {"o"})


def test_the_record_says_where_it_comes_from(finished):
    record, folder = finished
    assert record["commit"] == "abc"
    assert record["command"].startswith("python -m attnlab.kernels.bench --out ")
    assert record["machine"]["gpu"] is None
    assert record["machine"]["copy_gbps"] > 0
    assert record["versions"]["torch"] == torch.__version__
    assert record["settings"]["FLA_TILELANG"] == "0"
    assert "stopped" not in record
    assert record["lacks"] == []
    loaded = records.load("kernels", folder)
    assert loaded is not None
    assert loaded.changed() == []
    assert "kernels/decay_sweep.py" in loaded.sources
    assert len(loaded.frame()) == len(record["rows"])


def test_measured_files_exist():
    assert all(records.digests(report.sources_of(OPERATORS)).values())


def test_a_budget_stops_between_shapes_and_still_writes(tmp_path, capsys):
    main(["--operators", "linear_decay", "--budget", "0", "--out", str(tmp_path / "cut.json")])
    record = json.loads((tmp_path / "cut.json").read_text())
    assert record["rows"] == []
    assert record["stopped"].endswith("before linear_decay, lightning decay, B=2 T=96 H=2 K=16 V=16")
    told = capsys.readouterr().out
    assert record["stopped"] in told
    assert "complete" not in told
    assert "linear_decay, lightning decay, attnlab: 2 of 2 shapes" in record["lacks"]
    assert all(line.startswith("linear_decay, ") for line in record["lacks"])
    assert set(record["sources"]) == set(report.SOURCES_OF["linear_decay"])


def test_unknown_operators_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--operators", "magic"])
    assert "invalid choice: 'magic'" in capsys.readouterr().err


def test_a_peer_that_is_not_there_has_a_row_that_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", None)
    for row in rows_of(LIGHTNING, peers.fla("chunk_simple_gla", "g_gamma")):
        assert row["failed"].startswith("ModuleNotFoundError: ")
        assert "ms" not in row


def test_a_peer_that_fails_on_the_way_keeps_what_it_finished():
    def no_backward(q, k, v):
        if torch.is_grad_enabled():
            raise RuntimeError("no backward for this head size\nand a long explanation")
        return v

    forward, both = rows_of(LIGHTNING, made_up(no_backward))
    assert forward["ms"] > 0
    assert both["failed"] == "RuntimeError: no backward for this head size"


def test_a_wrong_peer_shows_its_error():
    """Outputs twice too large: a relative error of 1."""
    attend = problems.linear_reference
    problem = problem_of(LIGHTNING)

    def doubled(q, k, v):
        return 2 * attend(replace(problem, tensors=problem.tensors | {"q": q, "k": k, "v": v}))

    for row in rows_of(LIGHTNING, made_up(doubled)):
        assert all(error == pytest.approx(1, abs=1e-5) for error in row["errors"].values())


def test_nan_is_a_failure_and_not_a_time():
    for row in rows_of(LIGHTNING, made_up(lambda q, k, v: v * torch.nan)):
        assert row["failed"].startswith("ArithmeticError: NaN or infinite values in o")


def test_another_function_has_a_time_and_no_error():
    for row in rows_of(LIGHTNING, made_up(lambda q, k, v: q + k + v, same=False)):
        assert row["ms"] > 0
        assert row["error"] is None


def test_a_quadratic_peer_that_would_take_too_long_is_skipped():
    """2 T (K + V) / 2 operations a token and head forward, at 600 TFLOP/s: 29 ms at 64k tokens and 16 heads of 128."""
    implementation = made_up(lambda q, k, v: v, quadratic=True)
    expected = [measure._expected_ms(replace(problem_of(LIGHTNING), shape=shape), implementation) for shape in MAIN]
    assert expected[-1][0] == pytest.approx(29.3, abs=0.1)
    assert expected[-1][1] == pytest.approx(102.6, abs=0.1)
    assert expected[2][1] < measure.SLOWEST_MS < expected[3][1]


def test_a_skipped_pass_has_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(measure, "SOFTMAX_FLOPS", 2e7)
    forward, both = rows_of(LIGHTNING, made_up(lambda q, k, v: v, quadratic=True))
    assert forward["ms"] > 0
    assert both["skipped"] == "about 206 ms a call, more than 60"


def test_least_cost_of_the_main_heads():
    """Floors of 0.25 ms forward and 0.69 ms in all at 4.27 TB/s; 98,304 operations and 1024 bytes a token and head."""
    forward, backward = problems.linear_cost(MAIN[0], 2)
    assert forward == (1024, 98_304)
    assert forward.bytes * MAIN[0].rows / BANDWIDTH == pytest.approx(0.25e-3, rel=0.01)
    assert (forward.bytes + backward.bytes) * MAIN[0].rows / BANDWIDTH == pytest.approx(0.69e-3, rel=0.01)
    assert backward.flops == 2 * 64 * 5 * 128 + 10 * 128 * 128
    gated, gated_backward = problems.gated_cost(MAIN[0], 2)
    assert (gated.bytes, gated_backward.bytes) == (forward.bytes + 4, backward.bytes + 8)
    scan, _ = problems.aaren_cost(MANY_ROWS, 2)
    assert scan.bytes * MANY_ROWS.rows / 4.3e12 == pytest.approx(0.254e-3, rel=0.01)


def test_rates_follow_from_the_least_cost():
    row = measure._speed(LIGHTNING, problem_of(LIGHTNING), CASES[0].implementations[0], True, (2.0, 1.0, 3.0), 1e9)
    cost = [sum(x) * TINY[0].rows for x in zip(*problems.linear_cost(TINY[0], 4), strict=True)]
    assert (row["ms"], row["ms20"], row["ms80"]) == (2.0, 1.0, 3.0)
    assert row["gbps"] == pytest.approx(cost[0] / 2e-3 / 1e9)
    assert row["tflops"] == pytest.approx(cost[1] / 2e-3 / 1e12)
    assert row["floor_share"] == pytest.approx(cost[0] / 1e9 / 2e-3)


def test_the_registry_holds_what_is_to_be_measured():
    assert OPERATORS == ("linear_decay", "scalar_gated", "aaren_scan", "causal_flow")
    assert {shape.B * shape.T for shape in (*MAIN, *NARROW)} == {65_536}
    assert {(shape.H, shape.K, shape.V) for shape in (*MAIN, *NARROW)} == {(16, 128, 128), (8, 64, 64), (32, 64, 64)}
    for case in CASES:
        names = [x.name for x in case.implementations]
        assert names[0] == peers.OURS
        assert len(set(names)) == len(names)
        assert case.shapes("cpu", quick=False) == TINY
        assert set(case.shapes("cuda", quick=True)) < set(case.shapes("cuda", quick=False))
    assert MANY_ROWS in AAREN.shapes("cuda", quick=True)


def test_who_compiles_stands_apart_and_only_at_the_main_heads():
    for case in CASES:
        for shape in case.shapes("cuda", quick=False):
            first = case.standing(shape, "cuda", compiles=False)
            assert first[0].name == peers.OURS
            for late in case.standing(shape, "cuda", compiles=True):
                assert late not in first
                assert shape in (*MAIN, MANY_ROWS)
    assert [x.name for x in LIGHTNING.standing(MAIN[0], "cuda", compiles=True)] == ["flex_attention, softmax"]
    assert LIGHTNING.standing(MAIN[-1], "cuda", compiles=True) == []


@pytest.mark.parametrize("case", [LIGHTNING, UNDECAYED, GATES], ids=["lightning", "none", "gates"])
def test_fla_gets_the_same_scale_decay_and_layout(case, monkeypatch):
    """A stand-in for the library that computes from what it is handed."""
    problem = problem_of(case)

    def attend(q, k, v, layer_idx=None, num_layers=None, *, scale, **decay):
        assert set(decay) <= {"g", "g_gamma"}
        log_decay = next(iter(decay.values()), torch.zeros(q.shape[2]))
        if layer_idx is not None:
            log_decay = -(8 / q.shape[2] * (1 - layer_idx / num_layers)) * torch.arange(q.shape[2])
        given = {"q": q, "k": k, "v": v, "log_decay": log_decay.to(q.dtype)}
        return problems.linear_reference(replace(problem, tensors=given, scale=scale)), None

    names = ("chunk_simple_gla", "fused_chunk_simple_gla", "chunk_lightning_attn")
    for module in ("fla.ops.simple_gla", "fla.ops.lightning_attn"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**dict.fromkeys(names, attend)))
    libraries = [x for x in case.implementations if x.name.startswith("fla")]
    assert len(libraries) == (3 if case is LIGHTNING else 2)
    for implementation in libraries:
        for row in rows_of(case, implementation):
            assert row["error"] < 2e-6, row


def test_the_repeated_query_computes_what_aaren_computes():
    for row in rows_of(AAREN, peers.sdpa("MATH", repeated=True)):
        assert row["error"] < 2e-6, row
        assert set(row["errors"]) <= {"o", "dv"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gets_the_decays_as_biases(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda form, **options: form)
    problem = problem_of(LIGHTNING)
    q, k, v, decay = (problem.tensors[name] for name in ("q", "k", "v", "log_decay"))
    age = torch.arange(96)[:, None] - torch.arange(96)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * problem.scale + decay[:, None, None] * age
    wanted = torch.einsum("bhts,bshv->bthv", scores.masked_fill(age < 0, -torch.inf).softmax(-1), v)
    run = peers.flex(MAIN).prepare(replace(problem, wanted=()))  # its backward exists on a GPU only
    torch.testing.assert_close(run.call(), wanted)


def test_normalised_linear_attention_gets_sigmoid_features(monkeypatch):
    seen = []

    def attend(q, k, v, *, scale, normalize):
        seen.append((q.detach(), k.detach(), scale, normalize))
        return q + k + v, None

    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", SimpleNamespace(chunk_linear_attn=attend))
    problem = problem_of(FLOW)
    for row in rows_of(FLOW, peers.fla_normalised()):
        assert row["ms"] > 0
        assert row["error"] is None
    q, k, scale, normalize = seen[0]
    assert torch.equal(q, problem.tensors["q"].sigmoid())
    assert torch.equal(k, problem.tensors["k"].sigmoid())
    assert (scale, normalize) == (1.0, True)


def row(impl, ms=None, *, same=True, name="forward", **more):
    shape = {"B": 64, "T": 1024, "H": 16, "K": 128, "V": 128}
    head = {"operator": "linear_decay", "case": "lightning decay", "dtype": "bfloat16", "shape": shape, "pass": name}
    times = {} if ms is None else {"ms": ms, "floor_share": 0.5, "error": 2e-3}
    return head | {"impl": impl, "same": same} | times | more


def test_the_table_shows_who_wins():
    table = report.tables(
        [
            row("attnlab", 0.4),
            row("fla chunk_simple_gla", 0.8),
            row("fla chunk_lightning_attn", 0.7),
            row("SDPA flash, softmax", 0.2, same=False),
            row("SDPA cudnn, softmax", failed="RuntimeError: no such backend"),
            row("attnlab", failed="OutOfMemoryError: too large", name="forward+backward"),
            row("flex_attention, softmax", skipped="about 70 ms a call, more than 60", name="forward+backward"),
        ]
    )
    lines = table.splitlines()
    assert lines[0] == "linear_decay, lightning decay, bfloat16"
    assert "fla chunk_lightning_attn 0.700 ms (ours 1.75x)" in lines[2]
    assert "SDPA flash, softmax 0.200 ms (the peer wins, ours 0.50x)" in lines[2]
    assert lines[3].split() == ["B=64", "T=1024", "H=16", "K=128", "V=128", "forward+backward", "-"]
    assert "  SDPA cudnn, softmax: RuntimeError: no such backend (1 x)" in lines
    assert "  attnlab: OutOfMemoryError: too large (1 x)" in lines
    assert "  flex_attention, softmax: skipped: about 70 ms a call, more than 60 (1 x)" in lines


def test_the_table_tells_who_wins_without_the_host():
    table = report.tables(
        [
            row("attnlab", 0.8, graph_ms=0.2),
            row("fla chunk_simple_gla", 0.4, graph_ms=0.3),
            row("fla chunk_lightning_attn", 0.5, graph_ms=None),
        ]
    )
    assert "0.400 ms (the peer wins, ours 0.50x, 1.50x without the host)" in table


@pytest.mark.parametrize(("found", "wanted"), [(0.25, 0.25), (RuntimeError("operation not permitted"), None)])
def test_a_graph_is_timed_where_it_can_be_caught(found, wanted, monkeypatch):
    testing = pytest.importorskip("triton.testing")
    asked = []

    def replayed(call, rep, *, grad_to_none, return_mode):
        asked.append((rep, grad_to_none, return_mode))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(testing, "do_bench_cudagraph", replayed)
    leaf = torch.zeros(1, requires_grad=True)
    assert measure.graph_time(lambda: None, iter([leaf])) == wanted
    assert asked == [(measure.GRAPH_MS, [leaf], "median")]


def test_the_command_names_the_records_folder_only():
    given = ["--out", "/somewhere/private/linear.json", "--quick"]
    assert report._in_records(given) == ["--out", "records/linear.json", "--quick"]
    assert report._in_records(["--quick", "--resume", "/tmp/a.json"]) == ["--quick", "--resume", "records/a.json"]
    assert report._in_records(["--out"]) == ["--out"]


def test_a_stopped_record_goes_on(finished, tmp_path):
    whole, _ = finished
    first = tmp_path / "first.json"
    kept = [row for row in whole["rows"] if row["operator"] != "scalar_gated"]
    first.write_text(json.dumps(whole | {"rows": kept}))
    assert main(["--resume", str(first), "--out", str(tmp_path / "o.json")]) == 0
    record = json.loads((tmp_path / "o.json").read_text())
    assert record["rows"][: len(kept)] == kept
    assert {row["operator"] for row in record["rows"][len(kept) :]} == {"scalar_gated"}
    assert len(record["rows"]) == len(whole["rows"])
    assert record["command"].count("attnlab.kernels.bench") == 2


def test_an_operator_whose_code_changed_is_measured_anew(finished, tmp_path):
    whole, _ = finished
    first = tmp_path / "first.json"
    old = whole["sources"] | {"kernels/flow_gates.py": "other"}
    first.write_text(json.dumps(whole | {"sources": old, "commit": "older"}))
    assert main(["--resume", str(first), "--out", str(tmp_path / "o.json"), "--commit", "newer"]) == 0
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert len(rows) == len(whole["rows"])
    assert {(row["operator"], row["impl"]) for row in rows if row["commit"] == "newer"} == {("causal_flow", "attnlab")}


def test_a_resumed_run_tells_what_it_still_lacks(finished, tmp_path, capsys):
    """A budget had cut gates off, and cuts them off again."""
    whole, _ = finished
    first, second = (tmp_path / f"{name}.json" for name in ("first", "second"))
    cut = [row for row in whole["rows"] if row["operator"] != "scalar_gated"]
    first.write_text(json.dumps(whole | {"rows": cut, "stopped": "after 9 s, before scalar_gated, gates, TINY"}))
    gates = ["scalar_gated, gates, attnlab: 2 of 2 shapes", "scalar_gated, gates, torch parallel: 2 of 2 shapes"]

    main(["--resume", str(first), "--out", str(second), "--budget", "0"])
    record, told = json.loads(second.read_text()), capsys.readouterr().out
    assert record["lacks"] == gates
    assert "complete" not in told
    assert all(line in told for line in gates)

    main(["--resume", str(second), "--out", str(second)])
    assert json.loads(second.read_text())["lacks"] == []
    assert capsys.readouterr().out.endswith("complete\n")


def test_rows_of_other_operators_are_refused(finished, tmp_path):
    """What they depend on would not be in the record."""
    whole, _ = finished
    path = tmp_path / "whole.json"
    path.write_text(json.dumps(whole))
    with pytest.raises(
        ValueError, match=r"whole\.json has rows of aaren_scan, linear_decay, scalar_gated; name all its"
    ):
        main(["--operators", "causal_flow", "--resume", str(path), "--out", str(tmp_path / "o.json")])


def test_a_shape_that_nobody_measured_is_counted(finished):
    whole, _ = finished
    some = [row for row in whole["rows"] if row["operator"] != "aaren_scan" or row["shape"]["T"] == 96]
    wanted = [x.name for late in (False, True) for x in AAREN.standing(TINY[1], "cpu", compiles=late)]
    assert lacking(some, "cpu") == [f"aaren_scan, one query, {name}: 1 of 2 shapes" for name in wanted]
    assert "aaren_scan, one query, SDPA flash, query repeated: 13 of 13 shapes" in lacking([], "cuda")


def test_every_operator_tells_what_it_depends_on():
    assert set(report.SOURCES_OF) == set(OPERATORS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions": {}}, "other versions"),
        ({"machine": {"gpu": "X"}}, "made on X"),
    ],
)
def test_records_of_different_things_are_not_mixed(finished, tmp_path, change, message):
    first = tmp_path / "first.json"
    first.write_text(json.dumps(finished[0] | change))
    with pytest.raises(ValueError, match=message):
        main(["--resume", str(first), "--out", str(tmp_path / "o.json")])
