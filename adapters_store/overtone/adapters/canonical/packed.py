"""Adapters that are arrays and nothing else: sparse cores between frames that need no matrix, without a gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from overtone.adapters.canonical.spans import shape_of, span_of
from overtone.adapters.terms import frame_fits, plain_frame
from overtone.kernels import Frame, FrameKind, PackedLayout, PackedTerm

_PLAIN = frozenset(kind.value for kind in (FrameKind.IDENTITY, FrameKind.DCT, FrameKind.DFT, FrameKind.WAVELET))

Shape = tuple[int, int]


def packed_layout(modules: Mapping[str, tuple[Shape, Sequence[Mapping[str, Any]]]]) -> PackedLayout | None:
    """Of module -> (p, q) and the facts of its terms; None if the adapter is not of that kind.

    Raises ValueError, KeyError or TypeError if it is and the facts do not fit each other.
    """
    terms = [term for _, some in modules.values() for term in some]
    if not terms or not all(map(_is_compact, terms)) or len({"keyed" in term for term in terms}) != 1:
        return None
    frames: dict[str, Frame] = {}
    return PackedLayout(
        {name: tuple(_term(term, shape, frames) for term in some) for name, (shape, some) in modules.items()}
    )


def _is_compact(term: Mapping[str, Any]) -> bool:
    kinds = {term[side]["kind"] for side in ("analysis", "synthesis")}
    return term["core"] == "sparse" and not term["gain"] and kinds <= _PLAIN


def _term(facts: Mapping[str, Any], shape: Shape, frames: dict[str, Frame]) -> PackedTerm:
    analysis, synthesis = (_frame(facts[side], frames) for side in ("analysis", "synthesis"))
    p, q = size = shape_of(facts["shape"])
    (dtype, offset, (count,)), pattern = facts["parts"]["values"], span_of(*facts["pattern"])
    values = span_of(offset, count)
    if len(facts["parts"]) != 1 or dtype != "float32" or values[1] - values[0] != pattern[1] - pattern[0]:
        raise ValueError("a sparse core has other numbers than one for each location")
    if not frame_fits(analysis, shape[1], q) or not frame_fits(synthesis, shape[0], p):
        raise ValueError("a core does not lie between its frames")
    return PackedTerm(analysis, synthesis, size, slice(*pattern), slice(*values))


def _frame(facts: Mapping[str, Any], frames: dict[str, Frame]) -> Frame:
    """One object for all that are equal."""
    key = repr(facts)
    found = frames.get(key)
    if found is None:
        found = frames[key] = plain_frame(facts)
    return found
