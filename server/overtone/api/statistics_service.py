"""The statistics of adapters by RPC."""

from __future__ import annotations

import re
from functools import partial

from overtone.api import resources
from overtone.api.backend import Backend
from overtone.api.usage import ORDERS, Tally
from overtone.errors import InvalidRequest
from overtone.v1 import adapters_pb2 as pb

_DEFAULT_PAGE, _LARGEST_PAGE = 100, 1000
_ORDER = re.compile(r"([a-z0-9_.]+)( asc| desc)?")
_TOKEN = re.compile(r"[0-9]{1,9}")


async def get_statistics(backend: Backend, request: pb.GetAdapterStatisticsRequest) -> pb.AdapterStatistics:
    """Zeros for an adapter that was not used. Raises `AdapterNotFound`."""
    name = resources.id_of_statistics(request.name)
    usage = backend.statistics.get(name)
    if usage is None:
        usage = Tally().usage((await backend.in_store(partial(backend.store.get, name))).id)
    return resources.statistics(usage)


async def list_statistics(
    backend: Backend, request: pb.ListAdapterStatisticsRequest
) -> pb.ListAdapterStatisticsResponse:
    if request.page_size < 0:
        raise InvalidRequest(f"page_size is {request.page_size}, less than 0", field="page_size")
    size = min(request.page_size or _DEFAULT_PAGE, _LARGEST_PAGE)
    if request.page_token and not _TOKEN.fullmatch(request.page_token):
        raise InvalidRequest(f"{request.page_token[:100]!r} is no page token", field="page_token")
    skip = int(request.page_token or 0)
    order, descending = _order(request.order_by or "request_count desc")
    top = partial(backend.statistics.top, order, size + 1, skip, descending=descending)
    found = await backend.in_store(top)
    return pb.ListAdapterStatisticsResponse(
        statistics=map(resources.statistics, found[:size]),
        next_page_token=str(skip + size) if len(found) > size else "",
        tracked_count=backend.statistics.tracked,
        folded_count=backend.statistics.folded,
        other=resources.statistics(backend.statistics.other()),
    )


def _order(order_by: str) -> tuple[str, bool]:
    """The name of an order, and whether the largest come first."""
    match = _ORDER.fullmatch(order_by)
    if match is None or match[1] not in ORDERS:
        known = ", ".join(ORDERS)
        message = f"order_by must be one of {known}, perhaps with ' desc', not {order_by[:100]!r}"
        raise InvalidRequest(message, field="order_by")
    return match[1], match[2] == " desc"
