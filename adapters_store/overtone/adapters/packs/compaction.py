"""Gives back the bytes of removed blobs: what is alive in a pack moves to the active one, and the pack goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from overtone.adapters.failures import operation
from overtone.adapters.packs import disk
from overtone.adapters.packs.index import PackFacts
from overtone.adapters.packs.local import sound
from overtone.adapters.packs.parts import Parts
from overtone.adapters.packs.place import Place
from overtone.adapters.packs.problem import Problem, Progress

_PAGE = 256
_BATCH_BYTES = 4 << 20
"""Of blobs that are in memory at once, but for the last of them."""


@dataclass(frozen=True, slots=True)
class Compaction:
    """`packs`: how many are gone; `moved_bytes`: of blobs; `freed_bytes`: of files; `problems`: what could not be moved."""

    packs: int
    moved_bytes: int
    freed_bytes: int
    problems: tuple[Problem, ...]


@dataclass
class _Run:
    packs: int = 0
    moved_bytes: int = 0
    freed_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)


class Compactor:
    """A crash leaves garbage at most: a copy that the index never heard of, or a pack that it has forgotten."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def compact(self, below: float, progress: Progress, stop: Callable[[], bool]) -> Compaction:
        """Of sealed packs less than the part `below` of which is alive. Packs that somebody is still storing into wait
        for the next time, and so do those that are only remote, unless nothing in them is alive.

        stop: asked before each pack and before each few megabytes of it, whether to do no more.
        """
        with self._parts.removing:
            self._seal_active(below)
            known = [facts for facts in self._parts.index.packs() if facts.alive < below or not facts.live_count]
            # The emptiest first: the disk may be too full for the others.
            chosen = sorted((f for f in known if not self._parts.writer.holds(f.number)), key=lambda facts: facts.alive)
            run, total = _Run(), sum(facts.end for facts in chosen)
            done = 0
            for facts in chosen:
                if stop():
                    break
                self._compact_one(facts, run, stop)
                done += facts.end
                progress(done, total)
            return Compaction(run.packs, run.moved_bytes, run.freed_bytes, tuple(run.problems))

    def _seal_active(self, below: float) -> None:
        active = self._parts.writer.active
        if any(facts.number == active and facts.alive < below for facts in self._parts.index.packs()):
            self._parts.writer.seal()

    def _compact_one(self, facts: PackFacts, run: _Run, stop: Callable[[], bool]) -> None:
        path = self._parts.folder.pack(facts.number)
        here = path.exists()
        if facts.live_count and not here:
            if self._parts.ledger.get(facts.number) is None:
                run.problems.append(Problem("missing_pack", "", facts.number, "the file of the pack is missing"))
            return
        for batch in self._batches(facts.number, run):
            if stop():
                return  # what has moved has moved
            with self._parts.writer.appended({digest: blob for digest, (_, blob) in batch.items()}) as places:
                self._parts.index.move([(digest, old, places[digest]) for digest, (old, _) in batch.items()])
            run.moved_bytes += sum(len(blob) for _, blob in batch.values())
        if self._parts.index.drop_pack(facts.number):
            with operation("remove a compacted pack"):
                run.freed_bytes += disk.size(path) if here else 0
                disk.unlink(path)
            self._parts.handles.forget(facts.number)
            run.packs += 1

    def _batches(self, number: int, run: _Run) -> Iterator[dict[str, tuple[Place, bytes]]]:
        """Digest -> (place, verified blob) of all that is alive in a pack."""
        batch: dict[str, tuple[Place, bytes]] = {}
        nbytes, after = 0, -1
        while page := self._parts.index.live_in(number, after, _PAGE):
            for digest, place in page:
                blob = self._parts.local.read(digest, place)
                if blob is None or not sound(digest, blob):
                    self._report(digest, place, blob or b"", run)
                    continue
                batch[digest] = place, blob
                nbytes += len(blob)
                if nbytes >= _BATCH_BYTES:
                    yield batch
                    batch, nbytes = {}, 0
            after = page[-1][1].offset
        if batch:
            yield batch

    def _report(self, digest: str, place: Place, broken: bytes, run: _Run) -> None:
        if self._parts.index.place_of(digest) == place:
            self._parts.local.set_aside(digest, place, broken)
            run.problems.append(Problem("bad_digest", digest, place.pack, "the blob does not match its digest"))
