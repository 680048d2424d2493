"""WatchAdapters: what happens to adapters, as it happens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from functools import partial

from overtone.adapters.store import AdapterRecord, AdapterStore
from overtone.api import resources
from overtone.api.backend import Backend
from overtone.api.changes import Change
from overtone.errors import AdapterNotFound, InvalidRequest, Overloaded
from overtone.v1 import adapters_pb2 as pb

HEARTBEAT_S = 15.0
MAX_WATCHERS = 256
_PAGE = 200
"""Adapters in one message of the snapshot: with the longest labels they still fit."""
_KINDS = {
    "created": pb.AdapterEvent.KIND_CREATED,
    "updated": pb.AdapterEvent.KIND_UPDATED,
    "deleted": pb.AdapterEvent.KIND_DELETED,
}


class Watches:
    """All watches of a server."""

    def __init__(self, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._heartbeat_s = heartbeat_s
        self._count = 0

    async def run(
        self, backend: Backend, request: pb.WatchAdaptersRequest
    ) -> AsyncGenerator[pb.WatchAdaptersResponse, None]:
        """Until the client leaves. Raises `WatchExpired`, `Draining`."""
        if self._count >= MAX_WATCHERS:
            raise Overloaded(f"{MAX_WATCHERS} watches are under way already", retry_after_s=5.0)
        self._count += 1
        try:
            async with aclosing(self._run(backend, request)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._count -= 1

    async def _run(
        self, backend: Backend, request: pb.WatchAdaptersRequest
    ) -> AsyncGenerator[pb.WatchAdaptersResponse, None]:
        changes = backend.changes
        position = changes.position_of(request.resume_token) if request.resume_token else changes.position
        if request.snapshot:
            if request.resume_token:
                raise InvalidRequest("set resume_token or snapshot, not both", field="snapshot")
            async for page in self._snapshot(backend, position):
                yield page
        caught_up = False
        while True:
            found = changes.since(position)
            if not found and caught_up:
                found = await changes.after(position, self._heartbeat_s)
            position += len(found)
            response = await backend.in_watch(partial(_response, backend.store, found))
            response.resume_token, response.caught_up = changes.token(position), not found and not caught_up
            yield response
            caught_up |= not found

    async def _snapshot(self, backend: Backend, position: int) -> AsyncGenerator[pb.WatchAdaptersResponse, None]:
        token = ""
        while True:
            response, token = await backend.in_watch(partial(_page, backend.store, token))
            yield response
            if not token:
                return
            backend.changes.check_open()
            backend.changes.since(position)  # if it is too late already the rest is not worth sending


def _page(store: AdapterStore, token: str) -> tuple[pb.WatchAdaptersResponse, str]:
    records, following = store.list(_PAGE, token)
    return pb.WatchAdaptersResponse(events=[_existing(store, record) for record in records]), following


def _existing(store: AdapterStore, record: AdapterRecord) -> pb.AdapterEvent:
    return pb.AdapterEvent(kind=pb.AdapterEvent.KIND_EXISTING, adapter=resources.adapter(store, record))


def _response(store: AdapterStore, changes: Sequence[Change]) -> pb.WatchAdaptersResponse:
    return pb.WatchAdaptersResponse(events=_events(store, changes))


def _events(store: AdapterStore, changes: Sequence[Change]) -> list[pb.AdapterEvent]:
    """An adapter that is gone again has no event but its deletion."""
    alive = _read(store, {change.adapter_id for change in changes if change.kind != "deleted"})
    events = []
    for change in changes:
        if change.kind == "deleted":
            deleted = pb.Adapter(name=f"adapters/{change.adapter_id}")
            events.append(pb.AdapterEvent(kind=_KINDS[change.kind], adapter=deleted))
        elif change.adapter_id in alive:
            events.append(pb.AdapterEvent(kind=_KINDS[change.kind], adapter=alive[change.adapter_id]))
    return events


def _read(store: AdapterStore, adapter_ids: Iterable[str]) -> dict[str, pb.Adapter]:
    found = {}
    for adapter_id in adapter_ids:
        try:
            found[adapter_id] = resources.adapter(store, store.get(adapter_id))
        except AdapterNotFound:
            continue
    return found
