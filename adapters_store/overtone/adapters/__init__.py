"""Adapters on disk and in memory: family parsers, canonical blobs, catalogue, residency. Knows no model and no request."""

from overtone.adapters.base import BaseDescription
from overtone.adapters.families import ParsedAdapter, parse_adapter
from overtone.adapters.residency import ResidentAdapter, ResidentDelta
from overtone.adapters.store import AdapterRecord, AdapterStore, Lease, StoreConfig, StoreStats, Upload

__all__ = [
    "AdapterRecord",
    "AdapterStore",
    "BaseDescription",
    "Lease",
    "ParsedAdapter",
    "ResidentAdapter",
    "ResidentDelta",
    "StoreConfig",
    "StoreStats",
    "Upload",
    "parse_adapter",
]
