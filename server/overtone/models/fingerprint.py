"""What tells one base model from another: an adapter is for one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from overtone.models.opaque import may_be_opaque

_SAMPLES = 64


def fingerprint_of(model: nn.Module) -> str:
    """SHA-256 over each parameter's name, shape and 64 evenly spaced values rounded to bfloat16; of packed numbers the
    values as they are, and of quantised layers also what they keep in buffers.

    The rounding makes it the same for one checkpoint loaded as float32 and as bfloat16.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *_buffers_of_quantised(model)], key=lambda pair: pair[0]):
        for part, numbers in _numbers(name, tensor.detach()):
            digest.update(f"{part}{tuple(numbers.shape)}".encode())
            digest.update(_sample(numbers))
    return digest.hexdigest()


def _buffers_of_quantised(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        if may_be_opaque(module):
            yield from module.named_buffers(prefix=name, recurse=False)


def _numbers(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor, or the plain tensors that one of a quantiser's own class is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for part in flatten()[0]:
        inner = getattr(tensor, part)
        if isinstance(inner, torch.Tensor):
            yield from _numbers(f"{name}.{part}", inner)


def _sample(numbers: torch.Tensor) -> bytes:
    flat = numbers.flatten() if numbers.element_size() > 1 else numbers.contiguous().view(torch.uint8).flatten()
    picks = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64)
    sample = flat[picks.long().to(flat.device)]
    if sample.is_floating_point():
        sample = sample.to(torch.bfloat16)
    return sample.cpu().view(torch.uint8).numpy().tobytes()
