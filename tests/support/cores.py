"""Random sparse cores, and which token of a batch has which: the popularity patterns of a many-adapter server."""

from __future__ import annotations

import random

import torch

from overtone.kernels import SparseCore, sparse_core

POPULARITY = ("distinct", "uniform", "zipf", "identical")


def random_core(shape: tuple[int, int], nnz: int, generator: torch.Generator) -> SparseCore:
    """`nnz` distinct coordinates of `shape` in no order, standard normal values."""
    p, q = shape
    flat = torch.randperm(p * q, generator=generator)[:nnz]
    return sparse_core(flat // q, flat % q, torch.randn(nnz, generator=generator), shape)


def popular_adapters(pattern: str, tokens: int, seed: int = 0) -> list[int]:
    """The adapter number of each of `tokens` tokens."""
    rng = random.Random(seed)
    if pattern == "distinct":
        return list(range(tokens))
    if pattern == "identical":
        return [0] * tokens
    adapters = range(max(2, tokens // 2))
    if pattern == "uniform":
        return rng.choices(adapters, k=tokens)
    assert pattern == "zipf"
    return rng.choices(adapters, weights=[1 / (rank + 1) ** 1.5 for rank in adapters], k=tokens)
