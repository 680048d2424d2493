"""The terms of a stored adapter: to JSON facts and back, with every promise of `overtone.kernels.Term` checked."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch

from overtone.adapters.families.waveft import WAVELETS, wavelet_frame
from overtone.adapters.projectors import BASE_SVD, rows_digest
from overtone.adapters.text import shown
from overtone.errors import InvalidAdapter
from overtone.kernels import (
    CirculantCore,
    Core,
    DenseCore,
    DiagonalCore,
    Frame,
    FrameKind,
    KroneckerCore,
    LowRankCore,
    ModulatedCore,
    SharedMatrix,
    SparseCore,
    SparsePattern,
    Term,
    numbers_of,
)

CORES: Mapping[str, type[Core]] = {
    "sparse": SparseCore,
    "low_rank": LowRankCore,
    "dense": DenseCore,
    "diagonal": DiagonalCore,
    "kronecker": KroneckerCore,
    "circulant": CirculantCore,
    "modulated": ModulatedCore,
}
_NAMES = {core: name for name, core in CORES.items()}
_MOST_TERMS = 16
"""Of one module. No family has more than two."""
_LARGEST_BLOCK = 2**31 - 1


class Matrices(Protocol):
    """Where matrices come from, which are never in an adapter's own blob."""

    def matrix(self, key: str, rows: int, digest: str = "") -> SharedMatrix:
        """The matrix with this key; of the base's singular vectors at least `rows` rows, the first of which must have
        `digest`."""


class Parts(Protocol):
    """Where a format keeps what the `index`-th term of a module is made of. Both raise what `TermReader.term` raises."""

    def tensor(self, module: str, index: int, facts: Mapping[str, Any], name: str) -> torch.Tensor:
        """A field of its core or its gain; the same object where the same numbers serve several terms."""

    def pattern(self, module: str, index: int, facts: Mapping[str, Any], shape: tuple[int, int]) -> SparsePattern:
        """Of a sparse core of `shape`."""


def facts_of(term: Term) -> dict[str, Any]:
    """Everything about a term but its tensors. A pattern with a key is `keyed`: the key is what the pattern is."""
    core = term.core
    facts: dict[str, Any] = {
        "analysis": _frame_facts(term.analysis, core.shape[1]),
        "synthesis": _frame_facts(term.synthesis, core.shape[0]),
        "core": _NAMES[type(core)],
        "shape": list(core.shape),
        "gain": term.gain is not None,
    }
    if not isinstance(core, SparseCore | DiagonalCore):
        facts["scale"] = core.scale
    if isinstance(core, SparseCore) and core.pattern.key:
        facts["keyed"] = True
    if isinstance(core, ModulatedCore):
        facts |= {"basis": core.basis.key, "transposed": core.transposed}
    return facts


def _frame_facts(frame: Frame, rows: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": frame.kind.value}
    if frame.block:
        facts["block"] = frame.block
    if frame.taps is not None:
        facts["taps"] = [list(taps) for taps in frame.taps]
    if frame.shared is not None:
        facts["matrix"] = frame.shared.key
        if frame.shared.key.startswith(BASE_SVD):
            facts["digest"] = rows_digest(frame.shared.matrix[:rows])
    return facts


def check_facts(module: str, terms: Sequence[Mapping[str, Any]], *, embedding: bool) -> None:
    """What can be told from facts alone of the terms of one module: whether the engine can apply such terms.

    Raises `InvalidAdapter`, and KeyError, TypeError or AttributeError for facts that are no facts.
    """

    def refuse(what: str) -> NoReturn:
        raise InvalidAdapter(f"the stored terms of {shown(module)} cannot be applied: {what}", field=shown(module))

    if not 1 <= len(terms) <= _MOST_TERMS:
        refuse(f"a layer has 1 to {_MOST_TERMS} of them, not {len(terms)}")
    for facts in terms:
        analysis, synthesis, core = facts["analysis"], facts["synthesis"], facts["core"]
        kinds = analysis["kind"], synthesis["kind"]
        if kinds[1] == "weight":
            refuse("the frame weight is one of the analysis alone")
        if [kind == "block_dft" for kind in kinds] != [core == "circulant"] * 2:
            refuse("circulant cores and frames of blocks go together")
        if core == "circulant" and analysis.get("block") != synthesis.get("block"):
            refuse("both frames of a circulant core have the same blocks")
        if embedding and kinds[0] != "weight" and (core != "low_rank" or kinds[0] != "identity"):
            refuse("of an embedding only a row can be taken")


class TermReader:
    """Builds the terms of one stored adapter. check: whether a core keeps its promises, as far as nobody knows it yet.

    Raises `InvalidAdapter`, and KeyError, TypeError, ValueError or AssertionError for facts that are no facts.
    """

    def __init__(self, parts: Parts, matrices: Matrices, check: Callable[[Core], bool]) -> None:
        self._parts, self._matrices, self._check = parts, matrices, check
        self._cores: dict[tuple[Any, ...], Core] = {}
        self._frames: dict[Any, Frame] = {}

    def term(self, module: str, index: int, facts: Mapping[str, Any], shape: tuple[int, int]) -> Term:
        """The term with these facts on a layer of `shape`."""

        def part(name: str) -> torch.Tensor:
            return self._parts.tensor(module, index, facts, name)

        if CORES[facts["core"]] is SparseCore:
            rows, cols = facts["shape"]
            pattern = self._parts.pattern(module, index, facts, (int(rows), int(cols)))
            core = self._known(SparseCore(pattern, part("values")), facts)
        else:
            core = self._known(self._core(facts, part), facts)
        analysis = self._frame(facts["analysis"], core.shape[1])
        synthesis = self._frame(facts["synthesis"], core.shape[0])
        term = Term(analysis, core, synthesis, part("gain") if facts["gain"] else None)
        if list(core.shape) != facts["shape"] or not self._check(core) or not _fits(term, shape):
            raise InvalidAdapter(f"the stored coefficients of {shown(module)} are malformed", field=shown(module))
        return term

    def _known(self, core: Core, facts: Mapping[str, Any]) -> Core:
        """One object for all terms whose cores have the same tensors, as those of PiCa have."""
        tensors = list(numbers_of(core).values())
        if isinstance(core, SparseCore):
            tensors += [core.rows, core.cols]
        described = (facts["core"], *facts["shape"], facts.get("scale"), facts.get("basis"), facts.get("transposed"))
        return self._cores.setdefault((described, *map(id, tensors)), core)

    def _core(self, facts: Mapping[str, Any], part: Callable[[str], torch.Tensor]) -> Core:
        kind = CORES[facts["core"]]
        if kind is DiagonalCore:
            return DiagonalCore(part("values"))
        scale = float(facts["scale"])
        if not math.isfinite(scale):
            raise ValueError("a scale is not finite")
        if kind is ModulatedCore:
            lam = part("lam")
            basis = self._matrices.matrix(facts["basis"], lam.shape[0])
            return ModulatedCore(basis, part("gamma"), lam, scale, bool(facts["transposed"]))
        names = {LowRankCore: "ab", DenseCore: ("matrix",), KroneckerCore: "abk", CirculantCore: ("kernel",)}[kind]
        return kind(*(part(name) for name in names), scale)  # type: ignore[arg-type, call-arg]

    def _frame(self, facts: Mapping[str, Any], rows: int) -> Frame:
        key = facts.get("matrix")
        if key is not None:
            shared = self._matrices.matrix(key, rows, facts.get("digest", ""))
            return Frame(FrameKind(facts["kind"]), shared=shared)
        known = repr(facts)
        frame = self._frames.get(known)
        if frame is None:
            frame = self._frames[known] = plain_frame(facts)
        return frame


def plain_frame(facts: Mapping[str, Any]) -> Frame:
    """Of facts that name no matrix. The engine keeps a transform for each frame: there must not be any number of them."""
    taps, block = facts.get("taps"), facts.get("block", 0)
    filters = None if taps is None else (tuple(taps[0]), tuple(taps[1]))
    if filters is not None and filters not in _known_taps():
        raise InvalidAdapter("the filters of a stored wavelet are none of those that are known", field="taps")
    if type(block) is not int or not 0 <= block <= _LARGEST_BLOCK:
        raise InvalidAdapter("the blocks of a stored frame have no such size", field="block")
    return Frame(FrameKind(facts["kind"]), block=block, taps=filters)


@functools.cache
def _known_taps() -> frozenset[Any]:
    return frozenset(wavelet_frame(name).taps for name in WAVELETS)


def _fits(term: Term, shape: tuple[int, int]) -> bool:
    """Whether the core lies between these two frames on a layer of `shape` (p, q)."""
    (p, q), (m_out, m_in) = shape, term.core.shape
    gain = term.gain
    if gain is not None and (
        gain.dtype != torch.float32 or tuple(gain.shape) != (p,) or not bool(gain.isfinite().all())
    ):
        return False
    if isinstance(term.core, CirculantCore) and term.core.kernel.shape[2] != term.analysis.block:
        return False
    if term.analysis.kind is FrameKind.WEIGHT:
        q = p
    return frame_fits(term.analysis, q, m_in) and frame_fits(term.synthesis, p, m_out)


def frame_fits(frame: Frame, size: int, coefficients: int) -> bool:
    """Whether the frame has so many coefficients on a layer of `size`."""
    if frame.shared is not None:
        rows, columns = frame.shared.matrix.shape
        return coefficients <= rows and size <= columns
    if frame.block and size % frame.block:
        return False
    expected = size if frame.kind is FrameKind.WEIGHT else frame.coefficients(size)
    return coefficients == expected
