"""WaveFT: random coefficients of the single-level wavelet transform (arXiv 2505.12532), as PEFT 0.21.2 applies them.

    delta_W = scaling F_p^T Z F_q        F_N^T: inverse transform of size N, the frame WAVELET
    delta_W = scaling S                  with use_idwt false; S[row_i, col_i] = v_i

`<module>.waveft_spectrum` (n,): v; the locations are `random_spectrum`'s.

PEFT lays S (p, q) into the middle of a plane (m_p, m_q), m_N = `wavelet_size(N)`, and takes its quadrants as coefficients:
top left approximations, top right horizontal, bottom left vertical, bottom right diagonal details. Its inverse transform
applies the high-pass filter to the row index of the horizontal ones, while in Z the second half of the rows is for that
filter: so Z is the plane with the top right and the bottom left quadrant exchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pywt
import torch

from overtone.adapters.families.config import FLAG, NUMBER, POSITIVE, AdapterConfig, Rule
from overtone.adapters.families.patterns import COUNT_PATTERN, Patterns
from overtone.adapters.families.random_spectrum import SEED, Entries, Spectrum, parse_spectrum, seed_of
from overtone.adapters.families.types import Family, ParsedWeights, ParserContext
from overtone.errors import InvalidAdapter, UnsupportedAdapter
from overtone.kernels import IDENTITY, Frame, wavelet, wavelet_size

_PEFT_COUNT, _PEFT_SCALING, _PEFT_WAVELET = 2592, 25.0, "db1"

WAVELETS = (
    *(f"db{i}" for i in range(1, 11)),
    *(f"sym{i}" for i in range(2, 11)),
    *(f"coif{i}" for i in range(1, 4)),
)
"""Those whose filters PEFT has and PyWavelets has the same. PEFT's coif4 and coif5 are not wavelets of that name."""

_TRUE_OR_FALSE = Rule(lambda v: isinstance(v, bool), "true or false")

Counts = Mapping[str, int]
Shapes = Mapping[str, tuple[int, int]]


@functools.cache
def wavelet_frame(name: str) -> Frame:
    """The frame of one of `WAVELETS`."""
    known = pywt.Wavelet(name)
    return wavelet(tuple(known.rec_lo), tuple(known.rec_hi))


def plane_entries(frame: Frame, rows: torch.Tensor, cols: torch.Tensor, shape: tuple[int, int]) -> Entries:
    """Coefficients at (rows, cols), (n,) int64 each, as entries of Z, scaling left out."""
    assert frame.taps is not None
    m_p, m_q = (wavelet_size(size, frame.taps) for size in shape)
    rows, cols = rows + (m_p - shape[0]) // 2, cols + (m_q - shape[1]) // 2
    exchanged = (rows < m_p // 2) != (cols < m_q // 2)
    return own_entries(
        torch.where(exchanged, (rows + m_p // 2) % m_p, rows),
        torch.where(exchanged, (cols + m_q // 2) % m_q, cols),
        (m_p, m_q),
    )


def own_entries(rows: torch.Tensor, cols: torch.Tensor, shape: tuple[int, int]) -> Entries:
    """Every coefficient where it is."""
    n = rows.numel()
    return Entries(torch.arange(n), rows, cols, torch.ones(n, dtype=torch.float64), shape)


def spectrum_of(config: AdapterConfig) -> Spectrum:
    transformed = config.flag("use_idwt", True)
    frame = wavelet_frame(config.text("wavelet_family", _PEFT_WAVELET)) if transformed else IDENTITY
    return Spectrum(
        part="waveft_spectrum",
        frame=frame,
        scale=config.number("scaling", _PEFT_SCALING),
        seed=seed_of(config),
        entries=functools.partial(plane_entries, frame) if transformed else own_entries,
        key=len(frame.taps[0]) if frame.taps else 0,
    )


def _parse(config: AdapterConfig, tensors: Mapping[str, torch.Tensor], context: ParserContext) -> ParsedWeights:
    return parse_spectrum(spectrum_of(config), tensors, context, _counts(config))


def _counts(config: AdapterConfig) -> Callable[[Shapes], Counts]:
    n = config.count("n_frequency") or _PEFT_COUNT
    if config.flag("proportional_parameters"):
        return functools.partial(proportional_counts, n)  # which PEFT prefers to the patterns
    patterns = config.values.get("n_frequency_pattern", {})
    assert isinstance(patterns, dict)
    find = Patterns[int](patterns, "n_frequency_pattern").get
    return lambda shapes: {m: find(m) or n for m in shapes}


def proportional_counts(n_frequency: int, shapes: Shapes) -> Counts:
    """n of each module by its share of all weights, n_frequency on average, in PEFT's own arithmetic.

    Raises `InvalidAdapter` for more than there are weights, which would also exceed what a float holds.
    """
    total = sum(p * q for p, q in shapes.values())
    if n_frequency > total:
        raise InvalidAdapter(f"n_frequency is more than the {total} weights of all modules", field="n_frequency")
    budget = n_frequency * len(shapes)
    return {module: max(1, round((q * p) / total * budget)) for module, (p, q) in shapes.items()}


WAVEFT = Family(
    name="waveft",
    keys={
        "n_frequency": POSITIVE,
        "n_frequency_pattern": COUNT_PATTERN,
        "proportional_parameters": _TRUE_OR_FALSE,
        "scaling": NUMBER,
        "wavelet_family": Rule(lambda v: v in WAVELETS, "one of " + ", ".join(WAVELETS), UnsupportedAdapter),
        "use_idwt": _TRUE_OR_FALSE,
        "random_loc_seed": SEED,
        # Training only.
        "init_weights": FLAG,
    },
    parse=_parse,
)
