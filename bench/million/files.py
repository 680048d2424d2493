"""The files of synthetic adapters, made faster than any store takes them: a header once, then numbers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save

from overtone.adapters.files import AdapterFiles

Shapes = Mapping[str, tuple[int, int]]
RECIPES = ("LoCA, its own locations", "LoCA, shared locations", "FourierFT")
"""What adapter i is: RECIPES[i % 3]."""
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Template:
    """config; head: all of the file before its numbers; values, places: where in its 4-byte words they go."""

    config: bytes
    head: bytes
    values: np.ndarray
    places: np.ndarray


def _template(config: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> _Template:
    raw = save(dict(tensors))
    length = 8 + int.from_bytes(raw[:8], "little")
    found: dict[str, list[np.ndarray]] = {"values": [], "places": []}
    for name, entry in sorted(json.loads(raw[8:length]).items()):
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            kind = "places" if name.endswith("_indices") else "values"
            found[kind].append(np.arange(begin // 4, end // 4))
    values, places = (np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in found.values())
    return _Template(json.dumps(config).encode(), raw[:length], values, places)


class SyntheticAdapters:
    """Adapter i, the same in every process. n: coefficients a module; shapes: (p, q) by module."""

    def __init__(self, shapes: Shapes, n: int) -> None:
        self._shapes, self._n = shapes, n
        targets = sorted({name.rpartition(".")[2] for name in shapes})
        self._sizes = np.array([shapes[name] for name in sorted(shapes)])
        loca = {"peft_type": "LOCA", "n_frequency": n, "target_modules": targets}
        fourier = {"peft_type": "FOURIERFT", "n_frequency": n, "random_loc_seed": 777, "target_modules": targets}
        numbers, pairs = torch.zeros(n), torch.zeros(2, n, dtype=torch.int32)
        spectra = {f"{_PREFIX}{name}.spectrum": numbers for name in shapes}
        indices = {f"{_PREFIX}{name}.spectrum_indices": pairs for name in shapes}
        self._loca = _template(loca, {k: v.clone() for k, v in (spectra | indices).items()})
        self._fourier = _template(fourier, {f"{_PREFIX}{name}.fourierft_spectrum": numbers.clone() for name in shapes})
        self._shared = self._locations(np.random.default_rng(0))

    def files(self, index: int) -> AdapterFiles:
        draw = np.random.default_rng(index + 1)
        recipe = index % len(RECIPES)
        template = self._fourier if recipe == 2 else self._loca
        words = np.empty(len(template.values) + len(template.places), dtype=np.int32)
        numbers = draw.standard_normal(len(template.values), dtype=np.float32)
        words[template.values] = (numbers if recipe == 2 else 0.05 * numbers).view(np.int32)
        if recipe < 2:
            words[template.places] = self._shared if recipe == 1 else self._locations(draw)
        return AdapterFiles(template.config, template.head + words.tobytes())

    def _locations(self, draw: np.random.Generator) -> np.ndarray:
        """Rows, then columns, of one module after another: unique in each."""
        strata = (draw.random((len(self._sizes), self._n)) + np.arange(self._n)) / self._n
        flat = (strata * self._sizes.prod(axis=1)[:, None]).astype(np.int64)
        both = np.stack(np.divmod(flat, self._sizes[:, 1:]), axis=1)
        return both.astype(np.int32).reshape(-1)
