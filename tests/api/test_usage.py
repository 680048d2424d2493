"""What a whole server counts of its adapters, and how adapters change while it serves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from overtone.adapters.resident import ResidentAdapter
from overtone.client import (
    AdapterNotFound,
    AdapterStatistics,
    Client,
    DeadlineExceeded,
    Draining,
    ImportEntry,
    StoreCorrupted,
)
from support.adapters import make_loca_folder
from support.server import ThreadServer


@pytest.fixture
def client(tiny_server: ThreadServer, tmp_path: Path) -> Iterator[Client]:
    with tiny_server.client() as client:
        list(
            client.adapters.import_many(entry(tiny_server, tmp_path, name, i) for i, name in enumerate(("one", "two")))
        )
        yield client


def entry(server: ThreadServer, tmp_path: Path, name: str, seed: int) -> ImportEntry:
    folder = make_loca_folder(tmp_path / f"{name}-{seed}", server.base.modules, n=10, seed=seed)  # type: ignore[union-attr]
    return ImportEntry(name, {path.name: path.read_bytes() for path in folder.iterdir()})


def settled(client: Client, adapter_id: str, requests: int) -> AdapterStatistics:
    """Once so many are counted: that happens with a request's last event, a moment after a client has left."""
    while (found := client.adapters.statistics(adapter_id)).request_count < requests:
        time.sleep(0.01)
    return found


def test_counts_are_exact(tiny_server: ThreadServer, client: Client) -> None:
    prompt = len(client.tokenize("abcdef").token_ids)
    for _ in range(3):
        client.generate("abcdef", adapter="one", max_new_tokens=5, ignore_eos=True)
    client.generate("abcdef", adapter="one", max_new_tokens=4, n=2, temperature=1.0, ignore_eos=True)
    client.generate("abcdef", adapters={"one": 0.5, "two": 0.5}, max_new_tokens=2, ignore_eos=True)
    client.generate("abcdef", max_new_tokens=5)
    found = settled(client, "one", 6)
    assert (found.request_count, found.outcome_counts["length"], found.error_count) == (6, 6, 0)
    assert (found.prompt_token_count, found.generated_token_count) == (6 * prompt, 3 * 5 + 2 * 4 + 2)
    assert (found.time_to_first_token.count, found.total.count, found.inter_token.count) == (6, 6, 25 - 6)
    assert 0 < found.time_to_first_token.p50 <= found.total.p50 * 1.2
    two = settled(client, "two", 1)
    assert (two.request_count, two.generated_token_count) == (1, 2)
    assert [each.id for each in client.adapters.top().statistics] == ["one", "two"]


def test_requests_that_do_not_end_well(tiny_server: ThreadServer, client: Client) -> None:
    long = tiny_server.server.backend.engine_config.max_context_tokens - 16
    with closing(client.stream("abc", adapter="one", max_new_tokens=long, ignore_eos=True)) as chunks:
        next(chunks)
    assert settled(client, "one", 1).outcome_counts["cancelled"] == 1
    with pytest.raises(DeadlineExceeded):
        client.generate("abc", adapter="one", max_new_tokens=long, ignore_eos=True, timeout=0.05)
    found = settled(client, "one", 2)
    assert (found.outcome_counts["deadline_exceeded"], found.error_count) == (1, 1)
    with pytest.raises(AdapterNotFound):
        client.generate("abc", adapter="never-there")
    with pytest.raises(AdapterNotFound):
        client.adapters.statistics("never-there")
    assert client.adapters.top().tracked_count == 1


def test_a_damaged_adapter_counts_as_its_error(
    tiny_server: ThreadServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(digest: str) -> ResidentAdapter:
        raise StoreCorrupted("it does not match its digest")

    monkeypatch.setattr(tiny_server.server.backend.store._versions, "read", damaged)
    with pytest.raises(StoreCorrupted):
        client.generate("abc", adapter="one")
    assert client.adapters.statistics("one").outcome_counts["error"] == 1


def test_a_deleted_adapters_last_request(tiny_server: ThreadServer, client: Client) -> None:
    """The deletion says that it is in use; what it then still does counts for nobody, not for the next of that name."""
    with closing(client.stream("abc", adapter="one", max_new_tokens=100, ignore_eos=True)) as chunks:
        next(chunks)
        gone = client.adapters.delete("one")
        assert gone.freed_bytes == 0
        assert gone.pending_bytes > 0
        assert gone.lease_count == 1
        with pytest.raises(AdapterNotFound):
            client.generate("abc", adapter="one")
        assert len(list(chunks)) > 0
    assert client.adapters.top().statistics == []
    while client.adapters.top().other.request_count < 1:
        time.sleep(0.01)
    assert client.adapters.delete("two").freed_bytes > 0


def test_rolling_back_changes_what_is_served(tiny_server: ThreadServer, client: Client, tmp_path: Path) -> None:
    before = client.generate("abc", adapter="one", max_new_tokens=3)
    list(client.adapters.import_many([entry(tiny_server, tmp_path, "one", 7)]))
    after = client.generate("abc", adapter="one", max_new_tokens=3)
    assert before.adapter_digest != after.adapter_digest
    assert client.adapters.activate("one").digest == before.adapter_digest
    again = client.generate("abc", adapter="one", max_new_tokens=3)
    assert (again.adapter_digest, again.token_ids) == (before.adapter_digest, before.token_ids)


def test_a_watch_ends_with_the_server_and_does_not_hold_it_up(tiny_server: ThreadServer, client: Client) -> None:
    with closing(client.adapters.watch(snapshot=True)) as updates:
        while not next(updates).caught_up:
            continue
        stopping = threading.Thread(target=tiny_server.stop, args=(300.0,))
        stopping.start()
        with pytest.raises(Draining):
            list(updates)
        stopping.join(120)
        assert not stopping.is_alive()


def test_upkeep_of_a_real_store(client: Client) -> None:
    assert client.store.statistics().adapter_count == 2
    assert client.store.compact().check.problem_count == 0
    assert client.store.check(deep=True).problem_count == 0
    assert len(b"".join(client.adapters.export(["one", "two"]))) > 1024
