"""Layouts and locations in memory, each once: read and checked when they are first needed, then found by their digest."""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import WeakValueDictionary

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.canonical.layout import Layout, read_layout
from overtone.adapters.canonical.places import read_places
from overtone.adapters.memo import Memo
from overtone.adapters.safetensors_writer import PREFIX
from overtone.kernels import PackedPatterns

_LAYOUT_BYTES = 64 << 20
_PATTERN_BYTES = 32 << 20
"""Of locations that are kept although nothing uses them: on the device an adapter needs them no more once it is loaded, but
the next one to be loaded needs them again, read and checked."""


class Known:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layouts = Memo(_LAYOUT_BYTES)
        self._recent = Memo(_PATTERN_BYTES)
        self._patterns: WeakValueDictionary[tuple[str, str], PackedPatterns] = WeakValueDictionary()

    @property
    def nbytes(self) -> int:
        """Of what is kept whether or not it is in use."""
        return self._layouts.nbytes + self._recent.nbytes

    def layout(self, digest: str, base: BaseDescription, read: Callable[[], bytes]) -> Layout:
        """The layout with this digest, whose blob `read` gives."""
        # The layout keeps its base, so that no other can come to have its id.
        return self._layouts.get((digest, id(base)), lambda: (read_layout(read(), digest, base),))[0]

    def places(self, digest: str, layout: Layout, read: Callable[[], bytes]) -> PackedPatterns:
        """The locations with this digest, whose blob `read` gives, checked against `layout`."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            with self._lock:
                used = self._patterns.get((digest, layout.digest))
            if used is not None:
                return used.rows, used.cols
            rows, cols = read_places(read(), layout.places)
            return torch.from_numpy(rows), torch.from_numpy(cols)

        return self.keep(digest, layout, *self._recent.get((digest, layout.digest), make))

    def keep(self, digest: str, layout: Layout, rows: torch.Tensor, cols: torch.Tensor) -> PackedPatterns:
        """The locations with this digest, in the memory of those in use if there are any, else in `rows` and `cols`: (n,)
        int32, which have been checked.

        They get a key, which makes them count as shared, where many adapters have the same by nature or once a second one
        turns up: learned locations are one adapter's alone, which need not pay for that.
        """
        key = PREFIX + digest
        with self._lock:
            used = self._patterns.get((digest, layout.digest))
            if used is not None and used.key:
                return used
            if used is not None:
                made = PackedPatterns(used.rows, used.cols, key)
            else:
                made = PackedPatterns(rows, cols, key if layout.keyed else "")
            self._patterns[digest, layout.digest] = made
            return made
