"""Folders on the server: only plain folders and files below the allowed directories, by whatever way one tries."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from overtone.adapters import AdapterStore
from overtone.errors import InvalidAdapter, PathRefused, TooLarge
from support.adapters import SHAPES, make_loca_folder, open_store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_loca_folder(tmp_path / "outside" / "a", SHAPES, n=5, seed=1)
    make_loca_folder(tmp_path / "root" / "deep" / "a", SHAPES, n=5, seed=2)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside" / "a")
    (tmp_path / "root" / "up").symlink_to("..")
    (tmp_path / "root" / "inner").symlink_to("deep")
    (tmp_path / "root" / "file").write_text("x")
    return tmp_path / "root"


@pytest.fixture
def rooted(root: Path, tmp_path: Path) -> AdapterStore:
    return open_store(tmp_path / "store2", adapter_roots=(tmp_path / "empty-root", root))


@pytest.fixture(autouse=True)
def _empty_root(tmp_path: Path) -> None:
    (tmp_path / "empty-root").mkdir()


def test_loads_below_any_root(rooted: AdapterStore) -> None:
    assert rooted.load_folder("deep/a", "x").family == "loca"
    assert rooted.load_folder("deep/a", "y", validate_only=True).id == "y"
    assert [r.id for r in rooted.list(0, "")[0]] == ["x"]


BAD_PATHS = [
    "",
    "/",
    "/etc",
    ".",
    "..",
    "deep/../deep/a",
    "./deep/a",
    "deep//a",
    "deep/a/",
    "../outside/a",
    "nul\0byte",
]
BAD_PATHS += [
    "back\\slash",
    "link",
    "up/outside/a",
    "inner/a",
    "file",
    "file/a",
    "missing",
    "x" * 5000,
    "\udcff",
    "a\nb",
]


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: ascii(path)[:20])
def test_refused_paths(rooted: AdapterStore, root: Path, path: str) -> None:
    for attempt in (path, str(root / "deep" / "a")):
        with pytest.raises(PathRefused) as caught:
            rooted.load_folder(attempt, "x")
        assert caught.value.field == "path"
        assert len(str(caught.value)) < 500
    assert rooted.list(0, "") == ([], "")


def test_without_roots_nothing_is_read(tmp_path: Path) -> None:
    with pytest.raises(PathRefused, match="--adapter-root"):
        open_store(tmp_path / "store3").load_folder("a", "x")


def weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def replace_weights(how: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights(folder).unlink()
        how(folder)

    return change


CHANGES: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "missing weights": (lambda f: weights(f).unlink(), InvalidAdapter, "adapter_model.safetensors is missing"),
    "missing config": (
        lambda f: (f / "adapter_config.json").unlink(),
        InvalidAdapter,
        "adapter_config.json is missing",
    ),
    "pickle beside": (
        lambda f: (f / "adapter_model.bin").write_bytes(b""),
        InvalidAdapter,
        "pickle files are never read",
    ),
    "another file": (lambda f: (f / "new_embeddings.safetensors").write_bytes(b""), InvalidAdapter, "new_embeddings"),
    "a link": (
        replace_weights(lambda f: weights(f).symlink_to(f.parents[2] / "outside/a/adapter_model.safetensors")),
        PathRefused,
        "link",
    ),
    "a folder": (replace_weights(lambda f: weights(f).mkdir()), PathRefused, "regular"),
    "a pipe": (replace_weights(lambda f: os.mkfifo(weights(f))), PathRefused, "regular"),
    "large weights": (lambda f: os.truncate(weights(f), 1 << 40), TooLarge, "adapter_model.safetensors"),
    "large config": (lambda f: os.truncate(f / "adapter_config.json", 1 << 17), TooLarge, "adapter_config.json"),
}


@pytest.mark.parametrize("row", CHANGES)
def test_refused_files(rooted: AdapterStore, root: Path, row: str) -> None:
    change, kind, named = CHANGES[row]
    change(root / "deep" / "a")
    with pytest.raises(kind, match=named):
        rooted.load_folder("deep/a", "x")
    assert rooted.list(0, "") == ([], "")


def test_a_model_card_is_no_obstacle(rooted: AdapterStore, root: Path) -> None:
    (root / "deep" / "a" / "README.md").write_text("# An adapter")
    assert rooted.load_folder("deep/a", "x").id == "x"


def handles_below(root: Path) -> list[str]:
    """What this process has open there. Other threads' handles come and go."""
    found = []
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(os.readlink(handle))  # noqa: PTH115
    return [path for path in found if Path(path).is_relative_to(root)]


def test_no_handle_is_left_open(rooted: AdapterStore) -> None:
    root = rooted._config.adapter_roots[0].resolve()
    before = handles_below(root)
    for path in ("deep/a", "deep/b", "link", "file/a", "deep"):
        try:
            rooted.load_folder(path, "x")
        except (PathRefused, InvalidAdapter):
            continue
    assert handles_below(root) == before
