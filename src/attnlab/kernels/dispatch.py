"""Which machine runs a kernel, and in which layout its arguments must come."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(name: str, x: Tensor) -> bool:
    """Whether Triton runs this call: a CUDA tensor of a dtype that tensor cores know. Says once if a GPU tensor falls back."""
    if not x.is_cuda or importlib.util.find_spec("triton") is None:
        return False
    if x.dtype in KERNEL_DTYPES:
        return True
    _warn_fallback(name, x.dtype)
    return False


@functools.cache
def _warn_fallback(name: str, dtype: torch.dtype) -> None:
    warnings.warn(
        f"{name}: no kernel for {dtype}; the slower torch form runs. Cast to float32 for speed.", stacklevel=4
    )


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the GPU of `x` the current one, if there is one and it is another: asking is cheaper than setting and resetting."""
    here = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return _NOTHING if here else torch.cuda.device(x.device)


_NOTHING = nullcontext()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up: triton.cdiv is a function of compile time too, and takes microseconds that small launches feel."""
    return -(-a // b)


def padded(width: int) -> int:
    """The side of a tile that holds `width`: tensor cores want 16 or more, Triton powers of two."""
    return max(16, 1 << (width - 1).bit_length())


def dot_precision(x: Tensor) -> str:
    """How products are formed: three TF32 products keep what float32 holds; half precisions lose nothing in one."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def rows(x: Tensor) -> Tensor:
    """`x` itself if its last axis is contiguous, as in a view of a joint projection, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors the GPU has; 1 for the interpreter on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
