"""A transformers model as the store sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from overtone.adapters import BaseDescription


def base_of(model: Any, name: str = "example/tiny") -> BaseDescription:
    """Every linear layer and token embedding of `model`, with their weights as (p, q)."""
    layers = dict(model.named_modules())

    def weight(module: str) -> torch.Tensor:
        layer = layers[module]
        return layer.weight.detach().T if isinstance(layer, nn.Embedding) else layer.weight.detach()

    linears = {n: m for n, m in layers.items() if isinstance(m, nn.Linear)}
    embeddings = {n: m for n, m in layers.items() if isinstance(m, nn.Embedding)}
    return BaseDescription(
        name=name,
        fingerprint="f" * 64,
        modules={n: (m.out_features, m.in_features) for n, m in linears.items()},
        embeddings={n: (m.embedding_dim, m.num_embeddings) for n, m in embeddings.items()},
        weight=weight,
    )
