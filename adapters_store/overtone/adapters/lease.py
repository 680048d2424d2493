"""The right to use versions of adapters."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from overtone.adapters.resident import ResidentAdapter


@dataclass(frozen=True)
class Share:
    """What a lease holds of one adapter. adapter_id: empty for one that is not in the catalogue."""

    adapter_id: str
    digest: str
    weight: float = 1.0


class Lease:
    """`adapter` stays in memory until `release`, whatever happens to its id; `release` may be called more than once.

    shares: the versions that it consists of, in the order of their digests.
    """

    def __init__(self, shares: tuple[Share, ...], adapter: ResidentAdapter, release: Callable[[], None]) -> None:
        self.shares = shares
        self.adapter = adapter
        self._release: Callable[[], None] | None = release
        self._lock = threading.Lock()

    def release(self) -> None:
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
