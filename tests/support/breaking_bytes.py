"""Random broken folders: what `breaking` makes of a valid one, and files that are broken byte by byte or by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from support.breaking import CERTAIN, DOUBTFUL
from support.folders import Draws, Folder

Files = dict[str, bytes]
_CONFIG_LIMIT = 64 * 1024


@dataclass(frozen=True)
class Broken:
    """how: which way; folder: the valid one; chunks: (file name, bytes) as they are uploaded; certain: whether it must be
    refused, otherwise it may be accepted if it means what it says; named_well: whether the names are a layout's."""

    how: str
    folder: Folder
    chunks: tuple[tuple[str, bytes], ...]
    certain: bool
    named_well: bool = True

    @property
    def files(self) -> Files:
        return dict(self.chunks)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        sizes = [(name, len(data)) for name, data in self.chunks]
        configs = [data.decode(errors="replace")[:2000] for name, data in self.chunks if name.endswith("json")]
        printer.text(f"Broken({self.how}, {self.folder}, {sizes}, {configs})")


def truncated(d: Draws, files: Files) -> Files:
    name = d.one_of(*files)
    return {**files, name: files[name][: d.integer(0, len(files[name]) - 1)]}


def lengthened(d: Draws, files: Files) -> Files:
    name = d.one_of(*files)
    return {**files, name: files[name] + d.one_of(b"\0", b"x", b"\0" * 8, b"}", files[name])}


def flipped(d: Draws, files: Files) -> Files:
    """One bit, in the configuration, in the header of the weights or in their values."""
    config, weights = files
    header = 8 + int.from_bytes(files[weights][:8], "little")
    name, low, high = d.one_of(
        (config, 0, len(files[config])), (weights, 0, header), (weights, header, len(files[weights]))
    )
    place = d.integer(low, max(low, high - 1))
    changed = bytearray(files[name])
    if place < len(changed):
        changed[place] ^= 1 << d.integer(0, 7)
    return {**files, name: bytes(changed)}


def header_lies(d: Draws, files: Files) -> Files:
    weights = list(files)[1]
    raw = files[weights]
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = d.one_of(*(key for key in header if key != "__metadata__"))
    entry = header[name]
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    lies: Mapping[str, Any] = {
        "dtype": d.one_of("F32", "I32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E5M2", "Q4", "", None, 4),
        "shape": d.one_of(
            [*shape, 1], shape[:-1], shape[::-1], [2**62, 2**62], [-1, *shape], [1.0], "3", [True], [0, 2**70]
        ),
        "data_offsets": d.one_of(
            [end, start], [start + 1, end + 1], [0, end], [start], [start, end + 8], [-8, 0], None
        ),
    }
    if d.flag():
        key = d.one_of(*lies)
        header[name] = {**entry, key: lies[key]}
    else:
        header[name] = d.one_of({**entry, "more": 1}, {"dtype": "F32"}, [], None, 3)
        header |= d.one_of({}, {"__metadata__": {"a": 1}}, {"__metadata__": "x"})
    text = json.dumps(header).encode()
    claimed = d.one_of(len(text), len(text), len(text) - 1, len(text) + 1, 0, 2**63, 2**64 - 1, len(raw))
    return {**files, weights: claimed.to_bytes(8, "little") + text + raw[8 + length :]}


def key_twice(d: Draws, files: Files) -> Files:
    config = next(iter(files))
    key = d.one_of(*json.loads(files[config]))
    return {**files, config: files[config][:-1] + f", {json.dumps(key)}: 1}}".encode()}


def empty(d: Draws, files: Files) -> Files:
    return {**files, d.one_of(*files): d.one_of(b"", b"{}", b"[]", b"null", b"\0" * 8, b"\x80\x04.", b"[" * 60_000)}


_BYTES_DOUBTFUL: tuple[Callable[[Draws, Files], Files], ...] = (flipped, flipped, header_lies)
_BYTES_CERTAIN: tuple[Callable[[Draws, Files], Files], ...] = (truncated, lengthened, key_twice, empty)


def misnamed(d: Draws, files: Files) -> list[tuple[str, bytes]]:
    """Wrong names, a file too many or too few, chunks out of order, a configuration that is too large."""
    (config, text), (weights, data) = files.items()
    other = d.one_of("README.md", "adapter_model.bin", "../adapter_config.json", "a\0b", "Adapter_Config.json", "x.pt")
    stray = "pica_config.json" if config == "adapter_config.json" else "adapter_config.json"
    ways: list[list[tuple[str, bytes]]] = [
        [(config, text)],
        [(weights, data)],
        [],
        [(other, text), (weights, data)],
        [(config, text), (other, data)],
        [(config, text), (weights, data), (d.one_of(other, stray), text)],
        [(config, data), (weights, text)],
        [(config, text[:5]), (weights, data), (config, text[5:])],
        [(config, text + b" " * _CONFIG_LIMIT), (weights, data)],
    ]
    return ways[d.integer(0, len(ways) - 1)]


@st.composite
def broken(draw: Callable[[st.SearchStrategy[Any]], Any], valid: st.SearchStrategy[Folder]) -> Broken:
    folder = draw(valid)
    d = Draws(draw)
    kind = d.integer(0, 9)
    if kind == 0:
        return Broken("misnamed", folder, tuple(misnamed(d, folder.files())), certain=True, named_well=False)
    if kind <= 2:
        certain = d.flag()
        damage = d.one_of(*(_BYTES_CERTAIN if certain else _BYTES_DOUBTFUL))
        return Broken(damage.__name__, folder, tuple(damage(d, folder.files()).items()), certain)
    if kind <= 4:
        change = d.one_of(*CERTAIN)
        return Broken(change.__name__, folder, tuple(change(d, folder).files().items()), certain=True)
    changed, how = folder, []
    for _ in range(d.one_of(1, 1, 1, 2)):
        if changed.tensors and changed.config:
            change = d.one_of(*DOUBTFUL)
            changed = change(d, changed)
            how.append(change.__name__)
    return Broken(" and ".join(how), folder, tuple(changed.files().items()), certain=False)
