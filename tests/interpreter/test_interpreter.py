"""The interpreter itself works: what every kernel test of this folder relies on."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def _scale_rows(x_ptr, scale_ptr, out_ptr, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * n_cols + cols, mask=inside, other=0.0)
    tl.store(out_ptr + row * n_cols + cols, x * tl.load(scale_ptr + row), mask=inside)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1 before triton is imported"
)
@pytest.mark.parametrize("n_cols", [1, 60, 63, 100])
def test_masked_tail_is_neither_read_nor_written(n_cols: int) -> None:
    x = torch.randn(3, n_cols, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1.0, -2.0, 0.5])
    out = torch.full((4, n_cols), torch.nan)
    _scale_rows[(3,)](x, scale, out, n_cols, BLOCK=triton.next_power_of_2(n_cols))
    torch.testing.assert_close(out[:3], x * scale[:, None], rtol=0, atol=0)
    assert out[3].isnan().all()
