"""Adapters in memory, within a budget of bytes."""

from overtone.adapters.residency.cache import Residency, State
from overtone.adapters.residency.contents import ENTRY_BYTES

__all__ = ["ENTRY_BYTES", "Residency", "State"]
