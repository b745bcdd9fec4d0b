"""Thinking Sparks!: Emergent Attention Heads in Reasoning Models During Post Training (Park, Jeong, Kang 2025, arXiv:2509.25758).

Taught in the chapter ``circuits/thinking-sparks``.
"""
