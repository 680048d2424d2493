"""Stores of blobs for tests: opened, killed and opened again, on a disk that can be told to fail."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from overtone.adapters.packs import Blobs, Remote, StoreFolder, digest_of, disk
from support.blob_index import MemoryIndex

STEPS = ("create", "write_all", "sync", "sync_folder", "truncate", "replace", "unlink")
"""What changes the disk."""


def blobs_of(*lengths: int, seed: int = 0) -> dict[str, bytes]:
    """Digest -> blob of each length."""
    rng = random.Random(seed)
    made = [rng.randbytes(length) for length in lengths]
    return {digest_of(blob): blob for blob in made}


class Killed(BaseException):
    """The process ends here: nothing that it would still do happens."""


class Disk:
    """Patches `overtone.adapters.packs.disk` while it is used as a context."""

    def __init__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        self.calls: list[str] = []
        self.dead = False

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *exc: object) -> None:
        self._patch.undo()

    def wrap(self, names: Iterable[str], around: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]) -> None:
        for name in names:
            real = getattr(disk, name)

            def call(*args: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
                return around(name, real, args)

            self._patch.setattr(disk, name, call)

    def refuse(self, name: str, *, after: int = 0, times: int = 10**9, errno: int = 28) -> None:
        """Of the calls of `name` those from number `after` on fail, `times` of them; a write halfway."""

        def around(name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            self.calls.append(name)
            if after < len(self.calls) <= after + times:
                if name == "write_all":
                    _write_half(real, args)
                raise OSError(errno, "No space left on device", "/some/secret/path")
            return real(*args)

        self.wrap([name], around)

    def kill(self, step: int, index: MemoryIndex) -> None:
        """The change of the disk or of the index with number `step` does not happen, a write halfway, and none after."""

        def counted(name: str) -> None:
            self.calls.append(name)
            if self.dead or len(self.calls) > step:
                self.dead = True
                raise Killed

        def around(name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            try:
                counted(name)
            except Killed:
                if name == "write_all" and len(self.calls) == step + 1:
                    _write_half(real, args)
                raise
            return real(*args)

        self.wrap(STEPS, around)
        self._patch.setattr(index, "before_commit", lambda: counted("commit"))


def _write_half(write: Callable[..., None], args: tuple[int, Sequence[bytes], int]) -> None:
    handle, buffers, offset = args
    whole = b"".join(buffers)
    write(handle, [whole[: len(whole) // 2]], offset)


class Store:
    """A folder and an index that outlive the `Blobs` in between."""

    def __init__(self, root: Path, remote: Remote | None = None, **options: Any) -> None:
        self.root, self.remote, self.options = root, remote, options
        self.index = MemoryIndex()
        self.open()

    def open(self) -> Blobs:
        self.folder = StoreFolder(self.root)
        self.blobs = Blobs(self.folder, self.index, self.remote, **self.options)
        return self.blobs

    def close(self) -> None:
        self.blobs.close()
        self.folder.close()

    def reopen(self) -> Blobs:
        """What a kill leaves is the same as what `close` leaves: it writes nothing."""
        self.close()
        return self.open()

    def put(self, blobs: Mapping[str, bytes]) -> None:
        with self.blobs.store(blobs) as places:
            self.index.commit(places)

    def put_all(self, *lengths: int, seed: int = 0) -> dict[str, bytes]:
        blobs = blobs_of(*lengths, seed=seed)
        self.put(blobs)
        return blobs

    def release(self, digests: Iterable[str]) -> None:
        self.blobs.release(list(digests))

    def pack_files(self) -> list[str]:
        return sorted(path.name for path in self.folder.packs.iterdir())

    def own_files(self) -> set[str]:
        return {path.stem for path in self.folder.blobs.rglob("*.safetensors")}

    def set_aside(self) -> list[Path]:
        return sorted(self.folder.quarantine.iterdir())

    def damage(self, digest: str, byte: int = 0) -> None:
        """Flips a bit of a blob on the disk."""
        place = self.index.places[digest]
        path = self.folder.pack(place.pack) if place.pack else self.folder.own(digest)
        with path.open("r+b") as file:
            file.seek((place.data if place.pack else 0) + byte)
            old = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([old[0] ^ 1]))

    def assert_whole(self, blobs: Mapping[str, bytes]) -> None:
        """These are there, and there is nothing wrong, garbage included."""
        self.assert_sound(blobs)
        assert self.blobs.check(deep=True) == []

    def assert_sound(self, blobs: Mapping[str, bytes]) -> None:
        assert {digest: self.blobs.read(digest) for digest in blobs} == dict(blobs)
        assert not [problem for problem in self.blobs.check(deep=True) if not problem.garbage]


@contextmanager
def small_own_files(length: int) -> Iterator[None]:
    """Blobs of `length` bytes and more get files of their own, so that tests need no megabytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("overtone.adapters.packs.blobs.OWN_FILE_BYTES", length)
        yield
