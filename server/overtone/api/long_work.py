"""Work of seconds to hours in a thread, told of while it runs: as progress, or by the bytes that it writes."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, Generic, ParamSpec, TypeVar

from overtone.adapters.operations import Progress
from overtone.errors import Cancelled

P = ParamSpec("P")
T = TypeVar("T")

_PERIOD_S = 0.25
_PIECE_BYTES = 256 << 10


async def to_its_end(work: Awaitable[T]) -> T:
    """Its result. Whoever waits and is cancelled meanwhile is so once the work has ended: limits hold, and lines in the log
    are written, as long as something goes on."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        _forget(task)
        raise cancelled
    return task.result()


def uninterrupted(handler: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The handler of a call that goes `to_its_end` though its client leaves: what it changes, and its line in the log."""

    @functools.wraps(handler)
    async def call(*arguments: P.args, **more: P.kwargs) -> T:
        return await to_its_end(handler(*arguments, **more))

    return call


class Reported(Generic[T]):
    """How far some work has come, then its result. If nobody iterates any more it is stopped at its next report, and
    the iterator ends with it."""

    def __init__(self, work: Callable[[Progress], T], run: Callable[[Callable[[], T]], Awaitable[T]]) -> None:
        """run: runs something in a thread."""
        self._work, self._run = work, run
        self._latest: tuple[int, int] | None = None
        self._left = False

    def _progress(self, done: int, total: int) -> None:
        if self._left:
            raise Cancelled("nobody waits for it any more")
        self._latest = done, total

    async def progress(self) -> AsyncGenerator[tuple[int, int], None]:
        """(bytes done, bytes in all) where it changed, a few times a second, until the end. Raises what the work raises."""
        task = asyncio.ensure_future(self._run(lambda: self._work(self._progress)))
        told = None
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_PERIOD_S)
                if self._latest is not None and self._latest != told:
                    told = self._latest
                    yield told
            self.result = task.result()
        finally:
            self._left = True
            await to_its_end(asyncio.wait({task}))
            _forget(task)


class Pipe:
    """A binary file for a thread whose pieces an event loop reads. The writer waits for the reader: it holds two pieces."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        self._rest = bytearray()
        self._left = False

    def write(self, data: bytes) -> int:
        """For the thread. Raises `Cancelled` once nobody reads any more."""
        self._rest += data
        if len(self._rest) >= _PIECE_BYTES:
            self.flush()
        return len(data)

    def flush(self) -> None:
        self._put(bytes(self._rest))
        self._rest.clear()

    def _put(self, piece: bytes | None) -> None:
        if self._left:
            raise Cancelled("nobody reads it any more")
        asyncio.run_coroutine_threadsafe(self._pieces.put(piece), self._loop).result()

    def _fill(self, write: Callable[[Pipe], None]) -> None:
        try:
            write(self)
            self.flush()
        finally:
            self._put(None)

    async def pieces(
        self, write: Callable[[Pipe], None], run: Callable[[Callable[[], None]], Awaitable[None]]
    ) -> AsyncGenerator[bytes, None]:
        """What `write`, in a thread, writes into this pipe. Raises what it raises."""
        task = asyncio.ensure_future(run(lambda: self._fill(write)))
        try:
            while (piece := await self._pieces.get()) is not None:
                if piece:
                    yield piece
            await asyncio.shield(task)
        finally:
            self._left = True
            while not self._pieces.empty():
                self._pieces.get_nowait()
            await to_its_end(asyncio.wait({task}))
            _forget(task)


def _forget(task: asyncio.Future[T]) -> None:
    """Whatever it raised: whoever waited was told or is gone."""
    if not task.cancelled():
        task.exception()
