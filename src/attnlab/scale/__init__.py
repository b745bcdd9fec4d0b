"""Exact attention over a sequence that is spread over several ranks: ring, all-to-all and gathered keys.

A job is a function ``f(wire, ...)`` that every rank runs; :func:`processes` starts it here, ``torchrun`` on a cluster.
"""

from attnlab.scale.attention import gathered_attention, ring_attention, ulysses_attention
from attnlab.scale.launch import RankError, joined, processes, threads
from attnlab.scale.layouts import LAYOUTS, causal_pairs, positions, shard, unshard
from attnlab.scale.traffic import bytes_sent
from attnlab.scale.wire import ProcessWire, ThreadWire, Wire

__all__ = [
    "LAYOUTS",
    "ProcessWire",
    "RankError",
    "ThreadWire",
    "Wire",
    "bytes_sent",
    "causal_pairs",
    "gathered_attention",
    "joined",
    "positions",
    "processes",
    "ring_attention",
    "shard",
    "threads",
    "ulysses_attention",
    "unshard",
]
