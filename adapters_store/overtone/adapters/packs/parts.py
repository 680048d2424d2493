"""What everything that works on a store's blobs has in common."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from overtone.adapters.packs.folder import StoreFolder
from overtone.adapters.packs.handles import Handles
from overtone.adapters.packs.index import BlobIndex, PackFacts
from overtone.adapters.packs.ledger import Ledger
from overtone.adapters.packs.local import LocalBlobs
from overtone.adapters.packs.own import OwnFiles
from overtone.adapters.packs.recovery import recover
from overtone.adapters.packs.writer import Writer


@dataclass(frozen=True)
class Parts:
    """`removing`: held by whoever unlinks packs that the index knows, or must find them where they are."""

    folder: StoreFolder
    index: BlobIndex
    writer: Writer
    own: OwnFiles
    local: LocalBlobs
    handles: Handles
    ledger: Ledger
    removing: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def recovered(cls, folder: StoreFolder, index: BlobIndex, pack_bytes: int) -> Parts:
        """After `recover`. Raises `StoreFailed`, `ConfigError`."""
        known: Sequence[PackFacts] = sorted(index.packs(), key=lambda facts: facts.number)
        own, handles, ledger = OwnFiles(folder, index), Handles(folder), Ledger(folder)
        recover(folder, known, own)
        # The name of an object must not come to mean another pack.
        last = max([0, *(facts.number for facts in known), *ledger.numbers()])
        writer = Writer(folder, known, last, pack_bytes)
        return cls(folder, index, writer, own, LocalBlobs(folder, own, handles), handles, ledger)
