"""Receiving an adapter's files in pieces, within limits: small ones in memory, large ones in a scratch folder that vanishes
with the upload."""

from __future__ import annotations

import shutil
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from overtone.adapters.failures import operation
from overtone.adapters.files import CONFIG_FILES, MAX_CONFIG_BYTES, AdapterFiles, check_file_name, layout_of
from overtone.errors import InvalidRequest, TooLarge

IN_MEMORY_BYTES = 4 << 20
"""What an upload keeps in memory before it goes to the disk."""


class Upload:
    """One adapter on its way in. Thread-safe: an abort may overtake a write. As a context manager it aborts unless it was
    committed."""

    def __init__(self, tmp: Path, max_bytes: int, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        self._folder = tmp / f"upload-{uuid.uuid4().hex}"
        self._max_bytes, self._in_memory_bytes = max_bytes, in_memory_bytes
        self._sizes: dict[str, int] = {}
        self._parts: dict[str, bytearray] | None = {}
        self._open = True
        self._lock = threading.RLock()

    def quick(self, size: int) -> bool:
        """Whether so many more bytes stay in memory: then nothing here waits for the disk."""
        return self._parts is not None and sum(self._sizes.values()) + size <= self._in_memory_bytes

    def write(self, file_name: str, data: bytes) -> None:
        """Appends `data` to a file. The chunks of a file follow each other; nothing is kept of a chunk that is refused."""
        with self._lock:
            self._check_open()
            size = self._checked_size(file_name, data)
            if self._parts is not None and not self.quick(len(data)):
                self._spill(self._parts)
            if self._parts is not None:
                self._parts.setdefault(file_name, bytearray()).extend(data)
            else:
                self._append(file_name, data, size - len(data))
            self._sizes[file_name] = size

    def _checked_size(self, file_name: str, data: bytes) -> int:
        """Of the file with this chunk."""
        check_file_name(file_name)
        if file_name in self._sizes and file_name != list(self._sizes)[-1]:
            raise InvalidRequest(f"the chunks of {file_name} must follow each other", field="file_name")
        size = self._sizes.get(file_name, 0) + len(data)
        total = sum(self._sizes.values()) + len(data)
        if file_name in CONFIG_FILES and size > MAX_CONFIG_BYTES:
            raise TooLarge(f"{file_name} is larger than {MAX_CONFIG_BYTES} bytes", field=file_name)
        if total > self._max_bytes:
            raise TooLarge(f"the adapter is larger than the {self._max_bytes} bytes allowed", field=file_name)
        return size

    def _spill(self, parts: dict[str, bytearray]) -> None:
        """From now on all of it is on the disk."""
        with operation("receive an upload"):
            self._folder.mkdir(exist_ok=True)
            for name, data in parts.items():
                (self._folder / name).write_bytes(data)
        self._parts = None

    def _append(self, file_name: str, data: bytes, end: int) -> None:
        with operation("receive an upload"), (self._folder / file_name).open("ab") as file:
            file.truncate(end)  # of a chunk that came half
            file.write(data)

    def read(self) -> AdapterFiles:
        """Both files. Raises `InvalidAdapter` if one did not come."""
        with self._lock, operation("read an upload"):
            self._check_open()
            layout = layout_of(self._sizes)
            config, weights = (self._read(name) for name in (layout.config, layout.weights))
            return AdapterFiles(config, weights, layout)

    def _read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes() if self._parts is None else bytes(self._parts[name])

    def abort(self) -> None:
        """Forgets everything received. Also the end of a committed upload; a second call does nothing."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            if self._parts is None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._parts = None

    def _check_open(self) -> None:
        if not self._open:
            raise InvalidRequest("this upload has ended", field="upload")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
