"""What the files of a store hold, read past the store: its catalogue says where, and the bytes are looked at here."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from overtone.adapters.canonical.file import read_file
from overtone.adapters.packs import OWN_FILE, Place
from overtone.kernels import CsrCore, ResidentDelta
from support.canonical import assert_same

_MATRIX = re.compile(r"sha256:([0-9a-f]{64})")


def places_on_disk(root: Path) -> dict[str, Place]:
    """Digest -> place of all that the catalogue of the store in `root` knows."""
    with closing(sqlite3.connect(root / "adapters" / "catalogue.sqlite3")) as db:
        rows = db.execute("SELECT lower(hex(digest)), pack, start, length FROM blobs").fetchall()
    return {digest: Place(*place) for digest, *place in rows}


def blob_file(root: Path, digest: str) -> tuple[Path, int]:
    """The file in which a blob is, and the byte where it begins."""
    place = places_on_disk(root)[digest]
    if place.pack == OWN_FILE:
        return root / "adapters" / "blobs" / "sha256" / digest[:2] / f"{digest}.safetensors", 0
    return root / "adapters" / "packs" / f"{place.pack:08}.pack", place.data


def read_blob(root: Path, digest: str) -> bytes:
    path, start = blob_file(root, digest)
    return path.read_bytes()[start : start + places_on_disk(root)[digest].length]


def damage(root: Path, digest: str, byte: int = -1) -> None:
    """Flips a bit of a blob; byte: of the blob, from its end where negative."""
    path, start = blob_file(root, digest)
    length = places_on_disk(root)[digest].length
    with path.open("r+b") as file:
        file.seek(start + byte % length)
        old = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([old[0] ^ 1]))


def versions_on_disk(root: Path) -> list[str]:
    """The digests of all adapters among the blobs of the store in `root`. Of all blobs: they are what their names say, one
    of the adapters refers to each that is none, and each that an adapter refers to is there."""
    blobs = {digest: read_blob(root, digest) for digest in places_on_disk(root)}
    assert all(hashlib.sha256(blob).hexdigest() == digest for digest, blob in blobs.items())
    own = {path.stem for path in (root / "adapters" / "blobs").rglob("*.safetensors")}
    assert own == {digest for digest, place in places_on_disk(root).items() if place.pack == OWN_FILE}
    facts = {digest: read_file(blob).facts for digest, blob in blobs.items()}
    versions = sorted(digest for digest, found in facts.items() if found is not None and "layout" in found)
    wanted = set(versions)
    for version in versions:
        named = {value for name, value in facts[version].items() if name != "format"}
        wanted |= named | set(_MATRIX.findall(json.dumps(facts[facts[version]["layout"]])))
    assert wanted == blobs.keys()
    return versions


def assert_same_deltas(got: Mapping[str, ResidentDelta], wanted: Mapping[str, ResidentDelta]) -> None:
    """Of all modules, to the last bit. Whether others share a pattern may differ."""
    assert got.keys() == wanted.keys()
    for module, delta in wanted.items():
        for one, other in zip(got[module].terms, delta.terms, strict=True):
            assert_same((one.analysis, one.synthesis, one.gain), (other.analysis, other.synthesis, other.gain))
            if isinstance(one.core, CsrCore) and isinstance(other.core, CsrCore):
                assert_same((one.core.pattern, one.core.values), (other.core.pattern, other.core.values))
            else:
                assert_same(one.core, other.core)
