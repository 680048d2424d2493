"""A recipe: what an adapter's configuration and the header of its weights decide, and the fast way for all that is left."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.canonical.encode import Blob, Encoded, layout_blob, named, seal
from overtone.adapters.canonical.file import read_file
from overtone.adapters.canonical.known import Known
from overtone.adapters.canonical.layout import Layout
from overtone.adapters.canonical.places import write_places
from overtone.adapters.canonical.stored import Sparse
from overtone.adapters.families.types import ParsedAdapter
from overtone.adapters.memo import Memo
from overtone.adapters.recipes.plan import Fold, Places, Planner, Raw

_BYTES_OF_FACTS = 7
"""What a byte of a layout takes in memory, as Python's objects."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that locations decide."""

    layout_blob: Blob
    layout: Layout
    places_blob: Blob
    rows: torch.Tensor
    cols: torch.Tensor
    fold: Fold

    @property
    def nbytes(self) -> int:
        return len(self.places_blob.data) + self.rows.nbytes + self.cols.nbytes + self.fold.nbytes


class Recipe:
    """Thread-safe."""

    def __init__(
        self,
        parsed: ParsedAdapter,
        encoded: Encoded,
        base: BaseDescription,
        planner: Planner,
        known: Known,
        plans: Memo,
        layouts: Memo,
    ) -> None:
        """parsed: the first adapter of its kind; encoded: the same; known, plans, layouts: those of all recipes."""
        facts = read_file(encoded.blob).facts
        layout = read_file(encoded.shared[facts["layout"]]).facts
        self._adapter, self._base = parsed, base
        self._modules: Mapping[str, Any] = layout["modules"]
        self._wide = read_file(encoded.shared[facts["places"]]).vectors()["rows"].dtype == "I32"
        self._planner, self._known, self._plans, self._layouts = planner, known, plans, layouts
        self._facts_bytes = _BYTES_OF_FACTS * len(encoded.shared[facts["layout"]])

    @property
    def nbytes(self) -> int:
        return self._planner.nbytes + self._facts_bytes

    def admit(self, weights: bytes) -> tuple[Encoded, Sparse] | None:
        """The adapter in a file with the recipe's header, as encoded and as decoded; None if anything is odd."""
        plan = self._plan(self._planner.read(weights))
        if plan is None:
            return None
        values = plan.fold.apply(self._planner.values.read(weights).astype(np.float64))
        if not np.isfinite(values).all():
            return None
        encoded = seal(plan.layout_blob, plan.places_blob, {"float32": values}, {})
        patterns = self._known.keep(plan.places_blob.digest, plan.layout, plan.rows, plan.cols)
        return encoded, Sparse(plan.layout, patterns, torch.from_numpy(values))

    def _plan(self, raw: Raw) -> _Plan | None:
        """Locations that came before need not be sorted again."""
        digest = hashlib.sha256()
        for numbers in raw:
            digest.update(np.ascontiguousarray(numbers).data)
        key = self, digest.digest()
        found = self._plans.find(key)
        if found is None:
            made = self._planner.plan(raw)
            if made is None:
                return None
            found = self._plans.get(key, lambda: (self._made(*made),))
        plan: _Plan = found[0]
        return plan

    def _made(self, fold: Fold, places: Places) -> _Plan:
        owners, rows, cols = places.once()
        blob, layout = self._layouts.get(
            (self, places.counts.tobytes(), owners), lambda: self._layout(places.counts.tolist(), owners)
        )
        located = named(write_places(rows, cols, wide=self._wide))
        return _Plan(blob, layout, located, torch.from_numpy(rows), torch.from_numpy(cols), fold)

    def _layout(self, counts: list[int], owners: tuple[int, ...] | None) -> tuple[Blob, Layout]:
        """Of modules with so many coefficients. owners: for each the first one with the same locations."""
        modules, value, end = {}, 0, 0
        spans: list[list[int]] = []
        for i, (count, (name, facts)) in enumerate(zip(counts, self._modules.items(), strict=True)):
            owner = i if owners is None else owners[i]
            if owner == i:
                spans.append([end, count])
                end += count
            else:
                spans.append(spans[owner])
            (term,), parts = facts["terms"], {"values": ["float32", value, [count]]}
            modules[name] = {**facts, "terms": [{**term, "parts": parts, "pattern": spans[i]}]}
            value += count
        blob = named(layout_blob(self._adapter, modules))
        return blob, self._known.layout(blob.digest, self._base, lambda: blob.data)
