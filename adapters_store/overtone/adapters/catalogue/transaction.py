"""One change of the catalogue, with the kept counts that it changes."""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta

from overtone.adapters.packs import OWN_FILE, Place

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


class Transaction:
    """`uses`, `kinds`, `adapters`, `versions`: what is added to the uses of a blob and of a kind and to the numbers of rows.

    Written once, before the commit, because thousands of adapters in one transaction share a few blobs and one kind.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.uses: Counter[int] = Counter()
        self.kinds: Counter[int] = Counter()
        self.adapters = self.versions = 0
        # Pack -> [what its live blobs and their bytes change by, where its last blob ends].
        self._packs: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0, 0])

    def now(self) -> int:
        """Microseconds since 1970; never before an adapter was created, even if the clock was set back."""
        newest = self.db.execute("SELECT create_time FROM adapters ORDER BY adapter DESC LIMIT 1").fetchone()
        return max((datetime.now(UTC) - EPOCH) // MICROSECOND, newest[0] if newest else 0)

    def came(self, place: Place) -> None:
        """A blob is at `place` now."""
        pack = self._packs[place.pack]
        pack[0] += 1
        pack[1] += place.length
        if place.pack != OWN_FILE:
            pack[2] = max(pack[2], place.end)

    def left(self, pack: int, length: int) -> None:
        """A blob is in a pack no more."""
        self._packs[pack][0] -= 1
        self._packs[pack][1] -= length

    def write_counts(self) -> None:
        if self.adapters or self.versions:
            rows = self.adapters, self.versions
            self.db.execute("UPDATE counters SET adapters = adapters + ?, versions = versions + ?", rows)
        self.write_uses()
        self.db.executemany("UPDATE kinds SET uses = uses + ?2 WHERE kind = ?1", self.kinds.items())
        self.db.executemany("DELETE FROM kinds WHERE kind = ? AND uses = 0", [(kind,) for kind in self.kinds])
        self.db.executemany(
            "INSERT INTO packs VALUES (?, 0, 0, 0) ON CONFLICT DO NOTHING", [(pack,) for pack in self._packs]
        )
        self.db.executemany(
            "UPDATE packs SET live_count = live_count + ?2, live_bytes = live_bytes + ?3, size = max(size, ?4) "
            "WHERE pack = ?1",
            [(pack, *changes) for pack, changes in self._packs.items()],
        )

    def write_uses(self) -> None:
        """Also called before somebody asks what is not used any more."""
        self.db.executemany("UPDATE blobs SET uses = uses + ?2 WHERE blob = ?1", self.uses.items())
        self.uses.clear()
