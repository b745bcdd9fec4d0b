"""Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models (O'Neill, Bui 2024, arXiv:2405.12522).

Taught in the chapter ``circuits/sae-circuits``.
"""
