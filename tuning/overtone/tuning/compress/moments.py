"""Second moments of what layers see, in the DCT plane, and only as far as a delta needs them.

    G = C_q (sum over tokens of x x^T) C_q^T        x: (q,), a layer's input

A delta D = L R with coefficients in the columns U needs G[U, U], G[U, :] R^T and R G R^T alone: the second moments of the
features (z_U, R z) with z = C_q x. If R is the unit matrix the features are z itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from overtone.tuning.compress.cosine import dct


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """cols: (u,) int64, distinct, ascending; right: R (m, q), None: the unit matrix; size: q."""

    cols: torch.Tensor
    right: torch.Tensor | None
    size: int

    @property
    def count(self) -> int:
        return self.size if self.right is None else self.cols.numel() + self.right.shape[0]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x: (tokens, q) floating point; returns (tokens, count), at least float32."""
        wide = x if x.dtype == torch.float64 else x.to(torch.float32)
        z = dct(wide)
        if self.right is None:
            return z
        return torch.cat((z[:, self.cols.to(z.device)], z @ self.right.to(z.device, z.dtype).T), dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """G as far as it is known, float64. cols: (u,) as in `Features`; uu: G[U, U] (u, u); ur: G[U, :] R^T (u, m); rr: R G R^T
    (m, m); tokens: how many were summed."""

    cols: torch.Tensor
    uu: torch.Tensor
    ur: torch.Tensor
    rr: torch.Tensor
    tokens: int


class _Sum:
    """Of one layer."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self.total = torch.zeros(features.count, features.count, dtype=torch.float64)
        self.tokens = 0

    def add(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        x = inputs[0].detach().reshape(-1, self.features.size)
        part = self.features.of(x)
        self.total += (part.T @ part).to("cpu", torch.float64)
        self.tokens += x.shape[0]

    def done(self) -> Moments:
        cols, total = self.features.cols, self.total
        if self.features.right is None:
            return Moments(cols, total[cols[:, None], cols], total[cols], total, self.tokens)
        u = cols.numel()
        return Moments(cols, total[:u, :u], total[:u, u:], total[u:, u:], self.tokens)


@torch.inference_mode()
def measure(model: nn.Module, prompts: Iterable[torch.Tensor], features: Mapping[str, Features]) -> dict[str, Moments]:
    """Runs the model over prompts, each (1, tokens) int64, and sums the moments of the named layers' inputs."""
    sums = {module: _Sum(one) for module, one in features.items()}
    handles = [model.get_submodule(m).register_forward_pre_hook(partial(_add, one)) for m, one in sums.items()]
    try:
        for ids in prompts:
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {module: one.done() for module, one in sums.items()}


def _add(total: _Sum, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    total.add(layer, inputs)


def in_parts(features: Mapping[str, Features], limit_bytes: int) -> Iterator[dict[str, Features]]:
    """Of which each takes at most `limit_bytes` of moments, or is of one layer."""
    part: dict[str, Features] = {}
    used = 0
    for module, one in features.items():
        size = 8 * one.count**2
        if part and used + size > limit_bytes:
            yield part
            part, used = {}, 0
        part[module] = one
        used += size
    if part:
        yield part
