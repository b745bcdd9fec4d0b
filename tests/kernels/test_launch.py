"""A launcher asks Triton once for each kind of arguments, and then sends the same variant."""

import pytest
import torch

from attnlab.kernels import launch
from attnlab.kernels.launch import Launcher


class Variant:
    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *arguments: self.log.append(("again", grid, arguments[1:]))


class Kernel:
    """What a launcher asks of Triton: `kernel[grid](...)` compiles, launches and returns the variant; `params` tells the names."""

    def __init__(self):
        self.log = []
        self.params = [type("P", (), {"name": name}) for name in ("x", "n", "scale", "K", "FLAG")]

    def __getitem__(self, grid):
        def first(*arguments, **constants):
            self.log.append(("first", grid, arguments[1:], constants))
            return Variant(self.log)

        return first


@pytest.fixture
def kernel():
    return Kernel()


def kinds(kernel):
    return [entry[0] for entry in kernel.log]


def test_the_second_launch_sends_arguments_and_constants_in_the_order_of_the_kernel(kernel):
    fast = Launcher(kernel)
    fast[(7,)](torch.zeros(3), 5, 0.5, FLAG=True, K=64, num_warps=4)
    fast[(9,)](torch.ones(3), 5, 0.25, FLAG=True, K=64, num_warps=4)
    assert kernel.log == [
        ("first", (7,), (5, 0.5), {"FLAG": True, "K": 64, "num_warps": 4}),
        ("again", (9, 1, 1), (5, 0.25, 64, True)),
    ]


@pytest.mark.parametrize(
    ("x", "n", "constants"),
    [
        (torch.zeros(3, dtype=torch.float16), 5, {}),
        (torch.zeros(8)[1:], 5, {}),  # 4 bytes behind an alignment
        (torch.zeros(3), 1, {}),
        (torch.zeros(3), 16, {}),
        (torch.zeros(3), 2**40, {}),
        (torch.zeros(3), None, {}),
        (torch.zeros(3), 5, {"K": 32}),
        (torch.zeros(3), 5, {"num_warps": 8}),
    ],
)
def test_whatever_a_variant_depends_on_is_asked_again(kernel, x, n, constants):
    fast = Launcher(kernel)
    usual = {"FLAG": True, "K": 64, "num_warps": 4}
    fast[(1,)](torch.zeros(3), 5, 0.5, **usual)
    fast[(1,)](x, n, 0.5, **(usual | constants))
    assert kinds(kernel) == ["first", "first"]
    fast[(1,)](x, n, 0.5, **(usual | constants))
    fast[(1,)](torch.zeros(3), 5, 0.5, **usual)
    assert kinds(kernel) == ["first", "first", "again", "again"]


def test_ever_new_sizes_do_not_fill_the_memory(kernel, monkeypatch):
    monkeypatch.setattr(launch, "KEPT", 3)
    fast = Launcher(kernel)
    for n in range(10):
        fast[(1,)](torch.zeros(3), n, 0.5, FLAG=True, K=64)
        assert len(fast._variants) <= 3
    assert kinds(kernel) == ["first"] * 10


def test_again_tensors_are_sent_as_addresses(kernel, monkeypatch):
    monkeypatch.setattr(Variant, "__getitem__", lambda self, grid: lambda *arguments: self.log.append(arguments))
    fast, x = Launcher(kernel), torch.nn.Parameter(torch.zeros(3))
    for _ in range(2):
        fast[(1,)](x, None, 0.5, FLAG=True, K=64)
    assert kernel.log[-1] == (x.data_ptr(), None, 0.5, 64, True)


def test_the_rest_is_asked_for_where_the_key_or_a_kind_is_new(kernel):
    fast, asked = Launcher(kernel), []

    def send(x, key):
        def rest():
            asked.append((x.dtype, key))
            return (key, 0.5), {"FLAG": True, "K": 64, "num_warps": 4}

        fast.launch((7,), (x,), (key,), rest)

    single, half = torch.zeros(3), torch.zeros(3, dtype=torch.float16)
    for x, key in ((single, 5), (single, 5), (half, 5), (single, 6), (torch.ones(3), 5), (half, 5)):
        send(x, key)
    assert asked == [(torch.float32, 5), (torch.float16, 5), (torch.float32, 6)]
    assert kernel.log[0] == ("first", (7,), (5, 0.5), {"FLAG": True, "K": 64, "num_warps": 4})
    assert kernel.log[-2:] == [("again", (7, 1, 1), (5, 0.5, 64, True))] * 2


def test_an_interpreted_kernel_is_launched_anew_each_time(kernel, monkeypatch):
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *arguments, **constants: self.log.append(grid))
    fast = Launcher(kernel)
    for n in (1, 2):
        fast[(n,)](torch.zeros(3), 5, 0.5, FLAG=True, K=64)
    assert kernel.log == [(1,), (2,)]
