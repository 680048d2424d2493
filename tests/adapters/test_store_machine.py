"""The store against a dictionary, in random order and with a disk that fails: full, writing short, refusing to create,
rename, sync, cut and remove, and turning a byte over."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from overtone.adapters import AdapterFiles
from overtone.adapters.lease import Lease
from overtone.adapters.operations import ImportItem
from overtone.errors import AdapterNotFound, StoreCorrupted, StoreFailed
from overtone.kernels import ResidentDelta
from support.adapters import SHAPES, adapter_files, make_loca_folder, open_store, put
from support.packs import STEPS, Disk, small_own_files
from support.stored import assert_same_deltas, damage, places_on_disk, versions_on_disk

IDS = st.sampled_from(["a", "b", "c", "d"])
CONTENTS = st.integers(0, 4)
FAULTS = st.sampled_from(STEPS)
_KEPT = 3


@dataclass(frozen=True)
class Content:
    folder: Path
    files: AdapterFiles
    digest: str
    deltas: Mapping[str, ResidentDelta]


def make_contents(root: Path) -> list[Content]:
    made = []
    with closing(open_store(root / "scratch")) as store:
        for i in range(5):
            folder = make_loca_folder(root / f"c{i}", SHAPES, n=6, seed=i)
            digest = put(store, folder, f"c{i}").digest
            with store.acquire(f"c{i}") as lease:
                made.append(Content(folder, adapter_files(folder), digest, lease.adapter.deltas))
    return made


@dataclass
class Known:
    """What the dictionary says of an id. versions: contents, newest first; before: what was current before."""

    current: int
    versions: list[int]
    pinned: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    before: int | None = None

    def put(self, content: int) -> None:
        if self.current != content:
            self.versions = [content, *(v for v in self.versions if v != content)][:_KEPT]
            self.before = self.current if self.current in self.versions else None
            self.current = content


class StoreMachine(RuleBasedStateMachine):
    """`touched`: contents of which a byte was turned over, and that may not have been written again since; `noticed`: those
    of which the store has said so, and that no upload has healed since."""

    def __init__(self, contents: Sequence[Content]) -> None:
        super().__init__()
        self.contents = contents
        self.root = Path(tempfile.mkdtemp())
        self.known: dict[str, Known] = {}
        self.touched: set[int] = set()
        self.noticed: set[int] = set()
        self.leases: list[tuple[Lease, int]] = []
        self.undo = ExitStack()
        self.undo.callback(shutil.rmtree, self.root)
        # So that layouts are files of their own.
        self.undo.enter_context(small_own_files(1000))
        self._open()

    def _open(self) -> None:
        self.store = open_store(self.root, pack_bytes=1 << 12, keep_versions=_KEPT)

    def _digests(self, contents: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.contents[content].digest for content in contents)

    def _learn(self, adapter_id: str, content: int) -> None:
        if content in self.noticed:
            self.noticed.discard(content)
            self.touched.discard(content)
        if adapter_id in self.known:
            self.known[adapter_id].put(content)
        else:
            self.known[adapter_id] = Known(content, [content])

    @rule(adapter_id=IDS, content=CONTENTS)
    def upload(self, adapter_id: str, content: int) -> None:
        assert put(self.store, self.contents[content].folder, adapter_id).digest == self.contents[content].digest
        self._learn(adapter_id, content)

    @rule(some=st.lists(st.tuples(IDS, CONTENTS), min_size=1, max_size=4, unique_by=lambda one: one[0]))
    def bring_many(self, some: Sequence[tuple[str, int]]) -> None:
        results = self.store.import_many([ImportItem(name, self.contents[content].files) for name, content in some])
        for (name, content), result in zip(some, results, strict=True):
            known = self.known.get(name)
            outcome = "created" if known is None else "unchanged" if known.current == content else "updated"
            assert (result.adapter_id, result.digest, result.outcome) == (name, self.contents[content].digest, outcome)
            self._learn(name, content)

    @rule(adapter_id=IDS, pinned=st.booleans(), value=st.sampled_from(["x", "y"]))
    def change(self, adapter_id: str, pinned: bool, value: str) -> None:
        known = self.known.get(adapter_id)
        if known is None:
            with pytest.raises(AdapterNotFound):
                self.store.update(adapter_id, pinned=pinned)
            return
        try:
            self.store.update(adapter_id, pinned=pinned, labels={"k": value})
        except StoreCorrupted:
            self._notice(known.current)
        else:
            known.pinned, known.labels = pinned, {"k": value}

    def _notice(self, content: int) -> None:
        assert content in self.touched
        self.noticed.add(content)

    @rule(adapter_id=IDS, data=st.data())
    def activate(self, adapter_id: str, data: st.DataObject) -> None:
        """With no version: the one from before."""
        known = self.known.get(adapter_id)
        content = None if known is None else data.draw(st.sampled_from([None, *known.versions]))
        prefix = "" if content is None else self.contents[content].digest[:12]
        target = content if content is not None or known is None else known.before
        if known is None or target is None:
            with pytest.raises(AdapterNotFound):
                self.store.activate(adapter_id, prefix)
            return
        try:
            assert self.store.activate(adapter_id, prefix).digest == self.contents[target].digest
        except StoreCorrupted:
            assert known.pinned
            self._notice(target)
        else:
            if target != known.current:
                known.before, known.current = known.current, target

    @rule(adapter_id=IDS)
    def delete(self, adapter_id: str) -> None:
        if adapter_id in self.known:
            self.store.delete(adapter_id)
            del self.known[adapter_id]
        else:
            with pytest.raises(AdapterNotFound):
                self.store.delete(adapter_id)

    @rule(adapter_id=IDS, data=st.data())
    def lease(self, adapter_id: str, data: st.DataObject) -> None:
        known = self.known.get(adapter_id)
        if known is None:
            with pytest.raises(AdapterNotFound):
                self.store.acquire(adapter_id)
            return
        content = data.draw(st.sampled_from(known.versions))
        try:
            taken = self.store.acquire(f"{adapter_id}@{self.contents[content].digest}")
        except StoreCorrupted:
            self._notice(content)
            return
        assert content not in self.noticed
        assert_same_deltas(taken.adapter.deltas, self.contents[content].deltas)
        self.leases.append((taken, content))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.leases) - 1))
        self.leases.pop(place)[0].release()

    @rule()
    def compact(self) -> None:
        problems = self.store.compact(below=1.0).problems
        assert {problem.digest for problem in problems} <= set(self._digests(list(self.touched)))

    @rule()
    def reopen(self) -> None:
        self.store.close()
        for taken, _ in self.leases:
            taken.release()
        self.leases.clear()
        self._open()
        for record in self.store.list(100)[0]:
            if record.pinned and record.state == "quarantined":
                self._notice(self.known[record.id].current)

    @rule(fault=FAULTS, after=st.integers(0, 3), adapter_id=IDS, content=CONTENTS, many=st.booleans())
    def upload_to_a_failing_disk(self, fault: str, after: int, adapter_id: str, content: int, many: bool) -> None:
        """It is refused with a typed error and nothing has changed, or it has happened."""
        with Disk() as disk:
            disk.refuse(fault, after=after)
            try:
                if many:
                    self.store.import_many([ImportItem(adapter_id, self.contents[content].files)])
                else:
                    put(self.store, self.contents[content].folder, adapter_id)
            except StoreFailed:
                return
        self._learn(adapter_id, content)

    @rule(fault=FAULTS, after=st.integers(0, 3))
    def compact_on_a_failing_disk(self, fault: str, after: int) -> None:
        with Disk() as disk:
            disk.refuse(fault, after=after)
            try:
                self.store.compact(below=1.0)
            except StoreFailed:
                return

    @rule(content=CONTENTS)
    def turn_a_byte_over(self, content: int) -> None:
        """In the blob of a version, wherever it is now; what is in memory already is not touched."""
        if content not in self.touched and self.contents[content].digest in places_on_disk(self.root):
            damage(self.root, self.contents[content].digest)
            self.touched.add(content)

    @invariant()
    def says_what_is_known(self) -> None:
        gone = {content for content in self.touched if self.contents[content].digest not in places_on_disk(self.root)}
        self.touched -= gone
        self.noticed -= gone
        records = {record.id: record for record in self.store.list(100)[0]}
        assert records.keys() == self.known.keys()
        for name, known in self.known.items():
            record = records[name]
            assert record.digest == self.contents[known.current].digest
            assert record.versions == self._digests(known.versions)
            assert (record.pinned, dict(record.labels)) == (known.pinned, known.labels)
            assert record.state == ("quarantined" if known.current in self.noticed else "ready")
        for taken, content in self.leases:
            assert taken.adapter.digest == self.contents[content].digest
        assert self.store.stats().registered_count == len(self.known)

    def teardown(self) -> None:
        with self.undo, closing(self.store):
            for taken, _ in self.leases:
                taken.release()
            # What a failing disk did not remove is left to the next start.
            left = ("unreferenced_file", "unknown_pack")
            problems = [problem for problem in self.store.check(deep=True) if problem.kind not in left]
            assert {problem.digest for problem in problems} <= set(self._digests(list(self.touched))), problems
            if not self.touched:
                wanted = {version for known in self.known.values() for version in known.versions}
                assert set(versions_on_disk(self.root)) == set(self._digests(list(wanted)))


def test_the_store_is_a_dictionary(tmp_path: Path) -> None:
    contents = make_contents(tmp_path)
    chosen = settings(max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(lambda: StoreMachine(contents), settings=chosen)  # type: ignore[arg-type,return-value]
