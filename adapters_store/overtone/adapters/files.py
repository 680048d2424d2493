"""The two files that make an adapter, and what is refused in their place."""

from __future__ import annotations

from pathlib import PurePosixPath

from overtone.adapters.text import shown
from overtone.errors import InvalidAdapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILE_NAMES = (CONFIG_FILE, WEIGHTS_FILE)
DOCUMENTATION = frozenset({"README.md", ".gitattributes"})
"""PEFT and the hub put these into every folder; they hold no weights, so ignoring them loses nothing."""

MAX_CONFIG_BYTES = 64 * 1024

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04")


def _pickle_refused(file_name: str) -> InvalidAdapter:
    return InvalidAdapter(
        f"{shown(file_name)} is a pickle file; pickle files are never read: convert it to {WEIGHTS_FILE}",
        field=shown(file_name),
    )


def check_file_name(file_name: str) -> None:
    """Raises `InvalidAdapter` unless `file_name` is one of `FILE_NAMES`."""
    if file_name in FILE_NAMES:
        return
    if PurePosixPath(file_name).suffix.lower() in _PICKLE_SUFFIXES:
        raise _pickle_refused(file_name)
    expected = " and ".join(FILE_NAMES)
    raise InvalidAdapter(f"an adapter has no file {shown(file_name)!r}, only {expected}", field=shown(file_name))


def refuse_pickle(file_name: str, data: bytes) -> None:
    """Raises `InvalidAdapter` if bytes that turned out not to be what `file_name` promises start like a pickle.

    Only for bytes that already failed: a sound safetensors file begins with 0x80 whenever its header length ends so.
    """
    if data.startswith(_PICKLE_STARTS):
        raise _pickle_refused(file_name)
