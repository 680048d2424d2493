"""Object storage behind the packs: any URL that obstore knows, with credentials from the environment as it finds them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from overtone.adapters.packs.ledger import Stored
from overtone.errors import ConfigError, StoreFailed

_log = logging.getLogger(__name__)

_RETRIES = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}
"""Of one request, against what passes quickly. obstore's own defaults would keep a reader for three minutes."""
_IN_PROCESS = ("file:", "memory:")
_PART_BYTES, _PARTS = 8 << 20, 2
"""Of an upload: what is in memory at once."""


class Remote:
    """Objects by name below one URL. Thread-safe. Every method raises `StoreFailed`, to be tried again, if it cannot."""

    def __init__(self, url: str) -> None:
        """Asks nothing of the other side yet. Raises `ConfigError` for a URL that obstore does not take, or without it."""
        try:
            self._obstore: Any = importlib.import_module("obstore")
            stores: Any = importlib.import_module("obstore.store")
            self._errors = (importlib.import_module("obstore.exceptions").BaseError, OSError, ValueError)
        except ImportError as error:
            message = "object storage needs obstore: pip install 'overtone[remote]'"
            raise ConfigError(message, field="remote") from error
        options: dict[str, Any] = {"mkdir": True} if url.startswith("file:") else {}
        if not url.startswith(_IN_PROCESS):
            options["retry_config"] = _RETRIES
        try:
            self._store = stores.from_url(url, **options)
        except self._errors as error:
            raise ConfigError(f"{url!r} is no object storage: {_first_line(error)}", field="remote") from error

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            # The whole text names hosts and paths: for the operator, not for the client.
            _log.warning("cannot %s: %s", what, _first_line(error))
            message = f"cannot {what}: object storage answers {type(error).__name__}"
            raise StoreFailed(message, retry_after_s=1.0, metadata={"operation": what}) from error

    def put(self, name: str, chunks: Iterable[bytes]) -> Stored:
        """Writes an object whole or not at all; an exception of `chunks` that is not the disk's comes out as it is."""
        with self._asking("upload adapters"):
            self._obstore.put(self._store, name, chunks, chunk_size=_PART_BYTES, max_concurrency=_PARTS)
        stored = self.head(name)
        if stored is None:
            raise StoreFailed("cannot upload adapters: the object is gone again", retry_after_s=1.0)
        return stored

    def get(self, name: str, offset: int, length: int) -> bytes | None:
        """`length` bytes from byte `offset` on, fewer where the object ends; None if there is no such object."""
        if not length:
            return b""
        with self._asking("read an adapter from object storage"), suppress(FileNotFoundError):
            return bytes(self._obstore.get_range(self._store, name, start=offset, length=length))
        return None

    def head(self, name: str) -> Stored | None:
        """None if there is no such object, and on some sides also if there is no such bucket."""
        with self._asking("look for adapters in object storage"), suppress(FileNotFoundError):
            meta = self._obstore.head(self._store, name)
            return Stored(int(meta["size"]), str(meta["e_tag"] or ""))
        return None

    def delete(self, name: str) -> None:
        """Whether or not it is there."""
        with self._asking("delete adapters from object storage"), suppress(FileNotFoundError):
            self._obstore.delete(self._store, name)

    def names(self, folder: str) -> Iterator[str]:
        """Of all objects below `folder`/."""
        with self._asking("list adapters in object storage"):
            for batch in self._obstore.list(self._store, folder, chunk_size=1000):
                for meta in batch:
                    yield str(meta["path"])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
