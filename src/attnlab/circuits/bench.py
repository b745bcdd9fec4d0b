"""Time exact END patching of heads against the library's own, on the same work: ``python -m attnlab.circuits.bench``.

Both patch ``z`` of single heads at the last position of indirect-object prompts: clean values into the corrupt run, which is
the convention of ``transformer_lens.patching`` and ``direction="denoise"`` here. The library runs the whole prompt through
the whole model once a head; :func:`~attnlab.circuits.patching.activation_patch` restarts at the head's layer and position.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from attnlab.circuits.model import HookedLM, Node
from attnlab.circuits.pairs import Batch, Pairs
from attnlab.circuits.patching import activation_patch
from attnlab.circuits.tasks import ioi

TOLERANCE = 1e-4  # largest difference of two logit differences in float32


@dataclass(frozen=True)
class Timing:
    """Effects of both ways on the same heads and pairs, ``[G, N]`` in logits, and the seconds that each took.

    Ours runs before and after the library, since the load of a shared machine changes: two times that differ much say that
    the ratio is worth little.
    """

    heads: Sequence[Node]
    ours: np.ndarray
    library: np.ndarray
    seconds: tuple[float, float]
    library_seconds: float

    @property
    def difference(self) -> float:
        """The largest difference between the two in logits."""
        return float(np.abs(self.ours - self.library).max())

    def __str__(self) -> str:
        n, ours = len(self.heads), sum(self.seconds) / 2
        before, after = self.seconds
        return (
            f"{n} heads, {self.ours.shape[1]} pairs; largest difference {self.difference:.1e} logits\n"
            f"attnlab.circuits          {ours:8.2f} s {1000 * ours / n:8.1f} ms a head ({before:.2f} s before, {after:.2f} s after)\n"
            f"transformer_lens.patching {self.library_seconds:8.2f} s {1000 * self.library_seconds / n:8.1f} ms a head\n"
            f"ratio                     {self.library_seconds / ours:8.1f}"
        )


def compare(model: HookedLM, pairs: Pairs, heads: Sequence[Node]) -> Timing:
    """Patch the same heads both ways, one after the other; each time includes its own unpatched runs.

    Raises:
        RuntimeError: if the two differ by more than :data:`TOLERANCE`.
    """
    (first,) = pairs.subset([0]).batches()  # first calls allocate: not measured
    activation_patch(model, pairs.subset([0]), heads[:1], direction="denoise")
    library_effect(model, first, heads[:1])

    before, ours = _timed(lambda: activation_patch(model, pairs, heads, direction="denoise").effect)
    during, library = _timed(lambda: _library(model, pairs, heads))
    after, _ = _timed(lambda: activation_patch(model, pairs, heads, direction="denoise").effect)
    timing = Timing(heads, ours, library, (before, after), during)
    if not timing.difference < TOLERANCE:  # also true for NaN
        raise RuntimeError(f"the two ways disagree by {timing.difference:.2e} logits; tolerance {TOLERANCE:.0e}")
    return timing


def _timed(work: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Seconds and result of ``work()``."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _library(model: HookedLM, pairs: Pairs, heads: Sequence[Node]) -> np.ndarray:
    """:func:`library_effect` of all pairs, ``[G, N]``."""
    effect = np.empty((len(heads), len(pairs)))
    for batch in tqdm(list(pairs.batches()), "lengths of transformer_lens"):
        effect[:, batch.index.numpy()] = library_effect(model, batch, heads)
    return effect


def library_effect(model: HookedLM, batch: Batch, heads: Sequence[Node]) -> np.ndarray:
    """Change of the logit difference, ``[G, B]``, by ``transformer_lens.patching`` on one batch."""
    from transformer_lens import patching

    clean, corrupt = batch.clean.to(model.device), batch.corrupt.to(model.device)
    names = {f"blocks.{layer}.attn.hook_z" for layer, _ in heads}
    index = pd.DataFrame([(node.layer, clean.shape[1] - 1, node.head) for node in heads])
    index.columns = pd.Index(["layer", "pos", "head"])
    rows = torch.arange(len(batch))

    def difference(logits: Tensor) -> Tensor:
        end = logits[:, -1]
        return end[rows, batch.answers[:, 0]] - end[rows, batch.foils[:, 0]]

    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(clean, names_filter=lambda name: name in names)
        result = patching.generic_activation_patch(
            model.bridge,
            corrupt,
            cache,
            difference,
            patching.layer_pos_head_vector_patch_setter,
            "z",
            index_df=index,
            reduce="none",
            baseline=True,
        )
    return result.effect().double().cpu().numpy()


def spread(model: HookedLM, heads: str) -> list[Node]:
    """``"all"`` heads of the model, or that many spread evenly over it.

    Raises:
        ValueError: if ``heads`` is neither ``"all"`` nor a number of heads that the model has.
    """
    every = model.spec.heads
    if heads == "all":
        return every
    if not heads.isdigit() or not 1 <= int(heads) <= len(every):
        raise ValueError(f"heads={heads!r} is understood neither as 'all' nor as a number from 1 to {len(every)}")
    return [every[number] for number in np.linspace(0, len(every) - 1, int(heads)).round().astype(int)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure SmolLM2 and print the result; nothing is written."""
    parser = argparse.ArgumentParser(prog="python -m attnlab.circuits.bench", description=str(__doc__).splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12, help="number of IOI pairs (default 12)")
    parser.add_argument("--heads", default="30", help="'all', or a number spread over the model (default 30)")
    chosen = parser.parse_args(arguments)

    from attnlab.models import pretrained

    model = HookedLM(pretrained.load("smollm2-135m-instruct"))
    pairs = ioi(model.tokenizer, chosen.prompts)
    print(f"{model.spec.name}, {torch.get_num_threads()} threads, {model.device}")
    print(compare(model, pairs, spread(model, chosen.heads)))


if __name__ == "__main__":
    main()
