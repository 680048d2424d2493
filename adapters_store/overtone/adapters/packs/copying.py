"""A copy of all blobs in another folder, from the disk or, where they are not, from object storage."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from overtone.adapters.packs import disk
from overtone.adapters.packs.farther import Farther
from overtone.adapters.packs.index import PackFacts
from overtone.adapters.packs.local import sound
from overtone.adapters.packs.parts import Parts
from overtone.adapters.packs.place import Place
from overtone.adapters.packs.problem import Progress

_log = logging.getLogger(__name__)
_CHUNK = 4 << 20
_PAGE = 1000


class Copier:
    """Nothing is removed meanwhile: its caller sees to that. What is lost is left out, with a line in the log."""

    def __init__(self, parts: Parts, farther: Farther | None) -> None:
        self._parts, self._farther = parts, farther

    def copy(self, root: Path, progress: Progress) -> None:
        """All that the index knows, durably, into a folder like `StoreFolder.root`. progress counts bytes. Raises
        `StoreFailed` where object storage does not answer, and OSError."""
        packs = self._parts.index.packs()
        done, total = 0, sum(facts.end for facts in packs)
        (root / "packs").mkdir()
        for facts in packs:
            self._write(root / "packs" / self._parts.folder.pack(facts.number).name, self._pack(facts))
            done += facts.end
            progress(done, total)
        disk.sync_folder(root / "packs")
        for digest, place in self._own_files():
            blob = self._own_file(digest, place)
            if blob is None:
                _log.error("the copy lacks %s, which is missing: see `overtone store fsck`", digest)
                continue
            target = root / self._parts.folder.own(digest).relative_to(self._parts.folder.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._write(target, iter([blob]))
            done, total = done + len(blob), total + len(blob)
            progress(done, total)
        if (root / "blobs").exists():
            for folder in (root / "blobs").rglob("*"):
                if folder.is_dir():
                    disk.sync_folder(folder)
            disk.sync_folder(root / "blobs")

    def _own_files(self) -> Iterator[tuple[str, Place]]:
        after = ""
        while page := self._parts.index.own_files(after, _PAGE):
            yield from page
            after = page[-1][0]

    def _pack(self, facts: PackFacts) -> Iterator[bytes]:
        try:
            handle = disk.open_read(self._parts.folder.pack(facts.number))
        except FileNotFoundError:
            handle = -1
        if handle >= 0:
            try:
                for offset in range(0, facts.end, _CHUNK):
                    yield disk.pread(handle, min(_CHUNK, facts.end - offset), offset)
            finally:
                disk.close(handle)
            return
        for offset in range(0, facts.end if facts.live_count else 0, _CHUNK):
            chunk = None
            if self._farther is not None:
                chunk = self._farther.part(facts.number, offset, min(_CHUNK, facts.end - offset))
            if chunk is None:
                _log.error("the copy lacks pack %d, which is missing: see `overtone store fsck`", facts.number)
                return
            yield chunk

    def _own_file(self, digest: str, place: Place) -> bytes | None:
        blob = self._parts.own.read(digest)
        if not sound(digest, blob) and self._farther is not None:
            fetched = self._farther.get(digest, place)
            return fetched if sound(digest, fetched) else blob
        return blob

    def _write(self, path: Path, chunks: Iterator[bytes]) -> None:
        handle = disk.create(path)
        try:
            end = 0
            for chunk in chunks:
                disk.write_all(handle, [chunk], end)
                end += len(chunk)
            disk.sync(handle)
        finally:
            disk.close(handle)
