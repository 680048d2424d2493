"""Adapters are loaded, used and deleted without end: nothing of them is left in the server's memory."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from bench.million.files import SyntheticAdapters

from support.server import ThreadServer


def rss_bytes() -> int:
    """Of this process, in which the server is."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cycles(server: ThreadServer, folder: Path, first: int, until: int) -> None:
    made = SyntheticAdapters({name: shape for name, shape in server.base.modules.items() if "proj" in name}, 12)
    folder.mkdir(exist_ok=True)
    with server.client() as client:
        for number in range(first, until):
            files = made.files(number)
            (folder / files.layout.config).write_bytes(files.config)
            (folder / files.layout.weights).write_bytes(files.weights)
            record = client.adapters.load(folder, id=f"c{number}")
            answer = client.generate(token_ids=range(3, 9), adapter=f"c{number}", max_new_tokens=2, ignore_eos=True)
            assert answer.adapter_digest == record.digest
            deletion = client.adapters.delete(f"c{number}")
            assert deletion.freed_bytes + deletion.pending_bytes > 0


def check(server: ThreadServer, folder: Path, count: int) -> None:
    warm = max(100, count // 10)
    cycles(server, folder, 0, warm)
    store = server.server.backend.store
    before, stats = rss_bytes(), store.stats()
    cycles(server, folder, warm, count)
    after = store.stats()
    for name in ("registered_count", "version_count", "leased_count", "resident_bytes", "live_bytes"):
        assert getattr(after, name) == getattr(stats, name), name
    assert rss_bytes() - before < 16 << 20


def test_load_use_delete(tiny_server: ThreadServer, tmp_path: Path) -> None:
    check(tiny_server, tmp_path / "made", 300)


@pytest.mark.slow
def test_ten_thousand_times_load_use_delete(tiny_server: ThreadServer, tmp_path: Path) -> None:
    check(tiny_server, tmp_path / "made", 10_000)
