"""An adapter's folder on this machine to upload messages, or to be sent with a request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from overtone.errors import InvalidAdapter
from overtone.v1 import adapters_pb2, generation_pb2

LAYOUTS = (
    ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    ("pica_config.json", "pica_adapter.safetensors", "pica_adapter.bin"),
)
"""Configuration, weights, and what some tools write in place of the weights."""
CHUNK_BYTES = 1 << 20


def upload_messages(
    folder: Path, adapter_id: str, options: adapters_pb2.AdapterOptions
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """Header, then both files in chunks. A missing file raises InvalidAdapter now, not while gRPC iterates."""
    names = files_in(folder)
    header = adapters_pb2.UploadHeader(adapter_id=adapter_id.removeprefix("adapters/"), options=options)
    return _messages(folder, names, header)


def inline(folder: Path) -> generation_pb2.InlineAdapter:
    """The adapter in `folder` as a part of a request."""
    return generation_pb2.InlineAdapter(files={name: (folder / name).read_bytes() for name in files_in(folder)})


def files_in(folder: Path) -> tuple[str, str]:
    """Configuration and weights of the layout that `folder` has. Raises InvalidAdapter naming the file that is missing."""
    if not folder.is_dir():
        raise InvalidAdapter(f"{folder} is not a folder")
    config, weights, pickled = next((names for names in LAYOUTS if (folder / names[0]).is_file()), LAYOUTS[0])
    if not (folder / config).is_file():
        raise InvalidAdapter(f"{folder} has no {config}", field=config)
    if (folder / weights).is_file():
        return config, weights
    if (folder / pickled).is_file():
        raise InvalidAdapter(
            f"{folder} has {pickled} but no {weights}: pickle files are never uploaded, because loading one runs code "
            "of its author; convert the folder with `overtone adapters convert`",
            field=pickled,
        )
    raise InvalidAdapter(f"{folder} has no {weights}", field=weights)


def _messages(
    folder: Path, names: tuple[str, str], header: adapters_pb2.UploadHeader
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    yield adapters_pb2.UploadAdapterRequest(header=header)
    for name in names:
        with (folder / name).open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield adapters_pb2.UploadAdapterRequest(chunk=adapters_pb2.FileChunk(file_name=name, data=data))
