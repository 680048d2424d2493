"""From an adapter's files to what the store writes: by a recipe where one is known, with every check where none is."""

from __future__ import annotations

from dataclasses import replace

from overtone.adapters.archive import unarchive
from overtone.adapters.base import BaseDescription
from overtone.adapters.canonical import Known, Sparse
from overtone.adapters.catalogue import Entry, Options
from overtone.adapters.families import ParserContext
from overtone.adapters.files import ARCHIVED_LAYOUT, AdapterFiles
from overtone.adapters.memo import Memo, memo_budget
from overtone.adapters.projectors import Projectors
from overtone.adapters.recipes import Admitted, Recipes
from overtone.adapters.records import StoreConfig, Version, check_id, check_labels, check_tenant
from overtone.adapters.resident import shared_nbytes
from overtone.errors import AdapterMemoryFull


class Admission:
    """Of adapters for one base model. Thread-safe. known: where decoding finds layouts and locations, too."""

    def __init__(self, config: StoreConfig, base: BaseDescription, projectors: Projectors, known: Known) -> None:
        self._memo = Memo(memo_budget(config.memory_bytes))
        context = ParserContext(base, memo=self._memo, projectors=projectors, max_numbers=config.max_upload_bytes // 4)
        self._base, self._projectors = base, projectors
        self._recipes = Recipes(context, known, strict_base=config.strict_base)

    @property
    def memo_bytes(self) -> int:
        """Of what adapters of one kind share and only the first one computes."""
        return self._memo.nbytes + self._recipes.nbytes

    def admit(self, files: AdapterFiles) -> Admitted:
        """A checked adapter. Raises what `parse_adapter` raises."""
        if files.layout == ARCHIVED_LAYOUT:
            return unarchive(files, self._base, self._projectors)
        return self._recipes.admit(files) or self._recipes.learn(files)


def checked_entry(adapter_id: str, admitted: Admitted, options: Options, memory_bytes: int) -> Entry:
    """What the catalogue is told. memory_bytes: for all adapters.

    Raises `InvalidRequest` for an id, label or tenant that is none, `AdapterMemoryFull` for what could never be in memory.
    """
    check_id(adapter_id)
    labels = None if options.labels is None else check_labels(options.labels)
    check_tenant(options.tenant or "")
    contents = admitted.contents
    shared = shared_nbytes(contents.packed if isinstance(contents, Sparse) else contents)
    if admitted.resident_bytes + shared > memory_bytes:
        message = f"the adapter needs {admitted.resident_bytes} bytes in memory and {shared} that it may share"
        raise AdapterMemoryFull(f"{message}: that never fits the {memory_bytes} for adapters")
    encoded = admitted.encoded
    version = Version(
        digest=encoded.digest,
        kind=admitted.kind,
        size_bytes=len(encoded.blob),
        resident_bytes=admitted.resident_bytes,
        shared=tuple(encoded.shared),
    )
    return Entry(adapter_id, version, replace(options, labels=labels))
