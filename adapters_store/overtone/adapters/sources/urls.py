"""Archives behind http and https, and archives or prefixes of object storage (with the package obstore)."""

from __future__ import annotations

import errno
import http.client
import io
import sys
import urllib.error
import urllib.request
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from typing import Any

from overtone.adapters.files import CONFIG_FILES, MAX_CONFIG_BYTES, AdapterFiles
from overtone.adapters.sources.archive import open_archive
from overtone.adapters.sources.entry import Entry, Source, layout_among, mark_of, refusal
from overtone.adapters.sources.gather import Gather, Part, split
from overtone.adapters.text import shown
from overtone.errors import InvalidRequest, PathRefused, StoreFailed, TooLarge

_SILENCE_S = 60.0


def open_url(url: str, max_bytes: int) -> Source:
    """An archive at an http or https URL. Raises `StoreFailed` if it is not there."""
    try:
        response = _opener().open(url, timeout=_SILENCE_S)
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise StoreFailed(f"cannot read {shown(url)}: {error}", metadata={"operation": "open a URL"}) from error
    length = response.headers.get("Content-Length", "")
    file = io.BufferedReader(_Body(response))
    return open_archive(file, max_bytes, total=int(length) if length.isdecimal() else None)


class _Body(io.RawIOBase):
    """What a server sends, as a file."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            count = self._response.readinto(buffer)
        except http.client.HTTPException as error:
            raise OSError(errno.EIO, f"the server's answer is broken: {error!r}") from error
        if not count and len(buffer) and self._response.length:  # it would pass for the end
            raise OSError(errno.EIO, f"the server's answer ends {self._response.length} bytes too early")
        return count

    def close(self) -> None:
        super().close()
        self._response.close()


def _opener() -> urllib.request.OpenerDirector:
    """Only http and https, wherever redirections lead."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def open_objects(url: str, max_bytes: int) -> Source:
    """An archive in object storage, or the adapters below a prefix, which ends in "/". Credentials come from the
    environment, as obstore finds them."""
    try:
        import obstore
        from obstore.store import from_url
    except ImportError as error:
        message = f"reading {shown(url)} needs the package obstore: pip install 'overtone[remote]'"
        raise InvalidRequest(message, field="source") from error
    try:
        if url.endswith("/"):
            store = from_url(url)
            return Source(_listed(obstore, store, obstore.list(store), max_bytes))
        parent, _, name = url.rpartition("/")
        found = obstore.get(from_url(parent), name)
        file = io.BufferedReader(_Chunks(iter(found.stream())))
        return open_archive(file, max_bytes, total=found.meta["size"])
    except Exception as error:  # obstore has its own tree for each service
        if isinstance(error, InvalidRequest):
            raise
        raise _failed(url, error) from error


class _Chunks(io.RawIOBase):
    """A download as a file."""

    def __init__(self, chunks: Iterator[Any]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            try:
                self._rest = memoryview(bytes(next(self._chunks)))
            except StopIteration:
                return 0
            except Exception as error:
                raise _failed("the archive", error) from error
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _listed(obstore: Any, store: Any, pages: Iterable[Any], max_bytes: int) -> Generator[Entry, None, None]:
    """Objects come by their paths: those of a folder follow each other. They are read when their entry is."""
    gather = Gather[str](sys.maxsize)  # nothing is held of their contents
    read = partial(_read, obstore, store, max_bytes)
    try:
        for meta in (meta for page in pages for meta in page):
            try:
                found = split(meta["path"])
            except PathRefused as error:
                yield refusal(shown(meta["path"]), error)
                continue
            if found is not None:
                part = Part(meta["size"], int(meta["last_modified"].timestamp()), meta["path"])
                for group in gather.add(*found, part):
                    yield _entry(*group, read)
    except Exception as error:
        raise _failed("the listing", error) from error
    for group in gather.rest():
        yield _entry(*group, read)


def _entry(folder: str, files: dict[str, Part[str]], read: Any) -> Entry:
    def content() -> AdapterFiles:
        layout = layout_among(files)
        config, weights = (read(files[name].content, name) for name in (layout.config, layout.weights))
        return AdapterFiles(config, weights, layout)

    return Entry(folder, mark_of(folder, {name: (part.size, part.time) for name, part in files.items()}), content)


def _read(obstore: Any, store: Any, max_bytes: int, path: str, name: str) -> bytes:
    limit = min(MAX_CONFIG_BYTES, max_bytes) if name in CONFIG_FILES else max_bytes
    try:
        found = obstore.get(store, path)
        size = found.meta["size"]
        if size <= limit:
            return bytes(found.bytes())
    except Exception as error:
        raise _failed(name, error) from error
    raise TooLarge(f"{name} is larger than the {limit} bytes allowed", field=name)


def _failed(what: str, error: Exception) -> StoreFailed:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return StoreFailed(f"cannot read {shown(what)}: {shown(first)}", metadata={"operation": "read object storage"})
