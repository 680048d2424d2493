"""VB-LoRA: low-rank matrices mixed out of one bank of vectors (NeurIPS 2024, arXiv 2405.15179), as PEFT 0.21.2 saves it.

    delta_W = B A                     A[i, t l : (t + 1) l] = sum over j < k of w[i, t, j] bank[n[i, t, j]]      A: (r, q)
                                      B[t l : (t + 1) l, i] = the same of B's w and n at [t, i]                  B: (p, r)

`base_model.vblora_vector_bank` (h, l): the bank of the whole adapter. For A and for B alike, in either of two forms:
`<module>.vblora_logits_A` (r, q / l, h), `_B` (p / l, r, h): n are the k = topk largest logits, w their softmax; or, with
save_only_topk_weights, `<module>.vblora_logits_A_topk_indices` (r, q / l, k): n, and `_topk_weights` (r, q / l, k - 1): w
but for the last one, which completes the sum of 1. A and B are computed in float64 and kept in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from overtone.adapters.families.config import FLAG, FRACTION, NUMBER, POSITIVE, AdapterConfig
from overtone.adapters.families.tensors import Stored, by_module
from overtone.adapters.families.types import Family, ParsedWeights, ParserContext
from overtone.adapters.text import shown
from overtone.errors import AdapterIndexOutOfRange, InvalidAdapter, NonFiniteAdapter, UnsupportedAdapter
from overtone.kernels import IDENTITY, Delta, LowRankCore, Term

_BANK = "base_model.vblora_vector_bank"
_SIDES = ("vblora_logits_A", "vblora_logits_B")
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"

_PEFT_DEFAULTS = {"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2}

Mixture = tuple[torch.Tensor, torch.Tensor]
"""n (..., k) int64 and w (..., k) float64."""


def _parse(config: AdapterConfig, tensors: Mapping[str, torch.Tensor], context: ParserContext) -> ParsedWeights:
    r, h, length, k = (config.count(key) or default for key, default in _PEFT_DEFAULTS.items())
    if k > h:
        raise InvalidAdapter(f"topk is {k}, but num_vectors is {h}", field="topk")
    if _BANK not in tensors:
        raise InvalidAdapter(f"{_BANK} is missing", field=_BANK)
    bank = Stored(_BANK, tensors[_BANK]).floats((h, length)).to(torch.float64)
    compact = config.flag("save_only_topk_weights")
    names = [side + suffix for side in _SIDES for suffix in ((_INDICES, _WEIGHTS) if compact else ("",))]
    mixture = _stored_mixture if compact else _logits_mixture
    deltas, numbers, count = {}, 0, bank.numel()
    for module, parts in by_module({n: t for n, t in tensors.items() if n != _BANK}, names).items():
        p, q = shape = context.base.shape(module)
        if p % length or q % length:
            message = f"vector_length {length} does not divide both sides of {shown(module)}, which is {shape}"
            raise InvalidAdapter(message, field="vector_length")
        mixed_a = mixture(parts, _SIDES[0], (r, q // length), h, k)
        mixed_b = mixture(parts, _SIDES[1], (p // length, r), h, k)
        numbers += r * (p + q)
        if numbers > context.max_numbers:  # a byte of indices makes up to a whole vector of the bank
            message = (
                f"the adapter expands to more than the {context.max_numbers} numbers allowed, of which {shown(module)} has "
                f"{r * (p + q)}"
            )
            raise UnsupportedAdapter(message, field="r")
        a = _expand(mixed_a, bank).reshape(r, q)
        b = _expand(mixed_b, bank).transpose(1, 2).reshape(p, r)
        deltas[module] = Delta((Term(IDENTITY, LowRankCore(a, b), IDENTITY),), shape)
        count += sum(part.tensor.numel() for part in parts.values() if part.tensor.is_floating_point())
    return ParsedWeights(deltas, count)


def _expand(mixture: Mixture, bank: torch.Tensor) -> torch.Tensor:
    """sum over j of w[..., j] bank[n[..., j]]. bank: (h, l) float64; returns (..., l) float32."""
    indices, weights = mixture
    k = indices.shape[-1]
    mixed = F.embedding_bag(indices.reshape(-1, k), bank, mode="sum", per_sample_weights=weights.reshape(-1, k))
    return mixed.reshape(*indices.shape[:-1], -1).to(torch.float32)


def _logits_mixture(parts: Mapping[str, Stored], side: str, grid: tuple[int, int], h: int, k: int) -> Mixture:
    """Minus infinity, which PEFT gives to the vectors that a compact adapter had left out, is a weight of 0.

    Which of equal logits on the border of the k largest count is for torch.topk to say, on the stored tensor, as in PEFT;
    within the k largest, equal ones have equal weights.
    """
    stored = parts[side]
    left_out = stored.tensor == -torch.inf
    Stored(stored.name, stored.tensor.masked_fill(left_out, 0)).floats((*grid, h))
    logits, indices = stored.tensor.topk(k, dim=-1)
    empty = left_out.all(dim=-1)
    if bool(empty.any()):
        position = [int(i) for i in empty.nonzero()[0]]
        raise NonFiniteAdapter(f"{stored.name}{position} has minus infinity for all vectors", field=stored.name)
    return indices, torch.softmax(logits.to(torch.float64), dim=-1)


def _stored_mixture(parts: Mapping[str, Stored], side: str, grid: tuple[int, int], h: int, k: int) -> Mixture:
    named, weighed = parts[side + _INDICES], parts[side + _WEIGHTS]
    indices = named.integers((*grid, k))
    outside = (indices < 0) | (indices >= h)
    if bool(outside.any()):
        position = [int(i) for i in outside.nonzero()[0]]
        value = int(indices[tuple(position)])
        raise AdapterIndexOutOfRange(
            f"{named.name}{position} is {value}, outside 0..{h - 1}",
            field=named.name,
            metadata={"value": str(value), "limit": str(h - 1)},
        )
    in_order = indices.sort(dim=-1).values
    if bool((in_order[..., 1:] == in_order[..., :-1]).any()):
        raise InvalidAdapter(f"{named.name} names a vector twice in one mixture", field=named.name)
    return indices, _completed(weighed, (*grid, k - 1))


def _completed(stored: Stored, shape: tuple[int, int, int]) -> torch.Tensor:
    """Weights (..., k) float64 whose last one completes the sum of 1, which PEFT leaves out."""
    stored.check_shape(shape)
    first = (stored.floats(shape) if shape[-1] else stored.tensor).to(torch.float64)
    weights = torch.cat((first, 1 - first.sum(dim=-1, keepdim=True)), dim=-1)
    # A last weight below zero by the rounding of the others is zero.
    slack = shape[-1] * torch.finfo(stored.tensor.dtype).eps if shape[-1] else 0.0
    if bool((weights < -slack).any()):
        position = [int(i) for i in (weights < -slack).nonzero()[0][:-1]]
        raise InvalidAdapter(f"{stored.name}{position} must be weights >= 0 with a sum <= 1", field=stored.name)
    weights = weights.clamp(min=0)
    return weights / weights.sum(dim=-1, keepdim=True)


VBLORA = Family(
    name="vblora",
    keys={
        **dict.fromkeys(_PEFT_DEFAULTS, POSITIVE),
        "save_only_topk_weights": FLAG,
        # Training only.
        "vblora_dropout": FRACTION,
        "init_vector_bank_bound": NUMBER,
        "init_logits_std": NUMBER,
    },
    parse=_parse,
)
