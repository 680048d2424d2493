"""ServerConfig: its checks, and that nothing about a setting is said twice."""

from __future__ import annotations

from dataclasses import MISSING, FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from overtone.api.config import ServerConfig
from overtone.api.settings import read_file
from overtone.errors import ConfigError


def test_the_defaults_are_sound() -> None:
    config = ServerConfig()
    assert (config.address, config.loopback, config.tls) == ("127.0.0.1:50051", True, False)
    assert config.kv_cache_mib == 0
    assert config.adapter_memory_bytes == 1024 << 20
    assert config.max_adapter_bytes == 64 << 20
    with pytest.raises(FrozenInstanceError):
        config.port = 1  # type: ignore[misc]


def test_every_field_has_a_default_and_help() -> None:
    for setting in fields(ServerConfig):
        assert setting.default is not MISSING
        assert setting.metadata["help"].endswith(".")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("model", {"model": ""}),
        ("port", {"port": 65536}),
        ("port", {"port": -1}),
        ("metrics_port", {"metrics_port": 50051}),
        ("dtype", {"dtype": "int8"}),
        ("device", {"device": "tpu"}),
        ("threads", {"threads": -1}),
        ("nice", {"nice": 20}),
        ("max_batch", {"max_batch": 0}),
        ("admin_port", {"admin_port": 65536}),
        ("admin_port", {"admin_port": 50051}),
        ("admin_host", {"admin_port": 0, "admin_host": "0.0.0.0"}),
        ("backup_root", {"backup_root": Path("/nowhere/at/all")}),
        ("max_step_tokens", {"max_batch": 8, "max_step_tokens": 4}),
        ("max_context_tokens", {"max_context_tokens": -1}),
        ("kv_cache_mib", {"kv_cache_mib": -1}),
        ("page_tokens", {"page_tokens": 0}),
        ("max_queue", {"max_queue": 0}),
        ("max_queue_tokens", {"max_queue_tokens": 0}),
        ("max_queue_share", {"max_queue_share": 0.0}),
        ("max_queue_share", {"max_queue_share": 1.5}),
        ("max_queue_share", {"max_queue_share": float("nan")}),
        ("tenant_weight", {"tenant_weight": ("anna",)}),
        ("tenant_weight", {"tenant_weight": ("anna=0",)}),
        ("tenant_weight", {"tenant_weight": ("anna=inf",)}),
        ("tenant_weight", {"tenant_weight": ("Anna=1",)}),
        ("tenant_weight", {"tenant_weight": ("anna=1", "anna=2")}),
        ("default_max_new_tokens", {"default_max_new_tokens": 0}),
        ("adapter_load_threads", {"adapter_load_threads": 0}),
        ("max_adapter_mib", {"max_adapter_mib": 2, "adapter_memory_mib": 1}),
        ("drain_seconds", {"drain_seconds": -1.0}),
        ("drain_seconds", {"drain_seconds": float("nan")}),
        ("host", {"host": "0.0.0.0"}),
        ("host", {"host": "::"}),
        ("host", {"host": "example.test"}),
        ("log_level", {"log_level": "loud"}),
        ("adapter_root", {"adapter_root": (Path("does-not-exist"),)}),
        ("tls_cert", {"tls_cert": Path("does-not-exist")}),
        ("disk_mib", {"disk_mib": -1}),
        ("disk_mib", {"disk_mib": 100}),
        ("remote_store", {"remote_store": ""}),
        ("remote_store", {"remote_store": "bucket/prefix"}),
        ("keep_versions", {"keep_versions": 0}),
        ("tracked_adapters", {"tracked_adapters": 1, "metrics_top_adapters": 0}),
        ("metrics_top_adapters", {"metrics_top_adapters": -1}),
        ("metrics_top_adapters", {"metrics_top_adapters": 1001}),
        ("metrics_top_adapters", {"metrics_top_adapters": 50, "tracked_adapters": 50}),
        ("watch_folder", {"watch_folder": Path("does-not-exist")}),
        ("watch_delete", {"watch_delete": True}),
    ],
)
def test_a_wrong_value_names_its_field(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**values)
    assert caught.value.field == field
    assert field in caught.value.message


def test_who_may_reach_the_server(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.write_text("x")
    assert ServerConfig(host="localhost").loopback
    assert ServerConfig(host="::1").address == "[::1]:50051"
    assert not ServerConfig(host="0.0.0.0", insecure_bind=True).loopback
    assert ServerConfig(host="0.0.0.0", tls_cert=pem, tls_key=pem, tls_client_ca=pem).tls
    for name in ("tls_cert", "tls_key", "tls_client_ca"):
        with pytest.raises(ConfigError, match="needs") as caught:
            ServerConfig(**{name: pem})
        assert caught.value.field == name


def test_folders(tmp_path: Path) -> None:
    assert ServerConfig(adapter_root=(tmp_path,), store=tmp_path / "new").adapter_root == (tmp_path,)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="not a folder"):
        ServerConfig(store=file)


def test_the_store_and_what_fills_it(tmp_path: Path) -> None:
    assert ServerConfig(disk_mib=100, remote_store="s3://bucket/prefix").keep_versions == 10
    (tmp_path / "store" / "drop").mkdir(parents=True)
    assert ServerConfig(store=tmp_path / "store", watch_folder=tmp_path, watch_delete=True).watch_delete
    for inside in (tmp_path / "store", tmp_path / "store" / "drop"):
        with pytest.raises(ConfigError, match="part of the store") as caught:
            ServerConfig(store=tmp_path / "store", watch_folder=inside)
        assert caught.value.field == "watch_folder"


def test_a_file_is_read_as_flags_are(tmp_path: Path) -> None:
    file = tmp_path / "o.toml"
    file.write_text('max_batch = 8\nreflection = false\nadapter_root = ["a", "b"]\nhost = "::1"\n')
    assert read_file(file) == {
        "max_batch": "8",
        "reflection": "False",
        "adapter_root": ["a", "b"],
        "host": "::1",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_bach = 8", r"unknown setting 'max_bach'; did you mean 'max_batch'\?"),
        ("max-batch = 8", r"did you mean 'max_batch'\?"),
        ("zzz = 8", "unknown setting 'zzz'$"),
        ("max_batch = [8]", "max_batch must be a single value"),
        ("model = {name = 'x'}", "model must be a single value"),
        ("adapter_root = [['x']]", "adapter_root must be a list of strings"),
        ("max_batch = ", "cannot read"),
    ],
)
def test_a_wrong_file_says_what(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "o.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_file(file)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_file(tmp_path / "none.toml")
