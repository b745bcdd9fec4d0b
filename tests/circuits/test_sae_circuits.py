"""Oracles of ``attnlab.circuits.sae_circuits``."""
