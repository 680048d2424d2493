"""Object storage as a further tier: a thread that uploads and evicts, and what others ask of it."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from overtone.adapters.packs.eviction import Budget, Evictor
from overtone.adapters.packs.farther import Fetcher
from overtone.adapters.packs.parts import Parts
from overtone.adapters.packs.remote import Remote
from overtone.adapters.packs.uploads import Stopped, Uploader
from overtone.errors import StoreFailed

_log = logging.getLogger(__name__)
_AT_CLOSE_BYTES, _AT_CLOSE_S = 64 << 20, 10.0
"""What may be uploaded while the store is closed, and for how long that may go on."""
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class RemoteStats:
    """Counts since the store was opened. `pending_packs`: sealed, and not uploaded yet; `last_error`: "" after a pass of
    uploads and evictions that went well; `fetch_failures`: reads that object storage did not answer rightly."""

    pending_packs: int
    uploads: int
    failed_passes: int
    evictions: int
    fetches: int
    fetch_failures: int
    last_error: str


class Tier:
    """Nobody waits for the thread but who calls `upload` or `close`."""

    def __init__(self, parts: Parts, remote: Remote, disk_bytes: int, upload_age_s: float) -> None:
        """disk_bytes: what may stay on the disk, 0: everything. upload_age_s: after how long the active pack is uploaded
        although it grows, 0: never."""
        self._budget = Budget(disk_bytes)
        self.fetcher = Fetcher(parts, remote, self._grew)
        self._writer, self._active = parts.writer, parts.writer.active
        self._uploader, self._evictor = Uploader(parts, remote), Evictor(parts, remote)
        self._age_s, self._aged = upload_age_s, time.monotonic()
        self._passing = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._failures, self._failed_passes, self._last_error = 0, 0, ""
        self._wake.set()
        self._thread = threading.Thread(target=self._run, name="overtone-object-storage", daemon=True)
        self._thread.start()

    def stored(self, digests: Iterable[str], nbytes: int) -> None:
        """Own files were written or removed, `nbytes` came to the disk."""
        digests = list(digests)
        self._uploader.changed(digests)
        if digests:
            self._wake.set()
        self._grew(nbytes)

    def _grew(self, nbytes: int) -> None:
        self._budget.grew(nbytes)
        active, before = self._writer.active, self._active
        self._active = active
        if active != before or self._budget.pressing:  # a pack is full, or there is too much
            self._wake.set()

    def wake(self) -> None:
        self._wake.set()

    def upload(self) -> None:
        """Everything that is committed is uploaded on return, the active pack's part too. Raises `StoreFailed`."""
        try:
            with self._passing:
                self._pass(active=True)
        except Stopped as error:
            raise StoreFailed("cannot upload adapters: the store is being closed") from error

    def _pass(self, *, active: bool) -> None:
        try:
            self._uploader.run(active=active)
            self._evictor.trim(self._budget, self._uploader.changed)
        except Stopped:
            raise
        except Exception as error:
            self._failures, self._failed_passes = self._failures + 1, self._failed_passes + 1
            self._last_error = str(error)
            raise
        self._failures, self._last_error = 0, ""

    def _run(self) -> None:
        while True:
            self._wake.wait(self._age_s or None)
            if self._closing.is_set():
                return
            self._wake.clear()
            now = time.monotonic()
            aged = self._age_s > 0 and now - self._aged >= self._age_s
            try:
                with self._passing:
                    self._pass(active=aged)
                self._aged = now if aged else self._aged
            except Stopped:
                return
            except Exception as error:  # nobody else would hear of it, and the packs would stay here for ever
                doubled = _FIRST_RETRY_S * 2 ** min(self._failures - 1, 16)
                delay = min(doubled, _LAST_RETRY_S) * random.uniform(0.5, 1.0)
                _log.warning("object storage is tried again in %.1f s: %s", delay, error)
                self._wake.set()
                self._closing.wait(delay)

    def stats(self) -> RemoteStats:
        return RemoteStats(
            pending_packs=len(self._uploader.pending(active=False)),
            uploads=self._uploader.uploaded,
            failed_passes=self._failed_passes,
            evictions=self._evictor.evicted,
            fetches=self.fetcher.fetched,
            fetch_failures=self.fetcher.failed,
            last_error=self._last_error,
        )

    def _upload_last(self) -> None:
        stopper = threading.Timer(_AT_CLOSE_S, self._uploader.stop)
        stopper.daemon = True
        stopper.start()
        try:
            if self._uploader.pending_bytes() <= _AT_CLOSE_BYTES:
                self.upload()
        except Exception as error:  # closing must go on
            _log.warning("the last adapters are uploaded after the next start: %s", error)
        finally:
            stopper.cancel()

    def close(self) -> None:
        """Uploads what is left if it is little and object storage answers. Else stops in the middle of an upload; the next
        start begins it again."""
        self._closing.set()
        self._wake.set()
        if self._age_s and not self._last_error:
            self._upload_last()
        self._uploader.stop()
        self._wake.set()
        self._thread.join()
