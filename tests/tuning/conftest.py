"""What makes many short runs fast enough to be tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from overtone.tuning import finishing


@pytest.fixture(scope="session", autouse=True)
def _little_garbage() -> Iterator[None]:
    """The Trainer collects garbage in every run, which takes longer than the run when it looks through the whole suite."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take as long as the rest of a run."""
    monkeypatch.setattr(finishing, "plot_losses", lambda *_: False)
