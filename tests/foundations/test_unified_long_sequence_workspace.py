"""The mixers of ``attnlab.mixers`` are matrices between tokens too, found by asking for one token at a time."""

from __future__ import annotations

import inspect

import pandas as pd
import pytest
import torch

from attnlab import mixers
from attnlab.foundations import unified_long_sequence as chapter
from attnlab.foundations import unified_long_sequence_workspace as workspace

WIDTH = 5


def tokens(length, width=WIDTH, batch=2):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(name, length, width=WIDTH):
    return chapter.build(name, width, length).double()


# rotary positions pair up the channels
SIZES = [
    (name, length, 6 if name == "retention" else width)
    for name in chapter.WORKSPACE
    for length, width in [(1, 5), (2, 1), (67, 5)]
]


@pytest.mark.parametrize(("name", "length", "width"), SIZES)
def test_the_matrix_times_the_values_is_the_output(name, length, width):
    mixer, x = built(name, length, width), tokens(length, width)
    found = mixer.mix(x)
    assert found.matrix.shape[-2:] == (length, length)
    torch.testing.assert_close(mixer(x), found.output(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name, kind in chapter.WORKSPACE.items() if kind.causal])
def test_causal_mixers_do_not_see_the_future(name):
    mixer, x = built(name, 21, 6), tokens(21, 6)
    changed = x.clone()
    changed[:, 13:] += 1
    torch.testing.assert_close(mixer(changed)[:, :13], mixer(x)[:, :13], rtol=0, atol=1e-12)


def test_the_matrix_of_the_delta_rule_is_the_inverse_of_a_triangle():
    mixer, x = built("delta rule", 19), tokens(19)
    asked = mixer.asked(x)
    q, k, b = (
        asked.q[:, :, 0],
        torch.nn.functional.normalize(asked.k[:, :, 0], dim=-1),
        asked.log_decay[:, :, 0, 0].exp(),
    )
    erased = torch.eye(19, dtype=x.dtype) + b[..., None] * (k @ k.mT).tril(-1)
    wanted = (q @ k.mT).tril() * WIDTH**-0.5 @ torch.linalg.inv(erased) * b[:, None]
    torch.testing.assert_close(mixer.mix(x).matrix, wanted, rtol=0, atol=1e-12)


def test_the_matrix_of_flow_attention_is_that_of_its_flows():
    mixer, x = built("flow attention", 19), tokens(19)
    q, k = (y[:, :, 0].sigmoid() for y in mixer.asked(x)[:2])
    flow = mixers.flow_quantities(*mixer.asked(x)[:2])
    incoming, gate, sent = flow.incoming[..., 0], flow.conserved_incoming[..., 0], flow.conserved_outgoing[..., 0]
    wanted = (q @ k.mT) * (gate.sigmoid() / incoming)[..., None] * 19 * sent.clamp(-1, 1).softmax(1)[:, None]
    torch.testing.assert_close(mixer.mix(x).matrix, wanted, rtol=0, atol=1e-12)


def test_hgrn_has_a_matrix_for_each_channel():
    mixer, x = built("HGRN, a channel", 11), tokens(11)
    log_forget = mixer.asked(x).log_decay[:, :, 0].mT  # [B, D, T]
    kept = (log_forget.cumsum(-1)[..., None] - log_forget.cumsum(-1)[..., None, :]).exp().tril()
    torch.testing.assert_close(mixer.mix(x).matrix, kept * -log_forget.expm1()[..., None, :], rtol=0, atol=1e-12)


def test_the_table_says_what_the_matrices_are():
    table = pd.DataFrame([chapter.properties(name) for name in chapter.WORKSPACE]).set_index("mixer")
    assert table["M φ(X) − fast form"].max() < 1e-10
    assert table.asks.all()
    assert table.causal.tolist() == [kind.causal for kind in chapter.WORKSPACE.values()]
    assert table.index[table["rows sum to 1"]].tolist() == ["Aaren"]
    assert not table.Toeplitz.any()
    of_one = ["HGRN, a channel", "Aaren"]  # a number a channel is all that is handed over
    assert table["rank past to future"].tolist() == [1 if name in of_one else 8 for name in table.index]


def test_no_mixer_of_the_workspace_is_missing():
    forms = {"attend", "chunked", "parallel", "recurrent"}  # of the recurrence that GatedMixer shows
    softmax = {"blockwise_attention", "split_kv_attention"}  # the matrix of SoftmaxMixer, in pieces
    parts = {
        "decayed_scores",
        "elu_plus_one",
        "empty",
        "flow_quantities",
        "leaf",
        "merge",
        "read",
        "rotate",
        "summarise",
    }
    parts |= {"lightning_log_decay", "retnet_log_decay", "taylor_features"}
    functions = {name for name in mixers.__all__ if inspect.isfunction(getattr(mixers, name))}
    shown = {name for name in functions if f"mixers.{name}(" in inspect.getsource(workspace)} - parts
    assert functions - forms - softmax - parts == shown | {"linear_attention"}
