"""The adapted layers: the one place where adapters meet the model.

`AdaptedLinear` and `AdaptedEmbedding` wrap a layer once at load. During a forward pass they add what the pass's
`AdapterStep` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from overtone.kernels.layers import LayerKernels
from overtone.kernels.native import NativeKernels
from overtone.models.adapter_rows import AddsAdapters, Output
from overtone.models.opaque import OpaqueLinear, SideBySide, activations_of, is_opaque, is_plain
from overtone.models.packed import PackedLinear


class CleanWeights(Protocol):
    """Who changes the weights of layers in place for a while."""

    def clean(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A copy, in the host's memory, of the weight that `name` has when nothing is changed. weight: the layer's."""


class StepSlot:
    """Where the runner leaves the current pass's `AdapterStep` for the adapted layers. None: nothing to add.

    step: for all packed tokens; head: for the tokens whose logits are wanted, which are all that the head sees.
    deterministic: whether the layers compute each row to the last bit as if it were alone (`overtone.models.blocks`);
    native: the CPU kernels that they may use; device: those of the GPU that they run on; merged: who knows weights that are
    changed in place for a while.
    """

    def __init__(
        self,
        *,
        deterministic: bool = False,
        native: NativeKernels | None = None,
        device: LayerKernels | None = None,
    ) -> None:
        self.deterministic = deterministic
        self.native = native
        self.device = device
        self.merged: CleanWeights | None = None
        self.step: AddsAdapters | None = None
        self.head: AddsAdapters | None = None


class AdaptedLinear(nn.Module):
    """A linear layer whose output each request's adapter may change. Without an adapter in the batch it is the layer.

    Its weight lies in `linear`, packed, alone or with other layers' that have the same input (`join`); a quantised layer is
    `linear` itself.
    """

    def __init__(self, name: str, base: nn.Linear | OpaqueLinear, slot: StepSlot, *, is_head: bool = False) -> None:
        super().__init__()
        self.name = name
        self.in_features, self.out_features = base.in_features, base.out_features
        self.linear: PackedLinear | OpaqueLinear | SideBySide = (
            base if isinstance(base, OpaqueLinear) else _packed(base, slot)
        )
        self._index = 0
        self._slot = slot
        self._is_head = is_head

    @staticmethod
    def join(layers: Sequence[AdaptedLinear]) -> PackedLinear | SideBySide:
        """One product for all of `layers`, which from then on share it; of quantised ones, their products in one tensor."""
        joined = _joined([layer.linear for layer in layers])
        for index, layer in enumerate(layers):
            layer.linear, layer._index = joined, index
        return joined

    @property
    def weight(self) -> torch.Tensor:
        """(p, q), unpacked."""
        return self.linear.weight(self._index)

    @property
    def opaque(self) -> bool:
        """Whether it is quantised: its weight is dequantised for who asks, and nothing can be merged into it."""
        return self.linear.layout == "opaque"

    @property
    def coarse(self) -> bool:
        """Whether it rounds its input, not yet joined with others."""
        return isinstance(self.linear, OpaqueLinear) and self.linear.rounds

    @property
    def own_weight(self) -> torch.Tensor:
        """(p, q), the memory itself (`PackedLinear.own_weight`)."""
        return self.linear.own_weight(self._index)

    @property
    def bias(self) -> torch.Tensor | None:
        start, stop = self.linear.bounds[self._index]
        return None if self.linear.bias is None else self.linear.bias[start:stop]

    @property
    def kernels(self) -> LayerKernels | None:
        """What the layers around this one may compute with; None: torch's operators."""
        return self.linear.native if self.linear.layout == "native" else self._slot.device

    @property
    def _step(self) -> AddsAdapters | None:
        return self._slot.head if self._is_head else self._slot.step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start, stop = self.linear.bounds[self._index]
        y = self.linear(x)[..., start:stop]
        step = self._step
        if step is not None:
            step.add(x, Output(self.name, y, self.bias))
        return y

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """forward(x) + residual, in an order of sums that neighbours' adapters do not decide if `deterministic`."""
        step = self._step
        if (
            isinstance(self.linear, SideBySide)
            or self.linear.blocks
            or (step is not None and step.reads_output(self.name))
        ):
            changed: torch.Tensor = residual + self(x)
            return changed
        y = self.linear.plus(x, residual)
        if step is not None:
            step.add(x, Output(self.name, y))
        return y

    @staticmethod
    def joined(layers: Sequence[AdaptedLinear], x: torch.Tensor) -> torch.Tensor:
        """What layers that share one product (`join`) answer, adapters included, side by side. x: (..., q)."""
        first = layers[0]
        y, step = first.linear(x), first._step
        if step is not None:
            parts = (y[..., start:stop] for start, stop in first.linear.bounds)
            step.add(x, *(Output(one.name, part, one.bias) for one, part in zip(layers, parts, strict=True)))
        return y


def _packed(layer: nn.Linear, slot: StepSlot) -> PackedLinear:
    return PackedLinear(
        [layer.weight], [layer.bias], blocks=slot.deterministic, native=slot.native, plain=slot.device is not None
    )


def _joined(linears: Sequence[PackedLinear | OpaqueLinear | SideBySide]) -> PackedLinear | SideBySide:
    packed = [one for one in linears if isinstance(one, PackedLinear)]
    if len(packed) < len(linears):
        return SideBySide(linears)
    weights, biases, first = [one.weight() for one in packed], [one.bias for one in packed], packed[0]
    return PackedLinear(weights, biases, blocks=first.blocks, native=first.native, plain=first.plain)


class AdaptedEmbedding(nn.Module):
    """A token embedding, which is a linear layer on one-hot inputs, and adapted like one.

    Gemma's multiplies its rows by a number, embed_scale: y = (W + delta_W) one_hot(id) * embed_scale, as PEFT has it.
    """

    def __init__(self, name: str, base: nn.Embedding, slot: StepSlot) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self._slot = slot
        # Made once: a number of the host would be copied to the device at each pass.
        self._scale = _scale(base) if hasattr(base, "embed_scale") else None

    @property
    def weight(self) -> torch.Tensor:
        """(num_embeddings, embedding_dim): heads that are tied to it read it."""
        return self.base.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        step = self._slot.step
        if step is None:
            plain: torch.Tensor = self.base(ids)
            return plain
        y = _rows(self.base, ids)
        step.add(ids, Output(self.name, y))
        return y if self._scale is None else y * self._scale


def _rows(embedding: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    """The weight's rows, not scaled."""
    return F.embedding(ids, embedding.weight)


def _scale(embedding: nn.Embedding) -> torch.Tensor:
    """embed_scale, a number or a tensor of one, in the weight's dtype."""
    return torch.as_tensor(embedding.embed_scale, dtype=embedding.weight.dtype, device=embedding.weight.device)


@torch.inference_mode()
def _only_scales(embedding: nn.Embedding) -> bool:
    """Whether it does no more to its rows than to scale them by one number."""
    if type(embedding) is nn.Embedding:
        return embedding.max_norm is None
    scale: torch.Tensor | float | None = getattr(embedding, "embed_scale", None)
    if not isinstance(scale, float | int | torch.Tensor) or (isinstance(scale, torch.Tensor) and scale.numel() != 1):
        return False
    ids = torch.arange(min(8, embedding.num_embeddings), device=embedding.weight.device)
    return torch.equal(embedding(ids), _rows(embedding, ids) * _scale(embedding))


def adaptable_modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (p, q) of the linear layers, quantised ones too, which adapters may change."""
    like, found = activations_of(model), dict[str, tuple[int, int]]()
    for name, module in model.named_modules():
        if is_plain(module) or is_opaque(name, module, like):
            layer: Any = module
            found[name] = (layer.out_features, layer.in_features)
    return found


def adaptable_embeddings(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (p, q) = (embedding_dim, num_embeddings) of the token embedding, if adapters may change it."""
    tokens = getattr(model, "get_input_embeddings", lambda: None)()
    return {
        name: (module.embedding_dim, module.num_embeddings)
        for name, module in model.named_modules()
        if module is tokens and isinstance(module, nn.Embedding) and _only_scales(module)
    }


def wrap_layers(model: nn.Module, names: Sequence[str], slot: StepSlot) -> None:
    """Replaces each named linear layer or embedding by its adapted form around it."""
    head, like = getattr(model, "get_output_embeddings", lambda: None)(), activations_of(model)
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = getattr(parent, child)
        if isinstance(layer, nn.Embedding):
            setattr(parent, child, AdaptedEmbedding(name, layer, slot))
        else:
            base = layer if is_plain(layer) else OpaqueLinear(layer, like)
            setattr(parent, child, AdaptedLinear(name, base, slot, is_head=layer is head))
