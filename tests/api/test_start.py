"""What happens between a request's arrival and its place in the queue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from overtone.adapters.resident import ResidentAdapter
from overtone.adapters.store import AdapterStore
from overtone.client import AdapterNotFound, Client, InvalidRequest, PromptTooLong
from support.adapters import make_loca_folder
from support.server import ThreadServer

Hook = Callable[[Callable[[str], None]], None]


@pytest.fixture
def store(tiny_server: ThreadServer, tmp_path: Path) -> AdapterStore:
    """With an adapter "a" on disk."""
    folder = make_loca_folder(tmp_path / "a", tiny_server.base.modules, n=10, seed=1)  # type: ignore[union-attr]
    with tiny_server.client() as client:
        client.adapters.load(folder, id="a")
    return tiny_server.server.backend.store


@pytest.fixture
def before_encoding(tiny_server: ThreadServer, monkeypatch: pytest.MonkeyPatch) -> Hook:
    """Has a function called with each prompt before it is tokenised."""
    codec = tiny_server.base.codec  # type: ignore[union-attr]
    encode = codec.encode

    def install(work: Callable[[str], None]) -> None:
        def encode_after(text: str) -> list[int]:
            work(text)
            return encode(text)

        monkeypatch.setattr(codec, "encode", encode_after)

    return install


def until_nothing_is_leased(server: ThreadServer) -> None:
    """Leases are released on one thread, in order."""
    server.server.backend._leases.releases.submit(lambda: None).result(60)


def test_the_adapter_is_read_while_the_prompt_is_tokenised(
    tiny_server: ThreadServer, store: AdapterStore, before_encoding: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer waits until the adapter is in memory: if that began afterwards, it would wait for ever."""
    reading = threading.Event()
    read = store._versions.read

    def told(digest: str) -> ResidentAdapter:
        reading.set()
        return read(digest)

    monkeypatch.setattr(store._versions, "read", told)
    assert store._versions.residency.drop(store.get("a").digest)  # from the upload
    before_encoding(lambda _: None if reading.wait(60) else pytest.fail("the adapter is not read"))
    with tiny_server.client() as client:
        assert client.generate("abc", adapter="a", max_new_tokens=2, ignore_eos=True).token_ids
    assert store.stats().disk_load_count == 1


def test_a_prompt_that_is_refused_leaves_no_lease(tiny_server: ThreadServer, store: AdapterStore) -> None:
    with tiny_server.client() as client:
        client.generate("abc", adapter="a", max_new_tokens=1)
        for reference in ("a", "gone"):
            with pytest.raises(PromptTooLong):
                client.generate("abc " * 10_000, adapter=reference, max_new_tokens=1)
            with pytest.raises(InvalidRequest, match="vocabulary"):
                client.generate(token_ids=[1 << 30], adapter=reference, max_new_tokens=1)
        with pytest.raises(AdapterNotFound):
            client.generate("abc", adapter="gone", max_new_tokens=1)
    until_nothing_is_leased(tiny_server)
    assert store.stats().leased_count == 0


def test_a_client_that_leaves_while_its_prompt_is_tokenised_leaves_no_lease(
    tiny_server: ThreadServer, store: AdapterStore, before_encoding: Hook
) -> None:
    """The adapter is leased before the prompt is there, kept while the request waits, and let go of when it is given up."""
    encoding, go_on = threading.Event(), threading.Event()

    def wait(_: str) -> None:
        encoding.set()
        assert go_on.wait(60)

    client = Client(tiny_server.address)
    client.generate("abc", adapter="a", max_new_tokens=1)
    until_nothing_is_leased(tiny_server)
    before_encoding(wait)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.generate, "abc", adapter="a", max_new_tokens=1)
        assert encoding.wait(60)
        while store.stats().leased_count == 0:
            pass
        client.close()
        assert answer.exception(60) is not None
        while store.stats().leased_count:
            pass
        go_on.set()
