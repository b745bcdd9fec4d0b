"""Oracles of ``attnlab.circuits.preplan_anchor``."""
