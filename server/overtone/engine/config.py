"""Limits of the engine, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from overtone.errors import ConfigError

_COUNTS = (
    "max_batch",
    "max_step_tokens",
    "max_context_tokens",
    "page_tokens",
    "cache_pages",
    "max_queue",
    "max_queue_tokens",
)


def check_step_tokens(max_step_tokens: int, max_batch: int) -> None:
    """Raises `ConfigError` if a full batch does not fit into a step."""
    if max_step_tokens < max_batch:
        raise ConfigError(
            f"max_step_tokens ({max_step_tokens}) must not be below max_batch ({max_batch}): every running request "
            "decodes one token a step",
            field="max_step_tokens",
        )


def check_queue_share(share: float) -> None:
    """Raises `ConfigError` for a part of the queue that is none."""
    if not 0 < share <= 1:
        raise ConfigError(f"max_queue_share must be above 0 and at most 1, not {share:g}", field="max_queue_share")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """max_batch: requests in one step; max_step_tokens: packed tokens in one step; cache_pages: pages of the KV cache
    beside page 0, which stays empty; max_queue: requests that may wait; max_queue_tokens: tokens that they may need at most,
    prompt and completion together; max_queue_share: the part of both that one tenant may hold, in (0, 1]; prefix_cache:
    whether requests share pages; deterministic: whether they share those of prompts only; tenant_weights: shares of the
    service, 1 for a tenant that is not named."""

    max_batch: int = 64
    max_step_tokens: int = 512
    max_context_tokens: int = 2048
    page_tokens: int = 16
    cache_pages: int = 1024
    max_queue: int = 512
    max_queue_tokens: int = 1 << 21
    max_queue_share: float = 0.5
    prefix_cache: bool = True
    deterministic: bool = False
    tenant_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}", field=name)
        check_queue_share(self.max_queue_share)
        for tenant, weight in self.tenant_weights.items():
            if not (weight > 0 and math.isfinite(weight)):
                raise ConfigError(f"tenant_weight of {tenant!r} must be above 0, not {weight:g}", field="tenant_weight")
        check_step_tokens(self.max_step_tokens, self.max_batch)
        if self.cache_pages * self.page_tokens < self.max_context_tokens:
            raise ConfigError(
                f"the KV cache holds {self.cache_pages * self.page_tokens} tokens, less than one context of "
                f"{self.max_context_tokens}: raise kv_cache_mib or lower max_context_tokens",
                field="kv_cache_mib",
            )

    @property
    def tenant_queue(self) -> int:
        """Requests of one tenant that may wait."""
        return math.ceil(self.max_queue * self.max_queue_share)

    @property
    def tenant_queue_tokens(self) -> int:
        """Tokens that they may need."""
        return math.ceil(self.max_queue_tokens * self.max_queue_share)
