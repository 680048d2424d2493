"""An adapter's folder as deltas in the DCT plane, by the server's own parsers.

LoRA and all whose deltas are products of narrow matrices stay two thin factors; LoCA and sDCTFT are sparse there already;
of the rest the delta is made dense, one module at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from overtone.adapters import ParserContext, parse_adapter
from overtone.adapters.bridges import Draft, normalised, read_source
from overtone.adapters.bridges.factors import dense_term, exact_pair
from overtone.adapters.projectors import Projectors
from overtone.adapters.text import shown
from overtone.errors import UnsupportedAdapter
from overtone.kernels import DCT, Delta, FrameKind, SparseCore
from overtone.tuning.compress.base import Base
from overtone.tuning.compress.config import Config
from overtone.tuning.compress.source import check_rest, check_targets, is_target
from overtone.tuning.compress.spectra import SparseSpectrum, Spectrum, dense, low_rank

_ORIGIN = ("base_model_name_or_path", "base_fingerprint", "revision", "task_type")


class AdapterSource:
    """Raises `InvalidAdapter` and its kinds for what the server refuses, `UnsupportedAdapter` with the module for an
    embedding and for a delta that is not a plain sum (DoRA)."""

    def __init__(self, config: Config, base: Base) -> None:
        source = read_source(config.source)
        draft = normalised(Draft.of(source))
        description = base.description(fingerprint=bool(draft.config.get("base_fingerprint")))
        projectors = Projectors(base=description)
        parsed = parse_adapter(draft.files(), ParserContext(description, projectors=projectors))
        check_targets(config.targets, list(parsed.deltas))
        self._deltas = {m: delta for m, delta in parsed.deltas.items() if is_target(m, config.targets)}
        self._base = base
        self.left_out = tuple(module for module in parsed.deltas if module not in self._deltas)
        check_rest(self.left_out, config.rest, "has a delta and is not in targets")
        for module, delta in self._deltas.items():
            _check_plain(module, delta, module in base.embeddings)
        self.kind = parsed.family
        self.shapes: Mapping[str, tuple[int, int]] = {module: delta.shape for module, delta in self._deltas.items()}
        self.size_bytes = _size(config.source, source.layout.config, source.weights)
        self.origin = {key: draft.config[key] for key in _ORIGIN if draft.config.get(key) is not None}
        self.warnings = parsed.warnings

    def spectrum(self, module: str) -> Spectrum:
        delta, weight = self._deltas[module], partial(self._base.weight, module)
        term = delta.terms[0]
        alone = len(delta.terms) == 1 and term.gain is None
        if alone and term.analysis == DCT and term.synthesis == DCT and isinstance(term.core, SparseCore):
            return SparseSpectrum(term.core)
        pairs = [exact_pair(term, delta.shape, weight) for term in delta.terms]
        found = [pair for pair in pairs if pair is not None]
        if len(found) == len(pairs):
            return low_rank(torch.cat([pair.b for pair in found], dim=1), torch.cat([pair.a for pair in found]))
        total = torch.zeros(delta.shape, dtype=torch.float64)
        for term in delta.terms:
            total += dense_term(term, delta.shape, weight)
        return dense(total)


def _check_plain(module: str, delta: Delta, embedding: bool) -> None:
    if embedding:
        message = f"{shown(module)} is an embedding: coefficients in the DCT plane are for linear layers only"
        raise UnsupportedAdapter(message, field=module)
    if any(term.analysis.kind is FrameKind.WEIGHT for term in delta.terms):
        message = (
            f"{shown(module)} has a DoRA delta, which rescales the rows of the base's own weight: that part is neither of "
            "low rank nor small in the DCT plane. Train it as LoRA, or merge it and compress the merged model"
        )
        raise UnsupportedAdapter(message, field=module)


def _size(folder: Path, *names: str) -> int:
    return sum((folder / name).stat().st_size for name in names)
