"""A decoder layer of the Llama shape in a dozen operators instead of forty.

    h = x + W_o attention(rope(W_qkv norm(x)))          y = h + W_down (silu(W_gate norm(h)) * W_up norm(h))

The definition stays transformers' own: this replaces the `forward` of its layer objects, only of classes that are known to
compute the above, and the load-time probe compares the whole model with transformers' before anything is served. Where the
step's adapters change a layer, their part is added between the same operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from overtone.kernels.layers import HeadNorms, LayerKernels
from overtone.models.adapted import AdaptedLinear
from overtone.models.attend import Softmax
from overtone.models.attention import attend_paged
from overtone.models.blocks import RowWise
from overtone.models.paged import Paged

_LAYER_CLASSES = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class RotaryTables:
    """cos and signed sin of the step's positions, made once a step for all layers.

    rope(x) = x * cos + swap(x) * sin',  swap: the halves of the head exchanged, sin' = (-sin, sin)
    """

    def __init__(self) -> None:
        self._cos: torch.Tensor | None = None
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin: (1, T, D) as transformers makes them; returns both as (T, D)."""
        if self._cos is not cos or self._tables is None:
            half = sin.shape[-1] // 2
            signed = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
            self._cos, self._tables = cos, (cos[0].contiguous(), signed)
        return self._tables


def fusable(layer: nn.Module) -> bool:
    """Whether `layer` is one that `FusedLayer` computes: by its class, and by what it is made of."""
    if type(layer).__name__ not in _LAYER_CLASSES or {name for name, _ in layer.named_children()} != _PARTS:
        return False
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    parts = {name for name, _ in attention.named_children()}
    names = _MLP_PARTS - {"act_fn"}
    linears = [attention.get_submodule(name) for name in _ATTENTION_PARTS & parts]
    linears += [child for name, child in mlp.named_children() if name in names]
    return (
        parts - {"q_norm", "k_norm"} == _ATTENTION_PARTS
        and {name for name, _ in mlp.named_children()} == _MLP_PARTS
        and _is_silu(mlp.get_submodule("act_fn"))
        and all(isinstance(linear, AdaptedLinear) for linear in linears)
    )


def _is_silu(module: nn.Module) -> bool:
    inner = module.function if isinstance(module, RowWise) else module
    return type(inner).__name__ in ("SiLU", "SiLUActivation")


def fuse_layers(model: nn.Module) -> int:
    """Gives every fusable layer of a wrapped model its fused forward. Returns how many there were."""
    tables = RotaryTables()
    layers = [module for module in model.modules() if fusable(module)]
    for layer in layers:
        layer.forward = FusedLayer(layer, tables)
    return len(layers)


class FusedLayer:
    """The forward of one decoder layer; `layer` keeps its parts and their names."""

    def __init__(self, layer: Any, tables: RotaryTables) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._tables, self._index = tables, attention.layer_idx
        self._norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self._qkv, self._gate_up = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
        self._o, self._down, self._silu = attention.o_proj, mlp.down_proj, mlp.act_fn
        self._dim = attention.head_dim
        self._heads = self._qkv[0].out_features // self._dim
        self._head_norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
        self._softmax = Softmax(attention.scaling)
        self._joined, self._joined_mlp = AdaptedLinear.join(self._qkv), AdaptedLinear.join(self._gate_up)
        self._kernels: LayerKernels | None = self._qkv[0].kernels

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        paged: Paged | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden_states: (1, T, hidden); returns the same shape."""
        assert position_embeddings is not None
        assert paged is not None
        x = hidden_states[0]
        tables = self._tables.of(*position_embeddings)
        mixed = self._attend(self._rms_norm(x, self._norms[0]), tables, paged)
        x = self._o.plus(mixed, x)
        y: torch.Tensor = self._down.plus(self._gated(self._rms_norm(x, self._norms[1])), x)
        return y[None]

    def _attend(self, h: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], paged: Paged) -> torch.Tensor:
        """(T, hidden) -> (T, heads * D)."""
        tokens, dim, heads = h.shape[0], self._dim, self._heads
        qkv = AdaptedLinear.joined(self._qkv, h)
        by_head = qkv.view(tokens, -1, dim)
        new = by_head[:, heads:].view(tokens, 2, -1, dim)  # keys, then values
        if self._kernels is None:
            self._rotate(by_head, *tables)
            paged.write(self._index, new)
        else:
            cache = paged.of_layer(self._index)
            self._kernels.rotate_and_write(qkv, *tables, paged.write_slots, cache, self._norms_of_heads())
        out = attend_paged(paged, self._index, by_head[:, :heads], new, self._softmax)
        return out.reshape(tokens, heads * dim)

    def _gated(self, h: torch.Tensor) -> torch.Tensor:
        """silu(gate h) * up h: (T, intermediate)."""
        both = AdaptedLinear.joined(self._gate_up, h)
        if self._kernels is not None:
            return self._kernels.silu_times(both)
        gate, up = both.chunk(2, dim=-1)
        gated: torch.Tensor = self._silu(gate)
        return gated * up

    def _rms_norm(self, x: torch.Tensor, norm: Any) -> torch.Tensor:
        if self._kernels is not None:
            return self._kernels.rms_norm(x, norm.weight, norm.variance_epsilon)
        return _rms_norm(x, norm)

    def _norms_of_heads(self) -> HeadNorms | None:
        query, key = self._head_norms
        return None if query is None or key is None else HeadNorms(query.weight, key.weight, query.variance_epsilon)

    def _rotate(self, by_head: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> None:
        """Norms and rotates queries and keys in place. by_head: (T, heads + 2 kv_heads, D)."""
        value_from = self._joined.bounds[2][0] // self._dim
        parts = by_head[:, : self._heads], by_head[:, self._heads : value_from]
        for norm, part in zip(self._head_norms, parts, strict=True):
            if norm is not None:
                part.copy_(_rms_norm(part, norm))
        _rotate(by_head[:, :value_from], cos[:, None], signed_sin[:, None])


def _rms_norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> None:
    """rope in place. x: (T, heads, D); cos, signed_sin: (T, 1, D)."""
    tokens, heads, dim = x.shape
    swapped = x.view(tokens, heads, 2, dim // 2).flip(2).view(tokens, heads, dim)
    x.mul_(cos).addcmul_(swapped, signed_sin)
