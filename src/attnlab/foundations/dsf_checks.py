"""What the chapter ``foundations/dsf`` proves by running it: records against direct formulas, and gates that are one gate."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from attnlab import mixers
from attnlab.foundations import dsf, dsf_builders
from attnlab.foundations.dsf import Recurrence
from attnlab.foundations.dsf_models import QLSTMCore
from attnlab.foundations.dsf_runs import Setting, Spec
from attnlab.foundations.dsf_softmax import logits
from attnlab.models.losses import target_loss
from attnlab.models.run import TrainConfig
from attnlab.models.training import fit, seeded

if TYPE_CHECKING:
    import pandas as pd

BATCH, LENGTH, HEADS, KEYS, VALUES = 2, 13, 3, 4, 5
CHUNK = 3
CUT = 4  # order of the exponential: 70 features of 4 channels


class Case(NamedTuple):
    """A mixer as a record, and as the formula that the rest of this package has for it."""

    record: Recurrence
    direct: Callable[[Tensor], Tensor]


def draw(seed: int, *shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cases(seed: int = 0) -> dict[str, Case]:
    """Eight mixers with random queries, keys and gates."""
    each = (BATCH, LENGTH, HEADS)
    q, k = draw(seed, *each, KEYS), draw(seed + 1, *each, KEYS)
    steps, rates = draw(seed + 2, *each).exp(), draw(seed + 3, HEADS)
    log_eta, log_decay = draw(seed + 4, *each), -draw(seed + 5, *each, KEYS).exp()
    forget, write, read = (draw(seed + at, *each, VALUES) for at in (6, 7, 8))
    channel_steps, channel_rates, skip = (
        draw(seed + 9, *each, VALUES).exp(),
        draw(seed + 10, KEYS).exp(),
        draw(11, VALUES),
    )
    return {
        f"softmax, cut at order {CUT}": Case(
            dsf_builders.softmax_attention(q, k, CUT), lambda u: weighted(cut_weights(q, k, CUT), u)
        ),
        "linear attention": Case(
            dsf_builders.linear_attention(q, k), lambda u: mixers.linear_attention(q, k, u, eps=0, form="parallel")[0]
        ),
        "normalised attention": Case(
            dsf_builders.normalised_attention(q, k, log_eta), lambda u: weighted(causal_scores(q, k) / eta(log_eta), u)
        ),
        "S6": Case(
            dsf_builders.s6(channel_steps, channel_rates, k, q, skip),
            lambda u: selective_scan(u, channel_steps, channel_rates, k, q, skip),
        ),
        "Mamba-2": Case(
            dsf_builders.ssd(steps, rates.exp(), k, q, rates),
            lambda u: mixers.ssd(u, steps, rates, k, q, skip=rates)[0],
        ),
        "qLSTM, reversed": Case(
            dsf_builders.qlstm(forget, write, read, torch.tensor(0.7, dtype=torch.float64)),
            lambda u: gated(u, (-forget).sigmoid() ** 0.7, write.sigmoid(), read.sigmoid()),
        ),
        "RetNet": Case(dsf_builders.retention(q, k), lambda u: mixers.retention(q, k, u)[0]),
        "GLA": Case(dsf_builders.gla(q, k, log_decay), lambda u: mixers.gla(q, k, u, log_decay)[0]),
    }


def equalities(seed: int = 0) -> pd.DataFrame:
    """One row a mixer: the largest difference of each evaluator, and of the dense matrices, to the direct formula; range of Lambda."""
    import pandas as pd

    u = draw(seed + 12, BATCH, LENGTH, HEADS, VALUES)
    rows: dict[str, dict[str, Any]] = {}
    for name, case in cases(seed).items():
        wanted = case.direct(u)
        found = {form: evaluate(case.record, u) for form, evaluate in dsf.EVALUATORS.items()}
        found["chunked"] = dsf.chunked(case.record, u, CHUNK)
        found["dense"] = dense_outputs(case.record, u)
        errors = {form: float((y - wanted).abs().max()) for form, y in found.items()}
        lam = case.record.lam
        rows[name] = errors | {"lowest Λ": float(lam.min()), "highest Λ": float(lam.max())}
    return pd.DataFrame.from_dict(rows, orient="index")


def transposed_error(seed: int = 0) -> float:
    """How wrong linear attention becomes if C reads the state in the order ``h[k V + v]`` that B did not write."""
    record, u = cases(seed)["linear attention"].record, draw(seed + 12, BATCH, LENGTH, HEADS, VALUES)
    system = dsf.dense(record, VALUES)
    order = torch.arange(KEYS * VALUES).reshape(KEYS, VALUES).T.flatten()
    wrong = system._replace(c=system.c[:, :, order])
    return float((wrong.outputs(u[0, :, 0]) - system.outputs(u[0, :, 0])).abs().max())


def dense_outputs(record: Recurrence, u: Tensor) -> Tensor:
    """All heads of all sequences by the dense matrices, [B, T, H, V]."""
    batch, _, heads, channels = u.shape
    return torch.stack(
        [
            torch.stack([dsf.dense(record, channels, batch=b, head=h).outputs(u[b, :, h]) for h in range(heads)], 1)
            for b in range(batch)
        ]
    )


def write_gates(seed: int = 0) -> dict[str, float]:
    """S6 with one number of state and rate 1 has Lambda = 1 - sigmoid(x): is it the leaky integrator h = (1 - g) h + g u, g = sigmoid(x)?

    Returns:
        the largest difference of outputs with S6's write softplus(x), and with the write g.
    """
    x, u = draw(seed, 1, LENGTH, 1, 1), draw(seed + 1, 1, LENGTH, 1, 1)
    g = x.sigmoid()
    leaky = gated(u, 1 - g, g, torch.ones_like(g))
    one = torch.ones_like(x)
    dt = torch.nn.functional.softplus(x)
    selective = dsf.recurrent(dsf_builders.s6(dt, torch.ones(1, dtype=x.dtype), one, one), u)
    convex = dsf.recurrent(Recurrence((1 - g).log()[..., None], g[..., None], one[..., None]), u)
    return {
        "write softplus(x), as S6": float((selective - leaky).abs().max()),
        "write sigmoid(x)": float((convex - leaky).abs().max()),
    }


def disguise(steps: int = 30, seed: int = 0) -> tuple[list[float], list[float]]:
    """Training losses of a plain qLSTM, and of its copy with reversed gates of exponent 1 and forget weights of the other sign."""
    setting = Setting(batch=16)
    plain = seeded(lambda: setting.model(Spec("qLSTM")), seed).double()
    other = copy.deepcopy(plain)
    for core in (module for module in other.modules() if isinstance(module, QLSTMCore)):
        core.gate = "reversed, exponent 1"
        with torch.no_grad():
            core.gates.weight[: core.width] *= -1
            core.gates.bias[: core.width] *= -1
    return _losses(plain, setting, steps), _losses(other, setting, steps)


def _losses(model: nn.Module, setting: Setting, steps: int) -> list[float]:
    return fit(model, setting.draw, target_loss, TrainConfig(steps, lr=1e-2), progress=False).loss


# ------------------------------------------------------------------------------------------------------- direct formulas


def causal_scores(q: Tensor, k: Tensor) -> Tensor:
    """q_i . k_j for j <= i, else 0: [B, H, T, T]."""
    return torch.einsum("bihk,bjhk->bhij", q, k).tril()


def cut_weights(q: Tensor, k: Tensor, order: int) -> Tensor:
    """Causal softmax with ``sum_{p <= order} s^p / p!`` for ``e^s``, [B, H, T, T]."""
    scores = logits(q, k)
    weights = torch.stack([scores**p / math.factorial(p) for p in range(order + 1)]).sum(0).tril()
    return weights / weights.sum(-1, keepdim=True)


def eta(log_eta: Tensor) -> Tensor:
    """Normalisers [B, T, H] as a divisor of scores [B, H, T, T]."""
    return log_eta.exp().transpose(1, 2)[..., None]


def weighted(weights: Tensor, u: Tensor) -> Tensor:
    """[B, H, T, T] and [B, T, H, V] to [B, T, H, V]."""
    return torch.einsum("bhij,bjhv->bihv", weights, u)


def selective_scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    """S6 as Mamba's reference has it, one channel and number of state after the other: h [B, H, V, K]."""
    state, outputs = u.new_zeros(*u[:, 0].shape, len(a)), []
    for i in range(u.shape[1]):
        step = dt[:, i, :, :, None]
        state = (-step * a).exp() * state + step * b[:, i, :, None] * u[:, i, :, :, None]
        outputs.append((state * c[:, i, :, None]).sum(-1))
    return torch.stack(outputs, 1) + skip * u


def gated(u: Tensor, forget: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """o * h with h = f h + w u, all [B, T, H, V]."""
    state, outputs = torch.zeros_like(u[:, 0]), []
    for i in range(u.shape[1]):
        state = forget[:, i] * state + write[:, i] * u[:, i]
        outputs.append(read[:, i] * state)
    return torch.stack(outputs, 1)
