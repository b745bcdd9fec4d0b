"""Oracles of the TransNormerLLM block, its decays, its reading by state, and the experiments at tiny sizes. No time is asserted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from attnlab import claims
from attnlab.kernels import lightning_attention as la
from attnlab.kernels import lightning_attention_runs as runs
from attnlab.kernels import records
from attnlab.mixers import parallel
from attnlab.models.language import SGLU, distance_bias
from attnlab.models.sweep import count_parameters

VOCAB, D, H, L, F = 13, 12, 3, 2, 20
close = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def draw():
    """Normal float64 tensors from one seed."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def model(log_decay: torch.Tensor | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    table = la.decay_table(L, H) if log_decay is None else log_decay
    return la.tnl(VOCAB, D, table.double(), hidden=F, **options).double().eval()


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------------- parts


class TestSRMSNorm:
    def test_is_rms_norm_without_gain(self, draw):
        x = draw(2, 37, D)
        norm = la.SRMSNorm(D)
        torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (D,), eps=1e-6), **close)
        assert not list(norm.parameters())

    def test_forgets_a_positive_factor(self, draw):
        x, norm = draw(37, D), la.SRMSNorm(D, eps=0.0)
        torch.testing.assert_close(norm(7.3 * x), norm(x), **close)
        torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(37, dtype=torch.float64), **close)

    def test_gradient(self, draw):
        assert torch.autograd.gradcheck(la.SRMSNorm(5), draw(3, 5).requires_grad_())

    def test_computes_in_single_precision_at_least(self):
        x = torch.full((1, 4), 300.0, dtype=torch.float16)  # its square leaves float16
        assert la.SRMSNorm(4)(x).isfinite().all()
        assert la.SRMSNorm(4)(x).dtype == torch.float16


class TestLRPE:
    def test_scores_know_distances_only(self, draw):
        turn, q, k = la.LRPE(H, 4).double(), draw(2, 37, H, 4), draw(2, 37, H, 4)
        scores = [torch.einsum("bthd,bshd->bhts", turn(q, n), turn(k, n)) for n in (0, 111)]
        torch.testing.assert_close(*scores, **close)

    def test_is_the_real_part_of_eq_9(self, draw):
        turn, q, k = la.LRPE(1, 4).double(), draw(1, 9, 1, 4), draw(1, 9, 1, 4)
        found = torch.einsum("bthd,bshd->bhts", turn(q), turn(k))[0, 0]
        theta = turn.theta.detach()[0]
        for t, s in ((8, 0), (5, 5), (6, 2)):
            phase = torch.exp(1j * (t - s) * theta)
            wanted = (q[0, t, 0] * k[0, s, 0] * phase).sum().real
            torch.testing.assert_close(found[t, s].detach(), wanted, **close)

    def test_without_angles_nothing_turns(self, draw):
        turn, x = la.LRPE(H, 4).double(), draw(1, 9, H, 4)
        with torch.no_grad():
            turn.theta.zero_()
        torch.testing.assert_close(turn(x), torch.cat((x, 0 * x), -1), **close)


class TestAttention:
    @pytest.mark.parametrize("norm", ["joint", "head"])
    @pytest.mark.parametrize("gate", [True, False])
    def test_is_eq_11(self, draw, norm, gate):
        decay = -draw(H).abs()
        layer = la.GatedLinearAttention(D, H, decay, gate=gate, norm=norm).double()
        x = draw(2, 37, D)
        q, k, v, *u = layer.project(x).split(D, -1)
        q, k, v = (y.unflatten(-1, (H, -1)) for y in (nn.functional.silu(q), nn.functional.silu(k), v))
        o = parallel(q, k, v, decay, scale=1.0)[0]
        o = layer.norm(o.flatten(2)) if norm == "joint" else layer.norm(o).flatten(2)
        wanted = layer.out(o * u[0]) if gate else layer.out(o)
        torch.testing.assert_close(layer(x), wanted, **close)

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="heads: 5 do not divide width=12; choose a divisor"):
            la.GatedLinearAttention(12, 5)
        with pytest.raises(ValueError, match="log_decay"):
            la.GatedLinearAttention(12, 3, torch.tensor([0.1, -1.0, 0.0]))
        with pytest.raises(ValueError, match="norm='both'"):
            la.GatedLinearAttention(12, 3, norm="both")


def test_sglu_is_bilinear(draw):
    mixer, x = SGLU(D, F).double(), draw(7, D)
    torch.testing.assert_close(mixer(3 * x), 9 * mixer(x), **close)


class TestDecayTable:
    @pytest.mark.parametrize("schedule", ["paper", "fla", "alibi"])
    def test_memory_grows_with_the_layer(self, schedule):
        table = la.decay_table(6, 8, schedule)
        assert table.shape == (6, 8)
        assert table.max() <= 0
        assert (table.diff(dim=0) >= 0).all()
        step = table[0].diff()
        assert (step > 0).all() if schedule == "alibi" else (step < 0).all()

    def test_values_by_hand(self):
        torch.testing.assert_close(la.decay_table(4, 2, "paper")[1], torch.tensor([-3.0, -6.0]))
        torch.testing.assert_close(la.decay_table(4, 2, "fla")[0], torch.tensor([0.0, -4.0]))
        torch.testing.assert_close(la.decay_table(3, 2)[0], torch.tensor([-(2.0**-4), -(2.0**-8)]), rtol=2e-5, atol=0)

    def test_layers_alike_are_the_first(self):
        flat = la.decay_table(3, 4, by_layer=False)
        assert torch.equal(flat, la.decay_table(3, 4)[:1].expand(3, 4))

    def test_one_layer_of_the_released_code_is_refused(self):
        with pytest.raises(ValueError, match="layers=1 divides by zero"):
            la.decay_table(1, 4)


# ------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("options", [{}, {"gate": False}, {"lrpe": "all"}, {"lrpe": "none"}])
def test_parameters_and_states_are_counted(options):
    made = model(**options)
    rotated = {"first": 1, "all": L, "none": 0}[options.get("lrpe", "first")]
    gate = options.get("gate", True)
    assert count_parameters(made) == la.parameters(VOCAB, D, L, F, gate=gate, rotated=rotated)
    _, state = la.read(made, tokens(5, batch=1))
    assert sum(layer.memory.numel() for layer in state) == la.state_numbers(D, L, H, rotated=rotated)


@pytest.mark.parametrize("pieces", [[37], [1] * 37, [5, 1, 31]])
def test_reading_in_pieces_is_reading_at_once(pieces):
    made, given = model(), tokens(37)
    with torch.no_grad():
        state, parts = None, []
        for piece in given.split(pieces, 1):
            logits, state = la.read(made, piece, state)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), made(given), **close)
    assert [layer.position for layer in state] == [37, 37]


def test_without_decay_and_rotation_the_past_has_no_order():
    given = tokens(20)
    shuffled = torch.cat((given[:, :19].flip(1), given[:, 19:]), 1)
    with torch.no_grad():
        blind = model(torch.zeros(1, H), lrpe="none")
        torch.testing.assert_close(blind(given)[:, -1], blind(shuffled)[:, -1], **close)
        seeing = model(la.decay_table(2, H)[:1], lrpe="none")
        assert (seeing(given)[:, -1] - seeing(shuffled)[:, -1]).abs().max() > 1e-3


def test_the_future_changes_nothing():
    made, given = model(), tokens(20)
    other = torch.cat((given[:, :11], (given[:, 11:] + 1) % VOCAB), 1)
    with torch.no_grad():
        torch.testing.assert_close(made(given)[:, :11], made(other)[:, :11], **close)


def test_generating_greedily_is_the_argmax_of_the_forward_pass():
    made, prompt = model(), tokens(4)
    drawn = la.generate(made, prompt, 9, temperature=0)
    whole = prompt
    with torch.no_grad():
        for _ in range(9):
            whole = torch.cat((whole, made(whole)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(drawn, whole[:, 4:])
    one, two = (la.generate(made, prompt, 9, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


def test_bad_reading_is_named():
    made = model()
    with pytest.raises(ValueError, match=r"tokens: \[B, T\]"):
        la.read(made, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="state: 2 layers have as many states, not 1"):
        la.read(made, tokens(3), la.read(made, tokens(3))[1][:1])
    with pytest.raises(ValueError, match="learned positions"):
        la.read(model(positions="learned", max_length=8), tokens(3))
    with pytest.raises(ValueError, match="SoftmaxAttention"):
        la.read(runs.build(runs.ALIBI, TINY), tokens(3))
    with pytest.raises(ValueError, match="count"):
        la.generate(made, tokens(3), 0)
    with pytest.raises(ValueError, match="temperature"):
        la.generate(made, tokens(3), 1, temperature=-1)
    with pytest.raises(ValueError, match="log_decay"):
        la.tnl(VOCAB, D, torch.zeros(H))
    with pytest.raises(ValueError, match="lrpe='last'"):
        la.tnl(VOCAB, D, torch.zeros(L, H), lrpe="last")


# ------------------------------------------------------------------------------------------------- the experiments

TINY = runs.Setting(width=16, heads=2, layers=2, context=32, batch=2, steps=4, held_out=4)


def test_models_are_matched_and_alibi_has_the_decays_as_slopes():
    counts = {name: count_parameters(runs.build(name, runs.Setting())) for name in runs.arms(runs.Setting())}
    assert max(counts.values()) < 1.01 * counts[runs.OURS]
    assert min(counts.values()) > 0.99 * counts[runs.OURS]
    table = la.decay_table(TINY.layers, TINY.heads)
    for layer, block in enumerate(runs.build(runs.ALIBI, TINY).trunk.blocks):
        torch.testing.assert_close(block.mixer.slopes, -table[layer])
        bias = distance_bias(block.mixer.slopes, 9)
        torch.testing.assert_close(bias[:, 8, 2].exp(), (6 * table[layer]).exp())  # ALiBi's factor is the decay's
    with pytest.raises(ValueError, match="'TNL 2' is no model of this comparison"):
        runs.build("TNL 2", TINY)


def test_a_comparison_can_be_judged():
    frame = runs.compare(TINY, (runs.OURS, runs.SOFTMAX), seeds=(0, 1))
    assert frame.groupby("model").seed.apply(list).to_dict() == {runs.OURS: [0, 1], runs.SOFTMAX: [0, 1]}
    found = runs.verdict(frame, "better-than-transformer")
    assert found["seeds"] == [0, 1]
    assert found["interval"][0] <= found["value"] <= found["interval"][1]
    row = claims.measure("lightning-attention/better-than-transformer", **found)
    assert set(row["controls"]) == {"transformer"}
    again = runs.run(runs.OURS, TINY, 1)
    assert again["loss"] == frame.loss[1]


def test_speed_is_judged_by_its_ratios():
    rows = [
        {"model": name, "length": n, "round": r, "tokens/s": speed * (1 + 0.1 * r)}
        for name, speeds in {runs.OURS: (100.0, 90.0), runs.ROTARY: (100.0, 20.0)}.items()
        for n, speed in zip((64, 128), speeds, strict=True)
        for r in (0, 1, 2)
    ]
    found = runs.speed_verdict(pd.DataFrame(rows))
    assert found["value"] == pytest.approx(0.9)
    assert found["controls"]["transformer"][0] == pytest.approx(0.2)
    assert claims.measure("lightning-attention/constant-speed", **found)["verdict"] == "confirmed"


def test_lengths_must_divide_the_tokens():
    with pytest.raises(ValueError, match=r"lengths: \[48\] do not divide tokens=128"):
        runs.speed(TINY, [32, 48], tokens=128)


def test_few_pairs_come_back_and_many_do_not():
    few, many = runs.recalled(8, 64, 0), runs.recalled(512, 64, 0)
    assert few == {"state": 1.0, "softmax": 1.0}
    assert many["softmax"] > 0.99
    assert many["state"] < 0.5
    frame = runs.saturation(16, [4, 64], seeds=(0, 1))
    found = runs.saturation_verdict(frame, 64)
    at = frame[(frame.pairs == 64) & (frame.reader == "state")].recalled
    assert found["value"] == pytest.approx(at.mean())
    assert math.isclose(found["interval"][1], at.max())


def test_the_record_holds_all_claims_and_can_be_read_back(tmp_path: Path, capsys):
    path = tmp_path / "lightning-attention.json"
    runs.make(path, TINY, (32, 64), commit="abc", seconds=0.0, command="a command")
    record = records.load("lightning-attention", tmp_path)
    assert record is not None
    assert record.changed() == []
    judged = {row["claim"].split("/")[1] for row in record.rows if "claim" in row}
    assert judged == {*runs.CONTROLS, "constant-speed"}
    text, timed = runs.recorded(record)
    assert list(dict.fromkeys(text.model)) == list(runs.JUDGED)  # no time was left for the others
    assert set(timed.model) == {runs.OURS, runs.ROTARY}
    assert set(timed.length) == {32, 64}
    assert all(row["origin"] == "record" for row in record.rows if "claim" in row)
    assert "TNL, no gate" in capsys.readouterr().out
    assert json.loads(path.read_text())["commit"] == "abc"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine could make the record")
def test_the_command_wants_a_gpu(tmp_path: Path, capsys):
    assert runs.main(["--record", str(tmp_path / "x.json"), "--commit", "abc"]) == 2
    assert "GPU" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
