"""Adapters on their way from one store to another: their canonical blobs, nothing parsed or rounded again.

An archive is a tar file with a folder an adapter, each with two files as any adapter has them:

    overtone_adapter.json           {"overtone_adapter": 1, "digest": ...}
    overtone_adapter.safetensors    each blob as a tensor of bytes, named by its SHA-256
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy
import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.canonical import Encoded, Known, Sparse, decode, encode
from overtone.adapters.canonical.file import read_file
from overtone.adapters.canonical.layout import NO_FACTS, About, about_of
from overtone.adapters.canonical.older import OLDER
from overtone.adapters.catalogue import Catalogue
from overtone.adapters.families import ParsedAdapter
from overtone.adapters.files import ARCHIVED_LAYOUT, AdapterFiles
from overtone.adapters.packs import Blobs
from overtone.adapters.projectors import Projectors
from overtone.adapters.recipes import Admitted, kind_of
from overtone.adapters.records import AdapterRecord
from overtone.adapters.resident import resident_nbytes
from overtone.adapters.safetensors_reader import Limits, read_safetensors
from overtone.adapters.shared import SharedBlobs
from overtone.adapters.text import read_json_object, shown
from overtone.errors import InvalidAdapter

_VERSION = 1
_LIMITS = Limits(tensors=10_000)


def write_archive(records: Sequence[AdapterRecord], catalogue: Catalogue, blobs: Blobs, file: BinaryIO) -> None:
    """The current versions of adapters that nobody removes meanwhile. Raises `StoreCorrupted`, `StoreFailed`."""
    with tarfile.open(fileobj=file, mode="w|") as tar:
        for record in records:
            names = [record.digest, *catalogue.shared_by(record.digest)]
            files = archived(record.digest, {name: blobs.read(name) for name in names})
            for name, data in ((files.layout.config, files.config), (files.layout.weights, files.weights)):
                member = tarfile.TarInfo(f"{record.id}/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def archived(digest: str, blobs: Mapping[str, bytes]) -> AdapterFiles:
    """The two files of an adapter. blobs: by digest, its own among them."""
    config = json.dumps({"overtone_adapter": _VERSION, "digest": digest}).encode()
    weights = safetensors.numpy.save({name: np.frombuffer(blob, np.uint8) for name, blob in blobs.items()})
    return AdapterFiles(config, weights, ARCHIVED_LAYOUT)


def unarchive(files: AdapterFiles, base: BaseDescription, projectors: Projectors) -> Admitted:
    """The adapter in two files of an archive, checked like any other.

    One of an older format becomes one of this format. Raises `InvalidAdapter`, also for bytes that `encode` would not have
    written, and `BaseModelMismatch` for one that was stored for another base model.
    """
    digest = _digest(files)
    given = _Given(dict(_blobs(files.weights)))
    blob = given.read(digest)
    stored = decode(blob, base, SharedBlobs(given, projectors, Known()))
    if stray := given.blobs.keys() - given.asked:
        raise InvalidAdapter(f"the adapter refers to no blob {min(stray)}", field=min(stray))
    about = _about(blob, given.blobs)
    parsed = ParsedAdapter(
        family=about.family,
        deltas=stored.deltas,
        base_model_name_or_path=about.base_model_name_or_path,
        base_fingerprint=about.base_fingerprint or base.fingerprint,
        parameter_count=about.parameter_count,
        warnings=(),
        basis=about.basis,
    )
    encoded = encode(parsed)
    if read_file(blob).facts["format"] not in OLDER:
        _check_same(encoded, digest, given.blobs)
    contents = stored.contents
    nbytes = contents.nbytes if isinstance(contents, Sparse) else resident_nbytes(contents)
    return Admitted(encoded, kind_of(parsed), nbytes, contents)


def _check_same(encoded: Encoded, digest: str, given: Mapping[str, bytes]) -> None:
    """Equal adapters are equal bytes: other bytes that say the same would be another version, or a blob of two meanings."""
    again = {encoded.digest: encoded.blob, **encoded.shared}
    for name, blob in given.items():
        if again.get(name) != blob:
            raise InvalidAdapter(f"the blob {shown(name)} is not in the canonical form", field=shown(name))
    if encoded.digest != digest:
        raise InvalidAdapter(f"the blob {shown(digest)} is not the adapter's own", field="digest")


def _digest(files: AdapterFiles) -> str:
    name = files.layout.config
    facts = read_json_object(files.config, name)
    if facts.get("overtone_adapter") != _VERSION:
        message = f"{name} says overtone_adapter {shown(facts.get('overtone_adapter'))}, this server knows {_VERSION}"
        raise InvalidAdapter(message, field="overtone_adapter")
    digest = facts.get("digest")
    if not isinstance(digest, str):
        raise InvalidAdapter(f"the digest in {name} must be text", field="digest")
    return digest


def _blobs(weights: bytes) -> Iterator[tuple[str, bytes]]:
    for name, tensor in read_safetensors(weights, ARCHIVED_LAYOUT.weights, _LIMITS).tensors.items():
        if tensor.dtype != torch.uint8 or tensor.ndim != 1:
            raise InvalidAdapter(f"{shown(name)} is not a vector of bytes", field=shown(name))
        blob = tensor.numpy().tobytes()
        if hashlib.sha256(blob).hexdigest() != name:
            raise InvalidAdapter(f"the bytes of {shown(name)} have another digest", field=shown(name))
        yield name, blob


class _Given:
    """The blobs of one adapter. asked: those that were read."""

    def __init__(self, blobs: Mapping[str, bytes]) -> None:
        self.blobs = blobs
        self.asked: set[str] = set()

    def read(self, digest: str) -> bytes:
        if digest not in self.blobs:
            raise InvalidAdapter(
                f"the adapter refers to the blob {shown(digest)}, which is not there", field=shown(digest)
            )
        self.asked.add(digest)
        return self.blobs[digest]


def _about(blob: bytes, blobs: Mapping[str, bytes]) -> About:
    """Of a blob that has been decoded."""
    facts: Any = read_file(blob).facts
    try:
        return about_of(read_file(blobs[facts["layout"]]).facts if "layout" in facts else facts)
    except NO_FACTS as error:
        raise InvalidAdapter("the stored adapter lacks what its format demands") from error
