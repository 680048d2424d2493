"""Export from one store, import into another: the same content under the same digest, and nothing that is not."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from overtone.adapters import AdapterFiles, AdapterStore, BaseDescription
from overtone.adapters.archive import archived
from overtone.adapters.files import ARCHIVED_LAYOUT
from overtone.adapters.operations import ImportItem
from overtone.errors import AdapterNotFound, BaseModelMismatch, InvalidAdapter, OvertoneError
from support.adapters import BASE, SHAPES, make_loca_folder, make_sdctft_folder, open_store, put
from support.all_families import make_dcft_folder
from support.peft_base import base_of
from support.peft_folders import peft_config, peft_folder
from support.stored import assert_same_deltas, read_blob, versions_on_disk
from support.tiny import tiny_model

MODEL = tiny_model()
TINY = base_of(MODEL)
CONFIG, WEIGHTS = ARCHIVED_LAYOUT.config, ARCHIVED_LAYOUT.weights
Unpacked = dict[str, AdapterFiles]


def unpack(archive: bytes) -> Unpacked:
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            folder, _, name = member.name.partition("/")
            file = tar.extractfile(member)
            assert file is not None
            found.setdefault(folder, {})[name] = file.read()
    return {name: AdapterFiles(files[CONFIG], files[WEIGHTS], ARCHIVED_LAYOUT) for name, files in found.items()}


def exported(store: AdapterStore, *ids: str) -> Unpacked:
    buffer = io.BytesIO()
    store.export(ids, buffer)
    return unpack(buffer.getvalue())


def import_one(store: AdapterStore, files: AdapterFiles, adapter_id: str = "x") -> None:
    """Raises why it is refused."""
    (result,) = store.import_many([ImportItem(adapter_id, files)])
    if result.error is not None:
        raise result.error


def folders(root: Path) -> dict[str, Path]:
    shapes = {name: shape for name, shape in TINY.modules.items() if name.endswith(("q_proj", "down_proj"))}
    seed = {"random_loc_seed": 5, "n_frequency": 9, "target_modules": ["q_proj", "v_proj"]}
    lora = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    return {
        "loca": make_loca_folder(root / "loca", shapes, n=12, seed=1),
        "loca again": make_loca_folder(root / "again", shapes, n=12, seed=1, scale=2.0),
        "sdctft": make_sdctft_folder(root / "sdctft", shapes, n=12, seed=2),
        "dcft": make_dcft_folder(root / "dcft", shapes, d=8, rank=1, strength=0.1),
        "fourierft": peft_folder(root / "fourierft", MODEL, peft_config("FourierFTConfig", **seed), strength=0.1),
        "lora": peft_folder(root / "lora", MODEL, peft_config("LoraConfig", **lora), strength=0.1),
        "vera": peft_folder(
            root / "vera", MODEL, peft_config("VeraConfig", r=4, target_modules=["q_proj", "v_proj"]), strength=0.1
        ),
    }


def test_every_kind_comes_back_as_it_was(tmp_path: Path) -> None:
    made = {name.replace(" ", "-"): folder for name, folder in folders(tmp_path).items()}
    with (
        closing(open_store(tmp_path / "one", base=TINY)) as one,
        closing(open_store(tmp_path / "two", base=TINY)) as two,
    ):
        digests = {name: put(one, folder, name).digest for name, folder in made.items()}
        archive = exported(one, *made)
        results = two.import_many([ImportItem(name, files) for name, files in archive.items()])
        assert {result.adapter_id: (result.digest, result.error) for result in results} == {
            name: (digest, None) for name, digest in digests.items()
        }
        assert not two.check(deep=True)
        for name, digest in digests.items():
            before, after = one.get(name), two.get(name)
            for field in ("family", "module_count", "parameter_count", "base_fingerprint", "basis", "size_bytes"):
                assert getattr(before, field) == getattr(after, field), (name, field)
            with one.acquire(name) as wanted, two.acquire(name) as got:
                assert got.adapter.family == wanted.adapter.family
                assert_same_deltas(got.adapter.deltas, wanted.adapter.deltas)
            assert read_blob(tmp_path / "two", digest) == read_blob(tmp_path / "one", digest)
        again = two.import_many([ImportItem(name, files) for name, files in archive.items()])
        assert {result.outcome for result in again} == {"unchanged"}
    with closing(open_store(tmp_path / "two", base=TINY)) as two:
        for name in made:
            two.acquire(name).release()


def test_unknown_ids_write_nothing(store: AdapterStore, tmp_path: Path) -> None:
    put(store, make_loca_folder(tmp_path / "l", SHAPES, n=4, seed=1), "a")
    buffer = io.BytesIO()
    with pytest.raises(AdapterNotFound):
        store.export(["a", "nobody"], buffer)
    assert buffer.getvalue() == b""
    assert store.stats().leased_count == 0


def test_another_base_model_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    put(store, make_loca_folder(tmp_path / "l", SHAPES, n=4, seed=1), "a")
    files = exported(store, "a")["a"]
    with closing(open_store(tmp_path / "other", base=BaseDescription("other", "0" * 64, BASE.modules))) as other:
        with pytest.raises(BaseModelMismatch):
            import_one(other, files)
        assert versions_on_disk(tmp_path / "other") == []


Parts = tuple[str, dict[str, bytes]]
"""Digest, blobs by digest."""


def without_shared(parts: Parts) -> Parts:
    return parts[0], {parts[0]: parts[1][parts[0]]}


def with_stray(parts: Parts) -> Parts:
    blob = b"nobody asked"
    return parts[0], {**parts[1], hashlib.sha256(blob).hexdigest(): blob}


def with_flipped_byte(parts: Parts) -> Parts:
    blob = bytearray(parts[1][parts[0]])
    blob[-1] ^= 1
    return parts[0], {**parts[1], parts[0]: bytes(blob)}


def of_a_shared_part(parts: Parts) -> Parts:
    return next(name for name in parts[1] if name != parts[0]), parts[1]


def cut_and_renamed(parts: Parts) -> Parts:
    blob = parts[1][parts[0]][:-3]
    name = hashlib.sha256(blob).hexdigest()
    return name, {name: blob, **{k: v for k, v in parts[1].items() if k != parts[0]}}


@pytest.mark.parametrize(
    "change",
    [without_shared, with_stray, with_flipped_byte, of_a_shared_part, cut_and_renamed],
    ids=lambda f: f.__name__,
)
def test_hostile_archives(store: AdapterStore, tmp_path: Path, change: Callable[[Parts], Parts]) -> None:
    digest = put(store, make_loca_folder(tmp_path / "l", SHAPES, n=4, seed=1), "a").digest
    blobs = {
        name: tensor.tobytes() for name, tensor in safetensors.numpy.load(exported(store, "a")["a"].weights).items()
    }
    files = archived(*change((digest, blobs)))
    with closing(open_store(tmp_path / "other")) as other:
        with pytest.raises(InvalidAdapter) as caught:
            import_one(other, files)
        assert caught.value.message
        assert versions_on_disk(tmp_path / "other") == []
        import_one(other, archived(digest, blobs))  # and it is still of use
        other.acquire("x").release()


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (b"{", None),
        (b"[]", None),
        (b"{}", "overtone_adapter"),
        (json.dumps({"overtone_adapter": 2, "digest": "0" * 64}).encode(), "overtone_adapter"),
        (json.dumps({"overtone_adapter": 1}).encode(), "digest"),
        (json.dumps({"overtone_adapter": 1, "digest": "../../etc/passwd"}).encode(), "../../etc/passwd"),
    ],
)
def test_bad_configurations(store: AdapterStore, tmp_path: Path, config: bytes, field: str | None) -> None:
    put(store, make_loca_folder(tmp_path / "l", SHAPES, n=4, seed=1), "a")
    files = exported(store, "a")["a"]
    with pytest.raises(InvalidAdapter) as caught:
        import_one(store, AdapterFiles(config, files.weights, ARCHIVED_LAYOUT))
    if field is not None:
        assert field in (caught.value.field or "")


def test_weights_that_are_no_blobs(store: AdapterStore, tmp_path: Path) -> None:
    config = json.dumps({"overtone_adapter": 1, "digest": "0" * 64}).encode()
    some: list[bytes] = [
        b"",
        b"\xff" * 64,
        safetensors.numpy.save({"0" * 64: np.zeros((2, 2), np.uint8)}),
        safetensors.numpy.save({"0" * 64: np.zeros(4, np.float32)}),
        safetensors.numpy.save({"0" * 64: np.zeros(4, np.uint8)}),
    ]
    for weights in some:
        with pytest.raises(OvertoneError) as caught:
            import_one(store, AdapterFiles(config, weights, ARCHIVED_LAYOUT))
        assert isinstance(caught.value, InvalidAdapter)
