"""kill -9: what was acknowledged is there after a restart, exact; what was not is not half there."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from overtone.api.cli.process import ServerProcess
from overtone.client import Client
from support.demo import demo_cache
from support.traffic import make_adapters


def start(store: Path) -> ServerProcess:
    # The converted model is shared between tests; the adapters are not.
    arguments = ["--model", "demo", "--store", str(store), "--model-cache", str(demo_cache()), "--dtype", "float32"]
    server = ServerProcess([*arguments, "--kv-cache-mib", "256"])
    server.wait_serving()
    return server


@pytest.mark.timeout(900)
def test_acknowledged_adapters_survive_kill_nine(tmp_path: Path) -> None:
    store = tmp_path / "store"
    server = start(store)
    try:
        with Client(server.address) as client:
            info = client.model()
            modules = {
                m.name: (m.out_features, m.in_features) for m in info.modules if m.name.endswith(("q_proj", "v_proj"))
            }
            made = make_adapters(tmp_path / "made", modules, 3)
            acknowledged = {name: client.adapters.load(folder, id=name) for name, folder in made.items()}
            before = {n: client.generate("The sea", adapter=n, max_new_tokens=8, ignore_eos=True) for n in made}
        server.kill()
        server = start(store)
        with Client(server.address) as client:
            assert {a.id: a.digest for a in client.adapters.list()} == {n: a.digest for n, a in acknowledged.items()}
            for name, answer in before.items():
                again = client.generate("The sea", adapter=name, max_new_tokens=8, ignore_eos=True)
                assert again.token_ids == answer.token_ids
                assert again.adapter_digest == answer.adapter_digest
        assert server.stop() == 0
    finally:
        if server.process.poll() is None:
            server.kill()


def test_sigterm_while_the_model_loads_ends_the_process(tmp_path: Path) -> None:
    listening = threading.Event()

    def hear(fields: dict[str, object]) -> None:
        if fields.get("message") == "listening":
            listening.set()

    # A cache of its own: the conversion takes many seconds, and the signal comes in the middle of it.
    server = ServerProcess(["--model", "demo", "--store", str(tmp_path / "store")], on_log=hear)
    try:
        assert listening.wait(300)
        server.process.terminate()
        assert server.process.wait(300) == 0
        assert '"serving"' not in server.log_text()
    finally:
        server.kill()
