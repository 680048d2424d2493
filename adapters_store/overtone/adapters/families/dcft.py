"""DCFT: deconvolution in a subspace (COLING 2025, pp. 3924-3935, arXiv 2503.01419), in a folder layout of our own.

    delta_W = c [(A^T B^T) kron K]^T             c = lora_alpha / (lora_r + 1e-5) if lora_alpha > 0,
                                                 c = lora_r / (lora_r + 1e-5)     otherwise

A^T B^T: (q / d, p / d) is the subspace. The authors' conv_transpose2d of it with the kernel K and the stride d, whose result
is in x out, is that Kronecker product. `<module>.lora_A` (R, q / d): A. `<module>.lora_B` (p / d, R): B.
`<module>.lora_C` (d, d), or (1, 1, d, d) as the authors hold it: K. lora_r is the authors' configured rank, which sets c;
R, the subspace's, is 1 in their code and is read off the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from overtone.adapters.families.config import FRACTION, NUMBER, POSITIVE, AdapterConfig, Rule, is_count
from overtone.adapters.families.tensors import Stored, by_module, check_finite
from overtone.adapters.families.types import Family, ParsedWeights, ParserContext
from overtone.errors import InvalidAdapter
from overtone.kernels import IDENTITY, Delta, KroneckerCore, Term

_A, _B, _K = "lora_A", "lora_B", "lora_C"
_EPSILON = 1e-5
_SIZE = Rule(lambda v: v is None or (is_count(v) and v != 0), "a whole number >= 1 or null")


def _parse(config: AdapterConfig, tensors: Mapping[str, torch.Tensor], context: ParserContext) -> ParsedWeights:
    scale = _scale(config)
    deltas, count = {}, 0
    for module, parts in by_module(tensors, (_A, _B, _K)).items():
        shape = context.base.shape(module)
        core = _core(config, parts, shape, scale)
        deltas[module] = Delta((Term(IDENTITY, core, IDENTITY),), shape)
        count += sum(part.tensor.numel() for part in parts.values())
    return ParsedWeights(deltas, count)


def _scale(config: AdapterConfig) -> float:
    """c. Neither number is in the tensors, so the configuration must have both."""
    for key in ("lora_r", "lora_alpha"):
        if key not in config.values:
            raise InvalidAdapter(f"{key} is missing; the scale of this adapter depends on it", field=key)
    rank, alpha = config.number("lora_r", 1), config.number("lora_alpha", 0)
    return (alpha if alpha > 0 else rank) / (rank + _EPSILON)


def _core(config: AdapterConfig, parts: Mapping[str, Stored], shape: tuple[int, int], scale: float) -> KroneckerCore:
    (p, q), kernel = shape, _kernel(config, parts[_K])
    d, name = kernel.shape[0], parts[_K].name
    if p % d or q % d:
        raise InvalidAdapter(
            f"{name} is {d} x {d}, but {d} does not divide both sides of the layer, {shape}", field=name
        )
    stored = parts[_A].tensor.shape
    rank = config.count("rank") or (stored[0] if stored else 0)
    a, b = parts[_A].floats((rank, q // d)), parts[_B].floats((p // d, rank))
    check_finite(name, kernel.to(torch.float32) * scale, f"once scaled by {scale:g}")
    return KroneckerCore(a, b, kernel, scale)


def _kernel(config: AdapterConfig, stored: Stored) -> torch.Tensor:
    """K as (d, d), d = kernel_size if the configuration has one."""
    shape = tuple(stored.tensor.shape)
    d = config.count("kernel_size") or (shape[-1] if shape else 0)
    return stored.any_floats()[0, 0] if shape == (1, 1, d, d) else stored.floats((d, d))


DCFT = Family(
    name="dcft",
    keys={
        # A float must hold it: it is divided by.
        "lora_r": Rule(lambda v: POSITIVE.accepts(v) and NUMBER.accepts(v), POSITIVE.expects),
        "lora_alpha": NUMBER,
        "kernel_size": _SIZE,
        "rank": _SIZE,
        # Training only.
        "lora_dropout": FRACTION,
    },
    parse=_parse,
)
