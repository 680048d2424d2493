"""Several adapters on a request, and adapters that travel with it, over a real socket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from overtone.client import Client, InvalidAdapter, InvalidRequest, TooLarge
from overtone.v1 import generation_pb2 as pb
from overtone.v1 import generation_pb2_grpc
from support.adapters import make_loca_folder, make_sdctft_folder
from support.reference import Adapters, MergedReference
from support.server import ThreadServer

PROMPT = "the sea and the wind tell an old story"


def make(tmp_path: Path, modules: dict[str, tuple[int, int]], n: int, strength: float) -> dict[str, Path]:
    half = dict(list(modules.items())[::2])
    return {
        "loca": make_loca_folder(tmp_path / "loca", modules, n=n, seed=1, strength=strength),
        "sdctft": make_sdctft_folder(tmp_path / "sdctft", half, n=n, seed=2, strength=strength),
        "unlisted": make_loca_folder(tmp_path / "unlisted", half, n=n, seed=3, strength=strength),
    }


def check(server: ThreadServer, reference: MergedReference, folders: dict[str, Path], new_tokens: int) -> None:
    """A batch of sums, parts and the base at once; every request equals the summed dense deltas."""
    loca, sdctft, unlisted = folders.values()
    with server.client() as client:
        digests = {name: client.adapters.load(folders[name], id=name).digest for name in ("loca", "sdctft")}
        ids = client.tokenize(PROMPT).token_ids
    cases: list[tuple[dict[str | Path, float], Adapters]] = [
        ({"loca": 1.0, "sdctft": 1.0}, {loca: 1.0, sdctft: 1.0}),
        ({"sdctft": 1.0, "loca": 1.0}, {loca: 1.0, sdctft: 1.0}),
        ({"loca": 0.5, "sdctft": -1.5}, {loca: 0.5, sdctft: -1.5}),
        ({"loca": 2.0}, {loca: 2.0}),
        ({"loca": 1.0}, loca),
        ({unlisted: 1.0}, unlisted),
        ({unlisted: 0.5, "loca": 1.0}, {loca: 1.0, unlisted: 0.5}),
        ({"loca": 0.0}, None),
        ({}, None),
    ]

    def ask(adapters: dict[str | Path, float]) -> object:
        with Client(server.address) as client:
            return client.generate(PROMPT, adapters=adapters, max_new_tokens=new_tokens, ignore_eos=True)

    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(ask, [adapters for adapters, _ in cases]))
    seen = set()
    for (adapters, expected), answer in zip(cases, answers, strict=True):
        assert answer.token_ids == reference.greedy(expected, ids, new_tokens), adapters
        assert {use.adapter: use.weight for use in answer.adapters} == {
            key if isinstance(key, str) else "": weight for key, weight in adapters.items()
        }
        assert all(use.digest == digests.get(use.adapter, use.digest) for use in answer.adapters)
        assert [use.digest for use in answer.adapters] == sorted(use.digest for use in answer.adapters)
        seen.add(tuple(answer.token_ids))
    assert answers[0].adapters == answers[1].adapters
    assert len(seen) >= 6, "the adapters change nothing that can be seen"
    with server.client() as client:
        assert {adapter.id for adapter in client.adapters.list()} >= {"loca", "sdctft"}
        assert "unlisted" not in {adapter.id for adapter in client.adapters.list()}


def test_tiny(tiny_server: ThreadServer, tiny_reference: MergedReference, tmp_path: Path) -> None:
    check(tiny_server, tiny_reference, make(tmp_path / "made", dict(tiny_server.base.modules), 60, 0.8), 12)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo(demo_server: ThreadServer, demo_reference: MergedReference, tmp_path: Path) -> None:
    modules = {n: s for n, s in demo_server.base.modules.items() if n.endswith(("q_proj", "v_proj", "up_proj"))}
    check(demo_server, demo_reference, make(tmp_path, modules, 200, 0.3), 12)


def test_bad_shares_are_refused(tiny_server: ThreadServer, tmp_path: Path) -> None:
    good = make_loca_folder(tmp_path / "good", {next(iter(tiny_server.base.modules)): (96, 64)}, n=3, seed=1)
    files = {path.name: path.read_bytes() for path in good.iterdir()}
    named, inline = pb.AdapterShare(adapter="x"), pb.AdapterShare(inline=pb.InlineAdapter(files=files))
    large = {**files, "adapter_model.safetensors": bytes(5 << 20)}
    cases: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"adapter": "x", "adapters": [named]}, InvalidRequest, "adapters"),
        ({"adapters": [pb.AdapterShare()]}, InvalidRequest, "adapters[0]"),
        ({"adapters": [pb.AdapterShare(adapter="../x")]}, InvalidRequest, "adapter"),
        (
            {"adapters": [named, pb.AdapterShare(adapter="y", weight=float("nan"))]},
            InvalidRequest,
            "adapters[1].weight",
        ),
        ({"adapters": [named] * 17}, InvalidRequest, "adapters"),
        ({"adapters": [pb.AdapterShare(inline=pb.InlineAdapter(files=large))]}, TooLarge, "adapters[0].inline"),
        (
            {"adapters": [pb.AdapterShare(inline=pb.InlineAdapter(files={"a.bin": b""}))]},
            InvalidAdapter,
            "a.bin",
        ),
        (
            {"adapters": [pb.AdapterShare(inline=pb.InlineAdapter(files={"adapter_config.json": b"{}"}))]},
            InvalidAdapter,
            "adapter_model.safetensors",
        ),
    ]
    with grpc.insecure_channel(tiny_server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        from overtone.client._status import from_rpc

        for fields, error, field in cases:
            with pytest.raises(grpc.RpcError) as caught:
                stub.Generate(pb.GenerateRequest(text="abc", **fields))  # type: ignore[arg-type]
            raised = from_rpc(caught.value)
            assert isinstance(raised, error)
            assert raised.field == field, raised
        assert stub.Generate(pb.GenerateRequest(text="abc", adapters=[inline])).outcome.adapters[0].digest
