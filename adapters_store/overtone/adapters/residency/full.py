"""What is said of an adapter that has no room."""

from __future__ import annotations

from overtone.adapters.resident import ResidentAdapter
from overtone.errors import AdapterMemoryFull

_RETRY_AFTER_S = 1.0


def never_fits(nbytes: int, budget: int) -> AdapterMemoryFull:
    return AdapterMemoryFull(f"the adapter needs {nbytes} bytes and never fits the {budget} bytes for adapters")


def all_in_use(nbytes: int, budget: int) -> AdapterMemoryFull:
    message = f"all of the {budget} bytes for adapters are in use or pinned; {nbytes} more are needed"
    return AdapterMemoryFull(message, retry_after_s=_RETRY_AFTER_S)


def too_large(adapter: ResidentAdapter, budget: int) -> AdapterMemoryFull:
    """Of one that is loaded, with what it shares."""
    size = adapter.whole_nbytes
    message = f"the adapter needs {size} bytes with what it shares, more than is free of {budget} for adapters"
    return AdapterMemoryFull(message, retry_after_s=_RETRY_AFTER_S if size <= budget else None)
