"""The command line: where settings come from, what is printed, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from overtone.api.cli import main
from overtone.api.config import ServerConfig
from overtone.errors import QueueFull
from support.fake_server import FakeServer


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration file, no settings in the environment."""
    monkeypatch.chdir(tmp_path)
    for setting in (*(each.name for each in fields(ServerConfig)), "config", "address", "timeout", "ca"):
        monkeypatch.delenv(f"OVERTONE_{setting.upper()}", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """The configurations that `serve` would have run."""
    configs: list[ServerConfig] = []
    module: Any = types.ModuleType("overtone.api.serve")
    module.run = configs.append
    monkeypatch.setitem(sys.modules, "overtone.api.serve", module)
    return configs


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with FakeServer() as fake:
        monkeypatch.setenv("OVERTONE_ADDRESS", fake.address)
        yield fake


def run(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False, **options)


def test_every_setting_is_a_flag(started: list[ServerConfig]) -> None:
    assert run("serve").exit_code == 0
    assert started == [ServerConfig()]
    help_text = run("serve", "--help").output
    assert all(f"--{setting.name.replace('_', '-')}" in help_text for setting in fields(ServerConfig))


def test_precedence(started: list[ServerConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "overtone.toml").write_text("port = 1\nmax_batch = 8\nmax_queue = 9\nreflection = false\n")
    (tmp_path / "other.toml").write_text(f'port = 2\nadapter_root = ["{tmp_path}"]\n')
    monkeypatch.setenv("OVERTONE_MAX_BATCH", "16")
    monkeypatch.setenv("OVERTONE_MAX_QUEUE", "17")
    assert run("serve", "--max-queue", "32").exit_code == 0
    assert started.pop() == ServerConfig(port=1, max_batch=16, max_queue=32, reflection=False)
    assert run("serve", "--config", "other.toml").exit_code == 0
    assert started.pop() == ServerConfig(port=2, max_batch=16, max_queue=17, adapter_root=(tmp_path,))
    monkeypatch.setenv("OVERTONE_CONFIG", "other.toml")
    assert run("serve").exit_code == 0
    assert started.pop().port == 2


def test_print_config(started: list[ServerConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "overtone.toml").write_text("max_queue = 9\n")
    monkeypatch.setenv("OVERTONE_MAX_BATCH", "16")
    result = run("serve", "--print-config", "--port", "5", "--metrics")
    assert result.exit_code == 0
    assert not started
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.split()}
    assert rows["max_batch"] == ["16", "environment", "OVERTONE_MAX_BATCH"]
    assert rows["max_queue"] == ["9", "file", "overtone.toml"]
    assert rows["port"] == ["5", "flag"]
    assert rows["host"] == ["127.0.0.1", "default"]
    assert {setting.name for setting in fields(ServerConfig)} <= rows.keys()


def test_wrong_settings_end_in_one_line(started: list[ServerConfig], tmp_path: Path) -> None:
    result = run("serve", "--host", "0.0.0.0")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: host 0.0.0.0 can be reached")
    assert result.stderr.endswith("[BAD_CONFIG]\n")
    assert result.stderr.count("\n") == 1
    (tmp_path / "overtone.toml").write_text("max_bach = 9\n")
    assert "did you mean 'max_batch'?" in run("serve").stderr
    (tmp_path / "overtone.toml").write_text("max_batch = 2.5\n")
    assert run("serve").exit_code == 2
    assert not started


def test_generate_with_sampling_options(server: FakeServer, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    arguments = ["--json-schema", f"@{schema}", "--logit-bias", "5=-1.5", "--logit-bias", "6=2", "-n", "2"]
    result = run("generate", "Say", *arguments, "--stop-token-id", "3", "--min-new-tokens", "1", "--prompt-logprobs")
    assert result.exit_code == 0, result.output
    (request,) = server.requests
    assert request.sampling.guided.json_schema == '{"type": "object"}'
    assert dict(request.sampling.logit_bias) == {5: -1.5, 6: 2.0}
    assert (request.n, list(request.stopping.stop_token_ids), request.stopping.min_new_tokens) == (2, [3], 1)
    assert request.response.prompt_logprobs
    assert run("generate", "Say", "--logit-bias", "x=1").exit_code == 2
    assert run("generate", "Say", "--grammar", "@/nowhere").exit_code == 2
    assert run("generate", "Say", "-n", "2", "--stream").exit_code == 2


def test_generate(server: FakeServer) -> None:
    assert run("generate", "Say", "--adapter", "mine", "--stop", "!", "--top-k", "3").stdout == "Hi\n"
    assert run("generate", "-", "--no-stream", "--chat", input="Hello").stdout == "Hi\n"
    whose = ("--tenant", "anna", "--priority", "-2")
    usage = json.loads(run("generate", "Say", "--json", *whose).stdout)["usage"]
    assert usage == {"prompt_tokens": 3, "completion_tokens": 2, "cached_prompt_tokens": 1}
    assert (server.requests[2].tenant, server.requests[2].priority) == ("anna", -2)
    lines = run("generate", "Say", "--json", "--stream").stdout.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["H", "i"]
    first, chat = server.requests[:2]
    assert (first.text, first.adapter, first.sampling.top_k, list(first.stopping.stop)) == ("Say", "mine", 3, ["!"])
    assert chat.chat.messages[0].content == "Hello"


def test_an_error_is_one_line_with_its_reason(server: FakeServer) -> None:
    server.fail = [QueueFull("256 requests wait", retry_after_s=1.5)]
    result = run("generate", "Say")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: 256 requests wait [QUEUE_FULL]; try again in 1.5 s\n"


def test_adapters(server: FakeServer, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    arguments = ["--id", "mine", "--pin", "--label", "k=v", "--tenant", "anna", "--json"]
    loaded = run("adapters", "load", str(tmp_path), *arguments)
    assert json.loads(loaded.stdout)["create_time"] == "1970-01-02T00:00:00+00:00"
    options = server.requests[0][0].header.options
    assert (options.pinned, dict(options.labels), options.tenant) == (True, {"k": "v"}, "anna")
    assert [each["id"] for each in json.loads(run("adapters", "list", "--json").stdout)] == list("abcde")
    run("adapters", "list", "--filter", "pinned = true", "--order-by", "id desc")
    assert (server.requests[-1].filter, server.requests[-1].order_by) == ("pinned = true", "id desc")
    listed = run("adapters", "list").stdout
    assert "team=[red]x" in listed
    assert "a" * 12 in listed
    assert "\x1b" not in listed
    assert "a" * 64 in run("adapters", "show", "mine").stdout
    assert json.loads(run("adapters", "pin", "mine", "--off", "--json").stdout)["pinned"] is False
    assert run("adapters", "load", str(tmp_path), "--id", "x", "--label", "nonsense").exit_code == 2


def test_delete_asks_first(server: FakeServer) -> None:
    assert run("adapters", "delete", "mine", input="n\n").exit_code == 1
    assert server.requests == []
    told = run("adapters", "delete", "mine", input="y\n").stdout
    assert told == "deleted mine: 2.0 KiB freed, 4.0 KiB when 2 running uses end\n"
    gone = json.loads(run("adapters", "delete", "mine", "--yes", "--json").stdout)
    assert gone == {"id": "mine", "deleted": True, "freed_bytes": 2048, "pending_bytes": 4096, "lease_count": 2}
    assert len(server.requests) == 2


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, started: list[ServerConfig]) -> None:
    def interrupt(config: ServerConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["overtone.api.serve"], "run", interrupt)
    assert run("serve").exit_code == 130
    assert run("serve", "--no-such-flag").exit_code == 2


def test_doctor(tmp_path: Path) -> None:
    result = run("doctor", "--json", "--port", "0", "--metrics-port", "0", "--store", str(tmp_path / "new"))
    checks = {each["name"]: each for each in json.loads(result.stdout)}
    assert {"python", "torch", "cpu", "gpu", "triton", "transformers", "grpcio", "demo model"} <= checks.keys()
    assert (checks["store"]["status"], checks["port"]["status"]) == ("ok", "ok")
    assert result.exit_code == int(any(each["status"] == "fail" for each in checks.values()))


def test_doctor_finds_a_taken_port_and_a_bad_store(server: FakeServer) -> None:
    port = server.address.rpartition(":")[2]
    result = run("doctor", "--port", port, "--store", "/dev/null/store")
    assert result.exit_code == 1
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.split()}
    assert "warn" in rows["port"]
    assert "--port" in rows["port"]
    assert "fail" in rows["store"]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from overtone.api.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "main(['generate', '--help'], standalone_mode=False)\n"
        "print('heavy:', sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    assert "demo" in done.stdout
