"""Which tokens may be drawn, and drawing them: for all rows at once, each by its own parameters.

Only row-wise operations whose result for a row is the same in any batch: totals are last elements of cumulative sums in
float64, because a plain sum may be split differently when there is a single row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from overtone.engine.types import SamplingParams

_FIRST_TRY = 1024
"""The likeliest few nearly always suffice, and finding them is far cheaper than sorting a vocabulary."""


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
    probabilities = scaled.masked_fill_(scaled < floor, -torch.inf).softmax(-1)
    typical = (params.typical_p < 1.0).nonzero()[:, 0]
    if typical.numel():
        probabilities[typical] = _typical(probabilities[typical], params.typical_p[typical])
    return probabilities


def draw(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """A token (R,) int64 of each row: the inverse of the distribution function at the row's uniform number.

    probabilities: (R, vocabulary), each row positive somewhere, of any total; uniforms: (R,) float64 in [0, 1).
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)
    # Rounding may point behind the last token that is possible at all: the first to reach the total.
    return torch.minimum(index, torch.searchsorted(cumulative, total))[:, 0]


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
            floor[rest] = _floor(scaled[rest], top_k[rest], top_p[rest], vocabulary)
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
        reach[rest] = _reach(distance[rest], probabilities[rest], mass[rest], distance.shape[1])
    return reach


def _last_kept(masses: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Place (R, 1) of the first mass that brings the total to `wanted`, else the last place; whether it is reached (R,)."""
    cumulative = masses.cumsum(-1, dtype=torch.float64)
    last = (cumulative < wanted[:, None]).sum(-1, keepdim=True).clamp(max=masses.shape[1] - 1)
    return last, cumulative[:, -1] >= wanted
