"""Oracles of ``attnlab.circuits.thinking_sparks``."""
