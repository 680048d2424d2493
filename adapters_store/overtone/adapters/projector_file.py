"""The singular vectors of one layer on disk: written whole or not at all, verified at every read.

A safetensors file of one tensor, `rows` (n, q) float32, whose metadata say for which layer of which base model it is, and n
and the digest of the rows, so that a broken file still tells what it held.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch

from overtone.adapters.failures import operation
from overtone.adapters.safetensors_reader import Limits, read_safetensors
from overtone.errors import BaseModelMismatch, InvalidAdapter, StoreCorrupted

_METADATA_KEY = "overtone"
_ROWS = "rows"
_LIMITS = Limits(tensors=1)


def rows_digest(rows: torch.Tensor) -> str:
    """SHA-256 of float32 rows as little-endian bytes: 64 hexadecimal digits."""
    return hashlib.sha256(rows.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Facts:
    """base: the base model's fingerprint; rank: how many rows; digest: theirs."""

    module: str
    base: str
    rank: int
    digest: str


@dataclass(frozen=True)
class StoredRows:
    """rows: (rank, q) float32 with the digest that `facts` say; None if the file is broken beyond its header."""

    facts: Facts
    rows: torch.Tensor | None


class ProjectorFile:
    """The file of one layer (p, q) of the base model with this fingerprint."""

    def __init__(self, folder: Path, module: str, shape: tuple[int, int], base: str) -> None:
        # Names that differ only in what a file system does not keep apart differ in their digests.
        readable = re.sub(r"[^A-Za-z0-9_.-]", "_", module)[:100].lstrip(".")
        self._path = folder / f"{readable}-{hashlib.sha256(module.encode()).hexdigest()[:16]}.safetensors"
        self._module, self._shape, self._base = module, shape, base
        self._remedy = f"restore {self._path.name}, or remove it from bases/ and upload the adapters that use it again"

    def read(self) -> StoredRows | None:
        """None if there is no file. Raises `StoreCorrupted` for one that does not even tell what it held, and
        `BaseModelMismatch` for one of another base model or layer."""
        with operation("read singular vectors"):
            if not self._path.exists():
                return None
            data = self._path.read_bytes()
        facts = _read_facts(data)
        if facts is None or not 1 <= facts.rank <= min(self._shape):
            raise StoreCorrupted(f"the stored singular vectors of {self._module} are broken: {self._remedy}")
        if (facts.module, facts.base) != (self._module, self._base):
            raise BaseModelMismatch(
                f"the stored singular vectors of {self._module} are of another base model or layer: {self._remedy}",
                field=self._module,
            )
        return StoredRows(facts, self._rows(data, facts))

    def _rows(self, data: bytes, facts: Facts) -> torch.Tensor | None:
        try:
            tensors = read_safetensors(data, "a file of singular vectors", _LIMITS).tensors
        except InvalidAdapter:
            return None
        rows = tensors.get(_ROWS)
        sound = rows is not None and rows.dtype == torch.float32 and rows.shape == (facts.rank, self._shape[1])
        return rows if rows is not None and sound and rows_digest(rows) == facts.digest else None

    def write(self, rows: torch.Tensor) -> None:
        """On return the file survives a power cut. Takes the place of one that is there."""
        facts = Facts(self._module, self._base, len(rows), rows_digest(rows))
        metadata = {_METADATA_KEY: json.dumps(asdict(facts), sort_keys=True, separators=(",", ":"))}
        data = safetensors.torch.save({_ROWS: rows.contiguous()}, metadata)
        folder = self._path.parent
        scratch = folder / f".{uuid.uuid4().hex}.tmp"
        with operation("write singular vectors"):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with scratch.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                scratch.replace(self._path)
            finally:
                scratch.unlink(missing_ok=True)
            _sync_folder(folder)


def _read_facts(data: bytes) -> Facts | None:
    length = int.from_bytes(data[:8], "little")
    try:
        facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_METADATA_KEY])
        return Facts(str(facts["module"]), str(facts["base"]), int(facts["rank"]), str(facts["digest"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
