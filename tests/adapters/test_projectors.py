"""PiCa's projectors: right singular vectors, kept on disk, shared in memory, and never others than before."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from overtone.adapters import BaseDescription, projectors
from overtone.adapters.projectors import BASE_SVD, Projectors, right_singular_vectors, rows_digest
from overtone.errors import BaseModelMismatch, InvalidAdapter, StoreCorrupted, StoreFailed, UnsupportedAdapter

SHAPES = {"tall": (300, 200), "wide": (90, 210), "small": (5, 7)}


def _weight(module: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPES[module], generator=generator)


BASE = BaseDescription("b", "f" * 64, SHAPES, weight=_weight)
OTHER = BaseDescription("b", "e" * 64, SHAPES, weight=lambda module: _weight(module, 1))
CHANGED = BaseDescription("b", "f" * 64, SHAPES, weight=lambda module: _weight(module, 1))
"""Says that it is BASE, and is not."""


def _vectors(module: str) -> torch.Tensor:
    return torch.linalg.svd(_weight(module), full_matrices=False)[2]


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules whose singular vectors are computed, in order."""
    done: list[str] = []

    def counting(weight: torch.Tensor, module: str) -> torch.Tensor:
        done.append(module)
        return right_singular_vectors(weight, module)

    monkeypatch.setattr(projectors, "right_singular_vectors", counting)
    return done


def _file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


@pytest.mark.parametrize("module", SHAPES)
@pytest.mark.parametrize("on_disk", [True, False])
def test_the_leading_right_singular_vectors(tmp_path: Path, module: str, on_disk: bool) -> None:
    found = Projectors(tmp_path if on_disk else None, BASE).get(module, 3)
    assert found.key == BASE_SVD + module
    assert torch.equal(found.matrix, _vectors(module)[: len(found.matrix)])
    rows = found.matrix.double()
    assert torch.allclose(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), atol=1e-5)
    weight = _weight(module).double()
    assert torch.allclose((rows @ weight.T).norm(dim=1), torch.linalg.svdvals(weight)[: len(rows)], rtol=1e-5)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"] * on_disk


def test_a_weight_in_half_precision_is_widened() -> None:
    base = BaseDescription("b", "f" * 64, SHAPES, weight=lambda module: _weight(module).bfloat16())
    expected = torch.linalg.svd(_weight("small").bfloat16().float(), full_matrices=False)[2]
    assert torch.equal(Projectors(None, base).get("small", 5).matrix, expected)


@pytest.mark.parametrize(("rank", "rows"), [(1, 64), (64, 64), (65, 128), (192, 192), (193, 200), (200, 200)], ids=str)
def test_rows_are_kept_in_steps(tmp_path: Path, decompositions: list[str], rank: int, rows: int) -> None:
    Projectors(tmp_path, BASE).get("tall", rank)
    assert load_file(_file(tmp_path))["rows"].shape == (rows, 200)
    again = Projectors(tmp_path, BASE)
    assert again.get("tall", rank).matrix.shape == again.get("tall", rows).matrix.shape == (rows, 200)
    assert decompositions == ["tall"]


def test_ranks_are_nested(tmp_path: Path, decompositions: list[str]) -> None:
    """More rows than are kept are computed anew and take the place of the old file."""
    store = Projectors(tmp_path, BASE)
    small, large = store.get("tall", 10), store.get("tall", 100)
    assert (len(small.matrix), len(large.matrix), small == large) == (64, 128, True)
    assert torch.equal(large.matrix[:64], small.matrix)
    assert store.get("tall", 10) is large
    assert decompositions == ["tall", "tall"]
    assert len(Projectors(tmp_path, BASE).get("tall", 10).matrix) == 64
    assert len(load_file(_file(tmp_path))["rows"]) == 128
    assert len(decompositions) == 2


def test_a_larger_step_spares_decompositions(tmp_path: Path, decompositions: list[str]) -> None:
    store = Projectors(tmp_path, BASE, step=256)
    first = store.get("tall", 10).matrix
    assert (len(first), len(load_file(_file(tmp_path))["rows"])) == (64, 200)
    assert torch.equal(store.get("tall", 150).matrix[:64], first)
    assert decompositions == ["tall"]


def test_those_in_use_are_in_memory_once_and_others_not_at_all(tmp_path: Path, decompositions: list[str]) -> None:
    store = Projectors(tmp_path, BASE)
    first = store.get("tall", 10)
    assert store.get("tall", 64) is first
    _file(tmp_path).unlink()
    assert store.get("tall", 20) is first
    del first
    store.get("tall", 20)  # gone from memory and disk alike
    assert decompositions == ["tall", "tall"]


def test_digests(tmp_path: Path, decompositions: list[str]) -> None:
    store = Projectors(tmp_path, BASE)
    for rank in (1, 5):
        rows = _vectors("small")[:rank].contiguous().numpy().astype("<f4").tobytes()
        assert store.digest("small", rank) == hashlib.sha256(rows).hexdigest()
    assert decompositions == ["small"]


def test_another_process_has_the_same_bits(tmp_path: Path) -> None:
    """Also with another number of threads, for which the vectors would come out otherwise: it takes them from the disk."""
    expected = Projectors(tmp_path, BASE).digest("tall", 64)
    program = (
        "import sys, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from overtone.adapters import BaseDescription; from overtone.adapters.projectors import Projectors\n"
        "base = BaseDescription('b', 'f' * 64, {'tall': (300, 200)})\n"  # without weights
        "print(Projectors(Path(sys.argv[1]), base).digest('tall', 64))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_one_thread_computes(tmp_path: Path, decompositions: list[str]) -> None:
    store, found = Projectors(tmp_path, BASE), []
    threads = [threading.Thread(target=lambda: found.append(store.get("tall", 64))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert decompositions == ["tall"]
    assert len({id(matrix) for matrix in found}) == 1
    assert len(found) == 8


def test_files_do_not_collide(tmp_path: Path) -> None:
    names = ["a/b", "a_b", "A_b", "../a", ".a", "é" * 300, "a" * 300, "a" * 301]
    shapes = dict.fromkeys(names, (5, 7))
    base = BaseDescription("b", "f" * 64, shapes, weight=lambda m: torch.full((5, 7), 1.0) + names.index(m))
    store = Projectors(tmp_path / "p", base)
    digests = [store.digest(name, 5) for name in names]
    files = [path.name for path in (tmp_path / "p").iterdir()]
    assert len({name.lower() for name in files}) == len(names)
    assert list(tmp_path.iterdir()) == [tmp_path / "p"]
    assert [Projectors(tmp_path / "p", base).digest(name, 5) for name in names] == digests


def test_what_is_not_there() -> None:
    with pytest.raises(UnsupportedAdapter) as nothing:
        Projectors().get("tall", 1)
    assert nothing.value.field == "tall"
    with pytest.raises(UnsupportedAdapter):
        Projectors().digest("tall", 1)
    for rank in (91, 10**12, 0):
        with pytest.raises(InvalidAdapter) as many:
            Projectors(None, BASE).get("wide", rank)
        assert (type(many.value), many.value.field) == (InvalidAdapter, "rank")
    with pytest.raises(BaseModelMismatch):
        Projectors(None, BASE).get("unknown", 1)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_without_singular_vectors(tmp_path: Path, number: float) -> None:
    base = BaseDescription("b", "f" * 64, SHAPES, weight=lambda module: torch.full(SHAPES[module], number))
    with pytest.raises(BaseModelMismatch) as caught:
        Projectors(tmp_path, base).get("small", 1)
    assert caught.value.field == "small"
    assert not list(tmp_path.iterdir())


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a bit": _flipped,
    "cut short": lambda data: data[:-100],
    "only the header": lambda data: data[: 8 + int.from_bytes(data[:8], "little")],
    "too long": lambda data: data + b"0",
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("rank", [64, 65])
def test_a_damaged_file_is_computed_again(tmp_path: Path, decompositions: list[str], name: str, rank: int) -> None:
    expected = Projectors(tmp_path, BASE).get("tall", 64).matrix.clone()
    file = _file(tmp_path)
    sound = file.read_bytes()
    file.write_bytes(DAMAGES[name](sound))
    assert torch.equal(Projectors(tmp_path, BASE).get("tall", rank).matrix[:64], expected)
    assert decompositions == ["tall", "tall"]
    assert (_file(tmp_path).read_bytes() == sound) == (rank == 64)


def test_a_damaged_file_is_restored_with_all_its_rows(tmp_path: Path) -> None:
    Projectors(tmp_path, BASE).get("tall", 128)
    file = _file(tmp_path)
    sound = file.read_bytes()
    file.write_bytes(_flipped(sound))
    Projectors(tmp_path, BASE).get("tall", 10)
    assert file.read_bytes() == sound


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_of_other_vectors_is_not_served(tmp_path: Path, name: str) -> None:
    Projectors(tmp_path, BASE).get("tall", 64)
    file = _file(tmp_path)
    damaged = DAMAGES[name](file.read_bytes())
    file.write_bytes(damaged)
    with pytest.raises(StoreCorrupted):
        Projectors(tmp_path, CHANGED).get("tall", 64)
    assert file.read_bytes() == damaged


def _resaved(path: Path, facts: str | None, rows: torch.Tensor | None = None) -> None:
    rows = load_file(path)["rows"] if rows is None else rows
    save_file({"rows": rows}, path, None if facts is None else {"overtone": facts})


@pytest.mark.parametrize(
    "facts",
    [None, "", "{}", "[1]", "null", "[" * 5000, '{"module": "tall", "base": "", "rank": "x", "digest": ""}'],
    ids=["none", "empty", "no keys", "a list", "null", "deep", "no number"],
)
def test_a_file_that_does_not_tell_what_it_held(tmp_path: Path, facts: str | None) -> None:
    Projectors(tmp_path, BASE).get("tall", 64)
    _resaved(_file(tmp_path), facts)
    with pytest.raises(StoreCorrupted):
        Projectors(tmp_path, BASE).get("tall", 64)


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 100])
def test_a_file_that_is_none(tmp_path: Path, data: bytes) -> None:
    Projectors(tmp_path, BASE).get("tall", 64)
    _file(tmp_path).write_bytes(data)
    with pytest.raises(StoreCorrupted):
        Projectors(tmp_path, BASE).get("tall", 64)


def test_rows_under_facts_of_others(tmp_path: Path, decompositions: list[str]) -> None:
    """Sound as a file, but not the rows whose digest it tells."""
    Projectors(tmp_path, BASE).get("tall", 64)
    file = _file(tmp_path)
    sound = file.read_bytes()
    header = sound[: -64 * 200 * 4]
    file.write_bytes(header + torch.linalg.svd(_weight("tall", 1))[2][:64].contiguous().numpy().tobytes())
    Projectors(tmp_path, BASE).get("tall", 64)
    assert file.read_bytes() == sound
    assert len(decompositions) == 2


def test_a_file_of_another_base_or_layer(tmp_path: Path) -> None:
    """A whole and sound one: whoever put it there, it is not computed over."""
    Projectors(tmp_path / "a", BASE).get("tall", 64)
    Projectors(tmp_path / "b", OTHER).get("tall", 64)
    Projectors(tmp_path / "c", BASE).get("wide", 64)
    for wrong in ("b", "c"):
        _file(tmp_path / "a").write_bytes(_file(tmp_path / wrong).read_bytes())
        with pytest.raises(BaseModelMismatch) as caught:
            Projectors(tmp_path / "a", BASE).get("tall", 64)
        assert caught.value.field == "tall"


def test_more_rows_of_other_weights_are_not_served(tmp_path: Path) -> None:
    Projectors(tmp_path, BASE).get("tall", 64)
    sound = _file(tmp_path).read_bytes()
    changed = Projectors(tmp_path, CHANGED)
    changed.get("tall", 64)
    with pytest.raises(BaseModelMismatch):
        changed.get("tall", 65)
    assert _file(tmp_path).read_bytes() == sound


@pytest.mark.parametrize("in_use", [True, False])
def test_a_file_exchanged_behind_our_back(tmp_path: Path, in_use: bool) -> None:
    """Sound and of the same base, but not what this process has served: its leading rows differ."""
    Projectors(tmp_path / "other", CHANGED).get("tall", 128)
    store = Projectors(tmp_path / "p", BASE)
    held = store.get("tall", 64)
    _file(tmp_path / "p").write_bytes(_file(tmp_path / "other").read_bytes())
    if not in_use:
        store.digest("tall", 5)
        del held
    with pytest.raises(BaseModelMismatch):
        store.get("tall", 128)


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("not a folder")
    with pytest.raises(StoreFailed):
        Projectors(tmp_path / "p" / "q", BASE).get("small", 1)
    (tmp_path / "d").mkdir()
    store = Projectors(tmp_path / "d", BASE)
    store.get("small", 1)
    path = _file(tmp_path / "d")
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreFailed):
        Projectors(tmp_path / "d", BASE).get("small", 1)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreFailed, match="No space left"):
        Projectors(tmp_path, BASE).get("small", 1)
    assert not list(tmp_path.iterdir())


def test_a_long_decomposition_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level(logging.INFO):
        Projectors(None, BASE).get("small", 1)
        assert not caplog.records
        monkeypatch.setattr(projectors, "_SLOW_SECONDS", -1.0)
        Projectors(None, BASE).get("small", 1)
    assert "small" in caplog.text


def test_the_digest_of_rows() -> None:
    rows = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    expected = hashlib.sha256(bytes.fromhex("0000803f000000c00000003f00000000")).hexdigest()
    assert rows_digest(rows) == rows_digest(rows.T.contiguous().T) == expected
