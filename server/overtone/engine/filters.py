"""Which tokens may be drawn, and drawing them: for all rows at once, each by its own parameters.

Only row-wise operations whose result for a row is the same in any batch: totals are last elements of cumulative sums in
float64 or sums of blocks, because a plain sum of a whole row may be split differently when it is the only one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F

from overtone.engine.types import SamplingParams

_FIRST_TRY = 128
_NEXT_TRY = 8
"""The likeliest few nearly always suffice, and finding them is far cheaper than sorting a vocabulary; else so many times as
many, and so on."""

_BLOCK = 512
"""Tokens whose probabilities are summed before one of them is looked for."""


@dataclass(frozen=True, slots=True)
class FilterParams:
    """Parameters of the rows: tensors (R,), float32 except top_k (int64) and the masses top_p and typical_p (float64)."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    typical_p: torch.Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> Self:
        def column(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            column([p.temperature for p in params], torch.float32),
            column([p.top_k for p in params], torch.int64),
            column([p.top_p for p in params], torch.float64),
            column([p.min_p for p in params], torch.float32),
            column([p.typical_p for p in params], torch.float64),
        )


def filtered_probabilities(logits: torch.Tensor, params: FilterParams) -> torch.Tensor:
    """softmax(logits / temperature) over the tokens that top_k, top_p, min_p and typical_p keep, in that order; zero for the
    others. logits: (R, vocabulary) float32, each row's largest finite. Tokens exactly as likely as the last that is kept
    are kept too, so the outcome does not hang on the order of equal logits."""
    scaled = (logits - logits.amax(-1, keepdim=True)) / params.temperature[:, None]
    # The largest is 0 now, so min_p times the largest probability is this much of a logit.
    floor = params.min_p.log()[:, None]
    cut = ((params.top_k > 0) & (params.top_k < logits.shape[1]) | (params.top_p < 1.0)).nonzero()[:, 0]
    if cut.numel():
        likely = _floor(scaled[cut], params.top_k[cut], params.top_p[cut], min(_FIRST_TRY, logits.shape[1]))
        floor = floor.index_put((cut,), torch.maximum(floor[cut], likely))
    if not bool((floor == -torch.inf).all()):
        scaled = scaled.masked_fill_(scaled < floor, -torch.inf)
    probabilities = scaled.softmax(-1)
    typical = (params.typical_p < 1.0).nonzero()[:, 0]
    if typical.numel():
        probabilities[typical] = _typical(probabilities[typical], params.typical_p[typical])
    return probabilities


def draw(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """A token (R,) int64 of each row: the inverse of the distribution function at the row's uniform number.

    probabilities: (R, vocabulary), each row positive somewhere, of any total; uniforms: (R,) float64 in [0, 1).
    """
    rows, vocabulary = probabilities.shape
    # First the block, by the blocks' sums, then the token within it: a cumulative sum of everything takes 20 times as long.
    size = min(_BLOCK, vocabulary)
    if vocabulary % size:
        probabilities = F.pad(probabilities, (0, size - vocabulary % size))
    blocks = probabilities.view(rows, -1, size)
    until = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniforms[:, None] * until[:, -1:]
    block = _first_above(until, target)
    within = blocks[torch.arange(rows, device=blocks.device), block[:, 0]].cumsum(-1, dtype=torch.float64)
    before = F.pad(until, (1, 0)).gather(1, block)
    return (block * size + _first_above(within, target - before))[:, 0]


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(R, 1): the first place whose total exceeds `target`. Rounding may point behind the last place that adds anything at
    all: then that one, the first to reach the total."""
    index = torch.searchsorted(cumulative, target, right=True)
    return torch.minimum(index, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))


def _floor(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, count: int) -> torch.Tensor:
    """(R, 1): the smallest scaled logit that top_k and then top_p keep, found among the `count` likeliest if it is there."""
    vocabulary = scaled.shape[1]
    ordered, order = scaled.topk(count)
    unlimited = (top_k == 0) | (top_k >= vocabulary)
    floor = ordered.gather(1, (top_k.clamp(1, count) - 1)[:, None])
    floor = floor.masked_fill(unlimited[:, None], -torch.inf)
    masses = scaled.masked_fill(scaled < floor, -torch.inf).softmax(-1).gather(1, order)
    last, reached = _last_kept(masses, top_p)
    nucleus = ordered.gather(1, last).masked_fill((top_p >= 1.0)[:, None], -torch.inf)
    floor = torch.maximum(floor, nucleus)
    if count < vocabulary:
        found = (unlimited | (top_k <= count)) & (reached | (top_p >= 1.0))
        rest = (~found).nonzero()[:, 0]
        if rest.numel():
            more = min(count * _NEXT_TRY, vocabulary)
            floor[rest] = _floor(scaled[rest], top_k[rest], top_p[rest], more)
    return floor


def _typical(probabilities: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Zero outside the smallest set of tokens whose information -log p is nearest to the row's entropy and whose
    probabilities reach `mass` (Meister et al., "Locally Typical Sampling", 2022)."""
    entropy = torch.special.entr(probabilities).cumsum(-1, dtype=torch.float64)[:, -1:]
    distance = (-probabilities.log() - entropy.float()).abs()  # inf where the probability is 0
    return probabilities.masked_fill(distance > _reach(distance, probabilities, mass, _FIRST_TRY), 0.0)


def _reach(distance: torch.Tensor, probabilities: torch.Tensor, mass: torch.Tensor, count: int) -> torch.Tensor:
    """(R, 1): the largest distance among the nearest tokens that reach `mass`."""
    count = min(count, distance.shape[1])
    ordered, order = distance.topk(count, largest=False)
    last, reached = _last_kept(probabilities.gather(1, order), mass)
    reach = ordered.gather(1, last)
    rest = (~reached).nonzero()[:, 0]
    if count < distance.shape[1] and rest.numel():
        reach[rest] = _reach(distance[rest], probabilities[rest], mass[rest], count * _NEXT_TRY)
    return reach


def _last_kept(masses: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Place (R, 1) of the first mass that brings the total to `wanted`, else the last place; whether it is reached (R,)."""
    cumulative = masses.cumsum(-1, dtype=torch.float64)
    last = (cumulative < wanted[:, None]).sum(-1, keepdim=True).clamp(max=masses.shape[1] - 1)
    return last, cumulative[:, -1] >= wanted
