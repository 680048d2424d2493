"""The fast admission of adapters that are made like one seen before, with the same configuration and header of weights.

All that these decide is decided once, by `parse_adapter` and `encode` for the first of them. Of any other one only the
numbers are looked at, those of all modules together, and its blobs are the same to the last byte. Where anything is odd the
fast way gives nothing, and the slow one says what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from overtone.adapters.canonical.decode import read_numbers
from overtone.adapters.canonical.encode import Encoded, encode
from overtone.adapters.canonical.file import read_file
from overtone.adapters.canonical.known import Known
from overtone.adapters.canonical.stored import Sparse
from overtone.adapters.families import FAMILIES, ParsedAdapter, ParserContext, parse_adapter
from overtone.adapters.families.config import check_config, read_config
from overtone.adapters.families.tensors import PREFIX
from overtone.adapters.files import AdapterFiles
from overtone.adapters.memo import Memo
from overtone.adapters.recipes.columns import entries_of, header_of
from overtone.adapters.recipes.drawn import fourierft, waveft
from overtone.adapters.recipes.located import loca, sdctft
from overtone.adapters.recipes.plan import Planner, Source
from overtone.adapters.recipes.recipe import Recipe
from overtone.adapters.records import Kind
from overtone.adapters.resident import resident_nbytes
from overtone.kernels import Delta

__all__ = ["Admitted", "Recipes", "kind_of"]

_PLANNERS: Mapping[str, Callable[[Source], Planner]] = {
    "loca": loca,
    "sdctft": sdctft,
    "fourierft": fourierft,
    "waveft": waveft,
}
_RECIPE_BYTES = _PLAN_BYTES = 64 << 20
_LAYOUT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Admitted:
    """A checked adapter as the store keeps it and as it is applied. resident_bytes: what it will take in memory."""

    encoded: Encoded
    kind: Kind
    resident_bytes: int
    contents: Sparse | Mapping[str, Delta]


@dataclass(frozen=True, slots=True)
class _Learned:
    """length: of the weights' file."""

    kind: Kind
    recipe: Recipe
    length: int
    nbytes: int


class Recipes:
    """Of adapters for one base model. Thread-safe. known: where decoding finds layouts and locations, too."""

    def __init__(self, context: ParserContext, known: Known, *, strict_base: bool = False) -> None:
        self._context, self._known, self._strict = context, known, strict_base
        self._learned, self._plans, self._layouts = Memo(_RECIPE_BYTES), Memo(_PLAN_BYTES), Memo(_LAYOUT_BYTES)

    @property
    def nbytes(self) -> int:
        """Of what it has learned."""
        return self._learned.nbytes + self._plans.nbytes + self._layouts.nbytes

    def admit(self, files: AdapterFiles) -> Admitted | None:
        """What `learn` returns for these files, if it has learned how; None if not, or if they may be refused."""
        found = self._learned.find(_key(files))
        if found is None:
            return None
        learned: _Learned = found[0]
        admitted = learned.recipe.admit(files.weights) if len(files.weights) == learned.length else None
        if admitted is None:
            return None
        encoded, contents = admitted
        return Admitted(encoded, learned.kind, contents.nbytes, contents)

    def learn(self, files: AdapterFiles) -> Admitted:
        """Parses, checks and encodes an adapter, bound to the base that it was checked against whatever it says itself, and
        learns its recipe if it has one. Raises what `parse_adapter` raises."""
        parsed = parse_adapter(files, self._context, strict_base=self._strict)
        parsed = replace(parsed, base_fingerprint=self._context.base.fingerprint)
        encoded, kind = encode(parsed), kind_of(parsed)
        recipe = self._recipe(files, parsed, encoded)
        if recipe is not None:
            nbytes = recipe.nbytes + len(files.config) + 2 * len(header_of(files.weights))
            self._learned.get(_key(files), lambda: (_Learned(kind, recipe, len(files.weights), nbytes),))
            admitted = self.admit(files)
            if admitted is not None:
                return admitted
        contents = self._contents(parsed, encoded)
        nbytes = contents.nbytes if isinstance(contents, Sparse) else resident_nbytes(contents)
        return Admitted(encoded, kind, nbytes, contents)

    def _contents(self, parsed: ParsedAdapter, encoded: Encoded) -> Sparse | Mapping[str, Delta]:
        """As the blobs would be decoded."""
        file, shared = read_file(encoded.blob), encoded.shared
        name, places = file.facts["layout"], file.facts.get("places")
        layout = self._known.layout(name, self._context.base, lambda: shared[name])
        if layout.packed is None:
            return parsed.deltas
        patterns = self._known.places(places, layout, lambda: shared[places])
        return Sparse(layout, patterns, read_numbers(file, layout)["float32"])

    def _recipe(self, files: AdapterFiles, parsed: ParsedAdapter, encoded: Encoded) -> Recipe | None:
        """None unless the fast way gives the same for this very adapter."""
        make = _PLANNERS.get(parsed.family)
        if make is None:
            return None
        try:
            planner = make(self._source(files, parsed))
        except (KeyError, ValueError):
            return None  # tensors that this family has besides, or of several dtypes
        bare = replace(parsed, deltas={})
        recipe = Recipe(bare, encoded, self._context.base, planner, self._known, self._plans, self._layouts)
        admitted = recipe.admit(files.weights)
        return recipe if admitted is not None and admitted[0].digest == encoded.digest else None

    def _source(self, files: AdapterFiles, parsed: ParsedAdapter) -> Source:
        raw = read_config(files)
        return Source(
            config=check_config(raw, FAMILIES[str(raw["peft_type"])].keys, files.layout.config),
            entries={name.removeprefix(PREFIX): entry for name, entry in entries_of(files.weights).items()},
            modules=sorted(parsed.deltas),
            shapes=[parsed.deltas[name].shape for name in sorted(parsed.deltas)],
            context=self._context,
        )


def _key(files: AdapterFiles) -> tuple[object, ...]:
    return files.layout, files.config, header_of(files.weights)


def kind_of(parsed: ParsedAdapter) -> Kind:
    """What the catalogue keeps of it."""
    return Kind(
        family=parsed.family,
        module_count=len(parsed.deltas),
        parameter_count=parsed.parameter_count,
        base_model_name_or_path=parsed.base_model_name_or_path,
        base_fingerprint=parsed.base_fingerprint,
        warnings=parsed.warnings,
        basis=parsed.basis,
    )
