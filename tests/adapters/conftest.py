from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overtone.adapters import AdapterStore
from support.adapters import SHAPES, make_loca_folder, open_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    opened = open_store(tmp_path / "store", adapter_roots=(tmp_path,))
    yield opened
    opened.close()


@pytest.fixture
def loca(tmp_path: Path) -> Callable[[int], Path]:
    """Seed -> the folder of a LoCA adapter; equal sizes, different contents."""
    return lambda seed: make_loca_folder(tmp_path / f"loca-{seed}", SHAPES, n=12, seed=seed)
