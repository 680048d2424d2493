"""The right to use one version of an adapter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from overtone.adapters.resident import ResidentAdapter


class Lease:
    """`adapter` stays in memory until `release`, whatever happens to its id; `release` may be called more than once."""

    def __init__(self, adapter_id: str, adapter: ResidentAdapter, release: Callable[[], None]) -> None:
        self.adapter_id = adapter_id
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
