"""ExportAdapters: adapters as a tar archive, written while it is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import BinaryIO, cast

from overtone.api.backend import Backend
from overtone.api.change_log import ChangeLog
from overtone.api.long_work import Pipe
from overtone.api.resources import adapter_id
from overtone.api.status import Context
from overtone.errors import InvalidRequest, Overloaded
from overtone.v1 import adapters_pb2 as pb

MAX_EXPORTS = 2
MAX_NAMES = 10_000


class Exports:
    """All exports of a server."""

    def __init__(self, log: ChangeLog) -> None:
        self._log = log
        self._streams = asyncio.Semaphore(MAX_EXPORTS)

    async def run(
        self, backend: Backend, request: pb.ExportAdaptersRequest, context: Context
    ) -> AsyncGenerator[pb.ExportAdaptersResponse, None]:
        """Raises what `AdapterStore.export` raises."""
        if not 1 <= len(request.names) <= MAX_NAMES:
            raise InvalidRequest(f"names must have 1 to {MAX_NAMES} entries, not {len(request.names)}", field="names")
        ids = [adapter_id(name, "names") for name in request.names]
        if self._streams.locked():
            raise Overloaded(f"{MAX_EXPORTS} exports are under way already", retry_after_s=5.0)

        def write(pipe: Pipe) -> None:
            backend.store.export(ids, cast(BinaryIO, pipe))

        async with self._streams:
            with self._log.change("ExportAdapters", context) as change:
                change.fields |= {"adapters": len(ids), "bytes": 0}
                pipe = Pipe(asyncio.get_running_loop())
                async with aclosing(pipe.pieces(write, backend.in_upkeep)) as pieces:
                    async for piece in pieces:
                        yield pb.ExportAdaptersResponse(data=piece)
                        change.fields["bytes"] += len(piece)
