"""Oracles of ``attnlab.kernels.lightning_attention_2`` and the arithmetic of its timings. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from attnlab import claims
from attnlab.kernels import lightning_attention_2 as la2
from attnlab.kernels import lightning_attention_2_runs as runs
from attnlab.kernels import records
from attnlab.mixers import lightning_log_decay, parallel, recurrent

Draw = Callable[..., Tensor]
K, V = 12, 20
SIZES = [(1, 1), (1, 64), (37, 8), (63, 64), (100, 150), (130, 1), (64, 64)]


@pytest.fixture
def draw() -> Draw:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(draw: Draw, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and decays of three heads: none, slow, fast."""
    decay = torch.tensor([0.0, -0.05, -3.0], dtype=torch.float64)
    return draw(2, length, 3, K), draw(2, length, 3, K), draw(2, length, 3, V), decay


class TestTileSweep:
    @pytest.mark.parametrize(("length", "size"), SIZES)
    def test_is_the_recurrence(self, draw: Draw, length: int, size: int) -> None:
        x = inputs(draw, length)
        out, state = la2.tile_sweep(*x, chunk_size=size, scale=0.5)
        wanted, last = recurrent(*x, scale=0.5)
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(("length", "size"), SIZES)
    def test_three_sweeps_are_the_gradients(self, draw: Draw, length: int, size: int) -> None:
        q, k, v, g = inputs(draw, length)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = parallel(*leaves, g, scale=0.5)[0]
        d_out = draw(*o.shape)
        for found, wanted in zip(
            la2.gradients(q, k, v, g, d_out, chunk_size=size, scale=0.5),
            torch.autograd.grad(o, leaves, d_out),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)

    def test_euler_identity(self, draw: Draw) -> None:
        q, k, v, g = inputs(draw, 63)
        o, _ = la2.tile_sweep(q, k, v, g, chunk_size=16)
        d_out = draw(*o.shape)
        dq, dk, dv = la2.gradients(q, k, v, g, d_out, chunk_size=16)
        products = [float((x * dx).sum()) for x, dx in ((q, dq), (k, dk), (v, dv), (o, d_out))]
        assert products == pytest.approx([products[0]] * 4, rel=1e-12)

    def test_closed_form_of_ones(self) -> None:
        ones = torch.ones(1, 37, 1, 1, dtype=torch.float64)
        g = torch.tensor([-0.3], dtype=torch.float64)
        out, _ = la2.tile_sweep(ones, ones, ones, g, chunk_size=8)
        t = torch.arange(1, 38, dtype=torch.float64)
        wanted = (1 - torch.exp(g * t)) / (1 - torch.exp(g))
        torch.testing.assert_close(out.flatten(), wanted, rtol=1e-13, atol=0)

    def test_the_future_changes_nothing(self, draw: Draw) -> None:
        q, k, v, g = inputs(draw, 40)
        before, _ = la2.tile_sweep(q, k, v, g, chunk_size=16)
        k[:, 25:], v[:, 25:] = 7.0, -7.0
        after, _ = la2.tile_sweep(q, k, v, g, chunk_size=16)
        assert torch.equal(before[:, :25], after[:, :25])

    def test_bad_input_is_named(self, draw: Draw) -> None:
        q, k, v, g = inputs(draw, 5)
        with pytest.raises(ValueError, match="log_decay: up to"):
            la2.tile_sweep(q, k, v, -g)
        with pytest.raises(ValueError, match="log_decay"):
            la2.tile_sweep(q, k, v, g.expand(2, 5, 3))
        with pytest.raises(ValueError, match="chunk_size=0"):
            la2.tile_sweep(q, k, v, g, chunk_size=0)
        with pytest.raises(ValueError, match="k: shape"):
            la2.tile_sweep(q, k[:, 1:], v, g)
        with pytest.raises(ValueError, match="size=0"):
            la2.tile_decay(g, 0)


def test_decays_never_exceed_one() -> None:
    decay = la2.tile_decay(torch.tensor([0.0, -1e-9, -8.0]), 64)
    for face in decay:
        assert face.isfinite().all()
        assert face.min() >= 0
        assert face.max() <= 1
    torch.testing.assert_close(decay.read * decay.write, decay.total.expand_as(decay.read))


def test_the_slip_shows_with_decay_and_hides_without(draw: Draw) -> None:
    q, k, v, g = inputs(draw, 130)
    error = la2.relative_error(la2.slipped_sweep(q, k, v, g), recurrent(q, k, v, g, scale=1.0)[0])
    assert error > 1e-3
    for length, decay in ((130, 0 * g), (64, g)):  # no decay, or a single tile, which reads no state
        x = q[:, :length], k[:, :length], v[:, :length]
        hidden = la2.relative_error(la2.slipped_sweep(*x, decay), recurrent(*x, decay, scale=1.0)[0])
        assert hidden < 1e-12


def test_the_errors_of_the_chapter() -> None:
    errors = la2.form_errors(37, 8)
    assert (errors["T"], errors["C"]) == (37, 8)
    assert max(errors[form] for form in ("tiled", "chunked", "parallel", "slip, no decay")) < 1e-14
    assert errors["slip"] > 1e-2


def test_the_factored_form_is_right_until_it_overflows(draw: Draw) -> None:
    q, k, v, g = inputs(draw, 100)
    wanted = recurrent(q, k, v, g, scale=1.0)[0]
    torch.testing.assert_close(la2.factored(q, k, v, g), wanted, rtol=1e-10, atol=1e-10)  # float64 holds 3 * 100 < 709
    single = la2.factored(q.float(), k.float(), v.float(), g.float())
    none, slow, fast = la2.first_lost_token(single)
    assert none is None
    assert slow is None
    assert fast is not None
    assert fast == pytest.approx(88.72 / 3, abs=2)


class TestCost:
    def test_tiles_of_one_are_the_recurrence_and_one_tile_is_the_product(self) -> None:
        T, D = 96, 16
        recurrence, product = la2.cost("recurrent", T, D), la2.cost("masked product", T, D)
        assert la2.cost("tiled", T, D, chunk_size=1).flops == recurrence.flops + 4 * T * D
        assert la2.cost("tiled", T, D, chunk_size=1).steps == recurrence.steps == T
        assert la2.cost("tiled", T, D, chunk_size=T).flops == product.flops + recurrence.flops
        assert la2.cost("tiled", T, D, chunk_size=T).steps == product.steps == 1
        assert la2.cost("softmax", T, D).flops == product.flops // 2

    def test_inside_costs_as_much_as_through_where_the_tile_is_as_long_as_the_head_is_wide(self) -> None:
        through = la2.cost("recurrent", 1024, 64).flops
        assert la2.cost("tiled", 1024, 64, chunk_size=64).flops == 2 * through

    def test_a_ragged_tile_counts_what_it_holds(self) -> None:
        parts = la2.cost("tiled", 64, 8, value_width=4), la2.cost("tiled", 36, 8, value_width=4)
        whole = la2.cost("tiled", 100, 8, value_width=4)
        assert whole.flops == sum(part.flops for part in parts)
        assert whole.steps == 2

    def test_linear_forms_double_with_the_length_and_quadratic_ones_quadruple(self) -> None:
        for form in la2.FORMS:
            growth = la2.cost(form, 4096, 64).flops / la2.cost(form, 2048, 64).flops
            assert growth == (4 if form in ("masked product", "softmax") else 2)

    def test_a_launch_counts_programs_and_floors(self) -> None:
        many, one = la2.launch(64, 1024, 16, 128), la2.launch(1, 65_536, 16, 128)
        assert (many["programs"], one["programs"]) == (2048, 32)
        assert (many["steps"], one["steps"]) == (16, 1024)
        assert many["GFLOP"] == one["GFLOP"] == pytest.approx(65_536 * 16 * 98_304 / 1e9)
        assert one["FLOP/byte"] == 96
        assert one["ms of memory"] > one["ms of products"]

    def test_bad_input_is_named(self) -> None:
        with pytest.raises(ValueError, match="form='magic'"):
            la2.cost("magic", 4, 4)
        with pytest.raises(ValueError, match="length=0"):
            la2.cost("tiled", 0, 4)
        with pytest.raises(ValueError, match="chunk_size=0"):
            la2.tiles(4, 0)
        with pytest.raises(ValueError, match="heads=0"):
            la2.launch(1, 64, 0, 64)


@pytest.mark.parametrize(("length", "size"), [(1, 1), (10, 4), (7, 100)])
def test_every_token_belongs_to_one_tile(length: int, size: int) -> None:
    rows = la2.tiles(length, size)
    assert [row["t"] for row in rows] == list(range(length))
    for row in rows:
        assert row["start"] <= row["t"] < row["end"] <= length
        assert row["start"] == row["tile"] * size


class TestKernelSource:
    def test_functions_and_pieces_are_cut_out(self) -> None:
        whole = str(la2.kernel_source("_grow"))
        assert whole.startswith("def _grow(")
        assert "tl.dot" in whole
        piece = str(la2.kernel_source("_sweep", "scores = ", "out = tl.dot((scores"))
        assert [line.split(" = ")[0] for line in piece.splitlines() if " = " in line] == ["scores", "state", "out"]
        assert str(la2.kernel_source("LinearDecay.backward")).startswith("def backward(ctx")

    def test_a_text_that_drifted_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="no line of _grow starts with 'magic'"):
            la2.kernel_source("_grow", "magic")
        with pytest.raises(ValueError, match=r"decay_function\.py have no such function"):
            la2.kernel_source("LinearDecay.sideways")


class TestRuns:
    def test_the_decayed_forms_agree(self) -> None:
        g = lightning_log_decay(2, 0, 24, schedule="alibi")
        x = runs.sequences(48, tokens=96, width=16)
        out = {name: form(*x) for name, form in runs.forms(g, chunk_size=16).items()}
        for name in ("tiled", "masked product"):
            torch.testing.assert_close(out[name], out["recurrent"], rtol=1e-4, atol=1e-5)
        undecayed = recurrent(*x)[0]
        torch.testing.assert_close(out["cumulative sum"], undecayed, rtol=1e-4, atol=1e-4)
        assert {tuple(o.shape) for o in out.values()} == {(2, 48, 2, 16)}

    def test_every_length_has_the_same_numbers(self) -> None:
        short, long = runs.sequences(8, tokens=32), runs.sequences(32, tokens=32)
        assert torch.equal(short[0].flatten(), long[0].flatten())
        with pytest.raises(ValueError, match="length=5 must divide tokens=32"):
            runs.sequences(5, tokens=32)

    def test_a_small_run_has_every_row_and_leaves_the_threads_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ATTNLAB_BOOK", "1")
        monkeypatch.setattr(runs, "ENOUGH_S", 0.0)
        threads = torch.get_num_threads()
        g = torch.tensor([-0.1])
        frame = runs.time_lengths(g, {"tiled": [16, 32], "softmax": [16]}, tokens=64, rounds=2, width=8)
        assert torch.get_num_threads() == threads
        assert sorted(zip(frame.form, frame.length, frame["round"], strict=True)) == [
            ("softmax", 16, 0),
            ("softmax", 16, 1),
            ("tiled", 16, 0),
            ("tiled", 16, 1),
            ("tiled", 32, 0),
            ("tiled", 32, 1),
        ]
        assert list(runs.compare_forms(g, 64, width=8).index) == list(la2.FORMS)
        assert len(runs.time_chunks(g, [4, 8], length=32, rounds=2)) == 4

    def test_slopes_of_known_laws(self) -> None:
        rows = [
            {"form": form, "length": n, "round": r, "seconds": 1.0, "tokens/s": (1 + r) * n**power}
            for form, power in (("level", 0.0), ("falling", -1.0))
            for n in (1, 2, 4)
            for r in (0, 1)
        ]
        frame = pd.DataFrame(rows)
        assert runs.slopes(frame, "level") == pytest.approx([0, 0], abs=1e-12)
        assert runs.slopes(frame, "falling", shortest=2) == pytest.approx([-1, -1])
        with pytest.raises(ValueError, match="fewer than two lengths from 4 on"):
            runs.slopes(frame, "level", shortest=4)

    def test_ratio_and_middle(self) -> None:
        rows = [
            {"form": form, "length": 8, "round": r, "seconds": s}
            for form, all_seconds in (("a", (1.0, 2.0, 1.0)), ("b", (3.0, 2.0, 4.0)))
            for r, s in enumerate(all_seconds)
        ]
        found = runs.ratio(pd.DataFrame(rows), "a", "b", 8)
        assert found == [3.0, 1.0, 4.0]
        assert runs.middle(found) == (3.0, (1.0, 4.0))

    def test_crossover(self) -> None:
        lengths = [1, 4, 16]
        assert runs.crossover(lengths, [2, 2, 2], [1, 2**0.5, 4]) == pytest.approx(4 * 4 ** (1 / 3), rel=1e-6)
        assert runs.crossover(lengths, [1, 1, 1], [2, 2, 2]) is None
        assert runs.crossover(lengths, [1, 1, 3], [2, 2, 2]) is None
        assert runs.overtakes(lengths, [1, 1, 1], [2, 2, 2]) == "at every measured length, from 1 tokens on"
        assert runs.overtakes(lengths, [1, 1, 3], [2, 2, 2]) == "at no measured length, up to 16 tokens"
        assert runs.overtakes([100, 400], [2, 2], [1, 4]) == "from about 200 tokens on"


def gpu_record(ours: tuple[float, float] = (0.4, 0.44)) -> dict[str, Any]:
    """An invented record: our times at the two ends, a linear peer twice and a softmax peer ever slower."""
    rows = []
    for way, factor in zip(runs.PASSES, (1.0, 3.5), strict=True):
        for n, T in enumerate((1024, 4096, 16_384, 65_536)):
            shape = {"B": 65_536 // T, "T": T, "H": 16, "K": 128, "V": 128}
            row = {"case": "lightning decay", "operator": "linear_decay", "pass": way, "shape": shape}
            rows += [
                {**row, "impl": "attnlab", "ms": factor * ours[n == 3]},
                {**row, "impl": "fla chunk_simple_gla", "ms": factor * 1.0},
                {**row, "impl": "SDPA flash, softmax", "ms": factor * 0.6 * 3**n},
                {**row, "impl": "flex_attention, softmax", "skipped": "too slow"},
                {**row, "case": "no decay", "impl": "attnlab", "ms": 0.001},
                {**row, "shape": {**shape, "K": 64, "V": 64}, "impl": "attnlab", "ms": 0.001},
            ]
    for row in rows:
        if "ms" in row:
            row |= {"ms20": 0.95 * row["ms"], "ms80": 1.25 * row["ms"]}
    return {
        "schema": 1,
        "command": "python -m attnlab.kernels.bench",
        "commit": "0" * 40,
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"platform": "Linux", "cpus": 16, "gpu": "Some GPU"},
        "versions": {"python": "3.12", "torch": "2.11"},
        "rows": rows,
    }


class TestRecord:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "gpu.json").write_text(json.dumps(gpu_record()))
        monkeypatch.setattr(records, "FOLDER", tmp_path)
        return tmp_path

    def test_only_the_timed_rows_of_the_law_are_taken(self, folder: Path) -> None:
        record = records.load("gpu")
        assert record is not None
        rows = runs.law(record.frame())
        assert set(rows.impl) == {"attnlab", "fla chunk_simple_gla", "SDPA flash, softmax"}
        assert list(dict.fromkeys(rows.kind)) == ["ours", "linear", "softmax"]
        assert len(rows) == 2 * 4 * 3
        assert runs.fastest(rows, "ours", "forward").to_dict() == {1024: 0.4, 4096: 0.4, 16_384: 0.4, 65_536: 0.44}
        with pytest.raises(ValueError, match="no timed rows of linear_decay with 64 tokens"):
            runs.law(record.frame(), tokens=64)
        with pytest.raises(ValueError, match="impl='magic' begins with none of"):
            runs.kind("magic")

    def test_errors_are_the_largest_of_those_that_have_one(self) -> None:
        rows = [("a", "x", 1e-3), ("a", "x", 3e-3), ("a", "y", 2e-3), ("b", "x", 4e-3), ("c", "x", None)]
        frame = pd.DataFrame([{"impl": impl, "pass": way, "error": error} for impl, way, error in rows])
        found = runs.largest_errors(frame)
        assert found["x"].to_dict() == {"a": 3e-3, "b": 4e-3}
        assert found["y"]["a"] == 2e-3

    def test_claims_are_judged_with_the_provenance_of_the_record(self, folder: Path) -> None:
        record = records.load("gpu")
        assert record is not None
        speed, fla = runs.judge(record)
        assert speed["verdict"] == fla["verdict"] == "confirmed"
        assert speed["value"] == pytest.approx(1.1)
        assert speed["controls"]["softmax"]["value"] == pytest.approx(27)
        assert fla["value"] == pytest.approx(2.5)
        assert fla["controls"]["training"]["value"] == pytest.approx(2.5)
        wander = 1.25 / 0.95  # the slow end of one side over the fast end of the other
        assert speed["interval"] == pytest.approx([1.1 / wander, 1.1 * wander])
        for gain in (fla, fla["controls"]["training"]):
            assert gain["interval"] == pytest.approx([2.5 / wander, 2.5 * wander])
        for row in (speed, fla):
            assert row["origin"] == "record"
            assert row["machine"]["gpu"] == "Some GPU"
            assert row["date"].startswith("2026-01-02")

    def test_a_kernel_that_slows_down_is_refuted(self, folder: Path) -> None:
        (folder / "gpu.json").write_text(json.dumps(gpu_record(ours=(0.6, 0.9))))
        record = records.load("gpu")
        assert record is not None
        assert [row["verdict"] for row in runs.judge(record)] == ["refuted", "refuted"]

    def test_the_command_writes_a_record_that_the_ledger_reads(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = folder / "records" / "lightning-attention-2.json"
        runs.main(["--of", "gpu", "--record", str(out)])
        assert "constant-speed-gpu: confirmed (1.1)" in capsys.readouterr().out
        assert [row["claim"].split("/")[1] for row in claims.rows(out.parent / "none", out.parent)] == [
            "constant-speed-gpu",
            "faster-than-fla",
        ]
        with pytest.raises(SystemExit):
            runs.main(["--of", "no-such", "--record", str(out)])
        assert "there is no records/no-such.json" in capsys.readouterr().err


def test_judged_claims_in_the_repository_follow_from_its_kernel_record() -> None:
    kernel, judged = records.load("linear-kernels-h200"), records.load("lightning-attention-2")
    if kernel is None or judged is None:
        pytest.skip("no GPU record in this checkout")
    fields = ("claim", "value", "interval", "controls", "verdict")
    assert [[row[field] for field in fields] for row in judged.rows] == [
        [row[field] for field in fields] for row in runs.judge(kernel)
    ]
