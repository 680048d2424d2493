"""Contents and places for catalogues, with no bytes behind them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from overtone.adapters.catalogue import Catalogue, Entry, Options
from overtone.adapters.packs import Place
from overtone.adapters.paging import Listing, Order
from overtone.adapters.records import AdapterRecord, Kind, Version

KINDS = (
    Kind("loca", 8, 96, "example/small", "f" * 64),
    Kind("loca", 8, 96, "example/small", "f" * 64, warnings=("it is old",)),
    Kind("lora", 4, 1000, "example/other", "e" * 64, basis="svd"),
)


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def version(name: str, *shared: str, kind: int = 0, size: int = 100) -> Version:
    """The same for the same arguments."""
    return Version(digest(name), KINDS[kind], size, 2 * size, tuple(digest(one) for one in shared))


def entry(adapter_id: str, content: Version, **options: object) -> Entry:
    return Entry(adapter_id, content, Options(**options))  # type: ignore[arg-type]


class Packer:
    """Gives each blob that comes a place of its own, in packs of `per_pack`."""

    def __init__(self, per_pack: int = 4) -> None:
        self._numbers, self._per_pack = count(), per_pack

    def place(self, length: int = 100) -> Place:
        pack, slot = divmod(next(self._numbers), self._per_pack)
        return Place(pack + 1, slot * 1000, length)

    def places(self, *versions: Version) -> dict[str, Place]:
        """For versions and what they share."""
        found = {one.digest: self.place(one.size_bytes) for one in versions}
        return found | {shared: self.place() for one in versions for shared in one.shared}


def digests(versions: Iterable[Version]) -> set[str]:
    return {name for one in versions for name in (one.digest, *one.shared)}


def fill(catalogue: Catalogue, ids: range) -> None:
    """Adapters "a00000", ... in one transaction."""
    versions = [version(f"v{i}", "layout") for i in ids]
    entries = [entry(f"a{i:05}", one, labels={"k": str(i)}) for i, one in zip(ids, versions, strict=True)]
    places = {one.digest: Place(1, 256 * i, 100) for i, one in zip(ids, versions, strict=True)}
    catalogue.put_many(entries, {**places, digest("layout"): Place(1, 256 * ids.stop, 100)})


def all_pages(catalogue: Catalogue, asked: Listing) -> list[AdapterRecord]:
    found: list[AdapterRecord] = []
    while True:
        page = catalogue.page(asked)
        assert len(page.records) <= asked.size
        found += page.records
        if page.next is None:
            return found
        asked = replace(asked, after=page.next)


def in_order(records: Sequence[AdapterRecord], order: Order) -> list[AdapterRecord]:
    """records: in the order in which they were created."""

    def key(numbered: tuple[int, AdapterRecord]) -> tuple[bool, Any, int]:
        value = getattr(numbered[1], order.field)
        return value is not None, value, numbered[0]

    return [record for _, record in sorted(enumerate(records), key=key, reverse=order.descending)]
