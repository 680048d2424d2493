"""The control plane of both clients: uploads in chunks, lazy pages, updates."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import pytest

from overtone.client import Client, Deletion, EngineStarting, InvalidAdapter
from overtone.v1 import adapters_pb2 as pb
from support.fake_server import Driver, FakeServer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * (10 << 10) + b"tail")
    return tmp_path


def test_upload(ask: Driver, server: FakeServer, folder: Path) -> None:
    adapter = ask(
        lambda client: client.adapters.load(
            folder, id="mine", pinned=True, labels={"k": "v"}, tenant="anna", create_only=True
        )
    )
    header, *rest = server.requests[0]
    options = pb.AdapterOptions(pinned=True, labels={"k": "v"}, tenant="anna", create_only=True)
    assert header.header == pb.UploadHeader(adapter_id="mine", options=options)
    chunks = [message.chunk for message in rest]
    assert all(0 < len(chunk.data) <= 1 << 20 for chunk in chunks)
    files = {name: b"".join(c.data for c in group) for name, group in groupby(chunks, key=lambda c: c.file_name)}
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(chunks) == 4
    assert (adapter.id, adapter.state, adapter.size_bytes, adapter.warnings) == ("mine", "resident", 2048, ["odd"])
    assert (adapter.create_time, adapter.update_time) == (datetime(1970, 1, 2, tzinfo=UTC), None)
    assert (adapter.tenant, adapter.last_used_time) == ("anna", datetime(1970, 1, 3, tzinfo=UTC))
    with pytest.raises(TypeError, match="label"):
        ask(lambda client: client.adapters.load(folder, id="mine", label={"k": "v"}))


def test_upload_is_not_retried(ask: Driver, server: FakeServer, folder: Path) -> None:
    server.retryable = True
    server.fail = [EngineStarting("soon")]
    with pytest.raises(EngineStarting):
        ask(lambda client: client.adapters.load(str(folder), id="mine", validate_only=True))
    assert len(server.requests) == 1
    assert server.requests[0][0].header.options.validate_only


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(ask: Driver, server: FakeServer, folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InvalidAdapter, match=name) as caught:
        ask(lambda client: client.adapters.load(folder, id="mine"))
    assert caught.value.field == name
    assert server.requests == []


def test_pickle_is_refused(ask: Driver, folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InvalidAdapter, match=r"pickle.*overtone adapters convert"):
        ask(lambda client: client.adapters.load(folder, id="mine"))
    with pytest.raises(InvalidAdapter, match="not a folder"):
        ask(lambda client: client.adapters.load(folder / "none", id="mine"))


def test_load_from_server(ask: Driver, server: FakeServer) -> None:
    assert ask(lambda client: client.adapters.load_from_server("a/b", id="mine", labels={"k": "v"})).id == "mine"
    options = pb.AdapterOptions(labels={"k": "v"})
    assert server.requests == [pb.LoadAdapterRequest(adapter_id="mine", path="a/b", options=options)]


def test_list_reads_all_pages(ask: Driver, server: FakeServer) -> None:
    assert [adapter.id for adapter in ask(lambda client: client.adapters.list(page_size=2))] == list("abcde")
    assert [(request.page_size, request.page_token) for request in server.requests] == [(2, ""), (2, "1"), (2, "2")]


def test_list_is_lazy(server: FakeServer) -> None:
    with Client(server.address) as client:
        found = client.adapters.list()
        assert server.requests == []
        assert [next(found).id, next(found).id] == ["a", "b"]
        assert len(server.requests) == 1


def test_changes(ask: Driver, server: FakeServer) -> None:
    assert ask(lambda client: client.adapters.get("adapters/mine")).id == "mine"
    assert ask(lambda client: client.adapters.pin("mine", etag="e")).pinned
    assert not ask(lambda client: client.adapters.unpin("mine")).pinned
    ask(lambda client: client.adapters.label("mine", {"k": "v"}))
    assert ask(lambda client: client.adapters.delete("mine", etag="e")) == Deletion(2048, 4096, 2)
    get, pin, unpin, label, delete = server.requests
    assert get.name == "adapters/mine"
    assert (pin.adapter.name, pin.adapter.pinned, pin.adapter.etag) == ("adapters/mine", True, "e")
    assert (list(pin.update_mask.paths), list(unpin.update_mask.paths)) == (["pinned"], ["pinned"])
    assert (dict(label.adapter.labels), list(label.update_mask.paths)) == ({"k": "v"}, ["labels"])
    assert delete == pb.DeleteAdapterRequest(name="adapters/mine", etag="e")
