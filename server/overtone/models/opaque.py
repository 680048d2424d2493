"""Linear layers that keep their weight to themselves: quantised ones. The adapter path sees only their activations.

    y = W x + b,  W and b known by what the layer answers

What makes a layer one of these is how it is built and how it behaves, not its name: a subclass of nn.Linear, or any layer of
packed numbers with `in_features` and `out_features`, whose answers have the shape and the scaling of a linear map's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from overtone.errors import ConfigError, UnsupportedModel
from overtone.models.dequantised import bias_of, weight_of, without_bias

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ROWS = 4
_NOISE = 0.1
"""Largest relative difference between f(2 x) and 2 f(x), b left out: layers that also quantise their input round both."""


class OpaqueLinear:
    """One such layer behind the interface of `PackedLinear`: x (..., q) -> y (..., p), which may be changed in place.

    like: a tensor of the activations' dtype, on their device. rounds: whether the layer rounds its input further than that:
    what differs in the last bit may then differ by a step of its own.
    """

    layout: ClassVar[str] = "opaque"
    blocks: ClassVar[bool] = False
    native: ClassVar[None] = None

    def __init__(self, layer: Any, like: torch.Tensor) -> None:
        self.in_features: int = layer.in_features
        self.out_features: int = layer.out_features
        self.bounds = [(0, self.out_features)]
        self._layer, self._dtype, self._device = layer, like.dtype, like.device
        self.rounds = _rounds_input(layer, like)

    @property
    def bias(self) -> torch.Tensor | None:
        """(p,)"""
        return bias_of(self._layer)

    def weight(self, index: int = 0) -> torch.Tensor:
        """(p, q), dequantised anew each time, in the activations' dtype."""
        return weight_of(self._layer, self._dtype, self._device)

    def own_weight(self, index: int = 0) -> torch.Tensor:
        raise UnsupportedModel(
            f"nothing can be merged into quantised weights ({type(self._layer).__name__})", field="model"
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._layer(x)
        own = y.to(x.dtype).contiguous()
        if own is y and y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            return y.clone()
        return own

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """y + other. other: (..., p)."""
        return self(x) + other


class _Linear(Protocol):
    """What `OpaqueLinear` and `PackedLinear` have in common."""

    @property
    def bounds(self) -> list[tuple[int, int]]: ...

    @property
    def bias(self) -> torch.Tensor | None: ...

    def weight(self, index: int = 0) -> torch.Tensor: ...

    def own_weight(self, index: int = 0) -> torch.Tensor: ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class SideBySide:
    """Layers with the same input that cannot be one product, as if they were: y, their answers one after another.

    linears: one a layer.
    """

    layout: ClassVar[str] = "opaque"
    blocks: ClassVar[bool] = False
    native: ClassVar[None] = None

    def __init__(self, linears: Sequence[_Linear]) -> None:
        assert all(len(one.bounds) == 1 for one in linears)
        ends = list(accumulate(one.bounds[0][1] for one in linears))
        self.bounds = list(zip([0, *ends], ends, strict=False))
        self._linears = linears

    @property
    def bias(self) -> torch.Tensor | None:
        biases = [one.bias for one in self._linears]
        known = next((bias for bias in biases if bias is not None), None)
        if known is None:
            return None
        sizes = (stop - start for start, stop in self.bounds)
        return torch.cat([known.new_zeros(n) if b is None else b for n, b in zip(sizes, biases, strict=True)])

    def weight(self, index: int = 0) -> torch.Tensor:
        return self._linears[index].weight()

    def own_weight(self, index: int = 0) -> torch.Tensor:
        return self._linears[index].own_weight()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([one(x) for one in self._linears], dim=-1)


def is_plain(module: nn.Module) -> bool:
    """Whether it is nn.Linear itself, its weight floating-point numbers in memory: they may be taken out and packed."""
    if type(module) is not nn.Linear or "forward" in vars(module):  # a forward of its own: a hook, or a quantiser's
        return False
    weight = module.weight
    return type(weight.data) is torch.Tensor and weight.dtype in _FLOATS


def is_opaque(name: str, module: nn.Module, like: torch.Tensor) -> bool:
    """Whether `module` is not plain, but a linear map of its last dimension. like: see `OpaqueLinear`.

    Raises `ConfigError` if it misses a library.
    """
    if not may_be_opaque(module):
        return False
    try:
        return _is_linear_map(module, like)
    except ImportError as error:
        raise ConfigError(f"{name} ({type(module).__name__}) cannot be computed: {error}", field="model") from error
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError, LookupError):
        return False  # it wants another input: not what the adapters' layers are


def may_be_opaque(module: nn.Module) -> bool:
    """By how it is built. What wraps another linear layer (LoRA's) or holds many (experts) is none."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return (
        all(isinstance(size, int) and size > 0 for size in sizes)
        and not is_plain(module)
        and (isinstance(module, nn.Linear) or _holds_packed_numbers(module))
        and not any(hasattr(part, "in_features") for part in list(module.modules())[1:])
        and not hasattr(module, "num_experts")
        and isinstance(getattr(module, "bias", None), torch.Tensor | None)
    )


def _holds_packed_numbers(module: nn.Module) -> bool:
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(one.dtype not in _FLOATS or type(one.data) is not torch.Tensor for one in held)


@torch.inference_mode()
def _is_linear_map(module: Any, like: torch.Tensor) -> bool:
    """By the shape of f(x), and by f(2 x) - b = 2 (f(x) - b): what is quantised by its largest value scales exactly."""
    x = _random_rows(module, like)
    once, twice = module(x), module(2 * x)
    if not isinstance(once, torch.Tensor) or once.shape != (1, _ROWS, module.out_features):
        return False
    once, twice = (without_bias(module, y.float()) for y in (once, twice))
    return bool((twice - 2 * once).norm() <= _NOISE * twice.norm())


@torch.inference_mode()
def _rounds_input(module: Any, like: torch.Tensor) -> bool:
    """By f(x) + f(z) = f(x + z), b left out, which holds up to the dtype's own rounding otherwise."""
    x = _random_rows(module, like)
    y, flipped, together = (without_bias(module, module(one).float()) for one in (x, x.flip(1), x + x.flip(1)))
    limit = max(1e-5, 2 * torch.finfo(like.dtype).eps)
    return not bool((y + flipped - together).norm() <= limit * y.norm())


def _random_rows(module: Any, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(1, _ROWS, module.in_features, generator=torch.Generator().manual_seed(0)).to(like)


def activations_of(model: nn.Module) -> torch.Tensor:
    """A parameter of the dtype that the model computes in, on its device: the token embedding's, if it is not packed."""
    embedding: Callable[[], Any] = getattr(model, "get_input_embeddings", lambda: None)
    first = getattr(embedding(), "weight", None)
    for one in (first, *model.parameters()):
        if isinstance(one, torch.Tensor) and one.dtype in _FLOATS:
            return one
    raise UnsupportedModel("the model has no parameter that is not packed", field="model")
