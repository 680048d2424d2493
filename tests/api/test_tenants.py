"""Tenants, the prefix cache and slow adapters as a client of the whole server sees them."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from overtone.adapters.resident import ResidentAdapter
from overtone.api.tenants import tenant_weights
from overtone.client import AsyncClient
from overtone.errors import InvalidRequest
from support.adapters import make_loca_folder
from support.server import ThreadServer
from support.tiny import tiny_base

PROMPT = "the prompt of all of these is longer than one page of the cache, even than two"


def counters(server: ThreadServer) -> dict[str, float]:
    with urllib.request.urlopen(server.metrics_url) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    names = ("query_tokens_total", "hit_tokens_total", "evictions_total", "pages")
    values = {sample.name: sample.value for family in families for sample in family.samples}
    return {name: values[f"overtone_prefix_cache_{name}"] for name in names}


def test_cached_tokens_are_reported_and_counted(tiny_server: ThreadServer, tmp_path: Path) -> None:
    folders = [make_loca_folder(tmp_path / f"a{i}", tiny_server.base.modules, n=10, seed=i) for i in range(2)]
    before = counters(tiny_server)
    with tiny_server.client() as client:
        prompt = len(client.tokenize(PROMPT).token_ids)
        whole = (prompt - 1) // 16 * 16
        assert whole >= 32

        def cached(adapter: str | None = None, tenant: str | None = None, salt: str | None = None) -> int:
            answer = client.generate(PROMPT, adapter=adapter, tenant=tenant, cache_salt=salt, max_new_tokens=3)
            return answer.usage.cached_prompt_tokens

        client.adapters.load(folders[0], id="one")
        assert [cached("one"), cached("one"), cached(), cached()] == [0, whole, 0, whole]
        assert [cached("one", "anna"), cached("one", "anna"), cached("one", "bert")] == [0, whole, 0]
        assert [cached("one", "anna", "s"), cached("one", "anna", "s")] == [0, whole]
        # A new version under the same name finds nothing of the old one.
        client.adapters.load(folders[1], id="one")
        assert [cached("one"), cached("one")] == [0, whole]
    # The last report may come after the answer.
    for _ in range(200):
        after = counters(tiny_server)
        if after["hit_tokens_total"] - before["hit_tokens_total"] == 5 * whole:
            break
        threading.Event().wait(0.05)
    assert after["hit_tokens_total"] - before["hit_tokens_total"] == 5 * whole
    assert after["query_tokens_total"] - before["query_tokens_total"] == 11 * prompt
    assert after["pages"] >= 6 * (whole // 16)
    assert after["evictions_total"] == 0


def test_no_prefix_cache(tmp_path: Path) -> None:
    with ThreadServer(tmp_path / "store", tiny_base(), prefix_cache=False) as server, server.client() as client:
        answers = [client.generate(PROMPT, max_new_tokens=3) for _ in range(2)]
        assert [answer.usage.cached_prompt_tokens for answer in answers] == [0, 0]
        assert counters(server) == dict.fromkeys(counters(server), 0.0)


def test_a_request_that_waits_for_its_adapter_holds_up_nobody(
    tiny_server: ThreadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two adapters are being fetched; requests that came later, of the base and of another adapter, are served."""
    names = ("slow1", "slow2", "quick")
    folders = [
        make_loca_folder(tmp_path / name, tiny_server.base.modules, n=10, seed=i) for i, name in enumerate(names)
    ]
    versions, arrived = tiny_server.server.backend.store._versions, threading.Event()
    read, asked, slow_digests = versions.read, threading.Semaphore(0), set[str]()

    def slow(digest: str) -> ResidentAdapter:
        if digest in slow_digests:
            asked.release()
            assert arrived.wait(300)
        return read(digest)

    monkeypatch.setattr(versions, "read", slow)
    with tiny_server.client() as client:
        for name, folder in zip(names, folders, strict=True):
            adapter = client.adapters.load(folder, id=name)
            assert versions.residency.drop(adapter.digest)  # from the upload
            slow_digests |= {adapter.digest} if name != "quick" else set()

        def ask(name: str) -> None:
            answers[name] = client.generate(PROMPT, adapter=name, max_new_tokens=3).token_ids

        answers: dict[str, list[int]] = {}
        waiting = [threading.Thread(target=ask, args=(name,)) for name in ("slow1", "slow2")]
        for thread in waiting:
            thread.start()
            assert asked.acquire(timeout=300)
        assert client.generate(PROMPT, max_new_tokens=3).token_ids
        assert client.generate(PROMPT, adapter="quick", max_new_tokens=3).token_ids
        assert not answers
        arrived.set()
        for thread in waiting:
            thread.join()
        again = {name: client.generate(PROMPT, adapter=name, max_new_tokens=3).token_ids for name in names[:2]}
        assert answers == again


def test_more_completions_than_may_wait_are_refused_together(tmp_path: Path) -> None:
    folder = make_loca_folder(tmp_path / "a", tiny_base().modules, n=10, seed=1)
    with ThreadServer(tmp_path / "store", tiny_base(), max_queue=8) as server, server.client() as client:
        client.adapters.load(folder, id="one")
        with pytest.raises(InvalidRequest, match="at most 4 requests may wait") as caught:
            client.generate(PROMPT, adapter="one", n=5, temperature=1.0, max_new_tokens=3)
        assert caught.value.field == "n"
        assert len(client.generate(PROMPT, adapter="one", n=4, temperature=1.0, max_new_tokens=3).others) == 3
        sessions = server.server.backend._sessions._sessions
        assert not sessions


def test_weights_of_settings() -> None:
    assert tenant_weights(["anna=2", "=0.5", "b.c-d_1=1e3"]) == {"anna": 2.0, "": 0.5, "b.c-d_1": 1000.0}


async def _ask(address: str) -> int:
    async with AsyncClient(address) as client:
        await client.generate(PROMPT, tenant="anna", priority=3, max_new_tokens=2)
        return (await client.generate(PROMPT, tenant="anna", max_new_tokens=2)).usage.cached_prompt_tokens


def test_the_other_client(tiny_server: ThreadServer) -> None:
    assert asyncio.run(_ask(tiny_server.address)) >= 32
