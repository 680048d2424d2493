"""`--deterministic` on the default model: what a request is told does not depend on the traffic, to the last bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from overtone.engine.config import EngineConfig
from support.demo import demo_cache
from support.determinism import different, logits_of
from support.requests import make_request
from support.server import ThreadServer
from support.traffic import make_adapters

WORDS = ["the", "sea", "and", "the", "wind", "tell", "an", "old", "story", "of", "ships", "that", "never"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    folder = tmp_path_factory.mktemp("deterministic")
    settings: dict[str, Any] = {"model_cache": demo_cache(), "dtype": "float32", "max_step_tokens": 48, "max_batch": 12}
    with ThreadServer(folder / "store", None, deterministic=True, kv_cache_mib=256, **settings) as running:
        yield running


def test_log_probabilities_do_not_change_with_the_traffic(server: ThreadServer, tmp_path: Path) -> None:
    base = server.server.backend.base
    assert base.deterministic
    modules = {n: s for n, s in base.modules.items() if n.endswith(("q_proj", "v_proj", "down_proj"))}
    folders = make_adapters(tmp_path, modules, 3)
    with server.client() as client:
        for adapter_id, folder in folders.items():
            client.adapters.load(folder, id=adapter_id)

        def ask(index: int) -> list[tuple[int, float]]:
            adapter = [None, *folders][index % 4]
            prompt = " ".join(WORDS[: 2 + (7 * index) % len(WORDS)])
            answer = client.generate(prompt, adapter=adapter, max_new_tokens=6 + index, ignore_eos=True, top_n=4)
            return [(one.id, one.logprob) for token in answer.tokens for one in token.top]

        alone = [ask(index) for index in range(8)]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(ask, reversed(range(8))))[::-1]
    assert together == alone
    assert len({tuple(one) for one in alone}) == 8


def test_logits_alone_and_in_a_cramped_batch(server: ThreadServer) -> None:
    base, rng = server.server.backend.base, random.Random(1)
    shared: dict[str, Any] = {"max_context_tokens": 128, "deterministic": True}
    alone = EngineConfig(max_batch=1, max_step_tokens=512, cache_pages=16, **shared)
    cramped = EngineConfig(max_batch=5, max_step_tokens=23, cache_pages=9, **shared)
    requests = [
        make_request(f"r{i}", [rng.randrange(100, 40000) for _ in range(length)], 24, ignore_eos=True)
        for i, length in enumerate([3, 70, 17, 31, 64, 1])
    ]
    together, recorder = logits_of(base, cramped, requests, early=3)
    assert sum(stats.preemptions for stats in recorder.stats) > 0
    for request in requests:
        name = request.request_id
        assert not different(logits_of(base, alone, [request], early=1)[0][name], together[name])
    assert torch.isfinite(torch.stack(list(together["r1"].values()))).all()
