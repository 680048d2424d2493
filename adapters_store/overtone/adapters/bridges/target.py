"""The new folder: complete or not there at all."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from overtone.adapters.failures import operation
from overtone.adapters.files import AdapterFiles
from overtone.errors import AdapterExists


def check_target(folder: Path) -> None:
    """Raises `AdapterExists` unless nothing, or an empty folder, is there."""
    with operation("look at the target folder"):
        taken = folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir())))
    if taken:
        raise AdapterExists(f"{folder} exists and is not an empty folder", field="target")


def write_folder(folder: Path, files: AdapterFiles) -> None:
    """Both files in a new folder, which appears in one step. Raises `AdapterExists`, `StoreFailed`."""
    check_target(folder)
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    with operation("write the adapter's folder"):
        staging.mkdir(parents=True)
        try:
            (staging / files.layout.config).write_bytes(files.config)
            (staging / files.layout.weights).write_bytes(files.weights)
            staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
