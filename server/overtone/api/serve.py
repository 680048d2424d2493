"""The server as a process: from start to the signal that ends it."""

from __future__ import annotations

import asyncio
import logging
import signal

from overtone.api import access_log
from overtone.api.config import ServerConfig
from overtone.api.server import Server
from overtone.errors import EngineError

log = logging.getLogger(__name__)


def run(config: ServerConfig) -> None:
    """Serves until SIGTERM or SIGINT; drains then. A second signal ends at once."""
    import torch

    access_log.configure(config.log_format, config.log_level)
    threads = config.threads or torch.get_num_threads()
    # Every thread that computes in parallel keeps a team of its own, and once there are more threads in teams than cores
    # OpenMP's waits become slow: the engine alone has a team (a token then takes half the time).
    torch.set_num_threads(1)
    asyncio.run(_serve(config, threads))


async def _serve(config: ServerConfig, threads: int) -> None:
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    server = Server(config, threads)
    await server.start()
    loading = asyncio.create_task(server.load())
    first = asyncio.create_task(signals.get())
    died = asyncio.create_task(server.died.wait())
    try:
        await asyncio.wait({loading, first}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            await asyncio.wait({first, died}, return_when=asyncio.FIRST_COMPLETED)
        log.info("draining", extra={"fields": {"seconds": config.drain_seconds}})
    finally:
        loading.cancel()
        second = asyncio.create_task(signals.get())
        stopping = asyncio.create_task(server.stop())
        await asyncio.wait({stopping, second}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            await server.stop(0)
        await stopping
    log.info("stopped")
    if server.died.is_set():
        raise EngineError("the engine failed; the log has the reason")
