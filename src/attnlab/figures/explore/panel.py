"""The circuits explorer of a live notebook: widgets over the functions that the chapters use.

Prompts go in, tokens and attention, head scores, exact patching, a circuit and its faithfulness come out. Every button is a
method that can be called without a browser. Long work runs in a thread (:mod:`~attnlab.figures.explore.job`), so Cancel is heard
and an interrupted kernel leaves the panel as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as w
import numpy as np

from attnlab import lab
from attnlab.circuits import pair_files
from attnlab.circuits.edges import EdgeScores
from attnlab.circuits.graph import Graph
from attnlab.circuits.metrics import METRICS
from attnlab.circuits.model import HookedLM, Node
from attnlab.circuits.pairs import Pairs
from attnlab.circuits.report import Report, choose, with_interval
from attnlab.circuits.scores import Scores
from attnlab.circuits.ungroup import ungrouped
from attnlab.circuits.work import SMOOTH, EdgeWork, Evaluation, EvaluationWork, HeadWork
from attnlab.figures.explore import charts
from attnlab.figures.explore.canvas import Canvas
from attnlab.figures.explore.job import Job, Once, Stepwise
from attnlab.figures.explore.prompts import PromptBox, tokens_html
from attnlab.figures.explore.save import SaveBox
from attnlab.figures.twin import NOTE, WIDGET, static_html
from attnlab.lab import in_book
from attnlab.models import pretrained

SIZES = (25, 50, 100, 200, 400, 800, 1600)  # edges in a circuit that is still worth looking at
WIDE = w.Layout(width="95%")
WRAP = w.Layout(flex_flow="row wrap", align_items="center")


def load(name: str) -> HookedLM:
    """The model on the GPU if there is one, in float32."""
    return HookedLM(pretrained.load(name, device=lab.device()))


class CircuitPanel:
    """The panel; ``panel.widget`` is what a notebook shows.

    Args:
        model: shown at once; without it the reader loads one.
        text: the pairs to begin with.
        loader: how a name becomes a model.
    """

    def __init__(
        self,
        model: HookedLM | None = None,
        text: str = pair_files.EXAMPLE,
        loader: Callable[[str], HookedLM] = load,
    ) -> None:
        self.loader, self.lock = loader, threading.RLock()  # the lock: one run of the model at a time
        self.model: HookedLM | None = None
        self.pairs: Pairs | None = None
        self.heads: Scores | None = None
        self.exact: Scores | None = None
        self.edges: EdgeScores | None = None
        self.circuit: Graph | None = None
        self.evaluation: Evaluation | None = None
        self.job: Job | None = None
        self._wide: HookedLM | None = None
        self._patterns: tuple[Any, np.ndarray] | None = None
        self._build(text)
        if model is not None:
            self._use(model)

    # ------------------------------------------------------------------------------------------------ what is on it

    def _build(self, text: str) -> None:
        states = pretrained.available()
        names = [(f"{name} ({state})", name) for name, state in states.items()]
        self.model_choice = w.Dropdown(options=names, description="model", layout=w.Layout(width="330px"))
        self.load_button = _button("Load", self.load_model)
        self.cancel_button = w.Button(description="Cancel", icon="stop", disabled=True, button_style="warning")
        self.cancel_button.on_click(lambda _: self.cancel())
        self.bar = w.IntProgress(value=0, max=1, layout=w.Layout(width="180px"))
        self.status = w.HTML()
        self.prompts = PromptBox(self._new_pairs, text)
        self.prompt = w.BoundedIntText(0, min=0, max=0, description="pair")
        self.side = w.ToggleButtons(options=["clean", "corrupt"])
        self.tokens = w.HTML()
        self.head = w.Dropdown(options=[("-", "")], description="head")
        self.view = w.ToggleButtons(options=[("from one token", "row"), ("whole pattern", "all")])
        self.from_token = w.Dropdown(options=[("last", -1)], description="from")
        self.attention_canvas, self.map_canvas, self.exact_canvas = Canvas(), Canvas(), Canvas()
        self.graph_canvas, self.curve_canvas = Canvas(), Canvas()
        self.metric = w.Dropdown(options=list(SMOOTH), description="metric")
        self.score_button = _button("Score all heads", self.score_heads)
        self.chosen = w.SelectMultiple(options=[], description="heads", rows=8)
        self.positions = w.Dropdown(options=["END", "all"], description="positions")
        self.patch_button = _button("Patch them exactly", self.patch_heads)
        self.steps = w.BoundedIntText(5, min=1, max=64, description="IG steps")
        self.find_button = _button("Find the circuit", self.find_circuit)
        self.size = w.SelectionSlider(options=SIZES, value=100, description="edges", continuous_update=False)
        self.ablation = w.Dropdown(options=["resample", "mean", "zero"], description="ablation")
        self.measure_button = _button("Measure faithfulness", self.measure)
        self.worth = w.HTML()
        self.save = SaveBox(self._savable)
        for control in (self.prompt, self.side):
            control.observe(lambda _: self._show_prompt(), "value")
        for control in (self.head, self.view, self.from_token):
            control.observe(lambda _: self._show_attention(), "value")
        self.size.observe(lambda _: self._show_circuit(), "value")
        self.widget = self._laid_out()
        self._actions = [self.load_button, self.score_button, self.patch_button, self.find_button, self.measure_button]

    def _laid_out(self) -> w.VBox:
        def row(*children: Any) -> w.HBox:
            return w.HBox(children, layout=WRAP)

        looking = w.VBox(
            [
                row(self.prompt, self.side),
                self.tokens,
                row(self.head, self.view, self.from_token),
                self.attention_canvas.widget,
            ]
        )
        scoring = w.VBox(
            [
                row(self.metric, self.score_button),
                row(
                    self.map_canvas.widget,
                    w.VBox([self.chosen, self.positions, self.patch_button, self.exact_canvas.widget]),
                ),
            ]
        )
        graph = w.VBox(
            [
                row(self.steps, self.find_button, self.size),
                self.graph_canvas.widget,
                row(self.ablation, self.measure_button),
                self.worth,
                self.curve_canvas.widget,
            ]
        )
        titles = ("1 Prompts", "2 Tokens and attention", "3 Heads", "4 Circuit", "5 Save")
        self.tabs = w.Tab([self.prompts.widget, looking, scoring, graph, self.save.widget], titles=titles)
        head = row(self.model_choice, self.load_button, self.bar, self.cancel_button, self.status)
        return w.VBox([head, self.tabs], layout=WIDE)

    # ------------------------------------------------------------------------------------------------- what it does

    def load_model(self) -> Job | None:
        """Load the chosen model."""
        name = self.model_choice.value
        return self._start(Once(f"loading {name}", lambda: self.loader(name)), self._use)

    def score_heads(self) -> Job | None:
        """First-order scores of all heads."""
        if (pairs := self._ready()) is None or self.model is None:
            return None
        work = HeadWork(self.model, pairs, metric=METRICS[self.metric.value], batch_size=8)
        return self._start(work, self._got_heads, "pairs")

    def patch_heads(self) -> Job | None:
        """Exact scores of the selected heads."""
        if (pairs := self._ready()) is None or self.model is None:
            return None
        if self.heads is None or not self.chosen.value:
            return self._refuse("Score all heads first, then select some of the list.")
        how: dict[str, Any] = {"metric": METRICS[self.metric.value], "positions": self.positions.value, "batch_size": 8}
        work = HeadWork(self.model, pairs, "patch", heads=self.chosen.value, **how)
        return self._start(work, self._got_exact, "pairs")

    def find_circuit(self) -> Job | None:
        """Edge scores and the circuit of the strongest."""
        if (pairs := self._ready()) is None:
            return None
        how: dict[str, Any] = {"metric": METRICS[self.metric.value], "steps": self.steps.value}
        return self._start(EdgeWork(self._ungrouped(), pairs, **how), self._got_edges, "pairs")

    def measure(self) -> Job | None:
        """Faithfulness of the circuit that is shown, and the curve over sizes."""
        if (pairs := self._ready()) is None:
            return None
        if self.edges is None or self.circuit is None:
            return self._refuse("Find the circuit first.")
        how: dict[str, Any] = {"metric": METRICS[self.metric.value], "ablation": self.ablation.value}
        work = EvaluationWork(self._ungrouped(), self.circuit, self.edges, pairs, **how)
        return self._start(work, self._got_evaluation, "pairs", "circuit")

    def cancel(self) -> None:
        """Stop what runs, after its present step."""
        if self.job is not None and self.job.running:
            self.job.cancel()
            self._say("stopping after this step ...")

    def wait(self) -> None:
        """Wait for what runs; an interrupt of the kernel cancels it and leaves the panel usable."""
        if self.job is not None:
            self.job.wait()

    def _start(self, work: Stepwise, use: Callable[[Any], None], *basis: str) -> Job | None:
        """Run work and use its result, unless an attribute of ``basis`` was replaced meanwhile: the result is of the old one."""
        if self.job is not None and self.job.running:
            return self._refuse("Something is running; wait for it or cancel it.")
        before = {name: getattr(self, name) for name in basis}
        self.bar.max, self.bar.value, self.bar.bar_style = work.total, 0, "info"
        self._busy(True)
        self._say(f"{work.name} ...")

        def step(done: int, total: int, left: float | None) -> None:
            self.bar.value = done
            rest = f", about {left:.0f} s left" if left is not None and left >= 1 else ""
            self._say(f"{work.name}: step {done} of {total}{rest}")

        def result(found: Any) -> None:
            if changed := [name for name, old in before.items() if getattr(self, name) is not old]:
                self._end(
                    "warning", f"{work.name}: not kept, since its {changed[0]} changed while it ran; start it again"
                )
                return
            use(found)
            self._end("success", f"{work.name}: done")

        def failed(error: BaseException) -> None:
            self._end("danger", f"{work.name} failed: {error}", wrong=True)

        self.job = Job(
            work,
            on_step=step,
            on_result=result,
            on_cancel=lambda: self._end("warning", f"{work.name}: cancelled, nothing was changed"),
            on_error=failed,
            lock=self.lock,
        )
        return self.job.start()

    def _end(self, style: str, text: str, wrong: bool = False) -> None:
        self.bar.bar_style = style
        self._busy(False)
        self._say(text, wrong)

    def _busy(self, busy: bool) -> None:
        self.cancel_button.disabled = not busy
        for button in self._actions:
            button.disabled = busy

    def _say(self, text: str, wrong: bool = False) -> None:
        colour = "; color: #a63d00" if wrong else ""
        self.status.value = f'<span style="white-space: normal{colour}">{escape(text)}</span>'

    def _refuse(self, text: str) -> Any:
        """Say why nothing happens; None for the caller to return."""
        self._say(text, wrong=True)
        return None

    def _ready(self) -> Pairs | None:
        if self.model is None:
            return self._refuse("Load a model first.")
        if self.pairs is None:
            return self._refuse("The pairs cannot be used yet; tab 1 says what is wrong.")
        return self.pairs

    def _ungrouped(self) -> HookedLM:
        if self._wide is None:
            assert self.model is not None
            with self.lock:
                self._wide = ungrouped(self.model)
        return self._wide

    # --------------------------------------------------------------------------------------------- what came out of it

    def _use(self, model: HookedLM) -> None:
        self.model, self._wide, self._patterns = model, None, None
        self.prompts.tokenizer = model.tokenizer
        self.prompts.context = getattr(model.bridge.cfg, "n_ctx", None)
        self.head.options = [str(node) for node in model.spec.heads]
        self._say(f"{model.spec.name} on {model.device}: {model.spec.n_layers} layers of {model.spec.n_heads} heads")
        self.prompts.check()

    def _new_pairs(self, pairs: Pairs | None) -> None:
        self.pairs, self._patterns = pairs, None
        self.heads = self.exact = self.edges = self.circuit = self.evaluation = None
        self.chosen.options = []
        self.worth.value = ""
        for canvas, text in (
            (self.map_canvas, "Press <b>Score all heads</b>."),
            (self.exact_canvas, ""),
            (self.graph_canvas, "Press <b>Find the circuit</b>."),
            (self.curve_canvas, ""),
            (self.attention_canvas, ""),
        ):
            canvas.say(text)
        if pairs is not None:
            self.prompt.max = len(pairs) - 1
            self._show_prompt()
        self.save.refresh()

    def _show_prompt(self) -> None:
        if self.pairs is None:
            return
        number = self.prompt.value
        clean, corrupt = (self._words(number, side) for side in ("clean", "corrupt"))
        self.tokens.value = tokens_html(clean, corrupt)
        before = self.from_token.value
        words = clean if self.side.value == "clean" else corrupt
        self.from_token.options = [("last", -1), *((f"{i} {word!r}", i) for i, word in enumerate(words))]
        self.from_token.value = before if before is not None and before < len(words) else -1
        self._show_attention()

    def _words(self, number: int, side: str) -> list[str]:
        assert self.pairs is not None
        text = getattr(self.pairs.pairs[number], side)
        ids = self.pairs.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.pairs.tokenizer.decode([token]) for token in ids]

    def _pattern(self) -> np.ndarray:
        """All patterns of the prompt that is shown, ``[n_layers, n_heads, T, T]``."""
        assert self.pairs is not None
        assert self.model is not None
        key = (self.pairs.digest, self.prompt.value, self.side.value)
        if self._patterns is None or self._patterns[0] != key:
            (batch,) = self.pairs.subset([self.prompt.value]).batches()
            with self.lock:
                run = self.model.run(getattr(batch, self.side.value), capture=("pattern",))
            self._patterns = key, run.stack("pattern")[:, 0].detach().float().cpu().numpy()
        return self._patterns[1]

    def _show_attention(self) -> None:
        if self.pairs is None or self.model is None or not self.head.value:
            return
        node = Node.parse(self.head.value)
        words = self._words(self.prompt.value, self.side.value)
        pattern = self._pattern()[node.layer, node.head]
        if self.view.value == "all":
            self.attention_canvas.show(charts.pattern_chart(words, pattern, f"Head {node}"))
        else:
            start = self.from_token.value
            title = f"Head {node}: where {words[start]!r} looks"
            self.attention_canvas.show(charts.attention_strip(words, pattern[start], title))
        self.save.refresh()

    def _got_heads(self, scores: Scores) -> None:
        self.heads, self.exact = scores, None
        order = charts.head_order(scores)
        self.chosen.options, self.chosen.value = order, tuple(order[:8])
        self.head.value = order[0]
        self.map_canvas.show(charts.head_map(scores), {"pick": self._picked})
        self.exact_canvas.say("")
        self.save.refresh()

    def _picked(self, head: str) -> None:
        """A click on the map: look at that head, and select it for patching."""
        if self.heads is None or head not in self.chosen.options:
            return
        self.head.value = head
        self.chosen.value = tuple(h for h in self.chosen.options if h == head or h in self.chosen.value)

    def _got_exact(self, scores: Scores) -> None:
        assert self.heads is not None
        self.exact = scores
        self.exact_canvas.show(charts.exact_chart(self.heads, scores))
        self.save.refresh()

    def _got_edges(self, scores: EdgeScores) -> None:
        self.edges = scores
        self._show_circuit()

    def _show_circuit(self) -> None:
        if self.edges is None:
            return
        self.evaluation, self.worth.value = None, ""
        self.curve_canvas.say("")
        try:
            self.circuit = choose(self._ungrouped(), self.edges, min(self.size.value, self.edges.wiring.n_edges))
            self.graph_canvas.show(charts.circuit_chart(self.circuit, self.edges))
        except ValueError as error:
            self.circuit = None
            self.graph_canvas.say(escape(str(error)))
        self.save.refresh()

    def _got_evaluation(self, found: Evaluation) -> None:
        self.evaluation = found
        self.worth.value = (
            f"<p>Faithfulness <b>{with_interval(found.faithfulness)}</b>, completeness <b>{found.completeness:.2f}</b> "
            f"({escape(found.measured)}), on the pairs that the circuit was found on, which flatters it.</p>"
        )
        self.curve_canvas.show(charts.curve_chart(found, self.size.value))
        self.save.refresh()

    def _savable(self) -> dict[str, Any]:
        """What can be saved now: charts, tables and the circuit, by name."""
        canvases = {
            "attention": self.attention_canvas,
            "head map": self.map_canvas,
            "exact patching": self.exact_canvas,
            "circuit graph": self.graph_canvas,
            "faithfulness curve": self.curve_canvas,
        }
        found: dict[str, Any] = {name: canvas.chart for name, canvas in canvases.items() if canvas.chart is not None}
        if self.heads is not None:
            found["head scores"] = self.heads.frame()
        if self.exact is not None:
            found["exact scores"] = self.exact.frame()
        if self.edges is not None:
            found["edge scores"] = self.edges.to_frame()
        if self.evaluation is not None:
            how = {"metric": self.evaluation.metric, "ablation": self.evaluation.ablation}
            found["faithfulness table"] = self.evaluation.curve.frame.assign(**how)
        if self.circuit is not None and self.edges is not None and self.pairs is not None:
            made = {"batch_size": 8, "device": self._ungrouped().device.type}
            found["circuit"] = Report(
                self._ungrouped(),
                self.pairs,
                self.edges,
                self.circuit,
                self.evaluation,
                self.pairs,
                made,
            )
        return found

    # ------------------------------------------------------------------------------------------------- being displayed

    def _static(self) -> str:
        """The state without a kernel: the pairs, and the charts that were made."""
        parts = [self.prompts.report.value, self.tokens.value]
        parts += [
            static_html(canvas.chart) for canvas in (self.map_canvas, self.exact_canvas) if canvas.chart is not None
        ]
        parts += [static_html(self.graph_canvas.chart)] if self.graph_canvas.chart is not None else []
        return f'<div class="attnlab-twin">{"".join(parts)}<p class="attnlab-note">{NOTE}</p></div>'

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/html": self._static(), "text/plain": "[panel] circuits explorer"}
        if not in_book():
            bundle[WIDGET] = self.widget._repr_mimebundle_()[WIDGET]
        return bundle


def _button(label: str, action: Callable[[], Any]) -> w.Button:
    button = w.Button(description=label, button_style="primary", layout=w.Layout(width="auto"))
    button.on_click(lambda _: action())
    return button
