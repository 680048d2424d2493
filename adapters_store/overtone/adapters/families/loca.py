"""LoCA: learned locations of DCT coefficients (Du et al., ICLR 2025, arXiv 2502.06820).

    delta_W = scale C_p^T S C_q        S[l1_i, l2_i] += a_i        C_N: orthonormal DCT-II of size N

`<module>.spectrum` (n,): a. `<module>.spectrum_indices` (2, n): l1, the output frequency, and l2, the input frequency,
either as integers or as the authors train them, floats in [0, 1] of the highest frequency.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from overtone.adapters.families.coefficients import Coefficients, check_range, integer_indices, parse_coefficients
from overtone.adapters.families.config import COUNT, FRACTION, SPECTRUM_KEYS, AdapterConfig, one_of
from overtone.adapters.families.types import Family, ParsedWeights, ParserContext

HIGHEST = 0.999
"""The authors clamp here, which makes the very highest frequencies unreachable; we must land where they trained."""


def decode_locations(stored: Coefficients, shape: tuple[int, int]) -> torch.Tensor:
    """l = round(clamp(t, 0, 0.999) (N - 1)), half to even, as the authors do. Returns (2, n) int64.

    In the precision of the saved tensor, because another one may round to another frequency; half precisions are
    widened to float32 first, which is exact.
    """
    t = stored.indices if stored.indices.dtype == torch.float64 else stored.indices.to(torch.float32)
    for axis in range(2):
        check_range(stored.indices_name, axis, t[axis], 0, 1)
    t = t.clamp(0, HIGHEST)
    return torch.stack([torch.round(t[axis] * (shape[axis] - 1)) for axis in range(2)]).to(torch.int64)


def _parse(config: AdapterConfig, tensors: Mapping[str, torch.Tensor], context: ParserContext) -> ParsedWeights:
    def fold(stored: Coefficients, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        locate = decode_locations if stored.indices.is_floating_point() else integer_indices
        return locate(stored, shape), stored.values.to(torch.float64) * config.number("scale", 1.0)

    return parse_coefficients(config, tensors, context.base, "spectrum_indices", fold)


LOCA = Family(
    name="loca",
    keys={
        **SPECTRUM_KEYS,
        "learn_location_iter": COUNT,
        "loca_dct_mode": one_of("default", "sparse", "fast"),
        "loca_dropout": FRACTION,
        "entry_seed": COUNT,
        "random_loc_seed": COUNT,
    },
    parse=_parse,
)
