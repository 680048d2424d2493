"""FourierFT: random coefficients of the 2-D discrete Fourier transform (ICML 2024, arXiv 2405.03003), PEFT 0.21.2.

    delta_W = scaling Re ifft2(S)        S[row_i, col_i] = v_i        ifft2 divides by p q

`<module>.fourierft_spectrum` (n,): v; the locations are `random_spectrum`'s.

In the real, orthonormal frame DFT, where R = rfft(x) / sqrt(q) and y = irfft(V) sqrt(p), a coefficient v at (r, c) is

    V[g] += w v R[f]  or  w v conj(R[f])        g = min(r, p - r),  f = min(c, q - c)
    w = scaling / sqrt(p q) if g is 0 or p / 2, else half of that

because ifft(x)[c] is conj(R[c]) / sqrt(q) up to c = q / 2 and R[q - c] / sqrt(q) above, and because once the real part is
taken, a frequency r above p / 2 is the conjugate of p - r. The conjugate of R is left if r and c are on the same side of
the middle. So there are at most two real entries: w v from Re R[f] to Re V[g], and w v or its negative from Im R[f] to
Im V[g] unless f or g is 0 or the middle, whose imaginary part is zero or of no effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from overtone.adapters.families.config import FLAG, NUMBER, POSITIVE, AdapterConfig
from overtone.adapters.families.dotted_patterns import dotted_patterns
from overtone.adapters.families.patterns import COUNT_PATTERN
from overtone.adapters.families.random_spectrum import SEED, Entries, Spectrum, parse_spectrum, seed_of
from overtone.adapters.families.types import Family, ParsedWeights, ParserContext
from overtone.kernels import DFT

_PEFT_COUNT, _PEFT_SCALING = 1000, 150.0


def real_entries(rows: torch.Tensor, cols: torch.Tensor, shape: tuple[int, int]) -> Entries:
    """Coefficients at (rows, cols), (n,) int64 each, as entries between the real frames, scaling left out."""
    p, q = shape
    g, f = torch.minimum(rows, p - rows), torch.minimum(cols, q - cols)
    row_end = (g == 0) | (2 * g == p)
    col_end = (f == 0) | (2 * f == q)
    weights = torch.where(row_end, 1.0, 0.5).to(torch.float64) / math.sqrt(p * q)
    sign = torch.where((rows == g) == (cols == f), -1.0, 1.0)
    complex_ = (~(row_end | col_end)).nonzero()[:, 0]
    return Entries(
        sources=torch.cat((torch.arange(rows.numel()), complex_)),
        rows=torch.cat((g, p // 2 + 1 + g[complex_])),
        cols=torch.cat((f, q // 2 + 1 + f[complex_])),
        weights=torch.cat((weights, (weights * sign)[complex_])),
        shape=(2 * (p // 2 + 1), 2 * (q // 2 + 1)),
    )


def spectrum_of(config: AdapterConfig) -> Spectrum:
    return Spectrum(
        part="fourierft_spectrum",
        frame=DFT,
        scale=config.number("scaling", _PEFT_SCALING),
        seed=seed_of(config),
        entries=real_entries,
        key=None,
    )


def _parse(config: AdapterConfig, tensors: Mapping[str, torch.Tensor], context: ParserContext) -> ParsedWeights:
    patterns = config.values.get("n_frequency_pattern", {})
    assert isinstance(patterns, dict)
    find = dotted_patterns(patterns, "n_frequency_pattern")
    default = config.count("n_frequency") or _PEFT_COUNT

    def counts(shapes: Mapping[str, tuple[int, int]]) -> Mapping[str, int]:
        return {module: find(module) or default for module in shapes}

    return parse_spectrum(spectrum_of(config), tensors, context, counts)


FOURIERFT = Family(
    name="fourierft",
    keys={
        "n_frequency": POSITIVE,
        "n_frequency_pattern": COUNT_PATTERN,
        "scaling": NUMBER,
        "random_loc_seed": SEED,
        # Training only.
        "init_weights": FLAG,
    },
    parse=_parse,
)
