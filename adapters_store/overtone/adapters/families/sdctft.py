"""sDCTFT, also MaCP: DCT coefficients at fixed locations (Shen et al., arXiv 2410.09103; ACL 2025, arXiv 2505.23870).

    delta_W = scale IDCT2(S)           S[k1_i, k2_i] += s_i

The authors' inverse transform is not normalised: it equals C_N^T diag(g_N) with C_N the orthonormal DCT-II and
g_N(0) = 1 / (2 sqrt N), g_N(k) = 1 / sqrt(2 N). So in the orthonormal frame the coefficient is

    a = scale s g_p(k1) g_q(k2)        ("transform": "dct_unnormalized", the default)
    a = scale s                        ("transform": "dct_orthonormal")

`<module>.spectrum` (n,): s. `<module>.indices` (2, n) integer: k1, the output frequency, and k2, the input frequency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from overtone.adapters.families.coefficients import Coefficients, integer_indices, parse_coefficients
from overtone.adapters.families.config import COUNT, FRACTION, SPECTRUM_KEYS, AdapterConfig, one_of
from overtone.adapters.families.types import Family, ParsedWeights, ParserContext

UNNORMALIZED, ORTHONORMAL = "dct_unnormalized", "dct_orthonormal"


def synthesis_gain(k: torch.Tensor, size: int) -> torch.Tensor:
    """g_N(k): what the unnormalised inverse DCT-II of size N does to frequency k. k: (n,); returns (n,) float64."""
    gain = torch.full(k.shape, 1 / math.sqrt(2 * size), dtype=torch.float64)
    gain[k == 0] = 1 / (2 * math.sqrt(size))
    return gain


def _parse(config: AdapterConfig, tensors: Mapping[str, torch.Tensor], context: ParserContext) -> ParsedWeights:
    unnormalized = config.text("transform", UNNORMALIZED) == UNNORMALIZED

    def fold(stored: Coefficients, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        indices = integer_indices(stored, shape)
        values = stored.values.to(torch.float64) * config.number("scale", 1.0)
        if unnormalized:
            values = values * synthesis_gain(indices[0], shape[0]) * synthesis_gain(indices[1], shape[1])
        return indices, values

    return parse_coefficients(config, tensors, context.base, "indices", fold)


SDCTFT = Family(
    name="sdctft",
    keys={
        **SPECTRUM_KEYS,
        "transform": one_of(UNNORMALIZED, ORTHONORMAL),
        "energy_ratio": FRACTION,
        "entry_seed": COUNT,
        "random_loc_seed": COUNT,
    },
    parse=_parse,
)
