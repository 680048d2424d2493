"""Adapters on disk and in memory: family parsers, canonical blobs, catalogue, residency. Knows no model and no request."""

from overtone.adapters.base import BaseDescription
from overtone.adapters.families import ParsedAdapter, ParserContext, parse_adapter
from overtone.adapters.files import AdapterFiles
from overtone.adapters.resident import ResidentAdapter
from overtone.adapters.store import AdapterRecord, AdapterStore, Lease, StoreConfig, StoreStats, Upload
from overtone.kernels import ResidentDelta

__all__ = [
    "AdapterFiles",
    "AdapterRecord",
    "AdapterStore",
    "BaseDescription",
    "Lease",
    "ParsedAdapter",
    "ParserContext",
    "ResidentAdapter",
    "ResidentDelta",
    "StoreConfig",
    "StoreStats",
    "Upload",
    "parse_adapter",
]
