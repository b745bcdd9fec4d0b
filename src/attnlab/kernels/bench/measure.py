"""Time, error and memory of one implementation."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from attnlab.kernels.bench.peers import Implementation, Run
from attnlab.kernels.bench.problems import Problem, softmax_flops
from attnlab.kernels.bench.registry import Case

PASSES = ("forward", "forward+backward")
WARMUP_MS, MEASURE_MS, GRAPH_MS = 10, 40, 20
SLOWEST_MS = 60.0  # a quadratic peer that would take longer is left out
SOFTMAX_FLOPS = 600e12  # a second, to guess how long it would take

Row = dict[str, Any]
Exact = Callable[[], dict[str, Tensor]]


def measure(case: Case, problem: Problem, implementation: Implementation, exact: Exact, bandwidth: float) -> list[Row]:
    """One row a pass. Who cannot be measured has a row that says why, under ``skipped`` or ``failed``.

    Args:
        exact: outputs and gradients of the sample in float64; called only if there is something to compare.
        bandwidth: bytes a second that the memory copies, for the share of the memory floor.
    """
    rows = [_head(case, problem, implementation, name) for name in PASSES]
    expected = _expected_ms(problem, implementation)
    try:
        run = implementation.prepare(problem)
        upstream = upstream_of(problem)
        for row, backward, ms in zip(rows, (False, True), expected, strict=True):
            row["config"] = run.config
            if ms > SLOWEST_MS:
                row["skipped"] = f"about {ms:.0f} ms a call, more than {SLOWEST_MS:.0f}"
                continue
            step = _step(run, upstream if backward else None)
            row["errors"] = _errors(step(), run, problem, exact()) if implementation.same else {}
            row["error"] = max(row["errors"].values(), default=None)
            row["peak_mb"] = _peak_mb(step, run)
            row |= _speed(
                case, problem, implementation, backward, times(step, upstream.device, run.leaves.values()), bandwidth
            )
            if upstream.is_cuda and implementation.same and not implementation.quadratic:
                row["graph_ms"] = graph_time(step, run.leaves.values())
    except Exception as error:  # whatever a peer raises is a result, and must not end the others
        reason = (str(error).strip().splitlines() or [""])[0]
        for row in rows:
            if "ms" not in row and "skipped" not in row:
                row["failed"] = f"{type(error).__name__}: {reason}"[:300]
    return rows


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    x = torch.ones(2**29 if device.type == "cuda" else 2**20, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / (1e-3 * times(lambda: y.copy_(x), device)[0])


def times(call: Callable[[], object], device: torch.device, leaves: Iterable[Tensor] = ()) -> tuple[float, ...]:
    """Median, 20 % and 80 % quantile in milliseconds; between calls `leaves` lose their gradients, and a GPU its cache."""
    leaves = list(leaves)
    if device.type == "cuda":
        from triton.testing import do_bench

        quantiles = [0.5, 0.2, 0.8]
        return tuple(do_bench(call, WARMUP_MS, MEASURE_MS, grad_to_none=leaves, quantiles=quantiles))
    call()
    found = []
    for _ in range(5):
        _drop_gradients(leaves)
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
    fifths = statistics.quantiles(found, n=5, method="inclusive")
    return statistics.median(found), fifths[0], fifths[-1]


def graph_time(call: Callable[[], object], leaves: Iterable[Tensor] = ()) -> float | None:
    """Median milliseconds of calls that a CUDA graph replays one after the other, so that no host has to launch them.

    What a GPU takes that always has work: with short calls :func:`times` measures how fast the host can launch. None for calls
    that cannot be caught. The cache is not cleared; it holds a fraction of the tensors of any shape here.
    """
    from triton.testing import do_bench_cudagraph

    try:
        return float(do_bench_cudagraph(call, GRAPH_MS, grad_to_none=list(leaves), return_mode="median"))
    except RuntimeError:
        return None


def upstream_of(problem: Problem) -> Tensor:
    """The gradient of the output, [B, T, H, V], the same for all."""
    v = problem.tensors["v"]
    return torch.randn(v.shape, generator=torch.Generator(v.device).manual_seed(1), device=v.device).to(v.dtype)


def exact_results(case: Case, problem: Problem) -> dict[str, Tensor]:
    """Output and gradients of the problem's sample in float64: ``o``, and ``dq`` and so on."""
    sample = problem.exact()
    tensors = sample.copies()
    o = case.reference(Problem(sample.shape, tensors, sample.wanted, sample.scale))
    grads = torch.autograd.grad(
        o, [tensors[name] for name in sample.wanted], problem.sample(upstream_of(problem)).double()
    )
    return {"o": o.detach()} | {f"d{name}": grad for name, grad in zip(sample.wanted, grads, strict=True)}


def _head(case: Case, problem: Problem, implementation: Implementation, name: str) -> Row:
    """What every row has."""
    return {
        "case": case.name,
        "operator": case.operator,
        "impl": implementation.name,
        "pass": name,
        "shape": asdict(problem.shape),
        "dtype": str(problem.tensors["v"].dtype).removeprefix("torch."),
        "same": implementation.same,
    }


def _step(run: Run, upstream: Tensor | None) -> Callable[[], Tensor]:
    """A forward pass without a graph, or forward and backward."""

    def forward() -> Tensor:
        with torch.no_grad():
            return run.call()

    def both() -> Tensor:
        o = run.call()
        o.backward(arriving)
        return o

    if upstream is None:
        return forward
    arriving = upstream.to(forward().dtype)
    return both


def _errors(o: Tensor, run: Run, problem: Problem, exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative Frobenius error on the sample, of the output and of all gradients that the last step left.

    Raises:
        ArithmeticError: one is not finite; a wrong result has no time worth keeping.
    """
    got = {"o": o.detach()} | {f"d{name}": x.grad for name, x in run.leaves.items() if x.grad is not None}
    errors = {
        name: float((problem.sample(x).double() - exact[name]).norm() / exact[name].norm())
        for name, x in got.items()
        if name in exact
    }
    if wrong := [name for name, error in errors.items() if not math.isfinite(error)]:
        raise ArithmeticError(f"NaN or infinite values in {', '.join(wrong)}")
    return errors


def _peak_mb(step: Callable[[], Tensor], run: Run) -> float | None:
    """What a step allocates at most on top of its inputs, in MB; None without a GPU."""
    _drop_gradients(run.leaves.values())
    device = next(iter(run.tensors.values())).device
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def _speed(
    case: Case,
    problem: Problem,
    implementation: Implementation,
    backward: bool,
    found: tuple[float, ...],
    bandwidth: float,
) -> Row:
    """Times, and what they mean: rates by the least bytes and operations, and the share of the memory floor that is reached."""
    ms, ms20, ms80 = found
    passes = 2 if backward else 1
    costs = list(case.costs(problem.shape, problem.tensors["v"].element_size()))[:passes]
    size = sum(cost.bytes for cost in costs) * problem.shape.rows
    flops = list(softmax_flops(problem.shape)) if implementation.quadratic else [cost.flops for cost in costs]
    return {
        "ms": ms,
        "ms20": ms20,
        "ms80": ms80,
        "gbps": size / ms * 1e-6,
        "floor_ms": 1e3 * size / bandwidth,
        "floor_share": 1e3 * size / bandwidth / ms,
        "tflops": sum(flops[:passes]) * problem.shape.rows / ms * 1e-9,
    }


def _expected_ms(problem: Problem, implementation: Implementation) -> tuple[float, float]:
    """A guess for both passes of a quadratic peer; 0 for all others."""
    if not implementation.quadratic:
        return 0.0, 0.0
    forward, backward = (1e3 * flops * problem.shape.rows / SOFTMAX_FLOPS for flops in softmax_flops(problem.shape))
    return forward, forward + backward


def _drop_gradients(leaves: Iterable[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None
