"""The circuits explorer: charts, the panel walked over its controls, cancel and interrupt, what it saves, and the static twin."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from attnlab.circuits import HookedLM, Pair, Pairs, ungrouped
from attnlab.circuits.work import EdgeWork, EvaluationWork, HeadWork
from attnlab.figures.explore import CircuitPanel, charts, explorer_chart, study
from attnlab.figures.explore.canvas import exported
from attnlab.figures.explore.job import Job, Once
from attnlab.figures.explore.prompts import table, tokens_html
from attnlab.figures.twin import choices, static_html
from attnlab.models import pretrained

TEXT = """clean,corrupt,answer,foil
t2 t3 t4 t5,t2 t9 t4 t5,t6,t7
t8 t3 t4 t5 t6,t8 t9 t4 t5 t6,t10,t7
t12 t3 t14 t5,t12 t9 t14 t5,t6,t11
"""


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    """Charts as pictures: no browser hears of clicks here, and bundling its scripts takes seconds."""
    monkeypatch.setattr("attnlab.figures.explore.canvas._interactive", lambda: False)


@pytest.fixture(scope="module")
def model() -> HookedLM:
    return HookedLM(pretrained.tiny())


@pytest.fixture
def panel(model) -> CircuitPanel:
    return CircuitPanel(model, TEXT)


def finished(panel: CircuitPanel, job) -> CircuitPanel:
    assert job is not None, panel.status.value
    panel.wait()
    assert "done" in panel.status.value, panel.status.value
    return panel


@pytest.fixture
def full(panel) -> CircuitPanel:
    """A panel with everything computed."""
    for action in (panel.score_heads, panel.patch_heads, panel.find_circuit, panel.measure):
        finished(panel, action())
    return panel


# ------------------------------------------------------------------------------------------------------- prompts


def test_good_pairs_are_marked_and_their_tokens_shown(panel):
    assert len(panel.pairs) == 3
    assert panel.prompts.report.value.count("✓") == 3
    assert "t9" in panel.tokens.value
    assert panel.tokens.value.count("#E69F00") == 2  # the one token that differs, in both prompts


def test_what_is_wrong_stands_beside_its_row_and_the_text_stays(panel):
    text = TEXT + "t2 t3,t2,t6,t7\nt2,t3,,t7\n"
    panel.prompts.text.value = text
    panel.prompts.check_button.click()
    report = panel.prompts.report.value
    rows = {part.split('"')[1]: part for part in report.split("<tr data-row=")[1:]}
    assert "clean has 2 tokens and corrupt 1" in rows["4"]
    assert "answer: the cell is empty" in rows["5"]
    assert "✓" in rows["1"]
    assert "5 rows, 2 to correct" in report
    assert panel.prompts.text.value == text
    assert panel.pairs is None
    assert panel.score_heads() is None
    assert "tab 1 says what is wrong" in panel.status.value


def upload(panel, name: str, content: bytes) -> None:
    panel.prompts.upload.value = (
        {"name": name, "type": "", "size": len(content), "content": content, "last_modified": datetime.now(UTC)},
    )


def test_a_file_is_loaded_and_can_be_taken_back(panel):
    rows = [{"clean": "t2 t4", "corrupt": "t3 t4", "answer": "t6", "foil": "t7"}]
    upload(panel, "mine.json", json.dumps(rows).encode())
    assert len(panel.pairs) == 1
    assert panel.prompts.upload.value == ()
    panel.prompts.back.click()
    assert panel.prompts.text.value == TEXT
    assert len(panel.pairs) == 3


def test_a_bad_file_changes_nothing_in_the_box(panel):
    panel.prompts.text.value = "what I typed"
    upload(panel, "mine.csv", "clean,corrupt\nä".encode("latin-1"))
    assert panel.prompts.text.value == "what I typed"
    assert "it is not UTF-8" in panel.prompts.report.value
    assert "mine.csv was not loaded" in panel.prompts.report.value


def test_the_example_comes_and_goes(panel):
    panel.prompts.example.click()
    assert "Mary" in panel.prompts.text.value
    assert panel.pairs is None  # not words of this model
    panel.prompts.back.click()
    assert len(panel.pairs) == 3


def test_text_cannot_become_markup():
    rows, problems = table([], []), tokens_html(["<b>"], ["</b>"])
    assert rows == ""
    assert "<b></b>" not in problems
    assert "&lt;b&gt;" in problems


def test_without_a_model_text_is_checked_but_nothing_runs():
    panel = CircuitPanel(None, TEXT)
    panel.prompts.check()
    assert "no model is loaded" in panel.prompts.report.value
    for action in (panel.score_heads, panel.patch_heads, panel.find_circuit, panel.measure):
        assert action() is None
        assert "Load a model first" in panel.status.value


def test_a_model_is_loaded_by_its_button_and_a_failure_is_said(model):
    panel = CircuitPanel(None, TEXT, loader=lambda name: model)
    panel.load_button.click()
    panel.wait()
    assert panel.model is model
    assert len(panel.pairs) == 3

    def broken(name: str) -> HookedLM:
        raise ValueError("no weights here")

    panel = CircuitPanel(None, TEXT, loader=broken)
    panel.load_button.click()
    panel.wait()
    assert "failed: no weights here" in panel.status.value
    assert not panel.load_button.disabled


# ------------------------------------------------------------------------------------------------- the whole way


def test_everything_from_prompts_to_faithfulness(full):
    assert full.bar.value == full.bar.max
    assert full.heads is not None
    assert len(full.exact.groups) == len(full.chosen.value)
    assert "Faithfulness" in full.worth.value
    for canvas in (full.attention_canvas, full.map_canvas, full.exact_canvas, full.graph_canvas, full.curve_canvas):
        assert "aria" in canvas.widget.children[0].value or "img" in canvas.widget.children[0].value


def test_callbacks_hold_over_the_grid_of_their_controls(full):
    for view in choices(full.view):
        full.view.value = view
        for side in choices(full.side):
            full.side.value = side
            for prompt in range(full.prompt.max + 1):
                full.prompt.value = prompt
                for token in choices(full.from_token):
                    full.from_token.value = token
            for head in choices(full.head)[::5]:
                full.head.value = head
                assert f"Head {head}" in json.dumps(full.attention_canvas.chart.to_dict())
    for size in choices(full.size):
        full.size.value = size
        assert full.circuit is None or len(full.circuit) <= size
    for metric in choices(full.metric):
        for position in choices(full.positions):
            full.metric.value, full.positions.value = metric, position
            finished(full, full.score_heads())
            finished(full, full.patch_heads())
    for ablation in choices(full.ablation):
        full.ablation.value = ablation
        finished(full, full.measure())


def test_the_attention_shown_is_that_of_the_model(panel):
    panel.head.value, panel.prompt.value, panel.side.value = "1.3", 1, "corrupt"
    (batch,) = panel.pairs.subset([1]).batches()
    run = panel.model.run(batch.corrupt, capture=("pattern",))
    expected = run.acts["pattern", 1][0, 3, -1].numpy()
    shown = panel.attention_canvas.chart.to_dict()
    (data,) = shown["datasets"].values()
    np.testing.assert_allclose([row["attention"] for row in data], expected, atol=1e-4)


def test_a_click_on_the_map_looks_at_a_head_and_selects_it(full):
    full.chosen.value = ("0.0",)
    full._picked("1.2")
    assert full.head.value == "1.2"
    assert set(full.chosen.value) == {"0.0", "1.2"}


def test_a_click_of_a_browser_arrives(full, monkeypatch):
    monkeypatch.undo()  # the live kind of chart
    monkeypatch.delenv("ATTNLAB_BOOK", raising=False)
    pytest.importorskip("anywidget")
    finished(full, full.score_heads())
    (live,) = full.map_canvas.widget.children
    live._vl_selections = {"pick": {"value": {"vlPoint": {"or": [{"head": "1.4"}]}, "head": ["1.4"]}, "store": []}}
    assert full.head.value == "1.4"
    assert "1.4" in full.chosen.value


def test_new_pairs_clear_old_results(full):
    full.prompts.text.value = TEXT.rsplit("t12", 1)[0]
    full.prompts.text.value = "\n".join(TEXT.splitlines()[:2])
    full.prompts.check()
    assert full.heads is None
    assert full.circuit is None
    assert full.prompt.max == 0
    assert full.measure() is None


def test_one_pair_is_enough(model):
    panel = CircuitPanel(model, "\n".join(TEXT.splitlines()[:2]))
    for action in (panel.score_heads, panel.patch_heads, panel.find_circuit, panel.measure):
        finished(panel, action())
    assert "one pair, no interval" in panel.worth.value


def test_a_second_button_waits_its_turn(panel):
    gate = threading.Event()
    panel._start(Once("waiting", gate.wait), lambda _: None)
    assert panel.score_button.disabled
    assert not panel.cancel_button.disabled
    assert panel.score_heads() is None
    assert "Something is running" in panel.status.value
    gate.set()
    panel.wait()
    assert not panel.score_button.disabled


def test_what_is_saved_says_how_it_was_measured(full):
    """Not how the menus stand by then."""
    full.ablation.value, full.metric.value = "resample", "prob_diff"
    finished(full, full.measure())
    full.ablation.value, full.metric.value = "zero", "logit_diff"
    saved = json.loads(full._savable()["circuit"].text("json"))["eval"]
    assert (saved["ablation"], saved["metric"]) == ("resample", "prob_diff")
    assert "prob_diff, resample ablation" in full.worth.value
    assert full.curve_canvas.chart.to_dict()["title"]["subtitle"] == "prob_diff, resample ablation"
    table = full._savable()["faithfulness table"]
    assert set(zip(table.metric, table.ablation, strict=True)) == {("prob_diff", "resample")}


def test_every_chart_of_scores_names_their_metric(full):
    full.metric.value = "prob_diff"
    finished(full, full.patch_heads())
    green, grey = full.exact_canvas.chart.to_dict()["title"]["subtitle"]
    assert "prob_diff, positions END" in green
    assert "logit_diff, positions all" in grey
    for canvas in (full.map_canvas, full.graph_canvas):
        assert "logit_diff" in canvas.chart.to_dict()["title"]["subtitle"]


def in_its_first_step(monkeypatch, act: Callable[[], object]) -> None:
    """Let something happen while the first step of any work runs."""
    for kind in (HeadWork, EdgeWork, EvaluationWork):

        def stepping(self, plain=kind.steps):
            for count, done in enumerate(plain(self)):
                if count == 0:
                    act()
                yield done

        monkeypatch.setattr(kind, "steps", stepping)


@pytest.mark.parametrize("action", ["score_heads", "patch_heads", "find_circuit", "measure"])
def test_a_result_of_pairs_that_were_replaced_is_not_kept(full, action, monkeypatch):
    full.prompts.text.value = "\n".join(TEXT.splitlines()[:2])
    in_its_first_step(monkeypatch, full.prompts.check)
    getattr(full, action)()
    full.wait()
    assert "not kept, since its pairs changed while it ran" in full.status.value
    assert (full.heads, full.exact, full.edges, full.evaluation) == (None,) * 4
    assert not full.measure_button.disabled


def test_a_result_of_a_circuit_that_was_replaced_is_not_kept(full, monkeypatch):
    with monkeypatch.context() as patch:
        in_its_first_step(patch, lambda: setattr(full.size, "value", 25))
        full.measure()
        full.wait()
    assert "not kept, since its circuit changed while it ran" in full.status.value
    assert full.evaluation is None
    assert full.worth.value == ""
    assert "faithfulness" not in json.loads(full._savable()["circuit"].text("json"))["eval"]
    finished(full, full.measure())


# ------------------------------------------------------------------------------------------- cancel and interrupt


class Slow:
    """Work of many short steps."""

    name, total, done = "slow work", 1000, 0

    def steps(self):
        while self.done < self.total:
            time.sleep(0.005)
            self.done += 1
            yield self.done

    def result(self):
        return "all"


def test_cancel_is_heard_and_nothing_is_lost(full):
    before = full.heads
    full._start(Slow(), lambda _: pytest.fail("cancelled work has no result"))
    full.cancel_button.click()
    full.wait()
    assert "cancelled, nothing was changed" in full.status.value
    assert full.heads is before
    assert full.job.work.done < Slow.total
    finished(full, full.score_heads())  # and the panel goes on


@pytest.mark.parametrize("action", ["score_heads", "patch_heads", "find_circuit", "measure"])
def test_real_work_can_be_cancelled(full, action, monkeypatch):
    """In its first step, so that no later one may follow."""
    in_its_first_step(monkeypatch, full.cancel)
    before = full.heads, full.exact, full.edges, full.evaluation
    job = getattr(full, action)()
    full.wait()
    assert job.work.total > 1
    assert job.work.done == 1
    assert "cancelled, nothing was changed" in full.status.value
    assert all(a is b for a, b in zip(before, (full.heads, full.exact, full.edges, full.evaluation), strict=True))
    assert not full.job.running
    assert full.cancel_button.disabled


def test_an_interrupt_of_the_kernel_leaves_the_panel_usable(panel, monkeypatch):
    job = panel._start(Slow(), lambda _: pytest.fail("interrupted work has no result"))
    plain, seen = job.thread.join, []

    def join(timeout=None):
        if not seen:
            seen.append(True)
            raise KeyboardInterrupt
        return plain(timeout)

    monkeypatch.setattr(job.thread, "join", join)
    panel.wait()
    assert "cancelled" in panel.status.value
    assert not job.running
    finished(panel, panel.score_heads())


def test_an_error_in_a_thread_reaches_the_panel(panel):
    def broken():
        raise RuntimeError("out of <memory>")

    panel._start(Once("loading", broken), lambda _: None)
    panel.wait()
    assert "loading failed: out of &lt;memory&gt;" in panel.status.value
    assert not panel.score_button.disabled


def test_a_job_tells_its_steps_and_the_time_left():
    told, results = [], []
    work = Slow()
    work.total = 5
    job = Job(
        work,
        on_step=lambda *step: told.append(step),
        on_result=results.append,
        on_cancel=lambda: None,
        on_error=lambda error: None,
        lock=threading.RLock(),
    )
    job.start().wait()
    assert [done for done, *_ in told] == [1, 2, 3, 4, 5]
    assert told[-1][2] == 0
    assert results == ["all"]


# ------------------------------------------------------------------------------------------------------- saving


def test_everything_can_be_saved_in_every_format(full, tmp_path: Path):
    full.save.folder.value = str(tmp_path)
    starts = {"svg": b"<svg", "png": b"\x89PNG", "html": b"<!DOCTYPE html", "csv": b"", "json": b"{", "dot": b"digraph"}
    written = set()
    for what in choices(full.save.what):
        full.save.what.value = what
        for form in choices(full.save.form):
            if form == "html" and what != "circuit graph":
                continue  # the scripts are bundled anew each time
            full.save.form.value = form
            full.save.button.click()
            path = tmp_path / f"{what.replace(' ', '-')}.{form}"
            assert path.read_bytes().lstrip().startswith(starts[form]), full.save.note.value
            assert "download=" in full.save.note.value
            written.add(path.suffix)
    assert written == {".svg", ".png", ".html", ".csv", ".json", ".dot"}
    assert "https://" not in (tmp_path / "circuit-graph.html").read_text().split("<script", 1)[0]


def test_saving_replaces_nothing_unasked_and_says_what_failed(full, tmp_path: Path):
    full.save.folder.value = str(tmp_path)
    full.save.what.value = "circuit"
    (tmp_path / "circuit.json").write_text("mine")
    assert full.save.save() is None
    assert "exists; tick" in full.save.note.value
    assert (tmp_path / "circuit.json").read_text() == "mine"
    full.save.replace.value = True
    assert full.save.save() == tmp_path / "circuit.json"
    full.save.folder.value = str(tmp_path / "none")
    assert full.save.save() is None
    assert "not saved" in full.save.note.value


def test_an_unknown_format_is_refused(full):
    with pytest.raises(ValueError, match="form='pdf' is unknown; use one of svg, png, html"):
        exported(full.map_canvas.chart, "pdf")


# ------------------------------------------------------------------------------------------------ book and charts


def test_the_book_shows_the_state_and_no_widget(full, monkeypatch):
    monkeypatch.setenv("ATTNLAB_BOOK", "1")
    bundle = full._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    assert "attnlab-chart" in bundle["text/html"]
    assert "comes alive" in bundle["text/html"]


def test_a_live_notebook_gets_the_widget(panel, monkeypatch):
    monkeypatch.delenv("ATTNLAB_BOOK", raising=False)
    assert any("widget" in kind for kind in panel._repr_mimebundle_())


def test_a_strip_breaks_into_lines_that_fit():
    frame = charts.strip_frame(["word", " another"] * 20 + ["\n", "end"])
    assert frame.x2.max() <= charts.STRIP_WIDTH
    assert frame.line.is_monotonic_increasing
    assert frame.token.iloc[-2] == "↵"
    assert frame.x.iloc[-1] == 0


def test_an_empty_circuit_is_refused(full):
    from attnlab.circuits import Graph

    with pytest.raises(ValueError, match="graph is empty; take more edges"):
        charts.circuit_chart(Graph.empty(full.edges.wiring))


def test_the_static_twin_holds_every_task_head_and_edge(model, monkeypatch):
    monkeypatch.setenv("ATTNLAB_BOOK", "1")
    rows = [line.split(",") for line in TEXT.splitlines()[1:]]
    pairs = Pairs("words", model.tokenizer, [Pair(c, k, [a], [f]) for c, k, a, f in rows])
    wide = ungrouped(model)
    studies = [study(name, model, wide, pairs, pairs, steps=2, drawn=n) for name, n in (("one", 30), ("two", 60))]
    chart = explorer_chart(studies)
    spec = chart.properties(description="x").to_dict()
    tables = list(spec["datasets"].values())
    assert sum(1 for table in tables for row in table if "a" in row) == 2 * len(model.spec.heads)
    edges = [row for table in tables for row in table if "src" in row]
    assert len(edges) == sum(len(one.circuit) for one in studies)
    assert "two" in static_html(chart.properties(description="x"))
    with pytest.raises(ValueError, match="studies is empty"):
        explorer_chart([])
