"""A server of our own in a process of its own: for the demo, the benchmarks and the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from overtone.client import Client
from overtone.errors import Unavailable


class ServerProcess:
    """`overtone serve` with the given arguments on free ports of the loopback. A context manager; SIGTERM at the end."""

    def __init__(self, arguments: Sequence[str], *, on_log: Callable[[dict[str, object]], None] | None = None) -> None:
        command = [sys.executable, "-m", "overtone.api.cli", "serve", "--port", "0", "--metrics-port", "0"]
        self._log: deque[str] = deque(maxlen=500)
        self._on_log = on_log
        self._ready = threading.Event()
        self.fields: dict[str, object] = {}
        self.process = subprocess.Popen(
            [*command, "--log-format", "json", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.fields['port']}"

    @property
    def metrics_address(self) -> str:
        return f"127.0.0.1:{self.fields['metrics_port']}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._log.append(line)
            try:
                fields = json.loads(line)
            except ValueError:
                continue
            if fields.get("message") == "serving":
                self.fields = fields
                self._ready.set()
            if self._on_log is not None:
                self._on_log(fields)
        self._ready.set()

    def log_text(self) -> str:
        """The end of what the server has written."""
        return "".join(self._log)

    def wait_serving(self, timeout: float = 600.0) -> None:
        """Until the model is warm. Raises `Unavailable` with the end of the server's log if it ends before."""
        if not self._ready.wait(timeout) or not self.fields:
            self.kill()
            raise Unavailable(f"the server did not start:\n{self.log_text()[-4000:]}")

    def client(self) -> Client:
        return Client(self.address)

    def stop(self, timeout: float = 60.0) -> int:
        """SIGTERM, then the exit status."""
        self.process.terminate()
        return self._wait(timeout)

    def kill(self) -> int:
        """kill -9."""
        self.process.kill()
        return self._wait(60.0)

    def _wait(self, timeout: float) -> int:
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._reader.join(timeout=10)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return status

    def __enter__(self) -> Self:
        try:
            self.wait_serving()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.stop()


def side_store_arguments(store: Path, name: str, model: str) -> list[str]:
    """A store of its own within the user's: its adapters do not mix with real ones, the converted model is shared."""
    return ["--model", model, "--store", str(store / name), "--model-cache", str(store / "models")]
