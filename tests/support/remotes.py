"""Object storage for tests: in memory, told to fail, and a server that speaks S3."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
from moto.server import ThreadedMotoServer

from overtone.adapters.packs import Remote
from overtone.adapters.packs.ledger import Stored
from overtone.errors import StoreFailed

REGION = "us-east-1"


class FragileRemote(Remote):
    """Says what it was asked for, and fails when it is told to. It outlives the stores that use it."""

    def __init__(self, url: str = "memory:///") -> None:
        super().__init__(url)
        self.down = False
        self.asked: list[str] = []
        self.got_pack = threading.Event()

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.down:
            raise StoreFailed("cannot reach object storage", retry_after_s=1.0)

    def put(self, name: str, chunks: Iterable[bytes]) -> Stored:
        self._ask("put")
        stored = super().put(name, chunks)
        if name.endswith(".pack"):
            self.got_pack.set()
        return stored

    def get(self, name: str, offset: int, length: int) -> bytes | None:
        self._ask("get")
        return super().get(name, offset, length)

    def head(self, name: str) -> Stored | None:
        self._ask("head")
        return super().head(name)

    def delete(self, name: str) -> None:
        self._ask("delete")
        super().delete(name)

    def names(self, folder: str) -> Iterator[str]:
        self._ask("names")
        return super().names(folder)

    def objects(self) -> set[str]:
        """Of all stores, without the store's name and its mark."""
        return {name.partition("/")[2] for name in super().names("")} - {"store"}

    def overwrite(self, ending: str, byte: int) -> None:
        """Flips a bit of the object whose name ends so."""
        (name,) = [name for name in super().names("") if name.endswith(ending)]
        stored = super().head(name)
        assert stored is not None
        content = bytearray(super().get(name, 0, stored.size) or b"")
        content[byte] ^= 1
        super().put(name, [bytes(content)])

    def lose(self, ending: str) -> None:
        for name in list(super().names("")):
            if name.endswith(ending):
                super().delete(name)


@contextmanager
def s3_server(bucket: str) -> Iterator[ThreadedMotoServer]:
    """A real server on a socket with an empty bucket, named to obstore by the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        settings = {
            "AWS_ENDPOINT": endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }
        for name, value in settings.items():
            patch.setenv(name, value)
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")).close()
        try:
            yield server
        finally:
            server.stop()
