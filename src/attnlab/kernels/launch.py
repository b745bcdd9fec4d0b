"""Launch a Triton kernel again without asking Triton again which of its compiled variants fits.

Triton looks at every argument of every launch: dtypes, alignments, which sizes are 1 or multiples of 16. For the fifty arguments
of a sweep that takes longer than many sweeps. The answer depends on nothing but what :meth:`Launcher.launch` looks at, so it is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rest = tuple[tuple[Any, ...], dict[str, Any]]  # numbers by position, constants and launch options by name

KEPT = 1024  # answers a kernel; training on sequences of ever new lengths must not fill the memory


class Launcher:
    """Stands for a kernel. The tensor on whose device it runs is the first argument.

    ``kernel[grid](*arguments, **constants)`` takes tensors, None and numbers, then the constants and the launch options by name, the
    same in every launch and in the same order. ``kernel.launch`` is for launches that feel the time to gather all these.

    Hooks and debug settings of Triton that change after the first launch of a variant are not seen by the next.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._variants: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self.launch(
            grid, arguments, (*constants.values(),), lambda: ((), constants)
        )

    def launch(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], key: tuple[Any, ...], rest: Callable[[], Rest]
    ) -> None:
        """Send the arguments and those that follow, which are the same for the same `key` and kinds of arguments.

        Args:
            rest: what follows and the constants, asked for where key or kinds are new. Of a tensor the kind is its dtype and its
                alignment, and that it is there.
        """
        kinds: list[Any] = [arguments[0].device, key]
        sent = []
        for x in arguments:
            kind = type(x)
            if x is None or kind is int:
                sent.append(x)
                kinds.append(x)
            elif kind is float:
                sent.append(x)
                kinds.append(kind)
            else:
                address = x.data_ptr()
                sent.append(address)  # of a tensor Triton would ask the driver whether it is on the GPU
                kinds.append((x.dtype, address % 16))
        known = self._variants.get(tuple(kinds))
        if known is not None:
            variant, tail = known
            variant[(*grid, 1, 1)](*sent, *tail)
            return
        following, constants = rest()
        variant = self.kernel[grid](*arguments, *following, **constants)
        if variant is None:  # the interpreter compiles none
            return
        names = [parameter.name for parameter in self.kernel.params[len(arguments) + len(following) :]]
        if len(self._variants) == KEPT:
            self._variants.clear()
        self._variants[tuple(kinds)] = variant, (*following, *[constants[name] for name in names])


remembered = Launcher  # as a decorator
