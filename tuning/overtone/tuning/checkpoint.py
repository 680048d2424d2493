"""One file from which a run goes on: what tuning changes, the optimiser, the schedule, the random state and the place in the
data. The base is not in it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from overtone.errors import InvalidRequest

_FORMAT = 1
_NAME = "checkpoint.pt"


def write_checkpoint(folder: Path, content: Mapping[str, Any]) -> None:
    """Replaces the one before in one go, synced: a kill at any moment leaves one of the two whole."""
    staging = folder / f".{_NAME}.writing"
    with staging.open("wb") as file:
        torch.save({"format": _FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(folder / _NAME)
    sync_folder(folder)


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """None if the run was interrupted before its first checkpoint. Nothing in the file is executed."""
    path = folder / _NAME
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InvalidRequest(f"resume: {path} cannot be read: {error}", field="resume") from error
    if content.get("format") != _FORMAT:
        raise InvalidRequest(f"resume: {path} is of another version of Overtone", field="resume")
    return content


def remove_checkpoint(folder: Path) -> None:
    (folder / _NAME).unlink(missing_ok=True)
    (folder / f".{_NAME}.writing").unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def random_state() -> dict[str, Any]:
    """Of torch's generators, which are all that a step draws from."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
