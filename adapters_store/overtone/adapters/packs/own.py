"""Blobs that are files of their own: the large ones, and all of them in older stores."""

from __future__ import annotations

import logging
import re
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from overtone.adapters.failures import operation
from overtone.adapters.packs import disk
from overtone.adapters.packs.folder import StoreFolder, digest_of
from overtone.adapters.packs.index import BlobIndex
from overtone.adapters.packs.place import OWN_FILE, Place
from overtone.errors import OvertoneError

_log = logging.getLogger(__name__)
_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")


class OwnFiles:
    """Written whole or not at all. Thread-safe.

    A file that the index does not know is garbage; an intent in tmp/ names it from before it is written, or from before
    the index forgets it, until it is known or gone. So the next start finds it without listing the others.
    """

    def __init__(self, folder: StoreFolder, index: BlobIndex) -> None:
        self._folder, self._index = folder, index
        self._changing = threading.Lock()
        """Held while a name changes its meaning, so that a blob written anew is not taken for the broken one before."""
        self._claims: Counter[str] = Counter()

    def recover(self) -> None:
        """Removes what an interrupted process wrote or meant to remove."""
        for digest in self._folder.intents():
            if _NAME.fullmatch(f"{digest}.safetensors") and not self._known(digest):
                disk.unlink(self._folder.own(digest))

    def _known(self, digest: str) -> bool:
        place = self._index.place_of(digest)
        return place is not None and place.pack == OWN_FILE

    @contextmanager
    def written(self, blobs: Mapping[str, bytes]) -> Iterator[dict[str, Place]]:
        """Durable inside; afterwards those that the index did not come to know are removed."""
        if not blobs:
            yield {}
            return
        with self._claimed(list(blobs)):
            with operation("write an adapter"):
                for digest, blob in blobs.items():
                    self.write(digest, blob)
            yield {digest: Place(OWN_FILE, 0, len(blob)) for digest, blob in blobs.items()}

    @contextmanager
    def _claimed(self, digests: Sequence[str]) -> Iterator[None]:
        with self._changing:
            self._claims.update(digests)
        intent = None
        try:
            with operation("write an adapter"):
                intent = self._folder.write_intent(digests)
            yield
        finally:
            with self._changing:
                self._claims -= Counter(digests)
            if intent is not None:
                self.settle(digests, intent)

    def settle(self, digests: Sequence[str], intent: Path) -> None:
        """Removes those that the index does not know; what cannot be removed is left to the next start."""
        try:
            with operation("remove an adapter"):
                # A power cut must not bring a file back without the intent that names it.
                for folder in {self._folder.own(digest).parent for digest in digests if self.remove_unknown(digest)}:
                    disk.sync_folder(folder)
                disk.unlink(intent)
        except OvertoneError as error:
            _log.warning("files of removed adapters are left for the next start: %s", error)

    def remove_unknown(self, digest: str) -> bool:
        """Unlinks the file if there is one that neither the index nor a write under way knows; whether it did."""
        path = self._folder.own(digest)
        with self._changing:
            unknown = path.exists() and not self._claims[digest] and not self._known(digest)
            if unknown:
                disk.unlink(path)
            return unknown

    def needed(self, digest: str) -> bool:
        """Whether the index or a write under way knows the file."""
        # A write ends only after the index knows.
        return self._claims[digest] > 0 or self._known(digest)

    def write(self, digest: str, blob: bytes) -> None:
        """Durable on return. Overwrites: what is there already may be broken."""
        target, scratch = self._folder.own(digest), self._folder.scratch()
        try:
            disk.write_file(scratch, blob)
            if not target.parent.exists():
                target.parent.mkdir(exist_ok=True)
                disk.sync_folder(self._folder.blobs)
            with self._changing:
                disk.replace(scratch, target)
        except OSError:
            disk.unlink(scratch)
            raise
        disk.sync_folder(target.parent)

    def read(self, digest: str) -> bytes | None:
        """What the file holds, None if there is none."""
        try:
            return disk.read_file(self._folder.own(digest))
        except FileNotFoundError:
            return None

    def set_aside(self, digest: str) -> bytes | None:
        """Moves a broken file to quarantine/; the blob if it was written anew meanwhile."""
        path = self._folder.own(digest)
        with self._changing, operation("set a broken adapter aside"):
            blob = self.read(digest)
            if blob is not None and digest_of(blob) != digest:
                disk.replace(path, self._folder.quarantine / f"{digest}.{uuid.uuid4().hex}")
                return None
            return blob

    def remove(self, digest: str) -> None:
        """Of a blob that is safely elsewhere, unless it is being written."""
        with self._changing:
            if not self._claims[digest]:
                disk.unlink(self._folder.own(digest))

    def files(self, begin: str = "") -> Iterator[tuple[Path, str | None]]:
        """Every file below the folder, with its digest if it has the name of a blob at its place.

        begin: of the names of the folders below the folder, "" for all.
        """
        for group in self._folder.blobs.glob(f"{begin}*"):
            for path in group.rglob("*") if group.is_dir() else [group]:
                if not path.is_dir():
                    match = _NAME.fullmatch(path.name)
                    ours = match is not None and path == self._folder.own(match[1])
                    yield path, match[1] if match and ours else None
