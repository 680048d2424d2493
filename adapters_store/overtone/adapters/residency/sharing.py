"""Bytes of what several adapters in memory use: counted once, from the first of them to the last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class SharedBytes:
    """total: bytes of all that is shared. Of one key it is the largest size that its users have named. Not thread-safe."""

    def __init__(self) -> None:
        self.total = 0
        self._nbytes: dict[str, int] = {}
        self._users: dict[str, int] = {}

    def add(self, shared: Mapping[str, int]) -> dict[str, int]:
        """One more user of these keys. Returns their sizes so far, for `undo`."""
        before = {key: self._nbytes.get(key, 0) for key in shared}
        for key, nbytes in shared.items():
            self._users[key] = self._users.get(key, 0) + 1
            self._resize(key, max(nbytes, before[key]))
        return before

    def undo(self, before: Mapping[str, int]) -> None:
        """As if the last `add` had not been."""
        for key, nbytes in before.items():
            self._resize(key, nbytes)
        self.remove(before)

    def remove(self, keys: Iterable[str]) -> None:
        """One user less."""
        for key in keys:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self.total -= self._nbytes.pop(key)

    def freed(self, keys: Iterable[str], leaving: dict[str, int]) -> int:
        """Bytes that go with one more user, after those that `leaving` counts, to which it is added."""
        nbytes = 0
        for key in keys:
            leaving[key] = leaving.get(key, 0) + 1
            if leaving[key] == self._users[key]:
                nbytes += self._nbytes[key]
        return nbytes

    def _resize(self, key: str, nbytes: int) -> None:
        self.total += nbytes - self._nbytes.get(key, 0)
        self._nbytes[key] = nbytes
