"""Each system as a server process of its own, started with its best known settings for this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from overtone.api.cli.process import ServerProcess
from overtone.client.types import ModelInfo

START_S = 900.0


class PeerFailed(RuntimeError):
    """A server did not start or refused a call; the message has the end of its log or its answer."""


class Server(ABC):
    """A running server; a context manager."""

    settings: list[str]

    @property
    @abstractmethod
    def address(self) -> str: ...

    @property
    @abstractmethod
    def pid(self) -> int: ...

    @abstractmethod
    def load(self, folders: Mapping[str, Path]) -> None:
        """Makes adapters known by id; those known already stay."""

    @abstractmethod
    def stop(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class OvertoneServer(Server):
    """`overtone serve` with a store of its own."""

    def __init__(self, model: str, store: Path, cache: Path, dtype: str, extra: tuple[str, ...]) -> None:
        # As for the peer: every prompt is computed, in every run.
        self.settings = ["--dtype", dtype, "--max-batch", "64", "--no-prefix-cache", *extra]
        place = ["--model", model, "--store", str(store), "--model-cache", str(cache)]
        self._process = ServerProcess([*place, *self.settings])
        try:
            self._process.wait_serving(START_S)
        except BaseException:
            self._process.kill()
            raise

    @property
    def address(self) -> str:
        return self._process.address

    @property
    def pid(self) -> int:
        return self._process.process.pid

    def load(self, folders: Mapping[str, Path]) -> None:
        with self._process.client() as client:
            known = {adapter.id for adapter in client.adapters.list()}
            for adapter_id, folder in folders.items():
                if adapter_id not in known:
                    client.adapters.load(folder, id=adapter_id)

    def model(self) -> ModelInfo:
        with self._process.client() as client:
            return client.model()

    def stop(self) -> None:
        self._process.stop()


class VllmServer(Server):
    """`vllm serve` from its own environment, bound to all cores, with the libraries of `preload` first."""

    def __init__(
        self, env: Path, model: Path, dtype: str, extra: tuple[str, ...], preload: list[str], kv_gib: int, log: Path
    ) -> None:
        self._port = free_port()
        self.settings = ["--dtype", dtype, "--max-num-seqs", "64", "--no-enable-prefix-caching", *extra]
        place = ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(self._port)]
        command = [str(env.absolute() / "bin" / "vllm"), "serve", str(model.absolute()), *place, *self.settings]
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("w", encoding="utf-8") as file:
            environment = vllm_environment(env, preload, kv_gib)
            self._process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            self._wait_serving()
        except BaseException:
            self.stop()
            raise

    def _wait_serving(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://{self.address}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise PeerFailed(f"vLLM did not start:\n{self._log.read_text(encoding='utf-8', errors='replace')[-4000:]}")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self, folders: Mapping[str, Path]) -> None:
        for name, folder in folders.items():
            body = json.dumps({"lora_name": name, "lora_path": str(folder.absolute())}).encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"http://{self.address}/v1/load_lora_adapter", body, headers)
            try:
                with urllib.request.urlopen(request, timeout=120):
                    pass
            except urllib.error.HTTPError as error:
                raise PeerFailed(f"vLLM refused adapter {name}: {error.read().decode()}") from error

    def stop(self) -> None:
        """SIGTERM; SIGKILL after half a minute."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def vllm_environment(env: Path, preload: list[str], kv_gib: int) -> dict[str, str]:
    """This process's environment less its Python path, with vLLM's settings."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {
        "PATH": f"{env.absolute() / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        "LD_PRELOAD": ":".join(preload),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def preload_libraries(env: Path) -> list[str]:
    """tcmalloc where the system has it (Debian: libtcmalloc-minimal4), and Intel's OpenMP from `env`."""
    return [str(path.absolute()) for path in (*_system_libraries("libtcmalloc_minimal.so.4"), *_openmp(env))]


def _system_libraries(name: str) -> Iterator[Path]:
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    yield from [Path(line.rpartition("=> ")[2]) for line in listed.splitlines() if line.split(" ")[0].strip() == name][
        :1
    ]


def _openmp(env: Path) -> list[Path]:
    return [path for path in [env / "lib" / "libiomp5.so"] if path.exists()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
