"""The catalogue as a few dictionaries: what it must do, without saying how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from overtone.adapters.catalogue import Entry, Options
from overtone.adapters.packs import OWN_FILE, Place
from overtone.adapters.records import Version


@dataclass
class ModelAdapter:
    """versions: newest first."""

    current: str
    versions: list[str]
    pinned: bool
    labels: dict[str, str]
    tenant: str
    previous: str | None = None
    used: int = 0
    revision: int = 1


@dataclass
class Model:
    """adapters: in the order in which they were created; places: of all blobs that are known; contents: of all versions
    that are."""

    adapters: dict[str, ModelAdapter] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    contents: dict[str, Version] = field(default_factory=dict)
    quarantined: set[str] = field(default_factory=set)
    ends: dict[int, int] = field(default_factory=dict)

    def lacks(self, entries: Sequence[Entry], places: Mapping[str, Place]) -> bool:
        """Whether something that would be recorded has no place."""
        ids, needed = set(self.adapters), set()
        for entry in entries:
            if not (entry.options.create_only and entry.adapter_id in ids):
                needed |= {entry.version.digest, *entry.version.shared}
            ids.add(entry.adapter_id)
        return not needed <= self.places.keys() | places.keys()

    def put_many(self, entries: Sequence[Entry], places: Mapping[str, Place]) -> list[str]:
        before = set(self.adapters)
        outcomes = [self._put(entry, places) for entry in entries]
        tenants = {entry.adapter_id: entry.options.tenant or "" for entry in reversed(entries)}
        new = sorted((tenants[one], one) for one in self.adapters.keys() - before)
        for _, adapter_id in new:
            self.adapters[adapter_id] = self.adapters.pop(adapter_id)
        return outcomes

    def _put(self, entry: Entry, places: Mapping[str, Place]) -> str:
        digest, old, options = entry.version.digest, self.adapters.get(entry.adapter_id), entry.options
        if old is not None and options.create_only:
            return "exists"
        if digest not in self.contents:
            self.contents[digest] = entry.version
        for name in (digest, *entry.version.shared):
            self.quarantined.discard(name)
            if name in places:
                self.set_place(name, places[name])
        if old is None:
            labels = dict(options.labels or {})
            self.adapters[entry.adapter_id] = ModelAdapter(
                digest, [digest], bool(options.pinned), labels, options.tenant or ""
            )
            return "created"
        return "updated" if self.change(entry.adapter_id, options, digest) else "unchanged"

    def set_place(self, digest: str, place: Place) -> None:
        self.places[digest] = place
        if place.pack != OWN_FILE:
            self.ends[place.pack] = max(place.end, self.ends.get(place.pack, 0))

    def change(self, adapter_id: str, options: Options, digest: str | None = None) -> bool:
        old = self.adapters[adapter_id]
        before = (old.current, old.pinned, old.labels, old.tenant)
        if digest is not None and digest != old.current:
            old.versions = [digest, *(one for one in old.versions if one != digest)]
            old.previous, old.current = old.current, digest
        old.pinned = old.pinned if options.pinned is None else options.pinned
        old.labels = old.labels if options.labels is None else dict(options.labels)
        old.tenant = old.tenant if options.tenant is None else options.tenant
        changed = before != (old.current, old.pinned, old.labels, old.tenant)
        old.revision += changed
        return changed

    def activate(self, adapter_id: str, digest: str) -> None:
        old = self.adapters[adapter_id]
        if digest != old.current:
            old.previous, old.current = old.current, digest
            old.revision += 1

    def prune(self, adapter_id: str, keep: int) -> list[str]:
        old = self.adapters[adapter_id]
        gone = [digest for digest in old.versions[keep:] if digest != old.current]
        old.versions = [digest for digest in old.versions if digest not in gone]
        old.previous = None if old.previous in gone else old.previous
        return self.unused(gone)

    def delete(self, adapter_id: str) -> list[str]:
        return self.unused(self.adapters.pop(adapter_id).versions)

    def unused(self, digests: Sequence[str]) -> list[str]:
        used = {digest for adapter in self.adapters.values() for digest in adapter.versions}
        return [digest for digest in digests if digest not in used]

    def release(self, digests: Sequence[str]) -> dict[str, Place]:
        gone = {digest for digest in self.unused(digests) if digest in self.contents}
        shared = {one for digest in gone for one in self.contents.pop(digest).shared}
        gone |= shared - {one for version in self.contents.values() for one in version.shared}
        self.quarantined -= gone
        return {digest: self.places.pop(digest) for digest in gone}
