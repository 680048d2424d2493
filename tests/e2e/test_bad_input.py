"""Bad input over a real socket: each row has its code, its reason and the name of what is wrong; the server lives on."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2
from safetensors.torch import load_file, save_file

from overtone.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc
from support.adapters import make_loca_folder
from support.server import ThreadServer
from support.stored import versions_on_disk

Files = dict[str, bytes]
FIRST = "model.layers.0.self_attn.q_proj"


def status_of(error: grpc.RpcError) -> tuple[str, error_details_pb2.ErrorInfo, dict[str, object]]:
    """Code, ErrorInfo and the other details by type name, from the call's trailing metadata."""
    trailing = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    info, others = error_details_pb2.ErrorInfo(), {}
    for detail in status.details:
        if not detail.Unpack(info):
            for kind in (error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
                message = kind()
                if detail.Unpack(message):
                    others[kind.__name__] = message
    assert info.domain == "overtone"
    assert status.message == error.details()
    return error.code().name, info, others


def upload(stub: adapters_pb2_grpc.AdapterServiceStub, files: Files, adapter_id: str = "bad") -> adapters_pb2.Adapter:
    messages = [adapters_pb2.UploadAdapterRequest(header=adapters_pb2.UploadHeader(adapter_id=adapter_id))]
    for name, data in files.items():
        for start in range(0, max(1, len(data)), 1 << 19):
            chunk = adapters_pb2.FileChunk(file_name=name, data=data[start : start + (1 << 19)])
            messages.append(adapters_pb2.UploadAdapterRequest(chunk=chunk))
    return stub.UploadAdapter(iter(messages))


@pytest.fixture
def good(tiny_server: ThreadServer, tmp_path: Path) -> Files:
    modules = {FIRST: tiny_server.base.modules[FIRST]}
    folder = make_loca_folder(tmp_path / "good", modules, n=20, seed=1, float_indices=False)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors(files: Files, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Files:
    path = tmp_path / "changed.safetensors"
    path.write_bytes(files["adapter_model.safetensors"])
    loaded = load_file(path)
    change(loaded)
    save_file(loaded, path)
    return {**files, "adapter_model.safetensors": path.read_bytes()}


def config(files: Files, **changes: object) -> Files:
    return {
        **files,
        "adapter_config.json": json.dumps({**json.loads(files["adapter_config.json"]), **changes}).encode(),
    }


def set_value(name: str, index: tuple[int, ...], value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(loaded: dict[str, torch.Tensor]) -> None:
        loaded[f"base_model.model.{FIRST}.{name}"][index] = value

    return change


def header_bomb(files: Files) -> Files:
    return {**files, "adapter_model.safetensors": struct.pack("<Q", 1 << 40) + files["adapter_model.safetensors"][8:]}


def truncated(files: Files) -> Files:
    return {**files, "adapter_model.safetensors": files["adapter_model.safetensors"][:-7]}


BAD_ADAPTERS: dict[str, tuple[Callable[[Files, Path], Files], str, str, str]] = {
    "truncated file": (lambda f, _: truncated(f), "INVALID_ARGUMENT", "ADAPTER_MALFORMED", "safetensors"),
    "header bomb": (lambda f, _: header_bomb(f), "INVALID_ARGUMENT", "ADAPTER_MALFORMED", "header"),
    "wrong shape": (
        lambda f, t: tensors(f, t, lambda d: d.update({f"base_model.model.{FIRST}.spectrum": torch.zeros(2, 10)})),
        "INVALID_ARGUMENT",
        "ADAPTER_MALFORMED",
        "spectrum",
    ),
    "index out of range": (
        lambda f, t: tensors(f, t, set_value("spectrum_indices", (1, 3), 100_000)),
        "INVALID_ARGUMENT",
        "ADAPTER_INDEX_OUT_OF_RANGE",
        "100000",
    ),
    "negative index": (
        lambda f, t: tensors(f, t, set_value("spectrum_indices", (0, 0), -1)),
        "INVALID_ARGUMENT",
        "ADAPTER_INDEX_OUT_OF_RANGE",
        "-1",
    ),
    "NaN": (
        lambda f, t: tensors(f, t, set_value("spectrum", (5,), float("nan"))),
        "INVALID_ARGUMENT",
        "ADAPTER_NON_FINITE",
        "spectrum",
    ),
    "unknown tensor": (
        lambda f, t: tensors(f, t, lambda d: d.update({"base_model.model.surprise": torch.zeros(3)})),
        "INVALID_ARGUMENT",
        "ADAPTER_MALFORMED",
        "surprise",
    ),
    "module not in the base": (
        lambda f, t: tensors(
            f,
            t,
            lambda d: d.update({k.replace("layers.0", "layers.99"): d.pop(k) for k in list(d)}),
        ),
        "FAILED_PRECONDITION",
        "BASE_MODEL_MISMATCH",
        "layers.99",
    ),
    "another base's fingerprint": (
        lambda f, _: config(f, base_fingerprint="0" * 64),
        "FAILED_PRECONDITION",
        "BASE_MODEL_MISMATCH",
        "fingerprint",
    ),
    "pickle file": (
        lambda f, _: {**f, "adapter_model.bin": pickle.dumps({"a": 1})},
        "INVALID_ARGUMENT",
        "ADAPTER_MALFORMED",
        "adapter_model.bin",
    ),
    "pickle by another name": (
        lambda f, _: {**f, "adapter_model.safetensors": pickle.dumps({"a": 1})},
        "INVALID_ARGUMENT",
        "ADAPTER_MALFORMED",
        "adapter_model.safetensors",
    ),
    "unserved family": (
        lambda f, _: config(f, peft_type="LOHA"),
        "FAILED_PRECONDITION",
        "UNSUPPORTED_ADAPTER",
        "LOHA",
    ),
    "unknown setting": (lambda f, _: config(f, surprise=1), "INVALID_ARGUMENT", "ADAPTER_MALFORMED", "surprise"),
    "missing file": (
        lambda f, _: {"adapter_config.json": f["adapter_config.json"]},
        "INVALID_ARGUMENT",
        "ADAPTER_MALFORMED",
        "adapter_model.safetensors",
    ),
    "path as a file name": (
        lambda f, _: {**f, "../../evil": b"x"},
        "INVALID_ARGUMENT",
        "ADAPTER_MALFORMED",
        "evil",
    ),
}


@pytest.mark.parametrize("row", BAD_ADAPTERS)
def test_bad_adapters_are_refused_and_leave_nothing(
    tiny_server: ThreadServer, good: Files, tmp_path: Path, row: str
) -> None:
    make, code, reason, named = BAD_ADAPTERS[row]
    with grpc.insecure_channel(tiny_server.address) as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            upload(stub, make(good, tmp_path))
        got_code, info, _ = status_of(caught.value)
        assert (got_code, info.reason) == (code, reason), caught.value.details()
        assert named in caught.value.details()
        assert not stub.ListAdapters(adapters_pb2.ListAdaptersRequest()).adapters
        assert upload(stub, good, "fine").name == "adapters/fine"
    assert len(versions_on_disk(tiny_server.config.store)) == 1
    assert not list((tiny_server.config.store / "adapters" / "tmp").iterdir())


def generate(stub: generation_pb2_grpc.GenerationServiceStub, **fields: object) -> generation_pb2.GenerateResponse:
    return stub.Generate(generation_pb2.GenerateRequest(**{"text": "abc", **fields}))  # type: ignore[arg-type]


def sampling(**fields: float) -> dict[str, object]:
    return {"sampling": generation_pb2.SamplingParameters(**fields)}  # type: ignore[arg-type]


BAD_REQUESTS: dict[str, tuple[dict[str, object], str, str, str]] = {
    "unknown adapter": ({"adapter": "nobody"}, "NOT_FOUND", "ADAPTER_NOT_FOUND", "nobody"),
    "adapter name that is a path": ({"adapter": "../x"}, "INVALID_ARGUMENT", "INVALID_REQUEST", "adapter"),
    "too many token ids": (
        {"text": None, "token_ids": generation_pb2.TokenIds(ids=[1] * 100_000)},
        "INVALID_ARGUMENT",
        "PROMPT_TOO_LONG",
        "token_ids",
    ),
    "long role": (
        {"text": None, "chat": generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="u" * 100, content="x")])},
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        "role",
    ),
    "prompt too long": ({"text": "abc " * 4000}, "INVALID_ARGUMENT", "PROMPT_TOO_LONG", "prompt"),
    "prompt and answer too long": (
        {"stopping": generation_pb2.StoppingCriteria(max_new_tokens=100_000)},
        "INVALID_ARGUMENT",
        "PROMPT_TOO_LONG",
        "max_new_tokens",
    ),
    "empty prompt": ({"text": ""}, "INVALID_ARGUMENT", "INVALID_REQUEST", "prompt"),
    "token id out of range": (
        {"text": None, "token_ids": generation_pb2.TokenIds(ids=[1, 4_000_000])},
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        "4000000",
    ),
    "temperature": (sampling(temperature=-1.0), "INVALID_ARGUMENT", "BAD_SAMPLING_PARAM", "temperature"),
    "temperature NaN": (sampling(temperature=float("nan")), "INVALID_ARGUMENT", "BAD_SAMPLING_PARAM", "temperature"),
    "top_p": (sampling(top_p=0.0), "INVALID_ARGUMENT", "BAD_SAMPLING_PARAM", "top_p"),
    "min_p": (sampling(min_p=1.5), "INVALID_ARGUMENT", "BAD_SAMPLING_PARAM", "min_p"),
    "repetition_penalty": (
        sampling(repetition_penalty=0.0),
        "INVALID_ARGUMENT",
        "BAD_SAMPLING_PARAM",
        "repetition_penalty",
    ),
    "top_n": (
        {"response": generation_pb2.ResponseOptions(top_n=1000)},
        "INVALID_ARGUMENT",
        "BAD_SAMPLING_PARAM",
        "top_n",
    ),
    "empty stop string": (
        {"stopping": generation_pb2.StoppingCriteria(stop=[""])},
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        "stop",
    ),
    "tenant": ({"tenant": "Anna"}, "INVALID_ARGUMENT", "INVALID_REQUEST", "tenant"),
    "long tenant": ({"tenant": "a" * 65}, "INVALID_ARGUMENT", "INVALID_REQUEST", "tenant"),
    "priority": ({"priority": 11}, "INVALID_ARGUMENT", "INVALID_REQUEST", "priority"),
    "low priority": ({"priority": -11}, "INVALID_ARGUMENT", "INVALID_REQUEST", "priority"),
    "cache salt": ({"cache_salt": "x" * 129}, "INVALID_ARGUMENT", "INVALID_REQUEST", "cache_salt"),
    "request id": ({"request_id": "x" * 500}, "INVALID_ARGUMENT", "INVALID_REQUEST", "request_id"),
}


@pytest.mark.parametrize("row", BAD_REQUESTS)
def test_bad_requests_are_refused(tiny_server: ThreadServer, row: str) -> None:
    fields, code, reason, named = BAD_REQUESTS[row]
    with grpc.insecure_channel(tiny_server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            generate(stub, **{key: value for key, value in {"text": "abc", **fields}.items() if value is not None})
        got_code, info, others = status_of(caught.value)
        assert (got_code, info.reason) == (code, reason), caught.value.details()
        assert named in caught.value.details() or named in info.metadata.get("field", "")
        assert ("BadRequest" in others) == (code == "INVALID_ARGUMENT")
        assert generate(stub).outcome.usage.completion_tokens > 0


ESCAPES = ["../{outside}", "{absolute}", "ok/../../{outside}", "link", "ok/../link", "inner/link"]


@pytest.mark.parametrize("path", [*ESCAPES, "", ".", "missing", "nul\0byte"])
def test_paths_outside_the_roots_are_refused(tiny_server: ThreadServer, tmp_path: Path, path: str) -> None:
    """The root is tmp_path. Behind every path that leads out of it lies a sound adapter."""
    modules = {FIRST: tiny_server.base.modules[FIRST]}
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    make_loca_folder(outside, modules, n=5, seed=1)
    make_loca_folder(tmp_path / "ok", modules, n=5, seed=2)
    (tmp_path / "inner").mkdir()
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "inner" / "link").symlink_to(outside)
    escape = path.format(outside=outside.name, absolute=outside)
    with grpc.insecure_channel(tiny_server.address) as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.LoadAdapter(adapters_pb2.LoadAdapterRequest(adapter_id="x", path=escape))
        code, info, _ = status_of(caught.value)
        assert (code, info.reason) == ("INVALID_ARGUMENT", "PATH_REFUSED")
        assert info.metadata["field"] == "path"
        loaded = stub.LoadAdapter(adapters_pb2.LoadAdapterRequest(adapter_id="x", path="ok"))
        assert loaded.family == "loca"
