"""Triton kernels, forward and backward, for the mixers; without a GPU the same functions run the torch forms."""
