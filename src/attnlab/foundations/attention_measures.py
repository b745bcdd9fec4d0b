"""What the chapter ``foundations/attention-from-scratch`` measures: spread of scores, cost by formula and clock, a real layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.foundations.attention_from_scratch import Layer, attention, causal, project, scores, share

# ------------------------------------------------------------------------------------------------- the scale of scores


def effective_keys(pattern: Tensor) -> Tensor:
    """e to the entropy of each row [..., S]: N for equal weights on N keys, 1 when one key has all the weight."""
    return torch.special.entr(pattern).sum(-1).exp()


def spread(widths: Sequence[int], keys: int = 256, queries: int = 200, seed: int = 0) -> pd.DataFrame:
    """Scores of normal queries and keys of each width, plain and scaled: their spread, and what softmax makes of it.

    Columns: ``width, scale`` (``none`` or ``K ** -0.5``), ``std`` of the scores, ``effective`` keys (e to the mean
    entropy), ``slope``: the mean over queries of ``sum_s p_s (1 - p_s)``, how far the weights still answer to a change
    of scores.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for width in widths:
        q, k = (torch.randn(1, n, 1, width, generator=generator, dtype=torch.float64) for n in (queries, keys))
        for name, scale in (("none", 1.0), ("K ** -0.5", None)):
            s = scores(q, k, scale)
            pattern = s.softmax(-1)
            rows.append(
                {
                    "width": width,
                    "scale": name,
                    "std": s.std().item(),
                    "effective": effective_keys(pattern).log().mean().exp().item(),
                    "slope": (pattern * (1 - pattern)).sum(-1).mean().item(),
                }
            )
    return pd.DataFrame(rows)


# ----------------------------------------------------------------------------------------------------------------- cost


class Cost(NamedTuple):
    """Work and least traffic of one pass."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """Operations for each byte moved, FLOP/B."""
        return self.flops / self.bytes


def attention_cost(queries: int, keys: int, *, n_heads: int, n_kv_heads: int, d_head: int, number: int = 2) -> Cost:
    """Of softmax(q k^T) v for one sequence, without a mask's savings; a multiply-add counts 2, an entry ``number`` bytes.

    Two products of 2 T S K operations a head. Least traffic: q and o once for every query head, k and v once for every
    key-value head; the scores never leave the chip.
    """
    flops = 2 * (2 * queries * keys * d_head) * n_heads
    numbers = 2 * queries * n_heads * d_head + 2 * keys * n_kv_heads * d_head
    return Cost(flops, numbers * number)


def projection_cost(tokens: int, *, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, number: int = 2) -> Cost:
    """Of the four matrices around it: 2 operations a weight and token; weights, inputs and outputs moved once."""
    weights = d_model * d_head * (2 * n_heads + 2 * n_kv_heads)
    numbers = weights + tokens * (2 * d_model + d_head * (2 * n_heads + 2 * n_kv_heads))
    return Cost(2 * weights * tokens, numbers * number)


def clock(fn: Callable[[], Any], seconds: float = 0.15) -> float:
    """Milliseconds of ``fn()``: the fastest of at least three runs, and of as many as ``seconds`` hold; one more warms up.

    The fastest, because other programs can only slow a run down.
    """
    fn()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begin = time.perf_counter()
        fn()
        times.append(time.perf_counter() - begin)
    return 1000 * min(times)


def time_lengths(
    lengths: Sequence[int], *, further: int = 16, d_model: int = 256, n_heads: int = 4, seed: int = 0
) -> pd.DataFrame:
    """Milliseconds on this machine, float32, no gradient, of the pieces of a layer at each length.

    Columns ``piece, length, ms``: ``projections`` (the four matrices, T tokens), ``prefill`` (T queries, T keys, causal,
    with the functions of the chapter), ``fused prefill`` (the same by torch, which never stores the scores) and
    ``decode`` (1 query, ``further`` T keys: it is so cheap that short pasts only show what a call costs).
    """
    generator = torch.Generator().manual_seed(seed)
    d_head = d_model // n_heads
    weights = torch.randn(4, d_model, d_model, generator=generator)
    rows = []
    for length in lengths:
        x = torch.randn(length, d_model, generator=generator)
        q, k, v = torch.randn(3, 1, length, n_heads, d_head, generator=generator)
        past = torch.randn(2, 1, further * length, n_heads, d_head, generator=generator)
        mask, heads_first = causal(length), torch.stack([q, k, v]).transpose(2, 3).contiguous()
        pieces: dict[tuple[str, int], Callable[[], Any]] = {
            ("projections", length): partial(torch.matmul, x, weights),
            ("prefill", length): partial(attention, q, k, v, mask),
            ("fused prefill", length): partial(_fused, *heads_first),
            ("decode", further * length): partial(attention, q[:, -1:], past[0], past[1]),
        }
        with torch.no_grad():
            rows += [{"piece": name, "length": tokens, "ms": clock(fn)} for (name, tokens), fn in pieces.items()]
    return pd.DataFrame(rows)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def exponent(lengths: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log(values) against log(lengths): 1 where doubling the length doubles the value, 2 where it is four times."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


# --------------------------------------------------------------------------------------------------------- a real layer


class Reading(NamedTuple):
    """A sentence as a Llama model reads it: token strings, and what enters and leaves the attention of every layer."""

    words: list[str]
    inputs: list[Tensor]  # [1, T, d] a layer, after the norm
    outputs: list[Tensor]  # [1, T, d] a layer, before the residual is added
    patterns: list[Tensor]  # [1, H, T, T] a layer


@torch.no_grad()
def read(model: Any, tokenizer: Any, text: str) -> Reading:
    """Run a Hugging Face Llama model (eager attention) on ``text`` and keep what its attention layers saw and said."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    handles = []
    for block in model.model.layers:
        handles.append(block.input_layernorm.register_forward_hook(lambda _m, _a, out: inputs.append(out)))
        handles.append(block.self_attn.register_forward_hook(lambda _m, _a, out: outputs.append(out[0])))
    try:
        patterns = list(model(ids, output_attentions=True).attentions)
    finally:
        for handle in handles:
            handle.remove()
    return Reading([tokenizer.decode([i]) for i in ids[0].tolist()], inputs, outputs, patterns)


def llama_layer(model: Any, layer: int) -> Layer:
    """The attention matrices of one layer of a Hugging Face Llama model, cut into heads."""
    module, config = model.model.layers[layer].self_attn, model.config

    def cut(linear: Any, heads: int) -> Tensor:  # torch keeps [out, in]; a head owns consecutive rows
        weight: Tensor = linear.weight.detach()
        return weight.unflatten(0, (heads, -1)).transpose(1, 2)

    H, Hkv = config.num_attention_heads, config.num_key_value_heads
    W_O = module.o_proj.weight.detach().T.unflatten(0, (H, -1))
    return Layer(cut(module.q_proj, H), cut(module.k_proj, Hkv), cut(module.v_proj, Hkv), W_O)


def rotary_base(model: Any) -> float:
    """The base of the model's rotary positions."""
    return float(model.config.rope_parameters["rope_theta"])


@torch.no_grad()
def score_maps(model: Any, reading: Reading) -> Tensor:
    """Scores of all heads before any mask, [L, H, T, T], recomputed from the weights by the functions of the chapter."""
    maps = []
    for number, x in enumerate(reading.inputs):
        q, k, _ = project(llama_layer(model, number), x, base=rotary_base(model))
        maps.append(scores(q, share(k, q.shape[2]))[0])
    return torch.stack(maps)


def habits(patterns: Tensor, words: Sequence[str]) -> pd.DataFrame:
    """What share of its weight each head puts where, averaged over the tokens that have a choice; patterns [L, H, T, T].

    Columns: ``head`` (such as ``16.0``), ``first token``, ``itself``, ``token before``, ``same word before``, ``after the
    same word`` (the token that followed an earlier copy of this one) and ``all alike`` (effective keys over keys).
    """
    names = [word.strip() for word in words]
    earlier = {t: [s for s in range(t) if names[s] == names[t]] for t in range(len(names))}
    earlier = {t: places for t, places in earlier.items() if places}
    if not earlier:
        raise ValueError(
            "words: no word occurs twice, so nothing can be said about repeated words; pick another sentence"
        )

    def share_at(shift: int) -> Tensor:
        return torch.stack(
            [patterns[:, :, t, [s + shift for s in places]].sum(-1) for t, places in earlier.items()]
        ).mean(0)

    keys = torch.arange(1, len(names) + 1)
    columns = {
        "first token": patterns[:, :, 1:, 0].mean(-1),
        "itself": patterns.diagonal(0, 2, 3)[..., 1:].mean(-1),
        "token before": patterns.diagonal(-1, 2, 3)[..., 1:].mean(-1),  # not of token 1, whose past is one token
        "same word before": share_at(0),
        "after the same word": share_at(1),
        "all alike": (effective_keys(patterns) / keys)[..., 1:].mean(-1),
    }
    layers, heads = patterns.shape[:2]
    names_of_heads = [f"{layer}.{head}" for layer in range(layers) for head in range(heads)]
    return pd.DataFrame({"head": names_of_heads} | {name: x.flatten().tolist() for name, x in columns.items()})


def extremes(table: pd.DataFrame) -> dict[str, str]:
    """For each habit the head that has most of it, such as ``{"token before": "16.0"}``; no head is named twice."""
    found: dict[str, str] = {}
    for habit in table.columns.drop("head"):
        rest = table[~table["head"].isin(list(found.values()))].set_index("head")
        found[habit] = str(rest[habit].idxmax())
    return found
