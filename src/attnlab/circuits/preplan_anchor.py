"""Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization (Li, Dong, Sun, Wang, Xiong, Luo, Liu, Lu, Wang, Su, Zheng, Yan 2025, arXiv:2510.13554).

Taught in the chapter ``circuits/preplan-anchor``.
"""
