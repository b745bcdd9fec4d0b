"""Oracles of ``attnlab.circuits.chinchilla_mcq``."""
