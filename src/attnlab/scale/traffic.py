"""How many bytes each way of spreading attention sends; the measured counts of :class:`~attnlab.scale.wire.Wire` must equal these."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal["ring", "ulysses", "gathered"]
METHODS: tuple[Method, ...] = get_args(Method)


def bytes_sent(
    method: Method,
    ranks: int,
    tokens: int,
    *,
    heads: int,
    kv_heads: int,
    width: int,
    value_width: int | None = None,
    element: int = 2,
    gradient: int | None = None,
    backward: bool = False,
) -> int:
    """Bytes that one rank sends in a forward, or in a backward pass.

    With w ranks of n tokens, queries of d = heads x width and keys and values of d_kv numbers a token:

    * ring: keys and values pass every other rank, (w - 1) n 2 d_kv. Backward they do so again, and their gradients travel one
      step further, home: + w n 2 d_kv.
    * ulysses: every rank keeps 1/w of the heads of everything, (w - 1)/w n (2 d + 2 d_kv), backward the same.
    * gathered: keys and values go to every other rank, (w - 1) n 2 d_kv; backward so do their gradients.

    Args:
        ranks: w.
        tokens: n, on one rank, times the batch.
        element: bytes a number of the inputs.
        gradient: bytes a number in which the ring adds up gradients of keys and values; as ``element`` if left out.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; use one of {', '.join(METHODS)}")
    value_width = width if value_width is None else value_width
    keys_and_values = tokens * kv_heads * (width + value_width)
    queries_and_outputs = tokens * heads * (width + value_width)
    if method == "ulysses":
        return (ranks - 1) * (queries_and_outputs + keys_and_values) * element // ranks
    sent = (ranks - 1) * keys_and_values * element
    if backward and method == "ring" and ranks > 1:
        sent += ranks * keys_and_values * (element if gradient is None else gradient)
    return sent
