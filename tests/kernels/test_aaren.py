"""Oracles of the chapter ``kernels/aaren``: the layer, the scan's rounds, the shortcuts, streams, tasks and the record."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attnlab import claims
from attnlab.kernels import aaren, aaren_runs, aaren_tasks, records
from attnlab.kernels.aaren import Aaren, CausalMean, GrowingCache, RunningSummary
from attnlab.mixers import aaren as attend
from attnlab.mixers import read
from attnlab.models.language import SequenceModel, SoftmaxAttention
from attnlab.models.sweep import count_parameters
from attnlab.models.training import seeded

close = {"rtol": 1e-12, "atol": 1e-12}
TINY_FORECAST, TINY_RECALL = aaren_runs.TINY


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def layer() -> Aaren:
    return seeded(lambda: Aaren(12, 3), 0).double()


class TestLayer:
    @pytest.mark.parametrize("length", [1, 37, 100])
    def test_it_is_causal_attention_with_the_same_query_in_every_row(self, length, layer, draw) -> None:
        x = draw(2, length, 12)
        k, v = (
            linear(x).unflatten(-1, (3, 4)).transpose(1, 2) for linear in (layer.to_key, layer.to_value)
        )  # [B, H, T, K]
        q = layer.to_query(layer.query).view(1, 3, 1, 4).expand_as(k)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(layer(x), layer.out(o.transpose(1, 2).flatten(2)), **close)

    def test_it_has_one_vector_more_than_softmax_attention(self) -> None:
        assert count_parameters(Aaren(64, 4)) - count_parameters(SoftmaxAttention(64, 4)) == 64

    def test_steps_and_pieces_give_what_one_pass_gives(self, layer, draw) -> None:
        x = draw(2, 100, 12)
        whole = layer(x)
        first, past = layer.absorb(x[:, :63])
        rest, end = layer.absorb(x[:, 63:], past)
        torch.testing.assert_close(torch.cat([first, rest], 1), whole, **close)
        past, outputs = None, []
        for t in range(100):
            o, past = layer.step(x[:, t], past)
            outputs.append(o)
        torch.testing.assert_close(torch.stack(outputs, 1), whole, **close)
        torch.testing.assert_close(read(past), read(end), **close)

    def test_every_parameter_gets_a_gradient(self, layer, draw) -> None:
        layer(draw(2, 9, 12)).square().sum().backward()
        assert all(float(p.grad.abs().max()) > 0 for p in layer.parameters())

    def test_equal_scores_give_the_mean(self, layer, draw) -> None:
        x = draw(2, 37, 12)
        mean = seeded(lambda: CausalMean(12), 0).double()
        mean.to_value.weight, mean.out.weight = layer.to_value.weight, layer.out.weight
        torch.nn.init.zeros_(layer.query)
        torch.testing.assert_close(layer(x), mean(x), **close)

    def test_the_scale_is_an_argument(self, draw) -> None:
        plain, scaled = (seeded(lambda scale=scale: Aaren(12, 3, scale=scale), 0).double() for scale in (1.0, 0.5))
        x = draw(1, 5, 12)
        torch.testing.assert_close(0.5 * plain.scores_and_values(x)[0], scaled.scores_and_values(x)[0], **close)

    @pytest.mark.parametrize(("width", "heads"), [(12, 5), (0, 1), (12, 0)])
    def test_sizes_that_do_not_fit(self, width: int, heads: int) -> None:
        with pytest.raises(ValueError, match=f"heads={heads} must divide width={width}"):
            Aaren(width, heads)


class TestScan:
    @pytest.mark.parametrize("length", [1, 2, 16, 37])
    def test_after_each_round_twice_as_many_tokens(self, length, draw) -> None:
        s, v = 50 * draw(length), draw(length, 3)
        rounds = aaren.scan_rounds(s, v)
        assert len(rounds) == 1 + math.ceil(math.log2(length))
        for number, summary in enumerate(rounds):
            for t in range(length):
                piece = slice(max(0, t + 1 - 2**number), t + 1)
                torch.testing.assert_close(read(summary)[t], s[piece].softmax(0) @ v[piece], **close)
                assert summary.m[t] == s[piece].max()

    def test_shortcuts_are_right_for_small_scores_and_lose_outputs_for_large(self, draw) -> None:
        s, v = draw(1, 63, 1), draw(1, 63, 1, 5)
        exact = attend(s, v)[0]
        for shortcut in (aaren.raw_exponentials, aaren.one_maximum):
            torch.testing.assert_close(shortcut(s, v), exact, **close)
        late = s.clone()
        late[0, 40] = 150
        found = {
            "raw": aaren.raw_exponentials(late.float(), v.float())[0],
            "one": aaren.one_maximum(late.float(), v.float())[0],
            "merge": attend(late.float(), v.float())[0][0],
        }
        table = aaren_runs.shortcut_errors(found, attend(late, v)[0][0])
        assert table["lost outputs"].to_dict() == {"raw": 23, "one": 40, "merge": 0}
        assert table["first lost"].dropna().to_dict() == {"raw": 41, "one": 1}
        assert table["error of the rest"].max() < 1e-5


class TestStreams:
    def model(self, mixer: Any, **options: Any) -> SequenceModel:
        return seeded(lambda: SequenceModel(1, 1, 12, 2, mixer, max_length=40, **options), 0).double().eval()

    @pytest.mark.parametrize("positions", ["learned", None])
    def test_a_streamed_model_is_the_model(self, positions, draw) -> None:
        model = self.model(lambda _: Aaren(12, 3), positions=positions)
        x = draw(2, 37, 1)
        torch.testing.assert_close(aaren.stream(model, x), model(x).detach(), **close)

    def test_other_layers_do_not_stream(self, draw) -> None:
        model = self.model(lambda layer: Aaren(12, 3) if layer else SoftmaxAttention(12, 3))
        with pytest.raises(ValueError, match="its layers are SoftmaxAttention, Aaren; only Aaren layers stream"):
            aaren.stream(model, draw(1, 3, 1))

    @pytest.mark.parametrize("context", [0, 1, 20])
    def test_both_streams_continue_their_layer(self, context, layer, draw) -> None:
        attention = seeded(lambda: SoftmaxAttention(12, 3), 0).double()
        x = draw(25, 12)
        for stream, whole in (
            (RunningSummary(layer), layer(x[None])[0]),
            (GrowingCache(attention, 25), attention(x[None])[0]),
        ):
            if context:
                stream.absorb(x[:context])
            outputs = torch.stack([stream.step(token) for token in x[context:]])
            torch.testing.assert_close(outputs, whole[context:].detach(), **close)

    def test_costs_count_every_byte_and_leave_the_threads_alone(self) -> None:
        threads = torch.get_num_threads()
        found = aaren.costs([3, 50], width=12, heads=3, repeats=4, tokens=2)
        assert torch.get_num_threads() == threads
        assert [(row.layer, row.context, row.bytes) for row in found] == [
            ("Aaren", 3, 3 * (4 + 2) * 4),
            ("softmax with KV cache", 3, 3 * 2 * 12 * 4),
            ("Aaren", 50, 3 * (4 + 2) * 4),
            ("softmax with KV cache", 50, 50 * 2 * 12 * 4),
        ]
        assert all(row.ms.shape == (4,) and row.ms.min() > 0 for row in found)
        assert RunningSummary(Aaren(12, 3)).bytes == 0

    def test_growth_is_a_ratio_of_medians(self) -> None:
        rows = [
            aaren.Cost("a", context, 0, np.array(ms)) for context, ms in ((10, [1.0, 1.0, 2.0]), (99, [3.0, 3.0, 3.0]))
        ]
        value, (low, high) = aaren_runs.growth(rows, "a", short=10, long=99)
        assert value == 3
        assert low == 1.5
        assert high == 3


class TestTasks:
    @pytest.mark.parametrize(
        "task", [aaren_tasks.Forecasting(), aaren_tasks.Recall(), *aaren_runs.LARGE], ids=lambda task: repr(task)[:20]
    )
    def test_all_models_have_the_parameters_of_the_transformer(self, task) -> None:
        counts = {mixer: count_parameters(task.model(mixer)) for mixer in aaren_tasks.MIXERS}
        assert counts["Aaren"] - counts["Transformer"] == task.layers * task.width
        assert max(counts.values()) < 1.02 * min(counts.values())

    @pytest.mark.parametrize("task", aaren_runs.TINY, ids=["forecasting", "recall"])
    @pytest.mark.parametrize("mixer", aaren_tasks.MIXERS)
    def test_models_are_causal(self, task, mixer) -> None:
        model = seeded(lambda: task.model(mixer), 0).eval()
        inputs = torch.as_tensor(task.draw(np.random.default_rng(0))[0])
        inputs = inputs.float() if inputs.is_floating_point() else inputs
        before = model(inputs)
        inputs[:, -1] = inputs[:, 0]
        after = model(inputs)
        torch.testing.assert_close(after[:, :-1], before[:, :-1])
        assert not torch.equal(after[:, -1], before[:, -1])

    def test_a_run_is_repeatable_and_tells_how_it_came_about(self) -> None:
        first, second = (TINY_FORECAST.train("Aaren", 1) for _ in range(2))
        row = first.row()
        assert row["score"] == first.score == second.score
        assert row["curve"][-1] == (TINY_FORECAST.steps, row["score"])
        assert {key: row[key] for key in ("case", "impl", "seed", "lr")} == {
            "case": "forecasting",
            "impl": "Aaren",
            "seed": 1,
            "lr": TINY_FORECAST.lr,
        }
        json.dumps(row, allow_nan=False)

    def test_blind_is_the_share_of_the_commonest_value(self) -> None:
        assert aaren_tasks.Recall(pairs=1, values=4).blind() == 1
        assert aaren_tasks.Recall(pairs=2, values=4).blind() == (4 * 1 + 12 * 0.5) / 16
        told = np.random.default_rng(0).integers(8, size=(20_000, 4))
        guess = np.mean([np.bincount(row).max() / 4 for row in told])
        assert aaren_tasks.Recall().blind() == pytest.approx(guess, abs=0.01)

    def test_an_unknown_mixer(self) -> None:
        with pytest.raises(ValueError, match="mixer='LSTM' is not known; choose one of Transformer, Aaren"):
            TINY_RECALL.model("LSTM")

    def test_persistence_is_the_error_of_the_last_value(self) -> None:
        task = aaren_tasks.Forecasting(noise=0.0)
        inputs, targets = task.held_out()
        assert task.persistence() == pytest.approx(float(np.square(inputs - targets).mean()))


class TestAskedWeights:
    def weights(self, mixer: str, seed: int = 0) -> torch.Tensor:
        task = aaren_tasks.Recall()
        model = seeded(lambda: task.model(mixer), seed).double()
        return aaren_tasks.asked_weights(model, task.held_out()[0][0])

    @pytest.mark.parametrize("mixer", ["Aaren", "Transformer"])
    def test_there_is_one_distribution_a_question_layer_and_head(self, mixer) -> None:
        found = self.weights(mixer)
        assert found.shape == (4, 2, 4, 4)
        torch.testing.assert_close(found.sum(-1), torch.ones(4, 2, 4, dtype=torch.float64))

    def test_a_fixed_query_cannot_hear_the_question(self) -> None:
        ours, theirs = self.weights("Aaren"), self.weights("Transformer")
        torch.testing.assert_close(ours, ours[:1].expand_as(ours), **close)
        assert float((theirs - theirs[:1]).abs().max()) > 1e-3
        assert float((ours[0] - ours[0].mean(-1, keepdim=True)).abs().max()) > 1e-3

    def test_the_model_is_left_as_it_was(self) -> None:
        task = aaren_tasks.Recall()
        model = task.model("Aaren")
        aaren_tasks.asked_weights(model, task.held_out()[0][0])
        assert not any(block.mixer._forward_hooks for block in model.trunk.blocks)

    def test_weights_of_an_average_are_none(self) -> None:
        with pytest.raises(ValueError, match="a layer is CausalMean"):
            self.weights("Mean")


def rows(scores: dict[str, tuple[float, ...]], case: str = "forecasting") -> list[dict[str, Any]]:
    return [
        {
            "case": case,
            "impl": impl,
            "seed": seed,
            "lr": 0.01,
            "parameters": 100,
            "score": score,
            "seconds": 1.0,
            "curve": [(5, 2 * score), (10, score)],
        }
        for impl, values in scores.items()
        for seed, score in enumerate(values)
    ]


class TestVerdicts:
    def judged(self, **scores: tuple[float, ...]) -> str:
        found = aaren_runs.verdict("comparable-forecasting", rows(scores))
        return claims.measure("aaren/comparable-forecasting", **found)["verdict"]

    def test_forecasting(self) -> None:
        transformer = (1.0, 1.0, 1.0)
        assert self.judged(Transformer=transformer, Aaren=(1.02, 1.05, 1.0), Mean=(1.2, 1.3, 1.25)) == "confirmed"
        assert self.judged(Transformer=transformer, Aaren=(1.2, 1.3, 1.25), Mean=(1.4, 1.5, 1.6)) == "refuted"
        assert self.judged(Transformer=transformer, Aaren=(1.05, 1.05, 1.05), Mean=(1.0, 1.0, 1.05)) == "refuted"
        straddles = self.judged(Transformer=transformer, Aaren=(1.02, 1.05, 1.2), Mean=(1.3, 1.3, 1.3))
        assert straddles == "not distinguishable"

    def test_each_seed_is_compared_with_its_own_reference(self) -> None:
        mixed = rows({"Transformer": (1.0, 2.0), "Aaren": (1.1, 2.0), "Mean": (2.0, 2.0)})[::-1]
        found = aaren_runs.verdict("comparable-forecasting", mixed)
        assert found["value"] == pytest.approx(5)
        assert found["interval"] == pytest.approx((0, 10))
        assert found["controls"]["mean"][1] == pytest.approx((0, 100))

    @pytest.mark.parametrize(
        ("aaren_accuracy", "transformer", "wanted"),
        [(0.4, 1.0, "confirmed"), (0.9, 1.0, "refuted"), (0.4, 0.5, "different setting")],
    )
    def test_recall(self, aaren_accuracy: float, transformer: float, wanted: str) -> None:
        scores = {"Transformer": (transformer,) * 3, "Aaren": (aaren_accuracy,) * 3}
        found = aaren_runs.verdict("recall", rows(scores, "recall"), blind=0.41)
        assert claims.measure("aaren/recall", **found)["verdict"] == wanted

    def test_tables(self) -> None:
        made = rows({"Transformer": (1.0, 3.0), "Aaren": (3.0, 5.0)})
        table = aaren_runs.table(made)
        assert list(table.index) == ["Transformer", "Aaren"]
        assert table.index.name is None
        assert table.loc["Aaren", ["mean", "lowest", "highest"]].tolist() == [4, 3, 5]
        assert aaren_runs.gap(made)["percent above"].to_dict() == {5: 100, 10: 100}


class TestRecord:
    def test_the_command_writes_a_record_that_the_ledger_reads(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "aaren.json"
        aaren_runs.main(["--record", str(out), "--commit", "abc", "--tiny", "--workers", "1"])
        assert "forecasting: " in capsys.readouterr().out
        record = records.load("aaren", tmp_path)
        assert record is not None
        assert record.commit == "abc"
        assert record.command.endswith("aaren.json --tiny")
        assert record.changed() == []
        judged = claims.rows(tmp_path / "none", tmp_path)
        assert [row["claim"] for row in judged] == ["aaren/comparable-forecasting", "aaren/recall"]
        assert {row["origin"] for row in judged} == {"record"}

        trained = [row for row in record.rows if "claim" not in row]
        mixers, tasks = aaren_tasks.MIXERS, ("forecasting", "recall")
        counted = [(row["case"], row["impl"], row["seed"]) for row in trained if row["counts"]]
        assert counted == list(product(tasks, mixers, aaren_runs.SEEDS))
        searched = [(row["case"], row["impl"], row["lr"]) for row in trained if not row["counts"]]
        assert searched == list(product(tasks, mixers, aaren_runs.RATES))
        assert not record.frame().empty

    def test_the_large_models_ask_for_a_gpu(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is one")
        with pytest.raises(SystemExit):
            aaren_runs.main(["--record", str(tmp_path / "x.json")])
        assert "--tiny works anywhere" in capsys.readouterr().err

    def test_the_best_rate_is_that_of_the_lowest_error_or_the_highest_accuracy(self) -> None:
        found = [{"lr": lr, "score": score} for lr, score in ((1e-3, 0.5), (1e-2, None), (1e-1, 0.7))]
        assert aaren_runs.best_rate(TINY_FORECAST, found) == 1e-3
        assert aaren_runs.best_rate(TINY_RECALL, found) == 1e-1
        with pytest.raises(ValueError, match="every run of recall diverged"):
            aaren_runs.best_rate(TINY_RECALL, [{"lr": 1e-3, "score": None}])

    def test_a_run_that_diverges_is_a_row_without_a_score(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def diverge(*_: Any, **__: Any) -> None:
            raise aaren_runs.Diverged

        monkeypatch.setattr(aaren_tasks, "fit", diverge)
        assert aaren_runs.train_row((TINY_RECALL, "GRU", 0, 1.0))["score"] is None
