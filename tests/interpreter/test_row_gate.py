"""One gate a row, forward and backward, against float64; inputs are strided views, sizes awkward, everything around them NaN."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
from attnlab.kernels.row_gate import RowGate

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1 before triton is imported"
)


def inside_nan(x):
    """The same numbers as a view into a larger tensor of NaN; the last axis stays contiguous."""
    around = torch.full([n + 4 for n in x.shape], torch.nan, dtype=x.dtype)
    view = around[tuple(slice(2, 2 + n) for n in x.shape)]
    return view.copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 37, 3, 20), (1, 130, 2, 33), (3, 5, 1, 128)])
def test_outputs_and_gradients(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, d = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    w = torch.randn(shape[0], shape[2], shape[1], generator=generator).transpose(1, 2)  # the layout of the flow gates
    wanted = x.double() * w.double()[..., None]
    leaves = inside_nan(x).requires_grad_(), w.clone().requires_grad_()
    out = RowGate.apply(*leaves)
    dx, dw = torch.autograd.grad(out, leaves, inside_nan(d))
    assert out.dtype == dx.dtype == dtype
    assert dw.dtype == torch.float32
    limit = 1e-6 if dtype == torch.float32 else 1e-3
    for name, got, exact in (
        ("out", out, wanted),
        ("dx", dx, d.double() * w.double()[..., None]),
        ("dw", dw, (x.double() * d.double()).sum(-1)),
    ):
        error = float((got.detach().double() - exact).norm() / exact.norm())
        assert error < (limit if name != "dw" else 1e-6), f"{name}: {error:.1e}"
