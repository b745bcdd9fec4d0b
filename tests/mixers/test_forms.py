"""Every form of every mechanism computes one function, in one call or in two with the state passed across."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from attnlab import mixers

B, H, K, V = 2, 3, 12, 20


def gates(draw, *shape):
    return F.logsigmoid(draw(*shape))


def qkv(draw, length):
    return {"q": draw(B, length, H, K), "k": draw(B, length, H, K), "v": draw(B, length, H, V)}


def unit_qkv(draw, length):
    x = qkv(draw, length)
    return {**x, "k": F.normalize(x["k"], dim=-1), "beta": 2 * draw(B, length, H).sigmoid()}


# name: (inputs [B, T, ...] from draw and T, mixer of (inputs, start, state, how))
MECHANISMS = {
    "no switch": (qkv, lambda x, start, state, **how: mixers.attend(**x, initial_state=state, **how)),
    "all switches": (
        lambda draw, t: {
            **qkv(draw, t),
            "log_decay": gates(draw, B, t, H, K),
            "write": draw(B, t, H),
            "erase": draw(B, t, H).sigmoid() / K,
        },
        lambda x, start, state, **how: mixers.attend(**x, initial_state=state, scale=0.7, **how),
    ),
    "linear_attention": (
        qkv,
        lambda x, start, state, **how: mixers.linear_attention(**x, initial_state=state, **how),
    ),
    "retention": (
        qkv,
        lambda x, start, state, **how: mixers.retention(**x, offset=start, initial_state=state, **how),
    ),
    "lightning_attention": (
        qkv,
        lambda x, start, state, **how: mixers.lightning_attention(
            **x, log_decay=mixers.lightning_log_decay(H, 1, 3, dtype=torch.float64), initial_state=state, **how
        ),
    ),
    "gla": (
        lambda draw, t: {**qkv(draw, t), "log_decay": gates(draw, B, t, H, K)},
        lambda x, start, state, **how: mixers.gla(**x, initial_state=state, **how),
    ),
    "hgrn2": (
        lambda draw, t: {"q": draw(B, t, H, K), "v": draw(B, t, H, V), "log_forget": gates(draw, B, t, H, K)},
        lambda x, start, state, **how: mixers.hgrn2(**x, initial_state=state, **how),
    ),
    "hgrn": (
        lambda draw, t: {"x": draw(B, t, V), "log_forget": gates(draw, B, t, V)},
        lambda x, start, state, **how: mixers.hgrn(**x, initial_state=state, **how),
    ),
    "ssd": (
        lambda draw, t: {
            "x": draw(B, t, H, V),
            "dt": F.softplus(draw(B, t, H)),
            "b": draw(B, t, H, K),
            "c": draw(B, t, H, K),
        },
        lambda x, start, state, **how: mixers.ssd(
            **x,
            a_log=torch.linspace(-1, 1, H, dtype=torch.float64),
            skip=torch.ones(H, dtype=torch.float64),
            initial_state=state,
            **how,
        ),
    ),
    "delta_rule": (unit_qkv, lambda x, start, state, **how: mixers.delta_rule(**x, initial_state=state, **how)),
    "gated_delta_rule": (
        lambda draw, t: {**unit_qkv(draw, t), "log_decay": gates(draw, B, t, H)},
        lambda x, start, state, **how: mixers.gated_delta_rule(**x, initial_state=state, **how),
    ),
    "aaren": (
        lambda draw, t: {"s": 50 * draw(B, t, H), "v": draw(B, t, H, V)},
        lambda x, start, state, **how: mixers.aaren(**x, initial=state, **how),
    ),
    "causal_flow_attention": (
        qkv,
        lambda x, start, state, **how: mixers.causal_flow_attention(**x, initial_state=state, **how),
    ),
}
FORMS = [
    *({"form": "chunked", "chunk_size": size} for size in (1, 3, 16, 63, 200)),
    {"form": "recurrent"},
    {"form": "parallel"},
    {"form": "scan"},
    {"form": "cumsum"},
]
ONLY = {
    "scan": {"aaren"},
    "cumsum": {"causal_flow_attention"},
    "parallel": MECHANISMS.keys() - {"causal_flow_attention"},
}
CASES = [
    pytest.param(name, how, id="-".join([name, *map(str, how.values())]))
    for name in MECHANISMS
    for how in FORMS
    if name in ONLY.get(how["form"], MECHANISMS)
]


def parts(state):
    return [state] if isinstance(state, torch.Tensor) else [x for x in state if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("length", [1, 37, 63, 100])
@pytest.mark.parametrize(("name", "how"), CASES)
def test_all_forms_are_one_function(name, how, length, draw):
    make, run = MECHANISMS[name]
    inputs = make(draw, length)
    wanted, end = run(inputs, 0, None, form="recurrent")
    for cuts in ([0, length], [0, length // 3, length]):
        state, outputs = None, []
        for start, stop in itertools.pairwise(cuts):
            if start < stop:
                o, state = run({key: x[:, start:stop] for key, x in inputs.items()}, start, state, **how)
                outputs.append(o)
        torch.testing.assert_close(torch.cat(outputs, 1), wanted, rtol=1e-10, atol=1e-10)
        for x, y in zip(parts(state), parts(end), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
