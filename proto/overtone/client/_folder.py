"""An adapter's folder on this machine to upload messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from overtone.client._requests import bare_id
from overtone.errors import InvalidAdapter
from overtone.v1 import adapters_pb2

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CHUNK_BYTES = 1 << 20


def upload_messages(
    folder: Path, adapter_id: str, options: adapters_pb2.AdapterOptions
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """Header, then both files in chunks. A missing file raises InvalidAdapter now, not while gRPC iterates."""
    check(folder)
    header = adapters_pb2.UploadHeader(adapter_id=bare_id(adapter_id), options=options)
    return _messages(folder, header)


def check(folder: Path) -> None:
    """Raises InvalidAdapter naming the file that is missing."""
    if not folder.is_dir():
        raise InvalidAdapter(f"{folder} is not a folder")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).is_file():
            continue
        if name == WEIGHTS_FILE and (folder / PICKLE_FILE).is_file():
            raise InvalidAdapter(
                f"{folder} has {PICKLE_FILE} but no {name}: pickle files are never uploaded, because loading one runs code "
                "of its author; convert the folder with `overtone adapters convert`",
                field=PICKLE_FILE,
            )
        raise InvalidAdapter(f"{folder} has no {name}", field=name)


def _messages(folder: Path, header: adapters_pb2.UploadHeader) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    yield adapters_pb2.UploadAdapterRequest(header=header)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (folder / name).open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield adapters_pb2.UploadAdapterRequest(chunk=adapters_pb2.FileChunk(file_name=name, data=data))
