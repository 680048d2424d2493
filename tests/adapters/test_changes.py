"""What happens after a change is durable: it is told whatever else fails, done later where it failed, and costs no more than
it must."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from overtone.adapters import AdapterStore
from overtone.adapters.operations import Event, ImportItem
from overtone.adapters.residency import ENTRY_BYTES
from overtone.adapters.resident import ResidentAdapter
from overtone.adapters.store import Wanted
from overtone.errors import AdapterMemoryFull, AdapterNotFound, StoreFailed
from support.adapters import adapter_files, open_store, put
from support.peft_base import base_of
from support.peft_folders import peft_config, peft_folder
from support.stored import versions_on_disk
from support.tiny import tiny_model

Make = Callable[[int], Path]
READS_AND_WRITES = ("prune_many", "pinned", "refers_to", "place_of", "release", "get")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    """Keeps one version of each adapter."""
    with closing(open_store(tmp_path / "store", keep_versions=1)) as opened:
        yield opened


def refuse(*args: object) -> None:
    raise StoreFailed("no disk")


def items(*files: tuple[str, Path]) -> list[ImportItem]:
    return [ImportItem(name, adapter_files(folder)) for name, folder in files]


@pytest.mark.parametrize("refused", READS_AND_WRITES)
@pytest.mark.parametrize("how", ["put", "import", "update", "delete"])
def test_what_is_durable_has_happened_whatever_fails_after_it(
    store: AdapterStore, loca: Make, monkeypatch: pytest.MonkeyPatch, refused: str, how: str
) -> None:
    """It is told, and what was left undone is done later."""
    old = put(store, loca(1), "a", pinned=how != "update").digest
    heard: list[Event] = []
    store.subscribe(heard.append)
    committed = {"put": "put", "import": "put_many"}.get(how, how)
    commit = getattr(store._catalogue, committed)

    def commit_and_refuse(*args: object, **options: object) -> object:
        """Nothing answers once it has happened."""
        monkeypatch.setattr(store._catalogue, committed, commit)
        result = commit(*args, **options)
        monkeypatch.setattr(store._catalogue, refused, refuse)
        return result

    changes: dict[str, Callable[[], object]] = {
        "put": lambda: put(store, loca(2), "a"),
        "import": lambda: store.import_many(items(("a", loca(2)), ("b", loca(3)))),
        "update": lambda: store.update("a", pinned=True),
        "delete": lambda: store.delete("a"),
    }
    with monkeypatch.context() as patch:
        monkeypatch = patch
        patch.setattr(store._catalogue, committed, commit_and_refuse)
        changes[how]()
    told = {"put": ["updated"], "import": ["updated", "created"], "update": ["updated"], "delete": ["deleted"]}
    assert [event.kind for event in heard] == told[how]
    store._versions.catch_up()
    pinned = {"put": "a", "import": "a", "update": "a", "delete": ""}[how]
    assert store._versions.residency._contents._pinned == ({store.get("a").digest} if pinned else set())
    put(store, loca(4), "a")
    wanted = {record.digest for record in store.list(0)[0]}
    assert set(versions_on_disk(store._config.root)) == wanted
    assert old not in wanted
    assert store.residency_state(old) == "stored"


def test_a_sweep_that_fails_at_the_end_of_a_lease_is_made_again(
    store: AdapterStore, loca: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, loca(1), "a")
    lease = store.acquire("a")
    store.delete("a")
    with monkeypatch.context() as patch:
        patch.setattr(store._catalogue, "refers_to", refuse)
        lease.release()
    assert len(versions_on_disk(store._config.root)) == 1
    store._versions.catch_up()
    assert versions_on_disk(store._config.root) == []


def test_an_import_of_updates_is_three_transactions(
    store: AdapterStore, loca: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many they are: the new versions, the old ones forgotten, their blobs given up."""
    names = [f"a{i}" for i in range(20)]
    store.import_many(items(*((name, loca(i % 5)) for i, name in enumerate(names))))
    done: list[str] = []
    writing = store._catalogue._connections.writing
    monkeypatch.setattr(
        store._catalogue._connections, "writing", lambda what, **how: done.append(what) or writing(what, **how)
    )
    results = store.import_many(items(*((name, loca(5 + i % 5)) for i, name in enumerate(names))))
    assert {result.outcome for result in results} == {"updated"}
    assert done == ["record adapters", "forget versions", "remove adapters"]
    assert set(versions_on_disk(store._config.root)) == {result.digest for result in results}


def test_pins_are_read_again_only_where_they_change(
    store: AdapterStore, loca: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, loca(1), "pinned", pinned=True)
    put(store, loca(1), "other")
    pinned, asked = store._catalogue.pinned, []
    monkeypatch.setattr(store._catalogue, "pinned", lambda: asked.append(1) or pinned())

    def times(*changes: Callable[[], object]) -> Sequence[int]:
        counts = []
        for change in changes:
            asked.clear()
            change()
            counts.append(len(asked))
        return counts

    assert times(
        lambda: put(store, loca(2), "other"),
        lambda: store.import_many(items(("other", loca(3)), ("new", loca(3)))),
        lambda: store.update("other", labels={"k": "v"}),
        lambda: store.update("pinned", labels={"k": "v"}),
        lambda: store.delete("new"),
    ) == [0, 0, 0, 0, 0]
    assert times(
        lambda: store.import_many(items(("pinned", loca(4)), ("other", loca(4)), ("pinned", loca(5)))),
        lambda: store.update("other", pinned=True),
        lambda: store.delete("other"),
        lambda: put(store, loca(6), "pinned"),
    ) == [1, 1, 1, 1]
    assert store._versions.residency._contents._pinned == {store.get("pinned").digest}
    assert store.residency_state(store.get("pinned").digest) == "resident"


def test_what_goes_into_memory_is_made_before_others_wait_and_once(
    store: AdapterStore, loca: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, alone = store._versions.made, []

    def watched(*args: Any) -> ResidentAdapter:
        def free() -> bool:
            taken = store._versions.changing.acquire(blocking=False)
            if taken:
                store._versions.changing.release()
            return taken

        with ThreadPoolExecutor(1) as pool:
            alone.append(pool.submit(free).result())
        return made(*args)

    monkeypatch.setattr(store._versions, "made", watched)
    put(store, loca(1), "a", pinned=True)
    put(store, loca(1), "b")
    assert alone == [True]


@pytest.mark.parametrize("named", [False, True])
def test_a_pinned_adapter_goes_back_only_to_what_is_in_memory(tmp_path: Path, loca: Make, named: bool) -> None:
    """There is room for two, and one of them is pinned."""
    with closing(open_store(tmp_path / "probe")) as probe:
        used = [put(probe, loca(seed), str(seed)) and probe.stats().resident_bytes for seed in (1, 2)]
    memory_bytes = used[1] + (used[1] - used[0]) // 2
    with closing(open_store(tmp_path / "store", memory_bytes=memory_bytes)) as store:
        one = put(store, loca(1), "a").digest
        two = put(store, loca(2), "a", pinned=True)
        put(store, loca(3), "b")
        assert store.residency_state(one) == "stored"
        version = one[:12] if named else ""
        with store.acquire("b"), pytest.raises(AdapterMemoryFull):
            store.activate("a", version)
        assert store.get("a") == two
        assert store.activate("a", version).digest == one
        assert store.residency_state(one) == "resident"
        put(store, loca(4), "c")
        store.acquire("b").release()
        assert store.residency_state(one) == "resident"


def test_nothing_from_before_to_go_back_to(store: AdapterStore, loca: Make) -> None:
    put(store, loca(1), "a", pinned=True)
    with pytest.raises(AdapterNotFound, match="no version from before"):
        store.activate("a")
    with pytest.raises(AdapterNotFound, match="there is no adapter b"):
        store.activate("b")


def test_who_names_no_version_gets_one_though_the_first_found_has_gone(
    store: AdapterStore, loca: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is replaced, and its only version freed, between being found and being retained."""
    first = put(store, loca(0), "a").digest
    residency, seeds = store._versions.residency, [1, 2, 3]
    retain = residency.retain

    def retain_late(digest: str, **how: bool) -> None:
        if seeds:
            monkeypatch.setattr(residency, "retain", retain)
            put(store, loca(seeds.pop()), "a")
            monkeypatch.setattr(residency, "retain", retain_late)
        retain(digest, **how)

    monkeypatch.setattr(residency, "retain", retain_late)
    with store.acquire("a") as lease:
        assert (lease.adapter.digest, seeds) == (store.get("a").digest, [])
    current = lease.adapter.digest
    for reference, message in ((f"a@{first[:12]}", first[:12]), (f"a@{current}", current)):
        seeds.append(len(reference))
        with pytest.raises(AdapterNotFound, match=f"no version {message}"):
            store.acquire_all([Wanted(reference)])
    seeds.clear()
    assert store.stats().leased_count == 0
    assert versions_on_disk(store._config.root) == [store.get("a").digest]


def test_a_full_disk_loses_no_times_and_keeps_nothing_open(
    tmp_path: Path, loca: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    for name in "ab":
        put(store, loca(1), name)
        store.acquire(name).release()
    with monkeypatch.context() as patch:
        patch.setattr(store._catalogue, "touch", refuse)
        with pytest.raises(StoreFailed):
            store.flush()
    store.acquire("a").release()
    store.flush()
    assert store.get("a").last_used_time > store.get("b").last_used_time  # type: ignore[operator]
    store.acquire("b").release()
    monkeypatch.setattr(store._catalogue, "touch", refuse)
    store.close()
    assert "last used" in caplog.text
    open_store(tmp_path).close()


def test_what_can_never_be_in_memory_is_not_taken_in(tmp_path: Path) -> None:
    """With what it shares, to the byte: what is taken in can be served."""
    model = tiny_model()
    base = base_of(model)
    folders = [
        peft_folder(tmp_path / "vera", model, peft_config("VeraConfig", target_modules=["gate_proj"], r=8)),
        peft_folder(
            tmp_path / "fourier", model, peft_config("FourierFTConfig", target_modules=["q_proj"], n_frequency=9)
        ),
    ]
    for folder in folders:
        with closing(open_store(tmp_path / f"{folder.name}-probe", base=base)) as probe:
            put(probe, folder, "a")
            needed = probe.stats().resident_bytes
            assert needed > probe._catalogue.resolve("a").resident_bytes + ENTRY_BYTES
        with closing(open_store(tmp_path / f"{folder.name}-less", base=base, memory_bytes=needed - 1)) as store:
            with pytest.raises(AdapterMemoryFull, match="never fits") as caught:
                put(store, folder, "a")
            assert caught.value.retry_after_s is None
            assert [result.outcome for result in store.import_many(items(("a", folder)))] == ["refused"]
            assert store.stats().version_count == 0
        with closing(open_store(tmp_path / f"{folder.name}-enough", base=base, memory_bytes=needed)) as store:
            assert store.import_many(items(("a", folder)))[0].error is None
            store.acquire("a").release()
