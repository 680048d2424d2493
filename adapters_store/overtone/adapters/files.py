"""The two files that make an adapter, and what is refused in their place."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

from overtone.adapters.text import shown
from overtone.errors import InvalidAdapter


@dataclass(frozen=True)
class Layout:
    """The names of an adapter's two files. peft_type: what the configuration need not say because the names do."""

    config: str
    weights: str
    peft_type: str = ""


PEFT_LAYOUT = Layout("adapter_config.json", "adapter_model.safetensors")
PICA_LAYOUT = Layout("pica_config.json", "pica_adapter.safetensors", "PICA")
ARCHIVED_LAYOUT = Layout("overtone_adapter.json", "overtone_adapter.safetensors")
"""See `overtone.adapters.archive`."""
LAYOUTS = (PEFT_LAYOUT, PICA_LAYOUT, ARCHIVED_LAYOUT)
CONFIG_FILE, WEIGHTS_FILE = PEFT_LAYOUT.config, PEFT_LAYOUT.weights
CONFIG_FILES = frozenset(layout.config for layout in LAYOUTS)
FILE_NAMES = tuple(name for layout in LAYOUTS for name in (layout.config, layout.weights))
DOCUMENTATION = frozenset({"README.md", ".gitattributes"})
"""PEFT and the hub put these into every folder; they hold no weights, so ignoring them loses nothing."""


@dataclass(frozen=True)
class AdapterFiles:
    """The bytes of an adapter's two files."""

    config: bytes
    weights: bytes
    layout: Layout = PEFT_LAYOUT


def layout_of(names: Collection[str]) -> Layout:
    """The layout that these files make. Raises `InvalidAdapter` for a file too many or too few."""
    for name in names:
        check_file_name(name)
    layout = next((found for found in LAYOUTS if found.config in names or found.weights in names), PEFT_LAYOUT)
    for name in (layout.config, layout.weights):
        if name not in names:
            raise InvalidAdapter(f"{name} is missing", field=name)
    stray = next((name for name in names if name not in (layout.config, layout.weights)), None)
    if stray is not None:
        raise InvalidAdapter(f"{stray} belongs to another layout than {layout.config}", field=stray)
    return layout


MAX_CONFIG_BYTES = 64 * 1024

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04")


def _pickle_refused(file_name: str) -> InvalidAdapter:
    return InvalidAdapter(
        f"{shown(file_name)} is a pickle file; pickle files are never read here, because loading one runs code of its "
        "author: convert the folder with `overtone adapters convert`",
        field=shown(file_name),
    )


def check_file_name(file_name: str) -> None:
    """Raises `InvalidAdapter` unless `file_name` is one of `FILE_NAMES`."""
    if file_name in FILE_NAMES:
        return
    if PurePosixPath(file_name).suffix.lower() in _PICKLE_SUFFIXES:
        raise _pickle_refused(file_name)
    expected = ", or ".join(f"{layout.config} and {layout.weights}" for layout in LAYOUTS)
    raise InvalidAdapter(f"an adapter has no file {shown(file_name)!r}, only {expected}", field=shown(file_name))


def refuse_pickle(file_name: str, data: bytes) -> None:
    """Raises `InvalidAdapter` if bytes that turned out not to be what `file_name` promises start like a pickle.

    Only for bytes that already failed: a sound safetensors file begins with 0x80 whenever its header length ends so.
    """
    if data.startswith(_PICKLE_STARTS):
        raise _pickle_refused(file_name)
