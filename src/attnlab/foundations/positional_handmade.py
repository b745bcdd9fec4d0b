"""Positional networks whose weights are set by hand: algorithms with a fixed communication pattern, exact at any scale.

Each is an ordinary :class:`~attnlab.foundations.positional_attention.Network` with ``Positional`` weights; nothing but its numbers
is special. The messages of a round travel along attention, the computing happens in the MLP, and *who does what* is written into
the attention too, because all places share one MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attnlab.foundations.positional_attention import Layer, Network, Positional

NEVER = -1e5  # a score so low that its exponential is zero exactly, in float32 and float64
Stage = list[tuple[int, int]]  # pairs (low, high): the smaller number goes to place low, the larger to high


def set_weights(weights: Positional, matrices: Tensor) -> None:
    """Make the attention weights what is asked for: matrices [H, N, N] with rows that sum to 1.

    With one-hot positions queries can be the identity and keys ``log A``: any row-stochastic matrix is within reach, and a score
    of :data:`NEVER` gives a zero.

    Raises:
        ValueError: a shape that does not fit, a negative entry or a row that does not sum to 1.
    """
    heads, nodes = weights.heads, weights.key_width
    if matrices.shape != (heads, nodes, nodes):
        raise ValueError(f"matrices: shape {[heads, nodes, nodes]} is wanted, not {list(matrices.shape)}")
    if (matrices < 0).any() or not torch.allclose(matrices.sum(-1), torch.ones((), dtype=matrices.dtype)):
        raise ValueError("matrices: numbers from 0 on are wanted, each row with the sum 1")
    scores = matrices.log().clamp(min=NEVER) * nodes**0.5  # [H, query, key]
    with torch.no_grad():
        weights.qk.bias.zero_()
        blocks = weights.qk.weight.view(heads, 2, nodes, nodes)  # [H, query or key, feature, position]
        blocks[:, 0] = torch.eye(nodes)
        blocks[:, 1] = scores  # feature i of the key at position j
    # q_i . k_j = sum over features f of 1[f = i] * scores[f, j]


def blank(length: int, layers: int, *, width: int, heads: int, hidden: int) -> Network:
    """A float64 network whose numbers are all zero: every node attends to every other alike, and says nothing."""
    network = Network(Positional, length, width=width, heads=heads, layers=layers, hidden=hidden).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    return network.requires_grad_(False).eval()


def reads(length: int, sources: Sequence[int | None]) -> Tensor:
    """A matrix [N, N] in which place i reads place ``sources[i]``, or the scratch node (zero) for None."""
    matrix = torch.zeros(length + 1, length + 1, dtype=torch.float64)
    for place, source in enumerate([*sources, None]):
        matrix[place, length if source is None else source] = 1
    return matrix


def _think(layer: Layer, first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> None:
    """Write the two matrices of a layer's MLP, whose inputs are what was heard and then what was known."""
    for linear, rows in zip((layer.mlp[0], layer.mlp[2]), (first, second), strict=True):
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(torch.tensor(rows, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------------------- the sum


def cumulative_sum(length: int) -> Network:
    """Running sums in one layer: place i gives each place up to i the weight 1/n, and what is left over to the scratch node.

    Softmax makes averages, and the average over i places has a 1/i in it that a shared MLP could not undo. The scratch node, whose
    number is zero, takes the surplus: every row averages over n, and one factor n undoes that everywhere.

    Raises:
        ValueError: no place.
    """
    _some(length)
    network = blank(length, 1, width=1, heads=1, hidden=2)
    averages = torch.zeros(length + 1, length + 1, dtype=torch.float64)
    averages[:length, :length] = torch.ones(length, length, dtype=torch.float64).tril() / length
    averages[:length, length] = torch.arange(length - 1, -1, -1, dtype=torch.float64) / length
    averages[length, length] = 1  # the scratch node keeps to itself
    with torch.no_grad():
        layer = _layers(network)[0]
        set_weights(_positional(layer), averages[None])
        for linear, factor in ((network.encode, 1), (layer.v, 1), (layer.o, length), (network.decode, 1)):
            linear.weight.fill_(factor)
        _think(layer, [[1, 0], [-1, 0]], [[1, -1]])  # heard = relu(heard) - relu(-heard)
    return network


# ----------------------------------------------------------------------------------------------------------- the minimum


def prefix_min(length: int) -> Network:
    """Running minima in ``ceil(log2 n)`` layers: in layer l place i hears place i - 2^l and keeps the smaller number.

    ``min(a, b) = b - relu(b - a)``. A place with nobody that far to its left hears itself.

    Raises:
        ValueError: no place.
    """
    _some(length)
    layers = max(1, math.ceil(math.log2(length)))
    network = blank(length, layers, width=1, heads=1, hidden=3)
    with torch.no_grad():
        network.encode.weight.fill_(1)
        network.decode.weight.fill_(1)
        for depth, layer in enumerate(_layers(network)):
            sources = [place - 2**depth if place >= 2**depth else place for place in range(length)]
            set_weights(_positional(layer), reads(length, sources)[None])
            layer.v.weight.fill_(1)
            layer.o.weight.fill_(1)
            # inputs (heard, known): heard = relu(heard) - relu(-heard), minus relu(heard - known)
            _think(layer, [[1, 0], [-1, 0], [1, -1]], [[1, -1, -1]])
    return network


# ---------------------------------------------------------------------------------------------------------------- sorting


def odd_even_merge(length: int) -> list[Stage]:
    """Batcher's odd-even merge sort: stages of comparators that touch disjoint places; ``k (k + 1) / 2`` stages for n = 2^k.

    Raises:
        ValueError: a length that is no power of two, or less than 2.
    """
    if length < 2 or length & (length - 1):
        raise ValueError(f"length: a power of two from 2 on is wanted, not {length}; pad the list with large numbers")
    stages, run = [], 1
    while run < length:
        step = run
        while step >= 1:
            pairs = [
                (low, low + step)
                for start in range(step % run, length - step, 2 * step)
                for low in range(start, min(start + step, length - step))
                if low // (2 * run) == (low + step) // (2 * run)
            ]
            stages.append(pairs)
            step //= 2
        run *= 2
    return stages


def sorting(length: int, stages: Sequence[Stage] | None = None) -> Network:
    """A sorting network as a positional Transformer: one layer a stage, and one that reads out.

    All places run the same MLP, so none can know whether it should keep the smaller number or the larger. So each computes *both*,
    ``(min, max)`` of two numbers, and the attention of the next layer picks: four heads read the minimum or the maximum of this
    place, and of the partner to come. The head that is not meant reads the scratch node, which is zero.

    Args:
        length: n.
        stages: comparators, in order; left out, :func:`odd_even_merge`.
    """
    stages = odd_even_merge(length) if stages is None else list(stages)
    network = blank(length, len(stages) + 1, width=4, heads=4, hidden=8)
    with torch.no_grad():
        network.encode.weight[:, 0] = torch.tensor([1, 1, 0, 0])  # (min, max) of a number with itself
        network.decode.weight[0] = torch.tensor([1, 0, 0, 0])
        for index, layer in enumerate(_layers(network)):
            low = _low_places(stages[index - 1]) if index else set(range(length))
            partner = _partners(length, stages[index]) if index < len(stages) else list(range(length))
            set_weights(_positional(layer), torch.stack(_picks(length, low, partner)))
            layer.v.weight.copy_(_rows([0, 1, 0, 1], 4))  # heads 1 and 3 carry minima, 2 and 4 maxima
            layer.o.weight.copy_(torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]))
            # of (a, b): min = b - relu(b - a), max = a + relu(b - a)
            signs = [[1, 0], [-1, 0], [0, 1], [0, -1], [-1, 1]]
            first = [[*row, 0, 0, 0, 0, 0, 0] for row in signs] + [[0] * 8] * 3
            second = [[0, 0, 1, -1, -1, 0, 0, 0], [1, -1, 0, 0, 1, 0, 0, 0], [0] * 8, [0] * 8]
            _think(layer, first, second)
    return network


def _picks(length: int, low: set[int], partner: Sequence[int]) -> list[Tensor]:
    """The four heads: own minimum, own maximum, the partner's minimum, the partner's maximum; scratch where not meant."""
    own = list(range(length))
    return [
        reads(length, [place if (place in low) == wants_low else None for place in places])
        for places in (own, partner)
        for wants_low in (True, False)
    ]


def _low_places(stage: Stage) -> set[int]:
    """Where the minimum is to be kept. A place without a partner compared with itself: either will do."""
    return set().union(*({low} for low, _ in stage)) if stage else set()


def _partners(length: int, stage: Stage) -> list[int]:
    partner = list(range(length))
    for low, high in stage:
        partner[low], partner[high] = high, low
    return partner


def _rows(picks: Sequence[int], width: int) -> Tensor:
    return torch.eye(width, dtype=torch.float64)[list(picks)]


def _layers(network: Network) -> list[Layer]:
    return [layer for layer in network.layers if isinstance(layer, Layer)]


def _positional(layer: Layer) -> Positional:
    assert isinstance(layer.weights, Positional)
    return layer.weights


# -------------------------------------------------------------------------------------------------------- what can be seen

ALGORITHMS = {"running minimum": prefix_min, "running sum": cumulative_sum, "sorting": sorting}


def rounds(algorithm: str, x: Tensor) -> list[Tensor]:
    """The numbers that all places hold before the first round and after each, for a list x [n]: tensors [n].

    Raises:
        ValueError: an unknown algorithm, no list, numbers that are not finite, or a length that the algorithm refuses.
    """
    build = _known(algorithm)
    if x.ndim != 1:
        raise ValueError(f"x: one list [n] is wanted, not shape {list(x.shape)}")
    if wrong := int((~x.isfinite()).sum()):  # a weight of zero times NaN is NaN: every place would hold it
        raise ValueError(f"x: {wrong} of {len(x)} numbers are NaN or infinite; leave such lists out")
    held, lists = [x.double()], x.double()[None, :, None]  # [1, n, 1]
    if algorithm == "sorting":
        stages = odd_even_merge(len(x))
        return held + [sorting(len(x), stages[: end + 1])(lists)[0, :, 0] for end in range(len(stages))]
    network = build(len(x))
    state = network.encode(torch.cat([lists, lists.new_zeros(1, 1, 1)], dim=1))
    for layer in network.layers:
        state, _ = layer(state, network.position)
        held.append(network.decode(state)[0, :-1, 0])
    return held


def wires(algorithm: str, length: int) -> list[list[tuple[int, int]]]:
    """Who hears whom in every round: pairs (from, to) of places, from the attention weights of the network.

    A place always knows its own number; the wire to itself is listed too.
    """
    network = _known(algorithm)(length)
    found = []
    for layer in _layers(network)[: len(odd_even_merge(length)) if algorithm == "sorting" else None]:
        weights = layer.weights(network.position, network.position)[:, :length, :length].amax(0)  # any of the heads
        heard = {(source, place) for place, source in (weights > 0).nonzero().tolist()}
        found.append(sorted(heard | {(place, place) for place in range(length)}))
    return found


def _some(length: int) -> None:
    if length < 1:
        raise ValueError(f"length: at least one place is wanted, not {length}")


def _known(algorithm: str) -> Callable[[int], Network]:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: {algorithm!r} is unknown; choose one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[algorithm]
