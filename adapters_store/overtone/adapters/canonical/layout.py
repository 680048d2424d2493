"""The layout of an adapter: everything about it but its numbers and where its sparse cores are not zero.

A layout is a file of facts alone. Of each module it says the shape and the terms, as `overtone.adapters.terms.facts_of` has
them; of each term also which slice of which vector its numbers are, `"parts": {name: [dtype, offset, shape]}`, and of a
sparse core which slice of the locations is its pattern, `"pattern": [offset, count]`. Adapters of one recipe
have one layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from overtone.adapters.base import BaseDescription
from overtone.adapters.canonical.file import FORMAT, read_file
from overtone.adapters.canonical.packed import packed_layout
from overtone.adapters.canonical.places import Spans, make_spans
from overtone.adapters.canonical.spans import natural, shape_of, span_of, tile
from overtone.adapters.files import MAX_CONFIG_BYTES
from overtone.adapters.terms import check_facts
from overtone.errors import BaseModelMismatch, InvalidAdapter
from overtone.kernels import PackedLayout

DTYPES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The name of a vector of numbers, as facts say it, and its dtype, as safetensors do."""

_LONGEST_TEXT = MAX_CONFIG_BYTES
"""As long as a configuration may be, from which it came."""
_BYTES_PACKED, _BYTES_OF_FACTS = 3, 7
"""What a byte of a layout takes in memory, as Python's objects."""

NO_FACTS = (KeyError, TypeError, ValueError, AttributeError, AssertionError, RecursionError, ArithmeticError)
"""What facts raise that are none."""

Terms = tuple[Mapping[str, Any], ...]


class About(NamedTuple):
    """What a layout, or an adapter of an older format, says of itself."""

    family: str
    base_fingerprint: str
    base_model_name_or_path: str
    parameter_count: int
    basis: str


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A layout that was checked against one base model.

    base: that model; numbers: vector -> how many numbers it has; places: the patterns of its sparse cores. An adapter all of
    whose cores are sparse, lie between frames that need no matrix, and have patterns that all have a key or none, is
    `packed` for the kernels and has been checked wholly; keyed: whether they have. For any other one, `modules` has the
    facts of the terms, which are checked with the numbers.
    """

    digest: str
    base: BaseDescription
    family: str
    numbers: Mapping[str, int]
    places: Spans
    packed: PackedLayout | None
    keyed: bool
    modules: Mapping[str, Terms]
    nbytes: int


def read_layout(blob: bytes, digest: str, base: BaseDescription) -> Layout:
    """Raises `InvalidAdapter` if it is malformed and `BaseModelMismatch` if it does not fit `base`."""
    facts = read_file(blob).facts
    try:
        if facts["format"] != FORMAT:
            raise InvalidAdapter(f"the stored layout has format {facts['format']}, not {FORMAT}; upload it again")
        about = about_of(facts)
        check_base(facts, base)
        modules = {name: _terms(name, facts["modules"][name], base) for name in sorted(facts["modules"])}
        terms = [term for some in modules.values() for term in some]
        packed = packed_layout({name: (base.shape_of_any(name), some) for name, some in modules.items()})
        return Layout(
            digest=digest,
            base=base,
            family=about.family,
            numbers=_numbers(terms),
            places=_places(terms),
            packed=packed,
            keyed=packed is not None and "keyed" in terms[0],
            modules={} if packed is not None else modules,
            nbytes=(_BYTES_OF_FACTS if packed is None else _BYTES_PACKED) * len(blob),
        )
    except NO_FACTS as error:
        raise InvalidAdapter("the stored layout lacks what its format demands") from error


def about_of(facts: Mapping[str, Any]) -> About:
    """Raises `InvalidAdapter` for what could not be kept in a catalogue, and KeyError for what is not there."""

    def text(name: str, default: str | None = None) -> str:
        value = facts[name] if default is None else facts.get(name, default)
        if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not _is_unicode(value):
            raise InvalidAdapter(f"{name} of the stored adapter is no short text", field=name)
        return value

    count = facts["parameter_count"]
    if type(count) is not int or not 0 <= count < 2**63:
        raise InvalidAdapter(
            "parameter_count of the stored adapter is no number of parameters", field="parameter_count"
        )
    names = text("family"), text("base_fingerprint"), text("base_model_name_or_path")
    return About(*names, count, text("basis", ""))


def _is_unicode(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def check_base(facts: Mapping[str, Any], base: BaseDescription) -> None:
    """Raises `BaseModelMismatch` for what was stored for another base model."""
    if facts["base_fingerprint"] not in ("", base.fingerprint):
        raise BaseModelMismatch(
            "the stored adapter was checked against another base model than the one served; upload it again",
            field="base_fingerprint",
        )


def check_shape(module: str, facts: Mapping[str, Any], base: BaseDescription) -> tuple[int, int]:
    """(p, q) of the module. Raises `BaseModelMismatch` unless the facts say the same."""
    shape = base.shape_of_any(module)
    if facts["shape"] != list(shape):
        message = f"{module} is {facts['shape']} in the stored adapter and {list(shape)} in the base model"
        raise BaseModelMismatch(message, field=module)
    return shape


def _terms(module: str, facts: Mapping[str, Any], base: BaseDescription) -> Terms:
    check_shape(module, facts, base)
    terms = tuple(facts["terms"])
    check_facts(module, terms, embedding=module in base.embeddings)
    return terms


def _numbers(terms: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Every number of every vector is some part's, and parts are the same numbers or have none in common."""
    spans: dict[str, set[tuple[int, int]]] = {}
    for term in terms:
        for dtype, offset, shape in term["parts"].values():
            count = math.prod(natural(size) for size in shape)
            spans.setdefault(dtype, set()).add(span_of(offset, count))
    if not spans.keys() <= DTYPES.keys():
        raise ValueError("a vector has no such dtype")
    return {dtype: tile(found) for dtype, found in spans.items()}


def _places(terms: Iterable[Mapping[str, Any]]) -> Spans:
    sparse = [term for term in terms if term["core"] == "sparse"]
    return make_spans([(span_of(*term["pattern"]), shape_of(term["shape"])) for term in sparse])
