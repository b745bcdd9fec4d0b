"""Bad input is refused in words: which argument, what came, what is wanted."""

from __future__ import annotations

import math
import re

import pytest
import torch

from attnlab.mixers import attend, checks, chunked, parallel, recurrent

B, T, H, K, V = 2, 7, 3, 4, 5


@pytest.fixture
def good(draw):
    return {"q": draw(B, T, H, K), "k": draw(B, T, H, K), "v": draw(B, T, H, V)}


def ones(*shape, value=1.0):
    return torch.full(shape, value, dtype=torch.float64)


BAD = {
    "no tokens": (
        {"q": ones(B, 0, H, K), "k": ones(B, 0, H, K), "v": ones(B, 0, H, V)},
        "q: shape (2, 0, 3, 4) has T=0; pass at least one",
    ),
    "flat q": ({"q": ones(T, H, K)}, "q: shape (7, 3, 4) has 3 axes, but [B, T, H, K] is wanted"),
    "other K": ({"k": ones(B, T, H, K + 1)}, "k: shape (2, 7, 3, 5), but [B, T, H, K] of q = (2, 7, 3, 4) is wanted"),
    "other T": ({"v": ones(B, T + 1, H, V)}, "v: shape (2, 8, 3, 5), but [B, S, H, V] with B, S, H of k"),
    "integers": ({"q": torch.ones(B, T, H, K, dtype=torch.long)}, "q: dtype torch.int64, but the sums need float32"),
    "half": ({"q": ones(B, T, H, K).half()}, "q: dtype torch.float16, but the sums need float32 or float64; cast"),
    "two dtypes": (
        {"k": ones(B, T, H, K).float()},
        "k: dtype torch.float32, but q has torch.float64; cast one of them",
    ),
    "two devices": ({"v": ones(B, T, H, V).to("meta")}, "v: on meta, but q is on cpu; move one of them"),
    "gate dtype": ({"log_decay": -ones(H).float()}, "log_decay: dtype torch.float32, but q has torch.float64"),
    "growing": (
        {"log_decay": ones(H, value=0.25)},
        "log_decay: up to 0.25, but a decay is at most 1, so its log at most 0",
    ),
    "NaN gate": ({"log_decay": ones(B, T, H, value=math.nan)}, "log_decay: holds NaN or infinite values"),
    "shut gate": (
        {"log_decay": ones(H, value=-math.inf)},
        "log_decay: holds NaN or infinite values; gates must be finite",
    ),
    "gate shape": ({"log_decay": -ones(B, T)}, "log_decay: shape (2, 7), but [H], [B, T, H] or [B, T, H, K] is wanted"),
    "one gate": ({"log_decay": -ones(1, T, H)}, "log_decay: shape (1, 7, 3)"),
    "write shape": ({"write": ones(B, T)}, "write: shape (2, 7), but [B, T, H] = (2, 7, 3) is wanted"),
    "NaN erase": ({"erase": ones(B, T, H, value=math.nan)}, "erase: holds NaN or infinite values"),
    "state of another batch": (
        {"initial_state": ones(1, H, K, V)},
        "initial_state: shape (1, 3, 4, 5), but [B, H, K, V] = (2, 3, 4, 5) is wanted",
    ),
}


@pytest.mark.parametrize("form", [recurrent, chunked, parallel])
@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_refused(form, bad, good):
    change, message = BAD[bad]
    with pytest.raises(ValueError, match=re.escape(message)):
        form(**{**good, **change})


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_chunk_holds_a_token(size, good):
    with pytest.raises(ValueError, match=f"chunk_size={size} must be a whole number, at least 1"):
        chunked(**good, chunk_size=size)


def test_forms_are_named(good):
    with pytest.raises(ValueError, match="form='scan' is not known; choose one of recurrent, chunked, parallel"):
        attend(**good, form="scan")


def test_bounds_are_inclusive():
    checks.between("beta", torch.tensor([0.0, 2.0]), 0, 2)
    with pytest.raises(ValueError, match=r"beta: values from -0.5 to 1, but \[0, 2\] is wanted"):
        checks.between("beta", torch.tensor([-0.5, 1.0]), 0, 2)
