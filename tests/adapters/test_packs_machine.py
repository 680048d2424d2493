"""Any history of a store of blobs, kills and failing disks included, against a dictionary."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from overtone.adapters.packs import digest_of
from overtone.adapters.packs.tier import Tier
from overtone.errors import StoreCorrupted, StoreFailed
from support.packs import Disk, Killed, Store
from support.remotes import FragileRemote

LENGTHS = st.lists(st.integers(0, 700), min_size=1, max_size=6)
OPERATIONS = ("store", "release", "compact", "upload")
REFUSALS = ("create", "write_all", "sync", "sync_folder", "truncate", "replace", "unlink")


class BlobMachine(RuleBasedStateMachine):
    """`held`: what was acknowledged and not released; `broken`: of those, what a reader was refused."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("overtone.adapters.packs.blobs.OWN_FILE_BYTES", 500)
        self.store = self.make_store()
        self.contents: dict[str, bytes] = {}
        self.held: set[str] = set()
        self.broken: set[str] = set()
        self.count = 0

    def make_store(self) -> Store:
        return Store(self.root, pack_bytes=2000)

    def teardown(self) -> None:
        self.store.close()
        self.patch.undo()
        shutil.rmtree(self.root)

    def new_blobs(self, lengths: list[int]) -> dict[str, bytes]:
        blobs = {}
        for length in lengths:
            self.count += 1
            blob = self.count.to_bytes(4, "little") + bytes([self.count % 251]) * length
            blobs[digest_of(blob)] = blob
        self.contents.update(blobs)
        return blobs

    def follow(self, digests: set[str]) -> None:
        """After an operation on `digests` that failed halfway the index says what happened."""
        known = self.store.index.places.keys()
        self.held = (self.held - digests) | (digests & known)
        self.broken &= self.held

    def stored(self, blobs: dict[str, bytes]) -> None:
        self.store.put(blobs)
        self.held |= blobs.keys()
        self.broken -= blobs.keys()

    @rule(lengths=LENGTHS)
    def store_new(self, lengths: list[int]) -> None:
        self.stored(self.new_blobs(lengths))

    @rule(lengths=LENGTHS, data=st.data())
    def store_some_again(self, lengths: list[int], data: st.DataObject) -> None:
        self.stored(self.pick(data) | self.new_blobs(lengths))

    def pick(self, data: st.DataObject) -> dict[str, bytes]:
        if not self.contents:
            return {}
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.contents)), max_size=8, unique=True))
        return {digest: self.contents[digest] for digest in chosen}

    @rule(lengths=LENGTHS)
    def store_and_not_commit(self, lengths: list[int]) -> None:
        with self.store.blobs.store(self.new_blobs(lengths)):
            pass

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        gone = self.pick(data).keys()
        self.store.release(gone)
        self.held -= gone
        self.broken -= gone

    @rule(below=st.sampled_from([0.5, 0.9, 1.1]))
    def compact(self, below: float) -> None:
        compaction = self.store.blobs.compact(below)
        assert {problem.digest for problem in compaction.problems} <= self.broken

    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """A flipped bit; the next reader finds it."""
        digests = sorted(digest for digest in self.held - self.broken if self.is_here(digest))
        if digests:
            digest = data.draw(st.sampled_from(digests))
            self.store.damage(digest, byte=data.draw(st.integers(0, len(self.contents[digest]) - 1)))
            self.read_damaged(digest)

    def is_here(self, digest: str) -> bool:
        place = self.store.index.places[digest]
        return (self.store.folder.pack(place.pack) if place.pack else self.store.folder.own(digest)).exists()

    def read_damaged(self, digest: str) -> None:
        with pytest.raises(StoreCorrupted) as caught:
            self.store.blobs.read(digest)
        assert caught.value.metadata == {"digest": digest}
        assert any(path.name.startswith(digest) for path in self.store.set_aside())
        self.broken.add(digest)

    @rule()
    def reopen(self) -> None:
        self.store.reopen()

    @rule(tail=st.binary(min_size=1, max_size=100))
    def reopen_after_a_torn_write(self, tail: bytes) -> None:
        self.store.close()
        for path in self.store.folder.packs.iterdir():
            with path.open("ab") as file:
                file.write(tail)
        self.store.open()

    @rule(lengths=LENGTHS, data=st.data(), call=st.sampled_from(REFUSALS), after=st.integers(0, 4))
    def store_on_a_failing_disk(self, lengths: list[int], data: st.DataObject, call: str, after: int) -> None:
        blobs = self.pick(data) | self.new_blobs(lengths)
        with Disk() as faults:
            faults.refuse(call, after=after, times=data.draw(st.sampled_from([1, 1000])))
            with suppress(StoreFailed):
                self.stored(blobs)

    @rule(call=st.sampled_from(REFUSALS), after=st.integers(0, 4))
    def compact_on_a_failing_disk(self, call: str, after: int) -> None:
        with Disk() as faults:
            faults.refuse(call, after=after)
            with suppress(StoreFailed):
                self.store.blobs.compact(0.9)

    @rule(
        lengths=LENGTHS,
        data=st.data(),
        what=st.sampled_from(OPERATIONS),
        step=st.integers(0, 25),
    )
    def kill(self, lengths: list[int], data: st.DataObject, what: str, step: int) -> None:
        chosen = self.pick(data)
        blobs = chosen | self.new_blobs(lengths)
        with Disk() as faults:
            faults.kill(step, self.store.index)
            try:
                if what == "store":
                    self.store.put(blobs)
                elif what == "release":
                    self.store.release(chosen)
                elif what == "compact":
                    self.store.blobs.compact(1.1)
                else:
                    self.store.blobs.upload()
            except Killed:
                pass
            else:
                self.broken -= blobs.keys() if what == "store" else set()
        self.store.reopen()
        self.follow(set(blobs) if what in ("store", "release") else set())
        self.broken = {digest for digest in self.broken if not self.reads(digest)}
        if not self.broken:
            self.store.assert_whole({digest: self.contents[digest] for digest in self.held})

    def reads(self, digest: str) -> bool:
        try:
            return self.store.blobs.read(digest) == self.contents[digest]
        except StoreCorrupted:
            return False

    @invariant()
    def everything_is_as_it_was(self) -> None:
        assert self.store.index.places.keys() == self.held
        for digest in self.held:
            if digest in self.broken:
                with pytest.raises(StoreCorrupted):
                    self.store.blobs.read(digest)
            else:
                assert self.store.blobs.read(digest) == self.contents[digest]

    @invariant()
    def a_check_finds_what_is_broken(self) -> None:
        assert self.problems() == self.broken

    def problems(self) -> set[str]:
        return {problem.digest for problem in self.store.blobs.check(deep=True) if not problem.garbage}

    @invariant()
    def little_is_left_open(self) -> None:
        assert not self.store.blobs._parts.writer._holders
        assert not self.store.blobs._parts.own._claims


class RemoteMachine(BlobMachine):
    """With object storage and a small disk. What breaks here may be sound there."""

    def make_store(self) -> Store:
        # What the thread would do at any time is done by rules: a failing history is the same when it is run again.
        self.patch.setattr(Tier, "_run", lambda tier: None)
        self.remote = FragileRemote()
        return Store(self.root, self.remote, pack_bytes=2000, disk_bytes=5000)

    def read_damaged(self, digest: str) -> None:
        if not self.reads(digest):
            self.broken.add(digest)

    @rule()
    def upload(self) -> None:
        self.store.blobs.upload()
        known = {facts.number for facts in self.store.index.packs() if facts.live_count}
        assert {int(name[6:14]) for name in self.remote.objects() if name.startswith("packs")} >= known

    @rule(data=st.data())
    def all_is_well_without_it(self, data: st.DataObject) -> None:
        self.remote.down = True
        try:
            here = {digest for digest in self.held - self.broken if self.is_here(digest)}
            assert all(self.reads(digest) for digest in here)
            for digest in self.held - self.broken - here:
                with pytest.raises(StoreFailed):
                    self.store.blobs.read(digest)
        finally:
            self.remote.down = False

    @invariant()
    def a_check_finds_what_is_broken(self) -> None:
        # What was uploaded broken is found by its next reader.
        assert self.problems() <= self.broken


SETTINGS = settings(max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck))
TestRemote = RemoteMachine.TestCase
TestRemote.settings = SETTINGS
TestBlobs = BlobMachine.TestCase
TestBlobs.settings = SETTINGS
