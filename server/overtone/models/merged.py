"""One adapter in the model's weights: W' = W + delta_W, for an adapter that serves so many tokens that it pays.

    implicit, a token: 8 (p sqrt(p) + q sqrt(q)) operations        merged, once: 2 m p q, m rows of its core not empty

(of a low-rank pair: 2 r (p + q) and 2 r p q). A merged weight costs a token nothing more, but it serves only requests of
this adapter, and a copy of every weight that it changed is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from overtone.errors import UnsupportedModel
from overtone.kernels import FrameBank
from overtone.models.adapted import AdaptedLinear
from overtone.models.channels import AdapterDeltas
from overtone.models.dense_deltas import DenseDeltas

PREDICTED_SPEED = 0.5 / 0.3
"""How many operations of a merge, large products, take the time of one of the implicit way, small ones: half of a GPU's peak
beside three tenths. Predicted: neither was measured on a GPU."""


@dataclass(frozen=True, slots=True)
class MergeCost:
    """Of one layer, in operations. once: to merge; token: of the implicit way."""

    once: float
    token: float

    @staticmethod
    def spectral(shape: tuple[int, int], rows: int) -> MergeCost:
        """rows: of the sparse core, those that are not empty."""
        p, q = shape
        return MergeCost(2.0 * rows * p * q, 8 * (p**1.5 + q**1.5))

    @staticmethod
    def low_rank(shape: tuple[int, int], rank: int) -> MergeCost:
        p, q = shape
        return MergeCost(2.0 * rank * p * q, 2.0 * rank * (p + q))


def merge_pays(tokens_expected: int, layers: Iterable[MergeCost]) -> bool:
    """Whether to merge costs less time than the implicit way for as many tokens, memory left out of account."""
    costs = list(layers)
    return tokens_expected * sum(one.token for one in costs) * PREDICTED_SPEED > sum(one.once for one in costs)


class MergedWeights:
    """The linear layers of a model, whose weights one adapter at a time may be merged into, in place: what has their
    addresses, as a CUDA graph has, stays valid. Nothing may run the model meanwhile.

    keep: where the clean copies of changed weights are kept. Other threads, which prepare adapters that depend on weights,
    read them by `clean`.
    """

    def __init__(self, model: nn.Module, frames: FrameBank, keep: torch.device) -> None:
        self._layers = {layer.name: layer for layer in model.modules() if isinstance(layer, AdaptedLinear)}
        self._others = [_span(one) for one in model.parameters() if type(one.data) is torch.Tensor]
        self._dense, self._keep = DenseDeltas(frames), keep
        self._clean: dict[str, torch.Tensor] = {}
        self._changed: list[str] = []
        self._merged = False
        self._changing = threading.Lock()

    def clean(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight`, which is `name`'s, as it is without what is merged: a copy in the host's memory. Thread-safe."""
        with self._changing:
            found = self._clean[name] if name in self._changed else weight
            if not found.is_cuda:
                return found.to("cpu", copy=True)
            # Beside the computing, not between its steps; behind what has changed the weights so far.
            reading = torch.cuda.Stream(found.device)  # type: ignore[no-untyped-call]
            reading.wait_stream(torch.cuda.default_stream(found.device))
            with torch.cuda.stream(reading):
                return found.to("cpu", copy=True)

    @property
    def merged(self) -> bool:
        """Whether an adapter is; if not, the weights are clean."""
        return self._merged

    @property
    def nbytes(self) -> int:
        """Of the clean copies."""
        return sum(one.numel() * one.element_size() for one in self._clean.values())

    @torch.inference_mode()
    def merge(self, deltas: AdapterDeltas) -> None:
        """Instead of what was merged before. Raises `UnsupportedModel` if a weight cannot be overwritten; if anything
        fails, all weights are clean."""
        with self._changing:
            self._merge(deltas)

    @torch.inference_mode()
    def unmerge(self) -> None:
        """The clean weights again, to the last bit."""
        with self._changing:
            self._unmerge()

    def _merge(self, deltas: AdapterDeltas) -> None:
        self._unmerge()
        weights = {name: self._weight(name) for name in deltas}
        try:
            for name, weight in weights.items():
                if name not in self._clean:
                    self._clean[name] = weight.to(self._keep, copy=True)
            for name, weight in weights.items():
                self._changed.append(name)
                self._dense.add_to(weight, deltas[name].terms)
        except BaseException:
            self._unmerge()
            self.forget()  # what fails is mostly for want of memory
            raise
        self._merged = True

    def _unmerge(self) -> None:
        for name in self._changed:
            self._weight(name).copy_(self._clean[name])
        self._changed, self._merged = [], False

    def forget(self) -> None:
        """Drops the clean copies: the next merge makes its own."""
        assert not self._changed
        self._clean = {}

    def _weight(self, name: str) -> torch.Tensor:
        layer = self._layers.get(name)
        if layer is None:
            raise UnsupportedModel(f"nothing can be merged into {name}: it is no linear layer", field="adapter")
        weight = layer.own_weight
        start, stop = _span(weight)
        if any(start < end and begin < stop for begin, end in self._others):  # a head that is tied to the embedding
            raise UnsupportedModel(f"nothing can be merged into {name}: its weight is another's too", field="adapter")
        return weight


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor whose numbers lie one after another."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
