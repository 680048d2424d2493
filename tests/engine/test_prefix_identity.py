"""The prefix cache, chunked prefill and preemption change no token: four adapters and the base over one long beginning."""

from __future__ import annotations

from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.runner import ModelRunner
from support.deltas import random_adapter
from support.recorder import Recorder
from support.requests import make_request
from support.tiny import tiny_base

PREFIX = [(11 * i) % 250 + 1 for i in range(100)]
CONFIGS = {
    "on": EngineConfig(8, 512, 160, 4, 600),
    "off": EngineConfig(8, 512, 160, 4, 600, prefix_cache=False),
    "tiny budget": EngineConfig(8, 9, 160, 4, 600),
    "few pages": EngineConfig(8, 64, 160, 4, 64),
    "few pages, off": EngineConfig(8, 64, 160, 4, 64, prefix_cache=False),
}


def play(config: EngineConfig) -> tuple[list[list[int]], Recorder]:
    """Two waves of ten: two requests of each of four adapters and of the base."""
    base, recorder = tiny_base(), Recorder()
    names = [name for name in base.modules if "self_attn" in name]
    adapters = [random_adapter(base.modules, names, seed=seed).deltas for seed in range(4)] + [None]
    engine = Engine(ModelRunner(base, config).run, base.codec.decode, frozenset(), config, recorder)
    engine.start()
    waves = []
    for wave in range(2):
        requests = [
            make_request(f"{wave}.{i}", [*PREFIX, 3 + i, *range(40, 40 + 3 * i)], 12, adapter=adapters[i % 5])
            for i in range(10)
        ]
        for request in requests:
            engine.submit(request)
        recorder.wait(*(request.request_id for request in requests))
        waves.append([recorder.tokens(request.request_id) for request in requests])
    engine.stop()
    assert waves[0] == waves[1]
    assert recorder.stats[-1].pages_used == 0
    return waves[0], recorder


def test_all_ways_give_the_same_tokens() -> None:
    played = {name: play(config) for name, config in CONFIGS.items()}
    reference = played["off"][0]
    assert all(tokens == reference for tokens, _ in played.values())
    assert len({tuple(tokens) for tokens in reference}) > 5, "the adapters and prompts hardly matter here"

    def total(name: str, what: str) -> int:
        return sum(getattr(stats, what) for stats in played[name][1].stats)

    # Each way was really taken: the second wave finds all five beginnings, few pages preempt and evict.
    on = played["on"][1]
    assert all(on.finish(f"1.{i}").cached_prompt_tokens >= 100 for i in range(10))
    assert total("off", "prefix_hit_tokens") == total("off", "pages_cached") == 0
    assert total("few pages, off", "preemptions") > 0
    assert total("few pages", "prefix_evictions") > 0
    assert max(stats.prefill_tokens for stats in played["tiny budget"][1].stats) <= 9
