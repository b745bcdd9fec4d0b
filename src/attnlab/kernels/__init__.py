"""Triton kernels, forward and backward, for the mixers; without a GPU the same functions run the torch forms."""

from attnlab import records  # where they stood before the circuits had records too

__all__ = ["records"]
