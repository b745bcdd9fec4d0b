"""Sequence mixers as pure functions: gated linear recurrences, softmax taken in pieces, flow attention.

Every mechanism exists in several forms (recurrent, chunked, parallel, scan) that compute the same function, work in float64
and carry a state across calls. Tensors are token-major, [B, T, H, D]; gates travel as logs. Start with
:func:`recurrent`, the definition, and read :mod:`attnlab.mixers.named` for what the papers make of it.
"""

from attnlab.mixers.decays import lightning_log_decay, retnet_log_decay
from attnlab.mixers.flow import Flow, FlowState, causal_flow_attention, flow_attention, flow_quantities
from attnlab.mixers.named import (
    delta_rule,
    elu_plus_one,
    gated_delta_rule,
    gla,
    hgrn,
    hgrn2,
    lightning_attention,
    linear_attention,
    retention,
    rotate,
    ssd,
    taylor_features,
)
from attnlab.mixers.recurrence import attend, chunked, decayed_scores, parallel, recurrent
from attnlab.mixers.softmax_merge import (
    Summary,
    aaren,
    blockwise_attention,
    empty,
    leaf,
    merge,
    read,
    split_kv_attention,
    summarise,
)

__all__ = [
    "Flow",
    "FlowState",
    "Summary",
    "aaren",
    "attend",
    "blockwise_attention",
    "causal_flow_attention",
    "chunked",
    "decayed_scores",
    "delta_rule",
    "elu_plus_one",
    "empty",
    "flow_attention",
    "flow_quantities",
    "gated_delta_rule",
    "gla",
    "hgrn",
    "hgrn2",
    "leaf",
    "lightning_attention",
    "lightning_log_decay",
    "linear_attention",
    "merge",
    "parallel",
    "read",
    "recurrent",
    "retention",
    "retnet_log_decay",
    "rotate",
    "split_kv_attention",
    "ssd",
    "summarise",
    "taylor_features",
]
