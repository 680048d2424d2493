"""The embedded demo model for tests: where its converted form is kept, and whether it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from overtone.models.gguf import DEMO_PACKAGE

needs_demo = pytest.mark.skipif(
    importlib.util.find_spec(DEMO_PACKAGE) is None, reason=f"the package {DEMO_PACKAGE} is not installed"
)


def demo_cache() -> Path:
    """Where `make demo` and `make serve` keep it too: the conversion takes long and never changes."""
    cache = Path(__file__).parents[2] / ".overtone" / "models"
    cache.mkdir(parents=True, exist_ok=True)
    return cache
