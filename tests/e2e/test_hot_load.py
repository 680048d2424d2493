"""Adapters come, change and go while others stream."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path

import pytest

from overtone.adapters import AdapterFiles
from overtone.adapters.admission import Admission
from overtone.adapters.recipes import Admitted
from overtone.client import AdapterNotFound, Client
from support.deltas import numbers_of
from support.reference import MergedReference
from support.server import ThreadServer
from support.traffic import Streams, make_adapters


def test_upload_during_sixteen_streams_disturbs_none(
    demo_server: ThreadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload is held open inside the store until every stream has gone on: were anything shared with the streams
    blocked by it, this would stand still."""
    modules = {n: s for n, s in demo_server.base.modules.items() if n.endswith(("q_proj", "v_proj"))}
    adapters = make_adapters(tmp_path, modules, 4)
    *early, late = adapters
    with demo_server.client() as client:
        for adapter_id in early:
            client.adapters.load(adapters[adapter_id], id=f"hot-{adapter_id}")
    entered, go_on = threading.Event(), threading.Event()
    admit = Admission.admit

    def slow_admit(self: Admission, files: AdapterFiles) -> Admitted:
        entered.set()
        assert go_on.wait(300)
        return admit(self, files)

    monkeypatch.setattr(Admission, "admit", slow_admit)
    choices = [None, *(f"hot-{adapter_id}" for adapter_id in early)]
    streams = Streams(demo_server.address, [choices[i % 4] for i in range(16)], new_tokens=64)
    first: list[object] = []

    def upload_and_use() -> None:
        with Client(demo_server.address) as client:
            client.adapters.load(adapters[late], id="hot-late")
            first.append(client.generate("Now I sing", adapter="hot-late", max_new_tokens=4, ignore_eos=True))

    streams.wait_for_more(2)
    uploader = threading.Thread(target=upload_and_use)
    uploader.start()
    assert entered.wait(300)
    streams.wait_for_more(3)
    assert not first
    go_on.set()
    uploader.join()
    assert len(first[0].token_ids) == 4  # type: ignore[attr-defined]
    assert min(streams.counts) < 64, "the streams were over before the new adapter spoke: nothing was shown"
    streams.join()
    assert streams.counts == [64] * 16


def test_replace_and_delete_let_running_requests_finish(
    tiny_server: ThreadServer, tiny_reference: MergedReference, tmp_path: Path
) -> None:
    made = make_adapters(tmp_path / "made", tiny_server.base.modules, 3, n=40, strength=0.8)
    old, new, other = made.values()
    with tiny_server.client() as client:
        prompt_ids = client.tokenize("abc").token_ids
        first = client.adapters.load(old, id="x")
        stream = client.stream("abc", adapter="x", max_new_tokens=40, ignore_eos=True)
        got = next(stream).token_ids
        second = client.adapters.load(new, id="x")
        assert second.digest != first.digest
        assert second.versions == (second.digest, first.digest) or list(second.versions) == [
            second.digest,
            first.digest,
        ]
        answer = client.generate("abc", adapter="x", max_new_tokens=8, ignore_eos=True)
        assert answer.adapter_digest == second.digest
        assert answer.token_ids == tiny_reference.greedy(new, prompt_ids, 8)
        pinned = client.generate("abc", adapter=f"x@{first.digest[:12]}", max_new_tokens=8, ignore_eos=True)
        assert pinned.adapter_digest == first.digest
        client.adapters.delete("x")
        with pytest.raises(AdapterNotFound):
            client.generate("abc", adapter="x", max_new_tokens=1)
        last = None
        for chunk in stream:
            got += chunk.token_ids
            last = chunk.completion or last
        assert got == tiny_reference.greedy(old, prompt_ids, 40)
        assert last is not None
        assert last.adapter_digest == first.digest
        client.adapters.load(other, id="x")
        assert client.generate("abc", adapter="x", max_new_tokens=8, ignore_eos=True).token_ids == (
            tiny_reference.greedy(other, prompt_ids, 8)
        )


def test_a_deleted_adapter_leaves_memory(tiny_server: ThreadServer, tmp_path: Path) -> None:
    (folder,) = make_adapters(tmp_path / "made", tiny_server.base.modules, 1, n=40).values()
    with tiny_server.client() as client:
        client.adapters.load(folder, id="x")
        with tiny_server.server.backend.store.acquire("x") as lease:
            numbers = weakref.ref(numbers_of(lease.adapter.deltas))
        del lease
        client.generate("abc", adapter="x", max_new_tokens=4, ignore_eos=True)
        assert numbers() is not None
        client.adapters.delete("x")
        for _ in range(200):
            gc.collect()
            if numbers() is None:
                break
            time.sleep(0.05)
        assert numbers() is None, "somebody still holds the adapter's tensors"
