"""Who may still wait: the limits of the queue, for all and for each tenant. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from overtone.engine.config import EngineConfig
from overtone.engine.types import Request
from overtone.errors import InvalidRequest, QueueFull

_RETRY_AFTER_S = 1.0


class QueueLoad:
    """What waits: requests, and the tokens that they may need at most; of all and by tenant. Only tenants of which
    something waits are kept."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self._tenants: dict[str, tuple[int, int]] = {}

    def of(self, tenant: str) -> tuple[int, int]:
        """(requests, tokens)."""
        return self._tenants.get(tenant, (0, 0))

    def count(self, request: Request, sign: int = 1) -> None:
        """It waits from now on; sign -1: no more."""
        self.requests += sign
        self.tokens += sign * request.max_tokens
        requests, tokens = self.of(request.tenant)
        if requests + sign:
            self._tenants[request.tenant] = (requests + sign, tokens + sign * request.max_tokens)
        else:
            del self._tenants[request.tenant]

    def copy(self) -> Self:
        other = type(self)()
        other.requests, other.tokens, other._tenants = self.requests, self.tokens, self._tenants.copy()
        return other


def check_queue(config: EngineConfig, load: QueueLoad, requests: Sequence[Request]) -> None:
    """Whether the requests, all of one tenant, may wait together beside `load`.

    Of max_queue places and max_queue_tokens tokens a tenant may hold the part max_queue_share, rounded up. Requests that
    would wait alone (for the share: alone of their tenant) are never refused for their tokens.

    Raises `QueueFull`, and `InvalidRequest` naming `n` if there are more requests than ever may wait.
    """
    new, tokens, tenant = len(requests), sum(request.max_tokens for request in requests), requests[0].tenant
    places = config.tenant_queue
    if new > places:
        limit = "max_queue" if places == config.max_queue else "max_queue_share"
        raise InvalidRequest(f"n: {new} completions, and at most {places} requests may wait ({limit})", field="n")
    if load.requests + new > config.max_queue:
        raise _full(f"{load.requests} requests are waiting already", "max_queue", config.max_queue)
    if load.requests and load.tokens + tokens > config.max_queue_tokens:
        problem = f"with this request up to {load.tokens + tokens} tokens would be waiting"
        raise _full(problem, "max_queue_tokens", config.max_queue_tokens)
    own, own_tokens = load.of(tenant)
    whose, most = f"tenant {tenant!r}", f"one tenant may have {config.max_queue_share:g} of the queue, which is"
    if own + new > places:
        problem = f"{own} requests of {whose} are waiting already, and {most} {places} requests"
    elif own and own_tokens + tokens > config.tenant_queue_tokens:
        problem = f"with this request up to {own_tokens + tokens} tokens of {whose} would be waiting, and {most} "
        problem += f"{config.tenant_queue_tokens} tokens"
    else:
        return
    raise _full(problem, "max_queue_share", config.max_queue_share)


def _full(problem: str, limit: str, value: float) -> QueueFull:
    return QueueFull(f"{problem} ({limit})", retry_after_s=_RETRY_AFTER_S, metadata={limit: f"{value:g}"})
