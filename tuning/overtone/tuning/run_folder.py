"""The folder of a run: `OUT.partial` while it runs, `OUT` once it is whole."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from overtone.errors import InvalidRequest
from overtone.tuning.checkpoint import remove_checkpoint, sync_folder

ADAPTER = "adapter"
RUN = "run.json"
_SETTINGS = "settings.json"
_STAGING = f".{_SETTINGS}.writing"


class RunFolder:
    """`path` exists from `begin` to `finish`; what it is renamed to is complete and synced. One process at a time."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f"{out.name}.partial")
        self._lock: IO[str] | None = None

    def check(self, *, resume: bool) -> None:
        """Before anything expensive. Raises `InvalidRequest` for what is in the way."""
        if not self.path.exists():
            return
        if not (self.path / _SETTINGS).exists():
            if any(each.name != _STAGING for each in self.path.iterdir()):
                raise InvalidRequest(f"out: {self.path} is in the way and is not a run: remove it", field="out")
        elif not resume:
            raise InvalidRequest(
                f"out: {self.path} is an interrupted run: resume it, or remove it and begin again", field="out"
            )

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> bool:
        """Whether an interrupted run is there to go on with. Raises `InvalidRequest` if it had other settings (naming the
        first), if it is still running, or for what `check` refuses."""
        self.check(resume=resume)
        known = self._known_settings()
        if known is None:
            self._create(settings)
        else:
            self._compare(known, json.loads(json.dumps(settings)))
        self._lock = (self.path / _SETTINGS).open(encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidRequest(f"out: another process is running in {self.path}", field="out") from error
        return known is not None

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _known_settings(self) -> dict[str, Any] | None:
        try:
            known: dict[str, Any] = json.loads((self.path / _SETTINGS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InvalidRequest(f"resume: {self.path / _SETTINGS} is damaged: {error}", field="resume") from error
        return known

    def _create(self, settings: Mapping[str, Any]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            staging = self.path / _STAGING
            staging.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            staging.replace(self.path / _SETTINGS)
        except OSError as error:
            raise InvalidRequest(f"out: cannot write {self.path}: {error.strerror}", field="out") from error

    def _compare(self, known: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        for name in [*known, *(name for name in asked if name not in known)]:
            before, now = known.get(name), asked.get(name)
            if isinstance(before, dict) and isinstance(now, dict) and before != now:
                inner = next(key for key in [*before, *now] if before.get(key) != now.get(key))
                name, before, now = f"{name}.{inner}", before.get(inner), now.get(inner)
            if before != now:
                raise InvalidRequest(
                    f"resume: {name} was {before!r} in {self.path} and is {now!r} now: give what it was, or another out",
                    field=name,
                )

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER

    def clear_adapter(self) -> None:
        """An adapter that a kill left half written."""
        shutil.rmtree(self.adapter, ignore_errors=True)

    def finish(self, run: Mapping[str, Any]) -> None:
        """Until the renaming a kill leaves a run that can be resumed, after it a whole one."""
        (self.path / RUN).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        for each in [*self.path.rglob("*"), self.path]:
            _sync(each)
        try:
            self.path.rename(self.out)
        except OSError as error:
            raise InvalidRequest(
                f"out: cannot rename {self.path} to {self.out}: {error.strerror}", field="out"
            ) from error
        sync_folder(self.out.parent)
        remove_checkpoint(self.out)
        (self.out / _SETTINGS).unlink()


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
