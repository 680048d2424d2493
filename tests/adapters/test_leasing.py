"""Leases on sums of adapters and on adapters that came with a request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from overtone.adapters import AdapterFiles, AdapterStore, Lease
from overtone.adapters.families.pica import basis_digest
from overtone.adapters.projectors import Projectors
from overtone.adapters.store import Wanted
from overtone.errors import (
    AdapterMemoryFull,
    AdapterNotFound,
    InvalidAdapter,
    NonFiniteAdapter,
    OvertoneError,
    StoreCorrupted,
)
from overtone.kernels import FrameBank
from support.adapters import (
    BASE,
    SHAPES,
    adapter_files,
    dense_delta,
    make_loca_folder,
    make_sdctft_folder,
    open_store,
    put,
)
from support.all_families import make_pica_folder
from support.peft_base import base_of
from support.peft_folders import peft_config, peft_folder
from support.stored import versions_on_disk
from support.tiny import tiny_model

BANK = FrameBank(torch.device("cpu"))


def applied(lease: Lease, module: str) -> torch.Tensor:
    """delta_W (p, q) by what the engine would do with the lease."""
    p, q = SHAPES[module]
    delta = torch.zeros(p, q)
    for term in lease.adapter.deltas[module].terms if module in lease.adapter.deltas else ():
        z = BANK.analyse(term.analysis, torch.eye(q), term.core.shape[1])
        delta += BANK.synthesise(term.synthesis, term.core.apply(z), p).T
    return delta


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    some = dict(list(SHAPES.items())[:5])
    return {
        "a": make_loca_folder(tmp_path / "a", SHAPES, n=20, seed=1),
        "b": make_sdctft_folder(tmp_path / "b", some, n=15, seed=2),
        "c": make_loca_folder(tmp_path / "c", SHAPES, n=5, seed=3, float_indices=False),
    }


@pytest.fixture
def store(tmp_path: Path, folders: dict[str, Path]) -> AdapterStore:
    store = open_store(tmp_path / "store")
    for name in ("a", "b"):
        put(store, folders[name], name)
    return store


def check_sum(lease: Lease, parts: Sequence[tuple[Path, float]]) -> None:
    for module, shape in SHAPES.items():
        expected = np.zeros(shape)
        for folder, weight in parts:
            delta = dense_delta(folder, module, shape)
            expected += 0 if delta is None else weight * delta
        np.testing.assert_allclose(applied(lease, module).numpy(), expected, rtol=0, atol=2e-6)


def test_weights_add_up(store: AdapterStore, folders: dict[str, Path]) -> None:
    wanted = [Wanted("a", weight=0.5), Wanted("b", weight=-2.0)]
    with store.acquire_all(wanted) as lease:
        check_sum(lease, [(folders["a"], 0.5), (folders["b"], -2.0)])
        assert sorted((s.adapter_id, s.weight) for s in lease.shares) == [("a", 0.5), ("b", -2.0)]
        assert [s.digest for s in lease.shares] == sorted(s.digest for s in lease.shares)
        with store.acquire_all(wanted[::-1]) as other:
            assert other.adapter is lease.adapter
            assert other.shares == lease.shares
    assert store.stats().leased_count == 0


def test_one_adapter_twice_is_one_of_twice_the_weight(store: AdapterStore, folders: dict[str, Path]) -> None:
    with store.acquire_all([Wanted("a", weight=0.25), Wanted("a", weight=0.5)]) as lease:
        check_sum(lease, [(folders["a"], 0.75)])
        with store.acquire_all([Wanted("a", weight=0.75)]) as other:
            assert other.adapter is lease.adapter
    with store.acquire_all([Wanted("a")]) as plain, store.acquire("a") as same:
        assert plain.adapter is same.adapter


def test_frequencies_are_added_not_appended(store: AdapterStore) -> None:
    with store.acquire_all([Wanted("a"), Wanted("b")]) as lease:
        assert all(len(delta.terms) == 1 for delta in lease.adapter.deltas.values())


def test_a_missing_part_leaves_no_lease(store: AdapterStore) -> None:
    with pytest.raises(AdapterNotFound):
        store.acquire_all([Wanted("a"), Wanted("gone")])
    assert store.stats().leased_count == 0


def test_a_sum_outlives_its_parts(store: AdapterStore, folders: dict[str, Path]) -> None:
    with store.acquire_all([Wanted("a"), Wanted("b")]) as lease:
        store.delete("a")
        check_sum(lease, [(folders["a"], 1.0), (folders["b"], 1.0)])
        with pytest.raises(AdapterNotFound):
            store.acquire_all([Wanted("a"), Wanted("b")])
    assert len(versions_on_disk(store._config.root)) == 1


def test_inline(store: AdapterStore, folders: dict[str, Path]) -> None:
    """The digest that it would have if it were uploaded; not in the catalogue, not on disk."""
    wanted = Wanted(files=adapter_files(folders["c"]))
    before = sorted(store._config.root.rglob("*.safetensors"))
    with store.acquire_all([wanted]) as lease:
        check_sum(lease, [(folders["c"], 1.0)])
        (share,) = lease.shares
        assert (share.adapter_id, share.weight) == ("", 1.0)
        assert store.residency_state(share.digest) == "resident"
        with store.acquire_all([wanted]) as again:
            assert again.adapter is lease.adapter
    assert [record.id for record in store.list(10)[0]] == ["a", "b"]
    assert sorted(store._config.root.rglob("*.safetensors")) == before
    assert put(store, folders["c"], "c").digest == share.digest
    with store.acquire("c") as stored:
        assert stored.adapter is lease.adapter


def test_inline_in_a_sum(store: AdapterStore, folders: dict[str, Path]) -> None:
    wanted = [Wanted("a", weight=2.0), Wanted(files=adapter_files(folders["c"]), weight=0.5)]
    with store.acquire_all(wanted) as lease:
        check_sum(lease, [(folders["a"], 2.0), (folders["c"], 0.5)])


def test_a_broken_inline_adapter_is_refused_like_an_upload(store: AdapterStore, folders: dict[str, Path]) -> None:
    good = adapter_files(folders["c"])
    cases: list[tuple[AdapterFiles, type[Exception]]] = [
        (AdapterFiles(b"{}", good.weights), InvalidAdapter),
        (AdapterFiles(good.config, good.weights[:-4]), InvalidAdapter),
        (AdapterFiles(good.config.replace(b"1.0", b"1e300"), good.weights), NonFiniteAdapter),
    ]
    for files, error in cases:
        for _ in range(2):
            with pytest.raises(error):
                store.acquire_all([Wanted("a"), Wanted(files=files)])
    assert store.stats().leased_count == 0


def test_temporary_adapters_are_evicted_first(tmp_path: Path, folders: dict[str, Path]) -> None:
    large = open_store(tmp_path / "large")
    for name in ("a", "b", "c"):
        put(large, folders[name], name)
        large.acquire(name).release()
    store = open_store(tmp_path / "small", memory_bytes=large.stats().resident_bytes - 1)
    for name in ("a", "b"):
        put(store, folders[name], name)
    store.acquire("a").release()
    with store.acquire_all([Wanted(files=adapter_files(folders["c"]))]) as lease:
        digest = lease.shares[0].digest
        with pytest.raises(AdapterMemoryFull), store.acquire("a"), store.acquire("b"):
            pass
    store.acquire("b").release()
    assert store.residency_state(digest) == "stored"  # though "a" was used longer ago
    assert all(store.residency_state(store.get(name).digest) == "resident" for name in ("a", "b"))


def test_inline_on_another_base(tmp_path: Path, folders: dict[str, Path]) -> None:
    store = open_store(tmp_path / "strict", strict_base=True)
    named = make_loca_folder(tmp_path / "named", SHAPES, n=3, seed=1, base_name="another/model")
    with pytest.raises(InvalidAdapter, match="another/model"):
        store.acquire_all([Wanted(files=adapter_files(named))])
    assert BASE.name != "another/model"


def test_errors_say_which_of_several(store: AdapterStore) -> None:
    with pytest.raises(AdapterNotFound, match=r"adapters\[1\]: there is no adapter gone") as caught:
        store.acquire_all([Wanted("a", label="adapters[0]"), Wanted("gone", label="adapters[1]")])
    assert caught.value.metadata["source"] == "adapters[1]"


def test_a_sum_that_can_never_be_made_is_not_to_be_tried_again(tmp_path: Path, folders: dict[str, Path]) -> None:
    sizes = open_store(tmp_path / "sizes")
    nbytes = [put(sizes, folders[name], name) and sizes._catalogue.resolve(name)[1] for name in ("a", "b")]
    store = open_store(tmp_path / "small", memory_bytes=2 * sum(nbytes) - 1)
    for name in ("a", "b"):
        put(store, folders[name], name)
    before = store.stats()
    with pytest.raises(AdapterMemoryFull) as caught:
        store.acquire_all([Wanted("a"), Wanted("b")])
    assert caught.value.retry_after_s is None
    assert store.stats() == before  # nothing was loaded in vain


def test_a_sum_keeps_shared_cores_shared_and_counts_gains(tmp_path: Path) -> None:
    """PiCa's one matrix for all layers of a kind stays one; VeRA's gains are counted though no core holds them."""
    model = tiny_model()
    base = base_of(model)
    pica = make_pica_folder(tmp_path / "pica", {"gate_proj": 96}, rank=8, strength=0.1)
    vera = peft_folder(tmp_path / "vera", model, peft_config("VeraConfig", target_modules=["gate_proj"], r=8))
    store = open_store(tmp_path / "store", base=base)
    for name, folder in (("pica", pica), ("vera", vera)):
        put(store, folder, name)
        with store.acquire(name) as alone, store.acquire_all([Wanted(name, weight=0.5)]) as half:
            assert half.adapter.nbytes == alone.adapter.nbytes


def test_the_digest_tells_where_the_basis_came_from(tmp_path: Path) -> None:
    model = tiny_model()
    base = base_of(model)
    projectors = Projectors(None, base)
    modules = [name for name in base.modules if "gate_proj" in name]
    pin = basis_digest({name: projectors.get(name, 8).matrix for name in modules}, 8)
    store = open_store(tmp_path / "store", base=base)
    made = {}
    for name, config in (("assumed", {}), ("pinned", {"basis_sha256": pin})):
        folder = make_pica_folder(tmp_path / name, {"gate_proj": 96}, rank=8, strength=0.1, **config)
        made[name] = put(store, folder, name)
        assert (made[name].basis, store.get(name).basis) == (name, name)
    assert made["assumed"].digest != made["pinned"].digest


@pytest.mark.parametrize("broken", [False, True])
def test_nobody_learns_of_anothers_adapter(tmp_path: Path, folders: dict[str, Path], broken: bool) -> None:
    """Whatever is asked of it, and whatever is wrong with it: the answer is that of an id that there is not."""
    store = open_store(tmp_path / "tenants")
    made = put(store, folders["a"], "theirs", tenant="anna")
    if broken:
        store._set_aside(made.digest)
        with pytest.raises(StoreCorrupted):
            store.acquire_all([Wanted("theirs")], "anna")
    for suffix in ("", "@000000000000", f"@{made.digest}", f"@{made.digest[:12]}"):
        found = []
        for adapter_id in ("theirs", "no-one"):
            with pytest.raises(OvertoneError) as caught:
                store.acquire_all([Wanted(adapter_id + suffix)], "bert")
            error = caught.value
            found.append((type(error), error.message.replace(adapter_id, "ID"), error.field, sorted(error.metadata)))
        assert found[0] == found[1]
        assert found[0][0] is AdapterNotFound
    with pytest.raises(AdapterNotFound, match="has no version"):
        store.acquire_all([Wanted("theirs@000000000000")], "anna")
