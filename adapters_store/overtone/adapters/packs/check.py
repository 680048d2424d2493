"""Compares the files with the index, both ways. Reads and writes go on meanwhile; packs are not removed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from overtone.adapters.failures import operation
from overtone.adapters.packs import disk
from overtone.adapters.packs.farther import Farther
from overtone.adapters.packs.index import PackFacts
from overtone.adapters.packs.local import sound
from overtone.adapters.packs.parts import Parts
from overtone.adapters.packs.place import OWN_FILE, Place, header_of
from overtone.adapters.packs.problem import Problem, Progress

_PAGE = 1000
_PACK_NAME = re.compile(r"([0-9]{8,})\.pack")


class Checker:
    def __init__(self, parts: Parts, farther: Farther | None) -> None:
        self._parts, self._farther = parts, farther

    def check(self, deep: bool, repair: bool, progress: Progress) -> list[Problem]:
        """deep: also reads every blob that is on the disk; repair: removes what is only garbage.

        progress counts blobs; own files join the total as they come. Raises `StoreFailed`.
        """
        with self._parts.removing, operation("check the adapter store"):
            found = list(self._in_index(deep, progress))
            found += self._unknown_packs(repair)
            found += self._unknown_files(repair)
            return found

    def _in_index(self, deep: bool, progress: Progress) -> Iterator[Problem]:
        packs = self._parts.index.packs()
        done, total = 0, sum(facts.live_count for facts in packs)
        for facts in packs:
            yield from self._pack(facts, deep)
            done += facts.live_count
            progress(done, total)
        after = ""
        while page := self._parts.index.own_files(after, _PAGE):
            for digest, place in page:
                yield from self._own_file(digest, place, deep)
            after = page[-1][0]
            done, total = done + len(page), total + len(page)
            progress(done, total)

    def _pack(self, facts: PackFacts, deep: bool) -> Iterator[Problem]:
        path = self._parts.folder.pack(facts.number)
        if not path.exists():
            if facts.live_count and (kind := self._farther_lacks(facts)):
                yield kind
            return
        after, end = -1, 0
        while page := self._parts.index.live_in(facts.number, after, _PAGE):
            size = disk.size(path)  # after the page: an active pack grows meanwhile
            for digest, place in page:
                problem = self._record(digest, place, size, end, deep)
                if problem is not None and self._parts.index.place_of(digest) == place:
                    yield problem
                after, end = place.offset, place.end

    def _farther_lacks(self, facts: PackFacts) -> Problem | None:
        if self._parts.ledger.get(facts.number) is None:
            return Problem("missing_pack", "", facts.number, "the file of the pack is missing")
        if self._farther is None or not self._farther.has_pack(facts.number):
            what = "object storage does not have the pack as it was uploaded"
            return Problem("missing_remote", "", facts.number, what)
        return None

    def _record(self, digest: str, place: Place, size: int, free: int, deep: bool) -> Problem | None:
        if place.end > size:
            return Problem("out_of_range", digest, place.pack, f"the record ends at {place.end}, the pack at {size}")
        if place.offset < free:
            return Problem("overlap", digest, place.pack, f"the record at {place.offset} begins inside another")
        if not deep:
            return None
        if self._parts.local.header(place) != header_of(digest, place.length):
            return Problem("bad_header", digest, place.pack, f"the header at {place.offset} is not that of the blob")
        if not sound(digest, self._parts.local.read(digest, place)):
            return Problem("bad_digest", digest, place.pack, "the blob does not match its digest")
        return None

    def _own_file(self, digest: str, place: Place, deep: bool) -> Iterator[Problem]:
        path = self._parts.folder.own(digest)
        problem = None
        try:
            # Older catalogues did not know the length.
            right = disk.size(path) == place.length or not place.length
            if not right or (deep and not sound(digest, self._parts.own.read(digest))):
                problem = Problem("bad_digest", digest, OWN_FILE, "the file does not match its digest")
        except FileNotFoundError:
            if self._farther is None or not self._farther.has(digest, place):
                problem = Problem("missing_file", digest, OWN_FILE, "the file is missing")
        if problem is not None and self._parts.index.place_of(digest) == place:
            yield problem

    def _unknown_packs(self, repair: bool) -> Iterator[Problem]:
        for path in sorted(self._parts.folder.packs.iterdir()):
            match = _PACK_NAME.fullmatch(path.name)
            if match is None:
                yield self._stray(path)
            # Asked in this order: whoever holds a pack tells the index before letting go.
            elif not self._parts.writer.holds(int(match[1])) and not self._is_known(int(match[1])):
                yield Problem("unknown_pack", "", int(match[1]), "nothing refers to the pack")
                if repair:
                    disk.unlink(path)

    def _is_known(self, number: int) -> bool:
        return any(facts.number == number for facts in self._parts.index.packs())

    def _unknown_files(self, repair: bool) -> Iterator[Problem]:
        for path, digest in self._parts.own.files():
            if digest is None:
                yield self._stray(path)
            elif not self._parts.own.needed(digest):
                yield Problem("unreferenced_file", digest, OWN_FILE, "nothing refers to the file")
                if repair:
                    self._parts.own.remove_unknown(digest)

    def _stray(self, path: Path) -> Problem:
        return Problem("stray_file", "", OWN_FILE, f"{path.relative_to(self._parts.folder.root)} is none of ours")
