"""What FourierFT and WaveFT share: coefficients at random locations, which a seed tells and the file does not.

    flat = randperm(p q)[:n],  row = flat // q,  column = flat % q          torch's generator on the CPU with that seed

Adapters of one size, number and seed (777 unless the author chose another) have the same locations. These are drawn once;
one more adapter costs a gather, a product and a scatter per module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from overtone.adapters.families.config import AdapterConfig, Rule
from overtone.adapters.families.tensors import Stored, by_module
from overtone.adapters.families.types import ParsedWeights, ParserContext
from overtone.adapters.safetensors_writer import key_of
from overtone.adapters.text import shown
from overtone.errors import InvalidAdapter, NonFiniteAdapter, UnsupportedAdapter
from overtone.kernels import Delta, Frame, SparseCore, SparsePattern, Term, sparse_pattern
from overtone.kernels.cores import all_finite

_PEFT_SEED = 777
SEED = Rule(
    lambda v: type(v) is int and -(2**63) <= v < 2**64,
    "a whole number from -2^63 to 2^64 - 1, without which the locations cannot be drawn again",
)

_TOGETHER = 1 << 15
"""Numbers in one operation: with more torch wakes its other threads, and waiting for them costs more than the work."""
_LARGEST_PLANE = 1 << 28
"""Weights of a layer: drawing its locations takes 8 bytes for each, for a moment."""


def seed_of(config: AdapterConfig) -> int:
    """random_loc_seed, whose rule is `SEED`."""
    seed = config.count("random_loc_seed")
    return _PEFT_SEED if seed is None else seed


class Entries(NamedTuple):
    """K[rows[i], cols[i]] += weights[i] values[sources[i]], K of `shape`: what becomes of the stored values.

    sources, rows, cols: (m,) int64; weights: (m,) float64.
    """

    sources: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    weights: torch.Tensor
    shape: tuple[int, int]


@dataclass(frozen=True)
class Spectrum:
    """One of the two families, as configured.

    part: the tensor's name after its module's; frame: on both sides of the core; entries: (rows, cols, (p, q)) of the
    locations, (n,) int64, -> what they are in the frame; key: all that `entries` depends on besides its arguments.
    """

    part: str
    frame: Frame
    scale: float
    seed: int
    entries: Callable[[torch.Tensor, torch.Tensor, tuple[int, int]], Entries]
    key: Hashable


class SpectrumFold(NamedTuple):
    """`Entries` sorted. K's values[places[i]] += weights[i] stored[sources[i]]; rows, cols: the pattern's, to be counted.

    sources, places: (m,) int32, with which index_add_ stays on one thread; weights: (m,) float64.
    """

    pattern: SparsePattern
    rows: torch.Tensor
    cols: torch.Tensor
    sources: torch.Tensor
    places: torch.Tensor
    weights: torch.Tensor


def parse_spectrum(
    spectrum: Spectrum,
    tensors: Mapping[str, torch.Tensor],
    context: ParserContext,
    counts: Callable[[Mapping[str, tuple[int, int]]], Mapping[str, int]],
) -> ParsedWeights:
    """The deltas of all modules with tensors. counts: module -> (p, q) to module -> n, as the configuration has it."""
    stored = {module: parts[spectrum.part] for module, parts in by_module(tensors, (spectrum.part,)).items()}
    shapes = {module: context.base.shape(module) for module in stored}
    expected = counts(shapes)
    alike: dict[tuple[tuple[int, int], int], list[str]] = {}
    for module, shape in shapes.items():
        _check_size(stored[module], expected[module], shape)
        alike.setdefault((shape, expected[module]), []).append(module)
    deltas = {}
    for (shape, n), modules in alike.items():
        many = max(1, _TOGETHER // (2 * n))
        for start in range(0, len(modules), many):
            some = modules[start : start + many]
            cores = _cores(spectrum, [stored[module] for module in some], n, shape, context)
            for module, core in zip(some, cores, strict=True):
                deltas[module] = Delta((Term(spectrum.frame, core, spectrum.frame),), shape)
    return ParsedWeights(deltas, sum(s.tensor.numel() for s in stored.values()))


def _check_size(stored: Stored, expected: int, shape: tuple[int, int]) -> None:
    """(n,) floats with n as expected and no more than the layer has weights."""
    name, n = stored.name, stored.tensor.numel()
    if stored.tensor.ndim != 1 or n == 0:
        raise InvalidAdapter(f"{name} must have the shape (n,), n >= 1, not {tuple(stored.tensor.shape)}", field=name)
    if n != expected:
        raise InvalidAdapter(f"{name} has {n} coefficients, but the configuration says {shown(expected)}", field=name)
    if n > shape[0] * shape[1]:
        raise InvalidAdapter(f"{name} has {n} coefficients for a layer of {shape[0]} x {shape[1]} weights", field=name)
    stored.check_dtype()


def _cores(
    spectrum: Spectrum, spectra: Sequence[Stored], n: int, shape: tuple[int, int], context: ParserContext
) -> list[SparseCore]:
    """Layers of one shape together: the fold of a small spectrum is mostly the cost of calling torch."""
    fold = spectrum_fold(spectrum, n, shape, context)
    values = torch.stack([stored.tensor for stored in spectra], dim=1).to(torch.float64)
    if not all_finite(values):
        for stored in spectra:
            stored.any_floats()
    weighted = values.index_select(0, fold.sources).mul_(fold.weights[:, None])
    summed = torch.zeros(fold.rows.numel(), len(spectra), dtype=torch.float64).index_add_(0, fold.places, weighted)
    folded = summed.mul_(spectrum.scale).to(torch.float32).T.contiguous()
    for stored, row in zip(spectra, folded, strict=True) if not all_finite(folded) else ():
        if not all_finite(row):
            message = f"{stored.name} overflows float32 once scaled by {spectrum.scale:g}"
            raise NonFiniteAdapter(message, field=stored.name)
    return [SparseCore(fold.pattern, row.clone()) for row in folded]


def spectrum_fold(spectrum: Spectrum, n: int, shape: tuple[int, int], context: ParserContext) -> SpectrumFold:
    """For layers of `shape` with n coefficients: drawn once, then known."""
    key = (spectrum.part, spectrum.key, shape, n, spectrum.seed)
    return context.memo.get(key, lambda: _fold(spectrum, shape, n))


def _fold(spectrum: Spectrum, shape: tuple[int, int], n: int) -> SpectrumFold:
    p, q = shape
    if p * q > _LARGEST_PLANE:
        message = f"a layer of {p} x {q} weights is too large for locations drawn from a seed"
        raise UnsupportedAdapter(message, field="random_loc_seed")
    flat = torch.randperm(p * q, generator=torch.Generator().manual_seed(spectrum.seed))[:n]
    sources, rows, cols, weights, size = spectrum.entries(flat // q, flat % q, shape)
    pattern, places = sparse_pattern(rows, cols, size)
    pattern = dataclasses.replace(pattern, key=key_of(rows=pattern.rows, cols=pattern.cols))
    return SpectrumFold(pattern, pattern.rows, pattern.cols, sources.to(torch.int32), places.to(torch.int32), weights)
