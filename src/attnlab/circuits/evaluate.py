r"""How well a circuit does the task when everything outside it is ablated.

Every destination reads its own mixture: what a source writes *in this run* where the edge is in the circuit, what it writes
under ablation where it is not. With the ablated residual :math:`R_d` in front of destination :math:`d` and the difference
:math:`\Delta_s` between the write of source :math:`s` in this run and its ablated write,

.. math:: x_d = R_d + \sum_s M_{sd} \Delta_s ,

so all ports of a layer are one matrix product of the mask with the differences, and a whole circuit is one forward pass
whatever its size (as in Miller et al. 2024, arXiv:2407.08734). The empty circuit is the ablated run, the full one the model.
What follows from the numbers is in :mod:`attnlab.circuits.faithfulness`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from attnlab.circuits.edges import PORTS, Wiring
from attnlab.circuits.graph import Graph
from attnlab.circuits.metrics import Metric, Readout, logit_diff
from attnlab.circuits.model import HookedLM, Run
from attnlab.circuits.pairs import Batch, Pairs
from attnlab.lab import progress

Ablation = Literal["resample", "mean", "zero"]
#: what a run captures so that every write can be made from it
KINDS = ("z", "mlp_out")


def evaluate(
    model: HookedLM,
    graph: Graph,
    pairs: Pairs,
    metrics: Metric | Sequence[Metric] = logit_diff,
    *,
    ablation: Ablation = "resample",
    batch_size: int = 16,
) -> dict[str, np.ndarray]:
    """Run the clean prompts through a circuit: ``{name of the metric: values [N]}``.

    Args:
        model: a model whose query heads each have a key and a value of their own.
        graph: the circuit. Pass ``~graph`` to keep the rest of the model instead.
        pairs: the prompts.
        metrics: what to measure.
        ablation: what a source writes along edges that are not in the circuit. ``"resample"``: what it writes on the corrupt
            prompt of the pair; ``"mean"``: its mean write over all corrupt prompts and positions; ``"zero"``: nothing.
            Biases of attention outputs are no source and stay.
        batch_size: pairs at once; ablated writes and differences take ``n_src * batch_size * T * d_model`` numbers each.

    Raises:
        ValueError: for grouped keys and values, parallel blocks, writes that are normed before they are added, a graph of
            another model, or an unknown ablation.
    """
    chosen = [metrics] if callable(metrics) else list(metrics)
    values = evaluate_many(model, [graph], pairs, chosen, ablation=ablation, batch_size=batch_size)[0]
    return {getattr(metric, "__name__", repr(metric)): row for metric, row in zip(chosen, values, strict=True)}


def evaluate_many(
    model: HookedLM,
    graphs: Sequence[Graph],
    pairs: Pairs,
    metrics: Sequence[Metric] = (logit_diff,),
    *,
    ablation: Ablation = "resample",
    batch_size: int = 16,
) -> np.ndarray:
    """As :func:`evaluate` for several circuits that share the ablated runs, ``[G, M, N]``."""
    _check(model, graphs, ablation)
    values = np.full((len(graphs), len(metrics), len(pairs)), np.nan)
    batches = list(pairs.batches(batch_size))
    runs = filled(model, graphs, pairs, metrics, values, batches, ablation=ablation, batch_size=batch_size)
    for _ in progress(runs, f"circuits, {pairs.name}", total=len(graphs) * len(batches)):
        pass
    return values


def filled(
    model: HookedLM,
    graphs: Sequence[Graph],
    pairs: Pairs,
    metrics: Sequence[Metric],
    values: np.ndarray,
    batches: Sequence[Batch] | None = None,
    *,
    ablation: Ablation = "resample",
    batch_size: int = 16,
) -> Iterator[int]:
    """Fill what is missing (NaN) in the table of :func:`evaluate_many`, one circuit on one batch at a time.

    Yields the number of circuits done so far on all batches together, so that work can stop in between and go on with the
    same table later. Close the generator before the model is used for anything else.
    """
    _check(model, graphs, ablation)
    done = 0
    with torch.no_grad(), _split_inputs(model):
        mean = _mean_writes(model, pairs, batch_size) if ablation == "mean" else None
    for batch in pairs.batches(batch_size) if batches is None else batches:
        columns = batch.index.numpy()
        stage: _Stage | None = None
        for row, graph in enumerate(graphs):
            if np.isnan(values[row][:, columns]).any():
                with torch.no_grad(), _split_inputs(model):
                    stage = stage or _Stage(model, batch, ablation, mean)
                    end = Readout(model, stage.run(graph), batch)
                    for column, metric in enumerate(metrics):
                        values[row, column, columns] = metric(end).cpu().numpy()
            done += 1
            yield done


# ------------------------------------------------------------------------------------------- one forward pass


class _Stage:
    """A batch of pairs with its ablated writes, on which any circuit can be run.

    Under resampling, nothing differs before the first token in which the prompts do, so only the positions from there on
    are run.
    """

    def __init__(self, model: HookedLM, batch: Batch, ablation: Ablation, mean: Tensor | None) -> None:
        self.model, self.batch = model, batch
        self.bias = _attention_bias(model)  # [L, d_model]
        self.first = int((batch.clean != batch.corrupt).any(0).nonzero()[0]) if ablation == "resample" else 0
        self.clean = model.run(batch.clean, capture=KINDS)
        _check_sum(model, self.clean, self.bias)
        self.clean.acts.clear()  # what remains is what a restart needs
        self.embed = self.clean.resid[0][:, self.first :]
        if ablation == "resample":
            corrupt = model.run(batch.corrupt, capture=KINDS, base=self.clean, first=self.first)
            self.ablated = _writes(model, corrupt)  # [n_src, B, T - first, d_model]
        elif mean is not None:
            self.ablated = mean[:, None, None].expand(-1, *batch.clean.shape, -1)
        else:
            self.ablated = self.embed.new_zeros(1).expand(Wiring.of(model.spec).n_src, *self.embed.shape)

    def run(self, graph: Graph) -> Tensor:
        """Residual in front of the logits at the last position, ``[B, 1, d_model]``."""
        sweep = _Sweep(self, graph)
        with self.model.bridge.hooks(fwd_hooks=sweep.hooks()):
            self.model.run(self.batch.clean, base=self.clean, first=self.first)
        return sweep.read(slice(-1, None), graph.wiring.n_src, last=True)[0]


class _Sweep:
    """One pass of one circuit, layer by layer: hooks that feed every port its mixture and note what is written."""

    def __init__(self, stage: _Stage, graph: Graph) -> None:
        self.stage, self.model, self.wiring = stage, stage.model, graph.wiring
        self.mask = graph.mask.to(stage.ablated)  # [n_src, n_dst]
        # what each source writes here minus its ablated write, [n_src, B, T, d_model]; filled as the sources write
        self.difference = stage.ablated.new_empty(stage.ablated.shape)
        self.difference[0] = stage.embed - stage.ablated[0]
        self.residual = stage.ablated[0]  # what a port outside the circuit reads at this point, [B, T, d_model]
        self.inputs: dict[str, Tensor] = {}

    def hooks(self) -> list[tuple[str, Callable[..., Any]]]:
        hooks: list[tuple[str, Callable[..., Any]]] = []
        for layer in range(self.wiring.n_layers):
            block = f"blocks.{layer}"
            hooks += [(f"{block}.attn.hook_{port}_input", self._reading_head(layer, port)) for port in PORTS]
            hooks += [(f"{block}.attn.hook_z", self._writing_heads(layer))]
            hooks += [(f"{block}.ln2.hook_in", self._reading_mlp(layer))]
            hooks += [(f"{block}.mlp.hook_out", self._writing_mlp(layer))]
        return hooks

    def read(self, ports: slice, before: int, last: bool = False) -> Tensor:
        """What some destinations read from the first ``before`` sources, ``[ports, B, T, d_model]`` (T = 1 with ``last``)."""
        at = slice(-1, None) if last else slice(None)
        return self.residual[:, at] + torch.einsum(
            "sp,sbtd->pbtd", self.mask[:before, ports], self.difference[:before, :, at]
        )

    def _reading_head(self, layer: int, port: str) -> Callable[..., Tensor]:
        heads = self.wiring.n_heads

        def read(act: Tensor, hook: Any) -> Tensor:
            if port == "q":  # comes first: one product serves all three ports
                ports = slice(self.wiring.port(layer, "q").start, self.wiring.port(layer, "v").stop)
                parts = self.read(ports, self.wiring.written_before(layer)).split(heads)
                self.inputs = dict(zip(PORTS, parts, strict=True))
            return self.inputs.pop(port).permute(1, 2, 0, 3)  # [B, T, H, d_model]

        return read

    def _writing_heads(self, layer: int) -> Callable[..., Tensor]:
        def write(z: Tensor, hook: Any) -> Tensor:
            rows = self.wiring.heads_of(layer)
            ablated = self.stage.ablated[rows]
            self.difference[rows] = _head_writes(self.model, z, layer) - ablated
            self.residual = self.residual + ablated.sum(0) + self.stage.bias[layer]
            return z

        return write

    def _reading_mlp(self, layer: int) -> Callable[..., Tensor]:
        def read(act: Tensor, hook: Any) -> Tensor:
            return self.read(self.wiring.port(layer, "mlp"), self.wiring.mlp_of(layer))[0]

        return read

    def _writing_mlp(self, layer: int) -> Callable[..., Tensor]:
        def write(act: Tensor, hook: Any) -> Tensor:
            row = self.wiring.mlp_of(layer)
            self.difference[row] = act - self.stage.ablated[row]
            self.residual = self.residual + self.stage.ablated[row]
            return act

        return write


@contextmanager
def _split_inputs(model: HookedLM) -> Iterator[None]:
    """Give every port of every head a residual of its own while the block runs."""
    before = bool(getattr(model.bridge.cfg, "use_split_qkv_input", False))
    model.bridge.set_use_split_qkv_input(True)
    try:
        yield
    finally:
        model.bridge.set_use_split_qkv_input(before)


def _head_writes(model: HookedLM, z: Tensor, layer: int) -> Tensor:
    """``z`` [B, T, H, d_head] times the output projection, head by head: ``[H, B, T, d_model]``."""
    return torch.einsum("bthe,hed->hbtd", z, model.W_O[layer])


def _writes(model: HookedLM, run: Run) -> Tensor:
    """What every source wrote in a run that captured ``z`` and ``mlp_out``, ``[n_src, B, T, d_model]``."""
    parts = [run.resid[0][None]]
    for layer in range(model.spec.n_layers):
        parts += [_head_writes(model, run.acts["z", layer], layer), run.acts["mlp_out", layer][None]]
    return torch.cat(parts)


def _mean_writes(model: HookedLM, pairs: Pairs, batch_size: int) -> Tensor:
    """Mean write of every source over all corrupt prompts and positions, ``[n_src, d_model]``."""
    total, tokens = torch.zeros(()), 0
    for batch in pairs.batches(batch_size):
        writes = _writes(model, model.run(batch.corrupt, capture=KINDS))
        total, tokens = total + writes.sum((1, 2)), tokens + batch.corrupt.numel()
    return total / tokens


def _attention_bias(model: HookedLM) -> Tensor:
    """The bias that each attention block adds besides its heads, ``[L, d_model]``."""
    bias = getattr(model.bridge, "b_O", None)  # the bridge raises AttributeError for models without
    return model.W_O.new_zeros(model.spec.n_layers, model.spec.d_model) if bias is None else bias.detach()


def _check(model: HookedLM, graphs: Sequence[Graph], ablation: str) -> None:
    spec = model.spec
    if ablation not in ("resample", "mean", "zero"):
        raise ValueError(f"ablation={ablation!r} is unknown; use 'resample', 'mean' or 'zero'")
    if spec.n_kv_heads != spec.n_heads:
        raise ValueError(
            f"model {spec.name} has {spec.n_heads} query heads on {spec.n_kv_heads} key/value groups, so an edge into one "
            "head's key is an edge into its whole group; pass ungrouped(model) of attnlab.circuits.ungroup"
        )
    parallel = getattr(model.bridge.cfg, "parallel_attn_mlp", False)
    if parallel or any("ln2" not in block.submodules for block in model.bridge.blocks):
        raise ValueError(
            f"model {spec.name} has blocks whose MLP does not follow the heads; use one with sequential blocks"
        )
    for graph in graphs:
        if graph.wiring != Wiring.of(spec):
            raise ValueError(
                f"graph is wired as {graph.wiring}, model {spec.name} as {Wiring.of(spec)}; use a graph of this model"
            )


def _check_sum(model: HookedLM, run: Run, bias: Tensor) -> None:
    """Refuse models whose residual is not the sum of what heads and MLPs write."""
    end = run.resid[model.spec.n_layers]
    if (_writes(model, run).sum(0) + bias.sum(0) - end).norm() > 1e-3 * end.norm():
        raise ValueError(
            f"model {model.spec.name} does more to what heads and MLPs write than add it up (a norm after the block, perhaps), "
            "so edges do not make up its residual; use a model that norms only what a block reads"
        )
