"""Commands behind the Makefile: set-up is in the shell, everything else is here. Run as ``python -m tools.<name>``."""
