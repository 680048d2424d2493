"""Blobs on disk, named by their digest: written whole or not at all, verified at every read."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator, Set
from pathlib import Path

from overtone.adapters.failures import operation
from overtone.errors import ConfigError, StoreCorrupted

_BLOB_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")


def digest_of(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


class BlobFolder:
    """`root`/adapters: blobs/sha256/<aa>/<digest>.safetensors, tmp/, quarantine/ and the lock of the one writer."""

    def __init__(self, root: Path) -> None:
        self.root = root / "adapters"
        self.tmp = self.root / "tmp"
        self._blobs = self.root / "blobs" / "sha256"
        self._quarantine = self.root / "quarantine"
        self._moving = threading.Lock()
        """Held while a name changes its meaning, so that a blob written anew is not taken for the broken one before."""
        with operation("create the adapter store"):
            for folder in (self.tmp, self._blobs, self._quarantine):
                folder.mkdir(parents=True, exist_ok=True)
            for folder in (root.absolute().parent, root, self.root, self._blobs.parent):
                _sync_folder(folder)
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

    def path(self, digest: str) -> Path:
        return self._blobs / digest[:2] / f"{digest}.safetensors"

    def has(self, digest: str) -> bool:
        return self.path(digest).exists()

    def digests(self) -> Iterator[str]:
        """Of all blobs on disk, whether or not anything refers to them."""
        for file in self._blobs.glob("*/*"):
            if match := _BLOB_NAME.fullmatch(file.name):
                yield match[1]

    def recover(self, known: Set[str]) -> None:
        """Removes what an interrupted process left: all of tmp/, and blobs that the catalogue never came to know."""
        with operation("clean the adapter store"):
            for left in self.tmp.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()
            for digest in set(self.digests()) - known:
                self.path(digest).unlink()

    def write(self, digest: str, blob: bytes) -> None:
        """On return the blob survives a power cut. Overwrites: what is there already may be broken."""
        target = self.path(digest)
        scratch = self.tmp / uuid.uuid4().hex
        with operation("write an adapter"):
            try:
                self._write_scratch(scratch, blob)
                if not target.parent.exists():
                    target.parent.mkdir(exist_ok=True)
                    _sync_folder(self._blobs)
                with self._moving:
                    scratch.replace(target)
                _sync_folder(target.parent)
            finally:
                scratch.unlink(missing_ok=True)

    def _write_scratch(self, scratch: Path, blob: bytes) -> None:
        with scratch.open("xb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())

    def read(self, digest: str) -> bytes:
        """The blob. Raises `StoreCorrupted` if it is gone or not what its name says; then it is never served again."""
        path = self.path(digest)
        blob = self._read(path, digest)
        if digest_of(blob) == digest:
            return blob
        with self._moving:
            blob = self._read(path, digest)
            if digest_of(blob) == digest:
                return blob
            with operation("set a broken adapter aside"):
                path.replace(self._quarantine / f"{digest}.{uuid.uuid4().hex}")
        raise self._corrupted(digest, "does not match its digest and was set aside")

    def _read(self, path: Path, digest: str) -> bytes:
        with operation("read an adapter"):
            try:
                return path.read_bytes()
            except FileNotFoundError as error:
                raise self._corrupted(digest, "is missing") from error

    def _corrupted(self, digest: str, what: str) -> StoreCorrupted:
        message = f"the stored content of adapter version {digest[:12]} {what}; upload the adapter again"
        return StoreCorrupted(message, metadata={"digest": digest})

    def remove(self, digest: str) -> None:
        with self._moving, operation("remove an adapter"):
            self.path(digest).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
