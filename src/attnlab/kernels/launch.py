"""Launch a Triton kernel again without asking Triton again which of its compiled variants fits.

Triton looks at every argument of every launch: dtypes, alignments, which sizes are 1 or multiples of 16. For the fifty arguments
of a sweep that takes longer than many sweeps. The answer depends on nothing but what :func:`_described` tells, so it is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor

KEPT = 1024  # answers a kernel; training on sequences of ever new lengths must not fill the memory


class Launcher:
    """Stands for a kernel: ``kernel[grid](*arguments, **constants)``, with the constants and the launch options by name.

    Hooks and debug settings of Triton that change after the first launch of a variant are not seen by the next.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._variants: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self._launch(grid, arguments, constants)

    def _launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        key = (arguments[0].device, *[x if type(x) is int else _described(x) for x in arguments], *constants.values())
        known = self._variants.get(key)
        if known is None:
            variant = self.kernel[grid](*arguments, **constants)
            names = [parameter.name for parameter in self.kernel.params[len(arguments) :]]
            if len(self._variants) == KEPT:
                self._variants.clear()
            self._variants[key] = variant, tuple(constants[name] for name in names)
            return
        variant, tail = known
        variant[(*grid, 1, 1)](*arguments, *tail)


def _described(argument: Any) -> Any:
    """All of an argument that a variant can depend on; whole numbers stand for themselves, which tells more than is needed."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return float if isinstance(argument, float) else argument


def remembered(kernel: Any) -> Any:
    """The kernel behind a :class:`Launcher`; under the interpreter, which compiles nothing, the kernel itself.

    The tensor on whose device it runs is the first argument. Every launch names the same constants in the same order.
    """
    return Launcher(kernel) if isinstance(kernel, triton.JITFunction) else kernel
