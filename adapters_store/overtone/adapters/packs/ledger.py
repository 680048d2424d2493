"""Which packs object storage has, and which own files it has lost: a small file, replaced whole at every change."""

from __future__ import annotations

import json
import threading
import uuid
from dataclasses import asdict, dataclass

from overtone.adapters.failures import operation
from overtone.adapters.packs import disk
from overtone.adapters.packs.folder import StoreFolder
from overtone.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as the remote side described it after an upload. `etag`: "" where it gives none."""

    size: int
    etag: str


class Ledger:
    """Thread-safe. `store`: what the objects of this store lie below, made up once and never changed."""

    def __init__(self, folder: StoreFolder) -> None:
        """Raises `ConfigError` if the file is not one of ours: packs that are nowhere else may be named in it."""
        self._folder, self._path = folder, folder.root / "remote.json"
        self._lock = threading.Lock()
        self._packs: dict[int, Stored] = {}
        self._lost: frozenset[str] = frozenset()
        self.store = uuid.uuid4().hex
        try:
            with operation("read the list of remote packs"):
                text = disk.read_file(self._path) if self._path.exists() else b""
            if text:
                known = json.loads(text)
                self.store = str(known["store"])
                self._packs = {int(number): Stored(**facts) for number, facts in known["packs"].items()}
                self._lost = frozenset(map(str, known.get("lost", ())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError("adapters/remote.json of the store is broken", field="root") from error

    def pack_name(self, number: int) -> str:
        return f"{self.packs_below}/{number:08}.pack"

    @property
    def packs_below(self) -> str:
        """Where the packs lie."""
        return f"{self.store}/packs"

    def blob_name(self, digest: str) -> str:
        return f"{self.blobs_below(digest[0])}/{digest}"

    def blobs_below(self, digit: str) -> str:
        """Where the blobs lie whose digests begin with this digit."""
        return f"{self.store}/blobs/{digit}"

    @property
    def mark_name(self) -> str:
        """An object that is there if anything of this store is."""
        return f"{self.store}/store"

    @property
    def exists(self) -> bool:
        """Whether this store ever had an object storage."""
        return self._path.exists()

    def get(self, number: int) -> Stored | None:
        with self._lock:
            return self._packs.get(number)

    @property
    def nbytes(self) -> int:
        """Of all packs in object storage."""
        with self._lock:
            return sum(stored.size for stored in self._packs.values())

    def numbers(self) -> list[int]:
        with self._lock:
            return sorted(self._packs)

    def put(self, number: int, stored: Stored) -> None:
        """Durable on return. Raises `StoreFailed`, and nothing has changed then."""
        with self._lock:
            self._save({**self._packs, number: stored}, self._lost)

    def remove(self, number: int) -> None:
        with self._lock:
            if number in self._packs:
                self._save({n: stored for n, stored in self._packs.items() if n != number}, self._lost)

    def is_lost(self, digest: str) -> bool:
        """Whether the object of an own file was found broken, and was not uploaded since."""
        return digest in self._lost

    def mark_lost(self, digest: str, lost: bool) -> None:
        """Durable on return. Raises `StoreFailed`, and nothing has changed then."""
        with self._lock:
            if lost != (digest in self._lost):
                self._save(self._packs, self._lost ^ {digest})

    def save(self) -> None:
        """Keeps the name of the store."""
        with self._lock:
            self._save(self._packs, self._lost)

    def _save(self, packs: dict[int, Stored], lost: frozenset[str]) -> None:
        stored = {number: asdict(facts) for number, facts in sorted(packs.items())}
        known = {"store": self.store, "packs": stored, "lost": sorted(lost)}
        with operation("write the list of remote packs"):
            disk.replace_file(self._path, json.dumps(known, indent=1).encode(), self._folder.scratch())
        self._packs, self._lost = packs, lost
