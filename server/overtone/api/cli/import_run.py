"""An import from a source into a running server: what is sent, and what came of it."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import PurePath

from overtone.adapters.records import check_id
from overtone.adapters.sources import Entry, Source
from overtone.adapters.text import shown
from overtone.api.cli.journal import Journal
from overtone.client import Client, ImportEntry, ImportResult
from overtone.errors import OvertoneError

MAX_BYTES = 8 << 20
"""Of one adapter: what an import may send."""
OUTCOMES = ("created", "updated", "unchanged", "refused", "skipped")
"""skipped: an earlier run has it."""


@dataclass(frozen=True)
class Naming:
    """What entries become. place: of the source, whose last part names an adapter that is the source itself."""

    place: str
    prefix: str = ""
    labels: Mapping[str, str] | None = None
    tenant: str | None = None

    def id_of(self, entry: Entry) -> str:
        return self.prefix + (entry.name.replace("/", ".") or PurePath(self.place.rstrip("/")).name.partition(".")[0])


@dataclass
class Tally:
    """Counts by outcome; examples: the first adapter that was refused for each reason, and why."""

    outcomes: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(OUTCOMES, 0)))
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[str, OvertoneError]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def count(self, result: ImportResult) -> None:
        self.outcomes[result.outcome] += 1
        if result.error is not None:
            self.reasons[result.error.reason] += 1
            self.examples.setdefault(result.error.reason, (result.id, result.error))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class ImportRun:
    """Iterate over `results` once. Entries are read in another thread, a few hundred ahead of what is acknowledged."""

    def __init__(self, source: Source, naming: Naming, journal: Journal, *, stop_on_error: bool) -> None:
        self._source, self._naming, self._journal = source, naming, journal
        self._stop_on_error = stop_on_error
        self._sent: deque[bytes] = deque()
        self._unreadable: deque[ImportResult] = deque()
        self.tally = Tally()

    def results(self, client: Client) -> Iterator[ImportResult]:
        """As they come. Ends early at the first refusal if it is to stop there. Raises what ends the import."""
        for result in client.adapters.import_many(self._entries()):
            mark = self._sent.popleft()
            if result.error is None:
                self._journal.add(mark)
            yield from self._told(result)
            if self._stopped:
                return
        yield from self._told()

    @property
    def _stopped(self) -> bool:
        return self._stop_on_error and bool(self.tally.reasons)

    def _told(self, *results: ImportResult) -> Iterator[ImportResult]:
        """These, behind those that could not be read meanwhile."""
        unreadable = [self._unreadable.popleft() for _ in range(len(self._unreadable))]
        for result in (*unreadable, *results):
            self.tally.count(result)
            yield result

    def _entries(self) -> Iterator[ImportEntry]:
        with closing(self._source.entries) as entries:
            for entry in entries:
                if entry.mark in self._journal:
                    self.tally.outcomes["skipped"] += 1
                    continue
                made = self._made(entry)
                if made is not None:
                    self._sent.append(entry.mark)
                    yield made
                elif self._stop_on_error:
                    return

    def _made(self, entry: Entry) -> ImportEntry | None:
        """None if it cannot be read, or if it cannot be called what it is."""
        adapter_id = self._naming.id_of(entry)
        try:
            check_id(adapter_id)
            files = entry.read()
        except OvertoneError as error:
            self._unreadable.append(ImportResult(shown(adapter_id), "refused", "", error))
            return None
        named = {files.layout.config: files.config, files.layout.weights: files.weights}
        return ImportEntry(adapter_id, named, self._naming.labels, self._naming.tenant)
