"""All ways of spreading attention against one process: outputs, gradients and bytes, on ranks that are threads."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attnlab import scale
from attnlab.scale import demo
from attnlab.scale.traffic import METHODS
from attnlab.scale.wire import ThreadWire

SIZES = [  # (ranks, length, heads, key heads)
    (1, 14, 2, 1),
    (2, 28, 4, 2),
    (3, 42, 6, 3),
    (4, 40, 8, 4),
]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("layout", scale.LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("ranks", "length", "heads", "kv_heads"), SIZES)
def test_output_gradients_and_bytes(ranks, length, heads, kv_heads, method, layout, causal):
    problem = demo.Problem(length, heads, kv_heads, width=5, batch=2, causal=causal, seed=ranks)
    for row in scale.threads(demo.compare, ranks, method, layout, problem, 1, time_limit_s=20):
        assert row["error"] < 1e-10
        assert row["gradient error"] < 1e-10
        for name in ("forward", "backward"):
            assert row[f"{name} bytes"] == row[f"{name} bytes, formula"]


@pytest.mark.parametrize("block_size", [1, 3, 5, 100])
@pytest.mark.parametrize("layout", scale.LAYOUTS)
def test_the_size_of_a_block_changes_nothing(layout, block_size):
    q, k, v, _ = demo.Problem(length=36, width=3).draw()

    def job(wire: scale.Wire) -> torch.Tensor:
        mine = [scale.shard(x, wire.ranks, layout)[wire.rank] for x in (q, k, v)]
        return scale.ring_attention(*mine, wire, causal=True, layout=layout, block_size=block_size)

    whole = scale.unshard(scale.threads(job, 3, time_limit_s=20), layout)
    torch.testing.assert_close(whole, demo.one_process(demo.Problem(length=36, width=3))[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("rows", [1, 5, 36, 37])
@pytest.mark.parametrize(("batch", "length", "heads", "kv_heads"), [(2, 37, 6, 2), (1, 37, 3, 3), (1, 1, 2, 1)])
def test_one_process_takes_queries_in_blocks(monkeypatch, batch, length, heads, kv_heads, rows, causal):
    problem = demo.Problem(length, heads, kv_heads, width=5, batch=batch, causal=causal)
    q, k, v, do = problem.draw()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    key, value = (x.repeat_interleave(heads // kv_heads, 2).transpose(1, 2) for x in (k, v))
    o = scaled_dot_product_attention(q.transpose(1, 2), key, value, is_causal=causal).transpose(1, 2)
    o.backward(do)
    monkeypatch.setattr(demo, "SCORES", rows * batch * heads * length + 1)
    for found, wanted in zip(demo.one_process(problem), (o, *(x.grad for x in inputs)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_a_block_of_queries_stays_within_the_bound_unless_it_is_one_row(monkeypatch):
    blocks, attention = [], demo.F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        blocks.append(q.shape[2])
        return attention(q, k, v, **options)

    monkeypatch.setattr(demo.F, "scaled_dot_product_attention", watched)
    for scores, forward in ((2**27, [10]), (2 * 4 * 10 * 4, [4, 4, 2]), (1, [1] * 10)):
        monkeypatch.setattr(demo, "SCORES", scores)
        demo.one_process(demo.Problem(length=10, width=3, batch=2))
        assert blocks == forward + forward[::-1]  # backward computes them again, from the last on
        blocks.clear()


def test_all_forms_share_one_reference(monkeypatch):
    problem, calls, reference = demo.Problem(length=8, width=3), [], demo.reference

    def counted(*arguments):
        calls.append(arguments)
        return reference(*arguments)

    monkeypatch.setattr(demo, "reference", counted)
    [rows] = scale.threads(demo.every_form, 1, problem, 1, time_limit_s=20)
    assert len(rows) == 9
    assert max(max(row["error"], row["gradient error"]) for row in rows) < 1e-10
    assert len(calls) == 1


def test_half_precision_adds_up_in_float32_whatever_the_number_of_ranks():
    errors = {}
    for ranks in (1, 2, 8):
        problem = demo.Problem(length=64, width=8, dtype=torch.bfloat16)
        rows = scale.threads(demo.compare, ranks, "ring", "zigzag", problem, 1, time_limit_s=20)
        errors[ranks] = max(row["error"] for row in rows)
    assert errors[1] < 1e-2
    assert errors[8] < 2 * errors[1]  # the merge adds nothing to what rounding the output costs


def test_values_may_have_a_width_of_their_own_and_the_scale_is_an_argument():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 12, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, 12, 2, 7, generator=generator, dtype=torch.float64)
    wanted = torch.softmax(torch.einsum("bthk,bshk->bhts", q, k) * 0.3, -1) @ v.transpose(1, 2)

    def job(wire: scale.Wire) -> torch.Tensor:
        mine = [scale.shard(x, wire.ranks, "zigzag")[wire.rank] for x in (q, k, v)]
        return scale.ring_attention(*mine, wire, scale=0.3)

    found = scale.unshard(scale.threads(job, 3, time_limit_s=20), "zigzag")
    torch.testing.assert_close(found, wanted.transpose(1, 2), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- bad input


def shards(**change):
    sizes = {"q": (1, 6, 4, 8), "k": (1, 6, 2, 8), "v": (1, 6, 2, 8)} | change
    return [torch.zeros(shape) for shape in sizes.values()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 6, 3, 8)}, "v: shape"),
        ({"k": (1, 6, 3, 8), "v": (1, 6, 3, 8)}, "k: 3 heads do not divide the 4 heads of q"),
        ({"k": (1, 5, 2, 8)}, r"k: shape \(1, 5, 2, 8\)"),
        ({"q": (6, 4, 8)}, r"q: shape \(6, 4, 8\) has 3 axes"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    with pytest.raises(scale.RankError, match=message):
        scale.threads(lambda wire: scale.ring_attention(*shards(**change), wire), 2)


def test_other_arguments_that_do_not_fit_are_named():
    q, k, v = shards()
    wire = ThreadWire(0, 1, [], 1.0)
    with pytest.raises(ValueError, match=r"v: torch\.float64 on cpu, but q is torch\.float32 on cpu"):
        scale.ring_attention(q, k, v.double(), wire)
    with pytest.raises(ValueError, match="block_size=0"):
        scale.ring_attention(q, k, v, wire, block_size=0)
    with pytest.raises(ValueError, match="layout='round' is unknown"):
        scale.ring_attention(q, k, v, wire, layout="round")


def test_ulysses_needs_heads_to_share_out():
    with pytest.raises(scale.RankError, match="k: 2 heads cannot be shared out to 4 ranks; use ring_attention"):
        scale.threads(lambda wire: scale.ulysses_attention(*shards(), wire), 4)


def test_ranks_that_pass_different_shapes_are_named():
    def job(wire: scale.Wire) -> torch.Tensor:
        width = 8 if wire.rank == 0 else 4
        x = torch.zeros(1, 6, 2, width)
        return scale.ring_attention(x, x, x, wire)

    with pytest.raises(
        scale.RankError, match=r"K is 4 on rank 1, but 8 on rank 0; V is 4 .*; all ranks must pass the same"
    ):
        scale.threads(job, 2, time_limit_s=5)


def test_ranks_that_pass_different_dtypes_are_named():
    def job(wire: scale.Wire) -> torch.Tensor:
        x = torch.zeros(1, 6, 2, 4, dtype=torch.bfloat16 if wire.rank else torch.float16)
        return scale.ring_attention(x, x, x, wire)

    with pytest.raises(
        scale.RankError, match=r"bfloat16 is 1 on rank 1, but 0 on rank 0; all ranks must pass the same"
    ):
        scale.threads(job, 2, time_limit_s=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "striped"}, r"layout \(of contiguous, zigzag, striped, from 0\) is 2 on rank 1, but 1 on rank 0"),
        ({"causal": False}, "causal is 0 on rank 1, but 1 on rank 0"),
        ({"scale": 0.25}, "scale is 0.25 on rank 1, but 0.5 on rank 0"),
    ],
)
@pytest.mark.parametrize("form", demo.FORMS.values())
def test_ranks_that_ask_for_different_attention_are_named(form, change, message):
    def job(wire: scale.Wire) -> torch.Tensor:
        x = torch.zeros(1, 6, 2, 4)
        return form(x, x, x, wire, **({"layout": "zigzag", "causal": True} | (change if wire.rank else {})))

    with pytest.raises(
        scale.RankError, match=rf"rank 0 raised ValueError: {message}; all.*rank 1 raised ValueError: {message}"
    ):
        scale.threads(job, 2, time_limit_s=5)


def test_ranks_that_call_different_methods_are_named():
    def job(wire: scale.Wire) -> torch.Tensor:
        x = torch.zeros(1, 6, 2, 4)
        return (scale.gathered_attention if wire.rank else scale.ring_attention)(x, x, x, wire)

    with pytest.raises(
        scale.RankError, match=r"method \(of ring, ulysses, gathered, from 0\) is 2 on rank 1, but 0 on rank 0"
    ):
        scale.threads(job, 2, time_limit_s=5)


def test_a_scale_that_is_the_default_one_is_the_same():
    def job(wire: scale.Wire) -> torch.Tensor:
        x = torch.zeros(1, 6, 2, 4)
        return scale.ring_attention(x, x, x, wire, scale=None if wire.rank else 0.5)

    assert len(scale.threads(job, 2, time_limit_s=5)) == 2
