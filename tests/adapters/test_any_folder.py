"""Random adapters of every family: valid ones mean what their definitions say, broken ones are refused without a trace."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overtone.adapters import AdapterFiles, AdapterRecord, AdapterStore, Lease
from overtone.adapters.files import layout_of
from overtone.adapters.store import Wanted
from overtone.errors import InvalidAdapter, InvalidRequest, OvertoneError, TooLarge
from overtone.kernels import FrameBank, FrameKind
from support.adapters import open_store, put
from support.breaking_bytes import Broken, broken
from support.folders import Folder
from support.folders_of_coefficients import c3a, fourierft, loca, sdctft, shira, waveft
from support.folders_of_matrices import dcft, lora, pica, randlora, vblora, vera
from support.oracle_folder import folder_deltas

FAMILIES: Mapping[str, Callable[[], st.SearchStrategy[Folder]]] = {
    f.__name__: f for f in (loca, sdctft, fourierft, waveft, c3a, shira, lora, vblora, dcft, vera, randlora, pica)
}
RELATIVE = 2e-6
"""Of the Frobenius norm of delta_W, with DoRA also of the weight's: 16 roundings of float32, twice what was ever found."""
FLOOR = 1e-36
"""Where float32 loses its precision."""
LARGEST = 1e30
"""Up to here float32 has room for what is added up."""
EXAMPLES = 30
BANK = FrameBank(torch.device("cpu"))


def applied(lease: Lease, folder: Folder, module: str) -> torch.Tensor:
    """delta_W (p, q) by what the engine would do with the lease."""
    embedding = module in folder.embeddings
    weight = (folder.embeddings if embedding else folder.linears)[module].float()
    p, q = weight.shape
    delta = torch.zeros(p, q)
    for term in lease.adapter.deltas[module].terms:
        if term.analysis.kind is FrameKind.WEIGHT:
            z = weight.T
        elif embedding:
            z = torch.arange(q)
        else:
            z = BANK.analyse(term.analysis, torch.eye(q), term.core.shape[1])
        y = BANK.synthesise(term.synthesis, term.core.apply(z), p)
        delta += (y if term.gain is None else y * term.gain).T
    return delta


def check_applied(lease: Lease, folder: Folder, expected: Mapping[str, torch.Tensor], *, dora: bool = False) -> None:
    assert lease.adapter.deltas.keys() == expected.keys()
    for module, delta in expected.items():
        size = float(delta.norm())
        if dora:
            size += float({**folder.linears, **folder.embeddings}[module].double().norm())
        error = float((applied(lease, folder, module) - delta).norm())
        assert error <= RELATIVE * size + FLOOR, (module, error / (size + FLOOR))


@contextmanager
def opened(folder: Folder) -> Iterator[tuple[AdapterStore, Path]]:
    """A store on the folder's base, and the path of the folder itself."""
    with tempfile.TemporaryDirectory() as root:
        path = write(Path(root) / "folder", folder.files())
        store = open_store(Path(root) / "store", base=folder.base())
        try:
            yield store, path
        finally:
            store.close()


def write(path: Path, files: Mapping[str, bytes]) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def inline(files: Mapping[str, bytes]) -> list[Wanted]:
    layout = layout_of(files)
    return [Wanted(files=AdapterFiles(files[layout.config], files[layout.weights], layout))]


def check_valid(folder: Folder) -> None:
    dora = bool(folder.config.get("use_dora"))
    with opened(folder) as (store, path):
        expected = folder_deltas(path, folder.linears, folder.embeddings)
        record = put(store, path, "some")
        with store.acquire("some") as lease:
            check_applied(lease, folder, expected, dora=dora)
        store.delete("some")
        assert not state(store).files
        with store.acquire_all(inline(folder.files())) as lease:
            assert lease.shares[0].digest == record.digest
            check_applied(lease, folder, expected, dora=dora)


@dataclass(frozen=True)
class State:
    """What a refusal must leave as it was. files: below blobs/ and tmp/, with their sizes."""

    records: Sequence[AdapterRecord]
    files: Mapping[str, int]
    leased: int
    resident: int
    resident_bytes: int


def state(store: AdapterStore) -> State:
    root, stats = store._config.root / "adapters", store.stats()
    found = [file for part in ("blobs", "tmp") for file in (root / part).rglob("*")]
    files = {str(file.relative_to(root)): file.stat().st_size for file in found if file.is_file()}
    tmp = {str(file.relative_to(root)): 0 for file in (root / "tmp").iterdir()}
    return State(store.list(0)[0], files | tmp, stats.leased_count, stats.resident_count, stats.resident_bytes)


def upload(store: AdapterStore, chunks: Sequence[tuple[str, bytes]]) -> AdapterRecord:
    with store.begin_upload() as upload:
        for name, data in chunks:
            upload.write(name, data)
        return store.commit_upload(upload, "bad")


def refusal(attempt: Callable[[], object], *, named_well: bool) -> tuple[type[OvertoneError], str | None] | None:
    """The class and the field of what `attempt` raises; None if it raises nothing. Nothing else may come out of it."""
    try:
        attempt()
    except (InvalidAdapter, TooLarge, InvalidRequest) as error:
        raised = error
    else:
        return None
    assert isinstance(raised, InvalidAdapter) or not named_well, raised
    assert raised.field, raised
    assert raised.message
    return type(raised), raised.field


def check_broken(broken: Broken) -> None:
    folder = broken.folder
    with opened(folder) as (store, path):
        put(store, path, "good")
        store.acquire("good").release()
        before = state(store)
        refused = refusal(lambda: upload(store, broken.chunks), named_well=broken.named_well)
        if refused is None:
            assert not broken.certain, "it was accepted"
            check_accepted(store, broken, path.parent / "broken")
            store.delete("bad")
        assert state(store).records == before.records
        assert state(store).files == before.files
        if refused is not None:
            assert state(store) == before
        if broken.named_well:
            brought = inline(broken.files)
            assert refusal(lambda: store.acquire_all(brought).release(), named_well=True) == refused
            assert state(store).leased == 0
        if refused is not None:
            assert state(store) == before
        store.delete("good")
        put(store, path, "again")
        with store.acquire("again") as lease:
            dora = bool(folder.config.get("use_dora"))
            check_applied(lease, folder, folder_deltas(path, folder.linears, folder.embeddings), dora=dora)


def check_accepted(store: AdapterStore, broken: Broken, path: Path) -> None:
    """Accepted, it means what the definition says of these very files."""
    folder, files = broken.folder, broken.files
    write(path, files)
    expected = folder_deltas(path, folder.linears, folder.embeddings)
    config = json.loads(next(data for name, data in files.items() if name.endswith("config.json")))
    assert all(bool(delta.isfinite().all()) for delta in expected.values())
    with store.acquire("bad") as lease:
        if max(float(delta.abs().max()) for delta in expected.values()) < LARGEST:
            check_applied(lease, folder, expected, dora=bool(config.get("use_dora")))


def check_all(check: Callable[[Any], None], strategy: st.SearchStrategy[Any], examples: int) -> None:
    @settings(
        deadline=None, derandomize=True, database=None, max_examples=examples, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(example: Any) -> None:
        check(example)

    run()


@pytest.mark.parametrize("family", FAMILIES)
def test_valid(family: str) -> None:
    check_all(check_valid, FAMILIES[family](), EXAMPLES)


@pytest.mark.parametrize("family", FAMILIES)
def test_broken(family: str) -> None:
    check_all(check_broken, broken(FAMILIES[family]()), EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_valid(family: str) -> None:
    check_all(check_valid, FAMILIES[family](), 10 * EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_broken(family: str) -> None:
    check_all(check_broken, broken(FAMILIES[family]()), 10 * EXAMPLES)
