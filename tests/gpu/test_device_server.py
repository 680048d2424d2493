"""A server on the device's path, over a real socket: in the interpreter, or on a GPU."""

from __future__ import annotations

import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.reference import MergedReference
from support.server import ThreadServer
from support.tiny_device import one_layer, tiny_device_base, tiny_folders


def metrics(server: ThreadServer) -> dict[str, str]:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        return dict(line.rsplit(" ", 1) for line in page.read().decode().splitlines() if not line.startswith("#"))


def test_served(tmp_path: Path) -> None:
    """Adapters of several families at once, loaded while it serves; one replaced by another under its id; deleted."""
    base = tiny_device_base()
    folders, reference = tiny_folders(base, tmp_path), MergedReference(one_layer())
    settings = {"kv_cache_mib": 2, "page_tokens": 8, "max_batch": 4, "max_context_tokens": 64}
    with ThreadServer(tmp_path / "store", base, **settings) as server, server.client() as client:
        prompt = client.tokenize("the tin of ink").token_ids
        expected = {name: reference.greedy(folders.get(name), prompt, 4) for name in (*folders, "")}
        for name, folder in folders.items():
            client.adapters.load(folder, id=name)

        def tokens(name: str) -> list[int]:
            answer = client.generate("the tin of ink", adapter=name or None, max_new_tokens=4, ignore_eos=True)
            return list(answer.token_ids)

        with ThreadPoolExecutor(5) as pool:
            assert dict(zip(expected, pool.map(tokens, expected), strict=True)) == expected
        client.adapters.load(folders["lora"], id="loca")
        assert tokens("loca") == expected["lora"]
        drawn = [
            client.generate("the", adapter="fourier", max_new_tokens=3, temperature=0.9, seed=7).token_ids for _ in "ab"
        ]
        assert list(drawn[0]) == list(drawn[1])
        held = float(metrics(server)["overtone_device_adapters"])
        client.adapters.delete("loca")  # both its versions, of which "lora" still has one
        client.adapters.delete("fourier")
        tokens("")
        rows = metrics(server)
        assert float(rows["overtone_device_adapters"]) == held - 2
        assert float(rows["overtone_device_adapters"]) >= 3
        assert float(rows["overtone_device_adapter_uploads_total"]) >= 3
        assert float(rows['overtone_adapter_rows_total{path="device"}']) > 0
