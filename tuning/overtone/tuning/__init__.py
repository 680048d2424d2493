"""Making adapters: tuning on examples (`tune`), compressing what is there already. Nothing of the server imports this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overtone.tuning.config import TuneConfig
    from overtone.tuning.result import TuneResult
    from overtone.tuning.training import tune

__all__ = ["TuneConfig", "TuneResult", "tune"]


def __getattr__(name: str) -> Any:
    """Imported when they are used: the command line shows its help without torch."""
    from importlib import import_module

    homes = {"TuneConfig": "config", "TuneResult": "result", "tune": "training"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
