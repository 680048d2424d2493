"""What a run was made with: for its record, and to tell whether another may go on with it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from overtone.tuning.data.sources import source_of

if TYPE_CHECKING:
    from overtone.tuning.config import TuneConfig
    from overtone.tuning.data import TuningData
    from overtone.tuning.methods.types import Method

_FREE = frozenset({"out", "resume", "save_every", "model_cache"})
"""Settings that change nothing of what is learned."""


def versions() -> dict[str, str]:
    named = ("overtone", "torch", "transformers", "accelerate", "peft")
    found = {name: version for name in named if (version := _version(name)) is not None}
    return {**found, "python": platform.python_version()}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def method_settings(method: Method) -> dict[str, Any]:
    """Of what cannot take part in a comparison (a folder, tensors) nothing is said."""
    budget: dict[str, Any] = (
        {each.name: getattr(method, each.name) for each in fields(method) if each.compare}
        if is_dataclass(method) and not isinstance(method, type)
        else {}
    )
    return {"name": method.name, **budget}


def settings_of(config: TuneConfig, data: TuningData, *, base: str, dtype: str, total_steps: int) -> dict[str, Any]:
    """All that decides what is learned, as JSON has it. base: the model's fingerprint; data: by size and digest."""
    plain = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in _FREE}
    made: dict[str, Any] = {
        **plain,
        "method": method_settings(config.method),
        "data": data.identity,
        "eval_data": None if config.eval_data is None else source_of(config.eval_data, "eval_data").identity(),
        "lr": config.learning_rate,
        "dtype": dtype,
        "base": base,
        "total_steps": total_steps,
    }
    turned: dict[str, Any] = json.loads(json.dumps(made, default=str))
    return turned
