"""Which adapters there are: ids, their versions and options, and where the blobs are, in SQLite. Knows digests, but neither
files nor memory."""

from overtone.adapters.catalogue.catalogue import Catalogue, already_exists
from overtone.adapters.catalogue.opening import is_empty
from overtone.adapters.catalogue.types import Counts, Entry, Freed, Options, Outcome, Problem, Resolved

__all__ = [
    "Catalogue",
    "Counts",
    "Entry",
    "Freed",
    "Options",
    "Outcome",
    "Problem",
    "Resolved",
    "already_exists",
    "is_empty",
]
