"""Adapters in archives: what comes back is what was written, and whatever else an archive says is refused, alone."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from overtone.adapters import AdapterStore, ParsedAdapter
from overtone.adapters.archive import archived, unarchive
from overtone.adapters.canonical import Encoded, encode
from overtone.adapters.canonical.file import write_facts
from overtone.adapters.files import AdapterFiles
from overtone.adapters.operations import ImportItem
from overtone.adapters.packs import digest_of
from overtone.adapters.projectors import Projectors
from overtone.adapters.safetensors_writer import pack
from overtone.errors import InvalidAdapter
from overtone.kernels import Delta
from support.adapters import BASE, SHAPES, adapter_files, make_loca_folder, open_store, put
from support.all_families import make_all, projections
from support.canonical import Parts, taken_apart
from support.older_blobs import encode_format_2
from support.peft_base import base_of
from support.terms import KINDS, RandomTerms
from support.tiny import tiny_model

Q = "model.layers.0.self_attn.q_proj"
TABLE = "model.embed_tokens"
WITH_TABLE = replace(BASE, embeddings={TABLE: SHAPES[Q]})


def adapter_of(kind: str, module: str = Q) -> ParsedAdapter:
    shape = SHAPES[Q]
    terms = (RandomTerms(shape, 1).make(kind),)
    return ParsedAdapter("one", {module: Delta(terms, shape)}, "", BASE.fingerprint, 1, ())


def files_of(encoded: Encoded) -> AdapterFiles:
    return archived(encoded.digest, {encoded.digest: encoded.blob, **encoded.shared})


def rebuilt(parts: Parts) -> AdapterFiles:
    """The archive of what the parts have become, each blob named by its digest."""
    layout, facts = write_facts(parts.layout, {}), dict(parts.facts)
    facts["layout"] = digest_of(layout)
    blobs = {digest_of(layout): layout}
    if "places" in facts:
        blobs[facts["places"]] = parts.shared[facts["places"]]
    main = write_facts(facts, parts.numbers)
    text = json.dumps(parts.layout)
    blobs |= {digest: blob for digest, blob in parts.shared.items() if f"sha256:{digest}" in text}
    return archived(digest_of(main), {digest_of(main): main, **blobs})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_as_it_was(kind: str) -> None:
    encoded = encode(adapter_of(kind))
    admitted = unarchive(files_of(encoded), BASE, Projectors())
    assert (admitted.encoded.digest, admitted.encoded.blob) == (encoded.digest, encoded.blob)
    assert dict(admitted.encoded.shared) == dict(encoded.shared)


def test_an_older_format_becomes_this_one(tmp_path: Path) -> None:
    parsed = replace(adapter_of("dct"), base_fingerprint=BASE.fingerprint)
    blob, shared = encode_format_2(parsed)
    admitted = unarchive(archived(digest_of(blob), {digest_of(blob): blob, **shared}), BASE, Projectors())
    assert admitted.encoded.digest == encode(parsed).digest


def change(kind: str, **facts: Any) -> Callable[[], AdapterFiles]:
    """An archive of one term of a kind with other facts of the term, or of the layout where it has those."""

    def make() -> AdapterFiles:
        parts = taken_apart(encode(adapter_of(kind)))
        for name, value in facts.items():
            (parts.layout if name in parts.layout else parts.terms[0])[name] = value
        return rebuilt(parts)

    return make


def matrix(tensors: Mapping[str, torch.Tensor]) -> Callable[[], AdapterFiles]:
    """An archive with another matrix in the place of the one that it refers to."""

    def make() -> AdapterFiles:
        parts = taken_apart(encode(adapter_of("dense")))
        old = parts.terms[0]["analysis"]["matrix"].removeprefix("sha256:")
        blob = pack(tensors)
        parts.shared[digest_of(blob)] = blob
        parts.layout = json.loads(json.dumps(parts.layout).replace(old, digest_of(blob)))
        return rebuilt(parts)

    return make


def many_terms() -> AdapterFiles:
    parts = taken_apart(encode(adapter_of("dct")))
    parts.layout["modules"][Q]["terms"] *= 17
    return rebuilt(parts)


def padded() -> AdapterFiles:
    """The same adapter in other bytes."""
    parts = taken_apart(encode(adapter_of("dct")))
    parts.facts["more"] = 1
    return rebuilt(parts)


def raw(text: str) -> Callable[[], AdapterFiles]:
    """A layout whose parameter_count, 12321, is this text."""

    def make() -> AdapterFiles:
        encoded = encode(replace(adapter_of("dct"), parameter_count=12321))
        parts = taken_apart(encoded)
        layout = write_facts(parts.layout, {}).replace(b"12321", text.encode())
        body = layout[8:].rstrip()
        body += b" " * (-len(body) % 8)
        layout = len(body).to_bytes(8, "little") + body
        facts = {**parts.facts, "layout": digest_of(layout)}
        main = write_facts(facts, parts.numbers)
        places = parts.facts["places"]
        blobs = {digest_of(main): main, digest_of(layout): layout, places: parts.shared[places]}
        return archived(digest_of(main), blobs)

    return make


BLOCKS, DCT = {"kind": "block_dft", "block": 4}, {"kind": "dct"}
WIDE = torch.randn(24, 512)

HOSTILE: Mapping[str, tuple[str, Callable[[], AdapterFiles]]] = {
    "a synthesis of the weight": (Q, change("weight", synthesis={"kind": "weight"})),
    "blocks around a dense core": (Q, change("dense", synthesis=BLOCKS)),
    "blocks around a low rank": (Q, change("low_rank", synthesis=BLOCKS, analysis=BLOCKS)),
    "blocks around a sparse core": (Q, change("sparse", synthesis=BLOCKS, analysis=BLOCKS)),
    "a circulant core with other blocks": (Q, change("circulant", analysis={"kind": "block_dft", "block": 8})),
    "a circulant core with twice other blocks": (
        Q,
        change("circulant", analysis={"kind": "block_dft", "block": 8}, synthesis={"kind": "block_dft", "block": 8}),
    ),
    "a circulant core between plain frames": (Q, change("circulant", analysis=DCT, synthesis=DCT)),
    "a block without end": (
        "block",
        change(
            "circulant",
            analysis={"kind": "block_dft", "block": float("inf")},
            synthesis={"kind": "block_dft", "block": float("inf")},
        ),
    ),
    "unknown taps": ("taps", change("haar", analysis={"kind": "wavelet", "taps": [[1.0, 0.5], [0.5, 1.0]]})),
    "taps that are NaN": ("taps", change("haar", analysis={"kind": "wavelet", "taps": [[float("nan")] * 2] * 2})),
    "unequal taps": ("taps", change("haar", analysis={"kind": "wavelet", "taps": [[1.0], [0.5, 1.0]]})),
    "too many terms": (Q, many_terms),
    "a matrix of float16": ("sha256:", matrix({"matrix": torch.ones(24, 512, dtype=torch.float16)})),
    "a matrix with NaN": ("sha256:", matrix({"matrix": WIDE / 0.0 - WIDE / 0.0})),
    "a vector": ("sha256:", matrix({"matrix": torch.ones(512)})),
    "no matrix": ("sha256:", matrix({"other": WIDE})),
    "a matrix and more": ("sha256:", matrix({"matrix": WIDE, "other": WIDE})),
    "other bytes of the same": ("", padded),
    "too many parameters": ("parameter_count", change("dct", parameter_count=2**70)),
    "parameters that are no number": ("parameter_count", change("dct", parameter_count="7")),
    "half a character": ("base_model_name_or_path", change("dct", base_model_name_or_path="\ud800")),
    "a long family": ("family", change("dct", family="x" * 100_000)),
    "a family that is none": ("family", change("dct", family=7)),
    "a large scale": ("", change("low_rank", scale=10**400)),
    "a scale that is not canonical": ("", change("low_rank", scale=1)),
    "infinity": ("parameter_count", raw("Infinity")),
    "nothing where a number is": ("parameter_count", raw("null")),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_no_store_wrote_is_refused(what: str) -> None:
    field, make = HOSTILE[what]
    with pytest.raises(InvalidAdapter) as caught:
        unarchive(make(), BASE, Projectors())
    assert (caught.value.field or "").startswith(field)


@pytest.mark.parametrize("kind", KINDS)
def test_only_rows_are_taken_of_an_embedding(kind: str) -> None:
    files = files_of(encode(adapter_of(kind, TABLE)))
    if kind in ("low_rank", "gained_low_rank", "weight"):
        assert unarchive(files, WITH_TABLE, Projectors()).encoded.digest
        return
    with pytest.raises(InvalidAdapter) as caught:
        unarchive(files, WITH_TABLE, Projectors())
    assert caught.value.field == TABLE


def test_hostile_ones_keep_no_others_out(tmp_path: Path) -> None:
    good = adapter_files(make_loca_folder(tmp_path / "a", SHAPES, n=9, seed=1))
    with closing(open_store(tmp_path / "store")) as store:
        items = [ImportItem(f"bad{i}", make()) for i, (_, make) in enumerate(HOSTILE.values())]
        results = store.import_many([*items, ImportItem("good", good)])
        assert [result.outcome for result in results] == ["refused"] * len(items) + ["created"]
        assert all(isinstance(result.error, InvalidAdapter) for result in results[:-1])


def exported(store: AdapterStore, ids: list[str]) -> list[ImportItem]:
    file = io.BytesIO()
    store.export(ids, file)
    file.seek(0)
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=file) as tar:
        for member in tar:
            folder, _, name = member.name.partition("/")
            content = tar.extractfile(member)
            assert content is not None
            members.setdefault(folder, {})[name] = content.read()
    layout = archived("", {}).layout
    return [ImportItem(i, AdapterFiles(f[layout.config], f[layout.weights], layout)) for i, f in members.items()]


def test_archives_go_from_store_to_store(tmp_path: Path, store: AdapterStore, loca: Callable[[int], Path]) -> None:
    records = [put(store, loca(seed), f"a{seed}") for seed in range(2)]
    items = exported(store, [record.id for record in records])
    with closing(open_store(tmp_path / "other")) as other:
        assert [result.digest for result in other.import_many(items)] == [record.digest for record in records]
        assert not other.check(deep=True)
        for record in records:
            copied = other.get(record.id)
            assert (copied.digest, copied.family, copied.parameter_count) == (
                record.digest,
                record.family,
                record.parameter_count,
            )


def test_every_family_goes_from_store_to_store(tmp_path: Path) -> None:
    model = tiny_model()
    settings: dict[str, Any] = {"base": base_of(model), "memory_bytes": 1 << 28, "max_upload_bytes": 1 << 27}
    folders = make_all(tmp_path / "made", model, projections(model, [0]), 0.5)
    with (
        closing(open_store(tmp_path / "one", **settings)) as one,
        closing(open_store(tmp_path / "other", **settings)) as other,
    ):
        digests = [put(one, folder, name).digest for name, folder in folders.items()]
        results = other.import_many(exported(one, list(folders)))
        assert [result.digest for result in results] == digests
