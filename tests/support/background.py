"""Work of minutes that other tests need not wait for: begun in processes of its own when tests are collected, one after
another, and asked for by tests that run last."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SEARCHED = ("tests", "server", "kernels", "adapters_store", "proto", ".")


@dataclass(frozen=True)
class Work:
    """A Python command with some environment; what it says and how it ends is kept."""

    arguments: Sequence[str]
    environment: Mapping[str, str]


class Background:
    """The commands under their names, begun by `start` once."""

    def __init__(self, works: Mapping[str, Work]) -> None:
        self._works = works
        self._wanted: list[str] = []
        self._done: dict[str, tuple[int, str]] = {}
        self._news = threading.Condition()

    def start(self, names: Sequence[str]) -> None:
        """In this order, beside the tests."""
        self._wanted = [name for name in self._works if name in names]
        threading.Thread(target=self._run, name="background-work", daemon=True).start()

    def result(self, name: str) -> tuple[int, str]:
        """Return code and the end of the output; waits for it."""
        assert name in self._wanted, f"{name} was not begun"
        with self._news:
            self._news.wait_for(lambda: name in self._done)
            return self._done[name]

    def _run(self) -> None:
        for name in self._wanted:
            found = _run(self._works[name])
            with self._news:
                self._done[name] = found
                self._news.notify_all()


def _run(work: Work) -> tuple[int, str]:
    path = os.pathsep.join(str(ROOT / folder) for folder in _SEARCHED)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **work.environment}
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(
            [sys.executable, *work.arguments], env=environment, cwd=ROOT, stdout=output, stderr=output, check=False
        )
        output.seek(0)
        return done.returncode, output.read()[-8000:]


_INTERPRETED = {"TRITON_INTERPRET": "1"}
GPU_WORK = Background(
    {
        "interpreted": Work(("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"), _INTERPRETED),
        **{f"compiled {capability}": Work(("-m", "support.aot", str(capability)), {}) for capability in (80, 90, 100)},
    }
)
