"""Bridges to and from other formats, offline: pickles and authors' layouts to what the server accepts, anything to LoRA."""

from overtone.adapters.bridges.draft import Draft
from overtone.adapters.bridges.export import Exported, to_lora
from overtone.adapters.bridges.layouts import normalised
from overtone.adapters.bridges.low_rank import Choice, Fitted
from overtone.adapters.bridges.own_families import to_loca, with_basis, with_integer_indices
from overtone.adapters.bridges.source import Source, read_source
from overtone.adapters.bridges.target import check_target, write_folder

__all__ = [
    "Choice",
    "Draft",
    "Exported",
    "Fitted",
    "Source",
    "check_target",
    "normalised",
    "read_source",
    "to_loca",
    "to_lora",
    "with_basis",
    "with_integer_indices",
    "write_folder",
]
