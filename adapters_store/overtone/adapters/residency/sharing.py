"""Bytes of what several adapters in memory use: counted once, from the first of them to the last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class _Part:
    __slots__ = ("busy", "nbytes", "users")

    def __init__(self) -> None:
        self.nbytes = self.users = self.busy = 0


class SharedBytes:
    """total: bytes of all that is shared; idle: of that whose users are all idle, so that it goes with them. Of one key it
    is the largest size that its users have named. Not thread-safe."""

    def __init__(self) -> None:
        self.total = self.idle = 0
        self._parts: dict[str, _Part] = {}

    def add(self, shared: Mapping[str, int]) -> dict[str, int]:
        """One more user of these keys, a busy one. Returns their sizes so far, for `undo`."""
        before = {}
        for key in shared:
            part = self._parts.setdefault(key, _Part())
            before[key] = part.nbytes
            part.users += 1
        self.wake(shared)
        for key, nbytes in shared.items():
            self._resize(self._parts[key], max(nbytes, before[key]))
        return before

    def undo(self, before: Mapping[str, int]) -> None:
        """As if the last `add` had not been."""
        for key, nbytes in before.items():
            self._resize(self._parts[key], nbytes)
        self.remove(before)

    def remove(self, keys: Iterable[str]) -> None:
        """One user less, a busy one."""
        keys = tuple(keys)
        self.rest(keys)
        for key in keys:
            part = self._parts[key]
            part.users -= 1
            if not part.users:
                del self._parts[key]
                self.total -= part.nbytes
                self.idle -= part.nbytes

    def rest(self, keys: Iterable[str]) -> None:
        """A user of these keys is idle from now on."""
        for key in keys:
            part = self._parts[key]
            part.busy -= 1
            if not part.busy:
                self.idle += part.nbytes

    def wake(self, keys: Iterable[str]) -> None:
        """A user of these keys is idle no more."""
        for key in keys:
            part = self._parts[key]
            if not part.busy:
                self.idle -= part.nbytes
            part.busy += 1

    def growth(self, shared: Mapping[str, int]) -> int:
        """Bytes that one more user of these keys adds."""
        return sum(max(0, nbytes - self._nbytes(key)) for key, nbytes in shared.items())

    def idle_among(self, keys: Iterable[str]) -> int:
        """What of `idle` is that of these keys."""
        return sum(self._nbytes(key) for key in keys if key in self._parts and not self._parts[key].busy)

    def _nbytes(self, key: str) -> int:
        part = self._parts.get(key)
        return 0 if part is None else part.nbytes

    def _resize(self, part: _Part, nbytes: int) -> None:
        """Of one that a busy user has."""
        self.total += nbytes - part.nbytes
        part.nbytes = nbytes
