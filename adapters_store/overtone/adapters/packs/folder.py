"""The folder of a store: its names, the lock of its one writer, what is set aside, and what a crash may leave."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from overtone.adapters.failures import operation
from overtone.adapters.packs import disk
from overtone.errors import ConfigError, StoreCorrupted

_log = logging.getLogger(__name__)


def digest_of(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def corrupted(digest: str, what: str) -> StoreCorrupted:
    """what: "is missing", ..."""
    message = f"the stored content of adapter version {digest[:12]} {what}; upload the adapter again"
    return StoreCorrupted(message, metadata={"digest": digest})


class StoreFolder:
    """`root`/adapters with packs/, blobs/sha256/, tmp/, quarantine/ and the lock, which is held from here to `close`.

    Raises `ConfigError` if another process holds it, `StoreFailed` if the folders cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "adapters"
        self.packs, self.tmp, self.quarantine = (self.root / name for name in ("packs", "tmp", "quarantine"))
        self.blobs = self.root / "blobs" / "sha256"
        with operation("create the adapter store"):
            for folder in (self.packs, self.blobs, self.tmp, self.quarantine):
                folder.mkdir(parents=True, exist_ok=True)
            for folder in (root.absolute().parent, root, self.root, self.blobs.parent):
                disk.sync_folder(folder)
            self._lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError("the adapter store is in use by another process", field="root") from error

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def pack(self, number: int) -> Path:
        return self.packs / f"{number:08}.pack"

    def own(self, digest: str) -> Path:
        return self.blobs / digest[:2] / f"{digest}.safetensors"

    def scratch(self) -> Path:
        return self.tmp / uuid.uuid4().hex

    def set_aside(self, digest: str, where: str, content: bytes) -> None:
        """Keeps a copy of what should have been `digest`, once for each `where`; a disk that refuses loses it."""
        target = self.quarantine / f"{digest}.{where}"
        try:
            with operation("set a broken adapter aside"):
                if not target.exists():
                    disk.replace_file(target, content, self.scratch())
        except Exception as error:  # the reader must hear of the broken adapter, not of this
            _log.warning("no copy of the broken adapter version %s: %s", digest[:12], error)

    def write_intent(self, digests: Iterable[str]) -> Path:
        """Says durably that own files of these digests may be there with nothing that refers to them."""
        path = self.tmp / f"{uuid.uuid4().hex}.intent"
        disk.write_file(path, "\n".join(digests).encode())
        disk.sync_folder(self.tmp)
        return path

    def intents(self) -> Iterator[str]:
        """The digests of all intents that a process left."""
        for path in self.tmp.glob("*.intent"):
            yield from path.read_text("ascii", errors="replace").split()

    def clear_tmp(self) -> None:
        for left in self.tmp.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                disk.unlink(left)
