"""Attention Lab: thirty papers on attention that can be read, run, checked and extended.

Importing this package loads nothing heavy; torch comes with the subpackage that needs it.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("attnlab")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0.0.0"
