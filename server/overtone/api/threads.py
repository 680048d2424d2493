"""Blocking work beside the event loop, when its caller may go away before it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


async def run_abandonable(executor: Executor, work: Callable[[], T], undo: Callable[[T], object]) -> T:
    """Runs `work` in a thread. If the caller is cancelled meanwhile, `undo` gets the result that nobody waits for."""
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(executor, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:

        def discard(done: asyncio.Future[T]) -> None:
            if not done.cancelled() and done.exception() is None:
                try:
                    loop.run_in_executor(executor, undo, done.result())
                except RuntimeError:  # the threads have ended meanwhile
                    undo(done.result())

        future.add_done_callback(discard)
        raise


async def run_detached(work: Callable[[], T], undo: Callable[[T], object]) -> T:
    """The same in a thread of its own that does not keep the process from ending: for work that may take minutes."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            if error is None:
                undo(result)  # type: ignore[arg-type]
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:  # the loop is closed: nobody waits
            if error is None:
                undo(result)  # type: ignore[arg-type]

    threading.Thread(target=run, name="overtone-load", daemon=True).start()
    return await future
